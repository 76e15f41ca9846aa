"""
The owner's session: the connection that holds the shard locks, and the only one that settles.

Rule 1: a verdict is settled on the very session that holds the lock of its shard.  A former owner that was stopped or
cut off may finish what it was sending, but it can no longer delete or reschedule: its session, and so its statement,
is gone.

Rule 2: no exchange starts unless this session answered within the last ``TRUST_S``.  The server keeps the locks of a
silent session for longer than that (``tcp_user_timeout`` and keepalives, see ``connect``), so that nobody else can
own the shard meanwhile.

Rule 3: settling is idempotent.  Rows are deleted or rescheduled only where they still have the attempt number that the
verdict was given for, and attempts are logged for exactly the rows that were.  A COMMIT whose answer was lost is simply
run again.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import asyncpg

from hookd.core.model import DELIVERED, RETRY, DeliveryId, EndpointKey, Result, VerdictKind
from hookd.core.reads import Reach
from hookd.core.shares import View
from hookd.postgres.connect import PIN_PLANS, DatabaseRefused, refused
from hookd.postgres.migrate import SchemaMismatch, pending
from hookd.postgres.pooler import SHARED
from hookd.postgres.times import as_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hookd.clock import Clock
    from hookd.core.model import Delivery

SHARD_LOCK_CLASS = 1752133483
"""First key of the shards' advisory locks: ``'hook'`` read as ASCII.  The second is the shard."""

TRUST_S = 2.0
"""How long an answer of this session vouches for its locks."""

STATEMENT_TIMEOUT_S = 30.0

LOOK_TIMEOUT_S = 5.0
"""No table's lock keeps a server from looking at its locks: one that takes longer hangs."""

MEMBER_LOCK_CLASS = SHARD_LOCK_CLASS + 1
"""Of the lock that every daemon shares, so that they find each other."""

JOIN = "select pg_advisory_lock_shared($1, 0)"

RESIGN = "select pg_advisory_unlock_shared($1, 0)"

SHARDS = "select id from hookd.shard order by id"

BACKEND = "select pg_backend_pid()"

# Who is there and who owns what is written nowhere: a lock is gone the moment its session is.
LOOK = """
select pid, classid::bigint = $2 as member, objid::integer as shard
  from pg_locks
 where locktype = 'advisory' and granted and classid::bigint in ($1, $2) and objsubid = 2
   and database = (select oid from pg_database where datname = current_database())
"""

LOCK_SHARDS = "select id, pg_try_advisory_lock($2, id) as locked from unnest($1::integer[]) as s (id)"

UNLOCK_SHARDS = "select pg_advisory_unlock($2, id) from unnest($1::integer[]) as s (id)"

SETTLE_FINAL = """
delete from hookd.delivery d
 using unnest($1::uuid[], $2::bigint[], $3::smallint[]) as v (event_id, id, attempt)
 where d.event_id = v.event_id and d.id = v.id and d.attempt = v.attempt
returning d.id
"""

SETTLE_RETRY = """
update hookd.delivery d
   set attempt = d.attempt + 1, due_at = clock_timestamp() + make_interval(secs => v.delay_s)
  from unnest($1::uuid[], $2::bigint[], $3::smallint[], $4::double precision[]) as v (event_id, id, attempt, delay_s)
 where d.event_id = v.event_id and d.id = v.id and d.attempt = v.attempt
returning d.id, d.due_at
"""

MOVED = """
select d.id, d.shard
  from unnest($1::uuid[], $2::bigint[], $3::smallint[]) as v (event_id, id, shard)
  join hookd.delivery d on d.event_id = v.event_id and d.id = v.id
 where d.shard <> v.shard
"""

BURY = """
insert into hookd.dead_letter
       (delivery_id, event_id, endpoint, attempts, reason, tenant, type, payload, headers, created_at, expires_at)
select v.id, e.id, v.endpoint, v.attempts, v.reason, e.tenant, e.type, e.payload, e.headers, e.created_at, e.expires_at
  from unnest($1::bigint[], $2::uuid[], $3::integer[], $4::smallint[], $5::text[])
       as v (id, event_id, endpoint, attempts, reason)
  join hookd.event e on e.id = v.event_id
on conflict do nothing
"""

