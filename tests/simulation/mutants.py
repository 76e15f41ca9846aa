"""
Known bugs, put in on purpose: a simulation that does not see them proves nothing.

Each replaces a part of hookd, or of what stands beside it, by one that is wrong in one way.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

from hookd.core.lanes import Lanes
from hookd.core.limits import Gate
from hookd.core.model import Event, Outcome, OutcomeKind, Result, Verdict, VerdictKind
from hookd.core.reads import Snapshot
from hookd.dispatcher import Dispatcher
from hookd.feed import Feed
from hookd.postgres.owner import OwnerSession

from .network import ScriptedExchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hookd.core.model import Delivery
    from hookd.core.reads import Row
    from hookd.core.shares import View


def settled_before_the_answer() -> Any:
    """A delivery is settled as soon as it is sent."""
    start = Dispatcher._start

    def wrong(self: Dispatcher, delivery: Delivery) -> bool:
        under_way = start(self, delivery)
        if under_way:
            outcome = Outcome(OutcomeKind.ANSWERED, sent=True, status=200)
            self._recorder.add(Result(delivery, delivery.endpoint, outcome, Verdict(VerdictKind.DELIVERED)))
        return under_way

    return mock.patch.object(Dispatcher, "_start", wrong)


def no_fencing() -> Any:
    """A daemon takes all shards for its own, whoever holds their locks."""
    acquire, look = OwnerSession.acquire, OwnerSession.look

    async def takes(self: OwnerSession, shards: Sequence[int]) -> set[int]:
        await acquire(self, shards)
        self.shards |= set(shards)
        return set(shards)

    async def sees(self: OwnerSession) -> View:
        return replace(await look(self), members=(self.backend,), taken=frozenset())

    return mock.patch.multiple(OwnerSession, acquire=takes, look=sees)


def locks_outlive_the_session() -> Any:
    """After a lost session a daemon goes on with the shards that it had, without asking for them again."""
    acquire = OwnerSession.acquire
    had: dict[int, set[int]] = {}

    async def wrong(self: OwnerSession, shards: Sequence[int]) -> set[int]:
        gained = await acquire(self, shards)
        mine = had.setdefault(id(self._clock), set())
        mine |= gained
        self.shards |= mine
        return gained | mine

    return mock.patch.object(OwnerSession, "acquire", wrong)


def always_vouched() -> Any:
    """Exchanges start though the session has not answered for long."""
    return mock.patch.object(OwnerSession, "trusted", lambda _self, _now: True)


def forgeries_believed() -> Any:
    """An answer that was there before the request is taken for the answer to it."""
    begin = ScriptedExchange.begin

    def wrong(self: ScriptedExchange, *args: Any) -> Any:
        self.believes_forgeries = True
        return begin(self, *args)

    return mock.patch.object(ScriptedExchange, "begin", wrong)


def late_commits_forgotten() -> Any:
    """What was under way when a snapshot was taken is not looked for in the next."""
    parse = Snapshot.parse

    def wrong(text: str) -> Snapshot:
        return replace(parse(text), xip=())

    return mock.patch.object(Snapshot, "parse", wrong)


def place_not_lowered() -> Any:
    """A row that arrives below the place of a full queue is left to a refill that has passed it."""

    def wrong(self: Feed, row: Row, room: Any) -> bool:
        place = self.backlogs.of(row.endpoint).place
        if not self.backlogs.has_room(row.endpoint, room, timed=False):
            self.backlogs.lower_place(row.endpoint, row.id - 1 if place is None else place)
            return False
        return place is None

    return mock.patch.object(Feed, "_hold_fresh", wrong)


def retries_dropped() -> Any:
    """What was rescheduled is not read again."""
    settled = Feed.settled

    def wrong(self: Feed, final: Any, rescheduled: Any, *, dropped: Any = ()) -> None:
        settled(self, [*final, *(d for d, _ in rescheduled)], (), dropped=dropped)

    return mock.patch.object(Feed, "settled", wrong)


def event_lost_between_reads() -> Any:
    """An event whose last delivery ends while other events are read is taken for one that retention has dropped."""

    async def wrong(self: Feed, rows: Sequence[Row]) -> None:
        from hookd.core.model import Delivery

        missing = list(
            dict.fromkeys(
                r.event_id for r in rows if r.replaced_by is None and r.event_id not in self._events
            )
        )
        if missing:
            self._events.update(await self._reads.events(missing))
        for row in rows:
            event = self._events.get(row.event_id)
            if event is None:
                event = Event(row.event_id, "", "", b"", created_at=0.0, expires_at=0.0)
            event.deliveries += 1
            due_at = row.due_at.timestamp() if row.due_at else None
            self._line.admit(
                Delivery(
                    row.id, row.endpoint, event, row.attempt, row.shard, row.order_key, due_at, row.replay, row.coalesce_key,
                    row.replaced_by,
                )
            )  # fmt: skip

    return mock.patch.object(Feed, "_admit", wrong)


def settled_rows_come_back() -> Any:
    """A read that began before a settle was committed may bring its rows back."""
    forget = Feed._forget

    def wrong(self: Feed, delivery: Delivery, *, gone: bool = False) -> None:
        forget(self, delivery, gone=gone)
        self._remembered.clear()

    return mock.patch.object(Feed, "_forget", wrong)


def in_flight_unknown() -> Any:
    """After a lost session the new feed does not know what is still in flight."""
    init = Feed.__init__

    def wrong(self: Feed, *args: Any, known: Iterable[Any], **named: Any) -> None:
        init(self, *args, known=(), **named)

    return mock.patch.object(Feed, "__init__", wrong)


def released_while_busy() -> Any:
    """A shard is given up while exchanges of it are under way."""
    from collections import Counter

    return mock.patch.object(Dispatcher, "busy_shards", lambda _: Counter())


def snapshot_after_recovery() -> Any:
    """Recovery reads first and takes its snapshot then: what commits in between is in neither."""
    recover = Feed._recover

    async def wrong(self: Feed) -> None:
        first = self._since is None
        await recover(self)
        if first:
            await asyncio.sleep(0.2)
            self._since, _ = await self._reads.snapshot()

    return mock.patch.object(Feed, "_recover", wrong)


def rate_forgotten() -> Any:
    """A write does not count."""
    return mock.patch.object(Gate, "wrote", lambda *_: None)


def one_too_many() -> Any:
    """A host gets one exchange more than it may."""

    def wrong(self: Gate) -> bool:
        return self.in_flight <= self.limit and self.breaker.lets_one_go()

    return mock.patch.object(Gate, "has_slot", wrong)


def order_forgotten() -> Any:
    """A row with an order key goes into memory as any other."""

    def wrong(self: Feed, row: Row, *, head: bool) -> bool:
        return self._states.stands(row, self._give_way)

    return mock.patch.object(Feed, "_turn_of", wrong)


def moved_in_flight() -> Any:
    """An endpoint's rows are forwarded to its new shard while they are in flight."""
    return mock.patch.object(Dispatcher, "under_way", lambda _self, _keys: [])


