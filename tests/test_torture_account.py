"""What ``bench/torture.py`` calls lost, doubled and dishonest, on logs of a few lines: a judge that never convicts is none."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "bench"))

from account import Account, Exchange, Fault, Seen, Sent, account_of

WALL = 1_000_000.0
"""The wall clock, when the monotonic one says 0."""


def fault(at: float, *, until: float = 0.0, woken: float = 0.0) -> Fault:
    return Fault(at, WALL + at, until or at, woken)


def counted(
    *requests: tuple[bytes, int, float, float, int],
    committed: bytes = b"",
    faults: tuple[Fault, ...] = (),
    settled: dict[bytes, float] | None = None,
    made: dict[int, float] | None = None,
    dead: bytes = b"",
    pending: bytes = b"",
) -> Account:
    """A request is its event, its connection, when it was read and answered (0: never), and its status."""
    seen = Seen(made=made or {1: 0.0, 2: 0.0, 3: 0.0})
    for id_, connection, opened, answered, status in requests:
        exchange = Exchange(id_, 1, 0, connection, opened, answered, answered or opened + 0.5, status)
        seen.exchanges.setdefault(id_, []).append(exchange)
    sent = Sent({bytes([b]) for b in committed}, set(), {}, 1.0)
    at = {id_: WALL + when for id_, when in (settled or {}).items()}
    return account_of(seen, sent, faults, at, {bytes([b]) for b in dead}, {bytes([b]) for b in pending})


def test_each_once_is_all_well() -> None:
    account = counted((b"a", 1, 1.0, 1.1, 200), (b"b", 1, 1.2, 1.3, 204), committed=b"ab", settled={b"a": 1.0, b"b": 1.2})  # fmt: skip
    assert account == Account(events=2, received=2, seconds=1.0)


def test_what_is_lost_is_no_dead_letter_and_not_pending() -> None:
    account = counted((b"a", 1, 1.0, 1.1, 500), committed=b"abcd", dead=b"c", pending=b"d")
    assert (account.lost, account.pending) == (2, 1), "an answer of 500 is no delivery, and b never came"


def test_what_was_never_committed_is_a_phantom() -> None:
    assert counted((b"x", 1, 1.0, 1.1, 200)).phantom == 1


def test_settled_without_the_receivers_own_2xx_is_dishonest() -> None:
    account = counted((b"a", 1, 1.0, 1.1, 500), committed=b"ab", settled={b"a": 1.0, b"b": 1.0})
    assert account.dishonest == 2


def test_a_retry_is_no_duplicate() -> None:
    account = counted((b"a", 1, 1.0, 1.1, 500), (b"a", 1, 2.0, 2.1, 200), committed=b"a", settled={b"a": 2.0})
    assert (account.doubled, account.unexplained) == (0, 0)


def test_a_duplicate_without_a_fault_is_unexplained() -> None:
    account = counted((b"a", 1, 1.0, 1.1, 200), (b"a", 1, 2.0, 2.1, 200), committed=b"a", settled={b"a": 1.0})
    assert (account.doubled, account.allowed, account.unexplained) == (1, 0, 1)


def test_in_flight_or_unsettled_at_a_kill_may_come_twice_and_what_was_settled_may_not() -> None:
    account = counted(
        (b"a", 1, 1.0, 0.0, 0), (b"a", 2, 2.0, 2.1, 200),  # in flight
        (b"b", 1, 1.0, 1.2, 200), (b"b", 2, 2.0, 2.1, 200),  # answered, settled by the next owner
        (b"c", 1, 1.0, 1.2, 200), (b"c", 2, 2.0, 2.1, 200),  # settled before
        committed=b"abc", faults=(fault(1.3),), settled={b"a": 2.0, b"b": 2.0, b"c": 1.0}, made={1: 0.0, 2: 1.9},
    )  # fmt: skip
    assert (account.doubled, account.allowed, account.unexplained) == (3, 2, 1)


def test_what_had_been_sent_again_before_the_next_kill_counts_once() -> None:
    account = counted(
        (b"a", 1, 1.0, 1.2, 200), (b"a", 2, 2.0, 2.1, 200), (b"a", 3, 4.0, 4.1, 200),
        committed=b"a", faults=(fault(1.3), fault(2.3)), settled={b"a": 4.0}, made={1: 0.0, 2: 1.9, 3: 3.9},
    )  # fmt: skip
    assert (account.doubled, account.allowed, account.unexplained) == (2, 2, 0)


def test_what_a_zombie_had_begun_to_write_is_read_when_it_wakes() -> None:
    requests = ((b"a", 2, 2.0, 2.1, 200), (b"a", 1, 31.0, 31.1, 200))
    made = {1: 0.0, 2: 1.9}
    asleep = counted(*requests, committed=b"a", faults=(fault(1.0, woken=30.9),), settled={b"a": 2.0}, made=made)  # fmt: skip
    assert (asleep.doubled, asleep.allowed, asleep.unexplained) == (1, 1, 0)
    later = counted(*requests, committed=b"a", faults=(fault(1.0, woken=20.0),), settled={b"a": 2.0}, made=made)  # fmt: skip
    assert later.unexplained == 1, "it went on to send long after it woke"
