"""A world for the lanes: hosts that answer as a test says, under a clock that jumps from one thing to the next."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
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
    ended: float


@dataclass
class World:
    """``answers`` says for a host and a time how long an exchange takes and what comes of it."""

    lanes: Lanes
    answers: Callable[[str, float], tuple[float, Verdict]]
    max_in_flight: int = 2000
    now: float = 0.0
    starts: list[Start] = field(default_factory=list)
    on_end: Callable[[Start], None] = lambda _: None
    _hosts: dict[EndpointKey, str] = field(default_factory=dict)
    _under_way: list[tuple[float, int, Start]] = field(default_factory=list)
    _numbers: int = 0

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
                self._under_way[0][0] if self._under_way else until,
                self.lanes.next_wake(self.now) or until,
            )
            if next_at >= until:
                self.now = until
                return
            # rounding must not make it stand still
            self.now = max(next_at, self.now + 1e-9)
            while self._under_way and self._under_way[0][0] <= self.now:
                _, _, start = heapq.heappop(self._under_way)
                self.lanes.finished(start.delivery, start.verdict, self.now)
                self.on_end(start)

    def in_flight(self, host: str, at: float) -> int:
        """How many exchanges with a host were under way."""
        return sum(1 for s in self.starts if s.host == host and s.at <= at < s.ended)

    def most_in_flight(self, host: str, since: float, until: float) -> int:
        """The most at once in a time."""
        return max(
            (self.in_flight(host, s.at) for s in self.starts if s.host == host and since <= s.at < until),
            default=0,
        )

    def _turn(self) -> None:
        for started in self.lanes.ready(self.now, self.max_in_flight - len(self._under_way)):
            host = self._hosts[started.endpoint]
            takes, verdict = self.answers(host, self.now)
            start = Start(self.now, host, started, verdict, self.now + takes)
            self.starts.append(start)
            heapq.heappush(self._under_way, (start.ended, len(self.starts), start))
