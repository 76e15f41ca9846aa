"""
The circuit breaker: what does not answer is asked now and then, not all the time.

There is one for each host.  A failure there is an exchange that got no answer, a 429 or a 503; any other answer, a 500 as
well, shows that the host is alive, and closes it.  So one tenant's failing endpoint never closes a shared host to its
neighbours.  And there is one for each endpoint that fails in other ways: it parks the endpoint.

*Closed* until so many failures came, over so long a time, with no sign of life between them.  *Open*: one delivery at a
time goes as a probe, first after a while, then after twice as long after each failure, up to a bound; the others wait and
use up no attempts.  The first sign of life closes it, whichever exchange it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patience:
    """When a breaker opens, and how often it probes."""

    failures: int
    """Without a sign of life between them."""
    over_s: float
    """From the first of them to the last, at least."""
    first_s: float
    """To the first probe; twice as long to each one after it."""
    most_s: float
    """Between two probes."""


HOST = Patience(failures=5, over_s=0.0, first_s=1.0, most_s=60.0)

ENDPOINT = Patience(failures=10, over_s=60.0, first_s=5.0, most_s=300.0)
"""More patient than with a host: what an endpoint answers can be one event's fault, so its schedule has a minute first."""


class Breaker:
    """Whether something answers, and when to ask it again."""

    __slots__ = (
        "_failing_mono",
        "_interval_s",
        "_opened_mono",
        "_patience",
        "_probing",
        "failures",
        "open",
        "probe_at",
    )

    def __init__(self, patience: Patience = HOST) -> None:
        self._patience = patience
        self.open = False
        self.failures = 0
        """Without a sign of life between them."""
        self.probe_at = 0.0
        """When the next probe may go, while it is open."""
        self._probing = False
        self._interval_s = 0.0
        self._opened_mono = 0.0
        self._failing_mono = 0.0

    def __repr__(self) -> str:
        return f"<Breaker open, probe at {self.probe_at:.1f}>" if self.open else "<Breaker closed>"

    def lets_one_go(self) -> bool:
        """Whether an exchange may start as far as this is concerned, once ``probe_at`` has come."""
        return not (self.open and self._probing)

    def started(self) -> None:
        """An exchange was started: while it is open, the probe."""
        self._probing = self.open

    def failed(self, now: float, started_mono: float) -> None:
        """An exchange that was started at ``started_mono`` failed in the way that this breaker looks at."""
        if not self.open:
            if not self.failures:
                self._failing_mono = now
            self.failures += 1
            if self.failures >= self._patience.failures and now - self._failing_mono >= self._patience.over_s:
                self.open = True
                self._interval_s = self._patience.first_s
                self._wait(now)
        elif started_mono >= self._opened_mono:
            # the probe; what had been under way when it opened says nothing new
            self._interval_s = min(self._patience.most_s, self._interval_s * 2)
            self._wait(now)

    def open_since_before(self, now: float) -> None:
        """It was open in another life: the first probe may go at once."""
        self.open = True
        self.failures = self._patience.failures
        self._interval_s = self._patience.first_s
        self._wait(now)
        self.probe_at = now

    def answered(self) -> bool:
        """A sign of life; whether it closed the breaker."""
        closed, self.open = self.open, False
        self.failures = 0
        self._probing = False
        return closed

    def came_to_nothing(self, started_mono: float) -> None:
        """It ended and says nothing (expired, refused by the guard): if it was the probe, another may go."""
        if started_mono >= self._opened_mono:
            self._probing = False

    def _wait(self, now: float) -> None:
        self._probing = False
        self._opened_mono = now
        self.probe_at = now + self._interval_s
