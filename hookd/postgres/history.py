"""
What happened: events, deliveries, attempts; and replaying them.

Lists are pages: newest first, by key, with a bound; nothing is counted exactly that could be large.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datetime
    from collections.abc import AsyncIterator, Mapping, Sequence
    from uuid import UUID

    import asyncpg

EVENTS = """
select v.id, v.type, v.tenant, v.created_at, v.deliver_at, v.expires_at, v.idempotency_key, v.order_key,
       octet_length(v.payload) as payload_bytes
  from hookd.event v
 where ($1::text is null or v.tenant = $1)
   and ($2::text is null or $2 = any(hookd.type_patterns(v.type)))
   and ($3::uuid is null or v.id < $3)
   and ($4::timestamptz is null or v.id >= hookd.uuid7_floor($4))
   and ($5::timestamptz is null or v.id < hookd.uuid7_floor($5))
 order by v.id desc
 limit $6
"""

EVENT = """
select v.id, v.type, v.tenant, v.created_at, v.deliver_at, v.expires_at, v.idempotency_key, v.order_key,
       v.coalesce_key, v.headers::text as headers, v.payload
  from hookd.event v
 where v.id = $1
"""

DELIVERIES = """
select s.event_id, s.endpoint_id, s.delivery_id, s.state, s.attempts, s.reason, s.last_attempt_at, s.last_status,
       s.next_attempt_at, s.replay, s.tenant, s.url
  from hookd.delivery_status s
 where s.event_id = $1
 order by s.url
"""

ATTEMPTS = """
select a.at, a.delivery_id, a.event_id, e.id as endpoint_id, e.tenant, coalesce(a.url, e.url) as url, a.attempt,
       a.status, a.verdict, a.outcome, a.reason, a.retry_at, a.sent, a.resent, a.reused, a.replay,
       a.total_ms, a.dns_ms, a.connect_ms, a.first_byte_ms, a.answer_headers, a.answer_body, a.answer_truncated
  from hookd.attempt a
  left join hookd.endpoint e on e.key = a.endpoint
 where ($1::uuid is null or a.event_id = $1)
   and ($2::uuid is null or e.id = $2)
   and ($3::text is null or a.verdict = $3)
   and ($4::timestamptz is null or a.at < $4)
   and ($5::bigint is null or a.delivery_id = $5)
 order by a.at desc, a.delivery_id desc, a.attempt desc
 limit $6
"""

FIND_DELIVERY = """
select d.id, d.event_id, d.endpoint from hookd.delivery d where d.id = $1
union all
select a.delivery_id, a.event_id, a.endpoint from hookd.attempt a where a.delivery_id = $1
limit 1
"""

REPLAYABLE = """
select s.event_id, s.endpoint_id
  from hookd.delivery_status s
 where s.state = any($1::text[])
   and ($2::uuid is null or s.event_id = $2)
   and ($3::uuid is null or s.endpoint_id = $3)
   and ($4::timestamptz is null or s.event_id >= hookd.uuid7_floor($4))
   and ($5::timestamptz is null or s.event_id < hookd.uuid7_floor($5))
   and ($6::text is null or s.tenant = $6)
 order by s.event_id
"""

COUNT_REPLAYABLE = f"select count(*) from ({REPLAYABLE}) r"

REPLAY = """
with queued as (
  insert into hookd.delivery (shard, endpoint, event_id, replay)
  select e.shard, e.key, k.event_id, true
    from unnest($1::uuid[], $2::uuid[]) with ordinality as k (event_id, endpoint_id, n)
    join hookd.endpoint e on e.id = k.endpoint_id and e.state <> 'removed'
   order by k.n
  returning id, shard, endpoint, event_id
),
marked as (
  update hookd.dead_letter l set replayed_at = now()
    from queued q where l.event_id = q.event_id and l.endpoint = q.endpoint and l.replayed_at is null
)
select count(*)::integer as queued, array_agg(distinct shard) as shards, array_agg(id) as ids from queued
"""

SETTLED_STATES = ("delivered", "exhausted", "expired", "cancelled")


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a dictionary, with JSON columns read."""
    record = dict(row)
    if isinstance(record.get("headers"), str):
        record["headers"] = json.loads(record["headers"])
    return record


