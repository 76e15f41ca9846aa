"""What a terminal is given: help with examples, completion, tables that fit, ids that are nearly right."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
import click
import pytest

from hookd.commands import Invocation, cli
from hookd.commands.drawing import SHORT_ID, table
from hookd.commands.examples import EXAMPLES
from hookd.commands.listen import _follows, _statuses
from hookd.commands.session import Failed
from hookd.postgres.lookup import endpoint_named, event_named
from hookd.postgres.registry import NotPossible
from tests.cli import Cli
from tests.producing import add_endpoint_with_id, fetch, send

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

pytestmark = pytest.mark.usefixtures("one_server")

BIN = Path(sys.executable).parent


def commands() -> Iterator[tuple[str, click.Command]]:
    def walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                yield from walk(inner, f"{path} {name}".strip())
        else:
            yield path, command

    yield from walk(cli, "")


def test_every_command_has_a_purpose_options_with_help_and_an_example() -> None:
    found = dict(commands())
    assert set(EXAMPLES) == set(found)
    for path, command in found.items():
        text = command.get_help(click.Context(command, info_name=f"hookd {path}"))
        assert EXAMPLES[path] in text, path
        first = text.partition("\n\n")[2].partition("\n\n")[0].strip()
        assert first.endswith((".", ":")), (path, first)
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, (path, option.name)


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_are_valid(path: str) -> None:
    command = dict(commands())[path]
    line = re.sub(r'^\w+ "\$\((.*)\)"$', r"\1", EXAMPLES[path])
    words = shlex.split(re.split(r" [<>] ", line)[0])
    assert " ".join(words).startswith(f"hookd {path}")
    command.make_context(path, words[1 + len(path.split()) :], obj=Invocation())


# Completion.


def environment_of(cli_: Cli) -> dict[str, str]:
    return {
        "PATH": f"{BIN}:/usr/bin:/bin",
        "HOOKD_DATABASE__DSN": cli_.dsn,
        "HOME": str(cli_.folder),
        "TERM": "dumb",
    }


def completed(shell: str, cli_: Cli, *lines: str) -> list[list[str]]:
    """What bash or fish offers for each line."""
    if shell == "bash":
        script = 'eval "$(hookd completion bash)"\n' + "\n".join(
            f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=(); _hookd_completion hookd\n"
            "printf '%s\\n' \"${COMPREPLY[@]}\" ="
            for line in lines
        )
    else:
        script = "hookd completion fish | source\n" + "\n".join(
            f"complete -C {shlex.quote(line)}; echo =" for line in lines
        )
    done = subprocess.run(
        [shell, "-c", script], env=environment_of(cli_), cwd=cli_.folder, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    parts = done.stdout.split("=\n")[:-1]
    return [[one.partition("\t")[0] for one in part.splitlines() if one] for part in parts]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_completion(tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    found = completed(shell, Cli("embedded", tmp_path), "hookd ta", "hookd tail --fai", "hookd nonsense x")
    assert found[:2] == [["tail"], ["--failed"]]
    assert shell == "fish" or found[2] == []


def test_completion_in_zsh(tmp_path: Path) -> None:
    """Typed on a terminal: zsh completes nowhere else."""
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    keyboard = Keyboard(tmp_path, "zsh", "-f", "-i", **environment_of(Cli("embedded", tmp_path)))
    keyboard.type('autoload -U compinit && compinit -u -D; eval "$(hookd completion zsh)"; echo rea""dy\n')
    keyboard.until("ready")
    keyboard.type("hookd ta\t")
    keyboard.until("hookd tail")
    keyboard.type("--faile\t")
    keyboard.until("--failed")
    keyboard.end(signal.SIGHUP)


def test_completion_of_ids(dsn: str, tmp_path: Path) -> None:
    _, endpoint = asyncio.run(add_endpoint_with_id(dsn, "http://127.0.0.1:9009/"))
    assert completed("bash", Cli(dsn, tmp_path), f"hookd endpoint show {str(endpoint)[:8]}") == [
        [str(endpoint)]
    ]


def test_completion_starts_no_server_and_says_nothing(tmp_path: Path) -> None:
    for dsn in ("embedded", "postgresql://nobody@127.0.0.1:1/none"):
        assert completed("bash", Cli(dsn, tmp_path), "hookd endpoint show 01") == [[]]
    assert list(tmp_path.iterdir()) == []


# Ids.


def test_ids_by_their_beginning_and_what_was_meant(dsn: str, tmp_path: Path) -> None:
    cli_ = Cli(dsn, tmp_path)
    _, first = asyncio.run(add_endpoint_with_id(dsn, "http://127.0.0.1:9009/one"))
    _, second = asyncio.run(add_endpoint_with_id(dsn, "http://127.0.0.1:9009/two"))
    event = asyncio.run(send(dsn, "order.paid"))
    same = next(n for n, (a, b) in enumerate(zip(str(first), str(second), strict=True)) if a != b)
    slip = str(first)[:-1] + ("0" if str(first)[-1] != "0" else "1")

    async def look() -> None:
        connection = await asyncpg.connect(dsn)

        async def refused(named: Callable[..., Awaitable[UUID]], text: str) -> str:
            with pytest.raises((NotPossible, ValueError)) as raised:
                await named(connection, text)
            return str(raised.value)

        assert await endpoint_named(connection, str(first)[: same + 1]) == first
        assert await endpoint_named(connection, str(first).upper()) == first
        assert await event_named(connection, event[:18]) == UUID(event)
        said = await refused(endpoint_named, str(first)[:same])
        assert said.startswith("more than one endpoint begins with")
        assert f"{first} (http://127.0.0.1:9009/one)" in said
        assert f"did you mean {first} (http://127.0.0.1:9009/one)?" in await refused(endpoint_named, slip)
        assert "is an event, not an endpoint" in await refused(endpoint_named, event)
        assert "is an endpoint, not an event" in await refused(event_named, str(first)[:30])
        assert "there is no event that begins with ffffffff" in await refused(event_named, "ffffffff")
        for text in ("first", "", "01", "zz" * 16, str(first) + "0"):
            assert "it looks like 01890a5d-" in await refused(endpoint_named, text)
        await connection.close()

    asyncio.run(look())
    assert cli_.json("endpoint", "show", str(first)[: same + 1])[0]["id"] == str(first)
    assert "is an endpoint, not an event" in cli_.fails(1, "explain", str(first))
    assert "it looks like 01890a5d-" in cli_.fails(2, "event", "show", "first")


def test_what_is_mistyped(tmp_path: Path) -> None:
    cli_ = Cli("embedded", tmp_path)
    assert "Did you mean 'tail'?" in cli_.fails(2, "tial")
    assert "Did you mean '--failed'?" in cli_.fails(2, "tail", "--failde")
    assert "Did you mean" in cli_.fails(2, "endpoint", "lst")


# Tables.


@pytest.mark.parametrize("width", [60, 80, 100, 140, 300])
def test_tables_fit(width: int) -> None:
    identity = str(UUID(int=2**100))
    rows = [
        (identity, "default", "active", "user.*", "https://example.com/" + "long/" * 30),
        (identity, "t", "paused", "*", "https://x\x1b[31m.example/\n"),
    ]
    lines = [line.text for line in table(rows, ("id", "tenant", "state", "types", "url"), width)]
    assert max(map(len, lines)) <= width
    assert all(line.isprintable() for line in lines)
    assert lines[1].startswith(identity if width >= 100 else identity[:SHORT_ID] + " ")
    assert "…" in lines[1] or width == 300
    assert len({line.find("active") for line in lines if "active" in line} | {lines[0].find("STATE")}) == 1
    # where it is no terminal nothing is cut
    (_, line) = table([("2026-11-25 01:02:03", "x" * 200)], ("at", "what"), 40)
    assert re.fullmatch(r"11-25 01:02:03  x{8}…x{15}", line.text)
    assert rows[0][4] in table(rows, ("id", "tenant", "state", "types", "url"), None)[1].text


# hookd listen.


def test_what_follows_an_answer() -> None:
    assert [_follows(status) for status in (204, 302, 404, 410, 429)] == [
        "delivered", "a failure, unless delivery.redirects follows it", "it comes again later", "the endpoint is switched off",
        "it comes again, and fewer at once",
    ]  # fmt: skip
    assert _statuses("503,503 200") == [503, 503, 200]
    for wrong in ("", "99", "abc", "600", "٥٠٣"):
        with pytest.raises(Failed):
            _statuses(wrong)


class Keyboard:
    """A process on a terminal."""

    def __init__(self, folder: Path, *command: str, **environment: str) -> None:
        pid, self.fd = pty.fork()
        if pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, {"PATH": "/usr/bin:/bin", "TERM": "xterm", **environment})
        self.pid = pid
        self.text = ""

    def until(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = re.search(pattern, self.text)
            if found:
                return found
            if select.select([self.fd], [], [], 0.2)[0]:
                self.text += os.read(self.fd, 4096).decode("utf-8", "replace")
        raise AssertionError(f"{pattern!r} is not in {self.text!r}")

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode())

    def end(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C, or another signal."""
        os.kill(self.pid, number)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def post(port: str, body: bytes = b"{}") -> int:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/hook", body, {"webhook-id": "1", "hookd-attempt": "2"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_listen_answers_as_told(tmp_path: Path) -> None:
    keyboard = Keyboard(
        tmp_path, sys.executable, "-m", "hookd", "listen", "--port", "0", "--status", "500,201", NO_COLOR="1"
    )
    port = keyboard.until(r"listening on http://127.0.0.1:(\d+)/")[1]
    keyboard.until("type 503 and Enter")
    assert [post(port), post(port), post(port)] == [500, 201, 201]
    keyboard.type("503 410\n")
    keyboard.until("next: 503, 410, then always 201")
    keyboard.type("what\n")
    keyboard.until("'what' is no status to answer with")
    assert [post(port), post(port), post(port)] == [503, 410, 201]
    keyboard.type("always 404\n")
    keyboard.until("next: then always 404")
    assert post(port, b'{"a": "\x1b[31m"}') == 404
    keyboard.until("answered 404: it comes again later")
    for said in (
        "POST /hook  attempt 2",
        "Webhook-Id: 1",
        "not checked",
        "answered 410: the endpoint is switched off",
        '{"a": "?[31m"}',
    ):
        assert said.lower() in keyboard.text.lower()
    assert "\x1b" not in keyboard.text
    assert keyboard.end() == 0


