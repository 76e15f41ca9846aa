"""
hookd with a bug, for torture.py to catch: a test that passes such a daemon proves nothing.

    python bench/spoilt.py BUG run

| bug | is |
| --- | --- |
| ``early`` | a delivery is settled when its request has been written, not when it was answered |
| ``undrained`` | SIGTERM does not wait for what was answered to be written down |
| ``unfenced`` | verdicts are settled whoever owns their shard meanwhile |
| ``unguarded`` | a connection that speaks while nobody asked is used, and what it said is taken for the next answer |
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from hookd.commands import main
from hookd.core.model import Outcome, OutcomeKind, Result, Verdict, VerdictKind
from hookd.daemon import Daemon
from hookd.dispatcher import Dispatcher
from hookd.net import connections, exchange
from hookd.net.line import Line
from hookd.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from hookd.core.model import Delivery
    from hookd.net.line import Asker


def early() -> None:
    start = Dispatcher._start  # noqa: SLF001 - it is what gets spoilt

    def started(self: Dispatcher, delivery: Delivery) -> bool:
        under_way = start(self, delivery)
        if under_way:
            wall = self._clock.wall()
            outcome = Outcome(OutcomeKind.ANSWERED, status=200, started_at=wall)
            verdict = Verdict(VerdictKind.DELIVERED)
            self._recorder.add(Result(delivery, delivery.endpoint, outcome, verdict, written_wall=wall))
        return under_way

    put(Dispatcher, "_start", started)


def undrained() -> None:
    async def written(_self: Daemon) -> int:
        return 0

    put(Daemon, "_write_the_rest", written)


class Everything(set[int]):
    def __contains__(self, _: object) -> bool:
        return True


class Unfenced:
    """The session of an owner, who takes all shards for its own."""

    def __init__(self, ledger: Any) -> None:
        self.settle = ledger.settle
        self.shards = Everything()


def unfenced() -> None:
    run = Recorder.run

    async def ran(self: Recorder, ledger: Any, followers: Any, *, until_empty: bool = False) -> None:
        whatever: Any = Unfenced(ledger)
        await run(self, whatever, followers, until_empty=until_empty)

    put(Recorder, "run", ran)


def unguarded() -> None:
    said: dict[int, bytes] = {}
    ask, data_received = Line.ask, Line.data_received

    def silent(lines: Sequence[Line]) -> list[bool]:
        return [not line.closing() for line in lines]

    def asked(self: Line, asker: Asker) -> None:
        ask(self, asker)
        before = said.pop(id(self), b"")
        if before:
            asyncio.get_running_loop().call_soon(self.data_received, before)

    def received(self: Line, data: bytes) -> None:
        if self._asker is None:
            said[id(self)] = said.get(id(self), b"") + data
        else:
            data_received(self, data)

    put(connections, "silent", silent)
    put(exchange, "silent", silent)
    put(Line, "ask", asked)
    put(Line, "data_received", received)


def put(owner: type | ModuleType, name: str, spoilt: Callable[..., Any]) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is called otherwise now: spoil that"
    setattr(owner, name, spoilt)


BUGS = {bug.__name__: bug for bug in (early, undrained, unfenced, unguarded)}

if __name__ == "__main__":
    BUGS[sys.argv.pop(1)]()
    main()
