"""An endpoint that answers nothing but errors: parked, probed, brought back in a ramp."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookd.core.breaker import ENDPOINT
from hookd.core.lanes import Lanes
from hookd.core.model import EndpointKey, HostLimits, Verdict
from tests.core.world import DELIVERED, FAILED, REFUSED, World

HOUR = 3600.0
BAD, GOOD = EndpointKey(1), EndpointKey(2)


def shared_host(healthy_from: float, verdict: Verdict = FAILED) -> World:
    """A host where endpoint 1 fails until then, and endpoint 2 does not."""
    world = World(Lanes(HostLimits(concurrency=20), {}), lambda _h, _n: (0.01, DELIVERED))

    def answer(endpoint: EndpointKey) -> tuple[float, Verdict]:
        return (0.01, verdict) if endpoint == BAD and world.now < healthy_from else (0.01, DELIVERED)

    world.answers_for = answer
    return world


def keep_supplied(world: World, until: float, every: float) -> None:
    """New events for both, one every so often."""
    while world.now < until:
        world.admit("shared:80", endpoint=BAD)
        world.admit("shared:80", endpoint=GOOD)
        world.run(min(until, world.now + every))


def of(world: World, endpoint: EndpointKey) -> list[float]:
    return [s.at for s in world.starts if s.delivery.endpoint == endpoint]


def test_it_is_parked_after_a_minute_of_errors_and_not_before() -> None:
    world = shared_host(HOUR * 9)
    keep_supplied(world, HOUR, 1.0)
    ((parked_at, endpoint, parked),) = world.parked
    assert endpoint == BAD
    assert parked
    assert ENDPOINT.over_s <= parked_at <= ENDPOINT.over_s + 2
    probes = [at for at in of(world, BAD) if at > parked_at + 1]
    gaps = [b - a for a, b in pairwise([parked_at, *probes])]
    assert gaps[:4] == pytest.approx([5, 10, 20, 40], abs=0.1)
    assert max(gaps) == pytest.approx(ENDPOINT.most_s, abs=0.1)
    assert len(of(world, GOOD)) == HOUR, "its neighbour notices nothing"
    assert all(s.delivery.attempt == 0 for s in world.starts), "who waits uses up no attempts"


def test_few_failures_do_not_park_it_however_long_they_take() -> None:
    world = shared_host(HOUR * 9)
    for _ in range(ENDPOINT.failures - 1):
        world.admit("shared:80", endpoint=BAD)
        world.run(world.now + 20)
    assert not world.parked
    world.answers_for = lambda _: (0.01, DELIVERED)
    world.admit("shared:80", endpoint=BAD)
    world.run(world.now + 20)
    world.answers_for = lambda _: (0.01, FAILED)
    for _ in range(ENDPOINT.failures - 1):
        world.admit("shared:80", endpoint=BAD)
        world.run(world.now + 20)
    assert not world.parked, "a success in between begins it anew"


def test_it_comes_back_in_a_ramp() -> None:
    world = shared_host(600.0)
    world.admit("shared:80", 5000, endpoint=BAD)
    keep_supplied(world, 599.0, 1.0)
    world.run(HOUR)
    (_, _, first), (back_at, _, second) = world.parked
    assert (first, second) == (True, False)
    assert 600 <= back_at <= 600 + ENDPOINT.most_s + 1
    delivered = [
        s
        for s in world.starts
        if s.delivery.endpoint == BAD and s.at >= back_at - 0.02 and s.verdict is DELIVERED
    ]
    at_once = [sum(s.at <= back_at - 1e-6 + n * 0.01 < s.ended for s in delivered) for n in range(1, 6)]
    assert at_once[0] <= 2
    assert all(later <= 2 * earlier + 1 for earlier, later in pairwise(at_once))
    assert not world.lanes.total_waiting


def test_no_answer_at_all_is_the_hosts_trouble_and_parks_nobody() -> None:
    world = shared_host(HOUR * 9, REFUSED)
    world.answers_for = lambda _: (0.01, REFUSED)
    keep_supplied(world, HOUR, 1.0)
    assert not world.parked


def test_parked_in_another_life() -> None:
    world = shared_host(HOUR * 9)
    world.lanes.set_endpoint(BAD, None, None, parked=True, now=0.0)
    world.admit("shared:80", 100, endpoint=BAD)
    world.run(4.9)
    assert of(world, BAD) == [0.0], "one probe at once, and no flood"
    world.lanes.set_endpoint(BAD, None, None, parked=False, now=world.now)
    world.answers_for = lambda _: (0.01, DELIVERED)
    world.run(20.0)
    assert not world.lanes.total_waiting, "resumed by hand"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["good", "bad", "dead", "park", "resume", "limit", "free"]), min_size=1, max_size=60
    ),
    st.integers(1, 5),
)
def test_nobody_is_forgotten_whatever_happens_to_an_endpoint(script: list[str], own: int) -> None:
    verdicts = {"good": DELIVERED, "bad": FAILED, "dead": REFUSED}
    world = World(Lanes(HostLimits(concurrency=4), {}), lambda _h, _n: (0.01, DELIVERED))
    world.admit("shared:80", 40, endpoint=BAD)
    world.admit("shared:80", 10, endpoint=BAD, attempt=1)
    for what in script:
        if what in verdicts:
            verdict = verdicts[what]
            world.answers_for = lambda _, v=verdict: (0.01, v)
        else:
            limits = (0.5, own) if what == "limit" else (None, None)
            world.lanes.set_endpoint(BAD, *limits, parked=what == "park", now=world.now)
        world.run(world.now + 7.0)
    world.answers_for = lambda _: (0.01, DELIVERED)
    world.run(world.now + HOUR)
    assert not world.lanes.total_waiting
    assert len({s.delivery.id for s in world.starts}) == len(world.starts) == 50
