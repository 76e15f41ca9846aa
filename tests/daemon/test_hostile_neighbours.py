"""Receivers that mean harm, beside an honest one, under a real daemon: its lane does not notice them, and memory is bounded."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.test_isolation import MANY
from tests.net import hostile
from tests.producing import add_endpoint_with_id, fetch, wait_for_row
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.daemon_process import DaemonProcess

HONEST = 500
"""Deliveries to the honest receiver, sent behind those that do harm."""

EACH = 3
"""Deliveries to each of the others."""

MEMORY_MOST = 256 * 2**20
"""Of the whole daemon; one flood alone would fill it in a second."""

ENDED = """
select count(*) as made, count(*) filter (where a.verdict = 'delivered') as delivered, max(a.total_ms) as slowest
  from hookd.attempt a join hookd.endpoint e on e.key = a.endpoint where e.tenant = $1
"""


@pytest.fixture
def ports() -> Iterator[tuple[int, int]]:
    with hostile.started() as ports:
        yield ports


def most_memory(pid: int) -> int | None:
    """Bytes that a process had at most; None where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii")) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


@pytest.mark.usefixtures("one_server")
def test_an_honest_receiver_beside_hostile_ones(
    dsn: str, start_daemon: Callable[..., DaemonProcess], ports: tuple[int, int]
) -> None:
    daemon = start_daemon(HOOKD_DELIVERY__TIMEOUT="20s", HOOKD_RETRY__SCHEDULE='["1h"]')
    daemon.wait_ready()
    names = [*hostile.FLOODS, *hostile.SLOW, *hostile.SMUGGLING]
    still = ("silence", "a slow status line", "slow headers")

    async def go() -> None:
        async with Receiver() as honest:
            for name in names:
                await add_endpoint_with_id(
                    dsn, f"http://127.0.0.1:{ports[0]}/{name.replace(' ', '_')}", tenant="hostile"
                )
            await add_endpoint_with_id(dsn, f"https://127.0.0.1:{ports[1]}/", tenant="hostile")
            await add_endpoint_with_id(dsn, honest.url, tenant="honest")
            await fetch(dsn, MANY, EACH, "hostile")
            await wait_for_row(dsn, "select from hookd.attempt limit 1")  # they are being called
            await fetch(dsn, MANY, HONEST, "honest")
            await honest.wait_for_calls(HONEST)
            await wait_for_row(dsn, f"select from ({ENDED}) as ended where delivered = {HONEST}", "honest")
            (harm,) = await fetch(dsn, ENDED, "hostile")
            wanted = EACH * (len(names) + 1)
            assert harm["made"] <= wanted - EACH * len(still), "the slow ones were still under way"
            await wait_for_row(dsn, f"select from ({ENDED}) as ended where made = {wanted}", "hostile")
            (honestly,) = await fetch(dsn, ENDED, "honest")
            (harm,) = await fetch(dsn, ENDED, "hostile")
            memory = most_memory(daemon.process.pid)
            print(  # noqa: T201 - the figures
                f"{wanted} hostile attempts, the slowest {harm['slowest'] / 1000:.1f} s; {HONEST} honest ones meanwhile, "
                f"the slowest {honestly['slowest']:.0f} ms; "
                f"the daemon had at most {(memory or 0) / 2**20:.0f} MB"
            )
            assert honestly["made"] == HONEST, "none had to be tried twice"
            assert memory is None or memory < MEMORY_MOST

    asyncio.run(go())
