"""
Connections to PostgreSQL: how they are made, and which errors mean that the server is away.

Every session of hookd comes from ``Database.connect``.  What it needs of a server (version, a session that is its own,
a writable node) is checked there, once, with a message that says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import asyncpg

from hookd.postgres.embedded import EmbeddedProblem
from hookd.postgres.times import as_datetimes

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

LEAST_VERSION = 14

CONNECT_TIMEOUT_S = 10.0

NEXT_HOST_S = 2.0
"""For each host where the DSN names several: one that vanished must not keep us from the others."""

# What an operator set for the role or the database (ALTER ROLE … SET statement_timeout = '50ms') is meant for others:
# hookd has deadlines of its own, on this side.  A daemon that was stopped within a transaction holds rows and locks: that
# ends.  Not in the startup packet: poolers refuse what they do not know there.
SETTINGS = """
select set_config('statement_timeout', '0', false), set_config('lock_timeout', '0', false),
       set_config('idle_session_timeout', '0', false),
       set_config('idle_in_transaction_session_timeout', '30s', false),
       set_config('default_transaction_isolation', 'read committed', false)
"""

# PostgreSQL 17 and newer.
NO_TRANSACTION_TIMEOUT = "select set_config('transaction_timeout', '0', false)"

# A host that dies without a FIN would keep its locks until TCP gives up, 2 hours later by default: this bounds it to
# about 5 s.  The locks of a silent session must live longer than OwnerSession trusts an answer (2 s).
KEEPALIVE = """
select set_config('tcp_keepalives_idle', '3', false), set_config('tcp_keepalives_interval', '1', false),
       set_config('tcp_keepalives_count', '2', false), set_config('tcp_user_timeout', '5s', false)
