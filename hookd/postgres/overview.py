"""
How deliveries went over time: rates, success, latency and lag; endpoints by the hour; failures by their cause.

Nothing here counts ``hookd.attempt``.  Rates come from what the daemons counted (``hookd.tally``,
``hookd.endpoint_hour``): exact, and as cheap at ten million attempts as at ten.  Causes come from the newest failures, of
which a bounded number is read by an index that has nothing else in it.
"""

from __future__ import annotations

import datetime
import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import orjson

from hookd.postgres.pages import dictionaries, within_reason

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from uuid import UUID

    import asyncpg

FAILURES_MOST = 5_000
"""Of the newest failures so many are grouped."""

MINUTE_S, QUARTER_S = 60, 900
"""What the daemons count by."""

QUARTER = datetime.timedelta(seconds=QUARTER_S)

MINUTES_KEPT = datetime.timedelta(days=2)
"""Then there are only quarters of an hour (``maintenance.PURGE_TALLY``)."""

CAUSES = 50
"""Shown, the most frequent first."""

NOTHING = (0, 0.0, 0)
"""Pending, the oldest one's age and in flight, where no daemon ran."""

NOW = "select clock_timestamp()"

TALLY = """
with counted as (
  select date_bin($3::interval, m.at, $1::timestamptz) as at, f.key, sum(f.value::bigint)::bigint as total
    from hookd.tally m
   cross join lateral jsonb_each_text(m.figures) f
   where m.seconds = $4 and m.at >= $1 and m.at < $2
   group by 1, 2
),
named as (
  select c.at, jsonb_object_agg(c.key, c.total)::text as figures from counted c group by 1
),
gauged as (
  select date_bin($3::interval, m.at, $1::timestamptz) as at, max(m.pending) as pending, max(m.oldest_s) as oldest_s,
         max(m.in_flight) as in_flight
    from hookd.tally m
   where m.seconds = $4 and m.at >= $1 and m.at < $2
   group by 1
)
select g.at, g.pending, g.oldest_s, g.in_flight, n.figures
  from gauged g
  left join named n on n.at = g.at
 order by g.at
"""

HOURS = """
select e.id as endpoint_id, h.at, h.delivered, h.failed, h.total_ms, h.slowest_ms
  from hookd.endpoint e
  join hookd.endpoint_hour h on h.endpoint = e.key
 where e.id = any($1::uuid[]) and h.at >= $2 and h.at < $3
   and h.at in (select generate_series(date_trunc('hour', $2::timestamptz), $3, interval '1 hour'))
 order by h.at
"""

# The list of endpoints shows 50 times 24 hours: as arrays, and not a row each, they are most of what made the page cost 8 ms of
# the daemon's CPU instead of 19 (bench/console.py --only pages).
# An hour is looked up by itself, because between two of them the index has all other endpoints.
OUTCOMES = """
select e.id as endpoint_id, array_agg(n.hour) as hours, array_agg(h.delivered) as delivered, array_agg(h.failed) as failed
  from hookd.endpoint e
 cross join generate_series(0, $3::integer - 1) n (hour)
  join hookd.endpoint_hour h on h.at = $2::timestamptz + n.hour * interval '1 hour' and h.endpoint = e.key
 where e.id = any($1::uuid[])
 group by e.id
"""

