"""
Which deliveries a bulk resend takes: those that a search finds and that are still the last word on their event.

They are found as the console lists them, in bounded looks, so it costs the same with ten million attempts in the log, and
what is sent again is what was shown.  An older delivery of an event that was resent since is no last word any more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hookd.postgres import search
from hookd.postgres.history import SETTLED_STATES

if TYPE_CHECKING:
    import datetime
    from uuid import UUID

    from hookd.postgres.reading import Reading
    from hookd.postgres.search import Filter

MOST = 10_000
"""At one time."""

PAGE = 500

LOOK_S = 4.0
"""For so long is looked; then it goes on from where it got."""

LAST_WORD = """
select s.delivery_id, e.state in ('disabled', 'removed') as would_end
  from hookd.delivery_status s
  join hookd.endpoint e on e.id = s.endpoint_id
 where s.event_id = any($1::uuid[]) and s.delivery_id is not null
"""


@dataclass(frozen=True, slots=True)
class Matching:
    """Deliveries that can be sent again."""

    found: list[tuple[UUID, UUID]]
    """Of each the event and the endpoint, newest event first."""
    back_to: datetime.datetime | None
    """There may be more before then; None: that is all."""
    left_out: int = 0
    """Of endpoints that are disabled or removed: they would end as soon as they were read."""


def resendable(wanted: Filter) -> Filter:
    """The filter with the states that are over: those asked for, else those that were given up."""
    states = tuple(s for s in wanted.states if s in SETTLED_STATES)
    return replace(wanted, states=states or ("exhausted",))


async def matching(reading: Reading, wanted: Filter, most: int = MOST, look_s: float = LOOK_S) -> Matching:
    """
    What a resend of a filter would queue, up to ``most``.

    Raises:
        BadFilter, TooMuch, Busy: as they say.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + look_s
    found: dict[tuple[UUID, UUID], datetime.datetime] = {}
    cursor: str | None = None
    left_out = 0
    if wanted.states and not set(wanted.states) & set(SETTLED_STATES):
        return Matching([], None)
    chosen = resendable(wanted)
    while True:
        # a session of its own for each look: others look too
        async with reading.session() as session:
            page = await search.deliveries(session, chosen, cursor, min(PAGE, most - len(found)))
            events = list({row["event_id"] for row in page.rows})
            last = {r[0]: r[1] for r in await session.fetch(LAST_WORD, events)} if events else {}
        for row in page.rows:
            would_end = last.get(row["delivery_id"])
            if would_end:
                left_out += 1
            elif would_end is not None:
                found[row["event_id"], row["endpoint_id"]] = row["created_at"]
        cursor = page.older
        if cursor is None:
            return Matching(list(found), None, left_out)
        if len(found) >= most or loop.time() >= until:
            return Matching(list(found), page.looked_back_to, left_out)
