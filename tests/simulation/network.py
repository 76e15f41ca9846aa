"""
The network and the receivers: what stands in the place of ``hookd.net.exchange``.

A receiver keeps its own log, and that is the truth: what it was asked, when, and what it answered.  It reads the ids from the
bytes of the request, as a real one would.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hookd.core.model import Outcome, OutcomeKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from hookd.core.model import Delivery
    from hookd.core.request import Request
    from hookd.dispatcher import Turn

    from .database import Session
    from .timeline import ProcessLoop, Timeline

TICK_S = 0.05

IDS = re.compile(rb"webhook-id: (\S+)\r\n.*hookd-attempt: (\d+)\r\n", re.DOTALL)


class Answer(NamedTuple):
    """What a host does with one request."""

    fate: str
    """``answered``, ``refused``, ``connect_timeout``, ``dns``, ``tls``, ``lost_before`` or ``lost_after`` it was read,
    ``hangs`` (nothing comes back in time), ``malformed``, ``forged`` (an answer was there before the request)."""
    status: int = 200
    takes_s: float = 0.002
    connect_s: float = 0.0
    retry_after: str | None = None
    body: str = ""


UNWRITTEN = {
    "refused": (OutcomeKind.CONNECT_REFUSED, "the connection was refused"),
    "connect_timeout": (OutcomeKind.CONNECT_TIMEOUT, "the connection timed out"),
    "dns": (OutcomeKind.DNS_FAILED, "the name does not exist"),
    "tls": (OutcomeKind.TLS_FAILED, "TLS failed"),
}


@dataclass(slots=True, eq=False)
class Receipt:
    """A request as its receiver logged it."""

    flight: Flight
    webhook_id: str
    attempt: int
    path: str
    opened_at: float
    replied_at: float | None = None
    status: int = 0


@dataclass(slots=True, eq=False)
class Flight:
    """One exchange, from the sender's side."""

    process: Sender
    session: Session | None
    """That owned the shard when it began."""
    delivery_id: int
    event_id: Any
    endpoint: int
    shard: int
    attempt: int
    host: str
    begun_at: float
    limits: int
    """Number of the configuration that it was begun under."""
    written_at: float | None = None
    ended_at: float | None = None
    outcome: Outcome | None = None
    given_up: bool = False
    """The process let go of it (its drain was over), or is no more."""
    receipts: list[Receipt] = field(default_factory=list)


class Sender(Protocol):
    """The process that an exchange belongs to."""

    name: str
    loop: ProcessLoop
    reloads: int
    ours_until: float

    @property
    def dead(self) -> bool: ...
    def session(self) -> Session | None: ...
    def wall(self) -> float: ...


class Watcher(Protocol):
    """Who is told of all that happens."""

    def begun(self, flight: Flight, delivery: Delivery) -> None: ...
    def written(self, flight: Flight) -> None: ...
    def received(self, receipt: Receipt) -> None: ...
    def replied(self, receipt: Receipt) -> None: ...
    def ended(self, flight: Flight) -> None: ...
    def abandoned(self, flight: Flight) -> None: ...


class Network:
    """All hosts, and the way to them."""

    def __init__(
        self, timeline: Timeline, answer: Callable[[str, str], Answer], watcher: Watcher, dice: Random
    ) -> None:
        """``answer`` says what a host does with a request for a path."""
        self.timeline = timeline
        self.answer = answer
        self.watcher = watcher
        self.dice = dice
        self.lag_s = 0.001

    def lag(self) -> float:
        """One way."""
        return self.lag_s * (0.5 + self.dice.random())


class ScriptedExchange:
    """The exchange of one process (``net.exchange.HttpExchange``)."""

    def __init__(self, network: Network, process: Sender) -> None:
        self._network = network
        self._process = process
        self.connections = self
        self.options: Any = None
        self.believes_forgeries = False

    def rules_changed(self) -> None:
        """Nothing is kept open here."""

    async def close(self) -> None:
        """The process ends."""

    def begin(self, request: Request, turn: Turn | None, done: Callable[[Outcome], None]) -> Exchange:
        delivery: Delivery = done.args[0]  # type: ignore[attr-defined]
        exchange = Exchange(self._network, self._process, request, turn, done, delivery)
        exchange.believes_forgeries = self.believes_forgeries
        exchange.begin()
        return exchange

    def depart(self) -> None:
        """Nothing waits for it here."""


