"""
A gate: the permission to send to one host, or for one endpoint.  Rate, concurrency, and how much of it can be borne.

*Rate* is GCRA, a token bucket in one float: ``tat`` is when the bucket would be full again.  A request may be written
when ``tat - (burst - 1) / rate <= now``, and moves ``tat`` on by ``1 / rate``, so that in any window of t seconds there
are never more than ``rate * t + max(1, burst)`` requests.  What is counted is the write: between the start of an exchange
and its write lie a name to resolve and a connection to open, and starts that keep their distance would still meet there.
So there are two buckets.  The one of *starts* lets an exchange begin a little before its time (``lead``), the one of
*writes* lets it write (``write_at``, ``wrote``), and is never ahead of the other.  It is known beforehand when the next
start is permitted, so what is throttled waits in a heap and costs nothing.

*Concurrency* is a cap from the configuration, and below it a limit that adapts by loss (AIMD): a failure that says
"less, please" halves it, once for each flight of exchanges and not once for each of their failures; a success while
the limit is in use raises it by ``1 / limit``.  There is no latency probing: a webhook's latency says nothing.

*Hold*: nothing at all until the host's ``Retry-After`` has passed.

*Breaker*: what does not answer gets a probe now and then (``core.breaker``).  When it answers again the limit starts at 1
and doubles with each round of successes until it is where it was cut: what is due after an outage leaves in a ramp, not in
a burst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookd.core.breaker import HOST, Breaker, Patience
from hookd.core.model import ALIVE, DOWN, HostSign

if TYPE_CHECKING:
    from hookd.core.model import HostLimits

NEVER = float("inf")

UNCAPPED_START = 64.0
"""Where the adaptive limit starts when the configuration has no cap."""

LEAD_S = 0.002
"""How long before its time an exchange starts, at least: timers have a millisecond, and it has to be signed."""

LEAD_MOST_S = 0.5
"""And at most, but never more than half of the interval.  In between it is what those before it needed to get ready: where
each has to open a connection, as at one request a minute, a start in time would be a write too late."""

LEAD_KEPT = 0.95
"""Of a longer lead, from one write to the next."""


class Gate:
    """Limits, and where their host or endpoint stands."""

    __slots__ = (
        "_cut_mono",
        "_interval",
        "_ramp_to",
        "_start_tat",
        "_tat",
        "_tolerance",
        "breaker",
        "cap",
        "hold_until",
        "in_flight",
        "lead",
        "limit",
        "rate",
        "uncapped",
        "unwritten",
    )

    def __init__(
        self, limits: HostLimits, patience: Patience = HOST, uncapped: float = UNCAPPED_START
    ) -> None:
        """``uncapped`` is where the adaptive limit stands when there is no cap."""
        self.in_flight = 0
        self.unwritten = 0
        """Of those in flight: how many are still to be written.  Not counted without a rate."""
        self.hold_until = 0.0
        self._tat = 0.0
        self._start_tat = 0.0
        self.lead = 0.0
        """Seconds before its time at which an exchange starts."""
        self._cut_mono = -NEVER
        self._ramp_to = 0.0
        self.breaker = Breaker(patience)
        self.uncapped = uncapped
        self.limit = 0.0
        self.cap = NEVER
        self._interval = 0.0
        self.reconfigure(limits, 0.0)

    def __repr__(self) -> str:
        return f"<Gate in_flight={self.in_flight} limit={self.limit:.1f} cap={self.cap} rate={self.rate:g}>"

    def reconfigure(self, limits: HostLimits, now: float) -> None:
        """Take other limits.  What was sent stays counted, as so many requests, so that a reload is no burst."""
        self.rate = limits.rate
        before, self._interval = self._interval, 1.0 / limits.rate if limits.rate > 0 else 0.0
        if before and self._tat > now:
            self._tat = now + (self._tat - now) / before * self._interval
        self.lead = LEAD_S
        self._tolerance = (max(1, limits.burst) - 1) * self._interval
        self._start_tat = self._tat + self.unwritten * self._interval
        was_whole = self.limit == 0.0 or self.limit >= min(self.cap, self.uncapped)
        self.cap = float(limits.concurrency) if limits.concurrency > 0 else NEVER
        self.limit = self.whole if was_whole else max(1.0, min(self.limit, self.cap))

    @property
    def whole(self) -> float:
        """The concurrency of one that has no trouble."""
        return self.cap if self.cap != NEVER else self.uncapped

    # Rate.

    def permitted_at(self) -> float:
        """When the next start is permitted by rate, hold and breaker: ``now`` or earlier means at once."""
        earliest = self._start_tat - self._tolerance - self.lead if self._interval else 0.0
        if self.breaker.open:
            earliest = max(earliest, self.breaker.probe_at)
        return max(earliest, self.hold_until)

    def write_at(self) -> float:
        """When the next request may be written."""
        return self._tat - self._tolerance if self._interval else 0.0

    def wrote(self, now: float, lag_s: float | None) -> None:
        """
        One is being written now.

        ``lag_s`` is how long it took from its start until it could be; None: it was written before (a redirect).
        """
        if self._interval:
            self._tat = max(now, self._tat) + self._interval
        if lag_s is not None:
            self.unwritten = max(0, self.unwritten - 1)
            self.lead = max(LEAD_S, self.lead * LEAD_KEPT, min(lag_s * 1.1, LEAD_MOST_S, self._interval / 2))
        self._start_tat = max(self._start_tat, self._tat + self.unwritten * self._interval)

    # Concurrency.

    def has_slot(self) -> bool:
        """Whether the concurrency allows one more."""
        return self.in_flight + 1 <= self.limit and self.breaker.lets_one_go()

    def started(self, now: float) -> None:
        """One was started now."""
        self.in_flight += 1
        self.breaker.started()
        if self._interval:
            self.unwritten += 1
            self._start_tat = max(now, self._start_tat) + self._interval

    def finished(
        self,
        now: float,
        *,
        started_mono: float,
        slower: bool,
        success: bool,
        hold_s: float,
        sign: HostSign = HostSign.NOTHING,
        written: bool = True,
    ) -> None:
        """One that was started at ``started_mono`` has ended; one that was not ``written`` gives its place back."""
        if slower:
            if started_mono >= self._cut_mono:
                # a later cut by those that were already under way would punish the same trouble again and again
                self._cut_mono = now
                self.limit = max(1.0, min(self.limit, float(self.in_flight)) / 2)
        elif success and self.limit < self.cap and self.in_flight * 2 > self.limit:
            # half of it: those that end together are counted one after another, and the first frees its slot
            step = 1.0 if self.limit < self._ramp_to else 1.0 / self.limit
            self.limit = min(self.cap, self.limit + step)
        if self._ramp_to and self.limit >= self._ramp_to:
            self._ramp_to = 0.0
            self.limit = max(self.limit, self.whole)
        self.told(now, started_mono, sign)
        self.in_flight -= 1
        if not written and self._interval:
            self.unwritten = max(0, self.unwritten - 1)
            self._start_tat = max(
                self._tat + self.unwritten * self._interval, self._start_tat - self._interval
            )
        if hold_s > 0:
            self.hold_until = max(self.hold_until, now + hold_s)

    def told(self, now: float, started_mono: float, sign: HostSign) -> None:
        """What an exchange that was started at ``started_mono`` says to the breaker."""
        if sign is ALIVE:
            if self.breaker.answered():
                self.ramp()
        elif sign is DOWN:
            self.breaker.failed(now, started_mono)
        else:
            self.breaker.came_to_nothing(started_mono)

    def ramp(self) -> None:
        """Begin with one at a time, and double."""
        self._ramp_to = self.whole if self.whole != NEVER else UNCAPPED_START
        self.limit = 1.0

    def forgettable(self, now: float) -> bool:
        """Whether a new gate would behave the same: at rest, and its limit recovered."""
        return self.at_rest(now) and self.untroubled()

    def at_rest(self, now: float) -> bool:
        """Whether nothing is in flight, the bucket is full, and no hold is left."""
        return self.in_flight == 0 and self._tat <= now and self.hold_until <= now

    def untroubled(self) -> bool:
        """Whether there is no failure to be remembered."""
        return not self.breaker.failures and self.limit >= min(self.cap, self.uncapped)
