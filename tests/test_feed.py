"""The feed with reads that a test holds back: what may happen between them."""

from __future__ import annotations

import asyncio
import datetime
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from hookd.clock import SystemClock
from hookd.core.model import Delivery, DeliveryId, Endpoint, EndpointKey, EndpointState, Event
from hookd.core.reads import Arrivals, Reach, Row, Snapshot
from hookd.core.states import States
from hookd.feed import FORWARDING_MOST, Feed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence


ENDPOINT = Endpoint(EndpointKey(1), UUID(int=1), "t", "http://a.test/", "a.test:80", 0)
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
SNAPSHOT = Snapshot(10, 10, ())


def row(number: int, event: int, **more: Any) -> Row:
    made = Row(DeliveryId(number), UUID(int=event), EndpointKey(1), 0, 0, None, None, replay=False)
    return made._replace(**more)


class Line:
    """Keeps what is admitted, until it is told to let go of it."""

    def __init__(self) -> None:
        self.admitted: list[Delivery] = []
        self.endpoints: dict[EndpointKey, Endpoint] = {}

    def serve(self, endpoint: Endpoint) -> None:
        self.endpoints[endpoint.key] = endpoint

    def served(self, key: EndpointKey) -> Endpoint | None:
        return self.endpoints.get(key)

    def withdraw(self, key: EndpointKey, *, beyond: int = 0) -> list[Delivery]:
        taken, self.admitted = self.admitted, []
        return taken

    def waiting(self, key: EndpointKey) -> int:
        return len(self.admitted)

    def waiting_timed(self, key: EndpointKey) -> int:
        return sum(d.due_at is not None for d in self.admitted)

    def total_waiting(self) -> int:
        return len(self.admitted)

    def backed_up(self) -> bool:
        return False

    def under_way(self, keys: Collection[EndpointKey]) -> list[DeliveryId]:
        return [DeliveryId(77)]

    def admit(self, delivery: Delivery) -> None:
        self.admitted.append(delivery)


