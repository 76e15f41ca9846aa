"""
Backlogs: what is known of each endpoint's rows that are in the queue and not in memory, and how many memory should hold.

Of an endpoint that is

- ``place``: fresh rows (no due time) above this id may be in the queue and not in memory.  None: every fresh row that
  the last read saw is in memory.
- ``due_place`` and ``next_due``: rows with a due time are in memory up to ``due_place``; the next one behind it
  becomes due at ``next_due``.

An endpoint with something behind its places is *hungry* (fresh rows) or *due* (rows whose time has come), and is served in
turn; with no room in memory it is *full*, and costs nothing until something of it is started.
"""

from __future__ import annotations

import datetime
import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator

    from hookd.core.model import EndpointKey
    from hookd.core.reads import Row

QUEUE_LEAST, QUEUE_MOST = 4, 1024
"""Rows of one endpoint in memory: it starts with the least, and its bound moves by how soon it asks for more."""

SOON_S = 0.05
LATE_S = 2.0
"""A queue that asks again within ``SOON_S``, or was dry when it was looked at, gets twice the bound; one that took ``LATE_S``
gets half.  (With 0.1 s eight hosts at 3,000/s each held 1,024 rows, as fast as with 512, and 3 MB more.)"""

REFILL_MOST = 2000
"""Rows of one refill statement."""

REFILL_TIMED_MOST = 500
"""The same of rows with a due time: one read of their events, and then arrivals come first again.  (Beside a replay that kept
the daemon busy fresh events started after 115 ms at the median and 240 ms at p99; with 2,000 after 190 and 700.)"""

ROUNDING = datetime.timedelta(milliseconds=1)
"""A due time as a float is not exact to the microsecond."""

LONG_AGO = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)


class Memory(Protocol):
    """What waits in memory (the dispatcher's lanes)."""

    def waiting(self, key: EndpointKey) -> int:
        """Rows of an endpoint that wait."""
        ...

    def waiting_timed(self, key: EndpointKey) -> int:
        """Those of them that had a due time."""
        ...

    def total_waiting(self) -> int:
        """All rows that wait."""
        ...

    def backed_up(self) -> bool:
        """Whether nothing starts for now."""
        ...


@dataclass(slots=True)
class Share:
    """How many rows of one kind, fresh or with a due time, memory should hold of an endpoint."""

    bound: int = QUEUE_LEAST
    asked_mono: float = 0.0


@dataclass(slots=True)
class Backlog:
    """
    What is known of one endpoint.

    The two kinds have a share each: 100,000 retries or replays that wait for a slow host must not keep what is fresh out of memory.
    """

    place: int | None = None
    due_place: tuple[datetime.datetime, int] = (LONG_AGO, 0)
    next_due: float | None = None
    due_now: bool = False
    """``next_due`` has come."""
    fresh: Share = field(default_factory=Share)
    timed: Share = field(default_factory=Share)