FAILURES = f"""
with looked as (
  select a.at, a.event_id, a.delivery_id, a.endpoint, a.outcome, a.status, a.verdict,
         -- what differs from one to the next is no cause
         case when a.reason like 'expires before its next attempt; last: %'
              then substr(a.reason, length('expires before its next attempt; last: ') + 1) else a.reason end as reason
    from hookd.attempt a
   where a.verdict <> 'delivered' and a.at >= $1 and a.at < $2
   order by a.at desc
   limit {FAILURES_MOST}
),
chosen as (
  select * from looked l
   where l.verdict <> 'cancelled'
     and ($3::uuid is null or l.endpoint = (select e.key from hookd.endpoint e where e.id = $3))
     and ($4::text is null or l.endpoint in (select e.key from hookd.endpoint e where e.tenant = $4))
),
grouped as (
  select c.outcome, c.status, c.reason, count(*)::integer as failures, count(distinct c.endpoint)::integer as endpoints,
         count(distinct c.delivery_id)::integer as deliveries, min(c.at) as first_at, max(c.at) as last_at,
         (array_agg(c.event_id order by c.at desc))[1] as event_id,
         (array_agg(c.delivery_id order by c.at desc))[1] as delivery_id,
         (array_agg(c.endpoint order by c.at desc))[1] as endpoint
    from chosen c
   group by 1, 2, 3
   order by 4 desc, 8 desc
   limit {CAUSES}
)
select g.outcome, g.status, g.reason, g.failures, g.endpoints, g.deliveries, g.first_at, g.last_at, g.event_id, g.delivery_id,
       e.id as endpoint_id, e.host, l.looked_back_to
  from (select case when count(*) = {FAILURES_MOST} then min(at) end as looked_back_to from looked) l
  left join grouped g on true
  left join hookd.endpoint e on e.key = g.endpoint
 order by g.failures desc, g.last_at desc
"""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a histogram, interpolated inside its buckets; milliseconds.  None: nothing was counted."""

    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Interval:
    """What was counted in a stretch of time."""

    at: datetime.datetime
    """Its beginning."""
    seconds: float
    attempts: int
    """Exchanges that ended."""
    delivered: int
    failed: int
    """Exchanges that were not."""
    outcomes: dict[str, int]
    """By what came of them: ``2xx``, ``5xx``, ``timeout``, …"""
    latency_ms: Percentiles
    lag_ms: Percentiles
    """From the event's insert to the first byte of its first attempt."""
    pending: int
    """In the queue, at most in it at one time."""
    oldest_s: float
    in_flight: int

    @property
    def success(self) -> float | None:
        """The share of attempts that delivered; None: there was none."""
        return self.delivered / self.attempts if self.attempts else None

    @property
    def per_second(self) -> float:
        """Attempts a second."""
        return self.attempts / self.seconds


@dataclass(frozen=True, slots=True)
class Rates:
    """A window of time in intervals, and the whole of it."""

    since: datetime.datetime
    until: datetime.datetime
    intervals: list[Interval]
    """All of them, in order; one in which no daemon ran is empty."""
    whole: Interval


@dataclass(frozen=True, slots=True)
class Failures:
    """Failures by cause."""

    causes: list[dict[str, Any]]
    """outcome, status, reason, failures, endpoints, deliveries, first_at, last_at, and of the newest one event_id,
    delivery_id, endpoint_id, host."""
    looked_back_to: datetime.datetime | None
    """There were more than ``FAILURES_MOST``: only those since then were looked at."""


