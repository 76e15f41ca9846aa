"""``hookd replay`` and ``hookd resend``."""

from __future__ import annotations

import sys
from collections import Counter
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
    from collections.abc import Sequence
    from uuid import UUID

    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.postgres.history import Chosen

STATES = ("delivered", "exhausted", "expired", "cancelled")

ASK_ABOVE = 100
"""More than this is asked about first, on a terminal."""


@click.command()
@click.option("--event", metavar="ID", type=completing.EVENT_ID, help="Of this event only.")
@click.option("--endpoint", metavar="ID", type=completing.ENDPOINT_ID, help="Of this endpoint only.")
@click.option("--tenant", shell_complete=completing.tenants, help="Of this tenant only.")
@click.option(
    "--type", "types", multiple=True, metavar="PATTERN", help="user.created or user.*; may be repeated."
)
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="May be repeated; default: exhausted, or all with --event or --where.")  # fmt: skip
@click.option("--since", metavar="TIME", help="Events from 2h (ago), or from a time.")
@click.option("--until", metavar="TIME", help="Events before then.")
@click.option(
    "--where",
    metavar="SQL",
    help="A condition on hookd.delivery_status: \"reason like '%404%'\". It is run read-only.",
)
@click.option(
    "--missing", is_flag=True, help="What --endpoint subscribes to and was never owed, because it came later."
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="So many a second for each endpoint; else as fast as its limits allow, after what is fresh.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say how many, and queue nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options
@click.pass_obj
def replay(
    invocation: Invocation, /, *, rate: float | None, dry_run: bool, yes: bool, missing: bool, **given: Any
) -> None:
    """
    Queue settled deliveries again.

    Each becomes a new delivery with the same webhook-id, whose attempts count from 1.  Fresh events go before replayed ones.

    \b
    hookd replay --endpoint ID --since 2h               what was given up
    hookd replay --endpoint ID --since 7d --missing     what it never got, because it was registered later
    hookd replay --where "last_status = 404 and tenant = 'acme'" --dry-run
    """  # noqa: D301 - click's mark for lines that stay
    from hookd.postgres import audit, history  # noqa: PLC0415 - not for --help

    selection = _selection(given, missing=missing)

    async def work(connection: asyncpg.Connection, _config: Config) -> Plan:
        plan = Plan(await _chosen(connection, selection))
        if not invocation.json:
            _announce(plan, dry_run=dry_run)
        if dry_run or not plan.rows:
            return plan
        if len(plan.rows) > ASK_ABOVE and not yes and not invocation.json and sys.stdin.isatty():
            click.confirm("go on?", abort=True, err=True)
        await audit.record(connection, whoami(), "delivery.replay", *audit.of_selection(selection))
        with click.progressbar(
            length=len(plan.rows), label="queueing", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as bar:
            async for total in history.queue(connection, plan.pairs, rate=rate):
                bar.update(total - plan.queued)
                plan.queued = total
        return plan

    plan = with_connection(invocation, work)
    if invocation.json:
        print_json(plan.facts())
    elif not dry_run:
        click.echo(f"{_deliveries(plan.queued)} queued")


def _selection(given: dict[str, Any], *, missing: bool) -> dict[str, Any]:
    """What was asked for, as ``history.replayable`` takes it."""
    if not missing and not any(given.values()):
        raise Failed("say what to replay: --event, --endpoint, --tenant, --type, --state, --since, --until or --where", 2)  # fmt: skip
    if missing and not given["endpoint"]:
        raise Failed("--missing needs --endpoint ID: whose events are missing?", 2)
    if missing and any(given[name] for name in ("event", "states", "where", "tenant")):
        raise Failed("--missing goes with --endpoint, --type, --since and --until, and nothing else", 2)
    everything = given["event"] or given["where"] is not None
    return given | {
        "since": moment(given["since"]),
        "until": moment(given["until"]),
        "states": given["states"] or (STATES if everything else ("exhausted",)),
        "missing": missing,
    }


async def _chosen(connection: asyncpg.Connection, selection: dict[str, Any]) -> list[Chosen]:
    from hookd.postgres import history, registry  # noqa: PLC0415 - not for --help

    for name, find_it in (("event", event_of), ("endpoint", endpoint_of)):
        if selection[name]:
            selection[name] = await find_it(connection, selection[name])
    if selection["endpoint"] is not None:
        await registry.show(connection, selection["endpoint"])  # says so where there is none
    try:
        return await history.replayable(connection, selection)
    except history.BadCondition as problem:
        raise Failed(f"--where: {problem}", 2) from None


class Plan:
    """What a replay queues, and how far it is."""

    def __init__(self, found: Sequence[Chosen]) -> None:
        self.rows = [row for row in found if not row.would_end]
        self.left_out = len(found) - len(self.rows)
        self.queued = 0

    @property
    def pairs(self) -> list[tuple[UUID, UUID]]:
        """As ``history.queue`` takes them."""
        return [row.pair for row in self.rows]

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "matching": len(self.rows),
            "queued": self.queued,
            "states": dict(Counter(row.state for row in self.rows)),
            "endpoints": len({row.endpoint_id for row in self.rows}),
            "of_disabled_endpoints": self.left_out,
        }


def _deliveries(count: int) -> str:
    return "1 delivery" if count == 1 else f"{count:,} deliveries"


def _announce(plan: Plan, *, dry_run: bool) -> None:
    """What is going to be queued: on stdout where that is all that was asked for."""
    count = len(plan.rows)
    text = f"{_deliveries(count)} {'would be' if dry_run else 'is' if count == 1 else 'are'} queued"
    if count:
        facts = plan.facts()
        states = ", ".join(f"{n:,} {state}" for state, n in sorted(facts["states"].items()))
        text += (
            f": {states}; at {facts['endpoints']:,} {'endpoint' if facts['endpoints'] == 1 else 'endpoints'}"
        )
    click.echo(text, err=not dry_run)
    if plan.left_out:
        click.echo(
            f"{plan.left_out:,} more left out: their endpoints are disabled; `hookd endpoint resume ID` first",
            err=True,
        )


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
            if selection["endpoint"] is None:
                raise Failed(f"the endpoint of delivery {delivery_id} is no longer kept")
        await audit.record(
            connection, whoami(), "delivery.resend", *audit.of_selection(selection, delivery_id)
        )
        queued = 0
        plan = Plan(await history.replayable(connection, selection))
        if plan.left_out and not plan.rows:
            raise Failed("its endpoint is disabled; `hookd endpoint resume ID` first")
        async for total in history.queue(connection, plan.pairs, urgent=True):
            queued = total
        return queued

    queued = with_connection(invocation, work)
    if not queued:
        raise Failed("nothing to send again: it is pending still, or no endpoint was subscribed")
    if invocation.json:
        print_json({"queued": queued})
    else:
        click.echo(f"{queued} {'delivery' if queued == 1 else 'deliveries'} queued")
