"""Behind pgbouncer: in session mode all is as it is without, in transaction mode the daemon refuses to start and says why."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest

from hookd.postgres.connect import Database, DatabaseRefused
from hookd.postgres.pooler import SHARED, check_sessions
from tests.cluster import Cluster, cluster, free_port
from tests.daemon.test_many_daemons import wait_for_shares
from tests.daemon_process import DaemonProcess
from tests.producing import add_endpoint, send, wait_empty, wait_for_row
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PGBOUNCER = shutil.which(
    "pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin:/opt/homebrew/bin"
)

behind_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")

CONFIGURATION = """
[databases]
* = host=127.0.0.1 port={server} user=hookd password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = 20
server_round_robin = {round_robin}
logfile = {folder}/log
pidfile = {folder}/pid
{user}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@pytest.fixture
def dsn(server: Cluster) -> Iterator[str]:
    name = f"test_{uuid4().hex[:8]}"
    yield server.create(name)
    server.run(f"drop database {name} with (force)")


@contextlib.contextmanager
def pooler(server: Cluster, mode: str, *, round_robin: bool = False) -> Iterator[int]:
    """pgbouncer in front of the server; yields its port."""
    assert PGBOUNCER is not None
    folder = server.data.parent / f"pgbouncer-{uuid4().hex[:6]}"
    folder.mkdir()
    server.give(folder)
    port = free_port()
    account = server.server._account
    config = folder / "ini"
    config.write_text(
        CONFIGURATION.format(
            server=server.port, password=server.password, port=port, mode=mode, folder=folder, round_robin=int(round_robin),
            user=f"user = {account.name}" if account.other else "",
        )
    )  # fmt: skip
    running = subprocess.Popen(
        [PGBOUNCER, "-q", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 30
        while True:
            try:
                asyncio.run(_reached(port))
                break
            except (OSError, asyncpg.PostgresError):
                assert running.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < until
                time.sleep(0.05)
        yield port
    finally:
        running.kill()
        running.wait(10)


async def _reached(port: int) -> None:
    connection = await asyncpg.connect(
        f"postgresql://hookd@127.0.0.1:{port}/postgres?sslmode=disable", timeout=5
    )
    connection.terminate()


def behind(dsn: str, server: Cluster, port: int) -> str:
    return dsn.replace(f":{server.port}/", f":{port}/")


def refused(dsn: str) -> bool:
    """Whether sessions by this DSN are taken for shared ones."""
    database = Database.named(dsn)
    try:
        asyncio.run(check_sessions(lambda: database.connect("test")))
    except DatabaseRefused as error:
        assert str(error) == SHARED
        return True
    return False


def test_no_false_alarm_without_a_pooler(dsn: str) -> None:
    assert not refused(dsn)


@behind_pgbouncer
@pytest.mark.parametrize("round_robin", [False, True])
def test_transaction_mode_is_noticed(server: Cluster, dsn: str, round_robin: bool) -> None:
    """With an empty pool, with one full of idle servers that take turns, and while others use it."""
    with pooler(server, "transaction", round_robin=round_robin) as port:
        shared = behind(dsn, server, port)
        assert refused(shared)

        async def use(stop: asyncio.Event) -> None:
            connection = await asyncpg.connect(shared, statement_cache_size=0)
            while not stop.is_set():
                await connection.execute("select pg_sleep(0.002)")
            await connection.close()

        async def busy() -> list[bool]:
            stop = asyncio.Event()
            users = [asyncio.create_task(use(stop)) for _ in range(6)]
            await asyncio.sleep(0.2)
            found = [await asyncio.to_thread(refused, shared) for _ in range(5)]
            stop.set()
            await asyncio.gather(*users)
            return found

        assert all(asyncio.run(busy()))
        assert all(refused(shared) for _ in range(5)), "six idle servers"


@behind_pgbouncer
@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_the_daemon_refuses_to_start(server: Cluster, dsn: str, tmp_path: Path, mode: str) -> None:
    with pooler(server, mode) as port:
        shared = behind(dsn, server, port)
        for command in ("run", "doctor") if mode == "transaction" else ("run",):
            done = subprocess.run(
                [sys.executable, "-m", "hookd", command],
                env={"HOOKD_DATABASE__DSN": shared, "HOOKD_ADMIN__LISTEN": "", "PATH": "/usr/bin:/bin"},
                cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert SHARED in done.stderr + done.stdout
            assert done.returncode == (2 if command == "run" else 1)

        async def left() -> object:
            connection = await asyncpg.connect(shared, statement_cache_size=0)
            found = await connection.fetchval("select current_setting('idle_in_transaction_session_timeout')")
            await connection.close()
            return found

        if mode == "transaction":
            assert asyncio.run(left()) == "0", "others' sessions are left as they were"


@behind_pgbouncer
def test_session_mode_works(server: Cluster, dsn: str, tmp_path: Path) -> None:
    """Two daemons share the work and hand it over, though the protocol tells them process ids that are made up."""

    async def go(pooled: str) -> None:
        daemons = [DaemonProcess(tmp_path, {"HOOKD_DATABASE__DSN": pooled}) for _ in range(2)]
        try:
            for daemon in daemons:
                await asyncio.to_thread(daemon.wait_ready)
            await wait_for_shares(dsn, [32, 32])
            # what `status` counts and `evict` ends are the processes that hold the locks
            await wait_for_row(
                dsn,
                """select 1 from hookd.node n where exists (
                     select from pg_locks l where l.pid = n.backend and l.locktype = 'advisory') having count(*) = 2""",
            )
            async with Receiver() as receiver:
                await add_endpoint(dsn, receiver.url)
                event = await send(dsn)
                await wait_empty(dsn)
                assert await asyncio.to_thread(daemons[0].stop) == 0
                await wait_for_shares(dsn, [64])
                daemons[1].kill()
                daemons.append(DaemonProcess(tmp_path, {"HOOKD_DATABASE__DSN": pooled}))
                await asyncio.to_thread(daemons[2].wait_ready)
                later = await send(dsn)
                await wait_empty(dsn)
                assert [c.event_id for c in receiver.calls] == [event, later]
        finally:
            for daemon in daemons:
                daemon.kill()

    with pooler(server, "session") as port:
        pooled = behind(dsn, server, port)
        assert not any(refused(pooled) for _ in range(3))
        asyncio.run(go(pooled))
