"""Receivers that mean harm: an attempt ends in time, in bounded memory, and nobody else notices."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hookd.core.model import Outcome, OutcomeKind
from tests.net import hostile
from tests.net.test_exchange import exchange, request
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S = 1.0

DEADLINE_S = 20.0
"""By when what has a time or a bound of its own has ended, on a machine with much else to do."""

MEMORY_MOST = 64 * 2**20
"""That eight attempts on one receiver may take together; a flood fills gigabytes in that time."""

KINDS = {OutcomeKind.ANSWERED, OutcomeKind.MALFORMED, OutcomeKind.TIMEOUT, OutcomeKind.CONNECTION_LOST}

STATUS = Path("/proc/self/status")


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    with hostile.started() as ports:
        yield ports


class Memory:
    """How much memory this process took at most, since this was made; 0 where the system does not tell."""

    def __init__(self) -> None:
        self.known = STATUS.is_file()
        if self.known:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.before = self._read("VmRSS")

    def taken(self) -> int:
        return self._read("VmHWM") - self.before if self.known else 0

    @staticmethod
    def _read(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
        assert found
        return int(found[1]) * 1024


def _url(port: int, name: str) -> str:
    return f"http://127.0.0.1:{port}/{name.replace(' ', '_')}"


def say(text: str) -> None:
    print(text)  # noqa: T201 - the figure


UNCOUNTED = ("a chunk extension without end", "a chunk size without end", "empty lines without end")


@pytest.mark.parametrize("name", [*hostile.FLOODS, *hostile.SLOW])
def test_an_attempt_ends_in_time_and_bounded_memory(ports: tuple[int, int], name: str) -> None:
    async def go() -> list[Outcome]:
        async with exchange(max_response=16 * 1024) as http:
            asked = request(_url(ports[0], name), timeout_s=TIMEOUT_S)
            async with asyncio.timeout(DEADLINE_S):
                return await asyncio.gather(*(http.send(asked) for _ in range(8)))

    memory = Memory()
    begun = time.monotonic()
    outcomes = asyncio.run(go())
    took, taken = time.monotonic() - begun, memory.taken()
    kinds = {o.kind.value for o in outcomes}
    say(f"{name}: {kinds}, {took:.2f} s, {taken / 2**20:.1f} MB for 8 attempts")
    assert taken < MEMORY_MOST
    for outcome in outcomes:
        assert outcome.kind in KINDS
        assert len(outcome.body) <= 16 * 1024
        assert not outcome.body.startswith("\x00"), "nothing is decompressed"


@pytest.mark.parametrize("name", UNCOUNTED)
def test_an_answer_that_says_nothing_ends_by_its_size(ports: tuple[int, int], name: str) -> None:
    async def go() -> Outcome:
        async with exchange() as http:
            return await http.send(request(_url(ports[0], name), timeout_s=DEADLINE_S))

    begun = time.process_time()
    outcome = asyncio.run(go())
    say(f"{name}: {outcome.total_ms:.0f} ms, {time.process_time() - begun:.2f} s of CPU")
    assert outcome.kind is not OutcomeKind.TIMEOUT
    assert outcome.total_ms < DEADLINE_S * 1000, "it ended by its size, long before its time"


@pytest.mark.parametrize("name", list(hostile.SMUGGLING))
def test_no_answer_is_somebody_elses(ports: tuple[int, int], name: str) -> None:
    async def go() -> None:
        async with exchange() as http:
            for _ in range(3):
                async with asyncio.timeout(DEADLINE_S):
                    first = await http.send(request(_url(ports[0], name), timeout_s=TIMEOUT_S))
                second = await http.send(request(_url(ports[0], "honest"), timeout_s=5))
                assert first.kind in KINDS
                assert "EVIL" not in first.body or not first.reused
                assert (second.kind, second.body) == (OutcomeKind.ANSWERED, "honest")

    asyncio.run(go())


@pytest.mark.parametrize("kind", ["silence", "drip"])
def test_a_tls_handshake_that_never_ends(ports: tuple[int, int], kind: str) -> None:
    port = ports[kind == "drip"]

    async def go() -> list[Outcome]:
        async with exchange() as http:
            asked = request(f"https://127.0.0.1:{port}/", timeout_s=60, connect_timeout_s=0.5)
            async with asyncio.timeout(DEADLINE_S):
                return await asyncio.gather(*(http.send(asked) for _ in range(8)))

    outcomes = asyncio.run(go())
    assert {o.kind for o in outcomes} <= {OutcomeKind.CONNECT_TIMEOUT, OutcomeKind.TLS_FAILED}
    assert not any(o.sent for o in outcomes)


def test_a_flood_on_an_idle_connection(ports: tuple[int, int]) -> None:
    """Answers that nobody asked for, on connections that are kept: they must not be taken in without end."""

    async def go() -> list[Outcome]:
        async with exchange() as http:
            asked = request(_url(ports[0], "a flood after the answer"), timeout_s=TIMEOUT_S)
            outcomes = await asyncio.gather(*(http.send(asked) for _ in range(4)))
            await asyncio.sleep(2.0)  # what is tested is that nothing happens meanwhile
            return outcomes

    memory = Memory()
    outcomes = asyncio.run(go())
    taken = memory.taken()
    say(f"a flood after the answer: {taken / 2**20:.1f} MB for 4 connections in 2 s")
    assert all(o.status == 200 for o in outcomes)
    assert taken < MEMORY_MOST


def test_other_lanes_do_not_notice(ports: tuple[int, int]) -> None:
    async def go() -> tuple[list[Outcome], list[Outcome]]:
        async with Receiver() as honest, exchange() as http:
            names = [*hostile.FLOODS, *hostile.SLOW, *hostile.SMUGGLING]
            harm = asyncio.gather(
                *(http.send(request(_url(ports[0], name), timeout_s=3)) for name in names for _ in range(3)),
                *(
                    http.send(request(f"https://127.0.0.1:{ports[1]}/", timeout_s=3, connect_timeout_s=2))
                    for _ in range(20)
                ),
            )
            good = []
            until = time.monotonic() + 10
            while not harm.done() and time.monotonic() < until:
                good.append(await http.send(request(honest.url, timeout_s=3)))
                await asyncio.sleep(0.005)
            async with asyncio.timeout(10):
                return await harm, good

    memory = Memory()
    bad, good = asyncio.run(go())
    took = sorted(o.total_ms for o in good)
    say(
        f"{len(bad)} hostile attempts at once, {memory.taken() / 2**20:.1f} MB; {len(good)} honest ones meanwhile, "
        f"median {took[len(took) // 2]:.1f} ms, p95 {took[len(took) * 95 // 100]:.0f} ms, worst {took[-1]:.0f} ms"
    )
    assert all(o.status == 200 for o in good)
    assert len(good) > 50
    assert memory.taken() < 2 * MEMORY_MOST