class Reads:
    """Has every event; ``meanwhile`` happens while it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[UUID]] = []
        self.heads_asked: list[Any] = []
        self.head: Row | None = None
        self.arrived: list[Row] = []
        self.due: list[Row] = []
        self.meanwhile: Callable[[], None] = list[None]().clear

    async def recover(self) -> tuple[list[EndpointKey], list[tuple[EndpointKey, float]]]:
        return [ENDPOINT.key], []

    async def endpoints_of(self, shards: Iterable[int]) -> list[Endpoint]:
        return []

    async def endpoints(self, keys: Iterable[EndpointKey]) -> list[Endpoint]:
        return [replace(ENDPOINT, state=EndpointState.ACTIVE)]

    async def flag_sleep(self, shards: Iterable[int], *, asleep: bool) -> None:
        pass

    async def events(self, ids: Sequence[UUID]) -> dict[UUID, Event]:
        self.asked.append(list(ids))
        self.meanwhile()
        await asyncio.sleep(0)
        return {i: Event(i, "a.b", "t", b"{}", 1.0) for i in ids}

    async def heads(self, keys: Sequence[Any]) -> list[Row]:
        self.heads_asked += keys
        return [self.head] if self.head is not None else []

    async def arrivals(self, since: Snapshot, shards: Iterable[int], window: int) -> Arrivals:
        arrived, self.arrived = self.arrived, []
        return Arrivals(SNAPSHOT, NOW.timestamp(), arrived, [])

    async def refill_fresh(self, demands: Sequence[Any]) -> list[Row]:
        return []

    async def refill_due(self, demands: Sequence[Any]) -> list[Row]:
        due, self.due = self.due, []
        return due


class Forwarder:
    def __init__(self) -> None:
        self.forwarded: list[tuple[list[EndpointKey], list[DeliveryId]]] = []
        self.reached: list[Reach] = []
        self.left: list[Reach] = []

    async def forward(self, reaches: Sequence[Reach], under_way: Iterable[DeliveryId]) -> list[Reach]:
        self.forwarded.append(([reach.endpoint for reach in reaches], list(under_way)))
        self.reached += reaches
        left, self.left = self.left, []
        return left


def made(reads: Reads, line: Line, forwarder: Forwarder) -> Feed:
    feed = Feed(reads, forwarder, line, SystemClock(), window=100, known=[])  # type: ignore[arg-type]
    feed.shards = {0, 1}
    feed._since = SNAPSHOT
    feed._db_offset = NOW.timestamp() - SystemClock().mono()
    feed._serve(ENDPOINT)
    return feed


def test_an_event_whose_other_delivery_ends_while_events_are_read_is_still_sent() -> None:
    """It was taken for one whose day was dropped, and ended as expired: seen as 9,999 of 10,000 events."""

    async def go() -> None:
        line, reads = Line(), Reads()
        nobody: Any = None
        feed = Feed(reads, nobody, line, SystemClock(), window=100, known=[])  # type: ignore[arg-type]
        await feed._admit([row(1, 7)])
        reads.meanwhile = line.admitted.clear
        await feed._admit([row(2, 7), row(3, 8)])
        assert reads.asked == [[UUID(int=7)], [UUID(int=8)]]
        assert [(d.id, d.event.type, d.event.expires_at) for d in line.admitted] == [
            (2, "a.b", None),
            (3, "a.b", None),
        ]

    asyncio.run(go())


def test_a_row_that_is_due_before_the_place_is_read_when_it_is_due() -> None:
    """What an ended endpoint is owed is read before its time, and clocks are set back: the place is beyond the row."""

    async def go() -> None:
        feed = made(Reads(), Line(), Forwarder())
        backlog = feed.backlogs.of(ENDPOINT.key)
        backlog.due_place = (NOW + datetime.timedelta(hours=2), 5)
        late = row(9, 1, due_at=NOW + datetime.timedelta(hours=1))
        assert not feed._hold_due(late, Counter())
        assert late.due_at is not None
        assert backlog.due_place < (late.due_at, late.id)

    asyncio.run(go())


def test_a_row_in_the_shard_that_its_endpoint_has_left_is_forwarded_and_not_sent() -> None:
    """It was sent by whoever owned both shards, and settled by nobody when one of them was given up."""

    async def go() -> None:
        reads, line, forwarder = Reads(), Line(), Forwarder()
        feed = made(reads, line, forwarder)
        reads.arrived = [row(1, 1, shard=1), row(2, 2)]
        await feed._turn()
        assert [d.id for d in line.admitted] == [2]
        await feed._turn()
        assert forwarder.forwarded == [([ENDPOINT.key], [77])], "and not what is under way"

    asyncio.run(go())


def test_a_large_backlog_is_forwarded_in_slices_and_what_comes_meanwhile_after_it() -> None:
    """All of it in one statement was given up after 30 s, and begun again, for ever."""

    async def go() -> None:
        forwarder = Forwarder()
        feed = made(Reads(), Line(), forwarder)
        feed._moved.add(ENDPOINT.key)
        whole, middle = Reach(ENDPOINT.key), Reach(ENDPOINT.key, 500)
        forwarder.left = [middle]
        await feed._turn()
        assert feed._wake.is_set(), "and goes on at once"
        feed._moved.add(ENDPOINT.key)
        await feed._turn()
        await feed._turn()
        assert forwarder.reached == [whole, middle, whole], (
            "what was found meanwhile may lie before the middle"
        )
        await feed._turn()
        assert len(forwarder.reached) == 3

    asyncio.run(go())


def test_many_endpoints_are_forwarded_one_after_another() -> None:
    async def go() -> None:
        forwarder = Forwarder()
        feed = made(Reads(), Line(), forwarder)
        keys = {EndpointKey(n) for n in range(2 * FORWARDING_MOST + 1)}
        feed._moved.update(keys)
        for _ in range(3):
            await feed._turn()
        assert [len(asked) for asked, _ in forwarder.forwarded] == [FORWARDING_MOST, FORWARDING_MOST, 1]
        assert {reach.endpoint for reach in forwarder.reached} == keys

    asyncio.run(go())


def test_what_lies_in_a_shard_that_an_endpoint_has_left_is_forwarded_when_that_is_gained() -> None:
    """Reads by key had passed it while it was another owner's, and nobody looked again."""

    async def go() -> None:
        reads, line, forwarder = Reads(), Line(), Forwarder()
        feed = made(reads, line, forwarder)
        feed.shards = {1}
        feed._serve(replace(ENDPOINT, shard=1, former_shards=(0,)))
        feed._unread_shards = {0}
        await feed._recover()
        assert feed.shards == {0, 1}
        await feed._turn()
        assert [keys for keys, _ in forwarder.forwarded] == [[ENDPOINT.key]]

    asyncio.run(go())


