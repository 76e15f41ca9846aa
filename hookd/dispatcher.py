"""
The dispatcher: from the lanes to the network and on to the recorder.

It is driven by what happens: a delivery is admitted, an exchange ends, a lane's time has come.  Each of these asks for
a *turn*, and a turn starts what may start.  What came back is judged the moment it comes, before the next turn, so that
a freed slot is used at once.

A delivery that the dispatcher knows is in exactly one place: waiting in its lane, in flight, held (the fault was ours,
it is tried again in a moment), or handed to the recorder.

Nothing starts unless the owner session vouches for its locks, and the recorder can take what will come of it.

A verified endpoint that has failed for long is asked again: its next attempt is a challenge (``core.challenge``), and not
before that is answered does the delivery go.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from hookd.core.challenge import doubted, unanswered
from hookd.core.histogram import Histogram
from hookd.core.model import (
    ACTIVE,
    ANSWERED,
    DELIVERED,
    HEALTHY,
    HOLD,
    PAUSED,
    Delivery,
    DeliveryId,
    Endpoint,
    EndpointKey,
    EndpointState,
    Health,
    Outcome,
    OutcomeKind,
    Result,
    RetryPolicy,
    Verdict,
)
from hookd.core.verdict import WANTED, ending, judge
from hookd.pacing import WAIT_MOST_S, Pacer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from hookd.clock import Clock, Dice
    from hookd.core.challenge import Question
    from hookd.core.lanes import Lanes
    from hookd.core.request import Request
    from hookd.recorder import Recorder

ATTEMPT_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
"""OpenTelemetry's for http.client.request.duration, and the default time-out."""

LAG_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 300, 3600)

TURN_MOST = 50
"""
Exchanges that one turn starts: some 3 ms of work.  Then answers are read before the next turn, and what PostgreSQL has sent.

That comes by the 200 KiB that a socket holds, so by two or three turns for 500 events of 1 KiB.  With turns of 100 they took 25 to 30
ms, and at 14,000/s memory ran dry all the time (hookd used 0.95 of its core, now 0.99); with 25 a delivery costs 8 µs more.
"""

CLASSES = tuple(f"{n}xx" for n in range(10))
"""Answers, as metrics count them; a status has three digits."""

FENCE_RETRY_S = 0.05
"""How soon to ask again when nothing may start."""


class Attempt(Protocol):
    """An exchange under way."""

    def cancel(self) -> None:
        """Let go of it; nobody is told."""
        ...


class Exchange(Protocol):
    """
    One signed POST (``net.exchange``).

    ``done`` is told its outcome, later; ``turn`` is asked before each write to its host.  What was begun is written when
    ``depart`` is called, at the latest.
    """

    def begin(self, request: Request, turn: Turn | None, done: Callable[[Outcome], None]) -> Attempt: ...
    def depart(self) -> None: ...


class Preparer(Protocol):
    """Makes requests for one endpoint (``core.composer``)."""

    def compose(self, delivery: Delivery, timestamp: int) -> Request: ...


@dataclass(slots=True)
class Turn:
    """The turn of one delivery to be written, at a host or for an endpoint that has a rate."""

    lanes: Lanes
    pacer: Pacer
    clock: Clock
    delivery: Delivery

    async def wait(self) -> bool:
        """Wait until it may be written, at once; False: that is too far away."""
        while True:
            now = self.clock.mono()
            at = self.lanes.write_at(self.delivery, now)
            if at <= now:
                return True
            if at > now + WAIT_MOST_S:
                return False
            await self.pacer.until(at)

    def wrote(self) -> None:
        """It is being written."""
        self.lanes.wrote(self.delivery, self.clock.mono())


@dataclass(slots=True)
class Counts:
    """What the dispatcher did, for ``telemetry`` to read."""

    outcomes: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    attempt_s: Histogram = field(default_factory=lambda: Histogram(ATTEMPT_BOUNDS_S))
    lag_s: Histogram = field(default_factory=lambda: Histogram(LAG_BOUNDS_S))


