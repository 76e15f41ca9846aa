"""
Sessions for looking, apart from those that deliver: few, read-only, opened on demand, each statement bounded.

Nothing that is looked at may cost the queue anything: no parallel workers, no statement longer than
``STATEMENT_MS``, and whoever finds all sessions taken waits for a moment and is then told so.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast

import asyncpg

from hookd.postgres.pages import TooMuch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hookd.postgres.connect import Database

SESSIONS = 3

STATEMENT_MS = 1000

WAIT_S = 2.0

# Set when a session is open, not with which it is opened: poolers refuse those that they do not know, and one that is read-only
# from the start is taken for a standby.
SETTINGS = {
    "default_transaction_read_only": "on",
    "statement_timeout": str(STATEMENT_MS),
    "lock_timeout": "500",
    "idle_in_transaction_session_timeout": "10000",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    # a filter that is not given is folded away, and days that are not asked for are pruned
    "plan_cache_mode": "force_custom_plan",
    # partitions are large and their statistics old: by index or not at all
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}


class Busy(Exception):
    """All sessions for looking are taken."""


async def _prepare(connection: asyncpg.Connection) -> None:
    await connection.execute("; ".join(f"set {name} = {value}" for name, value in SETTINGS.items()))


class Reading:
    """The sessions for looking."""

    def __init__(self, database: Database) -> None:
        self._pool = database.pool("reading", SESSIONS, _prepare)

    async def open(self) -> None:
        """Make it usable; no session is opened yet."""
        await self._pool

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """
        One session; a statement in it that takes too long raises ``TooMuch``.

        Raises:
            Busy: there is none.
            TooMuch: PostgreSQL took too long.
        """
        try:
            connection = await self._pool.acquire(timeout=WAIT_S)
        except TimeoutError:
            raise Busy("too many searches at once; try again") from None
        try:
            yield cast("asyncpg.Connection", connection)
        except asyncpg.QueryCanceledError:
            raise TooMuch("this took too long; name an event, an endpoint or a shorter time") from None
        finally:
            await self._pool.release(connection)

    def close(self) -> None:
        """End them all."""
        self._pool.terminate()
