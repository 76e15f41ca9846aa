"""
Whether sessions are sessions: behind a pooler in transaction mode they are not, and locks, LISTEN and fencing are void.

PostgreSQL tells the process id of a session as it begins, and again when it is asked.  Where the two agree nobody is in
between.  Where they differ there is a pooler, which makes the first one up; then several sessions are opened, and it is
looked at who serves them.  In session mode each keeps a process of its own.  In transaction mode an idle server is given
to whoever asks next, so that two of them soon have the same one, or one of them has changed.  They are asked forth and
back, because a pool that takes turns (``server_round_robin``) could else meet each of them with the same server again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg

from hookd.postgres.connect import DatabaseRefused, unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SESSIONS = 3

ROUNDS = 4

ANSWER_S = 5.0

SHARED = (
    "a pooler in transaction mode stands between hookd and PostgreSQL, and hookd needs sessions of its own (locks, LISTEN): "
    "name PostgreSQL itself in database.dsn, or set pool_mode = session for this database in the pooler"
)

# As a message, and by the simple protocol: one transaction, one packet, and no prepared statement that would be another
# server's the next time.  Messages of level info come whatever client_min_messages says.
TELL = "do $$ begin raise info 'hookd %', pg_backend_pid(); end $$"

# What a pooler makes of session state that has gone to another server.
STRANGE = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)


async def check_sessions(connect: Callable[[], Awaitable[asyncpg.Connection]]) -> None:
    """
    See whether ``connect`` makes sessions that last.

    Raises:
        DatabaseRefused: it does not.
        DatabaseUnavailable: it could not be found out.
    """
    opened: list[asyncpg.Connection] = []
    try:
        opened.append(await connect())
        if await _backend(opened[0]) == opened[0].get_server_pid():
            return
        opened += [await connect() for _ in range(SESSIONS - 1)]
        served: dict[int, int] = {}
        for n in range(ROUNDS):
            for place in range(SESSIONS) if n % 2 == 0 else reversed(range(SESSIONS)):
                backend = await _backend(opened[place])
                if served.setdefault(place, backend) != backend:
                    raise DatabaseRefused(SHARED)
            if len(set(served.values())) < SESSIONS:
                raise DatabaseRefused(SHARED)
    except STRANGE:
        raise DatabaseRefused(SHARED) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise unavailable(error) or error from None
    finally:
        for connection in opened:
            connection.terminate()


async def _backend(connection: asyncpg.Connection) -> int:
    said: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def hear(_connection: object, message: asyncpg.PostgresLogMessage) -> None:
        if not said.done():
            said.set_result(str(message.message))

    connection.add_log_listener(hear)
    try:
        async with asyncio.timeout(ANSWER_S):
            await connection.execute(TELL)
            return int((await said).rpartition(" ")[2])
    finally:
        connection.remove_log_listener(hear)
