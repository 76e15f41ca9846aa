"""``hookd demo``: receivers good and bad, a stream of events, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookd.commands.session import Failed, print_table

if TYPE_CHECKING:
    import asyncpg

    from hookd.net.receiver import Receiver

EVENTS = 8
EVERY_S = 0.4
DEADLINE_S = 60.0

SCHEDULE = '["600ms", "1s", "1500ms"]'
"""So that the demo ends today; the default schedule takes three days."""


@dataclass(frozen=True, slots=True)
class Part:
    """An endpoint of the demo."""

    name: str
    story: str
    manners: dict[str, Any] = field(default_factory=dict)
    away_s: float = 0.0
    """Nobody listens for so long after the first event."""


CAST = (
    Part("good", "answers 200"),
    Part("flaky", "answers every other request with 500", {"fail_rate": 0.5}),
    Part("slow", "takes a second", {"delay_s": 1.0}),
    Part(
        "busy",
        "answers 429, Retry-After: 1, three times",
        {"status": 429, "headers": {"Retry-After": "1"}, "relents_after": 3},
    ),
    Part("gone", "answers 410: wants no more", {"status": 410}),
    Part("wrong", "answers 404, whatever comes", {"status": 404}),
    Part("away", "nobody listens for four seconds", away_s=4.0),
)


@click.command()
def demo() -> None:
    """
    Receivers good and bad, a stream of events, and what becomes of them.

    Everything is its own and temporary: a PostgreSQL, a daemon, seven receivers on loopback.  It takes about ten seconds.
    """
    with tempfile.TemporaryDirectory(prefix="hookd-demo-") as folder:
        Path(folder).chmod(0o755)
        asyncio.run(_play(Path(folder)))


async def _play(folder: Path) -> None:
    from hookd.commands.session import bring_up_to_date, database_of  # noqa: PLC0415
    from hookd.config import Config, DatabaseConfig  # noqa: PLC0415 - not for --help

    config = Config(database=DatabaseConfig(data_dir=str(folder / "data")))
    click.echo("starting PostgreSQL, a daemon and the receivers ...", err=True)
    with database_of(config) as database:
        connection = await database.connect("demo")
        try:
            await bring_up_to_date(connection, config)
            async with contextlib.AsyncExitStack() as stack:
                names, away = await _cast(connection, stack)
                await stack.enter_async_context(_daemon(folder))
                back = asyncio.create_task(_come_back(away, stack))
                await _stream(connection, names)
                await back
                await _epilogue(connection, names)
        finally:
            connection.terminate()


async def _cast(
    connection: asyncpg.Connection, stack: contextlib.AsyncExitStack
) -> tuple[dict[Any, Part], list[tuple[float, Receiver, int]]]:
    """Start the receivers and register them; returns which endpoint is whose, and who comes back when, on which port."""
    from hookd.core.sealing import PLAIN  # noqa: PLC0415 - not for --help
    from hookd.core.signing import new_secret  # noqa: PLC0415
    from hookd.net.receiver import Manners, Receiver  # noqa: PLC0415
    from hookd.postgres import registry  # noqa: PLC0415

    names = {}
    away = []
    dice = random.Random(3)  # noqa: S311 - decides which request fails
    for part in CAST:
        secret = new_secret(secrets.token_bytes(32))
        receiver = Receiver(
            Manners(**part.manners), [secret.reveal()], lambda _: None, wall=time.time, draw=dice.random
        )
        port = await receiver.start(0)
        if part.away_s:
            await receiver.stop()
            away.append((part.away_s, receiver, port))
        else:
            stack.push_async_callback(receiver.stop)
        host = f"127.0.0.1:{port}"
        change = registry.EndpointChange(url=f"http://{host}/{part.name}", host=host)
        record = await registry.add(connection, "default", change, secret, keyring=PLAIN)
        names[record.id] = part
    return names, away


async def _come_back(away: list[tuple[float, Receiver, int]], stack: contextlib.AsyncExitStack) -> None:
    begun = time.monotonic()
    for after_s, receiver, port in away:
        await asyncio.sleep(begun + after_s - time.monotonic())
        await receiver.start(port)
        stack.push_async_callback(receiver.stop)


@contextlib.asynccontextmanager
async def _daemon(folder: Path) -> Any:
    with (folder / "daemon.log").open("w+b") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hookd", "run",
            env=os.environ | {
                "HOOKD_CONFIG": os.devnull, "HOOKD_DATABASE__DATA_DIR": str(folder / "data"),
                "HOOKD_NETWORK__ALLOW": '["127.0.0.0/8"]', "HOOKD_RETRY__SCHEDULE": SCHEDULE, "HOOKD_ADMIN__LISTEN": "",
                "HOOKD_LOG__FORMAT": "json",
            },
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


async def _stream(connection: asyncpg.Connection, names: dict[Any, Part]) -> None:
    """Send events and print attempts as they are made, until nothing is pending."""
    click.echo(f"{EVENTS} events to {len(names)} endpoints; every line is an attempt\n", err=True)
    sent: dict[Any, int] = {}
    seen: set[tuple[int, int]] = set()
    next_at = time.monotonic()
    until = next_at + DEADLINE_S
    while time.monotonic() < until:
        if len(sent) < EVENTS and time.monotonic() >= next_at:
            next_at += EVERY_S
            event_id = await connection.fetchval(
                "select hookd.send('order.paid', json_build_object('order', $1::integer)::text)",
                len(sent) + 1,
            )
            sent[event_id] = len(sent) + 1
        rows = await connection.fetch(
            """select a.*, e.id as endpoint_id from hookd.attempt a join hookd.endpoint e on e.key = a.endpoint
                order by a.at, a.delivery_id"""
        )
        for row in rows:
            if (row["delivery_id"], row["attempt"]) not in seen:
                seen.add((row["delivery_id"], row["attempt"]))
                _print(row, names[row["endpoint_id"]], sent.get(row["event_id"], 0))
        pending = await connection.fetchval("select exists (select from hookd.delivery)")
        if len(sent) == EVENTS and not pending:
            return
        await asyncio.sleep(0.05)
    raise Failed("the demo did not end in time")


COLOURS = {"delivered": "green", "retry": "yellow", "exhausted": "red"}


def _print(row: asyncpg.Record, part: Part, number: int) -> None:
    verdict = row["verdict"]
    what = row["status"] or row["reason"]
    if verdict == "retry":
        then = f"retry in {(row['retry_at'] - row['at']).total_seconds():.1f} s"
    elif verdict == "exhausted":
        then = "dead letter" if row["attempt"] else f"dead letter: {row['reason']}"
        what = what if row["attempt"] else "-"
    else:
        then = f"delivered in {row['total_ms']:.0f} ms"
    click.echo(
        f"order.paid #{number}  {part.name:6} attempt {row['attempt']}  {what!s:28} "
        + click.style(then, fg=COLOURS.get(verdict))
    )


async def _epilogue(connection: asyncpg.Connection, names: dict[Any, Part]) -> None:
    from hookd.postgres.explain import explain  # noqa: PLC0415 - not for --help

    rows = await connection.fetch(
        """select s.endpoint_id, e.state, count(*) filter (where s.state = 'delivered') as delivered,
                  count(*) filter (where s.state = 'exhausted') as dead,
                  (select count(*) from hookd.attempt a where a.endpoint = e.key and a.attempt > 0) as attempts
             from hookd.delivery_status s join hookd.endpoint e on e.id = s.endpoint_id
            group by 1, 2, e.key order by e.key"""
    )
    click.echo()
    print_table(
        [
            (names[r["endpoint_id"]].name, names[r["endpoint_id"]].story, r["delivered"], r["dead"], r["attempts"], r["state"])
            for r in rows
        ],
        ("endpoint", "receiver", "delivered", "dead letters", "attempts", "endpoint is"),
        "",
    )  # fmt: skip
    dead = await connection.fetchrow(
        """select l.event_id, l.delivery_id from hookd.dead_letter l join hookd.endpoint e on e.key = l.endpoint
            where e.url like '%/wrong' limit 1"""
    )
    if dead is not None:
        (explained,) = await explain(connection, dead["event_id"], dead["delivery_id"])
        click.echo(
            f"\n$ hookd explain {dead['delivery_id']}\n{explained['state']}  {explained['url']}\n  {explained['because']}"
        )