"""

# The same from this side: a server that vanished without a FIN is noticed in about 5 s, whatever waits for its answer.
CLIENT_KEEPALIVE = (("SO_KEEPALIVE", 1), ("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3))
CLIENT_UNANSWERED_MS = 5000

# Notices a dead client while a statement runs; not every platform has it.
CHECK_CLIENT = "select set_config('client_connection_check_interval', '3s', false)"

# Statistics of a queue are always wrong (it is empty, then it is not), and a planner that follows them changes its mind in the
# middle of a backlog.  For the sessions that ask the same few statements all the time; each has an index that fits.
PIN_PLANS = """
set plan_cache_mode = force_generic_plan;
set enable_seqscan = off;
set enable_hashjoin = off;
set enable_mergejoin = off;
set enable_bitmapscan = off;
set jit = off
"""

RETRYABLE = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutting down, starting up, cancelled, killed
    asyncpg.InsufficientResourcesError,  # out of connections, memory or disk
    asyncpg.ReadOnlySQLTransactionError,  # a failover left us on the standby
    asyncpg.TransactionRollbackError,  # deadlock: the session starts over
    asyncpg.ObjectNotInPrerequisiteStateError,  # a lock that was not to be had in time
    asyncpg.PostgresSystemError,  # its disk
    asyncpg.exceptions.TargetServerAttributeNotMatched,
    asyncpg.InternalClientError,  # its protocol lost track, as it does when the server ends an idle session
    OSError,
    TimeoutError,
    EOFError,
)

# Greedy up to the last @: a password may have been written with the blank / ? # or @ in it that should have been encoded.
PASSWORD_IN_URL = re.compile(r"(?<=://)([^:/@]*):.*@", re.DOTALL)
HOST_AND_PORT = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]+)(?::(?P<port>\d+))?")

PASSWORD_IN_QUERY = re.compile(r"(?<=[?&])((?:ssl)?password=)[^&]*")


class DatabaseUnavailable(Exception):
    """PostgreSQL cannot be reached now; trying again may help."""


class DatabaseRefused(Exception):
    """PostgreSQL will not have us like this; trying again would not help.  The message says what to change."""


def unavailable(error: BaseException) -> DatabaseUnavailable | None:
    """What an error means for the session: ``DatabaseUnavailable`` if it is lost or to be given up, else None."""
    if isinstance(error, DatabaseUnavailable):
        return error
    if isinstance(error, RETRYABLE):
        return DatabaseUnavailable(_problem(error))
    if isinstance(error, asyncpg.InterfaceError) and ("closed" in str(error) or "lost" in str(error)):
        return DatabaseUnavailable(_first_line(error))
    return None


def refused(error: BaseException) -> DatabaseUnavailable | None:
    """
    The same for a session of the daemon's, where whatever PostgreSQL refuses means that the session starts over.

    Its statements are always the same, so what they are refused for is the state of the database: a schema that was dropped
    or changed, a right that was revoked.
    """
    problem = unavailable(error)
    if problem is None and isinstance(error, asyncpg.PostgresError):
        return DatabaseUnavailable(_first_line(error))
    return problem


@dataclass(frozen=True, slots=True)
class Database:
    """Where PostgreSQL is.  Its ``repr`` shows no password."""

    arguments: dict[str, Any] = field(repr=False)
    described: str
    password_file: str = ""
    revive: Callable[[], None] | None = field(default=None, repr=False)
    """Starts the server again where it is ours to start; called when it cannot be reached."""
    hosts: tuple[tuple[str, int], ...] = ()
    """Where there are several: host and port of each, in order."""

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
        return cls(arguments, redacted(dsn), password_file, hosts=_several_hosts(dsn))

    def uri(self) -> str:
        """For other programs, with the password where it is known: as libpq takes it."""
        if "dsn" in self.arguments:
            return str(self.arguments["dsn"])
        known = {name: quote(str(value), safe="/") for name, value in self.arguments.items()}
        return "postgresql://{user}:{password}@/{database}?host={host}&port={port}".format(**known)

    async def connect(self, purpose: str, *, lasting: bool = False) -> asyncpg.Connection:
        """
        Open a session; ``purpose`` shows in ``pg_stat_activity`` as ``hookd PURPOSE``.

        A ``lasting`` one is a daemon's: it gets settings of its own, and neither side's vanishing goes unnoticed.

        Raises:
            DatabaseUnavailable: it cannot be reached now.
            DatabaseRefused: it can be, but not like this.
        """
        connection = await self._open(purpose)
        try:
            self._check_version(connection)
            if lasting:
                await _make_lasting(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    def _check_version(self, connection: asyncpg.Connection) -> None:
        major = connection.get_server_version().major
        if major < LEAST_VERSION:
            raise DatabaseRefused(
                f"{self.described} is PostgreSQL {major}; hookd needs {LEAST_VERSION} or newer"
            )

    async def _open(self, purpose: str) -> asyncpg.Connection:
        try:
            return await self._dial(**self._arguments(purpose))
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
                try:
                    await asyncio.to_thread(self.revive)
                except EmbeddedProblem as stays:
                    raise DatabaseUnavailable(str(stays)) from None
            raise DatabaseUnavailable(f"{self.described}: {problem}") from None

    async def _dial(self, dsn: str | None = None, **arguments: Any) -> asyncpg.Connection:
        """One that is writable, of the hosts in their order; a pool hands on the DSN apart from the rest."""
        if dsn is not None:
            arguments["dsn"] = dsn
        if not self.hosts:
            return await _open(**arguments)
        # asyncpg has one deadline for all hosts, and stops at the first one that is starting up
        problems: list[Exception] = []
        for host, port in self.hosts:
            try:
                return await _open(**arguments | {"host": host, "port": port, "timeout": NEXT_HOST_S})
            except Exception as error:
                if unavailable(error) is None:
                    raise
                problems.append(error)
        said = "; ".join(f"{h}:{p}: {_problem(e)}" for (h, p), e in zip(self.hosts, problems, strict=True))
        raise asyncpg.PostgresConnectionError(said)

    def pool(
        self,
        purpose: str,
        most: int,
        prepare: Callable[[Any], Coroutine[Any, Any, None]] | None = None,
    ) -> asyncpg.Pool:
        """
        A pool that opens sessions when they are needed and closes them when they are idle; await it to use it.

        What ``prepare`` does to a session stays: they are not reset between uses.
        """
        arguments = self._arguments(purpose) | {"connect": self._dial}
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


async def _open(**arguments: Any) -> asyncpg.Connection:
    connection: asyncpg.Connection = await asyncpg.connect(**arguments)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await as_datetimes(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _make_lasting(connection: asyncpg.Connection) -> None:
    try:
        await connection.execute(SETTINGS)
        if connection.get_server_version().major >= 17:
            await connection.execute(NO_TRANSACTION_TIMEOUT)
        _keep_alive(connection)
        for statement in (KEEPALIVE, CHECK_CLIENT):
            with contextlib.suppress(asyncpg.InvalidParameterValueError):  # not on this platform
                await connection.execute(statement)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise unavailable(error) or error from error


def _several_hosts(dsn: str) -> tuple[tuple[str, int], ...]:
    """
    The hosts of a DSN that names several; empty if it does not, or if asyncpg is to say what is wrong with it.

    They stand after the ``@`` as ``a:5432,b``, or in the query as ``host=a,b&port=5432,5433``.
    """
    try:
        parts = urlsplit(dsn)
        named = parts.netloc.rpartition("@")[2]
        if named:
            pairs = [HOST_AND_PORT.fullmatch(one) for one in named.split(",")]
            found = [(unquote(p["host"].strip("[]")), p["port"] or "5432") for p in pairs if p]
        else:
            query = parse_qs(parts.query)
            hosts = query.get("host", [""])[0].split(",")
            ports = query.get("port", ["5432"])[0].split(",")
            found = list(zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=True))
        return tuple((host, int(port)) for host, port in found) if len(found) > 1 else ()
    except ValueError:
        return ()


def _keep_alive(connection: asyncpg.Connection) -> None:
    transport = getattr(connection, "_transport", None)
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    for name, value in CLIENT_KEEPALIVE:
        if hasattr(socket, name):
            level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
            sock.setsockopt(level, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, CLIENT_UNANSWERED_MS)


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


def _problem(error: BaseException) -> str:
    if isinstance(error, asyncpg.exceptions.TargetServerAttributeNotMatched):
        return "it is read-only (a standby, or default_transaction_read_only)"
    if isinstance(error, asyncpg.LockNotAvailableError):
        return "somebody has locked a table of hookd's (pg_locks says who)"
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return redacted(text) or type(error).__name__
