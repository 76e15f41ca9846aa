"""How sessions are made: passwords, several hosts, and what is said when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlsplit

import asyncpg
import pytest

from hookd.postgres.connect import (
    Database,
    DatabaseRefused,
    DatabaseUnavailable,
    redacted,
    refused,
    unavailable,
)
from tests.cluster import cluster

if TYPE_CHECKING:
    from pathlib import Path


def connect(database: Database) -> str:
    async def go() -> str:
        connection = await database.connect("test")
        try:
            return str(await connection.fetchval("select current_setting('application_name')"))
        finally:
            await connection.close()

    return asyncio.run(go())


def without_password(dsn: str) -> tuple[str, str]:
    password = unquote(urlsplit(dsn).password or "")
    return re.sub(r"://([^:@/]+):[^@]*@", r"://\1@", dsn), password


def test_the_purpose_shows(dsn: str) -> None:
    assert connect(Database.named(dsn)) == "hookd test"


def test_the_password_from_the_environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, password = without_password(dsn)
    monkeypatch.setenv("PGPASSWORD", password)
    assert connect(Database.named(bare)) == "hookd test"


def test_the_password_from_a_passfile(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, password = without_password(dsn)
    passfile = tmp_path / "pass"
    passfile.write_text(f"*:*:*:*:{password}\n")
    passfile.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    assert connect(Database.named(bare)) == "hookd test"


def test_the_password_from_a_file_that_may_change(dsn: str, tmp_path: Path) -> None:
    bare, password = without_password(dsn)
    file = tmp_path / "password"
    file.write_text("wrong\n")
    file.chmod(0o600)
    database = Database.named(bare, str(file))
    with pytest.raises(DatabaseRefused, match="password authentication failed"):
        connect(database)
    file.write_text(f"{password}\n")
    assert connect(database) == "hookd test"
    file.chmod(0o644)
    with pytest.raises(DatabaseRefused, match="chmod 600"):
        connect(database)


def test_several_hosts(dsn: str) -> None:
    query = parse_qs(urlsplit(dsn).query)
    if "host" not in query:
        pytest.skip("the server is not on a Unix socket")
    bare, password = without_password(dsn)
    user = urlsplit(bare).username
    name = urlsplit(bare).path.lstrip("/")
    several = f"postgresql://{user}@/{name}?host=/nowhere,{query['host'][0]}&port=1,{query['port'][0]}"
    os.environ["PGPASSWORD"] = password
    try:
        assert connect(Database.named(several)) == "hookd test"
    finally:
        del os.environ["PGPASSWORD"]


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("host=localhost dbname=x", DatabaseRefused, "begin with postgresql://"),
        ("mysql://localhost/x", DatabaseRefused, "begin with postgresql://"),
        ("postgresql://nobody:hidden@127.0.0.1:1/x", DatabaseUnavailable, "127.0.0.1:1"),
        ("postgresql://nobody:hidden@127.0.0.1:1/x?sslmode=nonsense", DatabaseRefused, "sslmode"),
        ("postgresql://nobody:hidden@127.0.0.1:port/x", DatabaseRefused, "database.dsn cannot be used"),
    ],
)
def test_what_is_said_when_it_fails(text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)) as raised:
        connect(Database.named(text))
    assert "hidden" not in str(raised.value)


def test_a_database_that_does_not_exist(dsn: str) -> None:
    head, _, query = dsn.partition("?")
    with pytest.raises(DatabaseRefused, match="does not exist"):
        connect(Database.named(f"{head.rpartition('/')[0]}/missing?{query}"))


def test_passwords_do_not_show() -> None:
    text = "postgresql://me:s3cret@h1:5432,h2/db?password=other&sslmode=require"
    assert "s3cret" not in redacted(text)
    assert "other" not in redacted(text)
    assert "s3cret" not in repr(Database.named(text))
    for blank in (
        "postgresql://me:my s3cret@h1/db",
        "postgresql://me@h1/db?password=my s3cret&sslmode=require",
    ):
        assert "s3cret" not in redacted(blank)
        assert "h1/db" in redacted(blank)


def test_which_errors_mean_that_the_session_is_gone() -> None:
    for gone in (
        ConnectionResetError(), TimeoutError(), asyncpg.AdminShutdownError("x"), asyncpg.TooManyConnectionsError("x"),
        asyncpg.CannotConnectNowError("x"), asyncpg.ReadOnlySQLTransactionError("x"), asyncpg.DeadlockDetectedError("x"),
        asyncpg.InterfaceError("connection is closed"), asyncpg.LockNotAvailableError("x"), asyncpg.DiskFullError("x"),
    ):  # fmt: skip
        assert unavailable(gone) is not None, gone
    for ours in (
        asyncpg.UniqueViolationError("x"), asyncpg.UndefinedTableError("x"), ValueError(), asyncpg.DataError("x"),
        asyncpg.InterfaceError("another operation is in progress"),
    ):  # fmt: skip
        assert unavailable(ours) is None, ours


def test_what_a_daemons_session_is_refused_is_not_a_bug() -> None:
    """A schema that was dropped, a right that was revoked: the session starts over."""
    for error in (
        asyncpg.UndefinedTableError("x"),
        asyncpg.InsufficientPrivilegeError("x"),
        ConnectionResetError(),
    ):
        assert refused(error) is not None, error
    for bug in (ValueError(), asyncpg.InterfaceError("another operation is in progress")):
        assert refused(bug) is None, bug


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("postgresql://a.example/x", ()),
        ("postgresql://u:p,q@a.example:1/x", ()),
        ("postgresql://a.example,b.example:6432/x", (("a.example", 5432), ("b.example", 6432))),
        ("postgresql://u@[::1]:1,10.0.0.1:2/x?sslmode=require", (("::1", 1), ("10.0.0.1", 2))),
        ("postgresql://u@/x?host=/one,/two&port=1,2", (("/one", 1), ("/two", 2))),
        ("postgresql://u@/x?host=a,b", (("a", 5432), ("b", 5432))),
        ("postgresql://u@/x?host=/one&port=1", ()),
    ],
)
def test_the_hosts_of_a_dsn(text: str, hosts: tuple[tuple[str, int], ...]) -> None:
    assert Database.named(text).hosts == hosts


@pytest.mark.parametrize("first", ["vanished", "starts up"])
def test_a_host_that_is_no_use_does_not_keep_us_from_the_next(dsn: str, first: str) -> None:
    """One takes the connection and says nothing, the other that it is not ready; asyncpg by itself would stop at both."""
    query = parse_qs(urlsplit(dsn).query)
    if "host" not in query:
        pytest.skip("the server is not on a Unix socket")
    bare, password = without_password(dsn)
    user, name = urlsplit(bare).username, urlsplit(bare).path.lstrip("/")
    said = b"SFATAL\0C57P03\0Mthe database system is starting up\0\0"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readexactly(8)
            if first == "starts up":
                writer.write(b"E" + struct.pack(">I", len(said) + 4) + said)
            await reader.read()
        writer.close()

    async def go() -> str:
        stub = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with stub:
            port = stub.sockets[0].getsockname()[1]
            several = (
                f"postgresql://{user}:{quote(password)}@/{name}?sslmode=disable"
                f"&host=127.0.0.1,{query['host'][0]}&port={port},{query['port'][0]}"
            )
            connection = await Database.named(several).connect("test")
            found = str(await connection.fetchval("select current_setting('application_name')"))
            await connection.close()
        return found

    assert asyncio.run(go()) == "hookd test"


def test_a_vanished_server_is_noticed_from_this_side() -> None:
    with cluster() as made:

        async def go() -> None:
            connection = await Database.named(made.dsn()).connect("test", lasting=True)
            sock = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000
            connection.terminate()

        asyncio.run(go())
