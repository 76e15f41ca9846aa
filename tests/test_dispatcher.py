"""The dispatcher with an exchange that does what a test says."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from hookd.clock import SystemClock, SystemDice
from hookd.core.challenge import challenge_in
from hookd.core.composer import Wire
from hookd.core.lanes import Lanes
from hookd.core.model import (
    BodyFormat,
    Delivery,
    DeliveryId,
    Endpoint,
    EndpointKey,
    EndpointState,
    Event,
    Health,
    HostLimits,
    Outcome,
    OutcomeKind,
    Result,
    RetryPolicy,
    VerdictKind,
)
from hookd.core.request import InvalidRequest, Request
from hookd.core.signing import new_secret
from hookd.dispatcher import Dispatcher
from hookd.recorder import Recorder
from hookd.verification import question

if TYPE_CHECKING:
    from collections.abc import Callable

DAY = 86400.0

WIRE = Wire("hookd/test", BodyFormat.STANDARD, 20, 5)

ENDPOINT = Endpoint(EndpointKey(1), UUID(int=1), "t", "http://a.example/", "a.example:80", 0)

SECRET = new_secret(b"s" * 32)

TWO_AT_ONCE = HostLimits(concurrency=2)


class Preparer:
    def compose(self, delivery: Delivery, timestamp: int) -> Request:
        if delivery.event.type == "poison":
            raise InvalidRequest("a header is wrong")
        return None  # type: ignore[return-value]


class Attempt:
    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task

    def cancel(self) -> None:
        self.task.cancel()


class Exchange:
    def __init__(self, *script: Outcome | Exception) -> None:
        self.script = list(script)
        self.sent = 0
        self.bodies: list[bytes] = []
        self.hold: asyncio.Event | None = None

    def begin(self, request: Request, turn: object, done: Callable[[Outcome], None]) -> Attempt:
        self.sent += 1
        self.bodies.append(request.body if request else b"")
        return Attempt(asyncio.create_task(self._go(done)))

    def depart(self) -> None:
        pass

    async def _go(self, done: Callable[[Outcome], None]) -> None:
        if self.hold is not None:
            await self.hold.wait()
        await asyncio.sleep(0)
        step = self.script.pop(0) if self.script else Outcome(OutcomeKind.ANSWERED, sent=True, status=200)
        if isinstance(step, Exception):
            step = Outcome(OutcomeKind.OURS, reason="an internal error", fault=step)
        done(step)


class Bench:
    def __init__(self, exchange: Exchange, limits: HostLimits = TWO_AT_ONCE, max_in_flight: int = 10) -> None:
        self.exchange = exchange
        self.results: list[Result] = []
        self.faults: list[Exception] = []
        self.dropped: list[Delivery] = []
        self.verified: list[UUID] = []
        self.vouched = True
        self.recorder = Recorder(SystemClock(), refused=KeyError, report=lambda *_: None)
        self.dispatcher = Dispatcher(
            Lanes(limits, {}),
            exchange,
            self.recorder,
            lambda _: Preparer(),
            lambda endpoint, now: question(endpoint, WIRE, now),
            RetryPolicy(ask_again_after_s=DAY),
            SystemClock(),
            SystemDice(1),
            max_in_flight=max_in_flight,
            vouched=lambda: self.vouched,
            room=lambda _: None,
            report=self.results.append,
            fault=lambda _, error: self.faults.append(error),
            ours=lambda _: None,
            dropped=self.dropped.append,
            verified=lambda endpoint: self.verified.append(endpoint.id),
        )
        self.dispatcher.serve(ENDPOINT)

    def admit(self, number: int, type_: str = "a") -> None:
        self.dispatcher.admit(
            Delivery(DeliveryId(number), ENDPOINT.key, Event(UUID(int=2), type_, "t", b"{}", 0.0), 0, 0)
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


async def under_way(exchange: Exchange, endpoint: Endpoint = ENDPOINT) -> tuple[Bench, asyncio.Event]:
    """A bench with one delivery whose exchange has begun, and what lets that end."""
    exchange.hold = asyncio.Event()
    bench = Bench(exchange)
    bench.dispatcher.serve(endpoint)
    bench.admit(1)
    await bench.until(lambda: exchange.sent == 1)
    return bench, exchange.hold


def test_a_fault_of_ours_costs_neither_slot_nor_delivery() -> None:
    async def go() -> None:
        bench = Bench(Exchange(RuntimeError("bug"), RuntimeError("bug")))
        for n in range(4):
            bench.admit(n)
        await bench.until(lambda: len(bench.results) == 4)
        assert len(bench.faults) == 2
        assert {r.verdict.kind for r in bench.results} == {VerdictKind.DELIVERED}
        assert {r.delivery.attempt for r in bench.results} == {0}, "no attempt was used up"
        assert bench.dispatcher.in_flight() == []

    asyncio.run(go())


def test_poison_ends_alone() -> None:
    async def go() -> None:
        bench = Bench(Exchange())
        bench.admit(1, "poison")
        bench.admit(2)
        await bench.until(lambda: len(bench.results) == 2)
        kinds = {int(r.delivery.id): r.verdict.kind for r in bench.results}
        assert kinds == {1: VerdictKind.EXHAUSTED, 2: VerdictKind.DELIVERED}
        assert bench.exchange.sent == 1

    asyncio.run(go())


def test_many_poisoned_ones_do_not_stop_their_lane() -> None:
    async def go() -> None:
        bench = Bench(Exchange())
        for n in range(50):
            bench.admit(n, "poison")
        bench.admit(99)
        await bench.until(lambda: len(bench.results) == 51)
        assert bench.exchange.sent == 1

    asyncio.run(go())


def test_nothing_starts_while_the_locks_are_not_vouched_for() -> None:
    async def go() -> None:
        bench = Bench(Exchange())
        bench.vouched = False
        bench.admit(1)
        await asyncio.sleep(0.15)
        assert bench.exchange.sent == 0
        bench.vouched = True
        await bench.until(lambda: len(bench.results) == 1)

    asyncio.run(go())


def test_nothing_starts_while_the_recorder_is_backed_up() -> None:
    async def go() -> None:
        bench = Bench(Exchange())
        for n in range(5000):
            delivery = Delivery(
                DeliveryId(n + 100), ENDPOINT.key, Event(UUID(int=2), "a", "t", b"{}", 0.0), 0, 0
            )
            bench.recorder.add(Result(delivery, ENDPOINT.key, None, None))  # type: ignore[arg-type]
        bench.admit(1)
        await asyncio.sleep(0.15)
        assert bench.exchange.sent == 0

    asyncio.run(go())


def test_a_disabled_endpoints_deliveries_end_without_an_exchange() -> None:
    async def go() -> None:
        bench = Bench(Exchange(Outcome(OutcomeKind.ANSWERED, sent=True, status=410)))
        for n in range(6):
            bench.admit(n)
        await bench.until(lambda: len(bench.results) == 6)
        assert bench.exchange.sent <= 2, "what was in flight"
        bench.dispatcher.serve(replace(ENDPOINT, state=EndpointState.REMOVED))
        bench.admit(9)
        assert bench.results[-1].verdict.kind is VerdictKind.CANCELLED

    asyncio.run(go())


def failing(*, since_s: float, verified_s: float | None) -> Endpoint:
    """An endpoint that has failed, and was verified, so long ago."""
    now = time.time()
    verified_at = None if verified_s is None else now - verified_s
    return replace(
        ENDPOINT, health=Health(now - since_s, "answered 500"), verified_at=verified_at, secrets=(SECRET,)
    )


class Honest(Exchange):
    """Repeats challenges, and answers everything else with 200."""

    async def _go(self, done: Callable[[Outcome], None]) -> None:
        challenge = challenge_in(self.bodies[-1])
        url = "http://a.example/"
        self.script.insert(
            0, Outcome(OutcomeKind.ANSWERED, sent=True, status=200, body=challenge or "", url=url)
        )
        await super()._go(done)


def test_one_that_has_failed_for_long_is_asked_before_anything_goes_there() -> None:
    async def go() -> None:
        bench = Bench(Honest())
        bench.dispatcher.serve(failing(since_s=2 * DAY, verified_s=3 * DAY))
        bench.admit(1)
        await bench.until(lambda: len(bench.results) == 1)
        for number in (2, 3):
            bench.admit(number)
        await bench.until(lambda: len(bench.results) == 3)
        asked = [challenge_in(body) is not None for body in bench.exchange.bodies]
        assert asked == [True, False, False, False]
        assert bench.verified == [ENDPOINT.id]
        assert [(r.verdict.kind, r.delivery.attempt) for r in bench.results] == [
            (VerdictKind.DELIVERED, 0)
        ] * 3
        served = bench.dispatcher.served(ENDPOINT.key)
        assert served is not None
        assert served.health == Health()
        assert served.verified_at is not None
        assert time.time() - served.verified_at < 60

    asyncio.run(go())


def test_who_got_another_url_while_it_was_asked_is_not_verified_by_the_old_one() -> None:
    """It was: whoever answers challenges could have had somebody else's server called."""

    async def go() -> None:
        bench, hold = await under_way(Honest(), failing(since_s=2 * DAY, verified_s=3 * DAY))
        other = replace(ENDPOINT, url="http://victim.example/", state=EndpointState.PAUSED)
        bench.dispatcher.serve(other)
        hold.set()
        await bench.until(lambda: bool(bench.dropped))
        assert bench.verified == []
        assert bench.dispatcher.served(ENDPOINT.key) == other
        assert bench.exchange.sent == 1

    asyncio.run(go())


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (Outcome(OutcomeKind.ANSWERED, status=200, body="ok"), OutcomeKind.UNVERIFIED,
         "asked again after failing for long: answered 200 without repeating the challenge"),
        (Outcome(OutcomeKind.ANSWERED, status=500), OutcomeKind.ANSWERED, "answered 500 (asked again after failing for long)"),
        (Outcome(OutcomeKind.CONNECT_REFUSED, reason="the connection was refused"), OutcomeKind.CONNECT_REFUSED,
         "the connection was refused"),
    ],
)  # fmt: skip
def test_a_challenge_that_is_not_answered_is_a_failed_attempt(
    answer: Outcome, kind: OutcomeKind, reason: str
) -> None:
    async def go() -> None:
        answer.url = "http://a.example/"
        bench = Bench(Exchange(answer))
        bench.dispatcher.serve(failing(since_s=2 * DAY, verified_s=3 * DAY))
        bench.admit(1)
        await bench.until(lambda: len(bench.results) == 1)
        (result,) = bench.results
        assert result.outcome is not None
        assert (result.outcome.kind, result.verdict.kind) == (kind, VerdictKind.RETRY)
        assert result.verdict.reason.startswith(reason)
        assert bench.verified == []
        assert bench.exchange.sent == 1
        assert bench.dispatcher.in_flight() == []

    asyncio.run(go())


