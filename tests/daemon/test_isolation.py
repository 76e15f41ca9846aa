"""A host that is down costs a handful of exchanges, loses nothing, and its neighbours do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.producing import add_endpoint_with_id, fetch, wait_empty, wait_for_row
from tests.receiver import OK, Call, Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

pytestmark = pytest.mark.usefixtures("one_server")

MANY = """
insert into hookd.event (type, payload, tenant) select 'thing.made', '{}', $2 from generate_series(1, $1::integer)
"""

ATTEMPTS = """
select count(*) as attempts, count(*) filter (where a.verdict = 'delivered') as delivered, max(a.attempt) as most
  from hookd.attempt a join hookd.endpoint e on e.key = a.endpoint where e.id = $1
"""


async def ask(dsn: str, *arguments: str) -> list[Any]:
    """What a command prints, line by line."""

    def run() -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-m", "hookd", *arguments, "--json"],
            env={"HOOKD_DATABASE__DSN": dsn, "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [json.loads(line) for line in done.stdout.splitlines()]

    return await asyncio.to_thread(run)


async def wait_for_lane(dsn: str, why: str) -> Any:
    """Wait until ``hookd status`` shows a lane that waits for this."""
    async with asyncio.timeout(10):
        while True:
            (said,) = await ask(dsn, "status")
            for daemon in said["daemons"]:
                for lane in daemon["summary"]["lanes"]:
                    if lane["why"] == why:
                        return lane


def test_a_host_that_is_down_and_comes_back(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["1s", "1s", "1s"]', HOOKD_LIMITS__CONCURRENCY="10")

    async def go() -> None:
        away = Receiver()
        async with away:
            pass  # it has a port now, and nobody listens there
        async with Receiver() as healthy:
            _, down = await add_endpoint_with_id(dsn, away.url, tenant="a")
            await add_endpoint_with_id(dsn, healthy.url, tenant="b")
            await fetch(dsn, MANY, 400, "a")
            await fetch(dsn, MANY, 2000, "b")
            await healthy.wait_for_calls(2000)
            await wait_for_row(dsn, "select from hookd.attempt a having count(*) >= 2000 + 7")
            lane = await wait_for_lane(dsn, "breaker")
            assert lane["host"] == f"127.0.0.1:{away.port}"
            (oldest,) = await fetch(dsn, "select max(id) as id from hookd.delivery")
            (why,) = await ask(dsn, "explain", str(oldest["id"]))
            assert why["because"].startswith("its host does not answer; the next probe goes in")
            (row,) = await fetch(dsn, ATTEMPTS, down)
            assert row["attempts"] <= 10 + 4, "one flight and the probes so far"
            async with away:
                await wait_empty(dsn)
                (row,) = await fetch(dsn, ATTEMPTS, down)
                assert row["delivered"] == 400
                assert row["attempts"] <= 400 + 10 + 8
                assert len({c.event_id for c in away.calls}) == len(away.calls) == 400

    asyncio.run(go())


def test_one_tenants_500s_do_not_close_a_shared_host(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["1h"]')

    async def go() -> None:
        async with Receiver(always(answer(500))) as shared:

            async def handle(call: Any, writer: asyncio.StreamWriter) -> None:
                writer.write(answer(500) if call.path == "/bad" else answer(200))

            shared.handle = handle
            await add_endpoint_with_id(dsn, shared.url.replace("/hook", "/bad"), tenant="a")
            _, good = await add_endpoint_with_id(dsn, shared.url, tenant="b")
            await fetch(dsn, MANY, 300, "a")
            await fetch(dsn, MANY, 300, "b")
            await shared.wait_for_calls(600)
            await wait_for_row(
                dsn,
                "select 1 from hookd.attempt a join hookd.endpoint e on e.key = a.endpoint"
                " where e.id = $1 and a.verdict = 'delivered' having count(*) = 300",
                good,
            )

    asyncio.run(go())


STOPPED = 8

EACH = 30


def test_receivers_stop_one_by_one_and_go_on_in_another_order(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """They accept and say nothing, as a stopped process does; only their own lanes wait, and all goes on with each."""
    start_daemon(
        HOOKD_RETRY__SCHEDULE=json.dumps(["1s"] * 40),
        HOOKD_DELIVERY__TIMEOUT="1s",
        HOOKD_LIMITS__CONCURRENCY="10",
    )
    dice = random.Random(22)

    def receiver_of(gate: asyncio.Event) -> Receiver:
        async def handle(_: Call, writer: asyncio.StreamWriter) -> None:
            await gate.wait()
            writer.write(OK)

        return Receiver(handle)

    async def go() -> None:
        gates = [asyncio.Event() for _ in range(STOPPED)]
        for gate in gates:
            gate.set()
        async with contextlib.AsyncExitStack() as stack:
            healthy = await stack.enter_async_context(Receiver())
            receivers = [await stack.enter_async_context(receiver_of(gate)) for gate in gates]
            await add_endpoint_with_id(dsn, healthy.url, tenant="healthy")
            for n, receiver in enumerate(receivers):
                await add_endpoint_with_id(dsn, receiver.url, tenant=f"r{n}")

            async def load(most: int) -> None:
                await fetch(dsn, MANY, most, "healthy")
                for n in range(STOPPED):
                    await fetch(dsn, MANY, most, f"r{n}")

            for gate in gates:
                gate.clear()
                await load(EACH // 10)
            begun = time.monotonic()
            await load(EACH)
            arrived = EACH // 10 * STOPPED + EACH
            await healthy.wait_for_calls(arrived)
            assert time.monotonic() - begun < 20, "eight hosts that say nothing held up a ninth"
            for gate in dice.sample(gates, STOPPED):
                gate.set()
                await load(EACH // 10)
                arrived += EACH // 10
                await healthy.wait_for_calls(arrived)
            await wait_empty(dsn)
            for receiver in receivers:
                assert len({c.event_id for c in receiver.calls}) == arrived
            assert len(healthy.calls) == arrived, "and nothing twice"
            assert not await fetch(dsn, "select from hookd.dead_letter")

    asyncio.run(go())


FAR_S = 0.3


def test_half_of_the_receivers_are_far_away(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    """What is far is as fast as its limit of exchanges at once lets it be, and the near ones do not wait for it."""
    start_daemon(HOOKD_LIMITS__CONCURRENCY="10")
    at_once: list[int] = [0] * 5
    peaks = at_once.copy()

    def far(n: int) -> Receiver:
        async def handle(_: Call, writer: asyncio.StreamWriter) -> None:
            at_once[n] += 1
            peaks[n] = max(peaks[n], at_once[n])
            await asyncio.sleep(FAR_S)
            at_once[n] -= 1
            writer.write(OK)

        return Receiver(handle)

    async def go() -> None:
        async with contextlib.AsyncExitStack() as stack:
            distant = [await stack.enter_async_context(far(n)) for n in range(5)]
            near = [await stack.enter_async_context(Receiver()) for _ in range(5)]
            for receiver in (*distant, *near):
                await add_endpoint_with_id(dsn, receiver.url)
            await fetch(dsn, MANY, 100, "default")
            for receiver in near:
                await receiver.wait_for_calls(100)
            assert sum(len(r.calls) for r in distant) < 500, "nobody near waited for them"
            await wait_empty(dsn)
            assert [len(r.calls) for r in (*distant, *near)] == [100] * 10
            assert peaks == [10] * 5

    asyncio.run(go())
