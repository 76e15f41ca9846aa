"""Several daemons on one database: they divide the shards, hand them over, and take over what a dead one owned."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import asyncpg

from tests.daemon.test_limits import Timed, worst_window
from tests.producing import add_endpoint, fetch, wait_empty
from tests.receiver import OK, Receiver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess
    from tests.receiver import Call

OWNED = """
select pid, count(*)::integer as shards from pg_locks
 where locktype = 'advisory' and classid = 1752133483 and granted
   and database = (select oid from pg_database where datname = current_database())
 group by pid
"""


async def wait_for_shares(dsn: str, shares: list[int]) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        async with asyncio.timeout(20):
            while sorted(row["shards"] for row in await connection.fetch(OWNED)) != shares:
                await asyncio.sleep(0.02)
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def hosts(dsn: str, count: int, handle: Any = None) -> AsyncIterator[list[Receiver]]:
    async with contextlib.AsyncExitStack() as stack:
        receivers = [await stack.enter_async_context(Receiver(handle)) for _ in range(count)]
        for receiver in receivers:
            await add_endpoint(dsn, receiver.url)
        yield receivers


async def produce(dsn: str, seconds: float, inserted: list[str]) -> None:
    """Twenty events every 20 ms."""
    connection = await asyncpg.connect(dsn)
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            rows = await connection.fetch(
                "insert into hookd.event (type, payload) select 'a.b', '{}' from generate_series(1, 20) returning id"
            )
            inserted += [str(row["id"]) for row in rows]
            await asyncio.sleep(0.02)
    finally:
        await connection.close()


def arrived(receivers: list[Receiver]) -> list[Counter[str]]:
    return [Counter(call.event_id for call in receiver.calls) for receiver in receivers]


def test_shards_are_divided_and_come_back(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    async def go() -> None:
        first = start_daemon()
        await wait_for_shares(dsn, [64])
        second = start_daemon()
        await wait_for_shares(dsn, [32, 32])
        third = start_daemon()
        await wait_for_shares(dsn, [21, 21, 22])
        async with hosts(dsn, 12) as receivers:
            inserted: list[str] = []
            await produce(dsn, 0.5, inserted)
            await wait_empty(dsn)
            assert arrived(receivers) == [Counter(inserted)] * 12
        assert second.stop() == 0
        await wait_for_shares(dsn, [32, 32])
        third.process.send_signal(signal.SIGKILL)
        third.process.wait()
        await wait_for_shares(dsn, [64])
        assert first.stop() == 0

    asyncio.run(go())


def test_coming_and_going_under_load_loses_and_doubles_nothing(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    async def slow(_call: Call, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(OK)

    async def go() -> None:
        start_daemon()
        async with hosts(dsn, 12, slow) as receivers:
            inserted: list[str] = []
            producing = asyncio.create_task(produce(dsn, 5.0, inserted))
            await receivers[0].wait_for_calls(100)
            second = await asyncio.to_thread(start_daemon)
            await wait_for_shares(dsn, [32, 32])
            third = await asyncio.to_thread(start_daemon)
            await wait_for_shares(dsn, [21, 21, 22])
            assert await asyncio.to_thread(second.stop) == 0
            await wait_for_shares(dsn, [32, 32])
            assert await asyncio.to_thread(third.stop) == 0
            await wait_for_shares(dsn, [64])
            await producing
            await wait_empty(dsn, deadline_s=60)
            assert arrived(receivers) == [Counter(inserted)] * 12, "each once"

    asyncio.run(go())


def test_what_a_killed_daemon_owned_goes_on(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    async def go() -> None:
        start_daemon()
        victim = start_daemon()
        await wait_for_shares(dsn, [32, 32])
        async with hosts(dsn, 12) as receivers:
            inserted: list[str] = []
            producing = asyncio.create_task(produce(dsn, 2.0, inserted))
            await receivers[0].wait_for_calls(200)
            os.kill(victim.process.pid, signal.SIGKILL)
            killed = time.monotonic()
            await asyncio.to_thread(victim.process.wait)
            await wait_for_shares(dsn, [64])
            taken_over = time.monotonic() - killed
            await producing
            await wait_empty(dsn, deadline_s=60)
            for counter in arrived(receivers):
                assert set(counter) == set(inserted), "nothing is lost"
            assert taken_over < 3

    asyncio.run(go())


def test_a_hosts_limit_holds_over_all_daemons(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    async def go() -> None:
        limits = {"HOOKD_LIMITS__RATE": "50", "HOOKD_LIMITS__BURST": "2"}
        start_daemon(**limits)
        start_daemon(**limits)
        await wait_for_shares(dsn, [32, 32])
        async with Timed() as receiver:
            # four endpoints on one host have one owner
            for _ in range(4):
                await add_endpoint(dsn, receiver.url)
            await fetch(
                dsn, "insert into hookd.event (type, payload) select 'a.b', '{}' from generate_series(1, 25)"
            )
            await wait_empty(dsn, deadline_s=30)
            assert len(receiver.times) == 100
            assert worst_window(receiver.times, 50, 2) <= 50 * 0.2
            assert 1.8 <= receiver.times[-1] - receiver.times[0] <= 5

    asyncio.run(go())


def test_an_evicted_daemon_loses_its_shards_and_comes_back(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hookd", *arguments],
            env={"HOOKD_DATABASE__DSN": dsn, "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    async def go() -> None:
        start_daemon()
        start_daemon()
        await wait_for_shares(dsn, [32, 32])
        async with asyncio.timeout(10):
            while (
                len(nodes := await fetch(dsn, "select id, backend from hookd.node order by started_at")) < 2
            ):
                await asyncio.sleep(0.05)
        refused = await asyncio.to_thread(command, "evict", "nobody")
        assert refused.returncode == 1
        assert "no daemon is called 'nobody'; there are: " + nodes[0]["id"] in refused.stderr
        done = await asyncio.to_thread(command, "evict", nodes[0]["id"])
        assert (done.returncode, done.stdout) == (0, f"evicted {nodes[0]['id']}\n")
        async with asyncio.timeout(20):
            while (await fetch(dsn, "select backend from hookd.node where id = $1", nodes[0]["id"])) in (
                [], [nodes[0]["backend"]],
            ):  # fmt: skip
                await asyncio.sleep(0.05)
        await wait_for_shares(dsn, [32, 32])

    asyncio.run(go())


def test_systemd_is_told(dsn: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        address = str(tmp_path / "notify")
        listener.bind(address)
        listener.settimeout(20)
        daemon = start_daemon(NOTIFY_SOCKET=address, WATCHDOG_USEC="200000")
        said: list[str] = []

        def wait_for(state: str) -> None:
            while not any(s.startswith(state) for s in said):
                said.append(listener.recv(1000).decode())

        wait_for("READY=1")
        wait_for("WATCHDOG=1")
        said.clear()
        daemon.process.send_signal(signal.SIGHUP)
        wait_for("RELOADING=1\nMONOTONIC_USEC=")
        wait_for("READY=1")
        assert daemon.stop() == 0
        wait_for("STOPPING=1")
