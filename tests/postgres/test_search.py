"""Searching: every page, forwards and backwards, holds exactly what a plain look at the tables says, in order."""

from __future__ import annotations

import asyncio
import datetime
import random
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import pytest

from hookd.postgres import pages, search
from hookd.postgres.pages import BadCursor
from hookd.postgres.search import BadFilter, Filter
from tests.producing import add_endpoint_with_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

EVENTS = 300

INSERT_EVENTS = """
insert into hookd.event (id, type, tenant, payload)
select (left(hookd.uuid7_floor($1::timestamptz + i * $2::interval)::text, 14) || '7' || right(hookd.uuid7()::text, 21))::uuid,
       case when i % 3 = 0 then 'order.paid' else 'user.created' end, case when i % 4 = 0 then 'umbrella' else 'acme' end, '{"id": ' || i || '}'
  from generate_series(1, $3::integer) i
"""

# As a daemon would settle them; some share a moment to the microsecond, and rows of one event have several endpoints.
ATTEMPT = """
insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, status, verdict, outcome, reason, total_ms)
select date_trunc('second', hookd.uuid7_time(d.event_id)) + $2 * interval '1 hour', d.id, d.event_id, d.endpoint, $3, $4, $5, $6, $7, 10
  from hookd.delivery d where d.id = $1
"""

DEAD = """
insert into hookd.dead_letter (delivery_id, event_id, endpoint, attempts, reason, tenant, type, payload, created_at, died_at)
select d.id, d.event_id, d.endpoint, 2, 'answered 500', e.tenant, e.type, e.payload, e.created_at, date_trunc('minute', e.created_at)
  from hookd.delivery d join hookd.event e on e.id = d.event_id where d.id = $1
"""


