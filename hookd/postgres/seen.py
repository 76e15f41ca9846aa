"""Which event types the database has seen, for ``hookd docs``: a bounded look at what is newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncpg

LOOKED_THROUGH = 20_000
"""Events, the newest first."""

TYPES = f"""
select v.type, (array_agg(v.id order by v.id desc))[1] as newest
  from (select v.id, v.type, v.tenant from hookd.event v order by v.id desc limit {LOOKED_THROUGH}) v
 where v.tenant <> 'hookd' and ($1::text is null or v.tenant = $1)
 group by v.type
"""

PAYLOAD = "select v.payload from hookd.event v where v.id = $1"


@dataclass(frozen=True, slots=True)
class Seen:
    """An event type, and the payload of its newest event where there is one."""

    type: str
    payload: str | None


async def seen(connection: asyncpg.Connection, tenant: str | None) -> list[Seen]:
    """
    The types of the newest events, of one tenant or of all, by name.

    What endpoints subscribe to is left out: their owners typed it.
    """
    rows = await connection.fetch(TYPES, tenant)
    found = {row["type"]: await connection.fetchval(PAYLOAD, row["newest"]) for row in rows}
    return [Seen(type_, payload) for type_, payload in sorted(found.items())]
