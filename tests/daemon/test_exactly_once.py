"""The main job: every committed event arrives once at every endpoint, signed; none that was rolled back ever does."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import asyncpg
import pytest
from standardwebhooks import Webhook

from tests.producing import add_endpoint, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

PRODUCERS = 8
EVENTS = 10_000
HELD_OPEN_S = 2.5


@pytest.mark.timeout(300)
def test_exactly_once_whatever_producers_do(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon()
    committed: set[str] = set()
    rolled_back: set[str] = set()

    async def produce(number: int, transactions: list[tuple[int, bool, bool]]) -> None:
        dice = random.Random(number)
        connection = await asyncpg.connect(dsn)
        try:
            for size, kept, held in transactions:
                transaction = connection.transaction()
                await transaction.start()
                if size <= 3:
                    ids = [
                        str(
                            await connection.fetchval(
                                "select hookd.send('n.made', $1::text)", f'{{"n": {dice.random()}}}'
                            )
                        )
                        for _ in range(size)
                    ]
                else:
                    rows = await connection.fetch(
                        """insert into hookd.event (type, payload) select 'n.made', json_build_object('n', n)::text
                           from generate_series(1, $1::integer) n returning id""",
                        size,
                    )
                    ids = [str(row["id"]) for row in rows]
                if held:
                    await asyncio.sleep(HELD_OPEN_S)
                if kept:
                    await transaction.commit()
                    committed.update(ids)
                else:
                    await transaction.rollback()
                    rolled_back.update(ids)
        finally:
            await connection.close()

    async def go() -> None:
        async with Receiver() as first, Receiver() as second, Receiver() as third:
            receivers = (first, second, third)
            secrets = [await add_endpoint(dsn, receiver.url) for receiver in receivers]
            await asyncio.gather(*(produce(n, plan) for n, plan in enumerate(plans())))
            assert len(committed) == EVENTS
            assert len(rolled_back) > EVENTS // 4
            await wait_empty(dsn, deadline_s=120)
            for receiver, secret in zip(receivers, secrets, strict=True):
                arrived = [call.event_id for call in receiver.calls]
                assert len(arrived) == len(set(arrived)) == EVENTS
                assert set(arrived) == committed
                webhook = Webhook(secret)
                for call in receiver.calls:
                    webhook.verify(call.body, call.headers)
                    assert call.headers["hookd-attempt"] == "1"
            connection = await asyncpg.connect(dsn)
            states = await connection.fetch(
                "select state, count(*) from hookd.delivery_status group by state"
            )
            await connection.close()
            assert [(r["state"], r["count"]) for r in states] == [("delivered", 3 * EVENTS)]

    asyncio.run(go())
    assert daemon.stop() == 0
    assert not daemon.said("internal error")


def plans() -> list[list[tuple[int, bool, bool]]]:
    """For each producer: transactions as (size, committed, held open)."""
    dice = random.Random(7)
    all_plans = []
    for _ in range(PRODUCERS):
        plan: list[tuple[int, bool, bool]] = []
        left = EVENTS // PRODUCERS
        while left:
            size = min(left, dice.choice((1, 1, 1, 2, 3, 20, 100, 200)))
            plan.append((size, True, False))
            left -= size
            if dice.random() < 0.5:
                plan.append((dice.choice((1, 2, 3, 20, 100, 200)), False, False))
        for held in dice.sample(range(len(plan)), 2):
            size, kept, _ = plan[held]
            plan[held] = (size, kept, True)
        all_plans.append(plan)
    return all_plans
