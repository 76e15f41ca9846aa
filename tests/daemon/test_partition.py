"""
A daemon whose machine has dropped off the network: no word, no reset, and its session holds the locks.

PostgreSQL finds out by keepalives that the daemon has asked it for (``postgres.connect.KEEPALIVE``), and the other daemon takes
over.  Without them the kernel would wait for two hours.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from tests.cluster import cluster
from tests.daemon_process import DaemonProcess, wait_until
from tests.producing import add_endpoint, fetch, send, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HERE, THERE = "10.213.7.1", "10.213.7.2"

HOSTS = 8

TAKEN_OVER_S = 25.0
"""5 s of silence and a look at the locks are 6 s; the rest is for a machine that is busy."""


def ip(*command: str, inside: int = 0) -> None:
    enter = ["nsenter", "-t", str(inside), "-n"] if inside else []
    subprocess.run([*enter, "ip", *command], check=True, capture_output=True)


def a_link_can_be_made() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        name = f"hk{uuid4().hex[:6]}"
        subprocess.run(["unshare", "-n", "true"], check=True, capture_output=True)
        ip("link", "add", name, "type", "veth", "peer", "name", f"{name}p")
        ip("link", "del", name)
        return True
    return False


pytestmark = pytest.mark.skipif(not a_link_can_be_made(), reason="needs root, ip and network namespaces")


@pytest.fixture
def dsn() -> Iterator[str]:
    with cluster() as server:
        with (server.data / "pg_hba.conf").open("a") as access:
            access.write("host all all 10.213.7.0/24 scram-sha-256\n")
        server.configure(listen_addresses="'*'")
        server.restart("fast")
        yield server.dsn(server.create("parted").rpartition("/")[2].partition("?")[0])


@pytest.fixture
def run_daemon(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    daemons: list[DaemonProcess] = []

    def start(dsn: str, *prefix: str) -> DaemonProcess:
        settings = {
            "HOOKD_DATABASE__DSN": dsn,
            "HOOKD_NETWORK__ALLOW": '["10.213.7.0/24"]',
            "HOOKD_SECURITY__CORE_DUMPS": "true",  # its namespace is entered by way of /proc
        }
        daemons.append(DaemonProcess(tmp_path, settings, prefix))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.kill()


def test_a_daemon_behind_a_dead_link_loses_its_shards(
    dsn: str, run_daemon: Callable[..., DaemonProcess]
) -> None:
    link = f"hk{uuid4().hex[:6]}"

    async def go() -> None:
        parted = run_daemon(dsn.replace("127.0.0.1", HERE), "unshare", "-n")
        pid = parted.process.pid
        await asyncio.to_thread(parted.wait_for, "database cannot be reached")
        ip("link", "add", link, "type", "veth", "peer", "name", f"{link}p", "netns", str(pid))
        ip("addr", "add", f"{HERE}/24", "dev", link)
        ip("link", "set", link, "up")
        ip("addr", "add", f"{THERE}/24", "dev", f"{link}p", inside=pid)
        ip("link", "set", f"{link}p", "up", inside=pid)
        ip("link", "set", "lo", "up", inside=pid)
        await asyncio.to_thread(parted.wait_ready)
        other = run_daemon(dsn)
        await asyncio.to_thread(other.wait_for, "shards acquired")
        async with contextlib.AsyncExitStack() as stack:
            receivers = [await stack.enter_async_context(Receiver(address=HERE)) for _ in range(HOSTS)]
            for receiver in receivers:
                await add_endpoint(dsn, receiver.url)
            before = await send(dsn)
            for receiver in receivers:
                await receiver.wait_for_calls(1)
            await wait_empty(dsn)
            ip("link", "set", link, "down")
            cut = time.monotonic()
            later = [await send(dsn) for _ in range(3)]
            for receiver in receivers:
                await receiver.wait_for_calls(4)
            assert time.monotonic() - cut < TAKEN_OVER_S
            await wait_empty(dsn)
            for receiver in receivers:
                assert Counter(c.event_id for c in receiver.calls) == Counter([before, *later])
            await asyncio.to_thread(parted.wait_for, "database lost")
            ip("link", "set", link, "up")
            await asyncio.to_thread(parted.wait_for, "database is back")
            await asyncio.to_thread(wait_until, lambda: len(other.said("shards handed over")) > 0, "it has its share again")  # fmt: skip
            last = await send(dsn)
            for receiver in receivers:
                await receiver.wait_for_calls(5)
                assert receiver.calls[-1].event_id == last
            await wait_empty(dsn)
            assert (await fetch(dsn, "select count(*) from hookd.attempt where verdict <> 'delivered'"))[0][
                0
            ] == 0
        parted.signal(signal.SIGTERM)
        assert await asyncio.to_thread(parted.process.wait, 30) == 0

    try:
        asyncio.run(go())
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", link)
