"""Fairness: equal backlogs get equal service, nobody starves, no slot stays empty, and none of it costs more with more."""

from __future__ import annotations

from collections import Counter, deque
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookd.core.lanes import Lanes
from hookd.core.model import EndpointKey, HostLimits
from tests.core.world import DELIVERED, FAILED, REFUSED, World, delivery

if TYPE_CHECKING:
    from collections.abc import Sequence


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index: 1 when all are equal, 1/n when one has all (Jain, Chiu and Hawe 1984)."""
    return sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(5, 80), st.integers(0, 2**32))
def test_equal_lanes_get_equal_service_over_ten_seconds(hosts: int, slots: int, seed: int) -> None:
    """Slots are scarce and every exchange takes another time: still the lanes share them."""
    dice = Random(seed)
    world = World(
        Lanes(HostLimits(concurrency=50), {}, max_in_flight=slots),
        lambda _h, _n: (dice.uniform(0.05, 0.15), DELIVERED),
        max_in_flight=slots,
    )
    for host in range(hosts):
        world.admit(f"h{host}:80", int(10 / 0.1 * slots / hosts * 2) + 60, endpoint=host + 1)
    world.run(10.0)
    served = Counter(s.host for s in world.starts)
    assert len(served) == hosts
    assert jain(list(served.values())) >= 0.99


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=2, max_size=12), st.integers(1, 8))
def test_endpoints_of_a_lane_share_it(backlogs: list[int], concurrency: int) -> None:
    """Max-min fair: whoever wants less than its turn gets all of it, the others share what is left, to within one."""
    world = World(Lanes(HostLimits(concurrency=concurrency), {}), lambda _h, _n: (0.01, DELIVERED))
    for n, backlog in enumerate(backlogs):
        world.admit("shared:80", backlog, endpoint=n + 1)
    world.run(0.5)
    served = Counter(s.delivery.endpoint for s in world.starts)
    hungry = [
        served[EndpointKey(n + 1)]
        for n, backlog in enumerate(backlogs)
        if served[EndpointKey(n + 1)] < backlog
    ]
    if hungry:
        assert max(hungry) - min(hungry) <= 1
        assert all(served[EndpointKey(n + 1)] >= min(b, *hungry) for n, b in enumerate(backlogs))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 6), st.integers(1, 40), st.sampled_from([0, 1]), st.sampled_from(["good", "bad", "dead"])
        ),
        min_size=1, max_size=30,
    ),
    st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32),
)  # fmt: skip
def test_work_is_conserved(
    batches: list[tuple[int, int, int, str]], concurrency: int, slots: int, seed: int
) -> None:
    """While a slot is free, no lane waits that may send and holds fewer slots than are free."""
    dice = Random(seed)
    kinds: dict[str, str] = {}
    verdicts = {"good": DELIVERED, "bad": FAILED, "dead": REFUSED}
    lanes = Lanes(HostLimits(concurrency=concurrency), {}, max_in_flight=slots)
    world = World(lanes, lambda h, _n: (dice.uniform(0.001, 0.3), verdicts[kinds[h]]), max_in_flight=slots)

    def look(_: Any) -> None:
        for started in lanes.ready(world.now, slots - lanes.total_in_flight):
            lanes_hold = {s.host: s for s in lanes.snapshot(world.now)}
            raise AssertionError(f"left over by the turn before: {started} {lanes_hold}")

    total = 0
    for n, (host, count, attempt, kind) in enumerate(batches):
        kinds.setdefault(f"h{host}:80", kind)
        world.admit(f"h{host}:80", count, endpoint=host * 100 + n, attempt=attempt)
        total += count
    world.after_turn = look
    world.run(40 * 3600.0)
    assert len(world.starts) == total, "nobody starves"
    assert len({s.delivery.id for s in world.starts}) == total, "nobody is sent twice"
    assert lanes.total_waiting == lanes.total_in_flight == 0


def test_n_slow_hosts_leave_a_part_to_the_others() -> None:
    """Without caps of their own, and with more hosts that never answer than slots would do for."""
    lanes = Lanes(HostLimits(concurrency=0), {}, max_in_flight=2000)
    world = World(lanes, lambda h, _n: (0.005, DELIVERED) if h[0] == "g" else (20.0, REFUSED))
    for n in range(100):
        world.admit(f"hole{n}:80", 1000, endpoint=n + 1)
    world.run(1.0)
    assert 2000 - lanes.total_in_flight >= 2000 // 102
    for n in range(5):
        world.admit(f"good{n}:80", 100, endpoint=1000 + n)
    world.run(1.5)
    assert sum(s.ended <= 1.5 for s in world.starts if s.host.startswith("good")) == 500


@pytest.mark.parametrize("trouble", ["throttled", "held", "parked", "empty"])
def test_picking_costs_the_same_whatever_waits(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in steps through lanes and queues, not in time: with 10,000 beside it as with 10."""

    def steps(others: int) -> int:
        lanes = Lanes(HostLimits(concurrency=10), {f"t{n}": HostLimits(rate=0.001) for n in range(others)})
        for n in range(others):
            key = EndpointKey(n + 100)
            host = f"t{n}:80" if trouble == "throttled" else f"x{n}:80" if trouble == "held" else "shared:80"
            if trouble == "parked":
                lanes.set_endpoint(key, 0.001, 1, parked=True, now=0.0)
            lanes.admit(host, delivery(n * 2, n + 100))
            lanes.admit(host, delivery(n * 2 + 1, n + 100))
            if trouble == "empty":
                lanes.withdraw(key)
        for started in lanes.ready(0.0, 10_000_000):
            lanes.finished(started, REFUSED if trouble == "held" else DELIVERED, 0.0)
        for started in lanes.ready(0.0, 10_000_000):
            lanes.finished(started, REFUSED, 0.0)
        for n in range(200):
            lanes.admit("good:80", delivery(10**6 + n, 7))
        looked = 0
        heads = Lanes._has_heads

        def counted(lane: Any) -> Any:
            nonlocal looked
            before = len(lane.fresh) + len(lane.retries)
            found = heads(lane)
            looked += 1 + before - len(lane.fresh) - len(lane.retries)
            return found

        monkeypatch.setattr(Lanes, "_has_heads", staticmethod(counted))
        running: deque[Any] = deque()
        for _ in range(250):
            running += lanes.ready(0.001, 5)
            if running:
                lanes.finished(running.popleft(), DELIVERED, 0.001)
        monkeypatch.setattr(Lanes, "_has_heads", staticmethod(heads))
        return looked

    assert steps(10_000) <= steps(10) + 40
