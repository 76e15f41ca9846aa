"""Shares: any number of daemons end with the same number of shards, however they come and go."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from hookd.core.shares import View, plan, share

SHARDS = tuple(range(64))


@dataclass
class Daemon:
    """One that looks, plans, and acts on the locks of ``World``."""

    pid: int
    owned: set[int] = field(default_factory=set)
    leaving: set[int] = field(default_factory=set)
    busy: set[int] = field(default_factory=set)


class World:
    """The locks."""

    def __init__(self) -> None:
        self.daemons: list[Daemon] = []

    def view(self, me: Daemon) -> View:
        taken = frozenset(s for d in self.daemons if d is not me for s in d.owned)
        return View(tuple(sorted(d.pid for d in self.daemons)), me.pid, SHARDS, taken)

    def step(self, me: Daemon, view: View) -> None:
        todo = plan(view, me.owned, me.leaving, lambda: sorted(me.owned, key=lambda s: (s in me.busy, s)))
        assert not set(todo.take) & me.owned
        assert set(todo.leave) <= me.owned - me.leaving
        assert set(todo.stay) <= me.leaving
        me.leaving |= set(todo.leave)
        me.leaving -= set(todo.stay)
        released = {s for s in me.leaving if s not in me.busy}
        me.leaving -= released
        me.owned -= released
        others = {s for d in self.daemons if d is not me for s in d.owned}
        me.owned |= set(todo.take) - others

    def even(self) -> bool:
        counts = [len(d.owned) for d in self.daemons]
        return (
            sum(counts) == 64 and max(counts) - min(counts) <= 1 and not any(d.leaving for d in self.daemons)
        )


@given(st.integers(1, 9), st.integers(0, 2**32))
def test_shares_add_up(count: int, seed: int) -> None:
    pids = random.Random(seed).sample(range(10_000), count)
    shares = [share(View(tuple(sorted(pids)), pid, SHARDS, frozenset())) for pid in pids]
    assert sum(shares) == 64
    assert max(shares) - min(shares) <= 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["join", "die", "step", "stale", "busy", "idle"]), st.integers(0, 2**32))
    )
)
def test_whatever_happens_it_becomes_even(steps: list[tuple[str, int]]) -> None:
    world = World()
    numbers = 0
    stale: dict[int, View] = {}
    for what, seed in [("join", 0), *steps]:
        dice = random.Random(seed)
        me = dice.choice(world.daemons) if world.daemons else None
        match what:
            case "join":
                numbers += 1
                world.daemons.append(Daemon(dice.randrange(10_000) * 100 + numbers))
            case "die" if me is not None and len(world.daemons) > 1:
                world.daemons.remove(me)
            case "step" if me is not None:
                world.step(me, world.view(me))
            case "stale" if me is not None:
                # it acts on what it saw a while ago
                world.step(me, stale.get(me.pid, world.view(me)))
                stale[me.pid] = world.view(me)
            case "busy" if me is not None:
                me.busy = set(dice.sample(SHARDS, 20))
            case "idle" if me is not None:
                me.busy = set()
        owned = [s for d in world.daemons for s in d.owned]
        assert len(owned) == len(set(owned)), "no shard has two owners"
    for daemon in world.daemons:
        daemon.busy = set()
    for _ in range(4 * len(world.daemons) + 4):
        for daemon in world.daemons:
            world.step(daemon, world.view(daemon))
    assert world.even()


def test_a_busy_shard_is_left_last() -> None:
    view = View((1, 2), 1, SHARDS, frozenset())
    owned = set(SHARDS)
    busy = {0, 1, 2, 3}
    todo = plan(view, owned, (), lambda: sorted(owned, key=lambda s: (s in busy, s)))
    assert len(todo.leave) == 32
    assert not busy & set(todo.leave)


def test_one_that_died_is_replaced_at_once() -> None:
    alone = View((7,), 7, SHARDS, frozenset())
    assert set(plan(alone, range(32), (), tuple).take) == set(range(32, 64))
