"""
One host's permission to send: rate, concurrency, and how much of it the host can bear.

*Rate* is GCRA, a token bucket in one float: ``tat`` is when the bucket would be full again.  A start is permitted when
``tat - (burst - 1) / rate <= now``, and moves ``tat`` on by ``1 / rate``, so that in any window of t seconds there are
never more than ``rate * t + burst`` starts.  It is known beforehand when the next start is permitted, so a throttled
lane waits in a heap and costs nothing.

*Concurrency* is a cap from the configuration, and below it a limit that adapts by loss (AIMD): a failure that says
"less, please" halves it, once for each flight of exchanges and not once for each of their failures; a success while
the limit is in use raises it by ``1 / limit``.  There is no latency probing: a webhook's latency says nothing.

*Hold*: nothing at all until the host's ``Retry-After`` has passed.

*Breaker*: a host that does not answer gets a probe now and then (``core.breaker``).  When it answers again the limit
starts at 1 and doubles with each round of successes until it is where it was cut: what is due after an outage leaves in a
ramp, not in a burst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookd.core.breaker import Breaker
from hookd.core.model import HostSign

if TYPE_CHECKING:
    from hookd.core.model import HostLimits

UNCAPPED_START = 64.0
"""Where the adaptive limit starts when the configuration has no cap."""

NEVER = float("inf")


class HostGate:
    """The limits of one host, and where it stands."""

    __slots__ = (
        "_cut_mono",
        "_interval",
        "_ramp_to",
        "_tat",
        "_tolerance",
        "breaker",
        "cap",
        "hold_until",
        "in_flight",
        "limit",
        "rate",
    )

    def __init__(self, limits: HostLimits) -> None:
        self.in_flight = 0
        self.hold_until = 0.0
        self._tat = 0.0
        self._cut_mono = -NEVER
        self._ramp_to = 0.0
        self.breaker = Breaker()
        self.limit = 0.0
        self.cap = NEVER
        self.reconfigure(limits)

    def __repr__(self) -> str:
        return (
            f"<HostGate in_flight={self.in_flight} limit={self.limit:.1f} cap={self.cap} rate={self.rate:g}>"
        )

    def reconfigure(self, limits: HostLimits) -> None:
        """Take other limits.  What was sent stays counted, so that a reload is no burst."""
        self.rate = limits.rate
        self._interval = 1.0 / limits.rate if limits.rate > 0 else 0.0
        self._tolerance = (max(1, limits.burst) - 1) * self._interval
        was_at_cap = self.limit == 0.0 or self.limit >= self.cap
        self.cap = float(limits.concurrency) if limits.concurrency > 0 else NEVER
        start = self.cap if self.cap is not NEVER else UNCAPPED_START
        self.limit = start if was_at_cap else max(1.0, min(self.limit, self.cap))

    def permitted_at(self) -> float:
        """When the next start is permitted by rate and hold: ``now`` or earlier means at once."""
        earliest = self._tat - self._tolerance if self._interval else 0.0
        if self.breaker.open:
            earliest = max(earliest, self.breaker.probe_at)
        return max(earliest, self.hold_until)

    def has_slot(self) -> bool:
        """Whether the concurrency allows one more."""
        return self.in_flight < int(self.limit) and self.breaker.lets_one_go()

    def started(self, now: float) -> None:
        """One was started now."""
        self.in_flight += 1
        self.breaker.started()
        if self._interval:
            self._tat = max(now, self._tat) + self._interval

    def finished(
        self,
        now: float,
        *,
        started_mono: float,
        slower: bool,
        success: bool,
        hold_s: float,
        host: HostSign = HostSign.NOTHING,
    ) -> None:
        """One that was started at ``started_mono`` has ended."""
        if slower:
            if started_mono >= self._cut_mono:
                # a later cut by those that were already under way would punish the same trouble again and again
                self._cut_mono = now
                self.limit = max(1.0, min(self.limit, float(self.in_flight)) / 2)
        elif success and self.limit < self.cap and self.in_flight * 2 > self.limit:
            # half of it: those that end together are counted one after another, and the first frees its slot
            step = 1.0 if self.limit < self._ramp_to else 1.0 / self.limit
            self.limit = min(self.cap, self.limit + step)
        self._tell_breaker(now, started_mono, host)
        self.in_flight -= 1
        if hold_s > 0:
            self.hold_until = max(self.hold_until, now + hold_s)

    def _tell_breaker(self, now: float, started_mono: float, host: HostSign) -> None:
        match host:
            case HostSign.ALIVE:
                if self.breaker.answered():
                    self._ramp_to = self.cap if self.cap is not NEVER else UNCAPPED_START
                    self.limit = 1.0
            case HostSign.DOWN:
                self.breaker.failed(now, started_mono)
            case HostSign.NOTHING:
                self.breaker.came_to_nothing(started_mono)

    def forgettable(self, now: float) -> bool:
        """Whether a new gate would behave the same: nothing in flight, bucket full, limit recovered, no hold."""
        return (
            self.in_flight == 0
            and not self.breaker.failures
            and self._tat <= now
            and self.hold_until <= now
            and (self.limit >= self.cap or (self.cap is NEVER and self.limit >= UNCAPPED_START))
        )