class Backlogs:
    """Those of all endpoints that are served."""

    def __init__(self, memory: Memory, mono: Callable[[], float], window: int) -> None:
        self._memory = memory
        self._mono = mono
        self.window = window
        """Rows in memory."""
        self._backlogs: dict[EndpointKey, Backlog] = {}
        self._hungry: dict[EndpointKey, None] = {}
        """In the order in which they are served."""
        self._dues: list[tuple[float, EndpointKey]] = []
        self._due_now: dict[EndpointKey, None] = {}
        self._full: set[EndpointKey] = set()

    def __repr__(self) -> str:
        return f"<Backlogs hungry={len(self._hungry)} due={len(self._dues)} full={len(self._full)}>"

    def __bool__(self) -> bool:
        """Whether anything is to be read, now or at some time."""
        return bool(self._hungry or self._dues or self._due_now)

    def of(self, key: EndpointKey) -> Backlog:
        """That of an endpoint."""
        backlog = self._backlogs.get(key)
        if backlog is None:
            backlog = self._backlogs[key] = Backlog()
        return backlog

    def forget(self, key: EndpointKey) -> None:
        """Nothing is known of an endpoint any more."""
        self._backlogs.pop(key, None)
        self._hungry.pop(key, None)
        self._due_now.pop(key, None)
        self._full.discard(key)

    def restart(self, key: EndpointKey) -> None:
        """An endpoint is to be read from its start, rows of both kinds."""
        self._backlogs[key] = Backlog()
        self.lower_place(key, 0)
        self.due(key, 0.0)

    def reread_timed(self, key: EndpointKey) -> None:
        """The same of its rows with a due time only."""
        self.of(key).due_place = (LONG_AGO, 0)
        self.due(key, 0.0)

    # Places.

    def lower_place(self, key: EndpointKey, place: int) -> None:
        """Fresh rows above this id may not be in memory."""
        backlog = self.of(key)
        backlog.place = place if backlog.place is None else min(backlog.place, place)
        self._hungry[key] = None

    def read_whole(self, key: EndpointKey) -> None:
        """Every fresh row is in memory."""
        self.of(key).place = None
        self._hungry.pop(key, None)

    def lower_due_place(self, key: EndpointKey, due_at: float) -> None:
        """Rows from this due time on may not be in memory."""
        at = datetime.datetime.fromtimestamp(due_at, datetime.UTC) - ROUNDING
        self._lower_due_place(key, (at, 0))

    def due(self, key: EndpointKey, due_at: float) -> None:
        """Something of an endpoint is due then, on the database's clock; 0: at once."""
        backlog = self.of(key)
        if backlog.next_due is None or due_at < backlog.next_due:
            backlog.next_due = due_at
            heapq.heappush(self._dues, (due_at, key))

    def later(self, row: Row) -> None:
        """
        A row is not due yet.

        The place may lie beyond it all the same: what an ended endpoint is owed is read before its time, and the database's
        clock may have been set back.
        """
        assert row.due_at is not None
        self._lower_due_place(row.endpoint, (row.due_at, row.id - 1))
        self.due(row.endpoint, row.due_at.timestamp())

    def put_back(self, row: Row) -> None:
        """A row for which there is no room: a refill is to find it."""
        if row.due_at is None:
            self.lower_place(row.endpoint, row.id - 1)
            return
        self._lower_due_place(row.endpoint, (row.due_at, row.id - 1))
        self.due(row.endpoint, 0.0)

    def next_due(self) -> float | None:
        """When something is due next, on the database's clock."""
        return self._dues[0][0] if self._dues else None

    def fell_due(self, key: EndpointKey) -> None:
        """Something of an endpoint is due."""
        backlog = self.of(key)
        backlog.next_due, backlog.due_now = 0.0, True
        self._due_now[key] = None

    def _lower_due_place(self, key: EndpointKey, place: tuple[datetime.datetime, int]) -> None:
        backlog = self.of(key)
        backlog.due_place = min(backlog.due_place, place)

    # Demands.

    def demand_fresh(self, may_read: Callable[[EndpointKey], bool]) -> list[tuple[EndpointKey, int, int]]:
        """Who has fresh rows behind a place, that place, and how many there is room for."""
        if self._memory.backed_up():
            return []
        demands: list[tuple[EndpointKey, int, int]] = []
        total = 0
        for key in list(self._hungry):
            place = self.of(key).place
            if place is None or not may_read(key):
                del self._hungry[key]
                continue
            want = self.ask(key, timed=False)
            del self._hungry[key]
            if want:
                demands.append((key, place, want))
                total += want
                # to the back: when demands do not fit into one statement, others come first next time
                self._hungry[key] = None
            if total >= REFILL_MOST:
                break
        return demands

    def demand_due(
        self, now: float, mine: Callable[[EndpointKey], bool], may_read: Callable[[EndpointKey], bool]
    ) -> list[tuple[EndpointKey, datetime.datetime, int, int]]:
        """
        Whose rows have fallen due, from which place, and how many there is room for.

        ``now`` is the database's clock.  Those that are told are not due any more: ``due`` and ``fell_due`` say when again.
        """
        while self._dues and self._dues[0][0] <= now:
            due_at, key = heapq.heappop(self._dues)
            if self.of(key).next_due == due_at and mine(key):
                self.fell_due(key)
        if self._memory.backed_up():
            return []
        demands: list[tuple[EndpointKey, datetime.datetime, int, int]] = []
        total = 0
        for key in list(self._due_now):
            del self._due_now[key]
            if not may_read(key):
                continue
            want = self.ask(key, timed=True)
            if want:
                backlog = self.of(key)
                demands.append((key, *backlog.due_place, want))
                total += want
                backlog.next_due, backlog.due_now = None, False
            if total >= REFILL_TIMED_MOST:
                break
        return demands

    # Room.

    def free(self) -> int:
        """
        How many more rows memory may hold.

        The few that each full queue may always have do not count: thousands of throttled endpoints must not starve the
        others.
        """
        return self.window + QUEUE_LEAST * len(self._full) - self._memory.total_waiting()

    def has_room(self, key: EndpointKey, taken: Counter[EndpointKey], *, timed: bool) -> bool:
        """Whether memory holds one more row that has arrived: any queue may take a part of what is free."""
        free = self.free() - taken.total()
        bound = max(self._share(key, timed=timed).bound, min(QUEUE_MOST, free // 4))
        return self._held(key, timed=timed) + taken[key] < bound and not self._memory.backed_up()

    def ask(self, key: EndpointKey, *, timed: bool) -> int:
        """How many rows to ask for now; with none the endpoint is put aside until it has room."""
        share = self._share(key, timed=timed)
        if self._wanted(key, timed=timed):
            now = self._mono()
            since_s = now - share.asked_mono
            if since_s < SOON_S or (since_s < LATE_S and not self._held(key, timed=timed)):
                share.bound = min(QUEUE_MOST, share.bound * 2)
            elif since_s > LATE_S:
                share.bound = max(QUEUE_LEAST, share.bound // 2)
            share.asked_mono = now
        wanted = self._wanted(key, timed=timed)
        if not wanted:
            self._full.add(key)
        return wanted

    def room(self, key: EndpointKey) -> bool:
        """Something of an endpoint has left memory; whether it was full and has room again."""
        return (
            key in self._full
            and bool(self._wanted(key, timed=False) or self._wanted(key, timed=True))
            and self.look_again(key)
        )

    def look_again(self, key: EndpointKey) -> bool:
        """An endpoint that was put aside may have room; whether it was."""
        if key not in self._full:
            return False
        self._full.discard(key)
        backlog = self.of(key)
        if backlog.place is not None:
            self._hungry[key] = None
        if backlog.due_now:
            self._due_now[key] = None
        return True

    def stuck(self) -> Iterator[tuple[EndpointKey, int]]:
        """Endpoints of which memory holds more than the least, and nothing moves: the least, which is told, is their bound again."""
        now = self._mono()
        for key, backlog in self._backlogs.items():
            asked_mono = max(backlog.fresh.asked_mono, backlog.timed.asked_mono)
            if self._memory.waiting(key) > 2 * QUEUE_LEAST and now - asked_mono > LATE_S:
                backlog.fresh.bound = backlog.timed.bound = QUEUE_LEAST
                yield key, QUEUE_LEAST

    def any_full(self) -> bool:
        """Whether any endpoint is put aside."""
        return bool(self._full)

    def _share(self, key: EndpointKey, *, timed: bool) -> Share:
        backlog = self.of(key)
        return backlog.timed if timed else backlog.fresh

    def _held(self, key: EndpointKey, *, timed: bool) -> int:
        """Rows of one kind that wait in memory."""
        held = self._memory.waiting_timed(key)
        return held if timed else self._memory.waiting(key) - held

    def _wanted(self, key: EndpointKey, *, timed: bool) -> int:
        """How many rows to ask for: none before half of the queue is gone, so that reads are worth their price."""
        bound = self._share(key, timed=timed).bound
        held = self._held(key, timed=timed)
        return bound - held if held <= bound // 2 else 0
