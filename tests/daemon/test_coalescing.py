"""Coalescing: a newer event of a key replaces older ones that no attempt was made for."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import json
from typing import TYPE_CHECKING, Any

import asyncpg

from hookd.core.sealing import PLAIN
from hookd.postgres import registry
from hookd.postgres.registry import EndpointChange
from tests.producing import add_endpoint_with_id, fetch, send, wait_empty, wait_for_row
from tests.receiver import OK, Call, Receiver, answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

MANY = """
insert into hookd.event (type, payload, coalesce_key, order_key)
select 'price.changed', n::text, 'k' || n % $2, $3 from generate_series(1, $1::integer) n
"""

ENDED = """
select s.state, s.reason, s.event_id, v.payload
  from hookd.delivery_status s join hookd.event v on v.id = s.event_id order by v.key
"""


def sent(receiver: Receiver) -> list[int]:
    return [int(call.body) for call in receiver.calls]


async def change_fifty_times(dsn: str, key: str = "price-1") -> list[str]:
    return [await send(dsn, payload=str(n), coalesce_key=key) for n in range(50)]


def test_a_throttled_endpoint_gets_the_latest_state(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon()

    async def go() -> None:
        async with Receiver() as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url, format="raw", rate=0.001)
            first = await send(dsn, payload="-1", coalesce_key="price-1")
            await receiver.wait_for_calls(1)
            events = await change_fifty_times(dsn)
            other = await send(dsn, payload="1000", coalesce_key="price-2")
            await wait_for_row(
                dsn, "select 1 from hookd.attempt where verdict = 'cancelled' having count(*) = 49"
            )
            connection = await asyncpg.connect(dsn)
            await registry.update(connection, endpoint, EndpointChange(rate=1000.0), keyring=PLAIN)
            await connection.close()
            await wait_empty(dsn)
            assert sent(receiver) == [-1, 49, 1000]
            rows = {str(r["event_id"]): r for r in await fetch(dsn, ENDED)}
            assert {rows[e]["state"] for e in (first, events[-1], other)} == {"delivered"}
            for event, newer in itertools.pairwise(events):
                assert rows[event]["state"] == "cancelled"
                replaced_by = rows[event]["reason"].removeprefix("replaced by event ")
                assert replaced_by in events[events.index(newer) :], "one that is newer"

    asyncio.run(go())


def test_what_waits_behind_rows_that_were_all_replaced_is_read(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """Memory held no more of them than the least; these ended without having been started, and nobody asked for others."""

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint_with_id(dsn, receiver.url, format="raw", rate=2.0)
            for n in range(6):
                await send(dsn, payload=str(n), coalesce_key=f"price-{n}")
            await asyncio.to_thread(start_daemon)
            await receiver.wait_for_calls(1)
            for n in range(6):
                await send(dsn, payload=str(10 + n), coalesce_key=f"price-{n}")
            await wait_empty(dsn)
            assert {*range(10, 16)} <= {*sent(receiver)}

    asyncio.run(go())


def test_while_one_is_under_way_the_newest_waits(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon()
    release = asyncio.Event()
    under_way = most = 0

    async def slow(call: Call, writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if call.number == 1:
            await release.wait()
        under_way -= 1
        writer.write(OK)

    async def go() -> None:
        async with Receiver(slow) as receiver:
            await add_endpoint_with_id(dsn, receiver.url, format="raw")
            await send(dsn, payload="-1", coalesce_key="price-1")
            await receiver.wait_for_calls(1)
            await change_fifty_times(dsn)
            await wait_for_row(
                dsn, "select 1 from hookd.attempt where verdict = 'cancelled' having count(*) = 49"
            )
            assert len(receiver.calls) == 1
            release.set()
            await wait_empty(dsn)
            assert sent(receiver) == [-1, 49]
            assert most == 1

    asyncio.run(go())


def test_a_backlog_collapses(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    """Inserted in one statement while nobody reads, far more than memory holds; with an order key as without."""

    async def go(order_key: str | None) -> None:
        async with Receiver() as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url, format="raw")
            await fetch(dsn, MANY, 12_000, 7, order_key)
            daemon = start_daemon()
            await wait_empty(dsn)
            expected = list(range(12_000 - 6, 12_001))
            assert sorted(sent(receiver)) == expected
            if order_key is not None:
                assert sent(receiver) == expected
            counts = {
                r["verdict"]: r["n"]
                for r in await fetch(dsn, "select verdict, count(*) as n from hookd.attempt group by 1")
            }
            assert counts == {"delivered": 7, "cancelled": 12_000 - 7}
            assert daemon.stop() == 0
            await fetch(dsn, "update hookd.endpoint set state = 'removed' where id = $1", endpoint)
            await fetch(dsn, "delete from hookd.attempt")

    asyncio.run(go(None))
    asyncio.run(go("o"))


def test_what_was_attempted_is_not_replaced(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["1s"]')

    async def first_fails(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(500) if call.number == 1 else OK)

    async def go() -> None:
        async with Receiver(first_fails) as receiver:
            await add_endpoint_with_id(dsn, receiver.url, format="raw")
            await send(dsn, payload="1", coalesce_key="k")
            await wait_for_row(dsn, "select 1 from hookd.delivery where attempt = 1")
            await send(dsn, payload="2", coalesce_key="k")
            await wait_empty(dsn)
            assert sent(receiver) == [1, 2, 1]
            assert {r["state"] for r in await fetch(dsn, ENDED)} == {"delivered"}

    asyncio.run(go())


def test_one_that_waits_for_its_time_is_replaced_too(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon()

    async def go() -> None:
        async with Receiver() as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url, format="raw")
            now = datetime.datetime.now(datetime.UTC)
            await send(dsn, payload="1", coalesce_key="k", deliver_at=now + datetime.timedelta(hours=1))
            other = await send(
                dsn, payload="7", coalesce_key="l", deliver_at=now + datetime.timedelta(hours=1)
            )
            newer = await send(dsn, payload="2", coalesce_key="k")
            row = await wait_for_row(dsn, "select reason from hookd.attempt where verdict = 'cancelled'")
            assert row["reason"] == f"replaced by event {newer}"
            await receiver.wait_for_calls(1)
            assert sent(receiver) == [2]
            await wait_for_row(dsn, "select 1 from hookd.delivery having count(*) = 1")
            (row,) = await fetch(dsn, "select state from hookd.delivery_status where event_id = $1", other)
            assert row["state"] == "pending"
            await fetch(dsn, "update hookd.endpoint set state = 'paused' where id = $1", endpoint)
            last = await send(dsn, payload="8", coalesce_key="l")
            await fetch(dsn, "update hookd.endpoint set state = 'active' where id = $1", endpoint)
            await wait_empty(dsn)
            assert sent(receiver) == [2, 8]
            (row,) = await fetch(dsn, "select reason from hookd.delivery_status where event_id = $1", other)
            assert row["reason"] == f"replaced by event {last}"

    asyncio.run(go())


def test_endpoints_tenants_and_keys_are_apart(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(HOOKD_LIMITS__RATE="3")

    async def go() -> None:
        async with Receiver() as one, Receiver() as two:
            await add_endpoint_with_id(dsn, one.url, tenant="a", format="raw")
            await add_endpoint_with_id(dsn, two.url, tenant="b", format="raw")
            for n in range(6):
                for tenant in ("a", "b"):
                    await send(dsn, payload=json.dumps(n), tenant=tenant, coalesce_key="k")
                    await send(dsn, payload=json.dumps(100 + n), tenant=tenant)
            await wait_empty(dsn)
            for receiver in (one, two):
                numbers = sent(receiver)
                assert [n for n in numbers if n >= 100] == [100, 101, 102, 103, 104, 105], (
                    "without a key all come"
                )
                kept: list[Any] = [n for n in numbers if n < 100]
                assert kept == sorted(kept)
                assert kept[-1] == 5
                assert len(kept) < 6

    asyncio.run(go())
