"""
Connections to PostgreSQL: how they are made, and which errors mean that the server is away.

Every session of hookd comes from ``Database.connect``.  What it needs of a server (version, a session that is its own,
a writable node) is checked there, once, with a message that says what to do.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

LEAST_VERSION = 14

CONNECT_TIMEOUT_S = 10.0

# A host that dies without a FIN would keep its locks until TCP gives up, 2 hours later by default: this bounds it to
# about 5 s.  The locks of a silent session must live longer than OwnerSession trusts an answer (2 s).
KEEPALIVE = """
select set_config('tcp_keepalives_idle', '3', false), set_config('tcp_keepalives_interval', '1', false),
       set_config('tcp_keepalives_count', '2', false), set_config('tcp_user_timeout', '5s', false)
"""

# Notices a dead client while a statement runs; not every platform has it.
CHECK_CLIENT = "select set_config('client_connection_check_interval', '3s', false)"

RETRYABLE = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutting down, starting up, cancelled, killed
    asyncpg.InsufficientResourcesError,  # out of connections, memory or disk
    asyncpg.ReadOnlySQLTransactionError,  # a failover left us on the standby
    asyncpg.TransactionRollbackError,  # deadlock: the session starts over
    asyncpg.exceptions.TargetServerAttributeNotMatched,
    asyncpg.InternalClientError,  # its protocol lost track, as it does when the server ends an idle session
    OSError,
    TimeoutError,
    EOFError,
)

# Greedy up to the last @: a password may have been written with the / ? # or @ in it that should have been encoded.
PASSWORD_IN_URL = re.compile(r"(?<=://)([^:/@]*):\S*@")
PASSWORD_IN_QUERY = re.compile(r"(?<=[?&])((?:ssl)?password=)[^&\s]*")


class DatabaseUnavailable(Exception):
    """PostgreSQL cannot be reached now; trying again may help."""


class DatabaseRefused(Exception):
    """PostgreSQL will not have us like this; trying again would not help.  The message says what to change."""


def unavailable(error: BaseException) -> DatabaseUnavailable | None:
    """What an error means for the session: ``DatabaseUnavailable`` if it is lost or to be given up, else None."""
    if isinstance(error, DatabaseUnavailable):
        return error
    if isinstance(error, RETRYABLE):
        return DatabaseUnavailable(_first_line(error))
    if isinstance(error, asyncpg.InterfaceError) and ("closed" in str(error) or "lost" in str(error)):
        return DatabaseUnavailable(_first_line(error))
    return None


@dataclass(frozen=True, slots=True)
class Database:
    """Where PostgreSQL is.  Its ``repr`` shows no password."""

    arguments: dict[str, Any] = field(repr=False)
    described: str
    password_file: str = ""
    revive: Callable[[], None] | None = field(default=None, repr=False)
    """Starts the server again where it is ours to start; called when it cannot be reached."""

    @classmethod
    def named(cls, dsn: str, password_file: str = "") -> Database:
        """
        A server given by its URI; PGPASSWORD, the passfile and TLS parameters are understood as libpq does.

        Raises:
            DatabaseRefused: this is no PostgreSQL URI.
        """
        if not dsn.startswith(("postgresql://", "postgres://")):
            raise DatabaseRefused(
                'database.dsn must be "embedded" or begin with postgresql://, for example '
                "postgresql://user@host:5432/name"
            )
        arguments: dict[str, Any] = {"dsn": dsn}
        if "target_session_attrs=" not in dsn:
            arguments["target_session_attrs"] = "read-write"
        return cls(arguments, redacted(dsn), password_file)

    async def connect(self, purpose: str) -> asyncpg.Connection:
        """
        Open a session; ``purpose`` shows in ``pg_stat_activity`` as ``hookd PURPOSE``.

        Raises:
            DatabaseUnavailable: it cannot be reached now.
            DatabaseRefused: it can be, but not like this.
        """
        try:
            connection: asyncpg.Connection = await asyncpg.connect(**self._arguments(purpose))
        except ssl.SSLError as error:
            raise DatabaseRefused(f"TLS with {self.described} failed: {_first_line(error)}") from None
        except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
            raise DatabaseRefused(f"{self.described}: {_first_line(error)}") from None
        except (asyncpg.ClientConfigurationError, asyncpg.UnsupportedClientFeatureError) as error:
            raise DatabaseRefused(f"database.dsn cannot be used: {_first_line(error)}") from None
        except ValueError:
            # its message quotes what it stumbled over, which may be a part of the password
            raise DatabaseRefused(
                f"database.dsn cannot be used: {self.described} does not parse; "
                "in a name or password write / ? # @ : [ ] % as %2F %3F %23 %40 %3A %5B %5D %25"
            ) from None
        except Exception as error:
            problem = unavailable(error)
            if problem is None:
                raise
            if self.revive is not None:
                await asyncio.to_thread(self.revive)
            raise DatabaseUnavailable(f"{self.described}: {problem}") from None
        try:
            await self._prepare(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    def pool(
        self,
        purpose: str,
        most: int,
        settings: Mapping[str, str] | None = None,
        prepare: Callable[[Any], Coroutine[Any, Any, None]] | None = None,
    ) -> asyncpg.Pool:
        """
        A pool that opens sessions when they are needed and closes them when they are idle; await it to use it.

        ``settings`` hold for its sessions, and so does what ``prepare`` does to one: they are not reset between uses.
        """
        arguments = self._arguments(purpose)
        arguments["server_settings"] |= settings or {}
        return asyncpg.create_pool(
            **arguments,
            min_size=0,
            max_size=most,
            max_inactive_connection_lifetime=60,
            init=prepare,
            reset=_as_it_is,
        )

    def _arguments(self, purpose: str) -> dict[str, Any]:
        arguments = dict(self.arguments)
        if self.password_file:
            arguments["password"] = lambda: read_password(self.password_file)
        arguments["timeout"] = CONNECT_TIMEOUT_S
        arguments["server_settings"] = {"application_name": f"hookd {purpose}", "TimeZone": "UTC"}
        return arguments

    async def _prepare(self, connection: asyncpg.Connection) -> None:
        major = connection.get_server_version().major
        if major < LEAST_VERSION:
            raise DatabaseRefused(
                f"{self.described} is PostgreSQL {major}; hookd needs {LEAST_VERSION} or newer"
            )
        try:
            await connection.execute(KEEPALIVE)
        except asyncpg.PostgresError as error:
            problem = unavailable(error)
            if problem is not None:
                raise problem from error
        try:
            await connection.execute(CHECK_CLIENT)
        except asyncpg.InvalidParameterValueError:
            pass
        except (asyncpg.PostgresError, OSError) as error:
            raise unavailable(error) or error from error


async def _as_it_is(_connection: asyncpg.Connection) -> None:
    """What asyncpg does to a session between its uses: nothing is left over, and resetting costs a round trip."""


def redacted(dsn: str) -> str:
    """A DSN without its password."""
    return PASSWORD_IN_QUERY.sub(r"\1***", PASSWORD_IN_URL.sub(r"\1:***@", dsn))


def read_password(path: str) -> str:
    """
    The password in a file: its first line.

    Raises:
        DatabaseRefused: it cannot be read, or others can read it too.
    """
    file = Path(path)
    try:
        if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~stat.S_IRGRP:
            raise DatabaseRefused(
                f"database.password_file {path} can be read or written by others; run: chmod 600 {path}"
            )
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DatabaseRefused(f"database.password_file {path} cannot be read: {_first_line(error)}") from None
    if not lines or not lines[0]:
        raise DatabaseRefused(f"database.password_file {path} is empty")
    return lines[0]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return redacted(text) or type(error).__name__
