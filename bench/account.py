"""
The account of a trial: what was lost, doubled and wrongly settled, by the witness's log alone.

It is held against what the producer knows to be committed:

- *lost*: committed, neither pending nor a dead letter, and no 2xx of the receiver's own in its log;
- *phantom*: received, and never committed (rolled back, or never sent);
- *doubled*: received again although it was not answered with a failure.  Each is *explained* by a fault if the delivery was
  open at that moment, or answered and not settled yet; their number is bounded by how many there were of these;
- *dishonest*: settled as delivered, and no 2xx of the receiver's own in its log.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ON_THE_WIRE_S = 1.0
"""So long after a daemon died may the witness read, on connections that it knows, the last requests that it wrote."""

OLDEST_S = 30.0
"""So old may an exchange be that is in flight: above ``delivery.timeout``."""

NOTICED_S = 1.0
"""So much later than it happened may the end of a daemon have been noticed that ended itself."""


@dataclass(slots=True)
class Exchange:
    """One request, as the witness saw it; times on the monotonic clock."""

    id: bytes
    attempt: int
    host: int
    connection: int
    opened: float
    answered: float = 0.0
    """0: its answer was never written."""
    ended: float = 0.0
    """Answered, or its connection lost."""
    status: int = 0


@dataclass(slots=True)
class Fault:
    """Something that was done to them."""

    at: float
    wall: float
    until: float
    """What opened before this may have been begun by somebody who did not know yet."""
    woken: float = 0.0
    """When a stopped daemon went on: what it had begun to write is read only then."""


@dataclass(slots=True)
class Seen:
    """What the witness saw."""

    exchanges: dict[bytes, list[Exchange]] = field(default_factory=dict)
    """Of each event, in the order of arrival."""
    numbers: dict[bytes, int] = field(default_factory=dict)
    """What stood in each event's payload."""
    made: dict[int, float] = field(default_factory=dict)
    """When each connection was."""
    bad: int = 0
    """Not signed as they should be."""


@dataclass(slots=True)
class Sent:
    """What the producer knows."""

    committed: set[bytes]
    unknown: set[bytes]
    numbers: dict[bytes, int]
    seconds: float


@dataclass(slots=True)
class Account:
    """What became of what was sent, in numbers."""

    events: int = 0
    """Committed, as the producer knows."""
    unknown: int = 0
    """Whose COMMIT was not answered."""
    received: int = 0
    lost: int = 0
    phantom: int = 0
    dishonest: int = 0
    spoilt: int = 0
    """Not signed as it should be, or with another payload."""
    doubled: int = 0
    allowed: int = 0
    """In flight, or answered and not settled, at the faults."""
    unexplained: int = 0
    """Of the doubled: neither in flight nor unsettled at any fault."""
    pending: int = 0
    """Not settled after all."""
    seconds: float = 0.0
    """How long events were inserted one after another."""

    def add(self, other: Account) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def account_of(
    seen: Seen,
    sent: Sent,
    faults: Sequence[Fault],
    settled: dict[bytes, float],
    dead: set[bytes],
    pending: set[bytes],
) -> Account:
    """``settled``: when the exchange was begun that each event was settled as delivered for, by the wall clock."""
    exchanges = sorted((e for all_of_it in seen.exchanges.values() for e in all_of_it), key=_opened)
    known = sent.committed | sent.unknown
    had = {i for i, all_of_it in seen.exchanges.items() if any(200 <= e.status < 300 for e in all_of_it)}
    account = Account(
        events=len(sent.committed),
        unknown=len(sent.unknown),
        received=len(exchanges),
        lost=len(sent.committed - had - dead - pending),
        pending=len(pending),
        seconds=sent.seconds,
        phantom=len(seen.exchanges.keys() - known),
        dishonest=len(settled.keys() - had),
        spoilt=seen.bad + sum(sent.numbers.get(i) != n for i, n in seen.numbers.items() if i in known),
    )
    excused: set[int] = set()
    late: set[int] = set()
    for fault in faults:
        at_it = _at(fault, seen, exchanges, settled)
        late_ones = _late(fault, seen, exchanges)
        account.allowed += len(at_it | late_ones)
        excused |= at_it
        late |= late_ones
    for all_of_it in seen.exchanges.values():
        for n, exchange in enumerate(all_of_it[:-1]):
            if not exchange.answered or exchange.status < 300:
                account.doubled += 1
                if id(exchange) not in excused and id(all_of_it[n + 1]) not in late:
                    account.unexplained += 1
    return account


def _late(fault: Fault, seen: Seen, exchanges: list[Exchange]) -> set[int]:
    """What a stopped daemon had begun to write when it was stopped, and the witness read when it went on."""
    if not fault.woken:
        return set()
    first = bisect_left(exchanges, fault.woken, key=_opened)
    last = bisect_left(exchanges, fault.woken + ON_THE_WIRE_S, key=_opened)
    return {id(e) for e in exchanges[first:last] if seen.made[e.connection] <= fault.at}


def _at(fault: Fault, seen: Seen, exchanges: list[Exchange], settled: dict[bytes, float]) -> set[int]:
    """The exchanges that were in flight at a fault, or answered and not settled."""
    found = set()
    latest = max(fault.at + ON_THE_WIRE_S, fault.until)
    for e in exchanges[
        bisect_left(exchanges, fault.at - OLDEST_S, key=_opened) : bisect_left(exchanges, latest, key=_opened)
    ]:
        if e.opened > max(fault.at, fault.until) and seen.made[e.connection] > fault.at:
            continue
        if not e.answered:
            if not e.ended or e.ended >= fault.at - NOTICED_S:
                found.add(id(e))
        elif e.answered >= fault.at:
            found.add(id(e))
        elif settled.get(e.id, float("inf")) >= fault.wall:
            # what was settled for it was begun after the fault, by somebody else; one that had been sent again is not at hand
            again = min((o.opened for o in seen.exchanges[e.id] if o.opened > e.opened), default=float("inf"))
            if again > fault.at:
                found.add(id(e))
    return found


def _opened(exchange: Exchange) -> float:
    return exchange.opened
