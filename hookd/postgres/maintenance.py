"""
What keeps the schema in shape while the daemon runs: partitions, retention, settings, the daemon's own summary.

It has a connection of its own, because a partition may have to wait for a lock, and settling may not.

Most of it can wait: what PostgreSQL refuses of that, or does not finish in time, is reported and left for the next round,
because nothing of it is worth a delivery.  A few statements a tenure cannot do without: a refusal of those ends it.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import asyncpg

from hookd.postgres.connect import refused, unavailable
from hookd.postgres.health import examine
from hookd.postgres.registry import VERIFIED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from uuid import UUID

    from hookd.core.database import DatabaseHealth

TIMEOUT_S = 60.0

CUT_TIMEOUT_S = 5.0
"""Where the open partition has rows, all of them are read before a day is cut off it, and every producer waits meanwhile."""

CUT_AGAIN_S = 3600.0
"""From a day that could not be cut off to the next try: it takes the table from producers each time, and is no hurry."""

CUT_BY_HAND = (
    "not done after {seconds:g} s, in which no producer could write: the open partition has many rows to be read; "
    "run select hookd.add_partition('{parent}') in a quiet hour"
)

LEAVES_THE_SESSION = (
    asyncpg.ObjectNotInPrerequisiteStateError,  # a lock that was not to be had, a day that somebody was detaching
    asyncpg.TransactionRollbackError,  # deadlock
    asyncpg.QueryCanceledError,  # somebody has cancelled it
    TimeoutError,
)
"""Elsewhere these mean that a session starts over.  Here they end a statement, unless the connection is closed by then."""

ADD_PARTITION = "select hookd.add_partition($1)"

DROP_PARTITION = "select hookd.drop_partition($1, clock_timestamp() - make_interval(secs => $2))"

# In slices, so that no lock and no snapshot is held for long.
PURGE_DEAD_LETTERS = """
delete from hookd.dead_letter
 where delivery_id in (
   select delivery_id from hookd.dead_letter
    where died_at < clock_timestamp() - make_interval(secs => $1) order by died_at limit 5000)
"""

PURGE_IDEMPOTENCY = """
delete from hookd.idempotency
 where (tenant, key) in (
   select tenant, key from hookd.idempotency
    where created_at < clock_timestamp() - make_interval(secs => $1) order by created_at limit 5000)
"""

PURGE_ENDPOINTS = """
delete from hookd.endpoint e
 where e.state = 'removed' and e.state_at < clock_timestamp() - make_interval(secs => $1)
   and not exists (select from hookd.delivery d where d.endpoint = e.key and d.due_at is null)
   and not exists (select from hookd.delivery d where d.endpoint = e.key and d.due_at is not null)
"""

PURGE_NODES = "delete from hookd.node where seen_at < clock_timestamp() - interval '1 minute'"

SET = """
insert into hookd.setting (name, value)
select * from unnest($1::text[], $2::text[])
on conflict (name) do update set value = excluded.value where hookd.setting.value <> excluded.value
"""

PUBLISH = """
insert into hookd.node (id, backend, started_at, seen_at, summary)
values ($1, $2, to_timestamp($3), clock_timestamp(), $4::text::jsonb)
on conflict (id) do update
   set backend = excluded.backend, seen_at = excluded.seen_at, summary = excluded.summary
"""

IMPATIENT = "select set_config('lock_timeout', '1s', false)"

ECHO = "select hookd.tell($1)"

THIN_KEY = "select key from hookd.thin_key"

# Counted up to a bound: an exact count of a large backlog would cost more than all that is being looked at.
DEPTH = """
select (select count(*) from (select from hookd.delivery where due_at is null limit 100000) f) as fresh,
       (select count(*) from (select from hookd.delivery where due_at is not null limit 100000) s) as scheduled,
       (select count(*) from (select from hookd.dead_letter where replayed_at is null limit 100000) l) as dead_letter,
       (select extract(epoch from clock_timestamp() - hookd.uuid7_time(o.event_id))::double precision
          from (select event_id from hookd.delivery where due_at is null order by event_id limit 1) o) as oldest_s
"""

NOTE_TALLY = """
insert into hookd.tally as t (seconds, at, node, delivery_id, pending, oldest_s, in_flight, figures)
values ($1, to_timestamp($2), $3, coalesce(pg_sequence_last_value('hookd.delivery_id'), 0), $4, $5, $6, $7::text::jsonb)
on conflict (seconds, at, node) do update
   set delivery_id = excluded.delivery_id, pending = greatest(t.pending, excluded.pending),
       oldest_s = greatest(t.oldest_s, excluded.oldest_s), in_flight = greatest(t.in_flight, excluded.in_flight),
       figures = excluded.figures