@pytest.mark.parametrize(("since_s", "verified_s"), [(DAY / 2, 3 * DAY), (2 * DAY, DAY / 2), (2 * DAY, None)])
def test_who_has_failed_briefly_or_answered_lately_or_was_never_asked_is_not_asked(
    since_s: float, verified_s: float | None
) -> None:
    async def go() -> None:
        bench = Bench(Exchange())
        bench.dispatcher.serve(failing(since_s=since_s, verified_s=verified_s))
        bench.admit(1)
        await bench.until(lambda: len(bench.results) == 1)
        assert bench.exchange.bodies == [b""]
        assert bench.results[0].verdict.kind is VerdictKind.DELIVERED

    asyncio.run(go())


def test_a_drain_waits_and_then_cuts_off() -> None:
    async def go() -> None:
        exchange = Exchange()
        exchange.hold = asyncio.Event()
        bench = Bench(exchange)
        for n in range(5):
            bench.admit(n)
        await bench.until(lambda: exchange.sent == 2)
        draining = asyncio.create_task(bench.dispatcher.drain(10))
        await asyncio.sleep(0.02)
        assert not draining.done()
        exchange.hold.set()
        assert await draining == 0
        assert exchange.sent == 2, "no new exchange"
        assert len(bench.results) == 2

    asyncio.run(go())


