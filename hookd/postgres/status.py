"""
How the daemons, the queue and the lanes are doing.

It reads PostgreSQL only: each daemon publishes a summary of itself and its lanes every second, and the rest is counted
here.  Nothing is counted beyond a bound.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping, Sequence

    import asyncpg

COUNT_MOST = 10_000
"""Rows of one kind, or of one lane, are counted up to here; one more means that there are more."""

RECENT_S = 60.0
"""For so long a lane's last error counts as trouble."""

SILENT_S = 3.0
"""A daemon speaks every second: what one says that has been silent for so long may be over."""

LANES = 30
"""Shown where nobody says how many."""

# Statistics of a queue are always wrong, and what the planner makes of them (a sequential scan of a million rows, JIT for
# a statement of milliseconds) costs more than all that is being looked at.  For this transaction only.
PIN_PLANS = """
set local enable_seqscan = off;
set local enable_bitmapscan = off;
set local enable_hashjoin = off;
set local enable_mergejoin = off;
set local jit = off;
set local lock_timeout = '3s'
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

QUEUE = f"""
select clock_timestamp() as at,
       (select greatest(0, c.reltuples)::bigint from pg_class c where c.oid = 'hookd.delivery'::regclass) as estimated,
       (select count(*) from (select from hookd.delivery where due_at is null limit {COUNT_MOST + 1}) f) as fresh,
       (select count(*) from (select from hookd.delivery where due_at is not null limit {COUNT_MOST + 1}) r) as waiting,
       (select count(*) from (
          select from hookd.dead_letter where replayed_at is null limit {COUNT_MOST + 1}) l) as dead_letters,
       (select hookd.uuid7_time(event_id) from hookd.delivery order by event_id limit 1) as oldest_at,
       (select count(*)::integer from hookd.shard) as shards,
       e.active, e.unverified, e.paused, e.disabled, e.failing, e.parked
  from (select count(*) filter (where state = 'active')::integer as active,
               count(*) filter (where state = 'unverified')::integer as unverified,
               count(*) filter (where state = 'paused')::integer as paused,
               count(*) filter (where state = 'disabled')::integer as disabled,
               count(*) filter (where state = 'active' and failing_since is not null)::integer as failing,
               count(*) filter (where state = 'active' and parked_at is not null)::integer as parked
          from hookd.endpoint) e
"""

ENDPOINTS_MOST = 5000
"""Endpoints of one host that are looked at."""

# Two index probes for each endpoint of the hosts shown, and of a host no more than so many endpoints and rows: what it
# costs does not depend on how much is pending.  EXPLAIN ANALYZE for 30 hosts, 1,000,000 rows pending, 600,000 and
# 100,000 of them for two of the hosts: 12 ms (53 ms on PostgreSQL 18 and 338 ms on 15 without PIN_PLANS).  With 100,000
# endpoints 22 ms, as they have no index by host; where two of the hosts have 30,000 of them each, 72 to 85 ms.
IN_QUEUE = f"""
select h.host, c.rows, cardinality(h.keys) > {ENDPOINTS_MOST} or c.rows > {COUNT_MOST} as more
  from (select e.host, array_agg(e.key) as keys
          from hookd.endpoint e
         where e.host = any($1::text[])
         group by e.host) h
 cross join lateral (
   select count(*) as rows
     from (select
             from unnest(h.keys[:{ENDPOINTS_MOST}]) as k (key)
            cross join lateral (
              select from hookd.delivery d where d.endpoint = k.key and d.due_at is null
              union all
              select from hookd.delivery d where d.endpoint = k.key and d.due_at is not null) d
            limit {COUNT_MOST + 1}) bounded) c
"""


@dataclass(frozen=True, slots=True)
class Lane:
    """The line in front of one host, as its daemon published it, and what PostgreSQL holds for it."""

    host: str
    daemon: str
    in_flight: int
    concurrency: int
    """The limit as it is now."""
    cap: int
    """The configured one; 0 for none."""
    rate: float
    """Requests a second; 0 for no limit."""
    breaker_open: bool
    held_s: float
    """Until the next exchange may start, where the host is held or its breaker is open."""
    why: str
    """What waits in memory waits for: ``ready``, ``rate``, ``concurrency``, ``hold``, ``breaker``, ``endpoint`` (its endpoints'
    own limits, or they are parked), ``share`` (of max_in_flight); ``idle``: nothing waits."""
    waiting: int
    """In memory."""
    problem: str
    """The last error; empty if there was none."""
    problem_s: float | None
    """How long ago that was."""
    queued: int = 0
    """Rows pending for the host's endpoints, whether in memory or not; at most ``COUNT_MOST``."""
    queued_more: bool = False
    """There are more than that."""

    @property
    def stopped(self) -> bool:
        """Nothing goes: the breaker is open, or the host asked to be left alone."""
        return self.breaker_open or self.held_s > 0

    @property
    def failed_lately(self) -> bool:
        """Its last error is recent."""
        return self.problem_s is not None and self.problem_s <= RECENT_S