def held_and_forgotten() -> Any:
    """Held deliveries are let go of, and nobody is told."""
    return mock.patch.object(Dispatcher, "_release", lambda self, delivery: self._held.pop(delivery.id))


def full_spins() -> Any:
    """A lane whose time has come asks for turns while there is no free slot."""
    next_wake = Lanes.next_wake

    def wrong(self: Dispatcher) -> None:
        turn(self)
        if not self.stopping and len(self._in_flight) >= self.max_in_flight:
            now = self._clock.mono()
            wake_at = next_wake(self._lanes, now)
            if wake_at is not None:
                self._wake_at(wake_at, now)

    turn = Dispatcher._turn
    return mock.patch.object(Dispatcher, "_turn", wrong)


MUTANTS: dict[str, tuple[Callable[[], Any], tuple[str, ...], int]] = {
    make.__name__: (make, faults, first)
    for make, faults, first in (
        (settled_before_the_answer, (), 1),
        (no_fencing, ("crash",), 1),
        (locks_outlive_the_session, ("terminate",), 1),
        (always_vouched, ("partition", "hosts"), 44),
        (forgeries_believed, ("hosts",), 29),
        (late_commits_forgotten, ("late",), 2),
        (place_not_lowered, ("late",), 18),
        (retries_dropped, ("hosts",), 6),
        (event_lost_between_reads, (), 13),
        (settled_rows_come_back, ("hosts", "slow_reads"), 175),
        (in_flight_unknown, ("terminate", "sluggish"), 1),
        (released_while_busy, ("crash", "term"), 59),
        (snapshot_after_recovery, (), 12),
        (rate_forgotten, (), 1),
        (one_too_many, (), 3),
        (order_forgotten, ("late", "hosts"), 1),
        (moved_in_flight, ("move", "sluggish"), 30),
        (held_and_forgotten, ("ours",), 2),
        (full_spins, ("hosts",), 14),
    )
}
"""Each with the faults without which it could not show, and the seed from which it is looked for: the first that showed it when
the worlds were last changed, to save time.  Another one is as good."""


@contextlib.contextmanager
def mutated(name: str) -> Iterator[None]:
    """Put a bug in for a while; none where there is no name."""
    if not name:
        yield
        return
    with MUTANTS[name][0]():
        yield


def faults_of(name: str) -> tuple[str, ...]:
    """The faults that a mutant needs."""
    return MUTANTS[name][1] if name else ()