def test_a_drain_without_grace() -> None:
    async def go() -> None:
        exchange = Exchange()
        exchange.hold = asyncio.Event()
        bench = Bench(exchange)
        bench.admit(1)
        await bench.until(lambda: exchange.sent == 1)
        assert await bench.dispatcher.drain(0) == 1
        assert bench.results == [], "it stays in the queue"

    asyncio.run(go())


def test_a_full_dispatcher_rests_though_a_lanes_time_has_come() -> None:
    """It asked for turn after turn until an exchange ended."""

    async def go() -> None:
        exchange = Exchange()
        exchange.hold = asyncio.Event()
        bench = Bench(exchange, HostLimits(rate=20.0, concurrency=5), max_in_flight=2)
        other = replace(ENDPOINT, key=EndpointKey(2), host="b:80")
        bench.dispatcher.serve(other)
        turns = 0
        turn = bench.dispatcher._turn

        def counted() -> None:
            nonlocal turns
            turns += 1
            turn()

        bench.dispatcher._turn = counted  # type: ignore[method-assign]
        bench.admit(1)
        bench.admit(2)  # its time is 50 ms after the first's
        await bench.until(lambda: exchange.sent == 1)
        bench.dispatcher.admit(
            Delivery(DeliveryId(3), other.key, Event(UUID(int=2), "a", "t", b"{}", 0.0), 0, 0)
        )
        await bench.until(lambda: exchange.sent == 2)
        await asyncio.sleep(0.2)
        assert turns < 20
        exchange.hold.set()
        await bench.until(lambda: len(bench.results) == 3)

    asyncio.run(go())


