"""A world for the lanes: hosts that answer as a test says, under a clock that jumps from one thing to the next."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from hookd.core.model import Delivery, DeliveryId, EndpointKey, Event, HostSign, Verdict, VerdictKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookd.core.lanes import Lanes

DELIVERED = Verdict(VerdictKind.DELIVERED, host=HostSign.ALIVE)
REFUSED = Verdict(VerdictKind.RETRY, slow_lane=True, endpoint_failed=True, host=HostSign.DOWN)
FAILED = Verdict(VerdictKind.RETRY, endpoint_failed=True, host=HostSign.ALIVE)


def delivery(number: int, endpoint: int = 1, attempt: int = 0) -> Delivery:
    return Delivery(
        DeliveryId(number), EndpointKey(endpoint), Event(UUID(int=1), "a", "t", b"{}", 0.0), attempt, 0
    )


@dataclass(slots=True)
class Start:
    """An exchange that was started."""

    at: float
    host: str
    delivery: Delivery
    verdict: Verdict
    takes: float
    ended: float = float("inf")
    written: float | None = None


@dataclass
class World:
    """
    ``answers`` says for a host and a time how long an exchange takes and what comes of it.

    ``lag`` says how long it takes from its start until it could be written; of that time ``lanes`` knows nothing.
    """

    lanes: Lanes
    answers: Callable[[str, float], tuple[float, Verdict]]
    max_in_flight: int = 2000
    now: float = 0.0
    starts: list[Start] = field(default_factory=list)
    answers_for: Callable[[EndpointKey], tuple[float, Verdict]] | None = None
    """In place of ``answers``, by endpoint."""
    on_end: Callable[[Start], None] = lambda _: None
    after_turn: Callable[[World], None] = lambda _: None
    lag: Callable[[], float] = lambda: 0.0
    parked: list[tuple[float, EndpointKey, bool]] = field(default_factory=list)
    _hosts: dict[EndpointKey, str] = field(default_factory=dict)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: int = 0
    _under_way: int = 0

    def admit(self, host: str, count: int = 1, endpoint: int = 1, attempt: int = 0) -> None:
        """Let so many deliveries wait."""
        self._hosts[EndpointKey(endpoint)] = host
        for _ in range(count):
            self._numbers += 1
            self.lanes.admit(host, delivery(self._numbers, endpoint, attempt), self.now)

    def run(self, until: float) -> None:
        """Go on to this time."""
        while True:
            self._turn()
            next_at = min(
                self._events[0][0] if self._events else until,
                self.lanes.next_wake(self.now) or until,
            )
            if next_at >= until:
                self.now = until
                return
            # rounding must not make it stand still
            self.now = max(next_at, self.now + 1e-9)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()

    def in_flight(self, host: str, at: float) -> int:
        """How many exchanges with a host were under way."""
        return sum(1 for s in self.starts if s.host == host and s.at <= at < s.ended)

    def most_in_flight(self, host: str, since: float, until: float) -> int:
        """The most at once in a time."""
        return max(
            (self.in_flight(host, s.at) for s in self.starts if s.host == host and since <= s.at < until),
            default=0,
        )

    def _at(self, at: float, what: Callable[[], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (at, self._numbers, what))

    def _turn(self) -> None:
        for started in self.lanes.ready(self.now, self.max_in_flight - self._under_way):
            host = self._hosts[started.endpoint]
            takes, verdict = (
                self.answers(host, self.now)
                if self.answers_for is None
                else self.answers_for(started.endpoint)
            )
            start = Start(self.now, host, started, verdict, takes)
            self.starts.append(start)
            self._under_way += 1
            if self.lanes.paced(started):
                self._at(self.now + self.lag(), partial(self._write, start))
            else:
                self._answer(start)
        self.after_turn(self)

    def _write(self, start: Start) -> None:
        at = self.lanes.write_at(start.delivery, self.now)
        if at > self.now:
            self._at(at, partial(self._write, start))
            return
        self.lanes.wrote(start.delivery, self.now)
        start.written = self.now
        self._answer(start)

    def _answer(self, start: Start) -> None:
        start.ended = self.now + start.takes
        self._at(start.ended, partial(self._end, start))

    def _end(self, start: Start) -> None:
        self._under_way -= 1
        parked = self.lanes.finished(start.delivery, start.verdict, self.now)
        if parked is not None:
            self.parked.append((self.now, start.delivery.endpoint, parked))
        self.on_end(start)