# hookd demo.


def test_demo_tells_its_story(tmp_path: Path) -> None:
    cli_ = Cli("embedded", tmp_path)
    said = cli_.ok("demo", "--act", "1", "--act", "6")
    assert "1. A good receiver" in said
    assert len(re.findall(r"order \d +good +attempt 1 +200 +delivered in \d+ ms", said)) == 3
    assert len(re.findall(r"order \d +gone .*dead letter", said)) == 3
    assert re.search(r"^gone +0 +3 +\d +disabled$", said, re.MULTILINE)
    assert "\x1b" not in said


def test_answers_do_not_play_with_the_terminal(dsn: str, tmp_path: Path) -> None:
    cli_ = Cli(dsn, tmp_path)
    _, endpoint = asyncio.run(add_endpoint_with_id(dsn, "http://127.0.0.1:9009/"))
    event = asyncio.run(send(dsn))
    asyncio.run(
        fetch(
            dsn,
            """insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, verdict, outcome, reason, answer_headers, answer_body)
               select now(), d.id, d.event_id, d.endpoint, 1, 'exhausted', 'malformed', E'\\x1b[2Jr', E'x: \\x1b]0;h\\x07', E'b\\x1b[31m\\nc\\u009b1m'
                 from hookd.delivery d""",
        )
    )
    asyncio.run(fetch(dsn, "delete from hookd.delivery"))
    for arguments in (
        ("attempts",),
        ("attempts", "--full"),
        ("event", "show", event),
        ("explain", event),
        ("tail", "--no-follow"),
    ):
        said = cli_.ok(*arguments)
        assert "[2Jr" in said or "[31m" in said or str(endpoint) in said
        assert all(c.isprintable() or c == "\n" for c in said), arguments
