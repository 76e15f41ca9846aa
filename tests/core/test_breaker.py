"""The circuit breaker: a dead host costs a handful of exchanges, its neighbours nothing, and its return is a ramp."""

from __future__ import annotations

from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookd.core.breaker import HOST, Breaker
from hookd.core.lanes import Lanes
from hookd.core.model import (
    Endpoint,
    EndpointKey,
    HostLimits,
    HostSign,
    Outcome,
    OutcomeKind,
    RetryPolicy,
    Verdict,
    VerdictKind,
)
from hookd.core.verdict import host_sign, judge
from tests.core.world import DELIVERED, FAILED, REFUSED, World, delivery

HOUR = 3600.0


def dead_until(when: float, host: str = "dead:80") -> World:
    """``host`` refuses until then; all others answer after 10 ms."""
    return World(
        Lanes(HostLimits(concurrency=50), {}),
        lambda h, now: (0.001, REFUSED) if h == host and now < when else (0.01, DELIVERED),
    )


def test_a_dead_host_costs_a_handful_of_exchanges() -> None:
    world = dead_until(HOUR * 2)
    world.admit("dead:80", 1000)
    world.run(HOUR)
    first_minute = [s for s in world.starts if s.at < 60]
    assert len(first_minute) <= 50 + 6, "one flight, then probes at 1, 3, 7, 15, 31 s"
    assert len(world.starts) - len(first_minute) <= 60, "one a minute"
    assert world.most_in_flight("dead:80", 1, HOUR) == 1
    (state,) = world.lanes.snapshot(world.now)
    assert state.why == "breaker"
    assert 0 <= state.held_s <= HOST.most_s


def test_its_neighbours_notice_nothing() -> None:
    def healthy_starts(dead: bool) -> list[float]:
        world = dead_until(HOUR if dead else 0)
        for host in range(20):
            world.admit(f"host{host}:80", 200, endpoint=host + 10)
        world.admit("dead:80", 1000)
        world.run(60)
        return [s.at for s in world.starts if s.host != "dead:80"]

    assert healthy_starts(dead=True) == healthy_starts(dead=False)


def test_a_returning_host_gets_a_ramp_and_then_everything() -> None:
    world = dead_until(100.0)
    world.admit("dead:80", 1000)
    world.run(200.0)
    delivered = [s for s in world.starts if s.verdict is DELIVERED]
    back = delivered[0].at
    assert 100.0 <= back <= 100.0 + HOST.most_s + 1
    at_once = [
        world.most_in_flight("dead:80", back + n * 0.01 - 1e-6, back + (n + 1) * 0.01 - 1e-6)
        for n in range(8)
    ]
    assert at_once[0] == 1
    assert all(later <= max(2, 2 * earlier) for earlier, later in pairwise(at_once))
    assert world.most_in_flight("dead:80", back, 200) == 50, "the ramp ends at the cap"
    assert not world.lanes.total_waiting


def test_failures_that_are_answers_never_close_a_shared_host() -> None:
    world = World(Lanes(HostLimits(concurrency=10), {}), lambda _h, _n: (0.01, FAILED))
    world.admit("shared:80", 200, endpoint=1)
    world.admit("shared:80", 200, endpoint=2)
    world.run(5.0)
    assert len(world.starts) == 400
    assert world.starts[-1].ended == pytest.approx(400 / 10 * 0.01)


def test_what_is_down_and_what_is_alive() -> None:
    def sign(kind: OutcomeKind, status: int = 0) -> str:
        return host_sign(Outcome(kind, status=status)).name

    answered = OutcomeKind.ANSWERED
    assert {sign(answered, s) for s in (200, 204, 301, 400, 401, 404, 410, 500, 502, 504)} == {"ALIVE"}
    assert {sign(answered, s) for s in (429, 503)} == {"DOWN"}
    alive = {OutcomeKind.MALFORMED, OutcomeKind.UNVERIFIED}
    assert {sign(k) for k in alive} == {"ALIVE"}
    no_exchange = {OutcomeKind.BLOCKED, OutcomeKind.INVALID, OutcomeKind.OURS}
    assert {sign(k) for k in no_exchange} == {"NOTHING"}
    rest = set(OutcomeKind) - no_exchange - alive - {answered}
    assert {sign(k) for k in rest} == {"DOWN"}


