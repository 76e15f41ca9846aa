"""
The reads of the feed: arrivals by snapshot difference, refills by key, recovery, endpoints and events.

All of them run on one connection, one at a time, so that their snapshots only go forwards.  Plans are pinned on that
session: statistics of a queue are always wrong (it is empty, then it is not), and a planner that switches index in
the middle of a backlog is the cliff that other queues fall off.
"""

from __future__ import annotations

import asyncio
import json
import time
from sys import intern
from typing import TYPE_CHECKING, Any

from hookd.core.model import BodyFormat, Endpoint, EndpointKey, EndpointState, Event, Health
from hookd.core.reads import Arrivals, Place, Row, Snapshot
from hookd.postgres.connect import PIN_PLANS, refused
from hookd.postgres.vault import opened

if TYPE_CHECKING:
    import datetime
    from collections.abc import Callable, Iterable, Sequence
    from uuid import UUID

    import asyncpg

    from hookd.core.model import DeliveryId
    from hookd.core.sealing import Keyring
    from hookd.postgres.vault import Opened

READ_TIMEOUT_S = 30.0

ECHO = "echo "
"""What a notification begins with that a daemon sends to itself; to the others it means nothing."""

# Of a row d that was not attempted: the newest of its coalesce key.
REPLACED = """
       case when d.coalesce_key is not null and d.attempt = 0 then (
         select n.event_id from hookd.delivery n
          where n.endpoint = d.endpoint and n.coalesce_key = d.coalesce_key and n.id > d.id
          order by n.id desc limit 1) end as replaced_by"""

# The columns of core.reads.Row, in its order: a record becomes a row without being looked into.
COLUMNS = "d.id, d.event_id, d.endpoint, d.shard, d.attempt, d.due_at, d.order_key, d.replay, d.coalesce_key,"

# Rows whose transaction the last snapshot did not see and this one does: exact, whatever the order of commits.
# The first row carries the snapshot that the others were read with.
ARRIVALS = f"""
select pg_current_snapshot()::text as snapshot, clock_timestamp() as now, null::bigint as id, null::uuid as event_id,
       null::integer as endpoint, null::smallint as shard, null::smallint as attempt, null::timestamptz as due_at,
       null::text as order_key, null::boolean as replay, null::text as coalesce_key, null::uuid as replaced_by,
       null::boolean as later
union all
(select null, null, {COLUMNS}{REPLACED}, false
   from hookd.delivery d
  where d.xid >= $1::text::xid8 and d.shard = any($3::smallint[])
  limit $4)
union all
(select null, null, {COLUMNS}{REPLACED}, false
   from hookd.delivery d
  where d.xid = any($2::text[]::xid8[]) and d.shard = any($3::smallint[])
  limit $4)
"""

# An arrival larger than the window, as one row for each endpoint: where its new rows start.
ARRIVAL_PLACES = """
select pg_current_snapshot()::text as snapshot, clock_timestamp() as now,
       null::integer as endpoint, null::bigint as first_id, null::timestamptz as first_due
union all
(select null, null, d.endpoint, min(d.id) filter (where d.due_at is null), min(d.due_at)
   from (select a.* from hookd.delivery a where a.xid >= $1::text::xid8
         union all
         select b.* from hookd.delivery b where b.xid = any($2::text[]::xid8[])) d
  where d.shard = any($3::smallint[])
  group by d.endpoint)
"""

REFILL_FRESH = f"""
select {COLUMNS}{REPLACED}, false as later
  from unnest($1::integer[], $2::bigint[], $3::integer[]) as q (endpoint, place, want)
 cross join lateral (
   select f.* from hookd.delivery f
    where f.endpoint = q.endpoint and f.due_at is null and f.id > q.place
    order by f.id
    limit q.want) d
"""

