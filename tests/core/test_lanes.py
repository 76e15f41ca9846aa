"""Lanes: limits hold, nobody starves, nothing is lost."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookd.core.lanes import Lanes, _Lane
from hookd.core.limits import Gate
from hookd.core.model import Delivery, EndpointKey, HostLimits, Verdict, VerdictKind
from tests.core.world import DELIVERED, World, delivery

SLOWER = Verdict(VerdictKind.RETRY, slow_lane=True, endpoint_failed=True)


def test_concurrency_holds() -> None:
    lanes = Lanes(HostLimits(concurrency=3), {})
    for n in range(10):
        lanes.admit("a:80", delivery(n))
    first = lanes.ready(0.0, 100)
    assert len(first) == 3
    assert lanes.ready(0.0, 100) == []
    lanes.finished(first[0], DELIVERED, 1.0)
    assert len(lanes.ready(1.0, 100)) == 1


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([0.5, 5.0, 10.0, 100.0, 3000.0]),
    st.integers(0, 6),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([0.0, 0.0005, 0.02, 3.0]),
    st.integers(0, 2**32),
)
def test_a_rate_holds_in_every_window_and_is_used(
    rate: float, burst: int, concurrency: int, slow: float, seed: int
) -> None:
    """Whatever lies between the start of an exchange and its write: a name to resolve, a connection to open."""
    dice = Random(seed)
    world = World(
        Lanes(HostLimits(rate=rate, burst=burst, concurrency=concurrency), {}),
        lambda _h, _n: (0.2 / rate, DELIVERED),
        lag=lambda: dice.choice([0.0, 0.0001, slow]) * dice.random(),
    )
    world.admit("a:80", 550)
    world.run(500 / rate)
    written = sorted(s.written for s in world.starts if s.written is not None)
    least, most = 0.0, max(1, burst)
    for n, at in enumerate(written):
        # no window from an earlier write to this one holds more: the least of n - rate * t so far says it for all of them
        least = min(least, n - rate * at) if n else n - rate * at
        assert n + 1 - rate * at - least <= most + 1e-6
    if slow < 0.4 / rate:
        assert len(written) >= 0.99 * 500, "with work waiting it is used"


def test_what_was_not_written_is_not_counted() -> None:
    lanes = Lanes(HostLimits(rate=1.0, concurrency=10), {})
    for n in range(10):
        lanes.admit("a:80", delivery(n))
    for _ in range(10):
        (started,) = lanes.ready(0.0, 100)
        lanes.finished(started, Verdict(VerdictKind.EXPIRED), 0.0)
    assert not lanes.total_waiting


def test_the_most_specific_limit_wins() -> None:
    lanes = Lanes(
        HostLimits(concurrency=50),
        {
            "api.example.com": HostLimits(concurrency=2),
            "api.example.com:8443": HostLimits(concurrency=3),
            "*.example.com": HostLimits(concurrency=4),
        },
    )
    assert lanes.limits_of("api.example.com:443").concurrency == 2
    assert lanes.limits_of("api.example.com:8443").concurrency == 3
    assert lanes.limits_of("www.example.com:443").concurrency == 4
    assert lanes.limits_of("a.b.example.com:443").concurrency == 4
    assert lanes.limits_of("example.com:443").concurrency == 50


def test_hosts_and_endpoints_are_served_in_turn() -> None:
    lanes = Lanes(HostLimits(concurrency=0), {})
    for n in range(1000):
        lanes.admit("big:80", delivery(n, endpoint=1))
    for n in range(1000, 1010):
        lanes.admit("big:80", delivery(n, endpoint=2))
    for n in range(2000, 2010):
        lanes.admit("small:80", delivery(n, endpoint=3))
    counts = Counter(d.endpoint for d in lanes.ready(0.0, 30))
    assert counts[EndpointKey(3)] == 10
    assert counts[EndpointKey(2)] == 10


def test_an_endpoints_own_limits() -> None:
    lanes = Lanes(HostLimits(concurrency=50), {})
    lanes.set_endpoint(EndpointKey(1), None, 1, parked=False, now=0.0)
    for n in range(5):
        lanes.admit("a:80", delivery(n, endpoint=1))
        lanes.admit("a:80", delivery(n + 100, endpoint=2))
    started = lanes.ready(0.0, 100)
    counts = Counter(d.endpoint for d in started)
    assert counts == {EndpointKey(1): 1, EndpointKey(2): 5}
    lanes.finished(next(d for d in started if d.endpoint == 1), DELIVERED, 0.0)
    assert [d.endpoint for d in lanes.ready(0.0, 100)] == [EndpointKey(1)]


def test_retry_after_holds_the_host() -> None:
    lanes = Lanes(HostLimits(concurrency=10), {})
    for n in range(5):
        lanes.admit("a:80", delivery(n))
    lanes.admit("b:80", delivery(9, endpoint=2))
    (first, *_) = lanes.ready(0.0, 1)
    lanes.finished(first, Verdict(VerdictKind.RETRY, hold_lane_s=30.0), 0.0)
    host = "a:80" if first.endpoint == 1 else "b:80"
    rest = lanes.ready(1.0, 100)
    assert all(d.endpoint != first.endpoint for d in rest)
    state = next(s for s in lanes.snapshot(1.0) if s.host == host)
    assert state.held_s == pytest.approx(29.0)
    assert lanes.next_wake(1.0) == pytest.approx(30.0) or host == "b:80"


def test_a_lane_takes_at_most_half_of_everything() -> None:
    lanes = Lanes(HostLimits(concurrency=0), {}, max_in_flight=100)
    for n in range(500):
        lanes.admit("slow:80", delivery(n))
    assert len(lanes.ready(0.0, 100)) == 50


def test_retries_take_a_fifth_while_fresh_ones_wait() -> None:
    lanes = Lanes(HostLimits(concurrency=5000), {}, max_in_flight=10_000)
    for n in range(1000):
        lanes.admit("a:80", delivery(n, endpoint=1, attempt=1))
        lanes.admit("a:80", delivery(n + 5000, endpoint=2))
    counts = Counter(d.attempt for d in lanes.ready(0.0, 500))
    assert 80 <= counts[1] <= 110


def test_the_adaptive_limit_is_cut_once_a_flight_and_grows_again() -> None:
    gate = Gate(HostLimits(concurrency=40))
    for _ in range(40):
        gate.started(0.0)
    for _ in range(40):
        gate.finished(1.0, started_mono=0.0, slower=True, success=False, hold_s=0.0)
    assert gate.limit == 20
    now = 1.0
    for _ in range(3000):
        now += 0.01
        while gate.has_slot():
            gate.started(now)
        gate.finished(now, started_mono=now, slower=False, success=True, hold_s=0.0)
    assert gate.limit == 40


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), min_size=1, max_size=120),
    st.lists(
        st.tuples(st.sampled_from(["ready", "finish", "slower", "withdraw", "tick"]), st.integers(0, 50)),
        max_size=120,
    ),
    st.integers(1, 6),
    st.sampled_from([0.0, 3.0]),
)
def test_a_delivery_is_in_one_place(
    admitted: list[tuple[int, int, bool]], steps: list[tuple[str, int]], concurrency: int, rate: float
) -> None:
    lanes = Lanes(HostLimits(rate=rate, concurrency=concurrency), {}, max_in_flight=20)
    host_of = {}
    waiting: dict[int, set[int]] = defaultdict(set)
    in_flight: dict[int, Delivery] = {}
    for n, (host, endpoint, retry) in enumerate(admitted):
        key = endpoint * 10 + host
        host_of[key] = f"h{host}:80"
        lanes.admit(host_of[key], delivery(n, key, int(retry)))
        waiting[key].add(n)
    now = 0.0
    for what, number in steps:
        if what == "ready":
            for started in lanes.ready(now, number):
                waiting[started.endpoint].remove(started.id)
                in_flight[started.id] = started
        elif what in ("finish", "slower") and in_flight:
            done = in_flight.pop(sorted(in_flight)[number % len(in_flight)])
            lanes.finished(done, DELIVERED if what == "finish" else SLOWER, now)
        elif what == "withdraw" and waiting:
            key = sorted(waiting)[number % len(waiting)]
            assert {d.id for d in lanes.withdraw(EndpointKey(key))} == waiting.pop(key)
        elif what == "tick":
            now += 0.1
        assert lanes.total_waiting == sum(map(len, waiting.values()))
        assert lanes.total_in_flight == len(in_flight)
        per_host = Counter(host_of[d.endpoint] for d in in_flight.values())
        assert all(count <= concurrency for count in per_host.values())
    for _ in range(10_000):
        if not lanes.total_waiting:
            break
        for started in lanes.ready(now, 20):
            waiting[started.endpoint].remove(started.id)
            in_flight[started.id] = started
        for done in list(in_flight.values()):
            lanes.finished(in_flight.pop(done.id), DELIVERED, now)
        now += 0.05
    assert not lanes.total_waiting, "nobody starves"


def test_a_snapshot_of_many_lanes_finds_trouble_at_once_and_the_longest_soon() -> None:
    lanes = Lanes(HostLimits(concurrency=1), {}, max_in_flight=10**6)
    for n in range(5000):
        lanes.admit(f"h{n}:80", delivery(n, n))
        lanes.admit(f"h{n}:80", delivery(n + 10_000, n))
    for n in range(50):
        lanes.admit("h4321:80", delivery(n + 20_000, 4321))
    started = {int(d.endpoint): d for d in lanes.ready(0.0, 10**6)}
    failed = Verdict(VerdictKind.RETRY, "answered 500", endpoint_failed=True)
    lanes.finished(started[3456], failed, 0.0)
    assert lanes.snapshot(1.0, 10)[0].host == "h3456:80"
    for _ in range(5):
        found = [s.host for s in lanes.snapshot(2.0, 10)]
    assert found[:2] == ["h3456:80", "h4321:80"]
    assert len(found) == 10
    found = [s.host for s in lanes.snapshot(100.0, 10)]
    assert found[0] == "h4321:80", "its error is no news any more"
    assert lanes.states(2.0) == {"concurrency": 4999, "ready": 1}


def test_what_is_forgotten_is_freed_at_once() -> None:
    """Not when the collector comes by: the daemon's looks every 50,000 objects, and hosts come and go."""
    lanes = Lanes(HostLimits(concurrency=3), {})
    gc.collect()
    gc.disable()
    try:
        for n in range(500):
            lanes.admit(f"h{n}:80", delivery(n, endpoint=n), float(n))
            (started,) = lanes.ready(float(n), 100)
            lanes.finished(started, DELIVERED, float(n))
        assert len(lanes._lanes) < 50
        assert sum(type(o) is _Lane for o in gc.get_objects()) == len(lanes._lanes)
    finally:
        gc.enable()