@pytest.mark.parametrize("noticed", ["with the rows", "later"])
def test_what_was_to_end_before_its_time_waits_for_it_when_its_endpoint_is_resumed(noticed: str) -> None:
    """It was sent at once: what a disabled endpoint is owed is read whether it is due or not."""

    async def go() -> None:
        reads, line, forwarder = Reads(), Line(), Forwarder()
        feed = made(reads, line, forwarder)
        disabled = replace(ENDPOINT, state=EndpointState.DISABLED)
        feed._endpoint_changed(disabled)
        if noticed == "later":
            reads.endpoints = partial(_none_other, disabled)  # type: ignore[method-assign]
        reads.due = [
            row(1, 1, due_at=NOW - datetime.timedelta(hours=1)),
            row(2, 2, due_at=NOW + datetime.timedelta(hours=1)),
        ]
        await feed._turn()
        if noticed == "later":
            assert [d.id for d in line.admitted] == [1, 2]
            feed._endpoint_changed(ENDPOINT)
        assert [d.id for d in line.admitted] == [1]
        assert feed.known == {1}
        assert feed.backlogs.of(ENDPOINT.key).due_place < (NOW + datetime.timedelta(hours=1), 2)

    asyncio.run(go())


async def _none_other(endpoint: Endpoint, _keys: Iterable[EndpointKey]) -> list[Endpoint]:
    return [endpoint]


def test_what_waits_when_its_endpoint_moves_is_let_go_of_and_read_again() -> None:
    async def go() -> None:
        reads, line, forwarder = Reads(), Line(), Forwarder()
        feed = made(reads, line, forwarder)
        reads.arrived = [row(1, 1)]
        await feed._turn()
        feed._endpoint_changed(replace(ENDPOINT, shard=1, former_shards=(0,)))
        assert line.admitted == []
        assert feed.known == set()
        await feed._turn()
        assert [keys for keys, _ in forwarder.forwarded] == [[ENDPOINT.key]]
        reads.arrived = [row(1, 1, shard=1)]
        await feed._turn()
        assert [d.id for d in line.admitted] == [1]

    asyncio.run(go())


def test_rows_that_arrived_while_their_endpoint_was_thought_to_be_elsewhere_are_read() -> None:
    async def go() -> None:
        reads, line = Reads(), Line()
        feed = made(reads, line, Forwarder())
        feed._endpoint_changed(replace(ENDPOINT, shard=5, former_shards=(0,)))
        reads.arrived = [row(1, 1)]
        await feed._turn()
        assert line.admitted == []
        feed._endpoint_changed(replace(ENDPOINT, former_shards=(0, 5)))
        assert feed.backlogs.of(ENDPOINT.key).place == 0
        assert list(feed.backlogs.demand_fresh(feed._may_read))

    asyncio.run(go())


