"""
What happened: events, deliveries, attempts; and replaying them.

Lists are pages: newest first, by key, with a bound; nothing is counted exactly that could be large.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    import datetime
    from collections.abc import AsyncIterator, Mapping, Sequence
    from uuid import UUID

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
       a.total_ms, a.dns_ms, a.connect_ms, a.tls_ms, a.first_byte_ms, a.answer_headers, a.answer_body, a.answer_truncated
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

# Settled deliveries of endpoints that still exist, by what the caller says of them; ``where`` goes in as it is, on lines of
# its own, so that a comment in it ends there.
REPLAYABLE = """
select s.event_id, s.endpoint_id, s.state, e.state as endpoint_state
  from (select * from hookd.delivery_status{where}) s
  join hookd.endpoint e on e.id = s.endpoint_id and e.state <> 'removed'
 where s.state = any($1::text[])
   and ($2::uuid is null or s.event_id = $2)
   and ($3::uuid is null or s.endpoint_id = $3)
   and ($4::timestamptz is null or s.event_id >= hookd.uuid7_floor($4))
   and ($5::timestamptz is null or s.event_id < hookd.uuid7_floor($5))
   and ($6::text is null or s.tenant = $6)
   and ($7::text[] is null
        or exists (select from hookd.event v
                    where v.id = s.event_id and exists (
                      select from unnest($7) as t (pattern)
                       where pattern in ('*', v.type) or (right(pattern, 2) = '.*' and starts_with(v.type, left(pattern, -1)))))
        or exists (select from hookd.dead_letter l
                    where l.event_id = s.event_id and exists (
                      select from unnest($7) as t (pattern)
                       where pattern in ('*', l.type) or (right(pattern, 2) = '.*' and starts_with(l.type, left(pattern, -1))))))
 order by s.event_id
"""

WHERE = """
 where (
{}
       )"""

# What an endpoint subscribes to, as it is now, and was never owed: it was registered later, was disabled, or had other types.
MISSING = """
select v.id as event_id, e.id as endpoint_id, 'missing' as state, e.state as endpoint_state
  from hookd.endpoint e
  join hookd.event v
    on v.tenant = e.tenant and e.types && hookd.type_patterns(v.type)
   and (e.filter is null or hookd.matches(e.filter, v.payload))
 where e.id = $1 and e.state <> 'removed'
   and ($2::timestamptz is null or v.id >= hookd.uuid7_floor($2))
   and ($3::timestamptz is null or v.id < hookd.uuid7_floor($3))
   and ($4::text[] is null or hookd.type_patterns(v.type) && $4)
   and not exists (select from hookd.delivery d where d.event_id = v.id and d.endpoint = e.key)
   and not exists (select from hookd.attempt a where a.event_id = v.id and a.endpoint = e.key)
 order by v.id
"""

# With a due time, even if it is now: so they are served like retries, which leave most of a host's turns to what is fresh.  What
# was to be delivered later is not delivered before then, except by hand, without a start ($4).
REPLAY = """
with queued as (
  insert into hookd.delivery (shard, endpoint, event_id, due_at, replay)
  select e.shard, e.key, k.event_id,
         case when $4::timestamptz is not null then
           greatest($4::timestamptz + make_interval(secs => k.delay_s),
                    (select v.deliver_at from hookd.event v where v.id = k.event_id)) end,
         true
    from unnest($1::uuid[], $2::uuid[], $3::double precision[]) with ordinality as k (event_id, endpoint_id, delay_s, n)
    join hookd.endpoint e on e.id = k.endpoint_id and e.state <> 'removed'
   order by k.n
  returning id, shard, endpoint, event_id
),
marked as (
  update hookd.dead_letter l set replayed_at = now()
    from queued q where l.event_id = q.event_id and l.endpoint = q.endpoint and l.replayed_at is null
)
select count(*)::integer as queued, array_agg(distinct shard) as shards from queued
"""

COLUMNS = """
select attname::text from pg_attribute
 where attrelid = 'hookd.delivery_status'::regclass and attnum > 0 order by attnum