def test_what_would_be_held_after_a_lost_session_is_let_go_of() -> None:
    """The next feed reads it again; it was sent twice, and never read again where its shard was another's by then."""

    async def go() -> None:
        bench, hold = await under_way(Exchange(Outcome(OutcomeKind.OURS, reason="no descriptors")))
        bench.dispatcher.forget_all()
        hold.set()
        await bench.until(lambda: bool(bench.dropped))
        assert [d.id for d in bench.dropped] == [1]
        assert bench.dispatcher.under_way([ENDPOINT.key]) == []

    asyncio.run(go())


def test_what_is_held_when_its_endpoint_is_not_served_any_more_is_let_go_of() -> None:
    async def go() -> None:
        bench = Bench(Exchange())
        held = Delivery(DeliveryId(1), ENDPOINT.key, Event(UUID(int=2), "a", "t", b"{}", 0.0), 0, 0)
        bench.dispatcher._hold(held, 0.01)
        bench.dispatcher._endpoints.clear()
        await bench.until(lambda: bool(bench.dropped))
        assert bench.exchange.sent == 0

    asyncio.run(go())


@pytest.mark.parametrize(
    ("meanwhile", "goes"),
    [
        (replace(ENDPOINT, state=EndpointState.PAUSED), False),
        (replace(ENDPOINT, shard=1, former_shards=(0,)), False),
        (replace(ENDPOINT, rate=100.0), True),
    ],
)
def test_what_is_held_does_not_go_where_it_may_not_go_any_more(meanwhile: Endpoint, goes: bool) -> None:
    """It went, to one that was paused, and to a host whose limits another daemon counts."""

    async def go() -> None:
        bench, hold = await under_way(Exchange(Outcome(OutcomeKind.OURS, reason="no descriptors")))
        bench.dispatcher.serve(meanwhile)
        hold.set()
        await bench.until(lambda: bool(bench.dropped or bench.results))
        assert bool(bench.results) is goes
        assert bench.exchange.sent == 1 + goes

    asyncio.run(go())
