"""
What happened, and what is happening: events, deliveries, attempts, and how the daemons are doing.

Lists are pages: newest first, by key, with a bound; nothing is counted exactly that could be large.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping
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

PENDING = """
select d.id, d.event_id, d.due_at, d.attempt, d.shard, d.order_key, d.replay,
       e.id as endpoint_id, e.url, e.host, e.state, e.state_reason, e.state_at, e.shard as endpoint_shard,
       (select min(o.id) from hookd.delivery o
         where o.endpoint = d.endpoint and o.order_key = d.order_key and o.id < d.id) as behind,
       (select l.pid from pg_locks l
         where l.locktype = 'advisory' and l.classid = 1752133483 and l.objid = d.shard::integer::oid and l.granted
           and l.database = (select oid from pg_database where datname = current_database()) limit 1) as owner
  from hookd.delivery d
  left join hookd.endpoint e on e.key = d.endpoint
 where d.event_id = $1 and ($2::bigint is null or d.id = $2)
 order by d.id
"""

NODES = """
select n.id, n.backend, n.started_at, n.seen_at, n.summary::text as summary,
       clock_timestamp() - n.seen_at as silence,
       (select count(*) from pg_locks l
         where l.locktype = 'advisory' and l.classid = 1752133483 and l.granted and l.pid = n.backend
           and l.database = (select oid from pg_database where datname = current_database()))::integer as shards
  from hookd.node n
 where n.seen_at > clock_timestamp() - interval '15 seconds'
 order by n.started_at
"""

# Estimates: an exact count of a large backlog would cost more than all that is being looked at.
QUEUE = """
select (select greatest(0, c.reltuples)::bigint from pg_class c where c.oid = 'hookd.delivery'::regclass) as estimated,
       (select count(*) from (select from hookd.delivery where due_at is null limit 10001) f) as fresh,
       (select count(*) from (select from hookd.delivery where due_at is not null limit 10001) r) as waiting,
       (select count(*) from (select from hookd.dead_letter where replayed_at is null limit 10001) l) as dead_letters,
       (select min(hookd.uuid7_time(o.event_id)) from (
          select event_id from hookd.delivery order by event_id limit 1) o) as oldest_at,
       (select count(*)::integer from hookd.endpoint where state = 'active') as active,
       (select count(*)::integer from hookd.endpoint where state = 'paused') as paused,
       (select count(*)::integer from hookd.endpoint where state = 'disabled') as disabled,
       (select count(*)::integer from hookd.endpoint where state = 'active' and failing_since is not null) as failing
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


@dataclass(frozen=True, slots=True)
class Status:
    """How the daemons and the queue are doing."""

    nodes: list[dict[str, Any]]
    queue: dict[str, Any]


async def status(connection: asyncpg.Connection) -> Status:
    """What the daemons said within the last seconds, and the queue's size."""
    queue = await connection.fetchrow(QUEUE)
    assert queue is not None
    return Status(await _nodes(connection), dict(queue))


async def _nodes(connection: asyncpg.Connection) -> list[dict[str, Any]]:
    return [dict(n) | {"summary": json.loads(n["summary"])} for n in await connection.fetch(NODES)]


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
    queued = 0
    for start in range(0, len(chosen), slice_rows):
        part = chosen[start : start + slice_rows]
        async with connection.transaction():
            row = await connection.fetchrow(
                REPLAY, [r["event_id"] for r in part], [r["endpoint_id"] for r in part]
            )
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


async def explain(
    connection: asyncpg.Connection, event_id: UUID, delivery_id: int | None = None
) -> list[dict[str, Any]]:
    """Why each delivery of an event is where it is: a dictionary each, with a sentence under ``because``."""
    nodes = await _nodes(connection)
    explained = []
    pending = {r["id"]: dict(r) for r in await connection.fetch(PENDING, event_id, delivery_id)}
    for row in pending.values():
        state = "pending" if row["attempt"] == 0 else "retrying"
        explained.append(_about(row, state, row["attempt"], why_pending(row, nodes)))
    for row in await deliveries(connection, event_id):
        if row["delivery_id"] in pending or row["state"] in ("pending", "retrying"):
            continue
        if delivery_id is not None and row["delivery_id"] != delivery_id:
            continue
        explained.append(_about(row, row["state"], row["attempts"], why_settled(row)))
    return explained


def _about(row: Mapping[str, Any], state: str, attempts_made: int, because: str) -> dict[str, Any]:
    return {
        "delivery_id": row.get("delivery_id", row.get("id")),
        "event_id": row["event_id"],
        "endpoint_id": row["endpoint_id"],
        "url": row["url"],
        "state": state,
        "attempts": attempts_made,
        "because": because,
    }


def why_settled(row: Mapping[str, Any]) -> str:
    """The end of a delivery, in words."""
    at = f"{row['last_attempt_at']:%Y-%m-%d %H:%M:%S} UTC"
    match row["state"]:
        case "delivered":
            return f"delivered at {at}, answered {row['last_status']}, attempt {row['attempts']}"
        case "exhausted":
            return (
                f"given up at {at}: {row['reason']}; `hookd replay --event {row['event_id']}` queues it again"
            )
        case state:
            return f"{state} at {at}: {row['reason']}"


def why_pending(row: Mapping[str, Any], nodes: list[dict[str, Any]]) -> str:
    """The one thing that a pending delivery waits for, in words."""
    for waits, because in (
        (row["state"] is None, "its endpoint is gone; it ends as cancelled when its owner reaches it"),
        (row["state"] == "paused", f"its endpoint is paused; `hookd endpoint resume {row['endpoint_id']}`"),
        (
            row["state"] in ("disabled", "removed"),
            f"its endpoint is {row['state']} ({row['state_reason']}); it ends when its owner reaches it",
        ),
        (row["owner"] is None, f"no daemon owns shard {row['shard']}: is `hookd run` running?"),
        (
            row["shard"] != row["endpoint_shard"],
            "its endpoint moved to another host; it is being handed over",
        ),
        (row["behind"] is not None, f"it waits behind delivery {row['behind']} of the same order key"),
    ):
        if waits:
            return because
    if row["due_at"] is not None:
        what = "retry" if row["attempt"] else "not before"
        return f"{what} at {row['due_at']:%Y-%m-%d %H:%M:%S} UTC, after {row['attempt']} attempts"
    for node in nodes:
        if node["backend"] == row["owner"]:
            return why_in_lane(row["host"], node["summary"])
    return "it has just been inserted"


LANE_SENTENCES = {
    "rate": "it waits for its host's rate limit ({rate:g}/s)",
    "concurrency": "it waits for its host's concurrency ({in_flight} of {concurrency} in flight)",
    "breaker": "its host does not answer; the next probe goes in {held_s:.0f} s",
    "hold": "its host asked to be left alone for {held_s:.0f} s more (Retry-After)",
}


def why_in_lane(host: str, summary: Mapping[str, Any]) -> str:
    """What a lane waits for, as its daemon said within the last second."""
    for lane in summary.get("lanes", ()):
        if lane["host"] == host:
            sentence = LANE_SENTENCES.get(lane["why"])
            return sentence.format(**lane) if sentence else "it is being sent"
    return "it is about to be sent"
