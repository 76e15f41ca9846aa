"""An endpoint's health in its row: failing since, why, parked, and back again; kept over restarts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg
import pytest

from hookd.postgres import registry
from tests.producing import add_endpoint_with_id, fetch, send, wait_empty, wait_for_row
from tests.receiver import OK, Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from tests.daemon_process import DaemonProcess

pytestmark = pytest.mark.usefixtures("one_server")

MANY = (
    "insert into hookd.event (type, payload) select 'thing.made', '{}' from generate_series(1, $1::integer)"
)

PARK = """
update hookd.endpoint set failing_since = now() - interval '1 day', failing_reason = 'answered 500', parked_at = now()
 where id = $1
"""

HEALTH = "select failing_since, failing_reason, parked_at from hookd.endpoint where id = $1"


async def wait_for_health(dsn: str, endpoint: UUID, condition: str) -> None:
    await wait_for_row(dsn, f"select 1 from hookd.endpoint where id = $1 and {condition}", endpoint)


def test_the_first_failure_is_noted_and_a_success_clears_it(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["500ms"]')

    async def go() -> None:
        async with Receiver(always(answer(404))) as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            await send(dsn)
            await wait_for_health(
                dsn, endpoint, "failing_since is not null and failing_reason = 'answered 404'"
            )
            receiver.handle = always(OK)
            await wait_for_health(dsn, endpoint, "failing_since is null and failing_reason is null")

    asyncio.run(go())


def test_resuming_an_active_endpoint_begins_its_health_anew(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["1h"]')

    async def go() -> None:
        async with Receiver(always(answer(404))) as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            await send(dsn)
            await wait_for_health(dsn, endpoint, "failing_since is not null")
            connection = await asyncpg.connect(dsn)
            await registry.resume(connection, endpoint)
            await connection.close()
            async with asyncio.timeout(10):
                while not await fetch(
                    dsn, "select 1 from hookd.endpoint where id = $1 and failing_since is not null", endpoint
                ):
                    # until the daemon has read it; then a failure is a first one again
                    await send(dsn)
                    await asyncio.sleep(0.1)

    asyncio.run(go())


def test_a_parked_endpoint_stays_parked_over_a_restart_and_heals(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    async def go() -> None:
        async with Receiver(always(answer(500))) as receiver, Receiver() as neighbour:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            await fetch(dsn, PARK, endpoint)
            await fetch(dsn, MANY, 50)
            await add_endpoint_with_id(dsn, neighbour.url, tenant="neighbour")
            daemon = await asyncio.to_thread(start_daemon, HOOKD_RETRY__SCHEDULE='["1h"]')
            await receiver.wait_for_calls(1)
            await send(dsn, tenant="neighbour")
            await neighbour.wait_for_calls(1)
            await wait_for_row(dsn, "select 1 from hookd.attempt where verdict = 'retry'")
            assert len(receiver.calls) == 1, "one probe"
            receiver.handle = always(OK)
            # the second probe goes 10 s after the first failed; nobody does anything
            await wait_for_health(
                dsn, endpoint, "failing_since is null and failing_reason is null and parked_at is null"
            )
            await wait_for_row(dsn, "select 1 from hookd.delivery having count(*) = 1 and min(attempt) = 1")
            assert len(receiver.calls) == 50
            assert not daemon.said("endpoint disabled")

    asyncio.run(go())


def test_resume_ends_the_parking_at_once(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    async def go() -> None:
        async with Receiver(always(answer(500))) as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            await fetch(dsn, PARK, endpoint)
            await fetch(dsn, MANY, 20)
            await asyncio.to_thread(start_daemon, HOOKD_RETRY__SCHEDULE='["100ms"]')
            await wait_for_row(dsn, "select 1 from hookd.attempt where verdict = 'retry'")
            receiver.handle = always(OK)
            connection = await asyncpg.connect(dsn)
            begun = asyncio.get_running_loop().time()
            await registry.resume(connection, endpoint)
            await wait_empty(dsn)
            assert asyncio.get_running_loop().time() - begun < 4, "before the next probe"
            row = await connection.fetchrow(HEALTH, endpoint)
            await connection.close()
            assert row is not None
            assert tuple(row) == (None, None, None)

    asyncio.run(go())
