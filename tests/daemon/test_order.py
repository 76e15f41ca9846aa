"""Order, where it was asked for: one at a time, in the order of insertion, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import asyncpg

from tests.producing import add_endpoint_with_id, fetch, send, wait_empty, wait_for_row
from tests.receiver import OK, Call, Receiver, answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

MANY = """
insert into hookd.event (type, payload, order_key)
select 'thing.made', json_build_array($2::text, n)::text, $2 from generate_series(1, $1::integer) n
"""


class Ordered(Receiver):
    """Answers as the events of each key ask for, and notes what was delivered and what was under way at once."""

    def __init__(self, fails: Callable[[str, int, int], bool] = lambda _k, _n, _a: False) -> None:
        super().__init__(self._take)
        self.fails = fails
        self.delivered: dict[str, list[int]] = defaultdict(list)
        self.under_way: dict[str, int] = defaultdict(int)
        self.most: dict[str, int] = defaultdict(int)

    async def _take(self, call: Call, writer: asyncio.StreamWriter) -> None:
        key, n = json.loads(call.body)
        self.under_way[key] += 1
        self.most[key] = max(self.most[key], self.under_way[key])
        await asyncio.sleep(0.001)
        self.under_way[key] -= 1
        if self.fails(key, n, int(call.headers["hookd-attempt"])):
            writer.write(answer(500))
        else:
            self.delivered[key].append(n)
            writer.write(OK)


def test_an_ordered_endpoint_gets_one_after_another(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["20ms", "20ms"]')

    async def go() -> None:
        # every 7th fails twice, every 20th for ever: it is given up, and the next one has its turn
        async with Ordered(lambda _k, n, a: n % 20 == 0 or (n % 7 == 0 and a < 3)) as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url, ordered=True, format="raw")
            connection = await asyncpg.connect(dsn)
            for start in range(0, 90, 30):
                async with connection.transaction():
                    for n in range(start, start + 30):
                        await connection.execute("select hookd.send('a.b', $1::text)", json.dumps(["", n]))
            await connection.close()
            await wait_empty(dsn)
            assert receiver.delivered[""] == [n for n in range(90) if n % 20]
            assert receiver.most[""] == 1
            (row,) = await fetch(
                dsn,
                "select count(*) as n from hookd.dead_letter d join hookd.endpoint e on e.key = d.endpoint where e.id = $1",
                endpoint,
            )
            assert row["n"] == 5

    asyncio.run(go())


def test_a_blocked_key_with_100_000_successors_is_noticed_by_nobody(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["1h"]')

    async def go() -> None:
        async with Ordered(lambda key, _n, _a: key == "stuck") as receiver, Receiver() as neighbour:
            await add_endpoint_with_id(dsn, receiver.url, format="raw")
            await fetch(dsn, MANY, 1, "stuck")
            await wait_for_row(dsn, "select 1 from hookd.delivery where attempt = 1")
            await fetch(dsn, MANY, 100_000, "stuck")
            for key in ("a", "b", "c"):
                await fetch(dsn, MANY, 100, key)
            async with asyncio.timeout(30):
                while any(len(receiver.delivered[key]) < 100 for key in ("a", "b", "c")):
                    await asyncio.sleep(0.01)
            # and one that comes when all that has been read: at once
            await add_endpoint_with_id(dsn, neighbour.url, tenant="neighbour")
            begun = asyncio.get_running_loop().time()
            await send(dsn, tenant="neighbour")
            await neighbour.wait_for_calls(1)
            assert asyncio.get_running_loop().time() - begun < 1.0
            for key in ("a", "b", "c"):
                assert receiver.delivered[key] == list(range(1, 101))
                assert receiver.most[key] == 1
            assert "stuck" not in receiver.delivered
            await wait_for_row(
                dsn, "select 1 from hookd.delivery having count(*) = 100001 and max(attempt) = 1"
            )

    asyncio.run(go())


def test_order_holds_over_a_kill(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    """What was delivered and not settled comes again, from the oldest unsettled one on."""
    first = start_daemon()

    async def go() -> None:
        async with Ordered() as receiver:
            await add_endpoint_with_id(dsn, receiver.url, ordered=True, format="raw")
            await fetch(dsn, MANY, 300, "")
            await receiver.wait_for_calls(40)
            await asyncio.to_thread(first.kill)
            await asyncio.to_thread(start_daemon)
            await wait_empty(dsn)
            came: list[Any] = receiver.delivered[""]
            assert set(came) == set(range(1, 301))
            again = [n for at, n in enumerate(came) if n in came[:at]]
            assert len(again) <= 1, "what was under way"
            assert receiver.most[""] == 1
            assert came == sorted(came)

    asyncio.run(go())


def test_a_scheduled_event_holds_back_what_comes_after_it(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon()

    async def go() -> None:
        async with Ordered() as receiver:
            await add_endpoint_with_id(dsn, receiver.url, format="raw")
            connection = await asyncpg.connect(dsn)
            await connection.execute(
                "select hookd.send('a.b', '[\"k\", 1]'::text, order_key => 'k', deliver_at => clock_timestamp() + interval '3 s')"
            )
            await connection.execute("select hookd.send('a.b', '[\"k\", 2]'::text, order_key => 'k')")
            await connection.execute("select hookd.send('a.b', '[\"l\", 1]'::text, order_key => 'l')")
            await connection.close()
            await wait_for_row(dsn, "select 1 from hookd.attempt where verdict = 'delivered'")
            assert dict(receiver.delivered) == {"l": [1]}
            await wait_empty(dsn)
            assert receiver.delivered["k"] == [1, 2]

    asyncio.run(go())


def test_one_that_commits_late_waits_for_the_one_under_way(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """Transactions that overlap have no order between them; there is still one at a time, and none is lost."""
    start_daemon()
    release = asyncio.Event()

    async def go() -> None:
        async with Ordered() as receiver:
            await add_endpoint_with_id(dsn, receiver.url, format="raw")
            late = await asyncpg.connect(dsn)
            transaction = late.transaction()
            await transaction.start()
            await late.execute("select hookd.send('a.b', '[\"k\", 1]'::text, order_key => 'k')")
            original = receiver._take

            async def held(call: Call, writer: asyncio.StreamWriter) -> None:
                key, _ = json.loads(call.body)
                receiver.under_way[key] += 1
                await release.wait()
                receiver.under_way[key] -= 1
                await original(call, writer)

            receiver.handle = held
            await fetch(dsn, MANY, 3, "k")
            await receiver.wait_for_calls(1)
            await transaction.commit()
            await late.close()
            await send(dsn, payload='["other", 1]')
            await receiver.wait_for_calls(2)
            assert receiver.under_way["k"] == 1
            release.set()
            await wait_empty(dsn)
            assert receiver.delivered["k"] == [1, 1, 2, 3]
            assert receiver.most["k"] == 1

    asyncio.run(go())