def test_a_fault_of_this_machine_holds_the_lane_and_a_bug_only_its_delivery() -> None:
    """The next delivery to the host would meet the same fault, and the one after it: all of the backlog, at once."""
    endpoint = Endpoint(EndpointKey(1), UUID(int=1), "t", "http://a.example/", "a.example:80", 0)

    def verdict(outcome: Outcome) -> Verdict:
        return judge(outcome, delivery(1), endpoint, RetryPolicy(()), 0.0, 0.5)

    held = verdict(Outcome(OutcomeKind.OURS, reason="no route"))
    assert (held.kind, held.delay_s, held.hold_lane_s, held.slow_lane) == (VerdictKind.HOLD, 2.0, 2.0, True)
    assert (held.host, held.endpoint_failed) == (HostSign.NOTHING, False)
    bug = verdict(Outcome(OutcomeKind.OURS, fault=RuntimeError()))
    assert (bug.kind, bug.hold_lane_s, bug.slow_lane) == (VerdictKind.HOLD, 0.0, False)


def test_a_sign_of_life_between_failures_keeps_it_closed() -> None:
    breaker = Breaker()
    for n in range(100):
        if n % HOST.failures == 0:
            breaker.answered()
        else:
            breaker.failed(float(n), float(n))
        assert not breaker.open


def test_intervals_double_up_to_a_minute() -> None:
    breaker = Breaker()
    now = 0.0
    for _ in range(HOST.failures):
        breaker.failed(now, now)
    waits = []
    for _ in range(9):
        waits.append(breaker.probe_at - now)
        now = breaker.probe_at
        assert breaker.lets_one_go()
        breaker.started()
        assert not breaker.lets_one_go()
        breaker.failed(now, now)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_probe_that_ends_without_an_exchange_is_no_probe() -> None:
    """100 expired deliveries in front of a dead host must not take an hour to end."""
    world = World(Lanes(HostLimits(), {}), lambda _h, _n: (0.0, REFUSED))
    world.admit("dead:80", 20)
    world.run(0.5)
    world.answers = lambda _h, _n: (0.0, Verdict(VerdictKind.EXPIRED))
    world.admit("dead:80", 100)
    world.run(5.0)
    assert not world.lanes.total_waiting


def test_a_new_delivery_to_an_idle_dead_host_is_the_probe() -> None:
    world = dead_until(50.0)
    world.admit("dead:80", 6)
    world.run(100.0)
    world.admit("dead:80")
    world.run(100.1)
    assert world.starts[-1].at == 100.0
    assert world.starts[-1].verdict is DELIVERED


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["alive", "down", "nothing"]), min_size=1, max_size=80),
    st.integers(1, 20),
    st.floats(0.001, 30),
)
def test_while_it_is_open_one_goes_at_a_time(script: list[str], concurrency: int, takes: float) -> None:
    lanes = Lanes(HostLimits(concurrency=concurrency), {})
    verdicts = {"alive": DELIVERED, "down": REFUSED, "nothing": Verdict(VerdictKind.CANCELLED)}
    steps = iter(script * 3)
    world = World(lanes, lambda _h, _n: (takes, verdicts[next(steps, "alive")]))
    openings: list[float] = []
    was_open = False

    def watch(_start: object) -> None:
        nonlocal was_open
        is_open = any(s.why == "breaker" for s in lanes.snapshot(world.now))
        if is_open and not was_open:
            openings.append(world.now)
        elif is_open:
            since = [s for s in world.starts if s.at >= openings[-1] and s.ended > world.now]
            assert len(since) <= 1
        was_open = is_open

    world.on_end = watch
    world.admit("a:80", 100)
    world.run(100 * HOUR)
    assert not lanes.total_waiting, "nobody waits for ever"
    assert lanes.total_in_flight == 0
    if "down" not in script:
        assert not openings
    probes = [s for s in world.starts if s.verdict is REFUSED]
    assert all(s.delivery.attempt == 0 for s in probes), "who waits uses up no attempts"


def test_a_lane_with_an_open_breaker_is_not_looked_at() -> None:
    lanes = Lanes(HostLimits(concurrency=5), {})
    for n in range(10):
        lanes.admit("dead:80", delivery(n))
    for started in lanes.ready(0.0, 100):
        lanes.finished(started, REFUSED, 0.0)
    assert lanes.ready(0.0, 100) == []
    assert lanes.next_wake(0.0) == HOST.first_s
    assert lanes.ready(HOST.first_s / 2, 100) == []
    assert len(lanes.ready(HOST.first_s, 100)) == 1
