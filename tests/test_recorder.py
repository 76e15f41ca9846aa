"""The recorder: batches, back-pressure, and a batch that PostgreSQL refuses."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from hookd.clock import SystemClock
from hookd.core.model import (
    Delivery,
    DeliveryId,
    EndpointKey,
    Event,
    Outcome,
    OutcomeKind,
    Result,
    Verdict,
    VerdictKind,
)
from hookd.recorder import BATCH_MOST, HIGH_WATER, Recorder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Refused(Exception):
    """What the ledger says of bad data."""


class Lost(Exception):
    """What it says when the session is gone."""


@dataclass
class Settled:
    ids: set[DeliveryId] = field(default_factory=set)
    due_at: dict[DeliveryId, float] = field(default_factory=dict)
    disabled: list[EndpointKey] = field(default_factory=list)
    statements: int = 3


class Ledger:
    """Refuses batches that hold a body it cannot store."""

    def __init__(self) -> None:
        self.shards = {0}
        self.batches: list[int] = []
        self.stored: list[tuple[int, str]] = []
        self.fail_with: Exception | None = None

    async def settle(self, results: Sequence[Result]) -> Settled:
        if self.fail_with is not None:
            raise self.fail_with
        self.batches.append(len(results))
        if any(r.outcome is not None and "poison" in r.outcome.body for r in results):
            raise Refused("invalid byte sequence")
        self.stored += [(r.delivery.id, r.outcome.body if r.outcome else "") for r in results]
        return Settled({r.delivery.id for r in results})


def result(number: int, body: str = "fine", shard: int = 0) -> Result:
    delivery = Delivery(
        DeliveryId(number), EndpointKey(1), Event(UUID(int=1), "a", "t", b"{}", 0.0), 0, shard
    )
    return Result(
        delivery,
        EndpointKey(1),
        Outcome(OutcomeKind.ANSWERED, status=200, body=body),
        Verdict(VerdictKind.DELIVERED),
    )


def recorder(reports: list[str]) -> Recorder:
    return Recorder(SystemClock(), refused=Refused, report=lambda problem, _: reports.append(problem))


def test_one_hostile_answer_does_not_undo_the_good_ones() -> None:
    reports: list[str] = []

    async def go() -> Ledger:
        ledger = Ledger()
        made = recorder(reports)
        for n in range(500):
            made.add(result(n, "poison" if n in (137, 138, 400) else "fine"))
        async with asyncio.timeout(20):
            await made.run(ledger, None, until_empty=True)
        assert made.unwritten() == []
        return ledger

    ledger = asyncio.run(go())
    assert sorted(i for i, _ in ledger.stored) == list(range(500))
    assert {i for i, body in ledger.stored if body == ""} == {137, 138, 400}
    assert len(reports) == 3
    assert len(ledger.batches) < 60, "halved, not tried one by one"


def test_what_a_half_has_settled_is_unwritten_no_more() -> None:
    """Whoever is told that it was settled finds it settled (simulation, seed 35248: it was not forwarded to its new shard)."""
    made = recorder([])
    told: list[int] = []
    gone: list[int] = []

    class Followers:
        def settled(
            self, final: Iterable[Delivery], rescheduled: object, *, dropped: Iterable[Delivery]
        ) -> None:
            assert not list(rescheduled)  # type: ignore[call-overload]
            told.extend(d.id for d in final)
            gone.extend(d.id for d in dropped)
            assert {d.id for d in made.unwritten()}.isdisjoint(told + gone)

    async def go() -> None:
        for n in range(40):
            made.add(result(n, "poison" if n == 12 else "fine", shard=n % 2))
        async with asyncio.timeout(20):
            await made.run(Ledger(), Followers(), until_empty=True)

    asyncio.run(go())
    assert told == [n for n in range(40) if n % 2 == 0]
    assert sorted(gone) == [n for n in range(40) if n % 2 == 1], "they are another owner's"
    assert made.dropped == 20


def test_what_was_not_committed_stays_for_the_next_session() -> None:
    async def go() -> None:
        ledger = Ledger()
        made = recorder([])
        for n in range(10):
            made.add(result(n))
        ledger.fail_with = Lost()
        with pytest.raises(Lost):
            await made.run(ledger, None, until_empty=True)
        assert len(made.unwritten()) == 10
        ledger.fail_with = None
        await made.run(ledger, None, until_empty=True)
        assert sorted(i for i, _ in ledger.stored) == list(range(10))

    asyncio.run(go())


def test_results_of_other_owners_shards_are_dropped() -> None:
    async def go() -> None:
        ledger = Ledger()
        made = recorder([])
        for n in range(10):
            made.add(result(n, shard=n % 2))
        await made.run(ledger, None, until_empty=True)
        assert sorted(i for i, _ in ledger.stored) == [0, 2, 4, 6, 8]
        assert made.unwritten() == []
        assert made.dropped == 5, "their new owner may send them again"

    asyncio.run(go())


def test_it_says_when_it_is_backed_up_and_batches_are_bounded() -> None:
    async def go() -> None:
        ledger = Ledger()
        made = recorder([])
        for n in range(HIGH_WATER):
            assert not made.backed_up()
            made.add(result(n))
        assert made.backed_up()
        await made.run(ledger, None, until_empty=True)
        assert not made.backed_up()
        assert max(ledger.batches) == BATCH_MOST

    asyncio.run(go())


def test_few_results_wait_a_moment_for_company() -> None:
    async def go() -> None:
        ledger = Ledger()
        made = recorder([])
        writing = asyncio.create_task(made.run(ledger, None))
        for n in range(5):
            made.add(result(n))
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await made.empty()
        writing.cancel()
        assert ledger.batches == [5]

    asyncio.run(go())
