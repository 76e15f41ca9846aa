"""
Upkeep: what has to be done now and then.

Day partitions are made ahead of time and dropped when retention ends them.  Both need a lock that a long reader may
hold; they are tried again at the next round, and meanwhile the open partition takes what comes.  The same goes for
whatever PostgreSQL refuses: nothing here keeps anything from being delivered.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hookd.clock import Clock, Dice
    from hookd.core.database import DatabaseHealth

ROUND_S = 60.0
"""Between rounds, give or take a tenth, so that several daemons do not meet."""

PUBLISH_S = 1.0

MEASURE_S = 5.0

MEASURE_SHARE = 0.02
"""Of its connection's time, at most: with a million rows to walk over a look takes longer, and is taken less often."""

EXAMINE_S = 15.0
"""Between looks at PostgreSQL's health."""

PURGE_SLICE = 5000
"""Rows of one purge; a full slice means that there may be more."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long things are kept, in seconds."""

    attempts_s: float
    events_s: float
    dead_letters_s: float


class Maintenance(Protocol):
    """Slow work in PostgreSQL (``postgres.maintenance``)."""

    async def add_partition(self, parent: str) -> str | None: ...
    async def drop_partition(self, parent: str, older_than_s: float) -> str | None: ...
    async def purge(self, *, dead_letters_s: float, events_s: float, attempts_s: float) -> int: ...
    async def set(self, settings: Mapping[str, str]) -> None: ...
    async def depth(self) -> dict[str, float] | None: ...
    async def examine(
        self, *, events_s: float, attempts_s: float, dead_letters_s: float
    ) -> DatabaseHealth | str: ...
    async def publish(self, node: str, backend: int, started_at: float, summary: str) -> None: ...


async def keep_up(
    maintenance: Maintenance,
    retention: Callable[[], Retention],
    dice: Dice,
    report: Callable[[str, str], None],
) -> None:
    """Partitions and retention, for ever; ``report`` is told what was made and dropped."""
    while True:
        kept = retention()
        for parent, age in (("event", kept.events_s), ("attempt", kept.attempts_s)):
            while made := await maintenance.add_partition(parent):
                report("made", made)
            while dropped := await maintenance.drop_partition(parent, age):
                report("dropped", dropped)
        purged = PURGE_SLICE
        while purged >= PURGE_SLICE:
            purged = await maintenance.purge(
                dead_letters_s=kept.dead_letters_s, events_s=kept.events_s, attempts_s=kept.attempts_s
            )
        await asyncio.sleep(ROUND_S * (0.9 + 0.2 * dice.draw()))


async def publish(
    maintenance: Maintenance,
    node: str,
    started_at: float,
    backend: Callable[[], int],
    summary: Callable[[], str],
) -> None:
    """Say every second how this daemon is doing."""
    while True:
        await maintenance.publish(node, backend(), started_at, summary())
        await asyncio.sleep(PUBLISH_S)


async def measure(
    maintenance: Maintenance, clock: Clock, measured: Callable[[dict[str, float]], None]
) -> None:
    """Look every few seconds at how much is pending."""
    while True:
        begun = clock.mono()
        depth = await maintenance.depth()
        if depth is not None:
            measured(depth)
        await asyncio.sleep(max(MEASURE_S, (clock.mono() - begun) / MEASURE_SHARE))


async def look_after(
    maintenance: Maintenance,
    retention: Callable[[], Retention],
    found: Callable[[DatabaseHealth | str], None],
) -> None:
    """Look now and then at PostgreSQL itself."""
    while True:
        kept = retention()
        found(
            await maintenance.examine(
                events_s=kept.events_s, attempts_s=kept.attempts_s, dead_letters_s=kept.dead_letters_s
            )
        )
        await asyncio.sleep(EXAMINE_S)
