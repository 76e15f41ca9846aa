"""
Times between PostgreSQL and Python: PostgreSQL's reach further, and nobody's year 294276 may end a session.

asyncpg raises an ``OverflowError`` for a time that ``datetime`` cannot hold, and with it goes all that was read: one row that
somebody wrote with such a time, and the daemon that reads it starts over again and again.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncpg

EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
"""From where PostgreSQL counts microseconds."""

EPOCH_S = 946_684_800
"""The same in seconds since 1970."""

MICROSECOND = datetime.timedelta(microseconds=1)

# a day from the ends of what datetime holds: in any time zone they can still be shown
FIRST = datetime.datetime.min.replace(tzinfo=datetime.UTC) + datetime.timedelta(days=1)
LAST = datetime.datetime.max.replace(tzinfo=datetime.UTC) - datetime.timedelta(days=1)
FIRST_US = (FIRST - EPOCH) // MICROSECOND
LAST_US = (LAST - EPOCH) // MICROSECOND

MINUS_INFINITY = -(2**63)
"""PostgreSQL's, in microseconds."""


async def as_datetimes(connection: asyncpg.Connection) -> None:
    """Let times be datetimes on this connection; what lies beyond, ``infinity`` too, is 0001-01-02 or 9999-12-30."""
    await _set(connection, _of_datetime, _to_datetime)


async def as_numbers(connection: asyncpg.Connection) -> None:
    """Let times be seconds since 1970 on this connection: a datetime on the way to a COPY costs 1.5 µs a row."""
    await _set(connection, _of_number, _to_number)


async def _set(
    connection: asyncpg.Connection, encoder: Callable[[Any], Any], decoder: Callable[[Any], Any]
) -> None:
    await connection.set_type_codec(
        "timestamptz", schema="pg_catalog", encoder=encoder, decoder=decoder, format="tuple"
    )


def _of_datetime(at: datetime.datetime) -> tuple[int]:
    micros = (at.astimezone(datetime.UTC) - EPOCH) // MICROSECOND
    # what was before it was read as this: a read that goes on from there must not pass it by
    return (micros if micros > FIRST_US else MINUS_INFINITY,)


def _to_datetime(at: tuple[int]) -> datetime.datetime:
    return EPOCH + MICROSECOND * max(FIRST_US, min(LAST_US, at[0]))


def _of_number(at: float) -> tuple[int]:
    return (round((at - EPOCH_S) * 1e6),)


def _to_number(at: tuple[int]) -> float:
    return at[0] / 1e6 + EPOCH_S
