"""A PostgreSQL of a test's own, on a port of loopback: to restart, to fill, to promote, to take away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest

from hookd.postgres.embedded import EmbeddedProblem, EmbeddedServer, open_server
from hookd.postgres.migrate import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

TEMPLATE = "hookd_template"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """A data directory and its server."""

    def __init__(self, server: EmbeddedServer, data: Path, **settings: str) -> None:
        self.server = server
        self.data = data
        self.port = free_port()
        self.password = str(server.connection_arguments()["password"])
        self.configure(
            port=str(self.port),
            listen_addresses="'127.0.0.1'",
            unix_socket_directories="''",
            fsync="off",
            **settings,
        )

    def configure(self, **settings: str) -> None:
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as conf:
            conf.writelines(f"{name} = {value}\n" for name, value in settings.items())

    def dsn(self, name: str = "hookd") -> str:
        return f"postgresql://hookd:{self.password}@127.0.0.1:{self.port}/{name}?sslmode=disable"

    def ctl(self, *arguments: str) -> None:
        done = self.server._call("pg_ctl", *arguments, "-D", str(self.data), "-w", "-t", "60")
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        self.ctl("start", "-l", str(self.data / "log"))

    def stop(self, mode: str = "fast") -> None:
        self.ctl("stop", "-m", mode)

    def restart(self, mode: str) -> None:
        self.ctl("restart", "-m", mode, "-l", str(self.data / "log"))

    def give(self, folder: Path) -> None:
        """Let the server's user have a folder."""
        if self.server._account.other:
            os.chown(folder, self.server._account.uid, self.server._account.gid)
        folder.chmod(0o700)

    def standby(self) -> Cluster:
        """A copy that follows this one."""
        data = self.data.parent / f"standby-{uuid4().hex[:6]}"
        source = f"postgresql://hookd:{self.password}@127.0.0.1:{self.port}/postgres?application_name=standby"
        self.server._must("pg_basebackup", "-D", str(data), "-d", source, "-R", "-X", "stream", "-c", "fast")
        return Cluster(self.server, data)

    def create(self, name: str, *, of: str = TEMPLATE, options: str = "") -> str:
        """A new database; returns its DSN."""
        self.run(f"create database {name} template {of} {options}")
        return self.dsn(name)

    def run(self, *statements: str, name: str = "postgres") -> None:
        async def go() -> None:
            connection = await asyncpg.connect(self.dsn(name))
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(go())

    def prepare(self) -> None:
        """Make the database that others are copied from."""
        self.run(f"create database {TEMPLATE}")

        async def go() -> None:
            connection = await asyncpg.connect(self.dsn(TEMPLATE))
            await migrate(connection)
            await connection.close()

        asyncio.run(go())


@contextlib.contextmanager
def cluster(**settings: str) -> Iterator[Cluster]:
    """A running server with a prepared template, gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="hookd-"))
    home.chmod(0o755)
    try:
        server = open_server(str(home / "d"))
    except EmbeddedProblem as problem:
        shutil.rmtree(home, ignore_errors=True)
        pytest.skip(str(problem))
    server.leave()
    made = Cluster(server, server.home / "data", **settings)
    try:
        made.start()
        made.prepare()
        yield made
    finally:
        server._call("pg_ctl", "stop", "-m", "immediate", "-D", str(made.data))
        shutil.rmtree(home, ignore_errors=True)
        if server.home != home / "d":
            shutil.rmtree(server.home, ignore_errors=True)