def test_a_head_that_an_older_row_has_overtaken_is_not_sent() -> None:
    """The successor was read from behind the last one's place; an older row committed late, between two reads of arrivals."""

    async def go() -> None:
        reads, line = Reads(), Line()
        feed = made(reads, line, Forwarder())
        key = ENDPOINT.key, "k"
        feed._heads.take(key, DeliveryId(20))
        feed._heads.left(key, DeliveryId(20), gone=True, wanted=True)
        reads.head = row(30, 3, order_key="k")
        reads.arrived = [row(10, 1, order_key="k"), row(30, 3, order_key="k")]
        await feed._turn()
        assert line.admitted == []
        reads.head = row(10, 1, order_key="k")
        await feed._turn()
        assert [d.id for d in line.admitted] == [10]
        assert [after for *_, after in reads.heads_asked] == [20, 9]

    asyncio.run(go())


def test_a_head_is_overtaken_by_an_older_row_in_a_shard_that_its_endpoint_has_left() -> None:
    """One transaction inserted both, and the endpoint moved in between (seed 55609)."""

    async def go() -> None:
        reads, line, forwarder = Reads(), Line(), Forwarder()
        feed = made(reads, line, forwarder)
        feed._serve(replace(ENDPOINT, former_shards=(1,)))
        feed._heads.take((ENDPOINT.key, "k"), DeliveryId(20))
        feed._heads.left((ENDPOINT.key, "k"), DeliveryId(20), gone=True, wanted=True)
        reads.head = row(90, 3, order_key="k")
        reads.arrived = [row(60, 1, order_key="k", shard=1), row(90, 3, order_key="k")]
        await feed._turn()
        assert line.admitted == []
        reads.head = row(60, 1, order_key="k")
        await feed._turn()
        assert [keys for keys, _ in forwarder.forwarded] == [[ENDPOINT.key]]
        assert [after for *_, after in reads.heads_asked] == [20, 59]
        assert [d.id for d in line.admitted] == [60]

    asyncio.run(go())


@pytest.mark.parametrize(("former_shard", "after"), [(1, 20), (5, 0)])
def test_the_next_of_a_key_is_looked_for_from_the_start_where_older_rows_may_come_unseen(
    former_shard: int, after: int
) -> None:
    """
    A transaction that began before its endpoint moved commits rows into the shard that it has left.

    Where that is read here too they are arrivals; where another reads it, nothing tells of them (seed 44984).
    """

    async def go() -> None:
        reads = Reads()
        feed = made(reads, Line(), Forwarder())
        feed._serve(replace(ENDPOINT, former_shards=(former_shard,)))
        feed._heads.take((ENDPOINT.key, "k"), DeliveryId(20))
        feed._heads.left((ENDPOINT.key, "k"), DeliveryId(20), gone=True, wanted=True)
        await feed._turn()
        assert [place for *_, place in reads.heads_asked] == [after]

    asyncio.run(go())


def test_the_head_that_was_another_owners_is_asked_for_again() -> None:
    """It may be settled there, and then nothing arrives here."""

    async def go() -> None:
        reads, line = Reads(), Line()
        feed = made(reads, line, Forwarder())
        reads.arrived = [row(2, 2, order_key="k")]
        reads.head = row(1, 1, order_key="k", shard=5)
        await feed._turn()
        assert line.admitted == []
        feed._look_behind()
        reads.head = row(2, 2, order_key="k")
        await feed._turn()
        assert [d.id for d in line.admitted] == [2]

    asyncio.run(go())


def test_what_was_dropped_is_read_again_where_it_is_ours() -> None:
    async def go() -> None:
        reads, line = Reads(), Line()
        feed = made(reads, line, Forwarder())
        reads.arrived = [row(4, 1)]
        await feed._turn()
        feed.settled((), (), dropped=line.withdraw(ENDPOINT.key))
        assert feed.known == set()
        assert feed.backlogs.demand_fresh(feed._may_read) == [(ENDPOINT.key, 3, 4)]

    asyncio.run(go())


