"""
The command line.  A command's module is imported when it is called: ``hookd --help`` stays as quick as Python itself.

Exit status: 0 done, 1 it failed, 2 usage or configuration.  An error is one line on stderr that says what to do.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass

import click
from click.shell_completion import CompletionItem

from hookd import __version__

COMMANDS = {
    # name: module, attribute, help
    "run": ("run", "run", "The daemon: deliver until told to stop"),
    "check-config": ("configuration", "check_config", "Say whether the configuration is right"),
    "config": ("configuration", "config", "Show what is in force, or the file's JSON schema"),
    "dsn": ("configuration", "dsn", "Print the URI of the database, for applications and psql"),
    "doctor": ("doctor", "doctor", "Look at everything that hookd depends on"),
    "migrate": ("migrate", "migrate", "Bring the database's schema up to date"),
    "send": ("send", "send", "Send an event"),
    "endpoint": ("endpoint", "endpoint", "Register callback URLs and look after them"),
    "secrets": ("secrets", "secrets", "Encrypt endpoint secrets at rest, change the master key"),
    "event": ("inspect", "event", "Find events and what became of them"),
    "attempts": ("inspect", "attempts", "Every attempt, with its answer and timing"),
    "tail": ("tail", "tail", "Attempts as they happen"),
    "explain": ("inspect", "explain", "Why an event or a delivery is where it is"),
    "status": ("inspect", "status", "How the daemons, the queue and the lanes are doing"),
    "top": ("top", "top", "The same, live"),
    "replay": ("replay", "replay", "Queue settled deliveries again"),
    "resend": ("replay", "resend", "One event or delivery again, now"),
    "audit": ("audit", "audit", "Who did what to endpoints and deliveries"),
    "verify": ("verify", "verify", "Say whether a captured request's signature holds"),
    "listen": ("listen", "listen", "A receiver for development"),
    "docs": ("docs", "docs", "Documentation for those who receive"),
    "health": ("inspect", "health", "Ask a running daemon whether it is well"),
    "evict": ("inspect", "evict", "End the session of a daemon that hangs; the others take its hosts"),
    "demo": ("demo", "demo", "Receivers good and bad, and what hookd does about each"),
    "completion": ("configuration", "completion", "Completion for bash, zsh or fish"),
}


@dataclass(slots=True)
class Invocation:
    """What stands on the command line beside the command."""

    config_file: str | None = None
    json: bool = False


class Lazy(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one."""
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:
                # a TAB after it: no place for errors
                return None
            raise click.exceptions.NoSuchCommand(cmd_name, possibilities=COMMANDS, ctx=ctx)
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"hookd.commands.{module}"), attribute)
        _give_examples(command, cmd_name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete from the table too: a TAB imports no command."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=text)
            for name, (_, _, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the table, and import nothing for it."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


def _give_examples(command: click.Command, name: str) -> None:
    """End the help of a command, and of those in it, with an example."""
    from hookd.commands.examples import EXAMPLES  # noqa: PLC0415 - not for a list of commands

    if isinstance(command, click.Group):
        for inner, one in command.commands.items():
            _give_examples(one, f"{name} {inner}")
    elif name in EXAMPLES:
        # \b: as it is, not folded
        command.epilog = f"\b\nExample:  {EXAMPLES[name]}"


@click.group(
    cls=Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Documentation: README.md and docs/. Exit status: 0 done, 1 it failed, 2 usage or configuration.",
)
@click.version_option(__version__, prog_name="hookd")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="Default: $HOOKD_CONFIG, ./config.toml, /etc/hookd/config.toml.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def cli(ctx: click.Context, config_file: str | None, *, as_json: bool) -> None:
    """Deliver webhooks, for applications that already have PostgreSQL."""
    ctx.obj = Invocation(config_file, as_json)


def main() -> None:
    """The console script."""
    _open_standard_streams()
    try:
        status = cli.main(prog_name="hookd", standalone_mode=False)
    except click.exceptions.Exit as done:
        status = done.exit_code
    except click.Abort:
        sys.stderr.write("hookd: interrupted\n")
        status = 1
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" (see {error.ctx.command_path} --help)"
        sys.stderr.write(f"hookd: {' '.join(error.format_message().split())}{hint}\n")
        status = error.exit_code
    except BrokenPipeError:
        status = 0
    except Exception as error:  # noqa: BLE001 - what is not known is raised again
        status = _known(error)
    sys.exit(status if isinstance(status, int) else 0)


def _open_standard_streams() -> None:
    """Where 0, 1 or 2 is closed the next socket would get that number, and what is printed would go to PostgreSQL."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(opened, True)  # noqa: FBT003
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - they stay open
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _known(error: Exception) -> int:
    """Print an error that has a message of its own; others are bugs and show where they are."""
    from hookd.commands.session import Failed  # noqa: PLC0415
    from hookd.config import ConfigInvalid  # noqa: PLC0415 - only when something failed

    if isinstance(error, ConfigInvalid):
        sys.stderr.writelines(f"{mistake}\n" for mistake in error.mistakes)
        return 2
    if isinstance(error, Failed):
        sys.stderr.write(f"hookd: {error}\n")
        return error.status
    raise error
