"""What an endpoint missed and is given later: not before the time that it was sent for."""

from __future__ import annotations

import asyncio
import datetime
from typing import TYPE_CHECKING, Any

import asyncpg

from hookd.postgres import history, registry
from tests.producing import add_endpoint_with_id, fetch, send

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

TOMORROW = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)

WAITS = "select event_id, due_at, due_at <= now() as due, replay from hookd.delivery"

STATE = "update hookd.endpoint set state = $2 where id = $1"


async def queued(dsn: str, names: Mapping[str, str]) -> dict[str, Any]:
    """When the deliveries are due of the events that are called so; ``now`` for what is due by now."""
    called = {str(id_): name for name, id_ in names.items()}
    rows = await fetch(dsn, WAITS)
    assert all(row["replay"] for row in rows)
    return {called[str(row["event_id"])]: "now" if row["due"] else row["due_at"] for row in rows}


def test_what_a_disabled_endpoint_missed_waits_for_its_time(dsn: str) -> None:
    """It went out as soon as the endpoint was resumed."""

    async def go() -> None:
        _, endpoint = await add_endpoint_with_id(dsn, "http://127.0.0.1:9001/")
        names = {"died": await send(dsn, deliver_at=TOMORROW)}
        await fetch(dsn, STATE, endpoint, "disabled")
        # as its owner ends what is pending then
        await fetch(
            dsn,
            """with gone as (delete from hookd.delivery returning id, event_id, endpoint)
               insert into hookd.dead_letter
                      (delivery_id, event_id, endpoint, attempts, reason, tenant, type, payload, created_at)
               select g.id, g.event_id, g.endpoint, 0, 'endpoint disabled', e.tenant, e.type, e.payload, e.created_at
                 from gone g join hookd.event e on e.id = g.event_id""",
        )
        names["plain"] = await send(dsn)
        names["later"] = await send(dsn, deliver_at=TOMORROW)
        names["over"] = await send(dsn, deliver_at=TOMORROW - datetime.timedelta(days=2))
        connection = await asyncpg.connect(dsn)
        try:
            record, count = await registry.resume(connection, endpoint, "all")
        finally:
            await connection.close()
        assert (record.state, count) == ("active", 4)
        assert await queued(dsn, names) == {
            "died": TOMORROW,
            "plain": "now",
            "later": TOMORROW,
            "over": "now",
        }

    asyncio.run(go())


def test_a_replay_waits_for_its_time_and_a_resend_does_not(dsn: str) -> None:
    async def replayed(endpoint: UUID, **how: Any) -> int:
        connection = await asyncpg.connect(dsn)
        try:
            rows = await history.missing(connection, endpoint, None)
            return [n async for n in history.queue(connection, [row.pair for row in rows], **how)][-1]
        finally:
            await connection.close()

    async def go() -> None:
        names = {"plain": await send(dsn), "later": await send(dsn, deliver_at=TOMORROW)}
        _, endpoint = await add_endpoint_with_id(dsn, "http://127.0.0.1:9001/")
        assert await replayed(endpoint) == 2
        assert await queued(dsn, names) == {"plain": "now", "later": TOMORROW}
        await fetch(dsn, "delete from hookd.delivery")
        # one an hour: by its place the second is due in an hour, by its own time tomorrow
        assert await replayed(endpoint, rate=1 / 3600) == 2
        assert await queued(dsn, names) == {"plain": "now", "later": TOMORROW}
        await fetch(dsn, "delete from hookd.delivery")
        assert await replayed(endpoint, rate=1 / 360_000) == 2
        found = await queued(dsn, names)
        assert found["plain"] == "now"
        assert found["later"] > TOMORROW, "its place among the others is later still"
        await fetch(dsn, "delete from hookd.delivery")
        assert await replayed(endpoint, urgent=True) == 2
        assert {row["due_at"] for row in await fetch(dsn, WAITS)} == {None}

    asyncio.run(go())
