"""The feed's session: what it listens for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg
import pytest

from hookd.core.sealing import PLAIN
from hookd.postgres.queue import ECHO, Queue

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