"""

NOTE_HOURS = """
insert into hookd.endpoint_hour as h (at, endpoint, delivered, failed, total_ms, slowest_ms)
select to_timestamp($1), * from unnest($2::integer[], $3::integer[], $4::integer[], $5::double precision[], $6::real[])
on conflict (at, endpoint) do update
   set delivered = h.delivered + excluded.delivered, failed = h.failed + excluded.failed,
       total_ms = h.total_ms + excluded.total_ms, slowest_ms = greatest(h.slowest_ms, excluded.slowest_ms)
"""

PURGE_TALLY = """
delete from hookd.tally
 where (seconds, at, node) in (
   select seconds, at, node from hookd.tally
    where at < clock_timestamp() - make_interval(secs => $1) or seconds = 60 and at < clock_timestamp() - interval '2 days'
    order by at limit 5000)
"""

PURGE_HOURS = """
delete from hookd.endpoint_hour
 where (at, endpoint) in (
   select at, endpoint from hookd.endpoint_hour
    where at < clock_timestamp() - make_interval(secs => $1) order by at limit 5000)
"""

# A trail is read long after what it tells of is gone.
PURGE_AUDIT = """
delete from hookd.audit
 where id in (
   select id from hookd.audit where at < clock_timestamp() - interval '400 days' order by at limit 5000)
