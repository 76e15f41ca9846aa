"""
The audit trail: who did what to which endpoint, event or delivery, and when.

An entry is written in the transaction of what it tells, so there is neither without the other.  It holds what was asked
for, and never a secret.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hookd.postgres.pages import LOOK_S, Page, ordered, page

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping
    from uuid import UUID

    import asyncpg

    from hookd.postgres.pages import Key

VIAS = ("console", "api", "cli")

RECORD = """
insert into hookd.audit (via, who, action, tenant, endpoint_id, event_id, delivery_id, details)
values ($1, $2, $3, coalesce($4, (select e.tenant from hookd.endpoint e where e.id = $5)), $5, $6, $7, $8::text::jsonb)
"""

LIST = ordered("""
select a.id, a.at, a.via, a.who, a.action, a.tenant, a.endpoint_id, a.event_id, a.delivery_id, a.details::text as details
  from hookd.audit a
 where (a.at, a.id) {beyond} ($1::timestamptz, $2::bigint) and a.at {within} $3::timestamptz
   and ($5::uuid is null or a.endpoint_id = $5)
   and ($6::uuid is null or a.event_id = $6)
   and ($7::text is null or a.tenant = $7)
   and ($8::text is null or a.action = $8)
   and ($9::text is null or a.who = $9)
   and ($10::text is null or a.via = $10)
 order by a.at {order}, a.id {order}
 limit $4
""")

EDGES = ordered("""
select (select a.at from hookd.audit a where $1::timestamptz is null or a.at {from} $1
         order by a.at {order} limit 1) as nearest,
       (select a.at from hookd.audit a where $1::timestamptz is null or a.at {from} $1
         order by a.at {order} offset $2 limit 1) as further,
       (select a.at from hookd.audit a order by a.at {opposite} limit 1) as last
""")


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts."""

    via: str
    """One of ``VIAS``."""
    who: str


@dataclass(frozen=True, slots=True)
class Subject:
    """What is acted on."""

    endpoint: UUID | None = None
    event: UUID | None = None
    delivery: int | None = None
    tenant: str | None = None
    """Where it does not follow from the endpoint."""


@dataclass(frozen=True, slots=True)
class Sought:
    """Which entries to show; None: whatever."""

    endpoint: UUID | None = None
    event: UUID | None = None
    tenant: str | None = None
    action: str | None = None
    who: str | None = None
    via: str | None = None
    since: datetime.datetime | None = None
    until: datetime.datetime | None = None


def of_selection(
    selection: Mapping[str, Any], delivery_id: int | None = None
) -> tuple[Subject, dict[str, Any]]:
    """What a resend or a replay is about, and the rest of what was asked for (a selection as ``history`` takes it)."""
    subject = Subject(selection.get("endpoint"), selection.get("event"), delivery_id, selection.get("tenant"))
    rest = {n: v for n, v in selection.items() if n not in ("endpoint", "event", "tenant") and v}
    return subject, rest


async def record(
    connection: asyncpg.Connection,
    actor: Actor,
    action: str,
    subject: Subject,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write one entry; call it in the transaction of what it tells.  ``action`` is a word such as ``endpoint.pause``."""
    await connection.execute(
        RECORD,
        actor.via,
        actor.who[:200],
        action,
        subject.tenant,
        subject.endpoint,
        subject.event,
        subject.delivery,
        json.dumps(details or {}, default=str),
    )


async def entries(
    connection: asyncpg.Connection,
    sought: Sought,
    cursor: str | None = None,
    limit: int = 50,
    *,
    look_s: float = LOOK_S,
) -> Page:
    """
    The trail, newest first.

    Rows: id, at, via, who, action, tenant, endpoint_id, event_id, delivery_id, details (a dictionary).

    Raises:
        BadCursor, TooMuch: as they say.
    """
    found = await page(
        _Trail(connection, sought), cursor, limit, since=sought.since, until=sought.until, look_s=look_s
    )
    for row in found.rows:
        row["details"] = json.loads(row["details"])
    return found


@dataclass(slots=True)
class _Trail:
    """``hookd.audit`` by time."""

    connection: asyncpg.Connection
    sought: Sought
    name: str = field(default="audit", init=False)

    async def edges(self, at: datetime.datetime | None, rows: int, *, newer: bool) -> Any:
        row = await self.connection.fetchrow(EDGES[newer], at, rows)
        return tuple(row or ())

    async def window(
        self, place: Key, bound: datetime.datetime, limit: int, *, newer: bool
    ) -> list[dict[str, Any]]:
        s = self.sought
        rows = await self.connection.fetch(
            LIST[newer], *place, bound, limit, s.endpoint, s.event, s.tenant, s.action, s.who, s.via
        )
        return [dict(row) for row in rows]

    def place_at(self, at: datetime.datetime) -> Key:
        return at, -1

    def key_of(self, row: dict[str, Any]) -> Key:
        return row["at"], row["id"]
