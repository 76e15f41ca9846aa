"""The tally: what is counted in a minute is written once, whatever the number of writes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from hookd.core.histogram import Histogram
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
from hookd.tally import Counted, Tally

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MINUTE = 1_764_000_000 // 60 * 60.0


class Ledger:
    def __init__(self) -> None:
        self.minutes: dict[float, dict[str, int]] = {}
        self.quarters: dict[float, dict[str, int]] = {}
        self.hours: list[tuple[float, tuple[Any, ...]]] = []

    async def note_tally(
        self, seconds: int, at: float, node: str, gauges: tuple[int, float, int], figures: Mapping[str, int]
    ) -> None:
        assert (node, gauges) == ("me", (3, 1.5, 2))
        kept = self.minutes if seconds == 60 else self.quarters
        kept[at] = dict(figures)

    async def note_hours(self, at: float, fares: Sequence[tuple[int, int, int, float, float]]) -> None:
        self.hours += [(at, fare) for fare in fares]


def result(endpoint: int, kind: VerdictKind, total_ms: float | None) -> Result:
    event = Event(uuid4(), "a", "default", b"{}", 0.0)
    delivery = Delivery(DeliveryId(1), EndpointKey(endpoint), event, 0, 0)
    outcome = None if total_ms is None else Outcome(OutcomeKind.ANSWERED, total_ms=total_ms)
    return Result(delivery, EndpointKey(endpoint), outcome, Verdict(kind))


def test_a_minute_holds_what_was_counted_in_it() -> None:
    ledger, tally = Ledger(), Tally("me")
    took = Histogram((0.1, 1))

    def counted(delivered: int) -> Counted:
        return Counted({"delivered": delivered}, {"2xx": delivered}, took, Histogram((1,)), 3, 1.5, 2)

    async def go() -> None:
        tally.count(result(7, VerdictKind.DELIVERED, 10))
        tally.count(result(7, VerdictKind.RETRY, 30))
        tally.count(result(7, VerdictKind.CANCELLED, None))
        tally.count(result(8, VerdictKind.DELIVERED, 5))
        took.observe(0.05)
        await tally.write(ledger, MINUTE + 10, counted(2))
        assert ledger.hours == [], "endpoints are written when the minute is over"
        await tally.write(ledger, MINUTE + 50, counted(5))
        await tally.write(ledger, MINUTE + 60, counted(6))
        await tally.write(ledger, MINUTE + 70, counted(7))
        tally.count(result(8, VerdictKind.DELIVERED, 50))
        await tally.write(ledger, MINUTE + 75, counted(8), last=True)

    asyncio.run(go())
    first, second = (ledger.minutes[MINUTE + n] for n in (0, 60))
    assert (first["verdict.delivered"], second["verdict.delivered"]) == (6, 2)
    assert (first["attempt_ms.100"], first["attempt_ms.1000"], first["attempt_ms.inf"]) == (1, 0, 0)
    assert [q["verdict.delivered"] for q in ledger.quarters.values()] == [8]
    hour = MINUTE // 3600 * 3600
    assert ledger.hours == [
        (hour, (7, 1, 1, 40.0, 30)),
        (hour, (8, 1, 0, 5.0, 5)),
        (hour, (8, 1, 0, 50.0, 50)),
    ]