# An endpoint's rows that are due, and the first one that is not: when to look again. An ended endpoint's are all due.
REFILL_DUE = f"""
select {COLUMNS}{REPLACED}, d.later
  from unnest($1::integer[], $2::timestamptz[], $3::bigint[], $4::integer[], $5::boolean[])
       as q (endpoint, due_at, id, want, ended)
 cross join lateral (
   (select f.*, false as later
      from hookd.delivery f
     where f.endpoint = q.endpoint and f.due_at is not null and f.due_at <= case when q.ended then 'infinity' else now() end
      and (f.due_at, f.id) > (q.due_at, q.id)
     order by f.due_at, f.id
     limit q.want)
   union all
   (select f.*, true
      from hookd.delivery f
     where f.endpoint = q.endpoint and f.due_at is not null and f.due_at > case when q.ended then 'infinity' else now() end
      and (f.due_at, f.id) > (q.due_at, q.id)
     order by f.due_at, f.id
     limit 1)) d
"""

# The oldest row of each order key, from where the feed knows that none is left before: the entries of settled rows
# stand in the index until vacuum, and while somebody holds a snapshot, so walking over them again would cost more and more.
HEADS = f"""
select {COLUMNS}{REPLACED}, false as later
  from unnest($1::integer[], $2::text[], $3::bigint[]) as q (endpoint, order_key, after)
 cross join lateral (
   select f.* from hookd.delivery f
    where f.endpoint = q.endpoint and f.order_key = q.order_key and f.id > q.after
    order by f.id
    limit 1) d
"""

# The newest row of each coalesce key: what may be sent once the one under way has ended.
LATEST = f"""
select {COLUMNS} null::uuid as replaced_by, false as later
  from unnest($1::integer[], $2::text[]) as q (endpoint, coalesce_key)
 cross join lateral (
   select f.* from hookd.delivery f
    where f.endpoint = q.endpoint and f.coalesce_key = q.coalesce_key
    order by f.id desc
    limit 1) d
"""

# What a newer row of a coalesce key replaces, wherever it waits: behind a place, or for its time.
OLDER = f"""
select {COLUMNS} q.event_id as replaced_by, false as later
  from unnest($1::integer[], $2::text[], $3::bigint[], $4::uuid[]) as q (endpoint, coalesce_key, id, event_id)
 cross join lateral (
   select f.* from hookd.delivery f
    where f.endpoint = q.endpoint and f.coalesce_key = q.coalesce_key and f.id < q.id and f.attempt = 0
    order by f.id
    limit $5) d
"""

# Loose index scans: one probe for each endpoint that has rows, not one for each row.
RECOVER = """
with recursive fresh (endpoint) as (
  (select d.endpoint from hookd.delivery d where d.due_at is null order by d.endpoint, d.id limit 1)
  union all
  select (select d.endpoint from hookd.delivery d
           where d.due_at is null and d.endpoint > f.endpoint order by d.endpoint, d.id limit 1)
    from fresh f where f.endpoint is not null
),
due (endpoint, due_at) as (
  (select d.endpoint, d.due_at from hookd.delivery d
    where d.due_at is not null order by d.endpoint, d.due_at, d.id limit 1)
  union all
  select n.endpoint, n.due_at
    from due f
   cross join lateral (
     select d.endpoint, d.due_at from hookd.delivery d
      where d.due_at is not null and d.endpoint > f.endpoint order by d.endpoint, d.due_at, d.id limit 1) n
)
select endpoint, true as fresh, null::timestamptz as due_at from fresh where endpoint is not null
union all
select endpoint, false, due_at from due
"""

# After a dump and restore stored transaction ids lie above the counter, and what has one would seem to be new at every look.
# In slices: after a restore all that is pending is among them, and one statement for millions of rows would take longer than is
# waited for.  What is locked is left out: another daemon resets it, and nobody waits for the other.
RESET_FOREIGN_XIDS = """
with foreigners as materialized (
  select d.event_id, d.id from hookd.delivery d
   where d.xid >= pg_snapshot_xmax(pg_current_snapshot())
   order by d.xid limit $1
   for update skip locked
),
reset as (
  update hookd.delivery d set xid = '0'
    from foreigners f where d.event_id = f.event_id and d.id = f.id
  returning d.id
)
select count(*)::integer from reset
"""

# The trigger that notes a change does not see this one.
RESET_FOREIGN_ENDPOINTS = """
with foreigners as materialized (
  select e.key from hookd.endpoint e
   where e.xid >= pg_snapshot_xmax(pg_current_snapshot())
   order by e.xid limit $1
   for update skip locked
),
reset as (
  update hookd.endpoint e set xid = '0' from foreigners f where e.key = f.key
  returning e.key
)
select count(*)::integer from reset
"""