async def events(
    connection: asyncpg.Connection,
    *,
    tenant: str | None = None,
    type_pattern: str | None = None,
    before: UUID | None = None,
    since: datetime.datetime | None = None,
    until: datetime.datetime | None = None,
    limit: int = 50,
) -> list[dict[str, Any]]:
    """Events, newest first; ``before`` is the last id of the page before."""
    rows = await connection.fetch(EVENTS, tenant, type_pattern, before, since, until, limit)
    return [plain(dict(r)) for r in rows]


async def event(connection: asyncpg.Connection, event_id: UUID) -> dict[str, Any] | None:
    """One event with its payload and what became of its deliveries."""
    row = await connection.fetchrow(EVENT, event_id)
    if row is None:
        return None
    return plain(dict(row)) | {"deliveries": await deliveries(connection, event_id)}


async def deliveries(connection: asyncpg.Connection, event_id: UUID) -> list[dict[str, Any]]:
    """What became of an event at each endpoint."""
    return [dict(r) for r in await connection.fetch(DELIVERIES, event_id)]


async def attempts(
    connection: asyncpg.Connection,
    *,
    event_id: UUID | None = None,
    endpoint_id: UUID | None = None,
    verdict: str | None = None,
    before: datetime.datetime | None = None,
    delivery_id: int | None = None,
    limit: int = 50,
) -> list[dict[str, Any]]:
    """Attempts, newest first."""
    rows = await connection.fetch(ATTEMPTS, event_id, endpoint_id, verdict, before, delivery_id, limit)
    return [dict(r) for r in rows]


async def find_delivery(connection: asyncpg.Connection, delivery_id: int) -> UUID | None:
    """The event of a delivery, pending or past."""
    row = await connection.fetchrow(FIND_DELIVERY, delivery_id)
    return None if row is None else row["event_id"]


async def count_replayable(connection: asyncpg.Connection, selection: Mapping[str, Any]) -> int:
    """How many deliveries a replay would queue."""
    return int(await connection.fetchval(COUNT_REPLAYABLE, *_selected(selection)))


async def replay(connection: asyncpg.Connection, selection: Mapping[str, Any], slice_rows: int = 2000) -> Any:
    """
    Queue settled deliveries again; yields how many were queued so far.

    Each is a new delivery with the same webhook-id, whose attempts count from 1.  The selection is read once, so that a
    replay never meets its own results.  Keys: states, event, endpoint, since, until, tenant.
    """
    chosen = await connection.fetch(REPLAYABLE, *_selected(selection))
    async for queued in queue_again(
        connection, [(r["event_id"], r["endpoint_id"]) for r in chosen], slice_rows
    ):
        yield queued


async def queue_again(
    connection: asyncpg.Connection, pairs: Sequence[tuple[UUID, UUID]], slice_rows: int = 2000
) -> AsyncIterator[int]:
    """Queue events for endpoints once more; yields how many were queued so far."""
    queued = 0
    for start in range(0, len(pairs), slice_rows):
        part = pairs[start : start + slice_rows]
        async with connection.transaction():
            row = await connection.fetchrow(REPLAY, [event for event, _ in part], [to for _, to in part])
            assert row is not None
            if row["shards"]:
                await connection.execute("select hookd.wake($1)", row["shards"])
        queued += row["queued"]
        yield queued


def _selected(selection: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        list(selection.get("states") or SETTLED_STATES),
        selection.get("event"),
        selection.get("endpoint"),
        selection.get("since"),
        selection.get("until"),
        selection.get("tenant"),
    )
