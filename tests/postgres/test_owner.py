"""Settling: once for each row, whatever is lost on the way, and only by the owner."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookd.clock import SystemClock
from hookd.core.model import (
    Delivery,
    DeliveryId,
    EndpointKey,
    Event,
    Outcome,
    OutcomeKind,
    Result,
    Verdict,
    VerdictKind,
)
from hookd.core.reads import Reach
from hookd.core.sealing import PLAIN
from hookd.postgres.connect import DatabaseUnavailable
from hookd.postgres.owner import BadBatch, OwnerSession
from hookd.postgres.queue import Queue
from hookd.recorder import Recorder
from tests.producing import add_endpoint, fetch, send

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

VERDICTS = {
    VerdictKind.DELIVERED: Verdict(VerdictKind.DELIVERED),
    VerdictKind.RETRY: Verdict(VerdictKind.RETRY, "answered 500", delay_s=60.0, endpoint_failed=True),
    VerdictKind.EXHAUSTED: Verdict(VerdictKind.EXHAUSTED, "answered 500", endpoint_failed=True),
}


def run(dsn: str, work: Callable[[OwnerSession], Awaitable[None]]) -> None:
    async def go() -> None:
        owner = OwnerSession(await asyncpg.connect(dsn), SystemClock())
        await owner.prepare()
        try:
            await owner.acquire(range(64))
            await work(owner)
        finally:
            await owner.close()

    asyncio.run(go())


async def pending(dsn: str) -> list[Delivery]:
    rows = await fetch(
        dsn,
        "select d.*, v.payload from hookd.delivery d join hookd.event v on v.id = d.event_id order by d.id",
    )
    return [
        Delivery(
            DeliveryId(r["id"]),
            EndpointKey(r["endpoint"]),
            Event(r["event_id"], "a", "default", b"{}", 0.0),
            r["attempt"],
            r["shard"],
        )
        for r in rows
    ]


def result(delivery: Delivery, kind: VerdictKind = VerdictKind.DELIVERED, **outcome: Any) -> Result:
    found = Outcome(OutcomeKind.ANSWERED, sent=True, status=200, started_at=1.0, **outcome)
    return Result(delivery, delivery.endpoint, found, VERDICTS[kind], written_wall=1.0)


@pytest.mark.parametrize("kind", list(VERDICTS))
def test_a_batch_that_is_settled_twice_counts_once(dsn: str, kind: VerdictKind) -> None:
    """The answer to a COMMIT was lost: the same batch is simply run again."""

    async def work(owner: OwnerSession) -> None:
        await add_endpoint(dsn, "http://127.0.0.1:9001/")
        for _ in range(5):
            await send(dsn)
        batch = [result(d, kind) for d in await pending(dsn)]
        first = await owner.settle(batch)
        assert len(first.ids) == 5
        again = await owner.settle(batch)
        assert again.ids == set()
        (row,) = await fetch(dsn, "select count(*) from hookd.attempt")
        assert row["count"] == 5
        left = await pending(dsn)
        assert [d.attempt for d in left] == ([1] * 5 if kind is VerdictKind.RETRY else [])
        (row,) = await fetch(dsn, "select count(*) from hookd.dead_letter")
        assert row["count"] == (5 if kind is VerdictKind.EXHAUSTED else 0)

    run(dsn, work)


def test_what_was_forwarded_meanwhile_is_another_owners_to_settle(dsn: str) -> None:
    """A lost session left two results here; whoever owned their shard in between has forwarded one (simulation, seed 94924)."""

    async def work(owner: OwnerSession) -> None:
        await add_endpoint(dsn, "http://127.0.0.1:9001/")
        for _ in range(3):
            await send(dsn)
        forwarded, stays, gone = left = await pending(dsn)
        shard = forwarded.shard
        elsewhere = (shard + 1) % 64
        await fetch(dsn, "update hookd.delivery set shard = $2 where id = $1", forwarded.id, elsewhere)
        await fetch(dsn, "delete from hookd.delivery where id = $1", gone.id)
        await owner.release({elsewhere})
        await owner.find(left)
        assert [d.shard for d in (forwarded, stays, gone)] == [elsewhere, shard, shard]
        recorder = Recorder(SystemClock(), refused=BadBatch, report=lambda *_: None)
        for delivery in left:
            recorder.add(result(delivery))
        await recorder.run(owner, None, until_empty=True)
        assert [d.id for d in await pending(dsn)] == [forwarded.id]
        assert recorder.dropped == 1

    run(dsn, work)


def test_only_one_owns_a_shard(dsn: str) -> None:
    async def work(owner: OwnerSession) -> None:
        assert len(owner.shards) == 64
        other = OwnerSession(await asyncpg.connect(dsn), SystemClock())
        await other.prepare()
        assert await other.acquire(range(64)) == set()
        await owner.close()
        async with asyncio.timeout(10):
            while not await other.acquire(range(64)):
                await asyncio.sleep(0.01)
        assert len(other.shards) == 64
        await other.close()

    run(dsn, work)


def test_data_that_postgresql_refuses_is_said_to_be_data(dsn: str) -> None:
    async def work(owner: OwnerSession) -> None:
        await add_endpoint(dsn, "http://127.0.0.1:9001/")
        await send(dsn)
        (delivery,) = await pending(dsn)
        for hostile in ("nul \x00", "surrogate \ud800"):
            with pytest.raises(BadBatch):
                await owner.settle([result(delivery, body=hostile)])
        assert len(await pending(dsn)) == 1, "nothing was written"
        assert (await owner.settle([result(delivery, body="fine")])).ids == {delivery.id}

    run(dsn, work)


def test_what_an_owner_without_its_session_had_in_hand_is_not_settled(dsn: str) -> None:
    async def work(owner: OwnerSession) -> None:
        await add_endpoint(dsn, "http://127.0.0.1:9001/")
        await send(dsn)
        (delivery,) = await pending(dsn)
        await fetch(dsn, "select pg_terminate_backend($1)", owner.backend)
        with pytest.raises(DatabaseUnavailable):
            await owner.settle([result(delivery)])
        assert not owner.trusted(SystemClock().mono())
        assert len(await pending(dsn)) == 1

    run(dsn, work)


def test_its_plans_do_not_follow_statistics(dsn: str) -> None:
    async def work(owner: OwnerSession) -> None:
        (shown,) = await fetch(dsn, "show enable_seqscan")
        assert shown[0] == "on"
        for setting, value in (("enable_seqscan", "off"), ("plan_cache_mode", "force_generic_plan"), ("jit", "off")):  # fmt: skip
            assert await owner._connection.fetchval(f"show {setting}") == value

    run(dsn, work)


def test_an_old_answer_does_not_vouch(dsn: str) -> None:
    async def work(owner: OwnerSession) -> None:
        now = SystemClock().mono()
        assert owner.trusted(now)
        assert not owner.trusted(now + 2.5)

    run(dsn, work)


def test_what_is_under_way_is_not_forwarded(dsn: str) -> None:
    """It was sent by the new owner too, while the old one was sending it."""

    async def work(owner: OwnerSession) -> None:
        await add_endpoint(dsn, "http://127.0.0.1:9001/")
        for _ in range(3):
            await send(dsn)
        first, *others = await pending(dsn)
        (moved,) = await fetch(
            dsn,
            "update hookd.endpoint set host = '127.0.0.1:9002', url = 'http://127.0.0.1:9002/' returning shard",
        )
        assert moved["shard"] != first.shard
        assert await owner.forward([Reach(first.endpoint)], [first.id]) == []
        assert {d.id: d.shard for d in await pending(dsn)} == {
            first.id: first.shard,
            **{d.id: moved["shard"] for d in others},
        }
        await owner.forward([Reach(first.endpoint)], [])
        assert {d.shard for d in await pending(dsn)} == {moved["shard"]}

    run(dsn, work)


def test_a_large_backlog_is_forwarded_in_slices(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookd.postgres.owner.FORWARD_MOST", 3)

    async def work(owner: OwnerSession) -> None:
        await add_endpoint(dsn, "http://127.0.0.1:9001/")
        for _ in range(20):
            await send(dsn)
        rows = await pending(dsn)
        await fetch(
            dsn,
            "update hookd.delivery set due_at = case when id % 4 = 0 then 'infinity' else now() end where id = any($1::bigint[]) returning id",
            [row.id for row in rows[:10]],
        )
        (moved,) = await fetch(
            dsn,
            "update hookd.endpoint set host = '127.0.0.1:9002', url = 'http://127.0.0.1:9002/' returning shard",
        )
        counts = []
        reaches = [Reach(rows[0].endpoint)]
        while reaches:
            reaches = await owner.forward(reaches, [rows[15].id])
            counts.append(sum(d.shard == moved["shard"] for d in await pending(dsn)))
        left = [d.id for d in await pending(dsn) if d.shard != moved["shard"]]
        assert left == [rows[15].id]
        # of each kind three at a time, from the newest
        assert counts == [6, 11, 17, 19]

    run(dsn, work)


def test_a_session_that_ends_while_it_begins_to_listen_is_a_lost_one() -> None:
    """It was an internal error, which waits for five seconds."""

    class Dying:
        def add_termination_listener(self, _: object) -> None:
            pass

        async def execute(self, _: str, *, timeout: float) -> None:
            pass

        async def add_listener(self, *_: object) -> None:
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

        def terminate(self) -> None:
            pass

    async def go() -> None:
        connection: Any = Dying()
        with pytest.raises(DatabaseUnavailable):
            await Queue(connection, lambda: PLAIN).prepare(lambda _: None)

    asyncio.run(go())
