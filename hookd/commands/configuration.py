"""``hookd check-config``, ``hookd config`` and ``hookd completion``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from hookd.commands.session import keyring_of, options, print_json
from hookd.config import SECTIONS, json_schema, load

if TYPE_CHECKING:
    from hookd.commands import Invocation


@click.command(name="check-config")
@options
@click.pass_obj
def check_config(invocation: Invocation) -> None:
    """Say whether the configuration is right; nothing is connected to.  `hookd doctor` looks further."""
    loaded = load(invocation.config_file)
    keyring_of(loaded.config)
    if invocation.json:
        print_json({"valid": True, "file": loaded.file})
    else:
        click.echo(f"{loaded.file or 'no file, so all defaults'}: ok")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def config() -> None:
    """Show what is in force, or the file's JSON schema."""


@config.command()
@options
@click.pass_obj
def show(invocation: Invocation) -> None:
    """Every key, its value, and where it comes from; passwords are not shown."""
    from hookd.postgres.connect import redacted  # noqa: PLC0415 - not for --help

    loaded = load(invocation.config_file)
    rows: list[tuple[str, Any, str]] = []
    for section in SECTIONS:
        part = getattr(loaded.config, section)
        for key in part.__struct_fields__:
            path = f"{section}.{key}"
            value = getattr(part, key)
            if path == "database.dsn":
                value = redacted(value)
            if path == "network.proxy" and value:
                value = str(loaded.config.egress_proxy())
            if path == "limits.hosts":
                value = {host: {k: getattr(h, k) for k in h.__struct_fields__} for host, h in value.items()}
            rows.append((path, value, loaded.sources.get(path, "default")))
    if invocation.json:
        print_json({path: {"value": value, "from": source} for path, value, source in rows})
        return
    width = max(len(path) for path, _, _ in rows)
    for path, value, source in rows:
        said = json.dumps(value)
        click.echo(f"{path.ljust(width)}  {said}" + ("" if source == "default" else f"  ({source})"))


@config.command()
def schema() -> None:
    """The JSON schema of config.toml, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """
    Print the completion script of a shell: commands, options, ids, event types and tenants.

    \b
    bash  in ~/.bashrc:                 eval "$(hookd completion bash)"
    zsh   in ~/.zshrc, after compinit:  eval "$(hookd completion zsh)"
    fish  once:                         hookd completion fish > ~/.config/fish/completions/hookd.fish
    """  # noqa: D301 - click's mark for lines that stay
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - not for --help

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "hookd", "_HOOKD_COMPLETE").source())