@pytest.fixture
def log(dsn: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[UUID]]:
    """A log over two days, denser at its ends; searches stop after each window, so that they have to go on often."""
    monkeypatch.setattr(search, "page", partial(pages.page, look_s=0))
    monkeypatch.setattr(pages, "PROBE_ROWS", 5)

    async def go() -> list[UUID]:
        endpoints = []
        for tenant in ("acme", "acme", "umbrella"):
            _, found = await add_endpoint_with_id(dsn, "https://example.com/", tenant=tenant)
            endpoints.append(found)
        connection = await asyncpg.connect(dsn)
        now = datetime.datetime.now(datetime.UTC)
        for start, step in (
            (now - datetime.timedelta(hours=40), datetime.timedelta(seconds=1)),
            (now - datetime.timedelta(hours=20), datetime.timedelta(minutes=7)),
            (now - datetime.timedelta(seconds=30), datetime.timedelta(milliseconds=1)),
        ):
            await connection.execute(INSERT_EVENTS, start, step, EVENTS // 3)
        dice = random.Random(7)
        for number in [r["id"] for r in await connection.fetch("select id from hookd.delivery order by id")]:
            fate = dice.choice(
                ["fresh", "retrying", "delivered", "delivered", "delivered", "exhausted", "cancelled"]
            )
            if fate == "fresh":
                continue
            if fate == "retrying":
                await connection.execute(ATTEMPT, number, 0, 1, 503, "retry", "answered", "answered 503")
                await connection.execute(
                    "update hookd.delivery set attempt = 1, due_at = now() + interval '1 hour' where id = $1",
                    number,
                )
                continue
            if fate == "exhausted":
                await connection.execute(ATTEMPT, number, 0, 1, 500, "retry", "answered", "answered 500")
                await connection.execute(DEAD, number)
            outcome = None if fate == "cancelled" else "answered"
            status = {"delivered": 200, "exhausted": 500, "cancelled": None}[fate]
            made = {"delivered": 1, "exhausted": 2, "cancelled": 0}[fate]
            await connection.execute(ATTEMPT, number, 1, made, status, fate, outcome, None)
            await connection.execute("delete from hookd.delivery where id = $1", number)
        await connection.close()
        return endpoints

    return dsn, asyncio.run(go())


async def walked(
    search_for: Callable[..., Awaitable[pages.Page]],
    connection: asyncpg.Connection,
    wanted: Filter,
    limit: int,
    key: Callable[[dict[str, Any]], Any],
) -> list[Any]:
    """All keys of a search; going back from the last page has to show the same ones."""
    there: list[pages.Page] = [await search_for(connection, wanted, None, limit)]
    while there[-1].older is not None:
        there.append(await search_for(connection, wanted, there[-1].older, limit))
        assert len(there) < 5000, "it never ends"
    seen = [key(row) for page in there for row in page.rows]
    assert all(len(page.rows) <= limit for page in there)
    last = next((page for page in reversed(there) if page.rows), None)
    back: list[Any] = []
    cursor = last.newer if last is not None else None
    for _ in range(5000):
        if cursor is None:
            break
        page = await search_for(connection, wanted, cursor, limit)
        back = [key(row) for row in page.rows] + back
        if not page.rows and page.newer == cursor:
            break
        cursor = page.newer
    assert back + [key(row) for row in (last.rows if last else [])] == seen
    return seen


PLAIN_EVENTS = """
select id from hookd.event where {where} order by id desc
"""

PLAIN_DELIVERIES = """
select event_id, delivery_id from (
  select d.event_id, d.id as delivery_id, d.endpoint, case when d.attempt = 0 then 'pending' else 'retrying' end as state from hookd.delivery d
  union all
  select a.event_id, a.delivery_id, a.endpoint, a.verdict from hookd.attempt a where a.verdict <> 'retry') s
  join hookd.event v on v.id = s.event_id join hookd.endpoint e on e.key = s.endpoint
 where {where} order by event_id desc, delivery_id desc
"""

PLAIN_ATTEMPTS = """
select a.at, a.delivery_id, a.attempt from hookd.attempt a
  join hookd.event v on v.id = a.event_id join hookd.endpoint e on e.key = a.endpoint
 where {where} order by a.at desc, a.delivery_id desc, a.attempt desc
"""

PLAIN_DEAD = """
select l.died_at, l.delivery_id from hookd.dead_letter l join hookd.endpoint e on e.key = l.endpoint
 where {where} order by died_at desc, delivery_id desc
"""


def test_every_page_of_every_list(log: tuple[str, list[UUID]]) -> None:
    dsn, endpoints = log

    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        middle = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=12)
        first, last = endpoints[0], endpoints[2]
        one = await connection.fetchval("select event_id from hookd.attempt order by at limit 1 offset 50")
        number = await connection.fetchval(
            "select delivery_id from hookd.attempt where event_id = $1 limit 1", one
        )
        event_key = lambda r: r["id"]  # noqa: E731
        delivery_key = lambda r: (r["event_id"], r["delivery_id"])  # noqa: E731
        attempt_key = lambda r: (r["at"], r["delivery_id"], r["attempt"])  # noqa: E731
        dead_key = lambda r: (r["died_at"], r["delivery_id"])  # noqa: E731
        since, until = f"'{middle}'::timestamptz", f"'{middle}'::timestamptz"
        cases: list[tuple[Any, Filter, str, Any, str]] = [
            (search.events, Filter(), PLAIN_EVENTS, event_key, "true"),
            (search.events, Filter(tenant="umbrella"), PLAIN_EVENTS, event_key, "tenant = 'umbrella'"),
            (search.events, Filter(type="order.*"), PLAIN_EVENTS, event_key, "type = 'order.paid'"),
            (search.events, Filter(path="$.id ? (@ == 17)"), PLAIN_EVENTS, event_key, "payload = '{\"id\": 17}'"),
            (search.events, Filter(since=middle), PLAIN_EVENTS, event_key, f"id >= hookd.uuid7_floor({since})"),
            (search.events, Filter(until=middle), PLAIN_EVENTS, event_key, f"id < hookd.uuid7_floor({until})"),
            (search.events, Filter(tenant="nobody"), PLAIN_EVENTS, event_key, "false"),
            (search.deliveries, Filter(), PLAIN_DELIVERIES, delivery_key, "true"),
            (search.deliveries, Filter(endpoint=first), PLAIN_DELIVERIES, delivery_key, f"e.id = '{first}'"),
            (search.deliveries, Filter(tenant="umbrella", type="user.created"), PLAIN_DELIVERIES, delivery_key, "e.tenant = 'umbrella' and v.type = 'user.created'"),
            (search.deliveries, Filter(event=one), PLAIN_DELIVERIES, delivery_key, f"v.id = '{one}'"),
            (search.deliveries, Filter(path="$.id ? (@ < 20)", until=middle), PLAIN_DELIVERIES, delivery_key, f"(payload::jsonb ->> 'id')::integer < 20 and v.id < hookd.uuid7_floor({until})"),
            *((search.deliveries, Filter(states=(s,)), PLAIN_DELIVERIES, delivery_key, f"s.state = '{s}'") for s in search.STATES),
            (search.attempts, Filter(), PLAIN_ATTEMPTS, attempt_key, "true"),
            (search.attempts, Filter(failed=True), PLAIN_ATTEMPTS, attempt_key, "verdict <> 'delivered'"),
            (search.attempts, Filter(status=5, endpoint=last), PLAIN_ATTEMPTS, attempt_key, f"status between 500 and 599 and e.id = '{last}'"),
            (search.attempts, Filter(states=("exhausted", "retry")), PLAIN_ATTEMPTS, attempt_key, "verdict in ('exhausted', 'retry')"),
            (search.attempts, Filter(event=one, delivery=number), PLAIN_ATTEMPTS, attempt_key, f"event_id = '{one}' and delivery_id = {number}"),
            (search.attempts, Filter(since=middle, tenant="acme"), PLAIN_ATTEMPTS, attempt_key, f"at >= {since} and e.tenant = 'acme'"),
            (search.dead_letters, Filter(), PLAIN_DEAD, dead_key, "true"),
            (search.dead_letters, Filter(endpoint=last, replayed=False), PLAIN_DEAD, dead_key, f"e.id = '{last}'"),
            (search.dead_letters, Filter(type="order.paid"), PLAIN_DEAD, dead_key, "l.type = 'order.paid'"),
        ]  # fmt: skip
        for search_for, wanted, plain, key, where in cases:
            expected = [
                tuple(r) if len(r) > 1 else r[0] for r in await connection.fetch(plain.format(where=where))
            ]
            for limit in (7, 1000):
                assert await walked(search_for, connection, wanted, limit, key) == expected, (wanted, limit)
        await connection.close()

    asyncio.run(go())