# Facts of hookd's own are events of tenant hookd; those about them raise no further ones.
REPORT_EXHAUSTED = """
insert into hookd.event (type, payload, tenant)
select 'hookd.delivery.exhausted',
       json_build_object('event_id', e.id, 'event_type', e.type, 'tenant', e.tenant,
                         'endpoint_id', p.id, 'attempts', v.attempts, 'reason', v.reason)::text,
       'hookd'
  from unnest($1::bigint[], $2::uuid[], $3::integer[], $4::smallint[], $5::text[])
       as v (id, event_id, endpoint, attempts, reason)
  join hookd.event e on e.id = v.event_id
  join hookd.endpoint p on p.key = v.endpoint
 where e.tenant <> 'hookd' and v.attempts > 0
   and exists (select from hookd.endpoint o where o.tenant = 'hookd' and o.state in ('active', 'paused'))
"""

NOTE_HEALTH = """
update hookd.endpoint e
   set failing_since = to_timestamp(v.since), failing_reason = v.reason, parked_at = to_timestamp(v.parked_at)
  from unnest($1::integer[], $2::double precision[], $3::text[], $4::double precision[]) as v (key, since, reason, parked_at)
 where e.key = v.key
"""

DISABLE = """
update hookd.endpoint e
   set state = 'disabled', state_reason = v.reason
  from unnest($1::integer[], $2::text[]) as v (key, reason)
 where e.key = v.key and e.state in ('active', 'paused')
returning e.key, e.id, e.tenant, e.url, e.state_reason
"""

REPORT_DISABLED = """
insert into hookd.event (type, payload, tenant) values ('hookd.endpoint.disabled', $1, 'hookd')
"""

# A slice of each endpoint's rows, from the newest back: whoever reads on from where a slice begins finds all behind it in place.
FORWARD = """
with asked as (
  select q.endpoint, q.id, q.due_at, q.due_id
    from unnest($1::integer[], $2::bigint[], $3::text[]::timestamptz[], $4::bigint[]) as q (endpoint, id, due_at, due_id)
),
seen as materialized (
  select f.*
    from asked q
   cross join lateral (
     select d.event_id, d.id, d.endpoint, d.shard, d.due_at from hookd.delivery d
      where d.endpoint = q.endpoint and d.due_at is null and d.id < q.id
      order by d.id desc limit $7) f
  union all
  select t.*
    from asked q
   cross join lateral (
     select d.event_id, d.id, d.endpoint, d.shard, d.due_at from hookd.delivery d
      where d.endpoint = q.endpoint and d.due_at is not null and (d.due_at, d.id) < (q.due_at, q.due_id)
      order by d.due_at desc, d.id desc limit $7) t
),
forwarded as (
  update hookd.delivery d
     set shard = e.shard, xid = pg_current_xact_id()
    from seen s join hookd.endpoint e on e.key = s.endpoint
   where d.event_id = s.event_id and d.id = s.id
     and s.shard <> e.shard and s.shard = any($5::smallint[]) and not s.id = any($6::bigint[])
)
select s.endpoint,
       count(*) filter (where s.due_at is null) as fresh, min(s.id) filter (where s.due_at is null) as id,
       count(s.due_at) as timed, min(s.due_at)::text as due_at,
       (array_agg(s.id order by s.due_at, s.id) filter (where s.due_at is not null))[1] as due_id
  from seen s
 group by s.endpoint
"""

FORWARD_MOST = 1000
"""
Rows of a slice, of each kind, divided between the endpoints: some 20 ms.

All rows of an endpoint in one statement took 12 s for a million, in which nothing started anywhere; above 30 s the session would
have been given up, and begun again with the same (``bench/moving.py``).
"""

ATTEMPT_COLUMNS = (
    "at", "delivery_id", "event_id", "endpoint", "attempt", "status", "replay", "sent", "resent", "reused",
    "verdict", "outcome", "reason", "retry_at", "total_ms", "dns_ms", "connect_ms", "tls_ms",
    "first_byte_ms", "url",
    "answer_headers", "answer_body", "answer_truncated",
)  # fmt: skip