def test_a_retry_that_another_owner_made_of_what_was_in_flight_here_is_found() -> None:
    """It was read while it was taken to be in memory, and so passed by; it is not where the delivery had been."""

    async def go() -> None:
        reads, line = Reads(), Line()
        feed = made(reads, line, Forwarder())
        feed.known.add(DeliveryId(4))
        retry = row(4, 1, attempt=1, due_at=NOW - datetime.timedelta(seconds=1))
        feed.backlogs.due(ENDPOINT.key, 0.0)
        reads.due = [retry]
        await feed._turn()
        assert line.admitted == []
        feed.settled(
            (),
            (),
            dropped=[Delivery(DeliveryId(4), ENDPOINT.key, Event(UUID(int=1), "a.b", "t", b"{}", 1.0), 0, 0)],
        )
        ((key, *place, _),) = feed.backlogs.demand_due(feed.db_now(), feed._mine, feed._may_read)
        assert key == ENDPOINT.key
        assert place < [retry.due_at, 4]

    asyncio.run(go())


def test_a_retry_that_another_owner_made_is_found_though_a_read_that_passed_it_was_under_way() -> None:
    """The place was lowered while that read was under way, and raised again at its end."""

    async def go() -> None:
        retry = row(4, 1, attempt=1, due_at=NOW - datetime.timedelta(seconds=1))

        class Dropping(Reads):
            async def refill_due(self, demands: Sequence[Any]) -> list[Row]:
                delivery = Delivery(
                    DeliveryId(4), ENDPOINT.key, Event(UUID(int=1), "a.b", "t", b"{}", 1.0), 0, 0
                )
                feed.settled((), (), dropped=[delivery])
                return [retry]

        line = Line()
        feed = made(Dropping(), line, Forwarder())
        feed.known.add(DeliveryId(4))
        feed.backlogs.due(ENDPOINT.key, 0.0)
        await feed._refill_due()
        assert line.admitted == []
        ((key, *place, _),) = feed.backlogs.demand_due(feed.db_now(), feed._mine, feed._may_read)
        assert key == ENDPOINT.key
        assert place < [retry.due_at, 4]

    asyncio.run(go())


def test_nothing_is_taken_for_an_endpoint_that_a_read_found_paused() -> None:
    """It was disabled when its rows were asked for, and is unverified, or its secrets cannot be read, since then."""

    async def go() -> None:
        paused = replace(ENDPOINT, state=EndpointState.PAUSED)

        class Paused(Reads):
            async def endpoints(self, keys: Iterable[EndpointKey]) -> list[Endpoint]:
                return [paused]

            async def refill_fresh(self, demands: Sequence[Any]) -> list[Row]:
                return [row(1, 1)]

        reads, line = Paused(), Line()
        feed = made(reads, line, Forwarder())
        feed._endpoint_changed(replace(ENDPOINT, state=EndpointState.DISABLED))
        reads.due = [row(2, 2, due_at=NOW - datetime.timedelta(hours=1))]
        await feed._turn()
        assert line.admitted == []
        assert feed.known == set()

    asyncio.run(go())


def test_producers_notify_for_every_shard_after_one_was_gained() -> None:
    """Only for that one, and the feed took all of them to be asleep: the others' events came up to a second late."""

    async def go() -> None:
        flagged: list[tuple[set[int], bool]] = []

        class Flags(Reads):
            async def flag_sleep(self, shards: Iterable[int], *, asleep: bool) -> None:
                flagged.append((set(shards), asleep))

        feed = made(Flags(), Line(), Forwarder())
        feed.own({2})
        await feed._recover()
        assert flagged == [({0, 1, 2}, True)]

    asyncio.run(go())


