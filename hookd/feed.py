"""
The feed: from the queue in PostgreSQL into the lanes.

A feed lives as long as the session that owns the shards.  What it remembers (its snapshot, its places, which rows are
in memory) is true only under those locks; after any reconnect a new feed recovers.

What it knows of an endpoint's rows that are not in memory is in ``core.backlogs``: *places*, behind which there may be more.
Four reads move these.  *Recovery* sets places for all endpoints that have rows.  *Arrivals* brings the rows that the
last snapshot did not see; they are held while there is room, and behind a place they are left for the refill.
*Refill* reads on from the places.  *Heads* brings the oldest row of an order key.

Order and coalescing: ``core.heads`` and ``core.states`` say which row of a key may go into memory, and what is to be read
when it has ended.

Why nothing is lost: the reads run one after another on one connection, so each sees at least what the one before saw.
A refill that returns fewer rows than asked for has reached the end as of its snapshot, and whatever becomes visible
later is in the next arrivals.  Why nothing is taken twice: an id is ``known`` from the moment it is taken until its
settle is committed, and a read that may have begun before that commit cannot bring it back (``_remembered``).

NOTIFY only for a sleeper: after a second without arrivals the feed raises its flag, takes a snapshot, and goes on
reading until every transaction that may have looked at the flag before it was raised has ended.  Only then does it
sleep, with a slow poll as a backstop: NOTIFY is a hint, the read is the truth.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, deque
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from hookd.core.backlogs import Backlogs, Memory
from hookd.core.heads import Heads
from hookd.core.model import (
    ACTIVE,
    DISABLED,
    PAUSED,
    REMOVED,
    Delivery,
    DeliveryId,
    Endpoint,
    EndpointKey,
    EndpointState,
    Event,
)
from hookd.core.reads import Reach
from hookd.core.states import States

if TYPE_CHECKING:
    import datetime
    from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence

    from hookd.clock import Clock
    from hookd.core.reads import Arrivals, Row, Snapshot

QUIET_S = 1.0
"""How long without arrivals before the feed raises its flag."""

SLEEP_POLL_S = 1.0
"""Backstop while it sleeps."""

PAUSE_S = 0.004
"""Between reads while rows arrive: long enough to batch, short enough not to be felt."""

BUSY_PAUSE_S = 0.012
"""The same while memory holds plenty to send anyway."""

BUSY_READS = 20
"""So many reads with arrivals within ``BUSY_WITHIN_S`` make it worth telling producers to stop notifying: below that
a NOTIFY for each commit is cheap, and wakes sooner than polling would.  So does plenty to send: a feed that reads again for
that needs nobody to tell it, and reads too slowly to count to twenty (16 producers beside it made 1,250 commits a second)."""

BUSY_WITHIN_S = 0.25

ENDPOINT_POLL_S = 0.5
"""Changes of endpoints notify; this is their backstop."""

RECLAIM_S = 1.0
"""Between looks at whether memory holds too much that does not move."""

EVENTS_AT_ONCE = 500
"""Events of one read, and rows that are let into memory together: with a refill of 2,000 let in as one, 500 exchanges in
flight had sent all that was in memory by the time its events were there (90 ms), each time."""

UNSEEN_S = 3600.0
"""A transaction that began before an endpoint moved, and inserts later than this, may break the order of its keys."""

FORWARDING_MOST = 50
"""Endpoints whose rows are forwarded at once."""

OVER = frozenset({DISABLED, REMOVED})
"""What these are owed ends at once, due or not."""

REPLACED_AT_ONCE = 1000
"""Rows of one coalesce key that end in one read."""


class Reads(Protocol):
    """The queue, as the feed reads it (``postgres.queue``)."""

    async def snapshot(self) -> tuple[Snapshot, float]: ...
    async def arrivals(self, since: Snapshot, shards: Iterable[int], window: int) -> Arrivals: ...
    async def refill_fresh(self, demands: Sequence[tuple[EndpointKey, int, int]]) -> list[Row]: ...
    async def refill_due(
        self, demands: Sequence[tuple[EndpointKey, datetime.datetime, int, int, bool]]
    ) -> list[Row]: ...
    async def heads(self, keys: Sequence[tuple[EndpointKey, str, int]]) -> list[Row]: ...
    async def latest(self, keys: Sequence[tuple[EndpointKey, str]]) -> list[Row]: ...
    async def older(
        self, newer: Sequence[tuple[EndpointKey, str, DeliveryId, UUID]], most: int
    ) -> list[Row]: ...
    async def recover(self) -> tuple[list[EndpointKey], list[tuple[EndpointKey, float]]]: ...
    async def endpoints_of(self, shards: Iterable[int]) -> list[Endpoint]: ...
    async def endpoints(self, keys: Iterable[EndpointKey]) -> list[Endpoint]: ...
    async def endpoint_changes(self, since: Snapshot) -> list[Endpoint]: ...
    async def events(self, ids: Sequence[UUID]) -> dict[UUID, Event]: ...
    async def flag_sleep(self, shards: Iterable[int], *, asleep: bool) -> None: ...


class Forwarder(Protocol):
    """Hands rows to the shard that their endpoint has moved to (``postgres.owner``)."""

    async def forward(self, reaches: Sequence[Reach], under_way: Iterable[DeliveryId]) -> list[Reach]: ...


class Line(Memory, Protocol):
    """Where deliveries go (the dispatcher)."""

    def serve(self, endpoint: Endpoint) -> None: ...
    def served(self, key: EndpointKey) -> Endpoint | None: ...
    def admit(self, delivery: Delivery) -> None: ...
    def withdraw(self, key: EndpointKey, *, beyond: int = 0) -> list[Delivery]: ...
    def withdraw_one(self, key: EndpointKey, delivery_id: DeliveryId) -> Delivery | None: ...
    def under_way(self, keys: Collection[EndpointKey]) -> list[DeliveryId]: ...


class Feed:
    """Reads what is pending of the owned shards and keeps the lanes supplied."""

    def __init__(
        self,
        reads: Reads,
        forwarder: Forwarder,
        line: Line,
        clock: Clock,
        *,
        window: int,
        known: Iterable[DeliveryId],
    ) -> None:
        self._reads = reads
        self._forwarder = forwarder
        self._line = line
        self._clock = clock
        self.shards: set[int] = set()
        self.known: set[DeliveryId] = set(known)
        """In memory: waiting, in flight, or settled and not yet written."""
        self._remembered: set[DeliveryId] = set()
        """Settled while a read was under way that may still show them."""
        self._reading = False
        self._rescheduled_meanwhile: list[tuple[Delivery, float]] = []
        self._dropped_meanwhile: list[Delivery] = []
        self.backlogs = Backlogs(line, clock.mono, window)
        self._endpoints: dict[EndpointKey, Endpoint] = {}
        """As last read; the dispatcher may know of a failure that is not written yet."""
        self._moved: set[EndpointKey] = set()
        """Endpoints with rows of ours that are to be forwarded."""
        self._forwarding: dict[EndpointKey, Reach] = {}
        """How far that has come."""
        self._moved_until: dict[EndpointKey, float] = {}
        """Endpoints that have moved, until when rows may still come into a shard that they have left."""
        self._behind: dict[tuple[EndpointKey, str], DeliveryId] = {}
        """Order keys whose oldest row is still in another shard, where it may end without a word to us."""
        self._heads = Heads()
        self._states = States()
        self._unread_shards: set[int] = set()
        self._left_shards: set[int] = set()
        """To be let go of at the next turn."""
        self._events: dict[UUID, Event] = {}
        """Those with deliveries in memory, so that one to 1,000 endpoints is read once (a weak reference costs 1.5 µs)."""
        self._since: Snapshot | None = None
        self._endpoints_since: Snapshot | None = None
        self._rotations: list[tuple[float, EndpointKey]] = []
        self._db_offset = 0.0
        """The database's clock minus our monotonic one."""
        self._wake = asyncio.Event()
        self._endpoints_asked = self._all_endpoints_asked = self._stopping = False
        self.recovered = asyncio.Event()
        self.arrived = 0
        """Rows taken so far."""

    def __repr__(self) -> str:
        return f"<Feed shards={len(self.shards)} known={len(self.known)} {self.backlogs!r}>"

    # What others tell the feed.

    def wake(self) -> None:
        """Something may have changed: read soon.  A notification, room in a lane."""
        self._wake.set()

    def notified(self, payload: str) -> None:
        """A notification came: of an arrival (empty) or of a changed endpoint (``endpoint``)."""
        if payload == "endpoint":
            self._endpoints_asked = True
        self._wake.set()

    def reread_endpoints(self) -> None:
        """Something that is not in their rows has changed what endpoints are: read all of them again."""
        self._endpoints_asked = self._all_endpoints_asked = True
        self._wake.set()

    def room(self, started: Iterable[Delivery]) -> None:
        """These left the lanes for the network: there may be room for more."""
        if self.backlogs.any_full():
            for delivery in started:
                if self.backlogs.room(delivery.endpoint):
                    self._wake.set()

    def own(self, shards: Iterable[int]) -> None:
        """These shards have been locked: recover them."""
        self._unread_shards.update(shards)
        self._wake.set()

    def leave(self, shards: Iterable[int]) -> None:
        """Let go of what waits for these shards, and read nothing more of them."""
        self._left_shards.update(shards)
        self._unread_shards.difference_update(shards)
        self._wake.set()

    def has_left(self, shard: int) -> bool:
        """Whether nothing of a shard can get into memory any more."""
        return not (shard in self.shards or shard in self._unread_shards or shard in self._left_shards)

    def stop(self) -> None:
        """Read no more."""
        self._stopping = True
        self._wake.set()

    def settled(
        self,
        final: Iterable[Delivery],
        rescheduled: Iterable[tuple[Delivery, float]],
        *,
        dropped: Iterable[Delivery] = (),
    ) -> None:
        """A settle was committed: these rows are gone, those are due again, and these were not ours to settle."""
        for delivery in final:
            self._forget(delivery, gone=True)
        for delivery, due_at in rescheduled:
            self._forget(delivery)
            if self._reading:
                self._rescheduled_meanwhile.append((delivery, due_at))
            else:
                self._due_again(delivery, due_at)
        for delivery in dropped:
            self._forget(delivery)
            if self._reading:
                self._dropped_meanwhile.append(delivery)
            else:
                self._look_for(delivery)
        if self._moved or self._heads or self._states or self.backlogs:
            self._wake.set()

    def db_now(self) -> float:
        """The database's clock, as of its last answer."""
        return self._clock.mono() + self._db_offset

    # The loop.

    async def run(self) -> None:
        """Read until told to stop.  Raises what the connection raises: a feed does not outlive its session."""
        quiet_since = self._clock.mono()
        asleep = True
        horizon: Snapshot | None = None
        endpoints_read = reclaimed = 0.0
        brought: deque[float] = deque([0.0] * BUSY_READS, maxlen=BUSY_READS)
        while not self._stopping:
            self._wake.clear()
            if await self._change_shards():
                horizon, _ = await self._reads.snapshot()
                asleep = True
            if self._since is None:
                await self._rest(SLEEP_POLL_S)
                continue
            active = await self._turn()
            now = self._clock.mono()
            if now - reclaimed > RECLAIM_S:
                reclaimed = now
                self._reclaim()
            if self._endpoints_asked or now - endpoints_read > ENDPOINT_POLL_S:
                self._endpoints_asked = False
                endpoints_read = now
                await self._read_endpoints()
                self._look_behind()
            if active:
                quiet_since = now
                brought.append(now)
                plenty = self._line.total_waiting() > self.backlogs.window // 4
                if asleep and (plenty or now - brought[0] < BUSY_WITHIN_S):
                    await self._reads.flag_sleep(self.shards, asleep=False)
                    asleep, horizon = False, None
                await self._rest(BUSY_PAUSE_S if plenty else PAUSE_S, early=asleep)
                continue
            if not asleep and now - quiet_since >= QUIET_S:
                await self._reads.flag_sleep(self.shards, asleep=True)
                horizon, _ = await self._reads.snapshot()
                asleep = True
            if horizon is not None and self._since.xmin >= horizon.xmax:
                horizon = None
            # without a horizon that has passed, a transaction that looked at the flag too early may still commit
            await self._rest(SLEEP_POLL_S if asleep and horizon is None else PAUSE_S)
        # Nobody reads any more, so nobody wants to be told; who owns these next raises the flag again.
        await self._reads.flag_sleep(self.shards, asleep=False)
        self.shards, self._unread_shards, self._left_shards = set(), set(), set()

    async def _turn(self) -> bool:
        """One round of reads; whether it brought anything."""
        if self._moved or self._forwarding:
            await self._forward()
        following = [
            (key, order_key, 0 if self._scattered(key) else after)
            for key, order_key, after in self._heads.following()
            if self._mine(key)
        ]
        ahead = await self._take_heads(self._reads.heads(following), ordered=True) if following else []
        brought = await self._read_arrivals(ahead)
        if self._states:
            latest = self._reads.latest(self._states.demands())
            brought |= await self._read_heads(latest, ordered=False)
        brought |= await self._refill_due()
        brought |= await self._refill_fresh()
        demands = [demand for demand in self._heads.demands() if self._mine(demand[0])]
        if demands:
            brought |= await self._read_heads(self._reads.heads(demands), ordered=True)
        replacing = self._states.replacing()
        if replacing:
            await self._read_replaced(replacing)
        return brought

    async def _forward(self) -> None:
        """Hand on a slice of the rows of endpoints that have moved; the next turn goes on."""
        for key in self._moved.difference(self._forwarding):
            if len(self._forwarding) >= FORWARDING_MOST:
                break
            self._forwarding[key] = Reach(key)
            self._moved.discard(key)
        reaches = list(self._forwarding.values())
        # what is under way is forwarded when it is to be tried again; till then it is its old owner's to settle
        left = await self._forwarder.forward(reaches, self._line.under_way(self._forwarding))
        self._forwarding = {reach.endpoint: reach for reach in left}
        if self._moved or self._forwarding:
            self._wake.set()

    async def _rest(self, longest_s: float, *, early: bool = True) -> None:
        """Wait to be woken, at most so long and not beyond the next due time.  Not ``early``: the whole pause."""
        next_due = self.backlogs.next_due()
        if next_due is not None:
            longest_s = max(0.0, min(longest_s, next_due - self.db_now()))
        if not early:
            await asyncio.sleep(longest_s)
            return
        try:
            async with asyncio.timeout(longest_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    # Recovery.

    async def _change_shards(self) -> bool:
        """Let go of shards, and recover others; whether there were any of these."""
        if self._left_shards:
            self._leave_now()
        if not self._unread_shards:
            return False
        await self._recover()
        return True

    async def _recover(self) -> None:
        gained, self._unread_shards = self._unread_shards, set()
        # raised first, and everywhere: from now on every producer notifies, until arrivals make the feed lower it
        await self._reads.flag_sleep(gained | self.shards, asleep=True)
        if self._since is None:
            # taken after the locks were: what commits later is an arrival, what it shows is read by key; and before the
            # endpoints are read: of what changes meanwhile nobody would tell
            self._since, db_now = await self._reads.snapshot()
            self._endpoints_since = self._since
            self._db_offset = db_now - self._clock.mono()
        for endpoint in await self._reads.endpoints_of(gained):
            self._serve(endpoint)
        self.shards |= gained
        self._heads.doubt()
        fresh, due = await self._reads.recover()
        found = {*fresh, *(key for key, _ in due)}
        await self._know(found)
        for key in found:
            served = self._line.served(key)
            if served is not None and gained.intersection(served.former_shards):
                # what came late into a shard that was another owner's: reads by key have passed it
                self._moved.add(key)
        for key in fresh:
            if self._ours(key):
                self.backlogs.lower_place(key, 0)
        for key, due_at in due:
            if self._ours(key):
                self.backlogs.due(key, due_at)
        self.recovered.set()

    def _ours(self, key: EndpointKey) -> bool:
        """Whether an endpoint is in a shard that is read; if it has left one, its rows there are to be forwarded."""
        endpoint = self._line.served(key)
        if endpoint is None:
            return False
        if endpoint.shard in self.shards:
            return True
        if self.shards.intersection(endpoint.former_shards):
            self._moved.add(key)
        return False

    def _in_place(self, row: Row) -> bool:
        """Whether a row is in the shard of its endpoint, and that is read; if only the latter, it is to be forwarded."""
        endpoint = self._line.served(row.endpoint)
        if endpoint is None or row.shard not in self.shards:
            return False
        if endpoint.takes_from(row.shard):
            return True
        self._moved.add(row.endpoint)
        self._wake.set()
        return False

    def _scattered(self, key: EndpointKey) -> bool:
        """
        Whether rows of an endpoint may arrive where they are not seen: in a shard that it has left, and another reads.

        Only what began before it moved inserts there, and that ends: whoever looks from the start for good walks over what is done.
        """
        until = self._moved_until.get(key)
        if until is None or until < self._clock.mono():
            return False
        endpoint = self._line.served(key)
        return endpoint is not None and not self.shards.issuperset(endpoint.former_shards)

    def _look_behind(self) -> None:
        """Ask again for the heads that were another owner's."""
        behind, self._behind = self._behind, {}
        for key, row in behind.items():
            if self._mine(key[0]):
                self._heads.met(key, row)
                self._wake.set()

    def _leave_now(self) -> None:
        left, self._left_shards = self._left_shards, set()
        self.shards -= left
        for endpoint in self._endpoints.values():
            if endpoint.shard in left:
                self._let_go(endpoint)

    def _let_go(self, endpoint: Endpoint) -> None:
        """
        Forget the rows of an endpoint that is not ours, and where they were: when it is ours again, it is read from the start.

        What is in a shard that it has left and we have not, nobody else would find: it is forwarded.
        """
        key = endpoint.key
        for delivery in self._line.withdraw(key):
            self._forget(delivery)
        self.backlogs.forget(key)
        if self.shards.intersection(endpoint.former_shards):
            self._moved.add(key)
            self._wake.set()

    def _mine(self, key: EndpointKey) -> bool:
        """Whether an endpoint is (still) in a shard that is read."""
        endpoint = self._line.served(key)
        return endpoint is None or endpoint.shard in self.shards

    # Endpoints.

    async def _read_endpoints(self) -> None:
        assert self._endpoints_since is not None
        since, _ = await self._reads.snapshot()
        changed = await self._reads.endpoint_changes(self._endpoints_since)
        # the changes were read with a later snapshot: some come twice, none is missed
        self._endpoints_since = since
        due = []
        while self._rotations and self._rotations[0][0] <= self._clock.wall():
            due.append(heapq.heappop(self._rotations)[1])
        if due:
            changed += await self._reads.endpoints(due)
        if self._all_endpoints_asked:
            self._all_endpoints_asked = False
            changed += await self._reads.endpoints_of(self.shards)
        for endpoint in changed:
            self._endpoint_changed(endpoint)

    def _endpoint_changed(self, endpoint: Endpoint) -> None:
        before = self._endpoints.get(endpoint.key)
        served = self._line.served(endpoint.key)
        if before == endpoint and served is not None and served.health == endpoint.health:
            # (resuming an endpoint makes its row what it was when it was read, though it has failed meanwhile)
            return
        if self.backlogs.look_again(endpoint.key):
            self._wake.set()
        if endpoint.shard not in self.shards:
            self._let_go(endpoint)
            if before is not None:
                self._serve(endpoint)
            return
        waiting = self._line.withdraw(endpoint.key)
        resumed = before is not None and before.state in OVER and endpoint.state not in OVER
        self._serve(endpoint)
        for delivery in waiting:
            early = resumed and delivery.due_at is not None and delivery.due_at > self.db_now()
            # what is in the shard that it has left comes back when it was forwarded, what was to end before its time when it is due
            if early or endpoint.state is PAUSED or not endpoint.takes_from(delivery.shard):
                self._forget(delivery)
            else:
                self._line.admit(delivery)
        if before is None or (before.state is endpoint.state and before.shard == endpoint.shard):
            return
        if before.shard != endpoint.shard:
            self._moved.add(endpoint.key)
        # read anew from the start: a pause let go of what was in memory, an ending takes all, and rows may have arrived in
        # this shard while it was thought to be in another
        self.backlogs.restart(endpoint.key)
        self._heads.doubt({endpoint.key})
        self._wake.set()

    def _serve(self, endpoint: Endpoint) -> None:
        before = self._endpoints.get(endpoint.key)
        places = endpoint.shard, endpoint.former_shards
        if endpoint.former_shards and (before is None or (before.shard, before.former_shards) != places):
            self._moved_until[endpoint.key] = self._clock.mono() + UNSEEN_S
        self._endpoints[endpoint.key] = endpoint
        self._line.serve(endpoint)
        if endpoint.rotates_until is not None:
            heapq.heappush(self._rotations, (endpoint.rotates_until, endpoint.key))

    async def _know(self, keys: Iterable[EndpointKey]) -> None:
        """
        Know the endpoints of rows that were just read, as of that read or later.

        One that was disabled or removed when it was read last is read again: the transaction that resumed it may have
        queued what it missed, and its rows must not end for a state that is over.
        """
        wanted = {key for key in keys if self._line.served(key) is None or self._over(key)}
        if not wanted:
            return
        for endpoint in await self._reads.endpoints(list(wanted)):
            if self._line.served(endpoint.key) is None:
                self._serve(endpoint)
            else:
                self._endpoint_changed(endpoint)
        for key in wanted:
            if self._line.served(key) is None:
                # deleted behind our back: its deliveries end as cancelled
                self._serve(
                    Endpoint(key, UUID(int=0), "", "", "", min(self.shards, default=0), state=REMOVED)
                )

    def _over(self, key: EndpointKey) -> bool:
        read = self._endpoints.get(key)
        return read is not None and read.state in OVER

    # Reads.

    async def _read_arrivals(self, ahead: Sequence[Row]) -> bool:
        """Whether there were any.  ``ahead`` are heads that were read before: they go in unless an older one has come now."""
        assert self._since is not None
        self._reading = True
        arrivals = await self._reads.arrivals(self._since, self.shards, self.backlogs.window)
        self._since = arrivals.snapshot
        self._db_offset = arrivals.db_now - self._clock.mono()
        await self._know({r.endpoint for r in arrivals.rows} | {p.endpoint for p in arrivals.places})
        room: Counter[EndpointKey] = Counter()
        taken = []
        for row in sorted(arrivals.rows):
            if row.order_key is not None:
                # also in a shard that its endpoint has left: it is older all the same
                self._heads.came((row.endpoint, row.order_key), row.id)
            if self._in_place(row) and self._hold_arrival(row, room):
                taken.append(row)
        if arrivals.places:
            self._heads.doubt({place.endpoint for place in arrivals.places})
        for place in arrivals.places:
            if self._ours(place.endpoint):
                if place.first_id is not None:
                    self.backlogs.lower_place(place.endpoint, place.first_id - 1)
                if place.first_due is not None:
                    self.backlogs.lower_due_place(place.endpoint, place.first_due)
                    self.backlogs.due(place.endpoint, place.first_due)
        self._taken_in()
        await self._admit(taken + [row for row in ahead if self._still_first(row)])
        return bool(arrivals.rows or arrivals.places or ahead)

    def _still_first(self, row: Row) -> bool:
        """Whether a head that was taken may go into memory; else it is as if it had not been read."""
        assert row.order_key is not None
        key = row.endpoint, row.order_key
        if self._state(row.endpoint) is PAUSED:
            self.known.discard(row.id)
            self._heads.give_back(key, row.id)
        elif self._heads.overtaken(key) or not self._in_place(row):
            self.known.discard(row.id)
            self._heads.left(key, row.id, gone=False, wanted=True)
        else:
            return True
        if row.coalesce_key is not None:
            self._states.left((row.endpoint, row.coalesce_key), row.id)
        return False

    def _hold_arrival(self, row: Row, room: Counter[EndpointKey]) -> bool:
        """Whether a row that has arrived goes into memory; else it is left where a refill finds it."""
        state = self._state(row.endpoint)
        if row.id in self.known or row.id in self._remembered or state is PAUSED:
            return False
        if row.coalesce_key is not None:
            self._states.note(row)
        if row.replaced_by is None:
            if not (self._hold_due(row, room) if row.due_at is not None else self._hold_fresh(row, room)):
                return False
            if row.order_key is not None and state is ACTIVE:
                self._heads.met((row.endpoint, row.order_key), row.id)
                room[row.endpoint] += 1
                return False
            if not self._states.stands(row, self._give_way):
                return False
        self.known.add(row.id)
        room[row.endpoint] += 1
        return True

    def _hold_due(self, row: Row, room: Counter[EndpointKey]) -> bool:
        assert row.due_at is not None
        if row.due_at.timestamp() > self.db_now():
            self.backlogs.later(row)
            return False
        if not self.backlogs.has_room(row.endpoint, room, timed=True):
            self.backlogs.put_back(row)
            return False
        return True

    def _hold_fresh(self, row: Row, room: Counter[EndpointKey]) -> bool:
        place = self.backlogs.of(row.endpoint).place
        if place is not None and row.id > place:
            return False
        if not self.backlogs.has_room(row.endpoint, room, timed=False):
            self.backlogs.put_back(row)
            return False
        return True

    async def _read_heads(self, read: Awaitable[list[Row]], *, ordered: bool) -> bool:
        """Take in the rows that stand at the head of an order key (``ordered``), or for a coalesce key."""
        taken = await self._take_heads(read, ordered=ordered)
        await self._admit(taken)
        return bool(taken)

    async def _take_heads(self, read: Awaitable[list[Row]], *, ordered: bool) -> list[Row]:
        self._reading = True
        rows = await read
        await self._know({row.endpoint for row in rows})
        taken = []
        for row in rows:
            if self._state(row.endpoint) is PAUSED:
                continue
            if row.due_at is not None and row.due_at.timestamp() > self.db_now() and row.replaced_by is None:
                self.backlogs.later(row)
            elif self._takes(row, head=ordered):
                taken.append(row)
        self._taken_in()
        return taken

    async def _read_replaced(self, newer: Sequence[tuple[EndpointKey, str, DeliveryId, UUID]]) -> None:
        """End what the newest rows of coalesce keys replace."""
        self._reading = True
        rows = await self._reads.older(newer, REPLACED_AT_ONCE)
        taken: list[Row] = []
        counts: Counter[tuple[EndpointKey, str]] = Counter()
        for row in rows:
            assert row.coalesce_key is not None
            counts[row.endpoint, row.coalesce_key] += 1
            if row.id in self.known:
                self._give_way(row.endpoint, row.id, row.replaced_by)
            elif row.id not in self._remembered and self._in_place(row):
                self.known.add(row.id)
                taken.append(row)
        self._states.again(n for n in newer if counts[n[0], n[1]] >= REPLACED_AT_ONCE)
        self._taken_in()
        await self._admit(taken)

    async def _refill_due(self) -> bool:
        demands = [
            (*demand, self._ended(demand[0]))
            for demand in self.backlogs.demand_due(self.db_now(), self._mine, self._may_read)
        ]
        if not demands:
            return False
        self._reading = True
        rows = await self._reads.refill_due(demands)
        await self._know({row.endpoint for row in rows})
        # was to end when it was asked for, with all that it is owed, and is active now
        resumed = {key for key, _, _, _, ended in demands if ended and not self._ended(key)}
        taken: list[Row] = []
        counts: Counter[EndpointKey] = Counter()
        for row in rows:
            assert row.due_at is not None
            if row.later:
                self.backlogs.due(row.endpoint, row.due_at.timestamp())
                continue
            if row.endpoint in resumed and row.due_at.timestamp() > self.db_now():
                self.backlogs.later(row)
                continue
            counts[row.endpoint] += 1
            backlog = self.backlogs.of(row.endpoint)
            backlog.due_place = max(backlog.due_place, (row.due_at, row.id))
            if self._takes(row):
                taken.append(row)
        for key, _, _, want, _ in demands:
            if counts[key] >= want:
                self.backlogs.fell_due(key)
        self._taken_in()
        await self._admit(taken)
        return bool(taken)

    async def _refill_fresh(self) -> bool:
        demands = self.backlogs.demand_fresh(self._may_read)
        if not demands:
            return False
        self._reading = True
        rows = await self._reads.refill_fresh(demands)
        await self._know({row.endpoint for row in rows})
        taken: list[Row] = []
        counts: Counter[EndpointKey] = Counter()
        for row in rows:
            counts[row.endpoint] += 1
            self.backlogs.of(row.endpoint).place = row.id
            if self._takes(row):
                taken.append(row)
        for key, _, want in demands:
            if counts[key] < want:
                self.backlogs.read_whole(key)
        self._taken_in()
        await self._admit(taken)
        return bool(rows)

    def _takes(self, row: Row, *, head: bool = False) -> bool:
        """Whether a row that was read by key goes into memory; if so it is known from now on."""
        if row.id in self.known or row.id in self._remembered or self._state(row.endpoint) is PAUSED:
            return False
        if not self._in_place(row):
            if head and row.order_key is not None:
                self._behind[row.endpoint, row.order_key] = row.id
            return False
        if row.coalesce_key is not None:
            self._states.note(row)
        if row.replaced_by is None and not self._turn_of(row, head=head):
            return False
        self.known.add(row.id)
        return True

    def _turn_of(self, row: Row, *, head: bool) -> bool:
        """Whether a row may go into memory as far as its keys are concerned."""
        if row.order_key is not None and self._state(row.endpoint) is ACTIVE:
            key = row.endpoint, row.order_key
            if not head:
                self._heads.met(key, row.id)
                return False
            if not self._heads.take(key, row.id):
                return False
        if self._states.stands(row, self._give_way):
            return True
        if row.order_key is not None:
            self._heads.give_back((row.endpoint, row.order_key), row.id)
        return False

    def _give_way(self, endpoint: EndpointKey, delivery_id: DeliveryId, replaced_by: UUID | None) -> bool:
        """End one that waits in memory; False if it does not wait: it is under way, or has ended already."""
        older = self._line.withdraw_one(endpoint, delivery_id)
        if older is None:
            return False
        older.replaced_by = replaced_by
        self._line.admit(older)
        # it leaves memory without having been started, which is what else tells that there is room
        if self.backlogs.room(endpoint):
            self._wake.set()
        return True

    def _taken_in(self) -> None:
        """The rows of a read have been looked at: what was settled meanwhile may be forgotten."""
        self._reading = False
        self._remembered.clear()
        meanwhile, self._rescheduled_meanwhile = self._rescheduled_meanwhile, []
        for delivery, due_at in meanwhile:
            self._due_again(delivery, due_at)
        dropped, self._dropped_meanwhile = self._dropped_meanwhile, []
        for delivery in dropped:
            self._look_for(delivery)

    async def _admit(self, rows: Sequence[Row]) -> None:
        self.arrived += len(rows)
        # Held from here on: the last delivery of an event may end, and the event with it, while others are read.
        held = {row.event_id: event for row in rows if (event := self._events.get(row.event_id)) is not None}
        for start in range(0, len(rows), EVENTS_AT_ONCE):
            part = rows[start : start + EVENTS_AT_ONCE]
            missing = [row.event_id for row in part if row.replaced_by is None and row.event_id not in held]
            if missing:
                found = await self._reads.events(list(dict.fromkeys(missing)))
                self._events.update(found)
                held.update(found)
            self._let_in(part, held)

    def _let_in(self, rows: Sequence[Row], events: Mapping[UUID, Event]) -> None:
        for row in rows:
            event = events.get(row.event_id)
            if event is None:
                # it is not sent: replaced, or its day was dropped by retention and the dispatcher ends it as expired
                event = Event(row.event_id, "", "", b"", created_at=0.0, expires_at=0.0)
            event.deliveries += 1
            self._line.admit(
                Delivery(
                    row.id,
                    row.endpoint,
                    event,
                    row.attempt,
                    row.shard,
                    row.order_key,
                    row.due_at.timestamp() if row.due_at else None,
                    row.replay,
                    row.coalesce_key,
                    row.replaced_by,
                )
            )

    # What becomes of rows.

    def _state(self, key: EndpointKey) -> EndpointState:
        endpoint = self._line.served(key)
        return REMOVED if endpoint is None else endpoint.state

    def _may_read(self, key: EndpointKey) -> bool:
        return self._state(key) is not PAUSED and self._mine(key)

    def _ended(self, key: EndpointKey) -> bool:
        return self._state(key) in OVER

    def _due_again(self, delivery: Delivery, due_at: float) -> None:
        """
        A retry was committed.

        Its due time was set before the commit: a read in between may have passed it, so the place goes back to it.
        """
        if not self._ours(delivery.endpoint):
            return
        self.backlogs.lower_due_place(delivery.endpoint, due_at)
        # what an ended endpoint is owed is not waited for
        self.backlogs.due(delivery.endpoint, 0.0 if self._ended(delivery.endpoint) else due_at)

    def _read_again(self, delivery: Delivery) -> None:
        """One that is not in memory any more may still be in the queue, and be ours."""
        if self._ours(delivery.endpoint):
            if delivery.due_at is None:
                self.backlogs.lower_place(delivery.endpoint, delivery.id - 1)
            else:
                self.backlogs.lower_due_place(delivery.endpoint, delivery.due_at)
                self.backlogs.due(delivery.endpoint, 0.0)

    def _look_for(self, delivery: Delivery) -> None:
        """
        One could not be settled: another owner has settled it meanwhile, and may have made a retry of it.

        Reads have passed that by while it was taken to be in memory, and when it is due is not known here.
        """
        if self._ours(delivery.endpoint):
            self.backlogs.lower_place(delivery.endpoint, delivery.id - 1)
            self.backlogs.reread_timed(delivery.endpoint)

    def _forget(self, delivery: Delivery, *, gone: bool = False) -> None:
        """It is not in memory any more; ``gone``: nor in the queue."""
        self.known.discard(delivery.id)
        event = delivery.event
        event.deliveries -= 1
        if not event.deliveries and self._events.get(event.id) is event:
            del self._events[event.id]
        if self._reading:
            self._remembered.add(delivery.id)
        key = delivery.endpoint
        if delivery.order_key is not None:
            wanted = self._state(key) is ACTIVE
            self._heads.left((key, delivery.order_key), delivery.id, gone=gone, wanted=wanted)
        if delivery.coalesce_key is not None:
            self._states.left((key, delivery.coalesce_key), delivery.id)

    def _reclaim(self) -> None:
        """Let go of what stuck queues hold beyond the least, if memory holds too much: it is read again when they move."""
        if self.backlogs.free() >= 0:
            return
        for key, least in self.backlogs.stuck():
            for delivery in self._line.withdraw(key, beyond=least):
                self._forget(delivery)
                self._read_again(delivery)
            if self.backlogs.free() > self.backlogs.window // 4:
                return
