"""Limits as a receiver sees them: never over, used, and changed without a restart."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookd.core.sealing import PLAIN
from hookd.postgres import registry
from hookd.postgres.registry import EndpointChange, NotPossible
from tests.producing import add_endpoint_with_id, fetch, wait_empty
from tests.receiver import Receiver, answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess

pytestmark = pytest.mark.usefixtures("one_server")

MANY = """
insert into hookd.event (type, payload, tenant) select 'thing.made', '{}', $2 from generate_series(1, $1::integer)
"""

JITTER_S = 0.2
"""What a receiver in the same process as a test may add, on two busy cores; a limiter that does nothing would be 3 s off."""


def worst_window(times: list[float], rate: float, burst: int = 1) -> float:
    """How many requests the worst window holds above ``rate * t + burst``."""
    worst, least = 0.0, float("inf")
    for n, at in enumerate(times):
        least = min(least, n - rate * at)
        worst = max(worst, n + 1 - rate * at - least - burst)
    return worst


class Timed(Receiver):
    """Notes when each request came, and how many were under way at once."""

    def __init__(self, takes_s: float = 0.0) -> None:
        super().__init__(self._take)
        self.times: list[float] = []
        self.under_way = self.most = 0
        self._takes_s = takes_s

    async def _take(self, _call: Any, writer: asyncio.StreamWriter) -> None:
        self.times.append(time.monotonic())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self._takes_s)
        self.under_way -= 1
        writer.write(answer(200))


@pytest.mark.parametrize("whose", ["host", "endpoint"])
def test_a_rate_is_never_exceeded(
    dsn: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess], whose: str
) -> None:
    file = tmp_path / "c.toml"
    limits = '[limits.hosts."127.0.0.1"]\nrate = 20.0\n' if whose == "host" else ""
    file.write_text(limits)
    start_daemon(HOOKD_CONFIG=str(file))

    async def go() -> None:
        async with Timed() as receiver:
            await add_endpoint_with_id(dsn, receiver.url, rate=20.0 if whose == "endpoint" else None)
            await fetch(dsn, MANY, 60, "default")
            await wait_empty(dsn)
            assert worst_window(receiver.times, 20.0) <= 20.0 * JITTER_S
            assert receiver.times[-1] - receiver.times[0] >= 59 / 20.0 - JITTER_S

    asyncio.run(go())


def test_the_stricter_of_host_and_endpoint_holds(
    dsn: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[limits]\nrate = 30.0\nconcurrency = 4\n")
    start_daemon(HOOKD_CONFIG=str(file))

    async def go() -> None:
        async with Timed(0.2) as receiver:
            await add_endpoint_with_id(dsn, receiver.url, tenant="a", concurrency=1)
            await add_endpoint_with_id(dsn, receiver.url, tenant="b", rate=1000.0)
            await fetch(dsn, MANY, 4, "a")
            await fetch(dsn, MANY, 30, "b")
            await wait_empty(dsn)
            assert receiver.most == 4
            assert worst_window(receiver.times, 30.0) <= 30.0 * JITTER_S

    asyncio.run(go())


def test_an_update_of_an_endpoint_acts_within_a_second(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon()

    async def go() -> None:
        async with Timed() as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url, rate=0.02)
            await fetch(dsn, MANY, 60, "default")
            await receiver.wait_for_calls(1)
            connection = await asyncpg.connect(dsn)
            changed = time.monotonic()
            await registry.update(connection, endpoint, EndpointChange(rate=1000.0), keyring=PLAIN)
            await connection.close()
            await receiver.wait_for_calls(60)
            assert receiver.times[1] - changed < 1.0, (
                "not a retry's or a poll's time: the second that is promised"
            )

    asyncio.run(go())


def test_a_reload_acts_within_a_second_and_a_bad_one_keeps_the_old_limit(
    dsn: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[limits.hosts."127.0.0.1"]\nrate = 0.02\n')
    daemon = start_daemon(HOOKD_CONFIG=str(file))

    async def go() -> None:
        async with Timed() as receiver:
            await add_endpoint_with_id(dsn, receiver.url)
            await fetch(dsn, MANY, 60, "default")
            await receiver.wait_for_calls(1)
            for bad in ("rate = -1.0", 'rate = "fast"', "rate = nan", "concurrency = 1.5", "burst = -2"):
                file.write_text(f'[limits.hosts."127.0.0.1"]\n{bad}\n')
                before = len(daemon.said("configuration not applied"))
                daemon.signal(signal.SIGHUP)
                async with asyncio.timeout(10):
                    while len(daemon.said("configuration not applied")) == before:
                        await asyncio.sleep(0.02)
                said = daemon.said("configuration not applied")[-1]["mistakes"]
                assert 'limits.hosts."127.0.0.1"' in said[0] or "limits.hosts.127.0.0.1" in said[0], said
            file.write_text('[limits.hosts."not a host"]\nrate = 1.0\n')
            daemon.signal(signal.SIGHUP)
            async with asyncio.timeout(10):
                while "not a host" not in str(daemon.said("configuration not applied")[-1]):
                    await asyncio.sleep(0.02)
            assert len(receiver.calls) == 1
            file.write_text('[limits.hosts."127.0.0.1"]\nrate = 1000.0\n')
            changed = time.monotonic()
            daemon.signal(signal.SIGHUP)
            await receiver.wait_for_calls(60)
            assert receiver.times[1] - changed < 1.0

    asyncio.run(go())


@pytest.mark.parametrize(
    "change", [{"rate": -1.0}, {"rate": float("nan")}, {"rate": float("inf")}, {"concurrency": 0}]
)
def test_an_endpoint_keeps_its_limit_when_the_new_one_is_refused(dsn: str, change: dict[str, Any]) -> None:
    async def go() -> None:
        _, endpoint = await add_endpoint_with_id(dsn, "http://127.0.0.1:9999/hook", rate=3.0, concurrency=2)
        connection = await asyncpg.connect(dsn)
        with pytest.raises(NotPossible, match="above 0"):
            await registry.update(connection, endpoint, EndpointChange(**change), keyring=PLAIN)
        kept = await registry.show(connection, endpoint)
        await connection.close()
        assert (kept.rate, kept.concurrency) == (3.0, 2)

    asyncio.run(go())


def test_pause_and_resume_act_within_a_second_and_lose_nothing(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon()

    async def go() -> None:
        async with Timed() as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url, rate=50.0)
            await fetch(dsn, MANY, 300, "default")
            await receiver.wait_for_calls(20)
            connection = await asyncpg.connect(dsn)
            await registry.pause(connection, endpoint)
            await asyncio.sleep(1.0)  # the promise: nothing starts after it
            paused = len(receiver.calls)
            await asyncio.sleep(0.5)
            assert len(receiver.calls) == paused < 300
            await registry.resume(connection, endpoint)
            resumed = time.monotonic()
            await registry.update(
                connection, endpoint, EndpointChange(clear=frozenset({"rate"})), keyring=PLAIN
            )
            await connection.close()
            await wait_empty(dsn)
            assert len({c.event_id for c in receiver.calls}) == len(receiver.calls) == 300
            assert receiver.times[paused] - resumed < 1.0

    asyncio.run(go())