"""

AS_READER = """
select coalesce(pg_has_role(oid, 'member'), false) from pg_roles where rolname = 'hookd_reader'
"""

WHERE_TIMEOUT_S = 60
"""For a condition that somebody wrote by hand."""

SLICE = 2000
"""Rows that a replay queues in one transaction."""

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


class BadCondition(Exception):
    """A condition on ``hookd.delivery_status`` cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A delivery that is to be queued again."""

    event_id: UUID
    endpoint_id: UUID
    state: str
    """What became of it; ``missing``: it was never owed."""
    endpoint_state: str

    @property
    def pair(self) -> tuple[UUID, UUID]:
        """As ``queue`` takes it."""
        return self.event_id, self.endpoint_id

    @property
    def would_end(self) -> bool:
        """Its endpoint is disabled: queued, it would end as soon as it was read."""
        return self.endpoint_state == "disabled"


async def replayable(connection: asyncpg.Connection, selection: Mapping[str, Any]) -> list[Chosen]:
    """
    The settled deliveries that a selection names.

    Keys: states, event, endpoint, since, until, tenant, types (patterns), where (a condition in SQL on
    ``hookd.delivery_status``); missing: what the endpoint was never owed instead, by its types and times.  The condition is run
    read-only, as ``hookd_reader`` where this role may be that, and for ``WHERE_TIMEOUT_S`` at most.

    Raises:
        BadCondition: it was refused, or took too long.
    """
    if selection.get("missing"):
        return await missing(
            connection,
            selection["endpoint"],
            selection.get("since"),
            selection.get("until"),
            selection.get("types"),
        )
    arguments = (
        list(selection.get("states") or SETTLED_STATES),
        selection.get("event"),
        selection.get("endpoint"),
        selection.get("since"),
        selection.get("until"),
        selection.get("tenant"),
        list(selection["types"]) if selection.get("types") else None,
    )
    where = selection.get("where")
    if where is None:
        return [Chosen(*r) for r in await connection.fetch(REPLAYABLE.format(where=""), *arguments)]
    columns = [r[0] for r in await connection.fetch(COLUMNS)]
    try:
        async with connection.transaction(readonly=True):
            if await connection.fetchval(AS_READER):
                await connection.execute("set local role hookd_reader")
            await connection.execute(f"set local statement_timeout = '{WHERE_TIMEOUT_S}s'")
            statement = REPLAYABLE.format(where=WHERE.format(where))
            return [Chosen(*r) for r in await connection.fetch(statement, *arguments)]
    except asyncpg.QueryCanceledError:
        raise BadCondition(
            f"it took longer than {WHERE_TIMEOUT_S} s; narrow it down, for instance by event_id"
        ) from None
    except asyncpg.InsufficientPrivilegeError as error:
        raise BadCondition(f"{error.args[0]}; it may read what hookd_reader may read") from None
    except asyncpg.ReadOnlySQLTransactionError as error:
        raise BadCondition(f"{error.args[0]}; it may only read") from None
    except (asyncpg.PostgresSyntaxError, asyncpg.UndefinedColumnError, asyncpg.DataError) as error:
        raise BadCondition(
            f"{error.args[0]}; it is a condition on hookd.delivery_status: {', '.join(columns)}"
        ) from None
    except asyncpg.SyntaxOrAccessError as error:
        raise BadCondition(str(error.args[0])) from None


async def missing(
    connection: asyncpg.Connection,
    endpoint_id: UUID,
    since: datetime.datetime | None,
    until: datetime.datetime | None = None,
    types: Sequence[str] | None = None,
) -> list[Chosen]:
    """
    Events that an endpoint subscribes to and was never owed.

    Those of transactions that began before it was registered and commit after this was asked are not among them; asked
    again, they are.
    """
    rows = await connection.fetch(MISSING, endpoint_id, since, until, list(types) if types else None)
    return [Chosen(*r) for r in rows]


async def queue(
    connection: asyncpg.Connection,
    chosen: Sequence[tuple[UUID, UUID]],
    *,
    rate: float | None = None,
    urgent: bool = False,
) -> AsyncIterator[int]:
    """
    Queue events for endpoints again, as pairs of their ids; yields how many were so far.

    Each is a new delivery with the same webhook-id, whose attempts count from 1.  With ``rate`` each endpoint is given so many
    a second, by their due times.  ``urgent`` ones are treated like fresh events: for a few, by hand.
    """
    start = None if urgent else await connection.fetchval("select clock_timestamp()")
    places: Counter[UUID] = Counter()
    queued = 0
    for first in range(0, len(chosen), SLICE):
        part = chosen[first : first + SLICE]
        delays = []
        for _, endpoint in part:
            delays.append(places[endpoint] / rate if rate else 0.0)
            places[endpoint] += 1
        async with connection.transaction():
            row = await connection.fetchrow(
                REPLAY, [event for event, _ in part], [to for _, to in part], delays, start
            )
            assert row is not None
            if row["shards"]:
                await connection.execute("select hookd.wake($1)", row["shards"])
        queued += row["queued"]
        yield queued