@dataclass(frozen=True, slots=True)
class Status:
    """How everything is doing."""

    at: datetime.datetime
    """By the database's clock."""
    nodes: list[dict[str, Any]]
    queue: dict[str, Any]
    lanes: list[Lane]
    """Those in most trouble."""
    lanes_left_out: int
    """Others that were published."""

    @property
    def silent(self) -> list[dict[str, Any]]:
        """Daemons that have not spoken for a while."""
        return [node for node in self.nodes if node["silence"].total_seconds() > SILENT_S]

    def total(self, name: str) -> int:
        """A figure of the daemons' summaries, over all that speak."""
        return sum(node["summary"][name] for node in self.nodes if node not in self.silent)

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        nodes = [n | {"silence": n["silence"].total_seconds()} for n in self.nodes]
        return {
            "at": self.at,
            "daemons": nodes,
            "queue": self.queue,
            "lanes": [asdict(lane) for lane in self.lanes],
            "lanes_left_out": self.lanes_left_out,
        }


async def status(connection: asyncpg.Connection, lanes: int = LANES) -> Status:
    """What the daemons said within the last seconds, the queue's size, and so many lanes."""
    async with connection.transaction():
        await connection.execute(PIN_PLANS)
        queue = await connection.fetchrow(QUEUE)
        assert queue is not None
        published = await nodes(connection)
        known = by_trouble(lanes_of(published))
        shown = known[:lanes]
        rows = await connection.fetch(IN_QUEUE, [lane.host for lane in shown]) if shown else []
    found = {r["host"]: r for r in rows}
    counted = [
        replace(
            lane,
            queued=min(found[lane.host]["rows"], COUNT_MOST),
            queued_more=found[lane.host]["more"],
        )
        if lane.host in found
        else lane
        for lane in shown
    ]
    facts = dict(queue)
    return Status(facts.pop("at"), published, facts, by_trouble(counted), len(known) - len(shown))


PENDING_OF = f"""
select (select count(*) from (select from hookd.delivery where endpoint = $1 and due_at is null limit {COUNT_MOST + 1}) f) as fresh,
       (select count(*) from (select from hookd.delivery where endpoint = $1 and due_at is not null limit {COUNT_MOST + 1}) r) as waiting
"""


async def pending_of(connection: asyncpg.Connection, endpoint_key: int) -> tuple[int, int]:
    """What waits for an endpoint: fresh ones, and those that are due later; each counted to just above ``COUNT_MOST``."""
    row = await connection.fetchrow(PENDING_OF, endpoint_key)
    assert row is not None
    return row["fresh"], row["waiting"]


async def nodes(connection: asyncpg.Connection) -> list[dict[str, Any]]:
    """What each daemon said of itself within the last 15 seconds."""
    return [dict(n) | {"summary": json.loads(n["summary"])} for n in await connection.fetch(NODES)]


def lanes_of(published: Sequence[Mapping[str, Any]]) -> list[Lane]:
    """The lanes of all daemons, as of now: what they said is some tenths of a second old."""
    lanes: dict[str, Lane] = {}
    # a host that changed hands is in two summaries for a while: the one that speaks knows better
    for node in sorted(published, key=lambda node: node["silence"], reverse=True):
        for said in node["summary"].get("lanes", ()):
            lanes[said["host"]] = lane_of(said, node["id"], node["silence"].total_seconds())
    return list(lanes.values())


def lane_of(said: Mapping[str, Any], daemon: str, silence_s: float) -> Lane:
    """A lane as it was published; a daemon of another version may leave something out."""
    return Lane(
        host=said["host"],
        daemon=daemon,
        in_flight=said["in_flight"],
        concurrency=said["concurrency"],
        cap=said["cap"],
        rate=said["rate"],
        # a lane in which nothing waits does not say so otherwise
        breaker_open=said.get("breaker_open", said["why"] == "breaker"),
        held_s=max(0.0, said["held_s"] - silence_s),
        why=said["why"],
        waiting=said["waiting"],
        problem=said.get("problem", ""),
        problem_s=said["problem_s"] + silence_s if said.get("problem") else None,
    )


def by_trouble(lanes: Sequence[Lane]) -> list[Lane]:
    """Those with an open breaker first, those held, those with a recent error, then those with most to do."""
    return sorted(
        lanes,
        key=lambda lane: (
            not lane.breaker_open,
            not lane.stopped,
            not lane.failed_lately,
            -max(lane.queued, lane.waiting),
            lane.host,
        ),
    )


OWNERS = """
select n.id, n.backend, n.summary ->> 'version' as version, clock_timestamp() - n.seen_at as silence,
       a.pid is not null as there
  from hookd.node n
  left join pg_stat_activity a
    on a.pid = n.backend and a.datname = current_database() and a.application_name = 'hookd owner'
 order by n.started_at
"""

EVICT = "select pg_terminate_backend($1)"


class NoSuchNode(Exception):
    """No daemon of that name has a session; the message says which there are."""


async def evict(connection: asyncpg.Connection, name: str) -> str:
    """
    End the owner session of a daemon, and with it its locks; returns its full name.

    The daemon finds its session lost, and comes back for its share if it can.  ``name`` is what ``status`` shows, or its
    beginning.

    Raises:
        NoSuchNode: nobody, or more than one, is called that.
    """
    nodes = [row for row in await connection.fetch(OWNERS) if row["there"]]
    found = [row for row in nodes if row["id"].startswith(name)]
    exact = [row for row in found if row["id"] == name]
    if len(exact or found) != 1:
        there = ", ".join(row["id"] for row in nodes) or "none"
        what = "more than one daemon is" if found else "no daemon is"
        raise NoSuchNode(f"{what} called {name!r}; there are: {there}")
    (row,) = exact or found
    await connection.execute(EVICT, row["backend"])
    return str(row["id"])
