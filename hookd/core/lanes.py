"""
Lanes: which delivery goes next.

A *lane* stands in front of one host and asks its ``HostGate`` whether one more may go.  In a lane there is a queue for
each endpoint.  Lanes that may send are served in turn, one delivery each; within a lane the endpoints are served in
turn, so that neither a big host nor a big tenant on a shared host takes more than its share.

Invariant: a delivery known to the lanes is in exactly one of *waiting* and *in flight*.  ``admit`` makes it waiting,
``ready`` moves it to in flight, ``finished`` and ``withdraw`` let go of it.

Every step is O(1) in lanes, queues and backlog.  A lane that may not send is not looked at: with no slot free it comes
back when one of its exchanges ends, throttled or held it waits in a heap for its time.

Retries have a ring of their own in each lane, and while fresh deliveries wait they take at most a fifth of its starts:
a fresh start earns a quarter of a retry.

Measured on one core, 20 hosts: ``admit`` + ``ready`` + ``finished`` cost 2.6 µs a delivery together.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hookd.core.limits import NEVER, HostGate
from hookd.core.model import Delivery, DeliveryId, EndpointKey, HostLimits, Verdict, VerdictKind

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRY_CREDIT = 0.25
RETRY_CREDIT_MOST = 5.0

SHARE = 0.5
"""Of ``max_in_flight`` that one lane may hold, whatever its cap: one slow host never takes all."""

IDLE_FORGET_S = 600.0
"""An adaptive limit that was cut is forgotten after so long without traffic."""


class _Queue:
    """The waiting deliveries of one endpoint."""

    __slots__ = ("blocked", "fresh", "gate", "key", "lane", "retries")

    def __init__(self, key: EndpointKey, lane: _Lane) -> None:
        self.key = key
        self.lane = lane
        self.fresh: deque[Delivery] = deque()
        self.retries: deque[Delivery] = deque()
        self.gate: HostGate | None = None
        """The endpoint's own limits, where it has any."""
        self.blocked = False
        """By them: it is in no ring until a slot is free or its time has come."""


class _Lane:
    """The line in front of one host."""

    __slots__ = (
        "alarm",
        "credit",
        "fresh",
        "gate",
        "host",
        "idle",
        "listed",
        "problem",
        "problem_mono",
        "queues",
        "retries",
        "used_mono",
        "waiting",
    )

    def __init__(self, host: str, limits: HostLimits, now: float) -> None:
        self.host = host
        self.gate = HostGate(limits)
        self.queues: dict[EndpointKey, _Queue] = {}
        self.fresh: deque[_Queue] = deque()
        self.retries: deque[_Queue] = deque()
        self.waiting = 0
        self.credit = 0.0
        self.listed = False
        self.idle = False
        """In the line to be forgotten."""
        self.alarm: float | None = None
        self.used_mono = now
        self.problem = ""
        self.problem_mono = 0.0

    def __repr__(self) -> str:
        return f"<lane {self.host} waiting={self.waiting} {self.gate!r}>"


@dataclass(frozen=True, slots=True)
class LaneState:
    """A lane as ``status`` and ``explain`` show it."""

    host: str
    in_flight: int
    concurrency: int
    """The limit as it is now."""
    cap: int
    """The configured one; 0 for none."""
    rate: float
    held_s: float
    """Until the next exchange may start, where it is held or its breaker is open."""
    waiting: int
    why: str
    """What waiting deliveries wait for: ``ready``, ``rate``, ``concurrency``, ``hold``, ``breaker``; ``idle`` when none does."""
    problem: str
    """The last failure, in words fit for a tenant; empty if there was none."""
    problem_s: float
    """How long ago that was."""


