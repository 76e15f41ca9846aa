"""``hookd tail``: every attempt once, whenever its transaction commits."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import pytest

from hookd.commands.tail import line_of
from hookd.postgres.tail import NAMED_MOST, NO_DAEMON_S, Choice, Tail
from tests.cli import Cli
from tests.producing import add_endpoint_with_id, fetch, send, wait_for_row
from tests.receiver import Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess
    from tests.receiver import Call

pytestmark = pytest.mark.usefixtures("one_server")

INSERT = """
insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, verdict)
select clock_timestamp() - make_interval(secs => $2), $1, hookd.uuid7(), 1, 1, 'delivered'
"""

NODE = """
insert into hookd.node (id, backend, started_at, seen_at, summary)
values ('n', 1, now() - interval '1 day', now(), jsonb_build_object('unsettled_since', extract(epoch from now()) - $1::float8))
"""


async def ids(reading: Tail) -> list[int]:
    return [row["delivery_id"] async for page in reading.news() for row in page]


async def sessions(dsn: str, count: int) -> list[asyncpg.Connection]:
    return [await asyncpg.connect(dsn) for _ in range(count)]


def test_what_commits_late_comes_late_and_once(dsn: str) -> None:
    async def go() -> None:
        reader, one, two = await sessions(dsn, 3)
        await two.execute(INSERT, 1, 10.0)
        reading = Tail(reader, Choice())
        assert [r["delivery_id"] for r in await reading.last(10)] == [1]
        slow = one.transaction()
        await slow.start()
        await one.execute(INSERT, 2, 30.0)
        await two.execute(INSERT, 3, 0.0)
        assert await ids(reading) == [3]
        assert await ids(reading) == []
        await two.execute(INSERT, 4, 0.0)
        await slow.commit()
        assert await ids(reading) == [2, 4]
        assert await ids(reading) == []
        # what began before the last look of a daemon that says so
        await two.execute(NODE, 500.0)
        assert await ids(reading) == []
        await two.execute(INSERT, 5, 450.0)
        assert await ids(reading) == [5]
        for connection in (reader, one, two):
            await connection.close()

    asyncio.run(go())


def test_without_a_claim_only_the_last_minute_is_read(dsn: str) -> None:
    """The bound is what makes it cheap: prove that there is one."""

    async def go() -> None:
        reader, writer = await sessions(dsn, 2)
        reading = Tail(reader, Choice())
        await reading.last(0)
        await writer.execute(INSERT, 1, NO_DAEMON_S + 30)
        await writer.execute(INSERT, 2, NO_DAEMON_S - 30)
        assert await ids(reading) == [2]
        await reader.close()
        await writer.close()

    asyncio.run(go())


@pytest.mark.parametrize("named_most", [NAMED_MOST, -1])
def test_nothing_is_missing_while_many_write(
    dsn: str, monkeypatch: pytest.MonkeyPatch, named_most: int
) -> None:
    """Transactions that overlap in every way, attempts dated long before their commit; by either condition."""
    monkeypatch.setattr("hookd.postgres.tail.NAMED_MOST", named_most)
    writers, each = 6, 40
    seen: list[int] = []

    async def write(n: int) -> None:
        dice = random.Random(n)
        connection = await asyncpg.connect(dsn)
        for k in range(each):
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(INSERT, n * each + k, dice.random() * 50)
            await asyncio.sleep(dice.random() * 0.02)
            if dice.random() < 0.1:
                # as the owner does not, and another session might
                async with connection.transaction():
                    await connection.execute("select 1")
            await transaction.commit()
        await connection.close()

    async def go() -> None:
        reader = await asyncpg.connect(dsn)
        reading = Tail(reader, Choice())
        await reading.last(0)
        work = asyncio.gather(*(write(n) for n in range(writers)))
        while not work.done():
            seen.extend(await ids(reading))
        await work
        seen.extend(await ids(reading))
        await reader.close()

    asyncio.run(go())
    assert sorted(seen) == list(range(writers * each))


def test_more_than_a_page(dsn: str) -> None:
    async def go() -> None:
        reader, writer = await sessions(dsn, 2)
        reading = Tail(reader, Choice())
        await reading.last(0)
        await writer.execute(
            """insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, verdict)
               select now(), n, hookd.uuid7(), 1, 1, 'delivered' from generate_series(1, 2500) n"""
        )
        assert sorted(await ids(reading)) == list(range(1, 2501))
        assert len(await reading.last(50)) == 50
        since = Tail(reader, Choice())
        hour_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
        assert [len(page) async for page in since.since(hour_ago)] == [1000, 1000, 500]
        assert await ids(since) == []
        await reader.close()
        await writer.close()

    asyncio.run(go())


def test_a_daemon_says_since_when_it_has_something_unsettled(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    async def hang(_call: Call, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def go() -> None:
        async with Receiver(hang) as receiver:
            await add_endpoint_with_id(dsn, receiver.url)
            await asyncio.to_thread(start_daemon)
            asked = "select (summary ->> 'at')::float8 - (summary ->> 'unsettled_since')::float8 as age from hookd.node"
            (idle,) = await fetch(dsn, asked)
            assert idle["age"] < 1
            await send(dsn)
            await receiver.wait_for_calls(1)
            begun = time.time()
            row = await wait_for_row(dsn, f"select * from ({asked}) a where a.age > 2")
            assert row["age"] <= time.time() - begun + 2

    asyncio.run(go())


# The command.


class Tailing:
    """``hookd tail`` as a process."""

    def __init__(self, cli: Cli, *arguments: str, stdout: Any = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hookd", "tail", *arguments],
            env={"PATH": "/usr/bin:/bin", "HOOKD_DATABASE__DSN": cli.dsn, "TERM": "xterm", "COLUMNS": "200"},
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=cli.folder,
        )  # fmt: skip

    def lines(self, count: int) -> list[str]:
        assert self.process.stdout is not None
        deadline = threading.Timer(60, self.process.kill)
        deadline.start()
        try:
            return [self.process.stdout.readline() for _ in range(count)]
        finally:
            deadline.cancel()

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        rest, errors = self.process.communicate(timeout=30)
        assert (self.process.returncode, errors) == (0, "")
        return rest


@pytest.fixture
def cli(dsn: str, tmp_path: Path) -> Cli:
    return Cli(dsn, tmp_path)


def test_attempts_as_they_happen(cli: Cli, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE="[]")

    async def go() -> None:
        async with Receiver() as good, Receiver(always(answer(503))) as bad:
            _, fine = await add_endpoint_with_id(cli.dsn, good.url, tenant="acme")
            _, failing = await add_endpoint_with_id(cli.dsn, bad.url)
            first = await send(cli.dsn, "order.paid", tenant="acme")
            await wait_for_row(cli.dsn, "select from hookd.attempt")

            def watch() -> str:
                everything, failed = Tailing(cli, "--json"), Tailing(cli, "--failed")
                (line,) = everything.lines(1)
                found = json.loads(line)
                assert (found["event_id"], found["type"], found["tenant"], found["status"]) == (
                    first,
                    "order.paid",
                    "acme",
                    200,
                )
                assert (found["endpoint_id"], found["verdict"]) == (str(fine), "delivered")
                second = asyncio.run(send(cli.dsn, "order.failed"))
                assert json.loads(everything.lines(1)[0])["event_id"] == second
                (said,) = failed.lines(1)
                for part in ("exhausted", "503", "order.failed", second, bad.url):
                    assert part in said
                assert "\x1b" not in said
                assert everything.stop() == ""
                assert failed.stop() == ""

                rows = cli.json(
                    "tail",
                    "--no-follow",
                    "--since",
                    "1h",
                    "--outcome",
                    "5xx",
                    "--endpoint",
                    str(failing)[:18],
                )
                assert [row["event_id"] for row in rows] == [second]
                assert cli.ok("tail", "--no-follow", "-n", "0") == ""
                assert "is not one of delivered" in cli.fails(2, "tail", "--outcome", "fine")

                return second

            second = await asyncio.to_thread(watch)
            connection = await asyncpg.connect(cli.dsn)

            async def matching(**choice: Any) -> list[str]:
                return [str(row["event_id"]) for row in await Tail(connection, Choice(**choice)).last(10)]

            assert await matching() == [first, second]
            assert await matching(endpoint=failing) == [second]
            assert await matching(event=UUID(first)) == [first]
            assert await matching(tenant="acme") == [first]
            assert await matching(type_pattern="order.paid") == [first]
            assert await matching(type_pattern="order.*") == [first, second]
            assert await matching(outcomes=["5xx"]) == await matching(outcomes=["503"]) == [second]
            assert (
                await matching(outcomes=["200", "timeout"])
                == await matching(outcomes=["delivered"])
                == [first]
            )
            assert await matching(outcomes=["answered"]) == [first, second]
            assert await matching(outcomes=["timeout"]) == []
            await connection.close()

    asyncio.run(go())


def test_it_ends_when_nobody_reads(cli: Cli) -> None:
    asyncio.run(fetch(cli.dsn, INSERT, 1, 0.0))
    tailing = Tailing(cli)
    tailing.lines(1)
    assert tailing.process.stdout is not None
    tailing.process.stdout.close()
    # and nothing more is written
    assert tailing.process.wait(timeout=30) == 0
    assert tailing.process.stderr is not None
    assert tailing.process.stderr.read() == ""
    tailing.process.stderr.close()


def test_on_a_terminal_a_line_is_a_line(cli: Cli) -> None:
    asyncio.run(
        fetch(
            cli.dsn,
            """insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, verdict, reason, url)
               values (now(), 1, hookd.uuid7(), 1, 3, 'exhausted', E'\\x1b[31m it said so', 'https://example.com/' || repeat('x', 300))""",
        )
    )
    for columns, no_colour in ((60, ""), (120, "1")):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "hookd", "tail", "--no-follow"],
            env={"PATH": "/usr/bin:/bin", "HOOKD_DATABASE__DSN": cli.dsn, "TERM": "xterm", "COLUMNS": str(columns), "NO_COLOR": no_colour},
            stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.DEVNULL, cwd=cli.folder,
        )  # fmt: skip
        os.close(theirs)
        said = b""
        try:
            while more := os.read(ours, 4096):
                said += more
        except OSError:
            pass
        os.close(ours)
        assert process.wait(timeout=30) == 0
        text = said.decode()
        assert ("\x1b[31m" in text) == (not no_colour)
        plain = text.replace("\x1b[31m", "").replace("\x1b[0m", "")
        assert "\x1b" not in plain
        (line,) = plain.splitlines()
        assert len(line) == columns


def test_a_line_says_what_follows() -> None:
    at = datetime.datetime(2026, 11, 25, 1, 2, 3, tzinfo=datetime.UTC)
    row = {
        "at": at, "event_id": UUID(int=1), "verdict": "retry", "status": None, "outcome": "connect_refused", "total_ms": 1.6, "type": "a",
        "url": "http://x/", "attempt": 1, "retry_at": at + datetime.timedelta(minutes=5), "replay": True, "reason": "the connection was refused",
    }  # fmt: skip
    line = line_of(row, None)
    assert line.mark == "warn"
    assert line.text.startswith("01:02:03  retry      connect refused       2 ms  a")
    assert line.text.endswith("http://x/  attempt 1, replay, again in 5 min, the connection was refused")
    fine = row | {"verdict": "delivered", "status": 200, "retry_at": None, "replay": False, "reason": None}
    assert line_of(fine, None).text.endswith("http://x/")
    assert str(UUID(int=1)) not in line_of(fine, 80).text
