"""
A host's circuit breaker: a host that does not answer is asked now and then, not all the time.

It looks at the host alone.  A failure is an exchange that got no answer, a 429 or a 503; any other answer, a 500 as well,
shows that the host is alive, and closes it.  So one tenant's failing endpoint never closes a shared host to its
neighbours.

*Closed* until ``BREAK_AFTER`` failures came with no sign of life between them.  *Open*: one delivery at a time goes as a
probe, first after ``PROBE_FIRST_S``, then twice as long after each failure, up to ``PROBE_MOST_S``; the others wait and use
up no attempts.  The first sign of life closes it, whichever exchange it comes from.
"""

from __future__ import annotations

BREAK_AFTER = 5

PROBE_FIRST_S = 1.0
PROBE_MOST_S = 60.0


class Breaker:
    """Whether a host answers, and when to ask it again."""

    __slots__ = ("_interval_s", "_opened_mono", "_probing", "failures", "open", "probe_at")

    def __init__(self) -> None:
        self.open = False
        self.failures = 0
        """Without a sign of life between them."""
        self.probe_at = 0.0
        """When the next probe may go, while it is open."""
        self._probing = False
        self._interval_s = 0.0
        self._opened_mono = 0.0

    def __repr__(self) -> str:
        return f"<Breaker open, probe at {self.probe_at:.1f}>" if self.open else "<Breaker closed>"

    def lets_one_go(self) -> bool:
        """Whether an exchange may start as far as this is concerned, once ``probe_at`` has come."""
        return not (self.open and self._probing)

    def started(self) -> None:
        """An exchange was started: while it is open, the probe."""
        self._probing = self.open

    def failed(self, now: float, started_mono: float) -> None:
        """An exchange that was started at ``started_mono`` got no answer, or one that asks to be left alone."""
        if not self.open:
            self.failures += 1
            if self.failures >= BREAK_AFTER:
                self.open = True
                self._interval_s = PROBE_FIRST_S
                self._wait(now)
        elif started_mono >= self._opened_mono:
            # the probe; what had been under way when it opened says nothing new
            self._interval_s = min(PROBE_MOST_S, self._interval_s * 2)
            self._wait(now)

    def answered(self) -> bool:
        """A sign of life; whether it closed the breaker."""
        closed, self.open = self.open, False
        self.failures = 0
        self._probing = False
        return closed

    def came_to_nothing(self, started_mono: float) -> None:
        """It ended without a word to the host (expired, refused by the guard): if it was the probe, another may go."""
        if started_mono >= self._opened_mono:
            self._probing = False

    def _wait(self, now: float) -> None:
        self._probing = False
        self._opened_mono = now
        self.probe_at = now + self._interval_s
