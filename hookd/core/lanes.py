"""
Lanes: which delivery goes next.

A *lane* stands in front of one host and asks its ``Gate`` whether one more may go.  In a lane there is a queue for each
endpoint.  Lanes that may send are served in turn, one delivery each; within a lane the endpoints are served in turn, so
that neither a big host nor a big tenant on a shared host takes more than its share.  It is deficit round robin in which
every delivery costs one: limits count requests, and so does fairness.

Invariant: a delivery known to the lanes is in exactly one of *waiting* and *in flight*.  ``admit`` makes it waiting,
``ready`` moves it to in flight, ``finished`` and ``withdraw`` let go of it.

Every step is O(1) in lanes, queues and backlog.  A lane that may not send is not looked at: with no slot free it comes
back when one of its exchanges ends, throttled or held it waits in a heap for its time.  A queue that may not send, or has
become empty, is dropped from its ring when its turn comes, and not looked for before.

Retries, and replays that are not urgent, have a ring of their own in each lane, and while fresh deliveries wait they
take at most a fifth of its starts: a fresh start earns a quarter of a retry.

No lane holds more exchanges than there are slots left: one slow host takes half of ``max_in_flight`` at most, n of them
leave 1/(n + 1) of it to the others (dynamic thresholds, Choudhury and Hahne 1998), without anybody being counted.

An endpoint has a gate of its own where it has limits of its own, and while it fails: one that answers nothing but errors
is *parked* (``core.breaker.ENDPOINT``), with a probe now and then, and comes back in a ramp.

Measured on one core, 20 hosts: ``admit`` + ``ready`` + ``finished`` cost 4 µs a delivery together, 5 µs with a rate.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from hookd.core.breaker import ENDPOINT
from hookd.core.limits import NEVER, Gate
from hookd.core.model import (
    ALIVE,
    DELIVERED,
    DOWN,
    HOLD,
    Delivery,
    DeliveryId,
    EndpointKey,
    HostLimits,
    HostSign,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

RETRY_CREDIT = 0.25
RETRY_CREDIT_MOST = 5.0

CRAMPED_AT_ONCE = 2
"""Lanes that are looked at again when an exchange ends, of those that held as many slots as were left."""

LOOKED_AT = 1000
"""Lanes of one snapshot."""

PROBLEM_SHOWN_S = 60.0
"""For so long an error counts as trouble, though nothing waits."""

NO_LIMITS = HostLimits(0.0, 0, 0)

IDLE_FORGET_S = 600.0
"""An adaptive limit that was cut is forgotten after so long without traffic."""


EMPTY: Any = ()
"""In the place of a deque that nothing was put into yet: one costs 0.7 KB, and most endpoints have no retries, or nothing."""


class _Queue:
    """The waiting deliveries of one endpoint."""

    __slots__ = (
        "alarm",
        "blocked",
        "fresh",
        "gate",
        "in_fresh",
        "in_retries",
        "key",
        "lane",
        "retries",
        "timed",
    )

    def __init__(self, key: EndpointKey, lane: _Lane) -> None:
        self.key = key
        self.lane = lane
        self.fresh: deque[Delivery] = EMPTY
        self.retries: deque[Delivery] = EMPTY
        """With them the replays that are not urgent."""
        self.timed = 0
        """Of both: those that had a due time."""
        self.in_fresh = False
        """In the lane's ring of this name, perhaps still: it is dropped from there when its turn comes."""
        self.in_retries = False
        self.gate: Gate | None = None
        """The endpoint's own limits, where it has any, and its breaker while it fails."""
        self.blocked = False
        """By them: it is passed over until a slot is free or its time has come."""
        self.alarm: float | None = None

    def __repr__(self) -> str:
        return f"<queue {self.key} fresh={len(self.fresh)} retries={len(self.retries)} {self.gate!r}>"


class _Flight:
    """An exchange under way."""

    __slots__ = ("gates", "queue", "ready_mono", "started_mono", "written")

    def __init__(self, queue: _Queue, gates: tuple[Gate, ...], started_mono: float) -> None:
        self.queue = queue
        self.gates = gates
        """Those that count it: the lane's, and the endpoint's if it had one."""
        self.started_mono = started_mono
        self.ready_mono: float | None = None
        """When it could first be written."""
        self.written = False