RESET_SLICE = 5000
"""Rows that one of these takes."""

SNAPSHOT = "select pg_current_snapshot()::text as snapshot, clock_timestamp() as now"

ENDPOINT_COLUMNS = """
select e.key, e.id, e.tenant, e.url, e.host, e.shard, e.state, e.state_reason, e.format, e.rate, e.concurrency,
       e.ordered, e.failing_since, e.failing_reason, e.parked_at, e.verified_at, e.former_shards,
       array(select s.value from hookd.endpoint_secret s
              where s.endpoint = e.key and s.purpose = 'signing' and (s.expires_at is null or s.expires_at > now())
              order by s.id desc) as secrets,
       (select min(s.expires_at) from hookd.endpoint_secret s
         where s.endpoint = e.key and s.purpose = 'signing' and s.expires_at > now()) as rotates_until,
       (select s.value from hookd.endpoint_secret s
         where s.endpoint = e.key and s.purpose = 'headers' order by s.id desc limit 1) as headers
  from hookd.endpoint e
"""

ENDPOINTS_OF_SHARDS = ENDPOINT_COLUMNS + " where e.shard = any($1::smallint[])"

ENDPOINTS_BY_KEY = ENDPOINT_COLUMNS + " where e.key = any($1::integer[])"

ENDPOINT_CHANGES = (
    ENDPOINT_COLUMNS
    + """
 where e.key in (
   select c.key from hookd.endpoint c where c.xid >= $1::text::xid8
   union all
   select c.key from hookd.endpoint c where c.xid = any($2::text[]::xid8[]))
"""
)

# Unnested, so that each id is looked for in its own day's partition only: pruning does not see through any().
# Times as numbers and the payload as bytes, for that is what becomes of them: 2 µs an event less than through their types.
# By their place among the ids that were asked for: those have been read and hashed already, another 0.6 µs.
EVENTS = """
select k.place, e.type, e.tenant, convert_to(e.payload, 'UTF8') as payload,
       extract(epoch from e.created_at)::double precision as created_at,
       extract(epoch from e.expires_at)::double precision as expires_at, e.headers
  from unnest($1::uuid[]) with ordinality as k (id, place)
  join hookd.event e on e.id = k.id
"""

# A replay may outlive its event's partition: the dead letter carries a copy.
BURIED_EVENTS = """
select distinct on (d.event_id)
       d.event_id as id, d.type, d.tenant, convert_to(d.payload, 'UTF8') as payload,
       extract(epoch from d.created_at)::double precision as created_at,
       extract(epoch from d.expires_at)::double precision as expires_at, d.headers
  from hookd.dead_letter d
 where d.event_id = any($1::uuid[])
 order by d.event_id
"""

FLAG_SLEEP = (
    "select setval(sleeper, case when $2 then 2 else 1 end) from hookd.shard where id = any($1::smallint[])"
)