class Dispatcher:
    """Starts what may start, judges what comes back."""

    def __init__(
        self,
        lanes: Lanes,
        exchange: Exchange,
        recorder: Recorder,
        compose: Callable[[Endpoint], Preparer],
        question: Callable[[Endpoint, float], Question],
        policy: RetryPolicy,
        clock: Clock,
        dice: Dice,
        *,
        max_in_flight: int,
        vouched: Callable[[], bool],
        room: Callable[[list[Delivery]], None],
        report: Callable[[Result], None],
        fault: Callable[[Delivery, Exception], None],
        ours: Callable[[str], None],
        dropped: Callable[[Delivery], None],
        verified: Callable[[Endpoint], None],
    ) -> None:
        """
        ``question``: a challenge for an endpoint, as of a wall time.

        ``vouched``: the locks are held; ``room``: the lanes gave these away; ``report``: an attempt ended;
        ``fault``: a bug in an exchange; ``ours``: why deliveries are held, which no receiver is to blame for;
        ``dropped``: it was let go of without a result, because it may not be sent from memory any more;
        ``verified``: an endpoint has answered its challenge.
        """
        self._lanes = lanes
        self._exchange = exchange
        self._recorder = recorder
        self._compose = compose
        self._question = question
        self.policy = policy
        self._clock = clock
        self._dice = dice
        self.max_in_flight = max_in_flight
        self.vouched = vouched
        self.room = room
        self._report = report
        self._fault = fault
        self._ours = ours
        self._dropped = dropped
        self._verified = verified
        self._endpoints: dict[EndpointKey, Endpoint] = {}
        self._preparers: dict[EndpointKey, Preparer] = {}
        self._in_flight: dict[DeliveryId, tuple[Delivery, Attempt, float]] = {}
        """With the time of their start, in the order of it."""
        self._held: dict[DeliveryId, tuple[Delivery, asyncio.TimerHandle]] = {}
        self._loop = asyncio.get_running_loop()
        self._turn_asked = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0
        self._landed = asyncio.Event()
        self._pacer = Pacer(clock)
        self.stopping = False
        self.counts = Counts()

    def __repr__(self) -> str:
        return f"<Dispatcher in_flight={len(self._in_flight)} waiting={self._lanes.total_waiting} held={len(self._held)}>"

    # What the feed tells it.

    def serve(self, endpoint: Endpoint) -> None:
        """This is what an endpoint is now."""
        self._endpoints[endpoint.key] = endpoint
        self._preparers.pop(endpoint.key, None)
        self._lanes.set_endpoint(
            endpoint.key,
            endpoint.rate,
            endpoint.concurrency,
            parked=endpoint.health.parked_at is not None,
            now=self._clock.mono(),
        )
        self.poke()

    def served(self, key: EndpointKey) -> Endpoint | None:
        """What an endpoint is, as far as known."""
        return self._endpoints.get(key)

    def endpoints(self) -> dict[EndpointKey, Endpoint]:
        """All that are served."""
        return self._endpoints

    def renew(self, policy: RetryPolicy, max_in_flight: int) -> None:
        """The configuration has changed: prepare requests anew."""
        self.policy = policy
        self.max_in_flight = max_in_flight
        self._preparers.clear()
        self.poke()

    def admit(self, delivery: Delivery) -> None:
        """Take a delivery into its lane, or to its end if there is nothing to send any more."""
        endpoint = self._endpoints[delivery.endpoint]
        verdict = ending(delivery, endpoint, self._clock.wall())
        if verdict is not None:
            self._end(delivery, verdict)
            return
        self._lanes.admit(endpoint.host, delivery, self._clock.mono())
        self.poke()

    def withdraw(self, key: EndpointKey, *, beyond: int = 0) -> list[Delivery]:
        """Give back the deliveries of an endpoint that are not in flight: all, or those that wait ``beyond`` the first ones."""
        if beyond:
            return self._lanes.withdraw(key, beyond=beyond)
        held = [(d, timer) for d, timer in self._held.values() if d.endpoint == key]
        for delivery, timer in held:
            timer.cancel()
            del self._held[delivery.id]
        return [*self._lanes.withdraw(key), *(d for d, _ in held)]

    def withdraw_one(self, key: EndpointKey, delivery_id: DeliveryId) -> Delivery | None:
        """Give back one that waits for its first attempt; None if it does not wait in its lane."""
        return self._lanes.withdraw_one(key, delivery_id)

    def waiting(self, key: EndpointKey) -> int:
        """Deliveries of an endpoint that wait in memory."""
        return self._lanes.waiting(key)

    def waiting_timed(self, key: EndpointKey) -> int:
        """Those of them that had a due time."""
        return self._lanes.waiting_timed(key)

    def under_way(self, keys: Collection[EndpointKey]) -> list[DeliveryId]:
        """Deliveries of these endpoints that are in flight, held, or not written yet."""
        return [d.id for d in self.begun() if d.endpoint in keys]

    def begun(self) -> list[Delivery]:
        """Deliveries that are in flight, held, or not written yet: what outlives a session."""
        held = [d for d, _ in self._held.values()]
        return [d for d, _, _ in self._in_flight.values()] + held + self._recorder.unwritten()

    def total_waiting(self) -> int:
        """Deliveries that wait in memory."""
        return self._lanes.total_waiting

    def backed_up(self) -> bool:
        """Whether the recorder has more than it can write."""
        return self._recorder.backed_up()

    def stalled(self) -> str:
        """Why nothing starts anywhere, in words; empty if nothing stands in the way."""
        if self.stopping:
            return "another daemon, or the next start: this one is draining"
        if self._recorder.backed_up():
            return "PostgreSQL to take what came of those before it"
        if not self.vouched():
            return "the daemon's session to be answered: nothing starts while its locks are in doubt"
        if len(self._in_flight) >= self.max_in_flight:
            return f"a free slot: {self.max_in_flight:,} exchanges are in flight (delivery.max_in_flight)"
        return ""

    def in_flight(self) -> list[Delivery]:
        """Deliveries whose exchange is under way."""
        return [delivery for delivery, _, _ in self._in_flight.values()]

    def unsettled_since(self, wall: float) -> float:
        """When the oldest attempt began that is not committed; ``wall``, now, where there is none."""
        first = next((began for _, _, began in self._in_flight.values()), wall)
        return min(first, self._recorder.unwritten_since(wall))

    def taken(self) -> list[DeliveryId]:
        """Those that a lost session left here, in flight or held: the next one must not read them again."""
        return [*self._in_flight, *self._held]

    def busy_shards(self) -> Counter[int]:
        """
        Deliveries of each shard that are in memory: waiting, in flight, held, or not written yet.

        While stopping only those in flight or not written: the others are not started any more.
        """
        busy = Counter(delivery.shard for delivery, _, _ in self._in_flight.values())
        busy.update(delivery.shard for delivery in self._recorder.unwritten())
        if self.stopping:
            return busy
        busy.update(delivery.shard for delivery, _ in self._held.values())
        for endpoint in self._endpoints.values():
            waiting = self._lanes.waiting(endpoint.key)
            if waiting:
                busy[endpoint.shard] += waiting
        return busy

    def forget_all(self) -> None:
        """The session is lost: let go of everything that is not in flight."""
        for key in list(self._endpoints):
            self.withdraw(key)
        for _, timer in self._held.values():
            timer.cancel()
        self._held.clear()
        self._endpoints.clear()
        self._preparers.clear()

    # Turns.

    def poke(self) -> None:
        """Ask for a turn; many askers get one."""
        if not self._turn_asked:
            self._turn_asked = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_asked = False
        if self.stopping or not self._lanes.total_waiting:
            return
        now = self._clock.mono()
        if self._recorder.backed_up() or not self.vouched():
            self._wake_at(now + FENCE_RETRY_S, now)
            return
        free = min(TURN_MOST, self.max_in_flight - len(self._in_flight))
        if free <= 0:
            return  # the first exchange to end asks for a turn; a lane whose time has come would ask again and again
        ready = self._lanes.ready(now, free)
        try:
            under_way = sum([self._start(delivery) for delivery in ready])
        finally:
            self._exchange.depart()
        if under_way < len(ready) or len(ready) == TURN_MOST:
            # what ended without an exchange has freed its slot at once, and no exchange will ask for a turn
            self.poke()
        if ready:
            self.room(ready)
        wake_at = self._lanes.next_wake(now)
        if wake_at is not None:
            self._wake_at(wake_at, now)

    def _wake_at(self, at_mono: float, now: float) -> None:
        if self._alarm is not None:
            if self._alarm_at <= at_mono and self._alarm_at > now:
                return
            self._alarm.cancel()
        self._alarm_at = at_mono
        self._alarm = self._loop.call_later(max(0.0, at_mono - now), self._alarmed)

    def _alarmed(self) -> None:
        self._alarm = None
        self.poke()

    # Attempts.

    def _start(self, delivery: Delivery) -> bool:
        """Whether an exchange is under way; else the delivery has ended already."""
        endpoint = self._endpoints[delivery.endpoint]
        wall = self._clock.wall()
        verdict = ending(delivery, endpoint, wall)
        if verdict is not None:
            self._lanes.finished(delivery, verdict, self._clock.mono())
            self._end(delivery, verdict)
            return False
        preparer = self._preparers.get(endpoint.key)
        if preparer is None:
            preparer = self._preparers[endpoint.key] = self._compose(endpoint)
        done = partial(self._ended, delivery, wall)
        try:
            if endpoint.health.failing_since is not None and doubted(endpoint, self.policy, wall):
                question = self._question(endpoint, wall)
                request, done = question.request, partial(self._asked, delivery, wall, endpoint, question)
            else:
                request = preparer.compose(delivery, int(wall))
        except ValueError as problem:
            outcome = Outcome(OutcomeKind.INVALID, reason=str(problem), started_at=wall, url=endpoint.url)
            self._judge(delivery, outcome)
            return False
        except Exception as error:  # noqa: BLE001 - it must cost neither the slot nor the delivery
            return self._broken(delivery, error)
        turn = Turn(self._lanes, self._pacer, self._clock, delivery) if self._lanes.paced(delivery) else None
        try:
            attempt = self._exchange.begin(request, turn, done)
        except Exception as error:  # noqa: BLE001 - it must cost neither the slot nor the delivery
            return self._broken(delivery, error)
        self._in_flight[delivery.id] = (delivery, attempt, wall)
        return True

    def _broken(self, delivery: Delivery, error: Exception) -> bool:
        """A bug of ours kept it from being started: no exchange is under way."""
        self._judge(delivery, Outcome(OutcomeKind.OURS, reason="an internal error", fault=error))
        return False

    def _ended(self, delivery: Delivery, wall: float, outcome: Outcome) -> None:
        del self._in_flight[delivery.id]
        outcome.started_at = wall
        self._judge(delivery, outcome)
        self._go_on()

    def _asked(
        self, delivery: Delivery, wall: float, asked: Endpoint, question: Question, outcome: Outcome
    ) -> None:
        """The attempt was a challenge: the endpoint wants to be called, and the delivery goes now, or it has failed."""
        said = question.judge(outcome)
        if not said.verified:
            self._ended(delivery, wall, unanswered(outcome, said))
            return
        del self._in_flight[delivery.id]
        self._lanes.finished(delivery, WANTED, self._clock.mono())
        endpoint = self._endpoints.get(delivery.endpoint)
        # it may have got another URL meanwhile, of which this answer says nothing
        if endpoint is not None and endpoint.url == asked.url:
            self._endpoints[endpoint.key] = replace(endpoint, verified_at=wall)
            self._verified(endpoint)
        self._hold(delivery, 0.0)
        self._go_on()

    def _go_on(self) -> None:
        """An exchange has ended."""
        if self.stopping:
            self._landed.set()
        else:
            self.poke()

    def _judge(self, delivery: Delivery, outcome: Outcome) -> None:
        now = self._clock.mono()
        wall = self._clock.wall()
        endpoint = self._endpoints.get(delivery.endpoint)
        if outcome.fault is not None:
            self._fault(delivery, outcome.fault)
        counts = self.counts
        answered = outcome.kind is ANSWERED
        counts.outcomes[CLASSES[outcome.status // 100] if answered else outcome.kind] += 1
        counts.attempt_s.observe(outcome.total_ms / 1000)
        if delivery.attempt == 0 and not delivery.replay and outcome.written_at:
            counts.lag_s.observe(max(0.0, outcome.written_at - delivery.event.created_at))
        if endpoint is None:
            # the session was lost meanwhile, and its endpoints with it: judge without its history
            endpoint = Endpoint(delivery.endpoint, delivery.event.id, "", outcome.url, "", delivery.shard)
        verdict = judge(outcome, delivery, endpoint, self.policy, wall, self._dice.draw())
        parked = self._lanes.finished(delivery, verdict, now)
        if verdict.kind is HOLD:
            self._ours(verdict.reason)
            if delivery.endpoint in self._endpoints:
                self._hold(delivery, verdict.delay_s)
            else:
                self._dropped(delivery)
            return
        result = Result(delivery, delivery.endpoint, outcome, verdict, written_wall=wall)
        self._note_health(result, endpoint, wall, parked=parked)
        self._settle(result)

    def _note_health(self, result: Result, endpoint: Endpoint, wall: float, *, parked: bool | None) -> None:
        """Only changes are written: nothing is updated on the success path."""
        before = endpoint.health
        if result.verdict.kind is DELIVERED:
            if before.failing_since is None and before.parked_at is None:
                return
            health = HEALTHY
        elif result.verdict.endpoint_failed and (before.failing_since is None or parked):
            since = wall if before.failing_since is None else before.failing_since
            health = Health(since, result.verdict.reason, wall if parked else None)
        else:
            return
        result.health = health
        if endpoint.key in self._endpoints:
            self._endpoints[endpoint.key] = replace(endpoint, health=health)

    def _hold(self, delivery: Delivery, delay_s: float) -> None:
        timer = self._loop.call_later(delay_s, self._release, delivery)
        self._held[delivery.id] = (delivery, timer)

    def _release(self, delivery: Delivery) -> None:
        del self._held[delivery.id]
        endpoint = self._endpoints.get(delivery.endpoint)
        # what was in flight when its endpoint was paused, or went to another shard, waits in the queue from now on
        if endpoint is None or endpoint.state is PAUSED or not endpoint.takes_from(delivery.shard):
            self._dropped(delivery)
        else:
            self.admit(delivery)

    def _end(self, delivery: Delivery, verdict: Verdict) -> None:
        self._settle(Result(delivery, delivery.endpoint, None, verdict, written_wall=self._clock.wall()))

    def _settle(self, result: Result) -> None:
        self.counts.verdicts[result.verdict.kind] += 1
        if result.verdict.disable is not None:
            self._disable(result)
        self._recorder.add(result)
        self._report(result)

    def _disable(self, result: Result) -> None:
        """Send it nothing more; the settle writes it down, and the feed then ends what is pending."""
        endpoint = self._endpoints.get(result.endpoint_key)
        if endpoint is not None and endpoint.state is ACTIVE:
            self._endpoints[endpoint.key] = replace(
                endpoint, state=EndpointState.DISABLED, state_reason=result.verdict.disable
            )

    # The end.

    async def drain(self, grace_s: float) -> int:
        """Start nothing more, wait for what is in flight; returns how many exchanges were cut off."""
        self.stopping = True
        try:
            async with asyncio.timeout(grace_s):
                while self._in_flight:
                    self._landed.clear()
                    await self._landed.wait()
        except TimeoutError:
            pass
        cut_off = len(self._in_flight)
        for _, attempt, _ in self._in_flight.values():
            attempt.cancel()
        self._in_flight.clear()
        for _, timer in self._held.values():
            timer.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
        self._pacer.close()
        return cut_off
