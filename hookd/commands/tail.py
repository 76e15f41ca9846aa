"""``hookd tail``: attempts as they happen."""

from __future__ import annotations

import asyncio
import datetime
import re
import select
import sys
from typing import TYPE_CHECKING, Any

import click

from hookd.commands import completing, drawing
from hookd.commands.drawing import SHORT_ID, Line
from hookd.commands.session import (
    bring_up_to_date,
    database_of,
    endpoint_of,
    event_of,
    moment,
    options,
    plain_failures,
    print_json,
)
from hookd.commands.top import Events
from hookd.config import load
from hookd.core.model import OutcomeKind, VerdictKind
from hookd.core.words import span

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.postgres.connect import Database
    from hookd.postgres.tail import Tail

EVERY_S = 0.5

SHARE = 0.2
"""Of the time that may be spent on reading: what costs much is not asked for again at once."""

FAILED = ("retry", "exhausted")

OUTCOMES = (
    *(kind.value for kind in VerdictKind if kind is not VerdictKind.HOLD),
    *(kind.value for kind in OutcomeKind),
)

STATUS = re.compile(r"[1-5]([0-9]{2}|xx)", re.IGNORECASE)

MARKS = {"retry": "warn", "exhausted": "bad", "expired": "dim", "cancelled": "dim"}

WIDE = 150
"""Columns of a terminal from which ids are shown whole."""

TYPE_MOST = 24


class _Outcome(click.ParamType[str]):
    """A verdict, an outcome, a status or a class of statuses."""

    name = "outcome"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        said = str(value).lower()
        if said in OUTCOMES or STATUS.fullmatch(said):
            return said
        return self.fail(
            f"{value!r} is not one of {', '.join(OUTCOMES)}, nor a status such as 503 or 5xx", param, ctx
        )


@click.command()
@click.option(
    "--endpoint",
    "endpoint_id",
    metavar="ID",
    type=completing.ENDPOINT_ID,
    help="Of this endpoint only.",
)
@click.option("--event", "event_id", metavar="ID", type=completing.EVENT_ID, help="Of this event only.")
@click.option(
    "--type",
    "type_",
    metavar="PATTERN",
    shell_complete=completing.types,
    help="Of these events only: user.created, user.* or *.",
)
@click.option("--tenant", shell_complete=completing.tenants, help="Of this tenant only.")
@click.option("--outcome", "outcomes", multiple=True, type=_Outcome(), metavar="WHAT", help="Only these: delivered, retry, exhausted, timeout, 503, 5xx …; may be repeated.")  # fmt: skip
@click.option("--failed", is_flag=True, help="The same as --outcome retry --outcome exhausted.")
@click.option("--since", metavar="TIME", help="Begin with those since 10m (ago), or since a time.")
@click.option("-n", "--last", type=click.IntRange(0, 10000), default=10, show_default=True, help="Begin with so many; they are looked for among the newest 100,000.")  # fmt: skip
@click.option("--follow/--no-follow", default=True, show_default=True, help="Go on until Ctrl-C.")
@options
@click.pass_obj
def tail(
    invocation: Invocation, endpoint_id: str | None, event_id: str | None, type_: str | None, tenant: str | None,
    outcomes: tuple[str, ...], since: str | None, last: int, *, failed: bool, follow: bool,
) -> None:  # fmt: skip
    """
    Print attempts as they happen.  Ctrl-C ends it.

    It asks PostgreSQL only, so it works from anywhere.  A line appears when its attempt is over and written down; none is
    left out, so a slow one comes after those that began later.

    \b
    hookd tail --type 'order.*' --json | jq -r .url
    """  # noqa: D301 - click's mark for lines that stay
    from hookd.postgres.tail import Choice, Tail  # noqa: PLC0415 - not for --help

    began = moment(since)
    wanted = list(outcomes) + (list(FAILED) if failed else [])
    config = load(invocation.config_file).config
    printer = _Printer(as_json=invocation.json)

    async def choose(connection: asyncpg.Connection) -> Tail:
        return Tail(
            connection,
            Choice(
                await endpoint_of(connection, endpoint_id) if endpoint_id else None,
                await event_of(connection, event_id) if event_id else None,
                tenant, type_, wanted or None,
            ),
        )  # fmt: skip

    async def go(database: Database) -> None:
        events = Events()
        connection = await _connected(database, config)
        try:
            reading = await choose(connection)
            await events.unless_left(_begin(reading, printer, began, last))
            if follow:
                await _follow(reading, printer, events, database, config)
        finally:
            connection.terminate()

    with database_of(config) as database, plain_failures():
        asyncio.run(go(database))