def test_what_came_since_is_the_page_before_the_newest(dsn: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute("select hookd.send('a.b', '{}'::text)")
        page = await search.events(connection, Filter())
        assert (page.older, len(page.rows)) == (None, 1)
        nothing = await search.events(connection, Filter(), page.newer)
        assert nothing.rows == []
        back = await search.events(connection, Filter(), nothing.older)
        assert [r["type"] for r in back.rows] == ["a.b"]
        await connection.execute("select hookd.send('a.c', '{}'::text)")
        since = await search.events(connection, Filter(), page.newer)
        assert [r["type"] for r in since.rows] == ["a.c"]
        again = await search.events(connection, Filter(), since.older)
        assert [r["type"] for r in again.rows] == ["a.b"]
        await connection.close()

    asyncio.run(go())


def test_nothing_is_found_in_an_empty_log(dsn: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        for search_for in (search.events, search.deliveries, search.attempts, search.dead_letters):
            page = await search_for(connection, Filter())
            assert (page.rows, page.older, page.looked_back_to) == ([], None, None)
        await connection.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Filter(states=("nonsense",)), "is no state; there are pending"),
        (Filter(path="$$"), "no SQL/JSON path"),
        (Filter(endpoint=UUID(int=1)), "there is no endpoint"),
        (Filter(outcome="answered"), "cannot be searched by outcome"),
        (Filter(replayed=True), "cannot be searched by replayed"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(dsn: str, wanted: Filter, said: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await search.deliveries(connection, wanted)
        finally:
            await connection.close()

    with pytest.raises(BadFilter, match=said):
        asyncio.run(go())


@pytest.mark.parametrize(
    "cursor", ["", "x", "WyJldmVudHMiLCJvIiwiMSJd", "é", "W10", "WyJkZWxpdmVyaWVzIl0", "////"]
)
def test_a_cursor_that_is_none_is_refused(dsn: str, cursor: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await search.deliveries(connection, Filter(), cursor)
        finally:
            await connection.close()

    with pytest.raises(BadCursor):
        asyncio.run(go())
