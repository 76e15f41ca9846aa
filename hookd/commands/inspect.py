"""``hookd event``, ``attempts``, ``explain``, ``status``, ``health``: looking at what happened and happens."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import click

from hookd.commands import completing
from hookd.commands.drawing import printable
from hookd.commands.session import (
    Failed,
    endpoint_of,
    event_of,
    moment,
    options,
    print_fields,
    print_json,
    print_table,
    whoami,
    with_connection,
)
from hookd.config import load

if TYPE_CHECKING:
    from uuid import UUID

    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config

BODY_SHOWN = 400

LIKE_AN_ID = 8
"""So many digits may be the beginning of an event's id as well as the number of a delivery."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def event() -> None:
    """Find events and what became of them."""


@event.command(name="list")
@click.option("--tenant", shell_complete=completing.tenants, help="Of this tenant only.")
@click.option(
    "--type", "type_", metavar="PATTERN", shell_complete=completing.types, help="user.created, user.* or *."
)
@click.option("--since", metavar="TIME", help="2h (ago), or a time.")
@click.option("--until", metavar="TIME", help="Before then.")
@click.option("--before", metavar="ID", type=completing.EVENT_ID, help="The page after this event.")
@click.option(
    "--limit", type=click.IntRange(1, 10000), default=20, show_default=True, help="No more than so many."
)
@options
@click.pass_obj
def list_events(
    invocation: Invocation, tenant: str | None, type_: str | None, since: str | None, until: str | None,
    before: str | None, limit: int,
) -> None:  # fmt: skip
    """Events, newest first."""
    from hookd.postgres import history  # noqa: PLC0415 - not for --help

    after, upto = moment(since), moment(until)

    async def work(connection: asyncpg.Connection, _config: Config) -> list[dict[str, Any]]:
        last = await event_of(connection, before) if before else None
        return await history.events(
            connection, tenant=tenant, type_pattern=type_, before=last, since=after, until=upto, limit=limit
        )

    rows = with_connection(invocation, work)
    if invocation.json:
        print_json(rows)
        return
    print_table(
        [(r["id"], r["created_at"], r["tenant"], r["type"], r["payload_bytes"]) for r in rows],
        ("id", "created at", "tenant", "type", "bytes"),
        "no events",
    )


@event.command(name="show")
@click.argument("event_id", metavar="ID", type=completing.EVENT_ID)
@options
@click.pass_obj
def show_event(invocation: Invocation, event_id: str) -> None:
    """One event with its payload, and what became of it at each endpoint."""
    from hookd.postgres import history  # noqa: PLC0415 - not for --help
    from hookd.postgres.lookup import no_event  # noqa: PLC0415

    async def work(connection: asyncpg.Connection, _config: Config) -> dict[str, Any]:
        wanted = await event_of(connection, event_id)
        found = await history.event(connection, wanted)
        if found is None:
            raise Failed(await no_event(connection, wanted))
        return found

    found = with_connection(invocation, work)
    if invocation.json:
        print_json(found)
        return
    deliveries = found.pop("deliveries")
    print_fields(found)
    click.echo()
    print_table(
        [(r["state"], r["attempts"], r["last_status"], r["url"], r["reason"]) for r in deliveries],
        ("state", "attempts", "status", "url", "reason"),
        "no endpoint subscribed to it",
    )


