"""Rates, endpoints by the hour and failures by cause."""

from __future__ import annotations

import asyncio
import datetime
import json

import asyncpg
import pytest

from hookd.postgres import overview
from hookd.postgres.overview import percentiles
from tests.producing import add_endpoint_with_id

MINUTE = datetime.timedelta(minutes=1)

FAIL = """
insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, status, verdict, outcome, reason)
values ($1, $2, hookd.uuid7(), 1, 1, $3, $4, $5, $6)
"""

HOUR = """
insert into hookd.endpoint_hour (at, endpoint, delivered, failed, total_ms, slowest_ms)
select date_trunc('hour', now(), 'UTC') - $1::integer * interval '1 hour', e.key, $3, $4, 30, 20
  from hookd.endpoint e
 where e.id = $2
"""


def test_percentiles_lie_inside_their_buckets() -> None:
    found = percentiles({"10": 50, "20": 50, "inf": 0})
    assert (found.p50, found.p95) == (10, 19)
    assert percentiles({"10": 0, "20": 100}).p50 == 15, "an empty bucket is a lower bound"
    assert percentiles({"5": 1, "inf": 99}).p99 == 5, "what lies above the last bound is not made up"
    assert percentiles({}).p50 is None


def test_rates_add_up_over_daemons_and_minutes(dsn: str) -> None:
    async def go() -> overview.Rates:
        connection = await asyncpg.connect(dsn)
        at = datetime.datetime.now(datetime.UTC).replace(minute=0, second=0, microsecond=0)
        for minute, node, good in ((0, "a", 90), (0, "b", 10), (1, "a", 50), (7, "a", 1)):
            figures = {
                "verdict.delivered": good, "outcome.2xx": good, "outcome.timeout": 10, "attempt_ms.100": good, "attempt_ms.250": 10,
            }  # fmt: skip
            await connection.execute(
                "insert into hookd.tally values (60, $1, $2, 1, 5, 2.5, 7, $3::text::jsonb)",
                at + minute * MINUTE, node, json.dumps(figures),
            )  # fmt: skip
        found = await overview.rates(connection, seconds=600, intervals=5, until=at + 9 * MINUTE)
        await connection.close()
        return found

    found = asyncio.run(go())
    assert [i.attempts for i in found.intervals] == [180, 0, 0, 11, 0]
    first = found.intervals[0]
    assert (first.delivered, first.failed, first.outcomes) == (150, 30, {"2xx": 150, "timeout": 30})
    assert first.success == pytest.approx(150 / 180)
    assert (first.pending, first.oldest_s, first.in_flight) == (5, 2.5, 7)
    assert first.latency_ms.p50 is not None
    assert first.latency_ms.p50 <= 100 < first.latency_ms.p99  # type: ignore[operator]
    assert found.whole.attempts == 191
    assert found.until - found.since == datetime.timedelta(minutes=10)


@pytest.mark.parametrize("days", [1, 3, 7, 31])
def test_rates_reach_back_beyond_the_minutes_that_are_kept(dsn: str, days: int) -> None:
    """Whatever the length of an interval: of minutes there are two days, after them quarters of an hour."""
    ago = datetime.timedelta(days=days) - datetime.timedelta(hours=3)

    async def go() -> overview.Rates:
        connection = await asyncpg.connect(dsn)
        for seconds in (60, 900) if days < 2 else (900,):
            await connection.execute(
                "insert into hookd.tally values ($1, date_bin('15 min', now() - $2::interval, 'epoch'), 'a', 1, 5, 2.5, 7, $3::text::jsonb)",
                seconds, ago, json.dumps({"verdict.delivered": 9}),
            )  # fmt: skip
        found = await overview.rates(connection, seconds=days * 86400)
        await connection.close()
        return found

    found = asyncio.run(go())
    assert (found.whole.delivered, sum(i.delivered for i in found.intervals)) == (9, 9)


def test_the_last_hours_of_endpoints(dsn: str) -> None:
    async def go() -> None:
        _, called = await add_endpoint_with_id(dsn, "https://example.com/")
        _, other = await add_endpoint_with_id(dsn, "https://example.net/")
        connection = await asyncpg.connect(dsn)
        for ago, made, bad in ((0, 5, 1), (3, 0, 2), (23, 7, 0), (24, 100, 100)):
            await connection.execute(HOUR, ago, called, made, bad)
        found = await overview.hourly_outcomes(connection, [called, other], hours=24)
        await connection.close()
        assert list(found) == [called]
        delivered, failed = found[called]
        if not delivered[-1]:  # an hour ended meanwhile
            delivered, failed = [7, *delivered[:-1]], [0, *failed[:-1]]
        assert delivered == [7, *[0] * 22, 5]
        assert failed == [*[0] * 20, 2, 0, 0, 1]

    asyncio.run(go())


def test_failures_are_grouped_by_their_cause(dsn: str) -> None:
    async def go() -> tuple[overview.Failures, overview.Failures]:
        connection = await asyncpg.connect(dsn)
        _, endpoint = await add_endpoint_with_id(dsn, "https://example.com/")
        now = datetime.datetime.now(datetime.UTC)
        for n in range(5):
            await connection.execute(FAIL, now - n * MINUTE, n, 503, "retry", "answered", "answered 503")
        await connection.execute(
            FAIL, now, 9, 503, "expired", "answered", "expires before its next attempt; last: answered 503"
        )
        await connection.execute(FAIL, now, 10, None, "exhausted", "timeout", "no answer in time")
        await connection.execute(FAIL, now, 11, None, "cancelled", None, "replaced by event x")
        await connection.execute(FAIL, now - 600 * MINUTE, 12, 500, "retry", "answered", "answered 500")
        found = await overview.failures(connection, since=now - 60 * MINUTE)
        other = await overview.failures(connection, since=now - 60 * MINUTE, tenant="nobody")
        assert (await overview.failures(connection, since=now - 60 * MINUTE, endpoint=endpoint)).causes
        await connection.close()
        return found, other

    found, other = asyncio.run(go())
    assert [(c["status"], c["reason"], c["failures"]) for c in found.causes] == [
        (503, "answered 503", 6),
        (None, "no answer in time", 1),
    ]
    assert found.causes[0]["host"] == "example.com:443"
    assert (found.looked_back_to, other.causes) == (None, [])