async def rates(
    connection: asyncpg.Connection,
    *,
    seconds: int = 3600,
    intervals: int = 60,
    until: datetime.datetime | None = None,
) -> Rates:
    """
    The last hour by minutes, or whatever else: ``seconds=86400, intervals=96`` for a day by quarters of an hour.

    An interval is a whole number of minutes; where it begins more than two days ago, of quarters of an hour.  ``until`` is now, where it is not given; the last interval goes on beyond it.
    """
    present = await connection.fetchval(NOW)
    now = within_reason(until) or present
    step = datetime.timedelta(minutes=max(1, round(seconds / intervals / 60)))
    asked = step * intervals
    if now - asked < present - MINUTES_KEPT:
        step = -(-step // QUARTER) * QUARTER
        intervals = -(-asked // step)
    # by the quarter a week is as cheap as a day
    kept = QUARTER_S if step.total_seconds() % QUARTER_S == 0 else MINUTE_S
    end = _floor(now, step) + step
    since = end - step * intervals
    rows: dict[Any, Mapping[str, Any]] = {
        r["at"]: dict(r) for r in await connection.fetch(TALLY, since, end, step, kept)
    }
    figures = {at: _figures(row) for at, row in rows.items()}
    times = [since + step * n for n in range(intervals)]
    found = [
        _counted(at, step.total_seconds(), figures.get(at, {}), _gauges(rows[at]) if at in rows else NOTHING)
        for at in times
    ]
    return Rates(since, end, found, _whole(since, end, rows.values(), figures.values()))


async def endpoint_hours(
    connection: asyncpg.Connection,
    endpoints: Sequence[UUID],
    *,
    hours: int = 24,
    until: datetime.datetime | None = None,
) -> dict[UUID, list[dict[str, Any]]]:
    """
    How endpoints fared: for each those hours in which it was called, oldest first.

    Rows: at, delivered, failed, average_ms, slowest_ms.
    """
    since, end = await _hours(connection, hours, until)
    found: dict[UUID, list[dict[str, Any]]] = {e: [] for e in endpoints}
    for row in await connection.fetch(HOURS, list(endpoints), since, end):
        made = row["delivered"] + row["failed"]
        found[row["endpoint_id"]].append(
            {
                "at": row["at"],
                "delivered": row["delivered"],
                "failed": row["failed"],
                "average_ms": row["total_ms"] / made if made else None,
                "slowest_ms": row["slowest_ms"],
            }
        )
    return found


async def hourly_outcomes(
    connection: asyncpg.Connection, endpoints: Sequence[UUID], *, hours: int
) -> dict[UUID, tuple[list[int], list[int]]]:
    """How many attempts delivered and how many failed, in each of the last hours; of those endpoints that were called."""
    since, _ = await _hours(connection, hours)
    found: dict[UUID, tuple[list[int], list[int]]] = {}
    for row in await connection.fetch(OUTCOMES, list(endpoints), since, hours):
        delivered, failed = found[row["endpoint_id"]] = [0] * hours, [0] * hours
        for hour, well, badly in zip(row["hours"], row["delivered"], row["failed"], strict=True):
            delivered[hour], failed[hour] = well, badly
    return found


async def failures(
    connection: asyncpg.Connection,
    *,
    since: datetime.datetime,
    until: datetime.datetime | None = None,
    endpoint: UUID | None = None,
    tenant: str | None = None,
) -> Failures:
    """Why attempts failed since then: grouped by outcome, status and reason, the most frequent first."""
    since, upto = within_reason(since) or since, within_reason(until) or await connection.fetchval(NOW)
    rows = await connection.fetch(FAILURES, since, upto, endpoint, tenant)
    causes = [row for row in dictionaries(rows) if row["failures"] is not None]
    looked = rows[0]["looked_back_to"]
    for row in causes:
        del row["looked_back_to"]
    return Failures(causes, looked)


async def _hours(
    connection: asyncpg.Connection, hours: int, until: datetime.datetime | None = None
) -> tuple[datetime.datetime, datetime.datetime]:
    """So many, the one that goes on is the last."""
    hour = datetime.timedelta(hours=1)
    end = _floor(within_reason(until) or await connection.fetchval(NOW), hour) + hour
    return end - hours * hour, end


def _floor(at: datetime.datetime, step: datetime.timedelta) -> datetime.datetime:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return epoch + (at - epoch) // step * step


def _figures(row: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = orjson.loads(row["figures"] or "{}")
    return found


def _gauges(row: Mapping[str, Any]) -> tuple[int, float, int]:
    return row["pending"], row["oldest_s"], row["in_flight"]


def _whole(
    since: datetime.datetime,
    until: datetime.datetime,
    rows: Collection[Mapping[str, Any]],
    counted: Iterable[Mapping[str, int]],
) -> Interval:
    total: dict[str, int] = {}
    for figures in counted:
        for name, count in figures.items():
            total[name] = total.get(name, 0) + count
    pending, oldest_s, in_flight = map(max, zip(NOTHING, *map(_gauges, rows), strict=True))
    return _counted(since, (until - since).total_seconds(), total, (pending, oldest_s, in_flight))


def _counted(
    at: datetime.datetime, seconds: float, figures: Mapping[str, int], gauges: tuple[int, float, int]
) -> Interval:
    groups: dict[str, dict[str, int]] = {}
    for name, count in figures.items():
        group, _, of = name.partition(".")
        groups.setdefault(group, {})[of] = count
    outcomes = groups.get("outcome", {})
    delivered = figures.get("verdict.delivered", 0)
    attempts = sum(outcomes.values())
    return Interval(
        at,
        seconds,
        attempts,
        delivered,
        max(0, attempts - delivered),
        outcomes,
        percentiles(groups.get("attempt_ms", {})),
        percentiles(groups.get("lag_ms", {})),
        *gauges,
    )


def percentiles(histogram: Mapping[str, int]) -> Percentiles:
    """
    Of counts by upper bound; what lies above the last bound counts as the last bound.

    >>> percentiles({"10": 50, "20": 50}).p50
    10.0
    """
    known = sorted((float(bound), count) for bound, count in histogram.items())
    upto = list(accumulate(count for _, count in known))
    if not upto or not upto[-1]:
        return Percentiles(None, None, None)
    return Percentiles(*(_quantile(known, upto, upto[-1] * share) for share in (0.5, 0.95, 0.99)))


def _quantile(known: Sequence[tuple[float, int]], upto: Sequence[int], rank: float) -> float:
    """``upto`` is how many lie in a bucket and below it."""
    place = bisect_left(upto, rank)
    bound, count = known[place]
    below = known[place - 1][0] if place else 0.0
    return below if bound == math.inf else below + (bound - below) * (rank - upto[place] + count) / count
