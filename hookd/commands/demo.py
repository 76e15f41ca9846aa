"""``hookd demo``: receivers good and bad, and what hookd does about each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookd.commands.drawing import coloured
from hookd.commands.session import Failed, print_table

if TYPE_CHECKING:
    import asyncpg

    from hookd.net.receiver import Receiver

DEADLINE_S = 60.0

SCHEDULE = '["600ms", "1s", "1500ms"]'
"""So that the demo ends today; the default schedule takes three days."""

FOLD = 96


@dataclass(frozen=True, slots=True)
class Part:
    """A receiver of the demo."""

    name: str
    manners: dict[str, Any] = field(default_factory=dict)
    away_s: float = 0.0
    """Nobody listens for so long after the first event."""


@dataclass(frozen=True, slots=True)
class Act:
    """One kind of receiver, and what hookd does about it."""

    title: str
    before: str
    cast: tuple[Part, ...]
    after: str
    events: int = 3
    every_s: float = 0.15
    """Between two events."""


ACTS = (
    Act(
        "A good receiver",
        "The application inserts an event in its own transaction: select hookd.send('order.paid', …). That is all it does.",
        (Part("good"),),
        "Signed, sent and written down. An idle daemon is woken by the commit, not by polling.",
    ),
    Act(
        "A flaky one",
        "It answers every other request with 500.",
        (Part("flaky", {"fail_rate": 0.5}),),
        "What failed was tried again, later each time and never all at once. Here the waits are seconds; by default they "
        "grow from 5 s to a day, for three days.",
        events=4,
    ),
    Act(
        "A slow one beside a good one",
        "Both get every event; one of them takes a second for each.",
        (Part("slow", {"delay_s": 1.0}), Part("good")),
        "Nobody waited for the slow one: every host has a lane of its own, with its own limits.",
    ),
    Act(
        "One that is overloaded",
        "It answers 429 with Retry-After: 1 to the first three, then it has recovered.",
        (Part("busy", {"status": 429, "headers": {"Retry-After": "1"}, "relents_after": 3}),),
        "The whole lane held still for the second it asked for, and began again with fewer at once. What waited used up no "
        "attempt.",
        events=6,
    ),
    Act(
        "A dead one that comes back",
        "Nobody listens at its address for four seconds.",
        (Part("away", away_s=4.0),),
        "The first failures opened its breaker: one probe now and then instead of every retry. When a probe got through, the "
        "rest followed.",
        events=6,
    ),
    Act(
        "One that wants no more",
        "It answers 410 Gone.",
        (Part("gone", {"status": 410}),),
        "The endpoint is disabled and what was pending is kept as dead letters; `hookd endpoint resume ID --missed all` would "
        "give it what it missed.",
        every_s=0.0,
    ),
    Act(
        "One that is broken",
        "It answers 404, whatever comes, until somebody repairs it.",
        (Part("wrong", {"status": 404}),),
        "After the last retry they are dead letters. Nothing is lost: each is kept with its payload, and every attempt with its "
        "answer.",
        events=2,
    ),
)


@click.command()
@click.option(
    "--act", "acts", multiple=True, type=click.IntRange(1, len(ACTS)), help="Only this one; may be repeated."
)
def demo(acts: tuple[int, ...]) -> None:
    """
    Receivers good and bad, and what hookd does about each: a story in seven acts, within a minute.

    Everything is its own and temporary: a PostgreSQL, a daemon, eight receivers on loopback.  Nothing is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="hookd-demo-") as folder:
        Path(folder).chmod(0o755)
        asyncio.run(_play(Path(folder), acts or tuple(range(1, len(ACTS) + 1))))


async def _play(folder: Path, acts: tuple[int, ...]) -> None:
    from hookd.commands.session import bring_up_to_date, database_of  # noqa: PLC0415
    from hookd.config import Config, DatabaseConfig  # noqa: PLC0415 - not for --help

    config = Config(database=DatabaseConfig(data_dir=str(folder / "data")))
    click.echo("starting PostgreSQL and a daemon ...", err=True)
    with database_of(config) as database:
        connection = await database.connect("demo")
        try:
            await bring_up_to_date(connection, config)
            async with contextlib.AsyncExitStack() as stack:
                stage = Stage(connection, folder, stack)
                await stack.enter_async_context(_daemon(folder))
                await stage.wait_for_daemon()
                for number in acts:
                    await stage.play(number, ACTS[number - 1])
                if len(ACTS) in acts:
                    await stage.repair()
                await stage.conclude()
        finally:
            connection.terminate()


