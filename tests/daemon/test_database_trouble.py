"""The database in trouble: the daemon lives on, says so once, starts nothing that it could not write, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import asyncpg
import pytest

from tests.cluster import Cluster, cluster, free_port
from tests.daemon_process import DaemonProcess
from tests.producing import add_endpoint, add_endpoint_with_id, fetch, send, wait_empty, wait_for_row
from tests.receiver import OK, Call, Receiver
from tests.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOSE = """
select pg_terminate_backend(pid) from pg_stat_activity
 where datname = current_database() and application_name in ('hookd owner', 'hookd feed', 'hookd upkeep')
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@pytest.fixture
def dsn(server: Cluster) -> Iterator[str]:
    """A database of the test's own, on a server whose port is loopback's."""
    name = f"test_{uuid4().hex[:8]}"
    yield server.create(name)
    server.run(f"drop database {name} with (force)")


@pytest.fixture
def run_daemon(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Starts daemons on any database, and does not wait for them."""
    daemons: list[DaemonProcess] = []

    def start(dsn: str, **environment: str) -> DaemonProcess:
        daemons.append(DaemonProcess(tmp_path, {"HOOKD_DATABASE__DSN": dsn, **environment}))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.kill()


def readiness(daemon: DaemonProcess, admin: str = "") -> tuple[int, str]:
    """The status of /readyz, and the reason that it gives."""
    try:
        with urllib.request.urlopen(f"{admin or daemon.admin}/readyz", timeout=10) as got:
            return got.status, ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["detail"]


async def wait_ready(daemon: DaemonProcess, status: int, reason: str = "") -> None:
    async with asyncio.timeout(30):
        while True:
            found, said = await asyncio.to_thread(readiness, daemon)
            if found == status and reason in said:
                return
            await asyncio.sleep(0.05)


async def wait_said(daemon: DaemonProcess, event: str) -> dict[str, Any]:
    return await asyncio.to_thread(daemon.wait_for, event, 30)


class Load:
    """Events, one after another, until told to stop; what was committed, and what may have been."""

    def __init__(self, dsn: str, every_s: float = 0.01) -> None:
        self._dsn = dsn
        self._every_s = every_s
        self.committed: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                connection = await asyncpg.connect(f"{self._dsn}&target_session_attrs=read-write", timeout=2)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InternalClientError):
                await asyncio.sleep(0.05)
                continue
            try:
                while True:
                    found = await connection.fetchval("select hookd.send('thing.made', '{}'::text)")
                    self.committed.add(str(found))
                    await asyncio.sleep(self._every_s)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
                pass
            finally:
                connection.terminate()

    async def wait_for_more(self, count: int) -> None:
        wanted = len(self.committed) + count
        async with asyncio.timeout(60):
            while len(self.committed) < wanted:
                await asyncio.sleep(0.01)


def assert_all_arrived(load: Load, receiver: Receiver, *, twice: int = 0) -> None:
    """Everything that was committed; and no more than so many a second time."""
    arrived = Counter(call.event_id for call in receiver.calls)
    assert load.committed - set(arrived) == set(), "lost"
    assert sum(arrived.values()) - len(arrived) <= twice


def assert_said_once(daemon: DaemonProcess) -> None:
    """That the database was lost: once, and again once a minute at most."""
    assert len(daemon.said("database lost")) == 1
    said = [datetime.datetime.fromisoformat(s["timestamp"]) for s in daemon.said("database is still away")]
    first = datetime.datetime.fromisoformat(daemon.said("database lost")[0]["timestamp"])
    assert all((b - a).total_seconds() > 59 for a, b in itertools.pairwise([first, *said]))


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_the_server_is_restarted_under_load(
    server: Cluster, dsn: str, start_daemon: Callable[..., DaemonProcess], mode: str
) -> None:
    async def go() -> None:
        daemon = start_daemon()
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            async with Load(dsn) as load:
                await load.wait_for_more(50)
                await asyncio.to_thread(server.restart, mode)
                await load.wait_for_more(50)
            await wait_empty(dsn)
            assert_all_arrived(load, receiver)
        back = await wait_said(daemon, "database is back")
        assert back["after_s"] < 30
        assert_said_once(daemon)
        assert not daemon.said("internal error")
        assert daemon.stop() == 0

    asyncio.run(go())


def test_probes_and_signals_while_the_server_is_away(
    server: Cluster, dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """An answer that comes meanwhile is written when the server is back; what is lost is said once, not at each try."""
    daemon = start_daemon()
    release = asyncio.Event()

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(OK)

    async def go() -> None:
        async with Receiver(handle) as receiver:
            await add_endpoint(dsn, receiver.url)
            await send(dsn)
            await receiver.wait_for_calls(1)
            await asyncio.to_thread(server.stop)
            await wait_said(daemon, "database lost")
            release.set()
            await wait_ready(daemon, 503, "the database is away")
            daemon.signal(signal.SIGHUP)
            await wait_said(daemon, "configuration applied")
            said = await asyncio.to_thread(ask, daemon, "health")
            assert said.returncode == 1
            assert said.stderr == "hookd: not ready: the database is away\n"
            assert metric(daemon, "hookd_ready") == 0
            async with asyncio.timeout(30):
                while metric(daemon, "hookd_unwritten") != 1:
                    await asyncio.sleep(0.05)
            await asyncio.to_thread(server.start)
            await wait_empty(dsn)
            await wait_ready(daemon, 200)
            assert (await asyncio.to_thread(ask, daemon, "health")).stdout == "ready\n"
            assert len(receiver.calls) == 1
        assert_said_once(daemon)
        assert not daemon.said("internal error")

    asyncio.run(go())


def ask(daemon: DaemonProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hookd", *arguments],
        env={"HOOKD_ADMIN__LISTEN": daemon.admin.removeprefix("http://"), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def metric(daemon: DaemonProcess, name: str) -> float:
    with urllib.request.urlopen(f"{daemon.admin}/metrics", timeout=10) as got:
        for line in got.read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split(" ")[1])
    raise AssertionError(name)


@pytest.mark.parametrize("twice", [True, False])
def test_a_stop_without_a_database_says_what_is_unwritten(
    server: Cluster, dsn: str, start_daemon: Callable[..., DaemonProcess], *, twice: bool
) -> None:
    """
    One signal waits for the database as long as the grace is, a second one not at all.

    What could not be written is sent again by the next daemon.
    """
    daemon = start_daemon(HOOKD_DELIVERY__DRAIN="30s" if twice else "1s")

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            blocker = await asyncpg.connect(dsn)
            await blocker.execute("begin; lock table hookd.attempt in share mode")
            event = await send(dsn)
            await receiver.wait_for_calls(1)
            await asyncio.to_thread(server.stop, "immediate")
            await wait_said(daemon, "database lost")
            daemon.signal(signal.SIGTERM)
            await wait_said(daemon, "draining")
            if twice:
                daemon.signal(signal.SIGTERM)
            assert await asyncio.to_thread(daemon.process.wait, 20) == 1
            blocker.terminate()
            await asyncio.to_thread(server.start)
            assert len(daemon.said("stopping at once")) == twice
            assert (
                daemon.said("stopped")[0]["unwritten"],
                daemon.said("stopped")[0]["may_be_sent_again"],
            ) == (1, 1)
            await asyncio.to_thread(start_daemon)
            await wait_empty(dsn)
            assert [c.event_id for c in receiver.calls] == [event, event]

    asyncio.run(go())


def test_a_start_without_a_database(
    server: Cluster, dsn: str, run_daemon: Callable[..., DaemonProcess]
) -> None:
    """It is alive and not ready, can be reloaded and stopped, says so once, and delivers when the server is there."""
    port = free_port()
    admin = f"http://127.0.0.1:{port}"

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            event = await send(dsn)
            await asyncio.to_thread(server.stop)
            early, late = (
                run_daemon(dsn, HOOKD_ADMIN__LISTEN=f"127.0.0.1:{free_port()}"),
                run_daemon(dsn, HOOKD_ADMIN__LISTEN=f"127.0.0.1:{port}"),
            )
            for daemon in (early, late):
                await wait_said(daemon, "database cannot be reached")
                daemon.signal(signal.SIGHUP)
                await wait_said(daemon, "configuration applied")
            with urllib.request.urlopen(f"{admin}/healthz", timeout=10) as got:
                assert got.status == 200
            assert readiness(late, admin) == (503, "it waits for the database, or for its schema")
            assert await asyncio.to_thread(early.stop) == 0
            await asyncio.to_thread(server.start)
            await receiver.wait_for_calls(1)
            await wait_empty(dsn)
            assert [c.event_id for c in receiver.calls] == [event]
            assert len(late.said("database cannot be reached")) == 1
            assert "exception" not in late.said("database cannot be reached")[0]

    asyncio.run(go())


def test_all_sessions_are_ended_twice_a_second(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    async def go() -> None:
        daemon = start_daemon()
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            async with Load(dsn) as load:
                enemy = await asyncpg.connect(dsn)
                ended = 0
                for _ in range(8):
                    ended += len(await enemy.fetch(LOSE))
                    await asyncio.sleep(0.5)
                await enemy.close()
                assert ended >= 6, "three sessions, again and again"
                await load.wait_for_more(20)
            await wait_empty(dsn)
            assert_all_arrived(load, receiver)
        back = await wait_said(daemon, "database is back")
        assert back["times"] >= 3
        assert_said_once(daemon)
        assert not daemon.said("internal error")

    asyncio.run(go())


@pytest.mark.parametrize("session", ["owner", "feed", "upkeep"])
def test_one_of_its_sessions_is_ended(
    dsn: str, start_daemon: Callable[..., DaemonProcess], session: str
) -> None:
    """Whichever it is: all begin anew, nobody is blamed, and nothing is lost."""

    async def go() -> None:
        daemon = start_daemon()
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            async with Load(dsn) as load:
                await load.wait_for_more(20)
                ended = await fetch(
                    dsn,
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and application_name = $1",
                    f"hookd {session}",
                )
                assert len(ended) == 1
                await wait_said(daemon, "database lost")
                await load.wait_for_more(20)
            await wait_empty(dsn)
            assert_all_arrived(load, receiver, twice=0)
        await wait_said(daemon, "database is back")
        assert_said_once(daemon)
        assert (
            await fetch(dsn, "select * from hookd.attempt where verdict <> 'delivered' or attempt <> 1") == []
        )

    asyncio.run(go())


def test_settings_of_the_role_are_not_for_hookd(
    server: Cluster, dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """A statement that has to wait for 0.5 s would be cancelled by the role's time-outs, and the session with it."""
    name = dsn.rpartition("/")[2].partition("?")[0]
    server.run(*(f"alter database {name} set {s}" for s in (
        "statement_timeout = '50ms'", "lock_timeout = '40ms'", "idle_session_timeout = '100ms'", "transaction_timeout = '50ms'",
        "default_transaction_isolation = 'serializable'",
    )))  # fmt: skip

    async def go() -> None:
        daemon = start_daemon()
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            blocker = await asyncpg.connect(
                dsn, server_settings={"lock_timeout": "0", "transaction_timeout": "0"}
            )
            await blocker.execute("begin; lock table hookd.attempt in share mode")
            await send(dsn)
            await receiver.wait_for_calls(1)
            await asyncio.sleep(0.5)
            await blocker.execute("rollback")
            await blocker.close()
            watch = await asyncpg.connect(dsn, server_settings={"idle_session_timeout": "0"})
            async with asyncio.timeout(20):
                while await watch.fetchval("select exists (select from hookd.delivery)"):
                    await asyncio.sleep(0.02)
            await watch.close()
            assert len(receiver.calls) == 1
        assert not daemon.said("database lost")

    asyncio.run(go())


def test_somebody_locks_the_queue(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    """A migration of somebody's: nothing starts that could not be written, and afterwards everything goes on by itself."""

    async def go() -> None:
        daemon = start_daemon(HOOKD_LIMITS__RATE="500")
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            await fetch(
                dsn, "insert into hookd.event (type, payload) select 'a', '1' from generate_series(1, 3000)"
            )
            await receiver.wait_for_calls(200)
            migration = await asyncpg.connect(dsn)
            # what settles waits; what reads does not, and goes on filling memory
            await migration.execute("begin; lock table hookd.attempt in share mode")
            await wait_said(daemon, "nothing starts until it is over")
            await wait_ready(daemon, 503, "somebody has locked a table")
            before = len(receiver.calls)
            assert before < 3000
            await asyncio.sleep(1)
            assert len(receiver.calls) == before
            await migration.execute("lock table hookd.dead_letter in access exclusive mode")
            # whoever looks is told why, and does not wait for the lock
            said = await asyncio.to_thread(status, dsn)
            assert said.returncode == 1
            assert "locked" in said.stderr
            # the upkeep's session does not wait for locks, so that the daemon goes on saying how it is
            await wait_for_row(
                dsn, "select 1 from hookd.node where seen_at > $1", datetime.datetime.now(datetime.UTC)
            )
            await migration.execute("rollback")
            await migration.close()
            await wait_said(daemon, "deliveries go on")
            await wait_empty(dsn)
            assert len({c.event_id for c in receiver.calls}) == len(receiver.calls) == 3000
        assert len(daemon.said("nothing starts until it is over")) == 1
        assert not daemon.said("database lost")

    asyncio.run(go())


def test_somebody_locks_the_queue_for_longer_than_a_statement_may_take(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """All of it, for 33 s: sessions are given up and made anew, and what was sent before stays known and is sent once."""

    async def go() -> None:
        daemon = start_daemon(HOOKD_LIMITS__RATE="500")
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            await fetch(
                dsn, "insert into hookd.event (type, payload) select 'a', '1' from generate_series(1, 2000)"
            )
            await receiver.wait_for_calls(200)
            migration = await asyncpg.connect(dsn)
            await migration.execute(
                "begin; lock table hookd.delivery, hookd.attempt in access exclusive mode"
            )
            await migration.execute("select pg_sleep(33)")
            await migration.execute("rollback")
            await migration.close()
            await wait_empty(dsn)
            assert len({c.event_id for c in receiver.calls}) == len(receiver.calls) == 2000
            await wait_ready(daemon, 200)
        assert_said_once(daemon)
        assert daemon.stop() == 0

    asyncio.run(go())


# Counts how often it is tried, as a sequence does: whatever becomes of the transaction.
REFUSE_TO_PUBLISH = """
create sequence public.tries;
create function public.refuse() returns trigger language plpgsql
as $$ begin perform nextval('public.tries'); raise exception 'not here'; end $$;
create trigger refuse before insert on hookd.node for each row execute function public.refuse()
"""


def test_the_application_is_in_the_way_of_upkeep(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """A foreign key on what retention ends, and a trigger: each is said once, and all else goes on."""

    async def go() -> None:
        async with Receiver() as receiver:
            _, gone = await add_endpoint_with_id(dsn, receiver.url.replace("/hook", "/gone"))
            connection = await asyncpg.connect(dsn)
            await connection.execute(
                f"""
                update hookd.endpoint set state = 'removed' where id = '{gone}';
                update hookd.endpoint set state_at = now() - interval '400 days';
                create table public.subscription (endpoint integer references hookd.endpoint (key));
                insert into public.subscription select key from hookd.endpoint;
                insert into hookd.audit (at, via, who, action) values (now() - interval '500 days', 'cli', 'me', 'pause')
                """
            )
            await connection.execute(REFUSE_TO_PUBLISH)
            await connection.close()
            await add_endpoint(dsn, receiver.url)
            daemon = start_daemon()
            # what comes later in the round than the endpoints
            await wait_for_row(dsn, "select 1 where not exists (select from hookd.audit)")
            await wait_for_row(dsn, "select 1 from public.tries where last_value >= 3")
            await send(dsn)
            await wait_empty(dsn)
            assert len(receiver.calls) == 1
            assert daemon.stop() == 0
        said = {line["work"]: line for line in daemon.said("upkeep was refused")}
        assert set(said) == {"purge endpoint", "publish"}
        assert len(daemon.said("upkeep was refused")) == 2
        assert {line["level"] for line in said.values()} == {"warning"}
        assert "subscription_endpoint_fkey" in said["purge endpoint"]["problem"]
        assert said["publish"]["problem"] == "not here"
        assert not daemon.said("database lost")

    asyncio.run(go())


def status(dsn: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hookd", "status"],
        env={"HOOKD_DATABASE__DSN": dsn, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_database_becomes_read_only(
    server: Cluster, dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    def set_read_only(value: str) -> None:
        server.run(f"alter system set default_transaction_read_only = {value}", "select pg_reload_conf()")

    async def go() -> None:
        daemon = start_daemon()
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            await asyncio.to_thread(set_read_only, "on")
            try:
                await wait_said(daemon, "database lost")
                await wait_ready(daemon, 503, "the database is away")
                connection = await asyncpg.connect(dsn)
                await connection.execute("set default_transaction_read_only = off")
                await connection.execute("select hookd.send('a', '{}'::text)")
                await connection.close()
                assert receiver.calls == []
            finally:
                await asyncio.to_thread(set_read_only, "off")
            await receiver.wait_for_calls(1)
            await wait_empty(dsn)
        assert_said_once(daemon)
        assert "read-only" in daemon.said("database lost")[0]["problem"]

    asyncio.run(go())


@pytest.mark.parametrize(
    ("break_it", "mend_it", "said"),
    [
        ("alter schema hookd rename to away", "alter schema away rename to hookd", "run hookd migrate"),
        ("insert into hookd.migration values (9999, 'later', 'x')", "delete from hookd.migration where version = 9999",
         "newer than this hookd"),
        ("delete from hookd.migration where version = {last}", None, "lacks 1 migrations"),
    ],
)  # fmt: skip
def test_the_schema_is_not_what_it_was(
    dsn: str, start_daemon: Callable[..., DaemonProcess], break_it: str, mend_it: str | None, said: str
) -> None:
    """It changes while the daemon runs: it waits, says so once, and goes on when it fits."""

    async def go() -> None:
        daemon = start_daemon()
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            event = await send(dsn)
            await wait_empty(dsn)
            (last,) = await fetch(dsn, "select * from hookd.migration order by version desc limit 1")
            await fetch(dsn, break_it.format(last=last["version"]))
            await fetch(dsn, LOSE)
            await wait_ready(daemon, 503, "the database is away")
            refused = await wait_said(daemon, "database cannot be used like this")
            assert said in refused["problem"]
            if mend_it is None:
                await fetch(dsn, "insert into hookd.migration values ($1, $2, $3, $4)", *last)
            else:
                await fetch(dsn, mend_it)
            later = await send(dsn)
            await wait_empty(dsn)
            assert [c.event_id for c in receiver.calls] == [event, later]
        assert len(daemon.said("database cannot be used like this")) == 1
        assert not daemon.said("internal error")

    asyncio.run(go())


def test_a_standby_is_promoted(run_daemon: Callable[..., DaemonProcess]) -> None:
    """Both hosts are in the DSN, the first one vanishes, and the daemon goes on at the other within seconds of its promotion."""

    async def go(primary: Cluster, standby: Cluster, name: str) -> None:
        both = primary.dsn(name).replace(
            f"127.0.0.1:{primary.port}", f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        )
        daemon = run_daemon(both)
        await asyncio.to_thread(daemon.wait_ready)
        async with Receiver() as receiver:
            await add_endpoint(primary.dsn(name), receiver.url)
            async with Load(both) as load:
                await load.wait_for_more(100)
                await asyncio.to_thread(primary.stop, "immediate")
                await wait_said(daemon, "database lost")
                await asyncio.to_thread(standby.ctl, "promote")
                await load.wait_for_more(100)
            await wait_empty(standby.dsn(name))
            # answered and written, but not yet at the standby, or in flight: a batch
            assert_all_arrived(load, receiver, twice=250)
        await wait_said(daemon, "database is back")
        assert await asyncio.to_thread(daemon.stop) == 0

    with cluster() as primary:
        standby = primary.standby()
        standby.start()
        try:
            primary.run("alter system set synchronous_standby_names = 'standby'", "select pg_reload_conf()")
            primary.create("app")
            asyncio.run(go(primary, standby, "app"))
        finally:
            standby.stop("immediate")


def test_no_connection_is_free(run_daemon: Callable[..., DaemonProcess]) -> None:
    """What it has it keeps; what it has lost it waits for."""

    async def fill(dsn: str) -> list[asyncpg.Connection]:
        taken = []
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                taken.append(await asyncpg.connect(dsn))
        return taken

    async def go(dsn: str) -> None:
        daemon = run_daemon(dsn)
        await asyncio.to_thread(daemon.wait_ready)
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            taken = await fill(dsn)
            asking = taken[0]
            await asking.fetchval("select hookd.send('a', '{}'::text)")
            await receiver.wait_for_calls(1)
            assert not daemon.said("database lost")
            async with asyncio.timeout(30):
                # whoever is faster gets the places that become free: until it was not the daemon
                while await asking.fetch(LOSE):
                    taken += await fill(dsn)
            await asking.fetchval("select hookd.send('a', '{}'::text)")
            await wait_ready(daemon, 503, "the database is away")
            for connection in taken:
                await connection.close()
            await receiver.wait_for_calls(2)
            await wait_empty(dsn)
            assert len(receiver.calls) == 2
        assert_said_once(daemon)
        assert not daemon.said("internal error")
        assert await asyncio.to_thread(daemon.stop) == 0

    with cluster(max_connections="16", reserved_connections="0") as made:
        asyncio.run(go(made.create("app")))


@contextlib.contextmanager
def small_disk(made: Cluster, megabytes: int) -> Iterator[Path]:
    """A file system of its own; root can make one."""
    place = made.data.parent / f"disk-{uuid4().hex[:6]}"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root on Linux can make a small disk")
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        made.give(place)
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_the_disk_is_full(server: Cluster, run_daemon: Callable[..., DaemonProcess]) -> None:
    async def go(dsn: str, place: Path) -> None:
        daemon = run_daemon(dsn)
        await asyncio.to_thread(daemon.wait_ready)
        release = asyncio.Event()

        async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
            await release.wait()
            writer.write(OK)

        async with Receiver(handle) as receiver:
            await add_endpoint(dsn, receiver.url, concurrency=500)
            await fetch(
                dsn,
                "insert into hookd.event (type, payload) select 'a', '1' from generate_series(1, 3000)",
            )
            await receiver.wait_for_calls(50)
            ballast = place / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            release.set()
            lost = await wait_said(daemon, "database lost")
            assert "No space left on device" in lost["problem"]
            await wait_ready(daemon, 503, "the database is away")
            stopped_at = len(receiver.calls)
            await asyncio.sleep(3)
            assert len(receiver.calls) - stopped_at <= 2000, "what cannot be written is not sent on and on"
            ballast.unlink()
            await wait_empty(dsn)
            assert len({c.event_id for c in receiver.calls}) == len(receiver.calls) == 3000
        assert_said_once(daemon)
        assert daemon.stop() == 0

    with small_disk(server, 40) as place:
        name = f"small_{uuid4().hex[:8]}"
        server.run(f"create tablespace {name} location '{place}'")
        asyncio.run(go(server.create(name, options=f"tablespace {name}"), place))
        server.run(f"drop database {name} with (force)", f"drop tablespace {name}")


def test_notifications_do_not_arrive(
    server: Cluster, dsn: str, run_daemon: Callable[..., DaemonProcess]
) -> None:
    """The listener is connected and deaf, and so is the next one: it is said once, and events arrive all the same."""

    async def go() -> None:
        async with Wire(server.port) as wire, Receiver() as receiver:
            wire.deaf = True
            await add_endpoint(dsn, receiver.url)
            daemon = run_daemon(dsn.replace(str(server.port), str(wire.port)))
            await wait_said(daemon, "notifications do not arrive")
            await send(dsn)
            await receiver.wait_for_calls(1)
            await wait_ready(daemon, 200)
            await send(dsn)
            await receiver.wait_for_calls(2)
            wire.deaf = False
            await wait_said(daemon, "notifications arrive again")
            await wait_empty(dsn)
            assert len(daemon.said("notifications do not arrive")) == 1
            assert_said_once(daemon)
            assert wire.connections <= 8, "one new session was tried, not one after another"

    asyncio.run(go())


def test_the_queue_of_notifications_is_full(run_daemon: Callable[..., DaemonProcess]) -> None:
    """
    Somebody listens in a transaction that does not end: notifications of the whole server find no place any more.

    Every commit that carries one fails then.  Those of hookd's producers do not, and the daemon reads without being told.
    """

    async def go(dsn: str) -> None:
        daemon = run_daemon(dsn)
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            await send(dsn)
            await receiver.wait_for_calls(1)
            listener, other = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
            await listener.execute("listen somebody")
            await listener.execute("begin; select 1")
            with pytest.raises(asyncpg.ProgramLimitExceededError):
                for n in itertools.count():
                    await other.execute("select pg_notify('somebody', $1)", f"{n} " + 7000 * "x")
            # the flag says that the owner sleeps, so these would be notified
            await wait_for_row(
                dsn, "select 1 from hookd.shard where pg_sequence_last_value(sleeper) = 2", deadline_s=10
            )
            for n in range(20):
                await other.execute("insert into hookd.event (type, payload) values ('a.b', $1)", str(n))
            await receiver.wait_for_calls(21)
            await add_endpoint(dsn, receiver.url.replace("/hook", "/later"))
            await wait_said(daemon, "notifications do not arrive")
            await listener.close()
            await other.close()
            await wait_said(daemon, "notifications arrive again")
            await send(dsn)
            await receiver.wait_for_calls(23)
            await wait_empty(dsn)
            assert len(receiver.calls) == 23
        assert_said_once(daemon)

    with cluster(max_notify_queue_pages="64") as server:
        asyncio.run(go(server.create("crowded")))


LOST = 5


def test_the_answer_to_a_commit_is_lost(
    server: Cluster, dsn: str, run_daemon: Callable[..., DaemonProcess]
) -> None:
    """What was settled may have been or not: it is settled once more, which changes nothing, and is not sent again."""

    async def go() -> None:
        async with Wire(server.port) as wire, Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            daemon = run_daemon(dsn.replace(str(server.port), str(wire.port)))
            await asyncio.to_thread(daemon.wait_ready)
            for n in range(LOST):
                connections = wire.connections
                wire.lose_commits = 1
                await send(dsn)
                await receiver.wait_for_calls(n + 1)
                async with asyncio.timeout(30):
                    while wire.lose_commits or wire.connections < connections + 3:
                        await asyncio.sleep(0.01)
            await send(dsn)
            await wait_empty(dsn)
            assert Counter(Counter(c.event_id for c in receiver.calls).values()) == {1: LOST + 1}
            rows = await fetch(dsn, "select event_id, attempt, verdict from hookd.attempt")
            assert Counter((r["attempt"], r["verdict"]) for r in rows) == {(1, "delivered"): LOST + 1}
            assert not daemon.said("internal error")

    asyncio.run(go())


def test_the_database_falls_silent(
    server: Cluster, dsn: str, run_daemon: Callable[..., DaemonProcess]
) -> None:
    """Nothing is closed, nothing is answered: nothing starts while the locks are in doubt, and what came is written later."""
    release = asyncio.Event()

    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        if call.number == 1:
            await release.wait()
        writer.write(OK)

    async def go() -> None:
        async with Wire(server.port) as wire, Receiver(handle) as receiver:
            await add_endpoint(dsn, receiver.url)
            daemon = run_daemon(dsn.replace(str(server.port), str(wire.port)))
            await asyncio.to_thread(daemon.wait_ready)
            first = await send(dsn)
            await receiver.wait_for_calls(1)
            wire.hold()
            await wait_said(daemon, "database lost")
            await wait_ready(daemon, 503)
            later = await send(dsn)
            release.set()
            wire.release()
            await receiver.wait_for_calls(2)
            await wait_empty(dsn)
            assert [c.event_id for c in receiver.calls] == [first, later]

    asyncio.run(go())


# A wall clock that can be set; the monotonic one goes on.
SET_CLOCK = """
import os, time
real = time.time
def shifted():
    try:
        with open(os.environ["CLOCK_FILE"]) as file:
            return real() + float(file.read() or 0)
    except FileNotFoundError:
        return real()
time.time = shifted
"""


def test_the_wall_clock_is_set(dsn: str, tmp_path: Path, run_daemon: Callable[..., DaemonProcess]) -> None:
    """Retries come when they were due, no sooner and no later: due times are the database's, pauses are monotonic."""
    (tmp_path / "sitecustomize.py").write_text(SET_CLOCK)
    clock = tmp_path / "clock"

    async def fail_twice(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(
            OK if int(call.headers["hookd-attempt"]) > 2 else b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"
        )

    async def go() -> None:
        async with Receiver(fail_twice) as receiver:
            await add_endpoint(dsn, receiver.url)
            daemon = run_daemon(
                dsn,
                PYTHONPATH=str(tmp_path),
                CLOCK_FILE=str(clock),
                HOOKD_RETRY__SCHEDULE='["1s", "1s", "1s"]',
            )
            await asyncio.to_thread(daemon.wait_ready)
            await send(dsn, payload='"before"')
            await receiver.wait_for_calls(1)
            for by_s, seen in ((3600, 3600), (-3600, -7200)):
                clock.write_text(str(by_s))
                async with asyncio.timeout(30):
                    while not any(
                        abs(line["by_s"] - seen) < 60
                        for line in daemon.said("the clock of this machine was set")
                    ):
                        await asyncio.sleep(0.05)
                await send(dsn, payload=f'"{by_s}"')
            await wait_empty(dsn)
            assert len(receiver.calls) == 9
            rows = await fetch(
                dsn, "select event_id, attempt, verdict from hookd.attempt order by event_id, attempt"
            )
            assert [r["verdict"] for r in rows] == ["retry", "retry", "delivered"] * 3
            off = [int(c.headers["webhook-timestamp"]) - time.time() for c in receiver.calls]
            assert min(off) < -3000, "the signature's time is the wall clock's"
            assert not daemon.said("database lost")

    asyncio.run(go())