async def _connected(database: Database, config: Config) -> asyncpg.Connection:
    connection = await database.connect("tail")
    try:
        await bring_up_to_date(connection, config)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _begin(reading: Tail, printer: _Printer, began: datetime.datetime | None, last: int) -> None:
    if began is None:
        printer.show(await reading.last(last))
    else:
        await printer.show_all(reading.since(began))


async def _follow(
    reading: Tail, printer: _Printer, events: Events, database: Database, config: Config
) -> None:
    """What is new, until it is left or nobody reads it any more."""
    from hookd.postgres.connect import unavailable  # noqa: PLC0415 - not for --help

    clock = asyncio.get_running_loop().time
    away = False
    while not events.left and _is_read():
        looked = clock()
        try:
            if away:
                # the snapshot of the last look is as good on another session
                reading.connection = await _connected(database, config)
                click.echo("PostgreSQL is back", err=True)
                away = False
            await events.unless_left(printer.show_all(reading.news()))
        except Exception as error:
            lost = unavailable(error)
            if lost is None:
                raise
            if not away:
                click.echo(f"PostgreSQL is away, trying again: {lost}", err=True)
            away = True
            reading.connection.terminate()
        spent = clock() - looked
        await events.within(max(EVERY_S, spent * (1 / SHARE - 1)))


def _is_read() -> bool:
    """Whether somebody still holds the other end of a pipe: with nothing to write one would not notice."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return not any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return True


class _Printer:
    """Prints attempts, a line each."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json

    async def show_all(self, pages: AsyncIterator[list[dict[str, Any]]]) -> None:
        async for page in pages:
            self.show(page)
            # a pipe that is slow must not keep Ctrl-C from being heard
            await asyncio.sleep(0)

    def show(self, rows: list[dict[str, Any]]) -> None:
        if self._json:
            print_json(rows)
        else:
            width = drawing.width_of_terminal()
            drawing.show([line_of(row, width) for row in rows])
        sys.stdout.flush()


def line_of(row: dict[str, Any], width: int | None) -> Line:
    """An attempt on one line; what matters least stands last, where a narrow terminal cuts it."""
    event = str(row["event_id"])
    verdict = row["verdict"]
    answer = str(row["status"] or row["outcome"] or "-").replace("_", " ")
    took = "-" if row["total_ms"] is None else f"{row['total_ms']:,.0f} ms"
    type_ = drawing.cut(row["type"] or "-", TYPE_MOST)
    text = "  ".join(
        (
            f"{row['at'].astimezone(datetime.UTC):%H:%M:%S}",
            f"{verdict:9}",
            f"{answer:>15}",
            f"{took:>9}",
            f"{type_:<16}",
            event if width is None or width >= WIDE else event[:SHORT_ID],
            row["url"] or "-",
            _then(row),
        )
    )
    return Line(text.rstrip(), MARKS.get(verdict, ""))


def _then(row: dict[str, Any]) -> str:
    """Which attempt it was, and what follows, where that is not plain."""
    number = f"attempt {row['attempt']}" if row["attempt"] > 1 or row["verdict"] == "retry" else ""
    again = ""
    if row["retry_at"] is not None:
        again = f"again in {span((row['retry_at'] - row['at']).total_seconds())}"
    replayed = "replay" if row["replay"] else ""
    # a status says it already
    reason = row["reason"] if row["reason"] and not row["reason"].startswith("answered ") else ""
    return ", ".join(filter(None, (number, replayed, again, reason)))