class Stage:
    """Plays acts, and prints every attempt as it is made."""

    def __init__(
        self, connection: asyncpg.Connection, folder: Path, stack: contextlib.AsyncExitStack
    ) -> None:
        self._connection = connection
        self._folder = folder
        self._stack = stack
        self._dice = random.Random(3)  # noqa: S311 - decides which request fails
        self._receivers: dict[str, Receiver] = {}
        self._ports: dict[str, int] = {}
        self._ids: dict[str, Any] = {}
        self._seen: set[tuple[int, int]] = set()
        self._numbers: dict[Any, int] = {}
        self._begun = 0.0

    async def wait_for_daemon(self) -> None:
        """Until it has taken its shards."""
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            if await self._connection.fetchval("select exists (select from hookd.node)"):
                return
            await asyncio.sleep(0.05)
        raise Failed("the daemon did not start in time")

    async def play(self, number: int, act: Act) -> None:
        """One act: its receivers are those of a tenant of their own."""
        tenant = f"act-{number}"
        click.echo(click.style(f"\n{number}. {act.title}", bold=True), color=coloured())
        _tell(act.before)
        for part in act.cast:
            await self._enter(part, tenant)
        away = [part for part in act.cast if part.away_s]
        self._begun = time.monotonic()
        back = asyncio.create_task(self._come_back(away))
        await self._watch(tenant, act.events, act.every_s)
        await back
        _tell(act.after)

    async def repair(self) -> None:
        """The last receiver works again, and gets what it missed."""
        identity = self._ids["wrong"]
        dead = await self._connection.fetchval(
            "select delivery_id from hookd.dead_letter order by delivery_id desc limit 1"
        )
        await self._type("explain", str(dead))
        self._receivers["wrong"].always(200)
        _tell("Now it is repaired:")
        await self._type("replay", "--endpoint", str(identity))
        self._begun = time.monotonic()
        await self._watch(f"act-{len(ACTS)}", 0)
        _tell("The same events with the same webhook-id, so that a receiver knows what it has had already.")

    async def conclude(self) -> None:
        """What became of everything."""
        rows = await self._connection.fetch(
            """select e.id, e.url, e.state, count(*) filter (where s.state = 'delivered') as delivered,
                      count(*) filter (where s.state = 'exhausted') as dead,
                      (select count(*) from hookd.attempt a where a.endpoint = e.key and a.attempt > 0) as attempts
                 from hookd.delivery_status s join hookd.endpoint e on e.id = s.endpoint_id
                group by e.key order by e.key"""
        )
        click.echo()
        print_table(
            [
                (r["url"].rpartition("/")[2], r["delivered"], r["dead"], r["attempts"], r["state"])
                for r in rows
            ],
            ("receiver", "delivered", "dead letters", "attempts", "endpoint is"),
            "",
        )
        click.echo(
            "\nYour turn: `hookd run` here, `hookd listen` in a second terminal; README.md goes on from there."
        )

    async def _enter(self, part: Part, tenant: str) -> None:
        """Start a receiver and register it."""
        from hookd.core.sealing import PLAIN  # noqa: PLC0415 - not for --help
        from hookd.core.signing import new_secret  # noqa: PLC0415
        from hookd.net.receiver import Manners, Receiver  # noqa: PLC0415
        from hookd.postgres import registry  # noqa: PLC0415

        secret = new_secret(secrets.token_bytes(32))
        receiver = Receiver(
            Manners(**part.manners), [secret.reveal()], lambda _: None, wall=time.time, draw=self._dice.random
        )
        port = await receiver.start(0)
        if part.away_s:
            await receiver.stop()
        else:
            self._stack.push_async_callback(receiver.stop)
        host = f"127.0.0.1:{port}"
        change = registry.EndpointChange(url=f"http://{host}/{part.name}", host=host)
        record = await registry.add(self._connection, tenant, change, secret, keyring=PLAIN)
        self._receivers[part.name] = receiver
        self._ids[part.name] = record.id
        self._ports[part.name] = port

    async def _come_back(self, away: list[Part]) -> None:
        for part in away:
            await asyncio.sleep(self._begun + part.away_s - time.monotonic())
            receiver = self._receivers[part.name]
            await receiver.start(self._ports[part.name])
            self._stack.push_async_callback(receiver.stop)
            self._say("it is back", "")

    async def _watch(self, tenant: str, events: int, every_s: float = 0.0) -> None:
        """Send events and print attempts as they are made, until nothing is pending."""
        sent, next_at = 0, time.monotonic()
        until = next_at + DEADLINE_S
        while time.monotonic() < until:
            if sent < events and time.monotonic() >= next_at:
                next_at += every_s
                count = 1 if every_s else events
                await self._send(tenant, count)
                sent += count
            # asked before the log is read: what is settled meanwhile is printed in the next turn
            pending = await self._connection.fetchval("select exists (select from hookd.delivery)")
            rows = await self._connection.fetch(ATTEMPTS, tenant)
            for row in rows:
                if (row["delivery_id"], row["attempt"]) not in self._seen:
                    self._seen.add((row["delivery_id"], row["attempt"]))
                    self._print(row)
            if sent == events and not pending:
                return
            await asyncio.sleep(0.05)
        raise Failed("the demo did not end in time")

    async def _send(self, tenant: str, count: int) -> None:
        """So many events, in one transaction."""
        first = len(self._numbers) + 1
        rows = await self._connection.fetch(
            """select n, hookd.send('order.paid', json_build_object('order', n)::text, tenant => $3) as id
                 from generate_series($1::integer, $2::integer) n""",
            first,
            first + count - 1,
            tenant,
        )
        self._numbers |= {row["id"]: row["n"] for row in rows}

    def _print(self, row: asyncpg.Record) -> None:
        verdict, name = row["verdict"], row["url"].rpartition("/")[2]
        what = str(row["status"] or row["reason"] or "-")
        if verdict == "retry":
            then = f"again in {(row['retry_at'] - row['at']).total_seconds():.1f} s"
        elif verdict == "exhausted":
            then = "dead letter" if row["attempt"] else f"dead letter: {row['reason']}"
            what = what if row["attempt"] else "-"
        else:
            then = f"delivered in {row['total_ms']:.0f} ms"
        attempt = f"attempt {row['attempt']}" if row["attempt"] else "no attempt"
        order = self._numbers.get(row["event_id"], 0)
        self._say(
            f"order {order:<3} {name:6} {attempt:10}  {what:28}", click.style(then, fg=COLOURS.get(verdict))
        )

    def _say(self, text: str, then: str) -> None:
        click.echo(f"  {time.monotonic() - self._begun:4.1f} s  {text} {then}".rstrip(), color=coloured())

    async def _type(self, *arguments: str) -> None:
        """Run a command, as somebody would."""
        click.echo(f"\n  $ hookd {' '.join(arguments)}")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hookd", *arguments, env=_environment(self._folder), stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        said, _ = await process.communicate()
        for line in said.decode("utf-8", "replace").splitlines():
            click.echo(f"  {line}")
        click.echo()


