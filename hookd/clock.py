"""
Time and dice: the only module that reads a clock or rolls a die.

Everything else takes a ``Clock`` and a ``Dice``, so that a test can hold them still or make them jump.
"""

from __future__ import annotations

import random
import time
from typing import Protocol


class Clock(Protocol):
    """The two times of a process."""

    def mono(self) -> float:
        """Seconds that only go forwards; for durations and timers."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch; for headers and rows."""
        ...


class Dice(Protocol):
    """A source of uniform draws."""

    def draw(self) -> float:
        """A number in [0, 1)."""
        ...


class SystemClock:
    """The clocks of the operating system.  ``mono`` is the clock that asyncio's and uvloop's timers use."""

    mono = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


class SystemDice:
    """Draws for jitter; nothing secret depends on them."""

    def __init__(self, seed: int | None = None) -> None:
        self.draw = random.Random(seed).random  # noqa: S311 - jitter is no secret