BAD_DATA = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    ValueError,
    TypeError,
    OverflowError,
)
"""What PostgreSQL, or its client on the way there, raises for a value that it cannot take."""


class BadBatch(Exception):
    """PostgreSQL refused a batch for what is in it, not for its own state: the recorder takes it apart."""


@dataclass(slots=True)
class Settled:
    """What one settle wrote."""

    ids: set[DeliveryId] = field(default_factory=set)
    """Rows that were deleted or rescheduled; others had been settled before, or are another owner's."""
    due_at: dict[DeliveryId, float] = field(default_factory=dict)
    """Of the rescheduled ones: when they are due, by the database's clock."""
    disabled: list[EndpointKey] = field(default_factory=list)
    statements: int = 0


class OwnerSession:
    """The connection of an owner.  One statement or transaction at a time; a lock keeps the order."""

    def __init__(self, connection: asyncpg.Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock
        self._turn = asyncio.Lock()
        self.shards: set[int] = set()
        self._all: tuple[int, ...] = ()
        self.backend = 0
        """Process id of this session in PostgreSQL; asked for, because behind a pooler the one that the protocol tells is made up."""
        self.answered_mono = clock.mono()
        self.lost = asyncio.Event()
        connection.add_termination_listener(lambda _: self.lost.set())

    async def prepare(self) -> None:
        """Pin the plans, let times be numbers, and learn who this session is."""
        await self._run(self._connection.execute, PIN_PLANS)
        await self._run(as_numbers, self._connection, timeout=None)
        self.backend = await self._run(self._connection.fetchval, BACKEND)

    @property
    def shards_in_all(self) -> int:
        """How many there are, whoever owns them."""
        return len(self._all)

    async def check_schema(self) -> None:
        """
        See whether the schema is the one that this hookd knows: it may have changed while the database was away.

        Raises:
            DatabaseRefused: it is not; the message says what to do.
        """
        try:
            missing = await self._run(pending, self._connection, timeout=None)
        except SchemaMismatch as problem:
            raise DatabaseRefused(str(problem)) from None
        if missing:
            raise DatabaseRefused(
                f"the database lacks {len(missing)} migrations; run hookd migrate, or start hookd again"
            )

    def silent_s(self, now_mono: float) -> float:
        """How long this session has not answered, beyond what its answers vouch for; 0 while they do."""
        return max(0.0, now_mono - self.answered_mono - TRUST_S)

    def trusted(self, now_mono: float) -> bool:
        """Whether the locks can still be taken for held (rule 2)."""
        return now_mono - self.answered_mono < TRUST_S and not self.lost.is_set()

    async def join(self) -> None:
        """Let the other daemons know that this one is there."""
        await self._run(self._connection.execute, JOIN, MEMBER_LOCK_CLASS)
        self._all = tuple([row["id"] for row in await self._run(self._connection.fetch, SHARDS)])

    async def resign(self) -> None:
        """This one is going: the others need not leave it a share."""
        await self._run(self._connection.execute, RESIGN, MEMBER_LOCK_CLASS)

    async def look(self) -> View:
        """Who is there, and who owns what."""
        rows = await self._run(
            self._connection.fetch, LOOK, SHARD_LOCK_CLASS, MEMBER_LOCK_CLASS, timeout=LOOK_TIMEOUT_S
        )
        me = self.backend
        return View(
            members=tuple(sorted(row["pid"] for row in rows if row["member"])),
            me=me,
            shards=self._all,
            taken=frozenset(row["shard"] for row in rows if not row["member"] and row["pid"] != me),
        )

    async def acquire(self, shards: Sequence[int], begun: Sequence[Delivery] = ()) -> set[int]:
        """
        Try to take the locks of these; returns those that were had.

        Tried, not waited for: a lock request that waits would stall settling.  What of ``begun`` was taken under other locks
        is found before a shard counts as ours: nothing of it may be settled before.
        """
        rows = await self._run(self._connection.fetch, LOCK_SHARDS, list(shards), SHARD_LOCK_CLASS)
        gained = {row["id"] for row in rows if row["locked"]}
        await self.find([d for d in begun if d.shard in gained])
        self.shards |= gained
        return gained

    async def release(self, shards: set[int]) -> None:
        """Give these up: nothing of theirs is under way or unwritten."""
        self.shards -= shards
        await self._run(self._connection.execute, UNLOCK_SHARDS, list(shards), SHARD_LOCK_CLASS)

    async def probe(self) -> None:
        """Ask the server for a sign of life, if it gave none of late."""
        if self._clock.mono() - self.answered_mono > TRUST_S / 4 and not self._turn.locked():
            backend = await self._run(self._connection.fetchval, BACKEND, timeout=TRUST_S)
            if backend != self.backend:
                self.lost.set()
                raise DatabaseRefused(SHARED)

    async def forward(self, reaches: Sequence[Reach], under_way: Iterable[DeliveryId]) -> list[Reach]:
        """
        Hand a slice of rows of shards of ours to the shard that their endpoint has moved to, but not those ``under_way``.

        Returns how far it has come with endpoints that it is not through with.
        """
        most = max(1, FORWARD_MOST // len(reaches))
        columns = [list(column) for column in zip(*reaches, strict=True)]
        rows = await self._run(
            self._connection.fetch, FORWARD, *columns, list(self.shards), list(under_way), most
        )
        left = []
        for row in rows:
            fresh, timed = row["fresh"] == most, row["timed"] == most
            if fresh or timed:
                id_ = row["id"] if fresh else 0
                due_at, due_id = (row["due_at"], row["due_id"]) if timed else ("-infinity", 0)
                left.append(Reach(EndpointKey(row["endpoint"]), id_, due_at, due_id))
        return left

    async def find(self, deliveries: Sequence[Delivery]) -> None:
        """
        Learn in which shards the rows are of deliveries that were taken under other locks than these.

        Whoever owned their shard meanwhile may have forwarded them; they are then another's to settle.
        """
        if not deliveries:
            return
        columns = [d.event.id for d in deliveries], [d.id for d in deliveries], [d.shard for d in deliveries]
        moved = {r[0]: r[1] for r in await self._run(self._connection.fetch, MOVED, *columns)}
        for delivery in deliveries:
            delivery.shard = moved.get(delivery.id, delivery.shard)

    async def settle(self, results: Sequence[Result]) -> Settled:
        """
        Write a batch of results in one transaction.

        Raises:
            DatabaseUnavailable: nothing is known to be written; settle the same batch again on the next session.
            BadBatch: PostgreSQL refused the data.
        """
        settled: Settled = await self._run(self._settle, results, timeout=None)
        return settled

    async def close(self) -> None:
        """Give up the locks by ending the session."""
        try:
            await self._connection.close(timeout=2)
        except (asyncpg.PostgresError, OSError, TimeoutError, asyncpg.InterfaceError):
            self._connection.terminate()

    def terminate(self) -> None:
        """End the session without asking it."""
        self._connection.terminate()

    async def _run(self, call: Any, *args: Any, timeout: float | None = STATEMENT_TIMEOUT_S) -> Any:  # noqa: ASYNC109
        async with self._turn:
            begun = self._clock.mono()
            try:
                if timeout is None:
                    async with asyncio.timeout(STATEMENT_TIMEOUT_S):
                        answer = await call(*args)
                else:
                    answer = await call(*args, timeout=timeout)
            except Exception as error:
                problem = refused(error)
                if problem is not None:
                    self.lost.set()
                    self._connection.terminate()
                    raise problem from error
                raise
            # vouched for from the moment of asking, not of the answer
            self.answered_mono = begun
            return answer

    async def _settle(self, results: Sequence[Result]) -> Settled:
        settled = Settled()
        try:
            async with self._connection.transaction():
                await self._settle_rows(results, settled)
                written = results
                if len(settled.ids) < len(results):
                    written = [r for r in results if r.delivery.id in settled.ids]
                if written:
                    await self._connection.copy_records_to_table(
                        "attempt",
                        schema_name="hookd",
                        columns=ATTEMPT_COLUMNS,
                        records=[attempt_record(r, settled.due_at.get(r.delivery.id)) for r in written],
                    )
                    settled.statements += 1
                await self._settle_consequences(written, settled)
        except BAD_DATA as error:
            raise BadBatch(str(error)) from error
        settled.statements += 2
        return settled

    async def _settle_rows(self, results: Sequence[Result], settled: Settled) -> None:
        final = [r.delivery for r in results if r.verdict.kind is not RETRY]
        if final:
            rows = await self._connection.fetch(
                SETTLE_FINAL, [d.event.id for d in final], [d.id for d in final], [d.attempt for d in final]
            )
            settled.ids.update(row[0] for row in rows)
            settled.statements += 1
        if len(final) < len(results):
            retried = [r for r in results if r.verdict.kind is RETRY]
            rows = await self._connection.fetch(
                SETTLE_RETRY,
                [r.delivery.event.id for r in retried],
                [r.delivery.id for r in retried],
                [r.delivery.attempt for r in retried],
                [r.verdict.delay_s for r in retried],
            )
            settled.due_at.update((row[0], row[1]) for row in rows)
            settled.ids.update(settled.due_at)
            settled.statements += 1

    async def _settle_consequences(self, written: Sequence[Result], settled: Settled) -> None:
        if all(r.verdict.kind is DELIVERED and r.health is None for r in written):
            return
        dead = [r for r in written if r.verdict.kind is VerdictKind.EXHAUSTED]
        if dead:
            graves = (
                [r.delivery.id for r in dead],
                [r.delivery.event.id for r in dead],
                [r.endpoint_key for r in dead],
                [attempts_made(r) for r in dead],
                [r.verdict.reason for r in dead],
            )
            await self._connection.execute(BURY, *graves)
            await self._connection.execute(REPORT_EXHAUSTED, *graves)
            settled.statements += 2
        health = {r.endpoint_key: r.health for r in written if r.health is not None}
        if health:
            await self._connection.execute(
                NOTE_HEALTH,
                list(health),
                [h.failing_since for h in health.values()],
                [h.reason for h in health.values()],
                [h.parked_at for h in health.values()],
            )
            settled.statements += 1
        disable = {r.endpoint_key: r.verdict.disable for r in written if r.verdict.disable}
        if disable:
            rows = await self._connection.fetch(DISABLE, list(disable), list(disable.values()))
            settled.disabled = [EndpointKey(row["key"]) for row in rows]
            for row in rows:
                if row["tenant"] != "hookd":
                    await self._connection.execute(REPORT_DISABLED, _disabled_payload(row))
            settled.statements += 1 + len(rows)


def attempts_made(result: Result) -> int:
    """How many exchanges were made for a delivery, this one included."""
    return result.delivery.attempt + (result.outcome is not None)


def attempt_record(result: Result, due_at: float | None) -> tuple[Any, ...]:
    """The row of ``hookd.attempt`` for a result; an ending without an exchange is numbered 0."""
    delivery, outcome, verdict = result.delivery, result.outcome, result.verdict
    if outcome is None:
        return (
            result.written_wall, delivery.id, delivery.event.id, result.endpoint_key, 0, None,
            delivery.replay, False, False, False, verdict.kind, None, verdict.reason or None, None,
            None, None, None, None, None, None, None, None, False,
        )  # fmt: skip
    return (
        outcome.started_at, delivery.id, delivery.event.id, result.endpoint_key, delivery.attempt + 1,
        outcome.status or None, delivery.replay, outcome.sent, outcome.resent, outcome.reused,
        verdict.kind, outcome.kind, verdict.reason or outcome.reason or None,
        due_at,
        outcome.total_ms, outcome.dns_ms, outcome.connect_ms, outcome.tls_ms, outcome.first_byte_ms, outcome.url or None,
        outcome.headers or None, outcome.body or None, outcome.body_truncated,
    )  # fmt: skip


def _disabled_payload(row: asyncpg.Record) -> str:
    return json.dumps(
        {
            "endpoint_id": str(row["id"]),
            "tenant": row["tenant"],
            "url": row["url"],
            "reason": row["state_reason"],
        }
    )
