"""Which deliveries a bulk resend takes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import UUID

from hookd.postgres.connect import Database
from hookd.postgres.reading import Reading
from hookd.postgres.resending import Matching, matching
from hookd.postgres.search import Filter
from tests.conftest import run_sql
from tests.producing import add_endpoint_with_id, send, wait_empty
from tests.receiver import Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess


def test_those_of_endpoints_that_would_get_nothing_are_left_out(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """Queued, they would end at once, and their dead letters pass for sent again."""
    start_daemon(HOOKD_RETRY__SCHEDULE="[]")

    async def found() -> Matching:
        reading = Reading(Database.named(dsn))
        await reading.open()
        try:
            return await matching(reading, Filter(states=("exhausted",)))
        finally:
            reading.close()

    async def go() -> None:
        async with Receiver(always(answer(500))) as receiver:
            keys = [(await add_endpoint_with_id(dsn, receiver.url))[1] for _ in range(3)]
            event = UUID(await send(dsn))
            await receiver.wait_for_calls(3)
            await wait_empty(dsn)
        assert {pair[1] for pair in (await found()).found} == set(keys)
        for state, key in zip(("disabled", "removed"), keys[:2], strict=True):
            await asyncio.to_thread(
                run_sql, dsn, f"update hookd.endpoint set state = '{state}' where id = '{key}'"
            )
        now = await found()
        assert (now.found, now.left_out) == ([(event, keys[2])], 2)

    asyncio.run(go())
