"""The feed with reads that a test holds back: what may happen between them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import UUID

from hookd.clock import SystemClock
from hookd.core.model import Delivery, DeliveryId, EndpointKey, Event
from hookd.core.reads import Row
from hookd.feed import Feed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def row(number: int, event: int) -> Row:
    return Row(DeliveryId(number), UUID(int=event), EndpointKey(1), 0, 0, None, None, replay=False)


class Line:
    """Keeps what is admitted, until it is told to let go of it."""

    def __init__(self) -> None:
        self.admitted: list[Delivery] = []

    def admit(self, delivery: Delivery) -> None:
        self.admitted.append(delivery)


class Reads:
    """Has every event; ``meanwhile`` happens while it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[UUID]] = []
        self.meanwhile: Callable[[], None] = list[None]().clear

    async def events(self, ids: Sequence[UUID]) -> dict[UUID, Event]:
        self.asked.append(list(ids))
        self.meanwhile()
        await asyncio.sleep(0)
        return {i: Event(i, "a.b", "t", b"{}", 1.0) for i in ids}


def test_an_event_whose_other_delivery_ends_while_events_are_read_is_still_sent() -> None:
    """It was taken for one whose day was dropped, and ended as expired: seen as 9,999 of 10,000 events."""

    async def go() -> None:
        line, reads = Line(), Reads()
        nobody: Any = None
        feed = Feed(reads, nobody, line, SystemClock(), window=100, known=[])  # type: ignore[arg-type]
        await feed._admit([row(1, 7)])
        reads.meanwhile = line.admitted.clear
        await feed._admit([row(2, 7), row(3, 8)])
        assert reads.asked == [[UUID(int=7)], [UUID(int=8)]]
        assert [(d.id, d.event.type, d.event.expires_at) for d in line.admitted] == [
            (2, "a.b", None),
            (3, "a.b", None),
        ]

    asyncio.run(go())