class Exchange:
    """One under way."""

    believes_forgeries = False

    def __init__(
        self,
        network: Network,
        process: Sender,
        request: Request,
        turn: Turn | None,
        done: Callable[[Outcome], None],
        delivery: Delivery,
    ) -> None:
        self._network = network
        self._process = process
        self._request = request
        self._turn = turn
        self._done: Callable[[Outcome], None] | None = done
        self._task: asyncio.Task[None] | None = None
        target = request.target
        self._path = target.path_and_query
        self.flight = Flight(
            process,
            process.session(),
            delivery.id,
            delivery.event.id,
            delivery.endpoint,
            delivery.shard,
            delivery.attempt,
            target.lane,
            network.timeline.now,
            process.reloads,
        )
        self._answer = network.answer(target.lane, self._path)
        self._delivery = delivery

    def begin(self) -> None:
        self._network.watcher.begun(self.flight, self._delivery)
        loop, answer = self._process.loop, self._answer
        if self._process.ours_until > self._network.timeline.now:
            loop.call_later(0.0001, self._end, Outcome(OutcomeKind.OURS, reason="too many open files"))
        elif answer.fate in UNWRITTEN:
            kind, reason = UNWRITTEN[answer.fate]
            after = self._request.connect_timeout_s if answer.fate == "connect_timeout" else 0.001
            loop.call_later(after, self._end, Outcome(kind, reason=reason))
        elif answer.fate == "forged" and self.believes_forgeries:
            loop.call_later(0.001, self._end, Outcome(OutcomeKind.ANSWERED, sent=True, status=200))
        elif self._turn is not None:
            self._task = loop.create_task(self._in_turn(self._turn))
        elif answer.connect_s:
            loop.call_later(answer.connect_s, self._write)
        else:
            self._write()
        loop.call_later(self._request.timeout_s, self._time_is_over)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._done is not None:
            self._done = None
            self.flight.given_up = True
            self._network.watcher.abandoned(self.flight)

    async def _in_turn(self, turn: Turn) -> None:
        if self._answer.connect_s:
            await asyncio.sleep(self._answer.connect_s)
        try:
            mine = await turn.wait()
        except Exception as fault:
            # as the real one has it: the daemon says so, and that is the end of this world
            self._end(Outcome(OutcomeKind.OURS, reason="an internal error", fault=fault))
            return
        if mine:
            self._write()
        else:
            self._end(Outcome(OutcomeKind.OURS, reason="the host's rate was lowered meanwhile"))

    def _write(self) -> None:
        if self._done is None:
            return
        if self._turn is not None:
            self._turn.wrote()
        network = self._network
        self.flight.written_at = network.timeline.now
        network.watcher.written(self.flight)
        if self._answer.fate == "lost_before":
            self._process.loop.call_later(network.lag(), self._end, self._lost())
        else:
            network.timeline.after(network.lag(), self._receive)

    @staticmethod
    def _lost() -> Outcome:
        return Outcome(
            OutcomeKind.CONNECTION_LOST, sent=True, reason="the connection was closed without an answer"
        )

    def _receive(self) -> None:
        """At the receiver."""
        found = IDS.search(self._request.lines)
        assert found is not None
        now = self._network.timeline.now
        receipt = Receipt(self.flight, found[1].decode(), int(found[2]), self._path, now)
        self.flight.receipts.append(receipt)
        self._network.watcher.received(receipt)
        self._network.timeline.after(self._answer.takes_s, self._reply, receipt)

    def _reply(self, receipt: Receipt) -> None:
        """At the receiver."""
        network, answer = self._network, self._answer
        receipt.replied_at, receipt.status = network.timeline.now, answer.status
        network.watcher.replied(receipt)
        if self._done is None or self._process.dead or answer.fate == "hangs":
            return
        if answer.fate == "lost_after":
            outcome = self._lost()
        elif answer.fate == "malformed":
            outcome = Outcome(OutcomeKind.MALFORMED, sent=True, reason="the answer was not HTTP")
        else:
            outcome = Outcome(
                OutcomeKind.ANSWERED,
                sent=True,
                status=answer.status,
                retry_after=answer.retry_after,
                body=answer.body,
            )
        self._process.loop.call_later(network.lag(), self._end, outcome)

    def _time_is_over(self) -> None:
        if self._done is None:
            return
        if self._task is not None and self.flight.written_at is None:
            # who waits for a turn is not interrupted
            self._process.loop.call_later(TICK_S, self._time_is_over)
            return
        written = self.flight.written_at is not None
        self._end(Outcome(OutcomeKind.TIMEOUT, sent=written, reason="the answer took too long"))

    def _end(self, outcome: Outcome) -> None:
        if self._done is None:
            return
        done, self._done = self._done, None
        flight = self.flight
        flight.ended_at = self._network.timeline.now
        flight.outcome = outcome
        outcome.url = self._request.target.url
        outcome.total_ms = (flight.ended_at - flight.begun_at) * 1000
        if flight.written_at is not None:
            outcome.written_at = self._process.wall()
        self._network.watcher.ended(flight)
        done(outcome)