@click.command()
@click.option("--event", "event_id", metavar="ID", type=completing.EVENT_ID, help="Of this event only.")
@click.option(
    "--endpoint",
    "endpoint_id",
    metavar="ID",
    type=completing.ENDPOINT_ID,
    help="Of this endpoint only.",
)
@click.option(
    "--verdict",
    type=click.Choice(["delivered", "retry", "exhausted", "expired", "cancelled"]),
    help="With this verdict only.",
)
@click.option("--before", metavar="TIME", help="The page before this time.")
@click.option(
    "--limit", type=click.IntRange(1, 10000), default=20, show_default=True, help="No more than so many."
)
@click.option("--full", is_flag=True, help="With the answers.")
@options
@click.pass_obj
def attempts(
    invocation: Invocation, event_id: str | None, endpoint_id: str | None, verdict: str | None,
    before: str | None, limit: int, *, full: bool,
) -> None:  # fmt: skip
    """Every attempt, newest first, with its request, answer and timing."""
    from hookd.postgres import history  # noqa: PLC0415 - not for --help

    upto = moment(before)

    async def work(connection: asyncpg.Connection, _config: Config) -> list[dict[str, Any]]:
        return await history.attempts(
            connection,
            event_id=await event_of(connection, event_id) if event_id else None,
            endpoint_id=await endpoint_of(connection, endpoint_id) if endpoint_id else None,
            verdict=verdict,
            before=upto,
            limit=limit,
        )

    rows = with_connection(invocation, work)
    if invocation.json:
        print_json(rows)
        return
    if full:
        for row in rows:
            _print_attempt(row)
        return
    print_table(
        [
            (r["at"], r["event_id"], r["attempt"], r["verdict"], r["status"] or r["outcome"], r["total_ms"], r["url"], r["reason"])
            for r in rows
        ],
        ("at", "event", "no", "verdict", "answer", "ms", "url", "reason"),
        "no attempts",
    )  # fmt: skip


def _print_attempt(row: dict[str, Any]) -> None:
    body = row.pop("answer_body")
    headers = row.pop("answer_headers")
    row["sent"] = "yes" if row["sent"] else "no: the receiver cannot have seen it"
    if row["resent"]:
        row["sent"] = "twice: an idle connection was closed as it went out"
    row.pop("resent")
    print_fields({k: v for k, v in row.items() if v is not False})
    for line in (headers or "").splitlines():
        click.echo(f"  < {printable(line)}")
    if body:
        for line in (body[:BODY_SHOWN] + ("…" if len(body) > BODY_SHOWN else "")).splitlines():
            click.echo(f"  < {printable(line)}")
    click.echo()


@click.command()
@click.argument("id_", metavar="ID", type=completing.EVENT_OR_DELIVERY)
@options
@click.pass_obj
def explain(invocation: Invocation, id_: str) -> None:
    """Why this event (or this delivery, by its number) is where it is."""
    from hookd.postgres import history  # noqa: PLC0415 - not for --help
    from hookd.postgres.explain import explain as look  # noqa: PLC0415
    from hookd.postgres.lookup import no_event  # noqa: PLC0415

    async def work(connection: asyncpg.Connection, _config: Config) -> list[dict[str, Any]]:
        event_id, delivery_id = await find(connection, id_)
        found = await look(connection, event_id, delivery_id)
        if not found and delivery_id is not None:
            if await look(connection, event_id):
                raise Failed(
                    f"delivery {delivery_id} was followed by a newer one; run: hookd explain {event_id}"
                )
            raise Failed(f"the attempts of delivery {delivery_id} are no longer kept (retention.attempts)")
        if not found and await history.event(connection, event_id) is None:
            raise Failed(await no_event(connection, event_id))
        return found

    rows = with_connection(invocation, work)
    if invocation.json:
        print_json(rows)
        return
    if not rows:
        click.echo("no endpoint subscribed to this event when it was inserted")
    for row in rows:
        click.echo(f"{row['state']}  {row['url'] or row['endpoint_id']}")
        click.echo(_folded(row["because"]))


def _folded(sentence: str) -> str:
    """A sentence under its headline; folded to the terminal if it is one."""
    sentence = printable(sentence)
    if not sys.stdout.isatty():
        return f"  {sentence}"
    return click.wrap_text(
        sentence, shutil.get_terminal_size().columns, initial_indent="  ", subsequent_indent="  "
    )