def test_a_change_of_an_endpoint_while_its_shard_is_recovered_is_seen() -> None:
    """It was read before the snapshot from which on changes are asked for, which had the change already."""

    async def go() -> None:
        order: list[str] = []

        class Ordered(Reads):
            async def snapshot(self) -> tuple[Snapshot, float]:
                order.append("snapshot")
                return SNAPSHOT, NOW.timestamp()

            async def endpoints_of(self, shards: Iterable[int]) -> list[Endpoint]:
                order.append("endpoints")
                return [ENDPOINT]

        feed = Feed(Ordered(), Forwarder(), Line(), SystemClock(), window=100, known=[])  # type: ignore[arg-type]
        feed.own({0})
        await feed._change_shards()
        assert order == ["snapshot", "endpoints"]

    asyncio.run(go())


def test_due_times_are_not_kept_while_an_endpoint_is_elsewhere() -> None:
    """One that had passed meanwhile kept all later ones from being waited for when it had come back with its shard."""

    async def go() -> None:
        feed = made(Reads(), Line(), Forwarder())
        feed.backlogs.due(ENDPOINT.key, NOW.timestamp() - 1)
        feed._endpoint_changed(replace(ENDPOINT, shard=5, former_shards=(0,)))
        assert feed.backlogs.demand_due(feed.db_now(), feed._mine, feed._may_read) == []
        feed.shards.add(5)
        feed.backlogs.due(ENDPOINT.key, NOW.timestamp())
        assert [key for key, *_ in feed.backlogs.demand_due(feed.db_now(), feed._mine, feed._may_read)] == [
            ENDPOINT.key
        ]

    asyncio.run(go())


def test_what_a_refill_reads_goes_into_memory_as_its_events_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookd.feed.EVENTS_AT_ONCE", 2)

    async def go() -> None:
        reads, line = Reads(), Line()
        feed = made(reads, line, Forwarder())
        there: list[int] = []
        reads.meanwhile = lambda: there.append(len(line.admitted))
        await feed._admit([row(n, n) for n in range(1, 6)])
        assert there == [0, 2, 4]
        assert [d.id for d in line.admitted] == [1, 2, 3, 4, 5]

    asyncio.run(go())


def test_a_queue_that_was_dry_when_it_was_looked_at_may_hold_more() -> None:
    feed = made(Reads(), Line(), Forwarder())
    share = feed.backlogs.of(ENDPOINT.key).fresh
    share.asked_mono = SystemClock().mono() - 1.0  # neither soon nor late
    feed.backlogs.ask(ENDPOINT.key, timed=False)
    assert share.bound == 8


def test_a_retry_does_not_wait_for_another_of_its_coalesce_key() -> None:
    """When the one under way had ended the newest was read, and the retry, which was neither, never again."""
    states = States()
    key = EndpointKey(1), "s"
    assert states.stands(row(1, 1, coalesce_key="s"), lambda *_: False)
    assert states.stands(row(2, 2, coalesce_key="s", attempt=1), lambda *_: False)
    assert not states.stands(row(3, 3, coalesce_key="s"), lambda *_: False)
    states.left(key, DeliveryId(1))
    assert states.demands() == [key]


def test_what_waits_in_a_shard_that_its_endpoint_has_left_is_forwarded_when_the_new_one_is_left_too() -> None:
    """A retry that is not due yet: it was to be forwarded when it was read, and is nobody else's to find (seed 39455)."""

    async def go() -> None:
        forwarder = Forwarder()
        feed = made(Reads(), Line(), forwarder)
        feed._serve(replace(ENDPOINT, former_shards=(1,)))
        retry = Delivery(
            DeliveryId(4), ENDPOINT.key, Event(UUID(int=1), "a.b", "t", b"{}", 1.0), attempt=0, shard=1
        )
        feed.settled((), [(retry, NOW.timestamp() + 60)])
        await feed._turn()
        assert forwarder.forwarded == []
        feed.leave({0})
        await feed._change_shards()
        await feed._turn()
        assert [keys for keys, _ in forwarder.forwarded] == [[ENDPOINT.key]]

    asyncio.run(go())
