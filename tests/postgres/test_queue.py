"""The feed's session: what it listens for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from unittest import mock

import asyncpg
import pytest

from hookd.core.sealing import PLAIN
from hookd.postgres import queue as queue_module
from hookd.postgres.queue import ECHO, Queue
from tests.producing import add_endpoint, fetch, send

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.mark.parametrize(
    ("said", "hears"),
    [
        (["a 7"], True),
        (["a 7", "b 3"], True),
        (["b 3", "a 7", "b 4"], True),
        (["b 7", "a 6"], False),
    ],
)
def test_it_hears_itself_among_other_daemons(dsn: str, said: Sequence[str], *, hears: bool) -> None:
    """Another's notification in the same moment was taken for its own being missing, and its session given up."""

    async def go() -> None:
        others: list[str] = []
        queue = Queue(await asyncpg.connect(dsn), lambda: PLAIN)
        await queue.prepare(others.append)
        speaker = await asyncpg.connect(dsn)
        try:
            queue.listen_for("a 7")
            for text in said:
                await speaker.execute("select pg_notify('hookd', $1)", ECHO + text)
            await speaker.execute("select pg_notify('hookd', 'endpoint')")
            async with asyncio.timeout(10):
                while not others:
                    await asyncio.sleep(0.005)
            assert queue.heard is hears
            queue.listen_for("a 8")
            assert not queue.heard
        finally:
            await speaker.close()
            await queue.close()

    asyncio.run(go())


RESTORED = """
update hookd.delivery set xid = (xid::text::bigint + 1000000000)::text::xid8;
update hookd.endpoint set xid = (xid::text::bigint + 1000000000)::text::xid8
"""
"""What a dump from a server whose transaction ids are higher looks like on this one."""


def test_what_a_restore_brings_is_read_once(dsn: str) -> None:
    """All that was pending arrived again at every read, and every endpoint was read again twice a second."""

    async def go() -> None:
        for n in range(3):
            await add_endpoint(dsn, f"http://127.0.0.1:{9001 + n}/")
        await fetch(dsn, "insert into hookd.event (type, payload) select 'a', '1' from generate_series(1, 5)")
        told: list[str] = []
        queue = Queue(await asyncpg.connect(dsn), lambda: PLAIN)
        other = await asyncpg.connect(dsn)
        await queue.prepare(told.append)
        changed = "select key, updated_at, state_at from hookd.endpoint order by key"
        before = await fetch(dsn, changed)

        async def news() -> tuple[int, int]:
            since, _ = await queue.snapshot()
            arrivals = await queue.arrivals(since, range(64), 100)
            return len(arrivals.rows), len(await queue.endpoint_changes(since))

        try:
            assert await news() == (0, 0)
            await other.execute(RESTORED)
            assert await news() == (15, 3)
            # somebody at work on one of them is not waited for
            await other.execute("begin; select from hookd.delivery order by id limit 1 for update")
            with mock.patch.object(queue_module, "RESET_SLICE", 4):
                fresh, _ = await queue.recover()
                assert len(fresh) == 3
                assert await news() == (1, 0)
                await other.execute("rollback")
                await queue.recover()
            assert await news() == (0, 0)
            assert await fetch(dsn, changed) == before, "nobody has changed an endpoint"
            since, _ = await queue.snapshot()
            await send(dsn)
            assert len((await queue.arrivals(since, range(64), 100)).rows) == 3
            assert told == []
        finally:
            await other.close()
            await queue.close()

    asyncio.run(go())


def test_two_that_recover_at_once_share_the_work(dsn: str) -> None:
    async def go() -> None:
        await add_endpoint(dsn, "http://127.0.0.1:9001/")
        await fetch(
            dsn, "insert into hookd.event (type, payload) select 'a', '1' from generate_series(1, 2000)"
        )
        connection = await asyncpg.connect(dsn)
        await connection.execute(RESTORED)
        queues = [Queue(await asyncpg.connect(dsn), lambda: PLAIN) for _ in range(3)]
        try:
            with mock.patch.object(queue_module, "RESET_SLICE", 50):
                await asyncio.gather(*(queue.recover() for queue in queues))
            left = await connection.fetchval("select count(*) from hookd.delivery where xid <> '0'")
            assert left == 0
        finally:
            await connection.close()
            for queue in queues:
                await queue.close()

    asyncio.run(go())