"""

WITHDRAW = "delete from hookd.node where id = $1"


class Refusals:
    """What of the upkeep was refused.  It outlives the session: what rests does not begin anew with the next one."""

    def __init__(self, mono: Callable[[], float], report: Callable[[str, str], None]) -> None:
        """``report`` is told what was refused, and why, each time."""
        self._mono = mono
        self._report = report
        self._met_mono: dict[str, float] = {}

    def met(self, work: str, problem: str) -> None:
        """It was refused."""
        self._met_mono[work] = self._mono()
        self._report(work, problem)

    def rests(self, work: str, for_s: float) -> bool:
        """Whether it was refused less than so long ago."""
        return self._mono() - self._met_mono.get(work, float("-inf")) < for_s


class Maintenance:
    """The connection for slow work."""

    def __init__(self, connection: asyncpg.Connection, refusals: Refusals) -> None:
        self._connection = connection
        self._refusals = refusals
        self._turn = asyncio.Lock()

    async def add_partition(self, parent: str) -> str | None:
        """Cut the next day off the open partition if it is time; None if it was not, or if it could not be done."""
        work = f"cut {parent}"
        if self._refusals.rests(work, CUT_AGAIN_S):
            return None
        name: str | None = await self._tried(
            work,
            self._connection.fetchval,
            ADD_PARTITION,
            parent,
            timeout_s=CUT_TIMEOUT_S,
            too_long=CUT_BY_HAND.format(seconds=CUT_TIMEOUT_S, parent=parent),
        )
        return name

    async def drop_partition(self, parent: str, older_than_s: float) -> str | None:
        """Drop the oldest partition if it is all older; None if there was none, or if it could not be done."""
        name: str | None = await self._tried(
            f"drop {parent}",
            self._connection.fetchval,
            DROP_PARTITION,
            parent,
            older_than_s,
        )
        return name

    async def purge(self, *, dead_letters_s: float, events_s: float, attempts_s: float) -> int:
        """Delete what retention ends and partitions do not; one slice of each, returns how many rows."""
        deleted = 0
        for table, statement, ages in (
            ("dead_letter", PURGE_DEAD_LETTERS, (dead_letters_s,)),
            ("idempotency", PURGE_IDEMPOTENCY, (events_s,)),
            ("endpoint", PURGE_ENDPOINTS, (events_s,)),
            ("node", PURGE_NODES, ()),
            ("tally", PURGE_TALLY, (attempts_s,)),
            ("endpoint_hour", PURGE_HOURS, (attempts_s,)),
            ("audit", PURGE_AUDIT, ()),
        ):
            status = await self._tried(f"purge {table}", self._connection.execute, statement, *ages)
            deleted += int(status.rpartition(" ")[2]) if status else 0
        return deleted

    async def prepare(self) -> None:
        """Wait for no lock for long: others wait for this connection."""
        await self._run(self._connection.execute, IMPATIENT)

    async def echo(self, payload: str) -> None:
        """Notify the listeners."""
        await self._run(self._connection.execute, ECHO, payload)

    async def set(self, settings: Mapping[str, str]) -> None:
        """Tell the database what it has to know of the configuration."""
        await self._run(self._connection.execute, SET, list(settings), list(settings.values()))

    async def publish(self, node: str, backend: int, started_at: float, summary: str) -> None:
        """Say how this daemon is doing; ``summary`` is JSON."""
        await self._tried("publish", self._connection.execute, PUBLISH, node, backend, started_at, summary)

    async def note_tally(
        self, seconds: int, at: float, node: str, gauges: tuple[int, float, int], figures: Mapping[str, int]
    ) -> None:
        """What a daemon has counted in so many seconds from then; ``gauges``: pending, oldest_s, in_flight."""
        await self._tried(
            "note tally",
            self._connection.execute,
            NOTE_TALLY,
            seconds,
            at,
            node,
            *gauges,
            json.dumps(figures),
        )

    async def note_hours(self, at: float, fares: Sequence[tuple[int, int, int, float, float]]) -> None:
        """Add to the hour that began then: endpoint key, delivered, failed, total and slowest milliseconds."""
        columns = [list(column) for column in zip(*fares, strict=True)]
        await self._tried("note endpoint_hour", self._connection.execute, NOTE_HOURS, at, *columns)

    async def note_verified(self, endpoint_id: UUID, url: str) -> None:
        """An endpoint's URL has answered a challenge."""
        await self._run(self._connection.execute, VERIFIED, endpoint_id, url)

    async def thin_key(self) -> bytes:
        """What signs the URLs of thin events."""
        return bytes(await self._run(self._connection.fetchval, THIN_KEY))

    async def depth(self) -> dict[str, float] | None:
        """
        How much is pending, each figure at most 100,000; and how old the oldest fresh delivery's event is.

        None: somebody has locked the queue, or it could not be counted.
        """
        row = await self._tried("count", self._connection.fetchrow, DEPTH)
        if row is None:
            return None
        return {name: float(value or 0) for name, value in row.items()}

    async def examine(
        self, *, events_s: float, attempts_s: float, dead_letters_s: float
    ) -> DatabaseHealth | str:
        """How PostgreSQL does, as far as the queue depends on it, or why it does not say; given the retentions."""

        async def fetch(statement: str, *args: Any) -> Any:
            return await self._asked(self._connection.fetch, statement, *args)

        try:
            return await examine(
                fetch, events_s=events_s, attempts_s=attempts_s, dead_letters_s=dead_letters_s
            )
        except (asyncpg.PostgresError, TimeoutError) as error:
            # a server that hides its statistics must not keep anything from being delivered
            return str(refused(error))

    async def withdraw(self, node: str) -> None:
        """This daemon is gone."""
        await self._run(self._connection.execute, WITHDRAW, node)

    async def close(self) -> None:
        """End the session."""
        self._connection.terminate()

    async def _tried(
        self,
        work: str,
        call: Any,
        *args: Any,
        timeout_s: float = TIMEOUT_S,
        too_long: str = "",
    ) -> Any:
        """
        What it returns; None where it was not done, which the next round makes good.

        A lock that was not to be had is nothing to speak of.  The rest is reported, ``too_long`` where it took longer than
        ``timeout_s``.
        """
        try:
            return await self._asked(call, *args, timeout_s=timeout_s)
        except asyncpg.LockNotAvailableError:
            pass
        except TimeoutError:
            self._refusals.met(work, too_long or f"not done after {timeout_s:g} s")
        except asyncpg.PostgresError as error:
            self._refusals.met(work, str(refused(error)))
        return None

    async def _run(self, call: Any, *args: Any) -> Any:
        """What it returns; whatever it is refused for ends the tenure."""
        try:
            return await self._asked(call, *args)
        except (asyncpg.PostgresError, TimeoutError) as error:
            raise refused(error) or error from error

    async def _asked(self, call: Any, *args: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """
        What it returns, or raises as long as there is a session.

        Raises:
            DatabaseUnavailable: there is none any more.
        """
        async with self._turn:
            try:
                return await call(*args, timeout=timeout_s)
            except Exception as error:
                stays = isinstance(error, LEAVES_THE_SESSION) and not self._connection.is_closed()
                problem = None if stays else unavailable(error)
                if problem is None:
                    raise
                raise problem from error
