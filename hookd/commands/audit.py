"""``hookd audit``: who did what."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from hookd.commands.session import (
    Failed,
    endpoint_of,
    event_of,
    moment,
    options,
    print_json,
    print_table,
    with_connection,
)

if TYPE_CHECKING:
    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.postgres.pages import Page


@click.command()
@click.option("--endpoint", metavar="ID", help="What was done to this endpoint.")
@click.option("--event", metavar="ID", help="What was done with this event.")
@click.option("--tenant", help="What was done for this tenant.")
@click.option("--action", metavar="NAME", help="endpoint.pause, endpoint.rotate, delivery.replay, …")
@click.option("--since", metavar="TIME", help="From 2h (ago), or from a time.")
@click.option("--until", metavar="TIME", help="Before 2h (ago), or before a time.")
@click.option(
    "--limit", type=click.IntRange(1, 10000), default=20, show_default=True, help="The newest so many."
)
@options
@click.pass_obj
def audit(invocation: Invocation, /, *, limit: int, **given: Any) -> None:
    """
    Who did what to which endpoint, event or delivery, newest first.

    Whatever changes something is in it: commands, the API and the console.
    """
    from hookd.postgres.audit import Sought, entries  # noqa: PLC0415 - not for --help
    from hookd.postgres.pages import TooMuch  # noqa: PLC0415

    since, until = moment(given["since"]), moment(given["until"])

    async def work(connection: asyncpg.Connection, _config: Config) -> Page:
        sought = Sought(
            endpoint=await endpoint_of(connection, given["endpoint"]) if given["endpoint"] else None,
            event=await event_of(connection, given["event"]) if given["event"] else None,
            tenant=given["tenant"],
            action=given["action"],
            since=since,
            until=until,
        )
        return await entries(connection, sought, None, limit, look_s=10)

    try:
        page = with_connection(invocation, work)
    except TooMuch as problem:
        raise Failed(str(problem)) from None
    if invocation.json:
        print_json(page.rows)
        return
    print_table(
        [
            (
                r["at"],
                r["via"],
                r["who"],
                r["action"],
                r["endpoint_id"] or r["event_id"],
                json.dumps(r["details"], ensure_ascii=False) if r["details"] else None,
            )
            for r in page.rows
        ],
        ("at", "via", "who", "did", "to", "how"),
        "nothing was done yet",
    )
