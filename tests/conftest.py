"""Servers, databases and daemons for tests; everything is real and on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import uuid4

import asyncpg
import pytest

from hookd.postgres.embedded import SYSTEM_BINARIES, EmbeddedProblem, find_binaries, open_server
from hookd.postgres.migrate import migrate
from tests.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def pytest_collection_finish() -> None:
    """Let the collector look neither at what was imported nor at every 700 objects: 12 % of a simulated world's CPU."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def system_binaries() -> Path | None:
    """A PostgreSQL that the machine has, not the wheel's."""
    folders = [f for pattern in SYSTEM_BINARIES for f in Path("/").glob(pattern.lstrip("/"))]
    return next((f for f in sorted(folders) if (f / "initdb").is_file()), None)


def run_sql(dsn: str, *statements: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(go())


def with_database(dsn: str, name: str) -> str:
    """The same server, another database."""
    head, _, query = dsn.partition("?")
    return f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")


@pytest.fixture(scope="session", params=["embedded", "system"])
def server_dsn(request: pytest.FixtureRequest) -> Iterator[str]:
    """
    A server to make databases on: PostgreSQL 18 of the wheel, then whatever the machine has, by DSN.

    ``HOOKD_TEST_DSN`` names one instead.
    """
    given = os.environ.get("HOOKD_TEST_DSN")
    if given:
        if request.param != "embedded":
            pytest.skip("HOOKD_TEST_DSN is set: one server is enough")
        yield given
        return
    bin_dir = ""
    if request.param == "system":
        folder = system_binaries()
        if folder is None:
            pytest.skip("no PostgreSQL is installed on this machine")
        bin_dir = str(folder)
    else:
        try:
            find_binaries()
        except EmbeddedProblem as problem:
            pytest.skip(str(problem))
    home = Path(tempfile.mkdtemp(prefix="hookd-"))
    home.chmod(0o755)
    server = open_server(str(home / "d"), bin_dir)
    arguments = server.connection_arguments()
    try:
        yield (
            f"postgresql://{arguments['user']}:{quote(str(arguments['password']))}@/{arguments['database']}"
            f"?host={quote(str(arguments['host']))}&port={arguments['port']}"
        )
    finally:
        server.leave()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def template(server_dsn: str) -> str:
    """The name of a database that has the schema."""
    name = f"template_{uuid4().hex[:8]}"
    run_sql(server_dsn, f"create database {name}")

    async def go() -> None:
        connection = await asyncpg.connect(with_database(server_dsn, name))
        await migrate(connection)
        await connection.close()

    asyncio.run(go())
    return name


@pytest.fixture
def empty_dsn(server_dsn: str) -> Iterator[str]:
    """A database with nothing in it."""
    name = f"test_{uuid4().hex[:8]}"
    run_sql(server_dsn, f"create database {name}")
    yield with_database(server_dsn, name)
    run_sql(server_dsn, f"drop database {name} with (force)")


@pytest.fixture
def dsn(server_dsn: str, template: str) -> Iterator[str]:
    """A database of the test's own that has the schema."""
    name = f"test_{uuid4().hex[:8]}"
    run_sql(server_dsn, f"create database {name} template {template}")
    yield with_database(server_dsn, name)
    run_sql(server_dsn, f"drop database {name} with (force)")


@pytest.fixture
def one_server(request: pytest.FixtureRequest) -> None:
    """For what takes long and does not depend on PostgreSQL's version."""
    asked = getattr(request.node, "callspec", None)
    if asked is not None and asked.params.get("server_dsn") == "system":
        pytest.skip("one server is enough")


@pytest.fixture
def start_daemon(dsn: str, tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Starts daemons on the test's database, and ends those that still run."""
    daemons: list[DaemonProcess] = []

    def start(**environment: str) -> DaemonProcess:
        daemon = DaemonProcess(tmp_path, {"HOOKD_DATABASE__DSN": dsn, **environment})
        daemons.append(daemon)
        daemon.wait_ready()
        return daemon

    yield start
    with contextlib.ExitStack() as all_of_them:
        for daemon in daemons:
            all_of_them.callback(daemon.kill)