def test_a_hold_is_not_forgotten_with_its_lane() -> None:
    """A Retry-After of an hour was, after ten minutes without anything to send."""
    lanes = Lanes(HostLimits(concurrency=10), {})
    lanes.admit("a:80", delivery(1))
    (first,) = lanes.ready(0.0, 100)
    lanes.finished(first, Verdict(VerdictKind.RETRY, hold_lane_s=3600.0), 0.0)
    _drive(lanes, 601.0)
    lanes.admit("a:80", delivery(2), 601.0)
    assert lanes.ready(601.0, 100) == []


def test_a_rate_is_not_forgotten_with_its_lane() -> None:
    """A bucket that takes longer than ten minutes to fill was full again after them."""
    lanes = Lanes(HostLimits(rate=1.0, burst=2000), {})
    sent = 0
    for at in (0.0, 601.0):
        for n in range(3000):
            lanes.admit("a:80", delivery(n), at)
        while started := lanes.ready(at, 5000):
            for one in started:
                lanes.wrote(one, at)
                lanes.finished(one, DELIVERED, at)
            sent += len(started)
        lanes.withdraw(delivery(0).endpoint)
        _drive(lanes, at + 600.9)
    assert sent <= 2000 + 602


def _drive(lanes: Lanes, at: float) -> None:
    """Another host's traffic, with which idle lanes are looked at."""
    for n in range(5):
        lanes.admit("b:80", delivery(n, endpoint=2), at)
        for one in lanes.ready(at, 100):
            lanes.finished(one, DELIVERED, at)