class _Lane:
    """The line in front of one host."""

    __slots__ = (
        "alarm",
        "cramped",
        "credit",
        "fresh",
        "gate",
        "gates",
        "host",
        "idle",
        "listed",
        "ours",
        "problem",
        "problem_mono",
        "queues",
        "retries",
        "used_mono",
        "waiting",
    )

    def __init__(self, host: str, limits: HostLimits, now: float) -> None:
        self.host = host
        self.gate = Gate(limits)
        self.gates: tuple[Gate, ...] = (self.gate,)
        """Those that count an exchange of an endpoint that has none of its own."""
        self.queues: dict[EndpointKey, _Queue] = {}
        self.fresh: deque[_Queue] = EMPTY
        self.retries: deque[_Queue] = EMPTY
        self.waiting = 0
        self.credit = 0.0
        self.listed = False
        self.cramped = False
        """It holds as many slots as were left, and waits for one to become free."""
        self.idle = False
        """In the line to be forgotten."""
        self.alarm: float | None = None
        self.used_mono = now
        self.problem = ""
        self.problem_mono = 0.0
        self.ours = ""
        """The fault of this machine for which it was held last; empty if it was for the host's."""

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
    """What waiting deliveries wait for: ``ready``, ``rate``, ``concurrency``, ``hold``, ``breaker``, ``endpoint`` (the limits
    of its endpoints, or all are parked), ``share`` (of ``max_in_flight``), ``machine`` (a fault of this one); ``idle`` when
    none does."""
    breaker_open: bool
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
        self._max_in_flight = max_in_flight
        self._lanes: dict[str, _Lane] = {}
        self._queues: dict[EndpointKey, _Queue] = {}
        self._endpoint_limits: dict[EndpointKey, HostLimits] = {}
        self._parked: set[EndpointKey] = set()
        self._cramped: OrderedDict[_Lane, None] = OrderedDict()
        self._ring: deque[_Lane] = deque()
        self._heap: list[tuple[float, int, _Lane | _Queue]] = []
        self._pushed = 0
        self._in_flight: dict[DeliveryId, _Flight] = {}
        self._idle: deque[_Lane] = deque()
        """Lanes with nothing to do, looked at one at each turn."""
        self._failed: dict[_Lane, None] = {}
        """Lanes with an error of late, the last one last."""
        self._shown: list[_Lane] = []
        self._looked_at = 0
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
        if delivery.attempt or (delivery.replay and delivery.due_at is not None):
            if queue.retries is EMPTY:
                queue.retries = deque()
            queue.retries.append(delivery)
        else:
            if queue.fresh is EMPTY:
                queue.fresh = deque()
            queue.fresh.append(delivery)
        if delivery.due_at is not None:
            queue.timed += 1
        if not queue.blocked:
            self._enter(queue)
        lane.waiting += 1
        self.total_waiting += 1
        if not queue.blocked:
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

    def finished(self, delivery: Delivery, verdict: Verdict, now: float) -> bool | None:
        """
        An exchange has ended: free its slot, and move the limits by what came of it.

        Returns whether the endpoint is parked from now on (True), or is not any more (False); None: as before.
        """
        flight = self._in_flight.pop(delivery.id)
        queue = flight.queue
        lane = queue.lane
        success = verdict.kind is DELIVERED
        lane.gate.finished(
            now,
            started_mono=flight.started_mono,
            slower=verdict.slow_lane,
            success=success,
            hold_s=verdict.hold_lane_s,
            sign=verdict.host,
            written=flight.written,
        )
        if lane.alarm is not None and lane.gate.permitted_at() < lane.alarm:
            lane.alarm = None  # the breaker closed, or a place in the rate was given back
        parked = None
        if queue.gate is not None or (verdict.endpoint_failed and verdict.host is not DOWN):
            parked = self._endpoint_finished(flight, verdict, now, success=success)
        lane.used_mono = now
        if verdict.hold_lane_s:
            lane.ours = verdict.reason if verdict.kind is HOLD else ""
        if lane.cramped:
            lane.cramped = False
            del self._cramped[lane]
        if verdict.endpoint_failed:
            lane.problem, lane.problem_mono = verdict.reason, now
            self._failed.pop(lane, None)
            self._failed[lane] = None
        if self._cramped:
            self._uncramp()
        if lane.waiting:
            self._list(lane)
        elif not lane.gate.in_flight:
            self._rest(lane)
        return parked

    def _uncramp(self) -> None:
        """A slot is free: those that have waited for one come first, and the lane that gave it back after them."""
        for _ in range(min(CRAMPED_AT_ONCE, len(self._cramped))):
            lane, _ = self._cramped.popitem(last=False)
            lane.cramped = False
            self._list(lane)

    def _endpoint_finished(
        self, flight: _Flight, verdict: Verdict, now: float, *, success: bool
    ) -> bool | None:
        queue = flight.queue
        gate = queue.gate
        if gate is None:
            gate = self._make_gate(queue, NO_LIMITS)
            flight.gates = (*flight.gates, gate)
            gate.in_flight += 1
        sign = HostSign.NOTHING
        if success:
            sign = ALIVE
        elif verdict.endpoint_failed and verdict.host is not DOWN:
            sign = DOWN
        was_open = gate.breaker.open
        if gate in flight.gates:
            gate.finished(
                now,
                started_mono=flight.started_mono,
                slower=False,
                success=success,
                hold_s=0.0,
                sign=sign,
                written=flight.written,
            )
        else:
            gate.told(now, flight.started_mono, sign)
        self._settle_queue(queue)
        if gate.breaker.open == was_open:
            return None
        (self._parked.add if gate.breaker.open else self._parked.discard)(queue.key)
        return gate.breaker.open

    def _settle_queue(self, queue: _Queue) -> None:
        """The endpoint's gate may have opened, or may not be needed any more."""
        gate = queue.gate
        assert gate is not None
        if queue.key not in self._endpoint_limits and gate.untroubled():
            queue.gate = gate = None
        if queue.blocked and (
            gate is None or (gate.has_slot() and (queue.alarm is None or gate.permitted_at() < queue.alarm))
        ):
            self._unblock(queue)  # and it is blocked again, with an alarm, if its time has not come

    # The moment of the write.

    def paced(self, delivery: Delivery) -> bool:
        """Whether the write of one in flight has to be asked for."""
        for gate in self._in_flight[delivery.id].gates:  # noqa: SIM110 - a generator costs a microsecond a delivery
            if gate.rate:
                return True
        return False

    def write_at(self, delivery: Delivery, now: float) -> float:
        """When a request of one in flight may be written; asked as soon as it could be."""
        flight = self._in_flight[delivery.id]
        if flight.ready_mono is None:
            flight.ready_mono = now
        return max(gate.write_at() for gate in flight.gates)

    def wrote(self, delivery: Delivery, now: float) -> None:
        """A request of one in flight is being written."""
        flight = self._in_flight[delivery.id]
        ready_mono = now if flight.ready_mono is None else flight.ready_mono
        lag_s = None if flight.written else ready_mono - flight.started_mono
        for gate in flight.gates:
            gate.wrote(now, lag_s)
        flight.written = True

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
        for waiting in (queue.fresh, queue.retries):
            tail = [waiting.pop() for _ in range(len(waiting) - beyond)]
            deliveries += reversed(tail)
        queue.timed -= sum(delivery.due_at is not None for delivery in deliveries)
        self._left(lane, len(deliveries))
        return deliveries

    def withdraw_one(self, endpoint: EndpointKey, delivery_id: DeliveryId) -> Delivery | None:
        """Take back one that waits for its first attempt; None if it does not.  O(n) in its queue in memory."""
        queue = self._queues.get(endpoint)
        if queue is None:
            return None
        for place, delivery in enumerate(queue.fresh):
            if delivery.id == delivery_id:
                del queue.fresh[place]
                queue.timed -= delivery.due_at is not None
                self._left(queue.lane, 1)
                return delivery
        return None

    def _left(self, lane: _Lane, count: int) -> None:
        lane.waiting -= count
        self.total_waiting -= count
        if not lane.waiting and not lane.gate.in_flight:
            self._rest(lane)

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
        self, default: HostLimits, hosts: Mapping[str, HostLimits], *, max_in_flight: int, now: float
    ) -> None:
        """Take other limits; what was sent stays counted."""
        self._default, self._hosts = default, dict(hosts)
        self._max_in_flight = max_in_flight
        for lane in self._lanes.values():
            lane.gate.reconfigure(self.limits_of(lane.host), now)
            lane.alarm = None
            self._list(lane)

    def set_endpoint(
        self, endpoint: EndpointKey, rate: float | None, concurrency: int | None, *, parked: bool, now: float
    ) -> None:
        """An endpoint's own limits (the stricter of these and its host's holds), and whether it is parked."""
        if rate is None and concurrency is None:
            self._endpoint_limits.pop(endpoint, None)
        else:
            self._endpoint_limits[endpoint] = HostLimits(rate or 0.0, 0, concurrency or 0)
        (self._parked.add if parked else self._parked.discard)(endpoint)
        queue = self._queues.get(endpoint)
        if queue is not None:
            self._limit(queue, now)

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

    def waiting_timed(self, endpoint: EndpointKey) -> int:
        """How many of them had a due time."""
        queue = self._queues.get(endpoint)
        return queue.timed if queue is not None else 0

    def snapshot(self, now: float, most: int | None = None) -> list[LaneState]:
        """
        The lanes that have something to do, or are in trouble or were lately; these first, then the longest.

        With ``most`` that many, and of more than ``LOOKED_AT`` lanes a part is looked at: those that failed last, those
        shown last, and the next ones in turn.  (10,000 lanes once a second cost a tenth of a core, in one stall.)
        """
        ranked = []
        for n, lane in enumerate(self._lanes.values() if most is None else self._candidates()):
            gate = lane.gate
            stopped = gate.breaker.open or gate.hold_until > now
            lately = lane.problem != "" and now - lane.problem_mono < PROBLEM_SHOWN_S
            if stopped or lately or lane.waiting or gate.in_flight:
                ranked.append((stopped, lately, lane.waiting, n, lane))
            if not (stopped or lately):
                self._failed.pop(lane, None)
        ranked.sort(reverse=True)
        self._shown = [lane for *_, lane in ranked[:most]]
        return [
            LaneState(
                host=lane.host,
                in_flight=lane.gate.in_flight,
                concurrency=int(lane.gate.limit),
                cap=0 if lane.gate.cap == NEVER else int(lane.gate.cap),
                rate=lane.gate.rate,
                held_s=max(
                    0.0,
                    lane.gate.hold_until - now,
                    lane.gate.breaker.probe_at - now if lane.gate.breaker.open else 0,
                ),
                waiting=lane.waiting,
                why=why,
                breaker_open=lane.gate.breaker.open,
                problem=lane.ours if why == "machine" else lane.problem,
                problem_s=now - lane.problem_mono if lane.problem and why != "machine" else 0.0,
            )
            for lane in self._shown
            for why in (self._why(lane, now),)
        ]

    def _candidates(self) -> Iterable[_Lane]:
        """The lanes that a snapshot looks at."""
        if len(self._lanes) <= LOOKED_AT:
            return list(self._lanes.values())
        first = self._looked_at if self._looked_at < len(self._lanes) else 0
        self._looked_at = first + LOOKED_AT
        chosen = dict.fromkeys(islice(self._lanes.values(), first, self._looked_at))
        chosen |= dict.fromkeys(islice(reversed(self._failed), LOOKED_AT))
        return chosen | dict.fromkeys(lane for lane in self._shown if self._lanes.get(lane.host) is lane)

    def states(self, now: float) -> Counter[str]:
        """How many lanes wait for what."""
        return Counter(self._why(lane, now) for lane in self._lanes.values())

    def _why(self, lane: _Lane, now: float) -> str:
        if not lane.waiting:
            return "idle"
        if lane.gate.hold_until > now:
            return "machine" if lane.ours else "hold"
        if lane.gate.breaker.open:
            return "breaker"
        if lane.gate.permitted_at() > now:
            return "rate"
        if not lane.gate.has_slot():
            return "concurrency"
        if lane.cramped:
            return "share"
        if all(q.blocked for q in lane.queues.values() if q.fresh or q.retries):
            return "endpoint"
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
        self._limit(queue, now)
        return queue

    def _limit(self, queue: _Queue, now: float) -> None:
        """Give a queue the gate that its endpoint's limits and state ask for."""
        limits = self._endpoint_limits.get(queue.key, NO_LIMITS)
        parked = queue.key in self._parked
        if queue.gate is None:
            if limits is NO_LIMITS and not parked:
                return
            gate = self._make_gate(queue, limits)
            for flight in self._in_flight.values():
                if flight.queue is queue:
                    flight.gates = (*flight.gates, gate)
                    gate.in_flight += 1
        else:
            gate = queue.gate
            gate.reconfigure(limits, now)
        if parked and not gate.breaker.open:
            gate.breaker.open_since_before(now)
        elif not parked and gate.breaker.open:
            gate.breaker.answered()
            gate.ramp()
        self._settle_queue(queue)

    @staticmethod
    def _make_gate(queue: _Queue, limits: HostLimits) -> Gate:
        # without a cap of its own an endpoint is bounded by its host's limit only
        gate = queue.gate = Gate(limits, ENDPOINT, uncapped=NEVER)
        return gate

    def _next(self, lane: _Lane, now: float) -> Delivery | None:
        """The lane's next delivery, started; None if it may send nothing now, or has nothing."""
        if not self._permits(lane, now):
            return None
        gate = lane.gate
        while self._has_heads(lane):
            retry = bool(lane.retries) and (not lane.fresh or lane.credit >= 1.0)
            queue = lane.retries[0] if retry else lane.fresh[0]
            if queue.gate is not None and self._block(queue, now):
                continue
            if retry:
                lane.retries.rotate(-1)
                delivery = queue.retries.popleft()
                if lane.fresh:
                    lane.credit -= 1.0
            else:
                lane.fresh.rotate(-1)
                delivery = queue.fresh.popleft()
                lane.credit = min(RETRY_CREDIT_MOST, lane.credit + RETRY_CREDIT)
            if delivery.due_at is not None:
                queue.timed -= 1
            lane.waiting -= 1
            self.total_waiting -= 1
            gate.started(now)
            gates = lane.gates
            if queue.gate is not None:
                queue.gate.started(now)
                gates = (gate, queue.gate)
            lane.used_mono = now
            self._in_flight[delivery.id] = _Flight(queue, gates, now)
            return delivery
        return None

    def _permits(self, lane: _Lane, now: float) -> bool:
        """Whether a lane may start one more now; else it is seen to that it comes back."""
        gate = lane.gate
        if not gate.has_slot():
            return False
        if gate.in_flight and gate.in_flight >= self._max_in_flight - len(self._in_flight):
            lane.cramped = True
            self._cramped[lane] = None
            return False
        at = gate.permitted_at()
        if at > now:
            if lane.waiting:
                lane.alarm = at
                self._push(at, lane)
            return False
        return True

    @staticmethod
    def _has_heads(lane: _Lane) -> bool:
        """Whether it is some queue's turn; those that have nothing to give leave the rings here."""
        fresh, retries = lane.fresh, lane.retries
        while fresh and (fresh[0].blocked or not fresh[0].fresh):
            fresh.popleft().in_fresh = False
        while retries and (retries[0].blocked or not retries[0].retries):
            retries.popleft().in_retries = False
        return bool(fresh or retries)

    @staticmethod
    def _enter(queue: _Queue) -> None:
        """Let a queue take its turns in the rings of its lane."""
        lane = queue.lane
        if queue.fresh and not queue.in_fresh:
            queue.in_fresh = True
            if lane.fresh is EMPTY:
                lane.fresh = deque()
            lane.fresh.append(queue)
        if queue.retries and not queue.in_retries:
            queue.in_retries = True
            if lane.retries is EMPTY:
                lane.retries = deque()
            lane.retries.append(queue)

    def _block(self, queue: _Queue, now: float) -> bool:
        """Pass a queue over if the endpoint's own gate says wait."""
        assert queue.gate is not None
        at = queue.gate.permitted_at()
        if at <= now and queue.gate.has_slot():
            return False
        queue.blocked = True
        queue.alarm = None
        if at > now:
            queue.alarm = at
            self._push(at, queue)
        return True

    def _unblock(self, queue: _Queue) -> None:
        queue.blocked = False
        queue.alarm = None
        self._enter(queue)
        self._list(queue.lane)

    # The ring and the heap.

    def _list(self, lane: _Lane) -> None:
        """Let a lane take its turns, if something waits in it and it waits for nothing itself."""
        if lane.waiting and not lane.listed and not lane.cramped and lane.alarm is None:
            lane.listed = True
            self._ring.append(lane)

    def _push(self, at: float, waiter: _Lane | _Queue) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (at, self._pushed, waiter))

    @staticmethod
    def _waits(waiter: _Lane | _Queue, at: float) -> bool:
        """Whether a heap entry still means something; others were overtaken."""
        return waiter.alarm == at

    def _release(self, now: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= now:
            at, _, waiter = heapq.heappop(heap)
            if not self._waits(waiter, at):
                continue
            if isinstance(waiter, _Lane):
                waiter.alarm = None
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
        # what was its trouble is forgotten in time, what it was promised is not
        late = now - lane.used_mono > IDLE_FORGET_S
        if lane.gate.forgettable(now) or (late and lane.gate.at_rest(now)):
            if any(q.gate is not None and not q.gate.forgettable(now) for q in lane.queues.values()):
                self._rest(lane)
                return
            del self._lanes[lane.host]
            self._failed.pop(lane, None)
            lane.alarm = None
            for queue in lane.queues.values():
                if self._queues.get(queue.key) is queue:
                    del self._queues[queue.key]
            # each queue knows its lane: garbage of this kind would lie until the collector has 50,000 objects to look at, 20 MB
            lane.queues, lane.fresh, lane.retries = {}, EMPTY, EMPTY
        else:
            self._rest(lane)

    def _rest(self, lane: _Lane) -> None:
        if not lane.idle:
            lane.idle = True
            self._idle.append(lane)