async def find(connection: asyncpg.Connection, text: str) -> tuple[UUID, int | None]:
    """
    The event, and the delivery where its number was given.

    Raises:
        Failed: there is none.
    """
    from hookd.postgres import timeline  # noqa: PLC0415 - not for --help
    from hookd.postgres.pages import TooMuch  # noqa: PLC0415

    if not (text.isascii() and text.isdigit()):
        return await event_of(connection, text), None
    try:
        event_id = await timeline.find_delivery(connection, int(text)) if len(text) < 19 else None
    except TooMuch as found:
        raise Failed(str(found)) from found
    if event_id is not None:
        return event_id, int(text)
    if len(text) >= LIKE_AN_ID:
        return await event_of(connection, text), None
    raise Failed(f"there is no delivery {text}; `hookd event list` shows events")


@click.command()
@click.option(
    "--lanes",
    "lanes_shown",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Show so many, those in trouble first.",
)
@options
@click.pass_obj
def status(invocation: Invocation, lanes_shown: int) -> None:
    """How the daemons, the queue and the lanes are doing; it asks PostgreSQL only, so it works from anywhere."""
    from hookd.commands import drawing  # noqa: PLC0415 - not for --help
    from hookd.postgres.status import COUNT_MOST  # noqa: PLC0415
    from hookd.postgres.status import status as look  # noqa: PLC0415

    now = with_connection(invocation, lambda c, _: look(c, lanes_shown))
    if invocation.json:
        print_json(now.facts())
        return
    width = drawing.width_of_terminal()
    drawing.show(
        [
            *drawing.daemons(now.nodes, now.at, width),
            *drawing.unowned(now.nodes, now.queue["shards"]),
            *drawing.queue(now.queue, now.at, COUNT_MOST, width),
        ]
    )
    if now.lanes:
        click.echo()
        drawing.show(line for block in drawing.lanes(now.lanes, width) for line in block)
    if now.lanes_left_out:
        known = len(now.lanes) + now.lanes_left_out
        click.echo(f"{now.lanes_left_out} more; `hookd status --lanes {known}` shows them")


@click.command()
@click.argument("node")
@options
@click.pass_obj
def evict(invocation: Invocation, node: str) -> None:
    """
    End the session of the daemon NODE, as `hookd status` calls it, or the beginning of that name.

    For a daemon that hangs, on a machine that cannot be reached: the others take over its hosts at once.  One that is alive
    reconnects and gets its share again; to stop it, stop it.
    """
    from hookd.postgres import audit  # noqa: PLC0415 - not for --help
    from hookd.postgres.status import NoSuchNode  # noqa: PLC0415
    from hookd.postgres.status import evict as end  # noqa: PLC0415

    async def work(connection: asyncpg.Connection, _config: Config) -> str:
        name = await end(connection, node)
        await audit.record(connection, whoami(), "node.evict", audit.Subject(), {"node": name})
        return name

    try:
        name = with_connection(invocation, work)
    except NoSuchNode as problem:
        raise Failed(str(problem)) from None
    print_json({"evicted": name}) if invocation.json else click.echo(f"evicted {name}")


@click.command()
@options
@click.pass_obj
def health(invocation: Invocation) -> None:
    """Ask the daemon at admin.listen whether it is ready; exit status 0 or 1.  For containers without curl."""
    address = load(invocation.config_file).config.admin_address()
    if address is None:
        raise Failed("admin.listen is off, so nobody can be asked")
    host, port = address
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/readyz"
    # not through a proxy that the environment names for other purposes
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as answer:
            said = json.load(answer)
    except urllib.error.HTTPError as error:
        raise Failed(f"not ready: {_said_by(error)}") from None
    except (OSError, ValueError) as error:
        raise Failed(f"no daemon answers at {url}: {error}") from None
    print_json(said) if invocation.json else click.echo("ready")


def _said_by(error: urllib.error.HTTPError) -> str:
    text = error.read(1000).decode("utf-8", "replace").strip()
    try:
        return str(json.loads(text)["detail"])
    except (ValueError, KeyError, TypeError):
        return text
