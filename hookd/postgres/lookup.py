"""
Ids as people type them: whole, or their beginning, as long as it names one only.

What is not there is named, with what may have been meant: an id of the other kind, or one that looks like it.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING
from uuid import UUID

from hookd.postgres.registry import NotPossible

if TYPE_CHECKING:
    import asyncpg

BEGINNING = re.compile(r"[0-9a-f]{4,32}")
"""Of an id; it begins with its time, so the first 13 tell all but those of one millisecond apart."""

ENDPOINTS = """
select e.id, e.url as said from hookd.endpoint e where e.id between $1 and $2 order by e.id desc limit 4
"""

EVENTS = """
select v.id, v.type as said from hookd.event v where v.id between $1 and $2 order by v.id desc limit 4
"""

NEWEST_ENDPOINTS = "select e.id, e.url as said from hookd.endpoint e where e.state <> 'removed' order by e.id desc limit 1000"

OFFERED = 50

LOOKED_THROUGH = 2000
"""Of the newest events, for what is offered."""

OFFERS = {
    "endpoints": f"""
select e.id::text as value, e.url as help from hookd.endpoint e
 where e.state <> 'removed' and starts_with(e.id::text, $1) order by e.id desc limit {OFFERED}
""",
    "events": f"""
select v.id::text as value, v.type as help
  from (select id, type from hookd.event order by id desc limit {LOOKED_THROUGH}) v
 where starts_with(v.id::text, $1) order by v.id desc limit {OFFERED}
""",
    "types": f"""
select distinct v.type as value, null as help
  from (select type from hookd.event order by id desc limit {LOOKED_THROUGH}) v
 where starts_with(v.type, $1) order by 1 limit {OFFERED}
""",
    "tenants": f"""
select distinct e.tenant as value, null as help from hookd.endpoint e
 where starts_with(e.tenant, $1) order by 1 limit {OFFERED}
""",
}

KINDS = {"endpoint": ENDPOINTS, "event": EVENTS}


def letters_of(text: str, kind: str) -> str:
    """
    The hexadecimal digits of an id, or of its beginning.

    Raises:
        ValueError: it can be neither.
    """
    letters = text.replace("-", "").lower()
    if not BEGINNING.fullmatch(letters):
        raise ValueError(
            f"{text!r} is no {kind} id; it looks like 01890a5d-ac96-774b-bcce-b302099a8057 (or its beginning)"
        )
    return letters


async def endpoint_named(connection: asyncpg.Connection, text: str) -> UUID:
    """
    The endpoint that is meant.

    Raises:
        ValueError: it can be no id.
        NotPossible: there is none, or more than one; says what may have been meant.
    """
    return await _named(connection, text, "endpoint")


async def event_named(connection: asyncpg.Connection, text: str) -> UUID:
    """
    The event that is meant.  A whole id is taken as it is: the log may know it when the event itself is gone.

    Raises:
        ValueError: it can be no id.
        NotPossible: there is none, or more than one.
    """
    return await _named(connection, text, "event")


async def no_event(connection: asyncpg.Connection, event_id: UUID) -> str:
    """Why there is nothing to say about an event."""
    if await connection.fetchval("select exists (select from hookd.endpoint where id = $1)", event_id):
        return f"{event_id} is an endpoint, not an event; see hookd endpoint show {event_id}"
    return f"there is no event {event_id}; it may have ended with retention.events"


async def offered(connection: asyncpg.Connection, kind: str, beginning: str) -> list[asyncpg.Record]:
    """What a shell completes to, ``value`` and ``help``: ``endpoints``, ``events``, ``types`` or ``tenants``, the newest of them."""
    return list(await connection.fetch(OFFERS[kind], beginning))


async def _named(connection: asyncpg.Connection, text: str, kind: str) -> UUID:
    letters = letters_of(text, kind)
    whole = len(letters) == 32
    if whole and kind == "event":
        return UUID(letters)
    bounds = (UUID(letters.ljust(32, "0")), UUID(letters.ljust(32, "f")))
    rows = await connection.fetch(KINDS[kind], *bounds)
    if len(rows) == 1:
        return UUID(str(rows[0]["id"]))
    if rows:
        there = ", ".join(f"{row['id']} ({row['said']})" for row in rows[:3])
        raise NotPossible(f"more than one {kind} begins with {text}: {there}{', …' if len(rows) > 3 else ''}")
    other = "event" if kind == "endpoint" else "endpoint"
    found = await connection.fetch(KINDS[other], *bounds)
    if found:
        raise NotPossible(f"{text} is an {other}, not an {kind}; see hookd {other} show {found[0]['id']}")
    begins = "" if whole else "that begins with "
    raise NotPossible(f"there is no {kind} {begins}{text}{await _meant(connection, kind, letters)}")


async def _meant(connection: asyncpg.Connection, kind: str, letters: str) -> str:
    hint = f"; `hookd {kind} list` shows them"
    if kind == "event":
        return hint
    near = {row["id"].hex[: len(letters)]: row for row in await connection.fetch(NEWEST_ENDPOINTS)}
    # two letters of a whole id, none but a slip in a short beginning
    close = difflib.get_close_matches(letters, near, 1, cutoff=0.9 if len(letters) > 12 else 0.75)
    if not close:
        return hint
    row = near[close[0]]
    return f"; did you mean {row['id']} ({row['said']})?"
