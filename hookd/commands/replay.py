"""``hookd replay`` and ``hookd resend``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from hookd.commands import completing
from hookd.commands.inspect import find
from hookd.commands.session import (
    Failed,
    endpoint_of,
    event_of,
    moment,
    options,
    print_json,
    whoami,
    with_connection,
)

if TYPE_CHECKING:
    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config

STATES = ("delivered", "exhausted", "expired", "cancelled")

ASK_ABOVE = 100
"""More than this is asked about first, on a terminal."""


@click.command()
@click.option("--event", "event_id", metavar="ID", type=completing.EVENT_ID, help="Of this event only.")
@click.option(
    "--endpoint", "endpoint_id", metavar="ID", type=completing.ENDPOINT_ID, help="Of this endpoint only."
)
@click.option("--tenant", shell_complete=completing.tenants, help="Of this tenant only.")
@click.option("--since", metavar="TIME", help="Events from 2h (ago), or from a time.")
@click.option("--until", metavar="TIME", help="Events before then.")
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="May be repeated; default: exhausted, or all with --event.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say how many, and queue nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options
@click.pass_obj
def replay(
    invocation: Invocation, event_id: str | None, endpoint_id: str | None, tenant: str | None, since: str | None,
    until: str | None, states: tuple[str, ...], *, dry_run: bool, yes: bool,
) -> None:  # fmt: skip
    """
    Queue settled deliveries again.

    Each becomes a new delivery with the same webhook-id, whose attempts count from 1.
    """
    from hookd.postgres import audit, history  # noqa: PLC0415 - not for --help

    if not (event_id or endpoint_id or tenant or since or until or states):
        raise Failed("say what to replay: --event, --endpoint, --tenant, --since, --until or --state", 2)
    selection: dict[str, Any] = {
        "states": states or (STATES if event_id else ("exhausted",)),
        "tenant": tenant,
        "since": moment(since),
        "until": moment(until),
    }

    async def work(connection: asyncpg.Connection, _config: Config) -> dict[str, int]:
        selection["event"] = await event_of(connection, event_id) if event_id else None
        selection["endpoint"] = await endpoint_of(connection, endpoint_id) if endpoint_id else None
        count = await history.count_replayable(connection, selection)
        if dry_run or not count:
            return {"matching": count, "queued": 0}
        if not invocation.json:
            click.echo(f"{count} deliveries are queued again", err=True)
            if count > ASK_ABOVE and not yes and sys.stdin.isatty():
                click.confirm("go on?", abort=True, err=True)
        await audit.record(connection, whoami(), "delivery.replay", *audit.of_selection(selection))
        queued = 0
        with click.progressbar(
            length=count, label="queueing", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as bar:
            async for total in history.replay(connection, selection):
                bar.update(total - queued)
                queued = total
        return {"matching": count, "queued": queued}

    done = with_connection(invocation, work)
    if invocation.json:
        print_json(done)
    elif dry_run:
        click.echo(f"{done['matching']} deliveries would be queued again")
    else:
        click.echo(f"{done['queued']} deliveries queued")


@click.command()
@click.argument("id_", metavar="ID", type=completing.EVENT_OR_DELIVERY)
@options
@click.pass_obj
def resend(invocation: Invocation, id_: str) -> None:
    """One event (to all its endpoints) or one delivery (by its number) again, now."""
    from hookd.postgres import audit, history  # noqa: PLC0415 - not for --help

    async def work(connection: asyncpg.Connection, _config: Config) -> int:
        event_id, delivery_id = await find(connection, id_)
        selection: dict[str, Any] = {"event": event_id}
        if delivery_id is not None:
            rows = await history.deliveries(connection, event_id)
            chosen = [r for r in rows if r["delivery_id"] == delivery_id]
            if not chosen:
                raise Failed(
                    f"delivery {delivery_id} was followed by a newer one; resend the event {event_id}"
                )
            selection["endpoint"] = chosen[0]["endpoint_id"]
        await audit.record(
            connection, whoami(), "delivery.resend", *audit.of_selection(selection, delivery_id)
        )
        queued = 0
        async for total in history.replay(connection, selection):
            queued = total
        return queued

    queued = with_connection(invocation, work)
    if not queued:
        raise Failed("nothing to send again: it is pending still, or no endpoint was subscribed")
    if invocation.json:
        print_json({"queued": queued})
    else:
        click.echo(f"{queued} {'delivery' if queued == 1 else 'deliveries'} queued")