ATTEMPTS = """
select a.*, e.url as url from hookd.attempt a join hookd.endpoint e on e.key = a.endpoint
 where e.tenant = $1
 order by a.at, a.delivery_id
"""

COLOURS = {"delivered": "green", "retry": "yellow", "exhausted": "red"}


def _tell(text: str) -> None:
    """A sentence of the story, folded."""
    width = min(FOLD, shutil.get_terminal_size().columns)
    click.echo(click.wrap_text(text, width, initial_indent="   ", subsequent_indent="   "))


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "HOOKD_CONFIG": os.devnull, "HOOKD_DATABASE__DSN": "embedded", "HOOKD_DATABASE__DATA_DIR": str(folder / "data"),
        "HOOKD_NETWORK__ALLOW": '["127.0.0.0/8"]', "HOOKD_RETRY__SCHEDULE": SCHEDULE, "HOOKD_ADMIN__LISTEN": "",
        "HOOKD_LOG__FORMAT": "json",
    }  # fmt: skip


@contextlib.asynccontextmanager
async def _daemon(folder: Path) -> Any:
    with (folder / "daemon.log").open("w+b") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hookd", "run",
            env=_environment(folder),
            stderr=log,
        )  # fmt: skip
        try:
            yield
            if process.returncode is not None:
                log.seek(0)
                raise Failed(f"the daemon ended: {log.read().decode('utf-8', 'replace')[-500:]}")
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()