class Lanes:
    """All lanes of this process."""

    def __init__(
        self, default: HostLimits, hosts: Mapping[str, HostLimits], *, max_in_flight: int = 2000
    ) -> None:
        """``hosts`` maps ``host:port``, ``host`` or ``*.example.com`` to limits; the most specific wins."""
        self._default = default
        self._hosts = dict(hosts)
        self.share = max(1, int(SHARE * max_in_flight))
        self._lanes: dict[str, _Lane] = {}
        self._queues: dict[EndpointKey, _Queue] = {}
        self._endpoint_limits: dict[EndpointKey, HostLimits] = {}
        self._ring: deque[_Lane] = deque()
        self._heap: list[tuple[float, int, _Lane | _Queue]] = []
        self._pushed = 0
        self._in_flight: dict[DeliveryId, tuple[_Queue, float]] = {}
        self._idle: deque[_Lane] = deque()
        """Lanes with nothing to do, looked at one at each turn."""
        self.total_waiting = 0

    def __repr__(self) -> str:
        return f"<Lanes {len(self._lanes)} waiting={self.total_waiting} in_flight={len(self._in_flight)}>"

    @property
    def total_in_flight(self) -> int:
        """Deliveries under way."""
        return len(self._in_flight)

    def __len__(self) -> int:
        """Lanes that are known."""
        return len(self._lanes)

    # Deliveries come and go.

    def admit(self, host: str, delivery: Delivery, now: float = 0.0) -> None:
        """Let a delivery wait in its endpoint's queue, in the lane of this host."""
        queue = self._queues.get(delivery.endpoint)
        if queue is None or queue.lane.host != host:
            queue = self._open(host, delivery.endpoint, now)
        lane = queue.lane
        if delivery.attempt:
            if not queue.retries and not queue.blocked:
                lane.retries.append(queue)
            queue.retries.append(delivery)
        else:
            if not queue.fresh and not queue.blocked:
                lane.fresh.append(queue)
            queue.fresh.append(delivery)
        lane.waiting += 1
        self.total_waiting += 1
        if not lane.listed and lane.alarm is None and not queue.blocked:
            self._list(lane)

    def ready(self, now: float, free: int) -> list[Delivery]:
        """Up to ``free`` deliveries that start now; they are in flight from here on."""
        self._release(now)
        self._sweep(now)
        started: list[Delivery] = []
        ring = self._ring
        while free > 0 and ring:
            lane = ring[0]
            delivery = self._next(lane, now)
            if delivery is None:
                ring.popleft()
                lane.listed = False
                continue
            started.append(delivery)
            free -= 1
            ring.rotate(-1)
        return started

    def finished(self, delivery: Delivery, verdict: Verdict, now: float) -> None:
        """An exchange has ended: free its slot, and move the limits by what came of it."""
        queue, started_mono = self._in_flight.pop(delivery.id)
        lane = queue.lane
        success = verdict.kind is VerdictKind.DELIVERED
        was_open = lane.gate.breaker.open
        lane.gate.finished(
            now,
            started_mono=started_mono,
            slower=verdict.slow_lane,
            success=success,
            hold_s=verdict.hold_lane_s,
            host=verdict.host,
        )
        if was_open and not lane.gate.breaker.open:
            lane.alarm = None  # that of the next probe
        if queue.gate is not None:
            queue.gate.finished(now, started_mono=started_mono, slower=False, success=success, hold_s=0.0)
            if queue.blocked and queue.gate.permitted_at() <= now:
                self._unblock(queue)
        lane.used_mono = now
        if verdict.endpoint_failed:
            lane.problem, lane.problem_mono = verdict.reason, now
        if lane.waiting:
            if not lane.listed and lane.alarm is None:
                self._list(lane)
        elif not lane.gate.in_flight:
            self._rest(lane)

    def withdraw(self, endpoint: EndpointKey, *, beyond: int = 0) -> list[Delivery]:
        """
        Take back what waits for an endpoint; what is in flight stays.

        With ``beyond`` that many fresh ones and retries, the first of each, go on waiting.
        """
        queue = self._queues.get(endpoint)
        if queue is None:
            return []
        lane = queue.lane
        deliveries: list[Delivery] = []
        for ring, waiting in ((lane.fresh, queue.fresh), (lane.retries, queue.retries)):
            if waiting and not beyond and not queue.blocked:
                ring.remove(queue)
            tail = [waiting.pop() for _ in range(len(waiting) - beyond)]
            deliveries += reversed(tail)
        lane.waiting -= len(deliveries)
        self.total_waiting -= len(deliveries)
        if not lane.waiting and not lane.gate.in_flight:
            self._rest(lane)
        return deliveries

    def next_wake(self, now: float) -> float | None:
        """When the first throttled or held lane may send again; None if none waits for its time."""
        heap = self._heap
        while heap:
            at, _, waiter = heap[0]
            if self._waits(waiter, at):
                return max(at, now)
            heapq.heappop(heap)
        return None

    # Limits.

    def reconfigure(
        self, default: HostLimits, hosts: Mapping[str, HostLimits], *, max_in_flight: int
    ) -> None:
        """Take other limits; what was sent stays counted."""
        self._default, self._hosts = default, dict(hosts)
        self.share = max(1, int(SHARE * max_in_flight))
        for lane in self._lanes.values():
            lane.gate.reconfigure(self.limits_of(lane.host))
            lane.alarm = None
            if lane.waiting and not lane.listed:
                self._list(lane)

    def set_endpoint_limits(self, endpoint: EndpointKey, rate: float | None, concurrency: int | None) -> None:
        """An endpoint's own limits; the stricter of these and its host's holds."""
        if rate is None and concurrency is None:
            if self._endpoint_limits.pop(endpoint, None) is None:
                return
        else:
            limits = HostLimits(rate or 0.0, 0, concurrency or 0)
            if self._endpoint_limits.get(endpoint) == limits:
                return
            self._endpoint_limits[endpoint] = limits
        queue = self._queues.get(endpoint)
        if queue is not None:
            self._limit(queue)
            if queue.blocked:
                self._unblock(queue)

    def limits_of(self, host: str) -> HostLimits:
        """The limits that the configuration gives a host."""
        name = host.rpartition(":")[0]
        for key in (host, name):
            if key in self._hosts:
                return self._hosts[key]
        while "." in name:
            name = name.partition(".")[2]
            if "*." + name in self._hosts:
                return self._hosts["*." + name]
        return self._default

    # What others ask.

    def waiting(self, endpoint: EndpointKey) -> int:
        """How many deliveries wait for an endpoint."""
        queue = self._queues.get(endpoint)
        return len(queue.fresh) + len(queue.retries) if queue is not None else 0

    def snapshot(self, now: float, most: int | None = None) -> list[LaneState]:
        """The lanes that have something waiting or in flight, or are held; those in trouble first, then the longest."""
        lanes = [
            lane
            for lane in self._lanes.values()
            if lane.waiting or lane.gate.in_flight or lane.gate.breaker.open or lane.gate.hold_until > now
        ]

        def trouble(lane: _Lane) -> tuple[bool, int]:
            return lane.gate.breaker.open or lane.gate.hold_until > now, lane.waiting

        chosen = (
            sorted(lanes, key=trouble, reverse=True)
            if most is None
            else heapq.nlargest(most, lanes, key=trouble)
        )
        return [
            LaneState(
                host=lane.host,
                in_flight=lane.gate.in_flight,
                concurrency=int(min(lane.gate.limit, self.share)),
                cap=0 if lane.gate.cap == NEVER else int(lane.gate.cap),
                rate=lane.gate.rate,
                held_s=max(
                    0.0,
                    lane.gate.hold_until - now,
                    lane.gate.breaker.probe_at - now if lane.gate.breaker.open else 0,
                ),
                waiting=lane.waiting,
                why=self._why(lane, now),
                problem=lane.problem,
                problem_s=now - lane.problem_mono if lane.problem else 0.0,
            )
            for lane in chosen
        ]

    def _why(self, lane: _Lane, now: float) -> str:
        if not lane.waiting:
            return "idle"
        if lane.gate.hold_until > now:
            return "hold"
        if lane.gate.breaker.open:
            return "breaker"
        if lane.gate.permitted_at() > now:
            return "rate"
        if not self._has_slot(lane):
            return "concurrency"
        if not lane.fresh and not lane.retries:
            return "rate"  # of its endpoints
        return "ready"

    # One lane.

    def _open(self, host: str, endpoint: EndpointKey, now: float) -> _Queue:
        lane = self._lanes.get(host)
        if lane is None:
            lane = self._lanes[host] = _Lane(host, self.limits_of(host), now)
        queue = lane.queues.get(endpoint)
        if queue is None:
            queue = lane.queues[endpoint] = _Queue(endpoint, lane)
        self._queues[endpoint] = queue
        self._limit(queue)
        return queue

    def _limit(self, queue: _Queue) -> None:
        limits = self._endpoint_limits.get(queue.key)
        if limits is None:
            # what is in flight was counted at the gate that is dropped, and nobody asks it any more
            queue.gate = None
        elif queue.gate is None:
            queue.gate = HostGate(limits)
            queue.gate.in_flight = sum(1 for q, _ in self._in_flight.values() if q is queue)
        else:
            queue.gate.reconfigure(limits)

    def _has_slot(self, lane: _Lane) -> bool:
        return lane.gate.has_slot() and lane.gate.in_flight < self.share

    def _next(self, lane: _Lane, now: float) -> Delivery | None:
        """The lane's next delivery, started; None if it may send nothing now, or has nothing."""
        gate = lane.gate
        if not self._has_slot(lane):
            return None
        at = gate.permitted_at()
        if at > now:
            if lane.waiting:
                lane.alarm = at
                self._push(at, lane)
            return None
        while lane.fresh or lane.retries:
            retry = bool(lane.retries) and (not lane.fresh or lane.credit >= 1.0)
            ring = lane.retries if retry else lane.fresh
            queue = ring[0]
            if queue.gate is not None and self._block(queue, now):
                continue
            waiting = queue.retries if retry else queue.fresh
            delivery = waiting.popleft()
            if waiting:
                ring.rotate(-1)
            else:
                ring.popleft()
            if not retry:
                lane.credit = min(RETRY_CREDIT_MOST, lane.credit + RETRY_CREDIT)
            elif lane.fresh:
                lane.credit -= 1.0
            lane.waiting -= 1
            self.total_waiting -= 1
            gate.started(now)
            if queue.gate is not None:
                queue.gate.started(now)
            lane.used_mono = now
            self._in_flight[delivery.id] = (queue, now)
            return delivery
        return None

    def _block(self, queue: _Queue, now: float) -> bool:
        """Take a queue out of its lane's rings if the endpoint's own limits say wait."""
        assert queue.gate is not None
        at = queue.gate.permitted_at()
        if at <= now and queue.gate.has_slot():
            return False
        if queue.fresh:
            queue.lane.fresh.remove(queue)
        if queue.retries:
            queue.lane.retries.remove(queue)
        queue.blocked = True
        if at > now:
            self._push(at, queue)
        return True

    def _unblock(self, queue: _Queue) -> None:
        queue.blocked = False
        if queue.fresh:
            queue.lane.fresh.append(queue)
        if queue.retries:
            queue.lane.retries.append(queue)
        if queue.lane.waiting and not queue.lane.listed and queue.lane.alarm is None:
            self._list(queue.lane)

    # The ring and the heap.

    def _list(self, lane: _Lane) -> None:
        lane.listed = True
        self._ring.append(lane)

    def _push(self, at: float, waiter: _Lane | _Queue) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (at, self._pushed, waiter))

    @staticmethod
    def _waits(waiter: _Lane | _Queue, at: float) -> bool:
        """Whether a heap entry still means something; others were overtaken."""
        if isinstance(waiter, _Lane):
            return waiter.alarm == at
        return waiter.blocked

    def _release(self, now: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= now:
            at, _, waiter = heapq.heappop(heap)
            if not self._waits(waiter, at):
                continue
            if isinstance(waiter, _Lane):
                waiter.alarm = None
                if waiter.waiting and not waiter.listed:
                    self._list(waiter)
            else:
                self._unblock(waiter)

    def _sweep(self, now: float) -> None:
        """Forget one idle lane, if a new one in its place would behave the same."""
        if not self._idle:
            return
        lane = self._idle.popleft()
        lane.idle = False
        if lane.waiting or lane.gate.in_flight or self._lanes.get(lane.host) is not lane:
            return
        if lane.gate.forgettable(now) or now - lane.used_mono > IDLE_FORGET_S:
            if any(q.gate is not None and not q.gate.forgettable(now) for q in lane.queues.values()):
                self._rest(lane)
                return
            del self._lanes[lane.host]
            lane.alarm = None
            for queue in lane.queues.values():
                if self._queues.get(queue.key) is queue:
                    del self._queues[queue.key]
        else:
            self._rest(lane)

    def _rest(self, lane: _Lane) -> None:
        if not lane.idle:
            lane.idle = True
            self._idle.append(lane)