class Queue:
    """The feed's connection."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        keyring: Callable[[], Keyring],
        mono: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mono = mono
        self._connection = connection
        self._keyring = keyring
        self.unreadable: dict[UUID, str] = {}
        """Endpoints whose secrets cannot be opened, as of when they were read last, and why: their deliveries wait."""
        self.lost = asyncio.Event()
        connection.add_termination_listener(lambda _: self.lost.set())
        self.statements = 0
        self._listens_for = ""
        self.heard = False
        """Whether the notification that it listens for has come."""
        self._asked_mono: float | None = None

    def waited_s(self) -> float:
        """How long the read that is under way has been waited for; 0 without one."""
        return 0.0 if self._asked_mono is None else self._mono() - self._asked_mono

    async def prepare(self, notified: Callable[[str], None]) -> None:
        """Pin the plans and listen; ``notified`` is called with the payload of each notification."""
        await self._run(self._connection.execute, PIN_PLANS)

        def heard(_connection: object, _backend: int, _channel: str, payload: object) -> None:
            text = str(payload)
            if text.startswith(ECHO):
                # those of other daemons come too, perhaps in the same moment
                self.heard = self.heard or text.removeprefix(ECHO) == self._listens_for
            else:
                notified(text)

        async def listen(*, timeout: float) -> None:  # noqa: ASYNC109 - as the driver's calls have it
            async with asyncio.timeout(timeout):
                await self._connection.add_listener("hookd", heard)

        await self._run(listen)

    def listen_for(self, text: str) -> None:
        """Listen for a notification to oneself (``ECHO`` and this text) from now on, instead of the last one."""
        self._listens_for, self.heard = text, False

    async def snapshot(self) -> tuple[Snapshot, float]:
        """The present snapshot, and the database's clock."""
        row = await self._run(self._connection.fetchrow, SNAPSHOT)
        return Snapshot.parse(row["snapshot"]), row["now"].timestamp()

    async def arrivals(self, since: Snapshot, shards: Iterable[int], window: int) -> Arrivals:
        """Rows of the shards that ``since`` did not see; at most ``window``, else their places."""
        bounds = str(since.xmax), list(since.xip), list(shards)
        head, *rows = await self._run(self._connection.fetch, ARRIVALS, *bounds, window + 1)
        if len(rows) <= window:
            return Arrivals(
                Snapshot.parse(head[0]), head[1].timestamp(), [Row._make(r[2:]) for r in rows], []
            )
        head, *places = await self._run(self._connection.fetch, ARRIVAL_PLACES, *bounds)
        return Arrivals(
            Snapshot.parse(head[0]),
            head[1].timestamp(),
            [],
            [Place(EndpointKey(p["endpoint"]), p["first_id"], _epoch(p["first_due"])) for p in places],
        )

    async def refill_fresh(self, demands: Sequence[tuple[EndpointKey, int, int]]) -> list[Row]:
        """Each endpoint's next fresh rows: ``(endpoint, after this id, how many)``."""
        columns = [list(c) for c in zip(*demands, strict=True)]
        return [Row._make(r) for r in await self._run(self._connection.fetch, REFILL_FRESH, *columns)]

    async def refill_due(
        self, demands: Sequence[tuple[EndpointKey, datetime.datetime, int, int, bool]]
    ) -> list[Row]:
        """
        Each endpoint's next due rows, and one that is not yet.

        A demand is ``(endpoint, after this time, and this id, how many, whatever their time)``.
        """
        columns = [list(c) for c in zip(*demands, strict=True)]
        return [Row._make(r) for r in await self._run(self._connection.fetch, REFILL_DUE, *columns)]

    async def heads(self, keys: Sequence[tuple[EndpointKey, str, int]]) -> list[Row]:
        """The oldest pending row of each ``(endpoint, order key, after this id)``."""
        columns = [list(c) for c in zip(*keys, strict=True)]
        return [Row._make(r) for r in await self._run(self._connection.fetch, HEADS, *columns)]

    async def latest(self, keys: Sequence[tuple[EndpointKey, str]]) -> list[Row]:
        """The newest pending row of each ``(endpoint, coalesce key)``."""
        columns = [list(c) for c in zip(*keys, strict=True)]
        return [Row._make(r) for r in await self._run(self._connection.fetch, LATEST, *columns)]

    async def older(self, newer: Sequence[tuple[EndpointKey, str, DeliveryId, UUID]], most: int) -> list[Row]:
        """
        What the newer rows replace; at most so many of each.

        ``newer`` is ``(endpoint, coalesce key, id, its event)``.
        """
        columns = [list(c) for c in zip(*newer, strict=True)]
        return [Row._make(r) for r in await self._run(self._connection.fetch, OLDER, *columns, most)]

    async def recover(self) -> tuple[list[EndpointKey], list[tuple[EndpointKey, float]]]:
        """The endpoints that have fresh rows, and those that have rows with a time, with the first of these."""
        for reset in (RESET_FOREIGN_XIDS, RESET_FOREIGN_ENDPOINTS):
            while await self._run(self._connection.fetchval, reset, RESET_SLICE) == RESET_SLICE:
                pass
        rows = await self._run(self._connection.fetch, RECOVER)
        fresh = [EndpointKey(r["endpoint"]) for r in rows if r["fresh"]]
        due = [(EndpointKey(r["endpoint"]), r["due_at"].timestamp()) for r in rows if not r["fresh"]]
        return fresh, due

    async def endpoints_of(self, shards: Iterable[int]) -> list[Endpoint]:
        """All endpoints of the shards."""
        return self._endpoints(await self._run(self._connection.fetch, ENDPOINTS_OF_SHARDS, list(shards)))

    async def endpoints(self, keys: Iterable[EndpointKey]) -> list[Endpoint]:
        """The endpoints of these keys, as far as they exist."""
        return self._endpoints(await self._run(self._connection.fetch, ENDPOINTS_BY_KEY, list(keys)))

    async def endpoint_changes(self, since: Snapshot) -> list[Endpoint]:
        """Endpoints that were changed by transactions that ``since`` did not see."""
        rows = await self._run(self._connection.fetch, ENDPOINT_CHANGES, str(since.xmax), list(since.xip))
        return self._endpoints(rows)

    async def events(self, ids: Sequence[UUID]) -> dict[UUID, Event]:
        """The events of these ids; those whose day was dropped are missing, unless a dead letter has a copy."""
        rows = await self._run(self._connection.fetch, EVENTS, ids)
        found = {(id_ := ids[r[0] - 1]): _event(id_, r) for r in rows}
        missing = [i for i in ids if i not in found]
        if missing:
            found |= {
                r[0]: _event(r[0], r) for r in await self._run(self._connection.fetch, BURIED_EVENTS, missing)
            }
        return found

    async def flag_sleep(self, shards: Iterable[int], *, asleep: bool) -> None:
        """Tell producers whether a NOTIFY is wanted."""
        await self._run(self._connection.execute, FLAG_SLEEP, list(shards), asleep)

    async def close(self) -> None:
        """End the session."""
        self._connection.terminate()

    async def _run(self, call: Any, *args: Any) -> Any:
        self.statements += 1
        self._asked_mono = self._mono()
        try:
            return await call(*args, timeout=READ_TIMEOUT_S)
        except Exception as error:
            problem = refused(error)
            if problem is not None:
                self.lost.set()
                self._connection.terminate()
                raise problem from error
            raise
        finally:
            self._asked_mono = None

    def _endpoints(self, rows: Sequence[asyncpg.Record]) -> list[Endpoint]:
        keyring = self._keyring()
        return [self._endpoint(r, opened(keyring, r)) for r in rows]

    def _endpoint(self, r: asyncpg.Record, found: Opened) -> Endpoint:
        state, reason = self._state(r, found.problem)
        return Endpoint(
            key=EndpointKey(r["key"]),
            id=r["id"],
            tenant=r["tenant"],
            url=r["url"],
            host=r["host"],
            shard=r["shard"],
            former_shards=tuple(r["former_shards"]),
            state=state,
            state_reason=reason,
            format=BodyFormat(r["format"]) if r["format"] else None,
            rate=r["rate"],
            concurrency=r["concurrency"],
            ordered=r["ordered"],
            health=Health(_epoch(r["failing_since"]), r["failing_reason"], _epoch(r["parked_at"])),
            secrets=found.signing,
            rotates_until=_epoch(r["rotates_until"]),
            headers=found.headers,
            verified_at=_epoch(r["verified_at"]),
        )

    def _state(self, r: asyncpg.Record, unreadable: str | None) -> tuple[EndpointState, str | None]:
        """What the engine takes an endpoint for: one that may not be sent to for now is paused, whatever the cause."""
        self.unreadable.pop(r["id"], None)
        if r["state"] in ("active", "paused", "unverified") and unreadable is not None:
            self.unreadable[r["id"]] = unreadable
            return EndpointState.PAUSED, f"its secrets cannot be read: {unreadable}"
        if r["state"] == "unverified":
            return EndpointState.PAUSED, r["state_reason"]
        return EndpointState(r["state"]), r["state_reason"]


def _event(id_: UUID, r: asyncpg.Record) -> Event:
    _, type_, tenant, payload, created_at, expires_at, headers = r
    # interned: thousands wait in memory, of few types and tenants
    return Event(
        id_,
        intern(type_),
        intern(tenant),
        payload,
        created_at,
        expires_at,
        json.loads(headers) if headers else None,
    )


def _epoch(at: datetime.datetime | None) -> float | None:
    return None if at is None else at.timestamp()
