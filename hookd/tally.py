"""
The tally: what the engine counted, written down by the minute and the quarter, and how each endpoint fared, by the hour.

It is what charts are drawn from, so that nobody has to count the log.  The engine pays a quarter of a microsecond for each
attempt; PostgreSQL gets two rows every ten seconds, and every minute one for each endpoint that was called in it.  A daemon that
is killed takes its last moments with it: these are figures, not the log.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hookd.core.model import DELIVERED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hookd.core.histogram import Histogram
    from hookd.core.model import EndpointKey, Result

EVERY_S = 10.0

SPANS_S = (60, 900)
"""By the minute for the last hours, by the quarter for days."""

HOUR_S = 3600

ENDPOINTS_AT_ONCE = 5000


class Ledger(Protocol):
    """Where it is written (``postgres.maintenance``)."""

    async def note_tally(
        self, seconds: int, at: float, node: str, gauges: tuple[int, float, int], figures: Mapping[str, int]
    ) -> None: ...
    async def note_hours(self, at: float, fares: Sequence[tuple[int, int, int, float, float]]) -> None: ...


@dataclass(frozen=True, slots=True)
class Counted:
    """What the engine has counted since it started, and how it is now."""

    verdicts: Mapping[str, int]
    outcomes: Mapping[str, int]
    attempt_s: Histogram
    lag_s: Histogram
    pending: int
    oldest_s: float
    in_flight: int

    def figures(self) -> dict[str, int]:
        """The counters under the names that ``hookd.tally`` has them."""
        return (
            {f"verdict.{name}": n for name, n in self.verdicts.items()}
            | {f"outcome.{name}": n for name, n in self.outcomes.items()}
            | _by_bound("attempt_ms", self.attempt_s)
            | _by_bound("lag_ms", self.lag_s)
        )


@dataclass(slots=True)
class _Span:
    """A stretch of time that is being counted."""

    seconds: int
    at: int
    before: dict[str, int]
    """The counters as they were when it began."""


class Tally:
    """Counts by endpoint, and writes down everything that was counted."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._spans: list[_Span] = []
        self._fares: dict[EndpointKey, list[float]] = {}
        """Since it was written last: delivered, failed, total and slowest milliseconds."""

    def count(self, result: Result) -> None:
        """Count an attempt that ended."""
        outcome = result.outcome
        if outcome is None:
            return
        fare = self._fares.get(result.endpoint_key)
        if fare is None:
            fare = self._fares[result.endpoint_key] = [0, 0, 0.0, 0.0]
        fare[0 if result.verdict.kind is DELIVERED else 1] += 1
        took = outcome.total_ms
        fare[2] += took
        fare[3] = max(fare[3], took)

    async def keep(self, ledger: Ledger, wall: Callable[[], float], counted: Callable[[], Counted]) -> None:
        """Write every ten seconds, on the ten seconds, for ever."""
        while True:
            await asyncio.sleep(EVERY_S - wall() % EVERY_S)
            await self.write(ledger, wall(), counted())

    async def write(self, ledger: Ledger, now: float, counted: Counted, *, last: bool = False) -> None:
        """Write what was counted so far; of endpoints when a minute is over, or with the ``last`` call."""
        total = counted.figures()
        if not self._spans:
            self._spans = [_Span(seconds, _floor(now, seconds), {}) for seconds in SPANS_S]
        gauges = counted.pending, counted.oldest_s, counted.in_flight
        for span in self._spans:
            since = {name: n - span.before.get(name, 0) for name, n in total.items()}
            await ledger.note_tally(span.seconds, span.at, self._node, gauges, since)
        minute = self._spans[0].at
        if last or _floor(now, SPANS_S[0]) != minute:
            await self._write_fares(ledger, _floor(minute, HOUR_S))
        for span in self._spans:
            if _floor(now, span.seconds) != span.at:
                span.at, span.before = _floor(now, span.seconds), total

    async def _write_fares(self, ledger: Ledger, hour: int) -> None:
        fares, self._fares = self._fares, {}
        rows = [
            (key, int(ok), int(bad), total_ms, slowest) for key, (ok, bad, total_ms, slowest) in fares.items()
        ]
        for start in range(0, len(rows), ENDPOINTS_AT_ONCE):
            await ledger.note_hours(hour, rows[start : start + ENDPOINTS_AT_ONCE])


def _floor(at: float, seconds: int) -> int:
    return int(at) // seconds * seconds


def _by_bound(name: str, histogram: Histogram) -> dict[str, int]:
    bounds = [*(f"{bound * 1000:g}" for bound in histogram.bounds), "inf"]
    return {f"{name}.{bound}": n for bound, n in zip(bounds, histogram.counts, strict=True)}
