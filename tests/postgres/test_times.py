"""Times on their way between PostgreSQL and Python: exact where Python can hold them, and never an error where it cannot."""

from __future__ import annotations

import asyncio
import datetime
import random
from typing import TYPE_CHECKING, Any

import pytest

from hookd.postgres.connect import Database
from hookd.postgres.times import EPOCH_S, FIRST, LAST, MICROSECOND, as_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import asyncpg


def on(dsn: str, do: Callable[[asyncpg.Connection], Coroutine[Any, Any, None]]) -> None:
    async def go() -> None:
        connection = await Database.named(dsn).connect("test")
        try:
            await do(connection)
        finally:
            await connection.close()

    asyncio.run(go())


def test_a_time_is_the_same_there_and_back(dsn: str) -> None:
    dice = random.Random(1)
    span = (LAST - FIRST) // MICROSECOND
    times = [FIRST + MICROSECOND * dice.randrange(span) for _ in range(500)] + [FIRST, LAST]

    async def go(connection: asyncpg.Connection) -> None:
        assert await connection.fetchval("select $1::timestamptz[]", times) == times
        texts = await connection.fetchval(
            "select array(select t::text from unnest($1::timestamptz[]) t)", times
        )
        assert await connection.fetchval("select $1::text[]::timestamptz[]", texts) == times
        zone = datetime.timezone(datetime.timedelta(hours=-9))
        assert await connection.fetchval("select $1::timestamptz", times[0].astimezone(zone)) == times[0]

    on(dsn, go)


@pytest.mark.parametrize(
    ("text", "read"),
    [("infinity", LAST), ("294276-12-31 23:59:59", LAST), ("10000-01-01", LAST), ("-infinity", FIRST), ("4713-01-01 BC", FIRST)],
)  # fmt: skip
def test_what_python_cannot_hold_is_the_end_of_what_it_can(
    dsn: str, text: str, read: datetime.datetime
) -> None:
    async def go(connection: asyncpg.Connection) -> None:
        found = await connection.fetchval("select $1::text::timestamptz", text)
        assert found == read
        for hours in (-14, 14):
            found.astimezone(datetime.timezone(datetime.timedelta(hours=hours))).isoformat()

    on(dsn, go)


def test_what_goes_back_to_the_first_moment_is_before_all_that_was_read_as_it(dsn: str) -> None:
    """So a read by due time that begins or goes on there finds all of them; the last moment is below what was read as it."""

    async def go(connection: asyncpg.Connection) -> None:
        beginning = datetime.datetime.min.replace(tzinfo=datetime.UTC)
        for at in (beginning, FIRST):
            assert await connection.fetchval("select $1::timestamptz = '-infinity'", at)
        assert await connection.fetchval(
            "select $1::timestamptz < least('10000-01-01', 'infinity'::timestamptz)", LAST
        )

    on(dsn, go)


def test_numbers_are_exact_to_the_microsecond(dsn: str) -> None:
    dice = random.Random(2)
    # until 2071; a double of seconds holds them until 2242
    micros = [dice.randrange(2**51) for _ in range(500)]
    times = [EPOCH_S + n / 1e6 for n in micros]

    async def go(connection: asyncpg.Connection) -> None:
        await as_numbers(connection)
        there = await connection.fetchval(
            "select array(select round(extract(epoch from t) * 1000000)::bigint from unnest($1::timestamptz[]) t)",
            times,
        )
        assert there == [EPOCH_S * 1_000_000 + n for n in micros]
        assert await connection.fetchval("select $1::timestamptz[]", times) == times

    on(dsn, go)
