"""
The exchange: one signed POST, one outcome.  Every request that hookd makes goes through here.

The head was prepared by the dispatcher; where a connection is open the request is written in the same turn, and what comes of
it is told by a callback (``net.line``).  Only what has to wait, for a connection or for a host's rate, is a task.

One coarse timer bounds all attempts, from looking up the name to the last byte of the answer that is read: every
``TICK_S`` it looks at all that are under way, which costs less than setting and cancelling a timer for each.

A reused connection that is closed before any byte of an answer is replaced once, on the same deadline: servers close
idle connections, and the request that crosses their FIN was, as a rule, never read.  The outcome says so (``resent``),
because the rule has exceptions.

Redirects, where they are on: 307 and 308 repeat the POST; 301, 302 and 303 would turn it into a GET and are failures.
Each hop passes the grammar and the guard, none goes from https to http, there are at most three, and neither
signatures nor the endpoint's own headers go to another host.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import ssl
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urljoin

import aiohttp
from aiohttp import http_parser

from hookd.core.model import ANSWERED, BLOCKED, ConnectFailure, Outcome, OutcomeKind
from hookd.core.request import Request, prepare_head
from hookd.core.urls import Target, UrlProblem, parse_url
from hookd.net.connections import CLOSED_FIRST, RULES_CHANGED, Connections
from hookd.net.line import REDIRECTS, SPOKE_FIRST, Line, reads_answers, silent
from hookd.net.resolver import NO_DNS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from hookd.core.addresses import AddressRules
    from hookd.core.proxies import Proxy
    from hookd.net.resolver import Resolver
    from hookd.net.tunnel import ByProxy

TICK_S = 0.05
"""How late an attempt may be ended."""

ABOARD_MOST = 16
"""
Requests that are written after one look at their connections.

The last of them is written some 0.2 ms after it: what arrives meanwhile left its sender before, and could not be told from
an answer that was under way.  A look at each alone took 4.8 of 62 µs a delivery (``bench/profile.py``), this takes 0.6.
"""

LOOKS_MOST = 4
"""At a new connection that has something to say, before it is given up."""

REDIRECTS_MOST = 3

REPEATING = frozenset({307, 308})

CONTENT_TYPE = re.compile(rb"\r\ncontent-type: ([^\r]*)", re.IGNORECASE)

FLOORS = {"aiohttp": (3, 14, 4), "pycares": (5, 2, 1), "yarl": (1, 25, 1), "asyncpg": (0, 32, 0)}
"""Security floors: CVE-2026-69244 and GHSA-2g87-pp6c-29x5 (aiohttp), CVE-2026-33630 (c-ares in pycares)."""


class Turn(Protocol):
    """The rate of a host (the dispatcher's)."""

    async def wait(self) -> bool:
        """Wait until one may be written, at once; False: that is too far away."""
        ...

    def wrote(self) -> None:
        """One is being written."""
        ...


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """What all exchanges have in common."""

    max_response: int = 16 * 1024
    redirects: str = "never"
    https_only: bool = False
    user_agent: str = "hookd"
    names: tuple[str, ...] = ()


class _NotAsked(Exception):
    """The exchange ended before its request was written.  ANSWERED: with what was answered to the one before, a redirect."""

    def __init__(self, kind: OutcomeKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class Attempt:
    """One exchange under way: what it asks for, how far it is, whom it tells."""

    __slots__ = (
        "_begun",
        "_called",
        "_done",
        "_exchange",
        "_line",
        "_task",
        "_turn",
        "deadline",
        "location",
        "most",
        "outcome",
        "request",
    )

    def __init__(
        self, exchange: HttpExchange, request: Request, turn: Turn | None, done: Callable[[Outcome], None]
    ) -> None:
        self._exchange = exchange
        self._turn = turn
        self._done = done
        self._task: asyncio.Task[None] | None = None
        self._line: Line | None = None
        self._begun = exchange.mono()
        self.request = request
        self.deadline = self._begun + request.timeout_s
        self.most = exchange.options.max_response
        self.location: str | None = None
        self.outcome = Outcome(ANSWERED, url=request.target.url)

    def begin(self) -> None:
        """Write the request if there is a connection for it; else see to it that there is."""
        if self._turn is None:
            line = self._exchange.connections.take_silent(self.request.target)
            if line is not None:
                self.ask(line, reused=True)
                return
        self._task = self._exchange.spawn(self._prepare())

    def cancel(self) -> None:
        """Let go of it; nobody is told."""
        if self._task is not None:
            self._task.cancel()
        if self._line is not None:
            self._line.drop()

    # What its line tells.

    def wrote(self) -> None:
        """The request is being written."""
        if self._turn is not None:
            self._turn.wrote()
        if not self.outcome.written_at:
            self.outcome.written_at = self._exchange.wall()

    def answered(self) -> None:
        """An answer came."""
        self._line = None
        outcome = self.outcome
        if outcome.status in REDIRECTS and self._exchange.options.redirects != "never":
            hop = self._exchange.hop(self.request, outcome, self.location)
            if hop is not None:
                if hop.target.lane != self.request.target.lane:
                    self._turn = None  # another host's rate is not asked
                self.request = hop
                self._called = outcome.url
                outcome.redirects += 1
                # a Location may hold what nobody but that receiver should read
                outcome.url = hop.target.url.partition("?")[0]
                # what it said is not what the next one will say, or not say
                outcome.headers = outcome.body = ""
                outcome.body_truncated = False
                outcome.retry_after = None
                self.begin()
                return
        self._end()

    def unanswered(self, kind: OutcomeKind, reason: str, *, resend: bool = False) -> None:
        """None came."""
        self._line = None
        outcome = self.outcome
        if resend and outcome.reused and not outcome.resent:
            outcome.resent = True
            self._task = self._exchange.spawn(self._prepare(fresh=True))
            return
        outcome.kind, outcome.reason, outcome.status = kind, reason, 0
        self._end()

    def fault(self, fault: Exception) -> None:
        """Something is wrong with hookd."""
        self.outcome.fault = fault
        self.unanswered(OutcomeKind.OURS, "an internal error")

    # The way to a connection.

    async def _prepare(self, *, fresh: bool = False) -> None:
        """Wait for the turn and for a connection, and ask on it."""
        try:
            line, reused = await self._line_for_it(fresh=fresh)
        except _NotAsked as end:
            if end.kind is ANSWERED:
                self.outcome.url, self.outcome.reason = self._called, end.reason
                self.outcome.redirects -= 1
                self._end()
            else:
                self.unanswered(end.kind, end.reason)
        except Exception as fault:  # noqa: BLE001 - a bug of ours must cost neither the slot nor the delivery
            self.fault(fault)
        else:
            self.ask(line, reused=reused)
        finally:
            self._task = None

    async def _line_for_it(self, *, fresh: bool) -> tuple[Line, bool]:
        connections, target, turn = self._exchange.connections, self.request.target, self._turn
        if turn is not None and not fresh and connections.has_idle(target):
            # before the idle connection is looked at: that has to be just before it is used
            await self._wait(turn)
            line = connections.take_silent(target)
            if line is not None:
                return line, True
        line = await self._connect()
        try:
            if turn is not None:
                await self._wait(turn)
            await self._see_it_silent(line)
        except BaseException:
            line.drop()
            raise
        return line, False

    async def _wait(self, turn: Turn) -> None:
        if await turn.wait():
            return
        if self.outcome.redirects:
            # an attempt each time: asking the first URL again for nothing would never end
            raise _NotAsked(ANSWERED, "the host's rate does not allow the redirect in time")
        raise _NotAsked(OutcomeKind.OURS, "the host's rate was lowered meanwhile")

    async def _see_it_silent(self, line: Line) -> None:
        """
        See that a new connection may be asked still, and has nothing to say.

        If it has, the event loop reads what that is.  It may be TLS's own: a server that sends its session tickets with its part
        of the handshake says nothing by that.  And whoever accepts and closes, as a proxy before a dead receiver does, has not
        spoken.
        """
        for _ in range(LOOKS_MOST):
            if line.generation != self._exchange.connections.generation:
                raise _NotAsked(OutcomeKind.OURS, RULES_CHANGED)
            if silent((line,))[0]:
                return
            # two turns: asyncio's own loop calls whom it has waited for before it reads
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if line.closing():
                break
        if line.spoke or not line.closing():
            raise _NotAsked(OutcomeKind.MALFORMED, SPOKE_FIRST)
        raise _NotAsked(OutcomeKind.CONNECT_FAILED, CLOSED_FIRST)

    async def _connect(self) -> Line:
        exchange, outcome, target = self._exchange, self.outcome, self.request.target
        begun = exchange.mono()
        left = min(self.request.connect_timeout_s, self.deadline - begun)
        outcome.dns_ms = None
        try:
            async with asyncio.timeout(left):
                resolution = await exchange.resolver.resolve(target.host)
                outcome.dns_ms = (exchange.mono() - begun) * 1000
                if resolution.ours:
                    raise _NotAsked(OutcomeKind.OURS, resolution.problem)
                if resolution.blocked:
                    raise _NotAsked(BLOCKED, resolution.problem)
                if resolution.problem:
                    raise _NotAsked(OutcomeKind.DNS_FAILED, resolution.problem)
                line = await exchange.connections.open(target)
        except TimeoutError:
            if outcome.dns_ms is None:
                if await exchange.resolver.silent():
                    raise _NotAsked(OutcomeKind.OURS, NO_DNS) from None
                raise _NotAsked(OutcomeKind.DNS_FAILED, "the name's servers did not answer in time") from None
            raise _NotAsked(OutcomeKind.CONNECT_TIMEOUT, "the connection timed out") from None
        if isinstance(line, ConnectFailure):
            raise _NotAsked(line.kind, line.reason)
        outcome.tls_ms = line.tls_ms
        outcome.connect_ms = (exchange.mono() - begun) * 1000 - outcome.dns_ms - (line.tls_ms or 0.0)
        return line

    def ask(self, line: Line, *, reused: bool) -> None:
        """Write the request."""
        self.outcome.reused = reused
        self._line = line
        line.ask(self)
        self._exchange.watch()

    def _end(self) -> None:
        outcome = self.outcome
        outcome.total_ms = (self._exchange.mono() - self._begun) * 1000
        if outcome.kind is BLOCKED:
            # how long it took says whether a name is known inside, and what is in the cache
            outcome.dns_ms = outcome.connect_ms = outcome.tls_ms = None
            outcome.total_ms = 0.0
        self._done(outcome)


class HttpExchange:
    """Makes requests."""

    def __init__(
        self,
        resolver: Resolver | ByProxy,
        rules: Callable[[], AddressRules],
        options: ExchangeOptions,
        *,
        wall: Callable[[], float],
        mono: Callable[[], float],
        context: ssl.SSLContext | None = None,
        proxy: Proxy | None = None,
        connections_most: int | None = None,
    ) -> None:
        self.resolver = resolver
        self.options = options
        self.wall = wall
        self.mono = mono
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching = False
        self._aboard: list[tuple[Attempt, Line]] = []
        """Attempts whose request is still to be written, on a connection that is still to be looked at."""
        self.connections = Connections(
            resolver, rules, context or tls_context(""), mono, proxy, connections_most
        )

    def __repr__(self) -> str:
        return f"<HttpExchange {self.connections!r}>"

    def begin(self, request: Request, turn: Turn | None, done: Callable[[Outcome], None]) -> Attempt:
        """
        Begin an exchange; ``done`` is called once with its outcome, later, and within ``timeout_s`` of being asked.

        Nothing that the network does is raised.  ``turn`` is asked before each write to the request's host, where that has
        a rate.  On a connection that is open this costs no task, no future and no timer, but the request may wait for
        ``depart``, which has to be called before the event loop goes on.
        """
        attempt = Attempt(self, request, turn, done)
        line = self.connections.take(request.target) if turn is None else None
        if line is None:
            attempt.begin()
            return attempt
        self._aboard.append((attempt, line))
        if len(self._aboard) == ABOARD_MOST:
            self.depart()
        return attempt

    def depart(self) -> None:
        """Write what waits for it: on the connections that are silent; the others are replaced."""
        if not self._aboard:
            return
        aboard, self._aboard = self._aboard, []
        for (attempt, line), good in zip(aboard, silent([line for _, line in aboard]), strict=True):
            if not good:
                line.drop()
                attempt.begin()
                continue
            try:
                attempt.ask(line, reused=True)
            except Exception as fault:  # noqa: BLE001 - nor the others of its group
                line.drop()
                self._loop.call_soon(attempt.fault, fault)  # later, as all outcomes are told

    async def send(self, request: Request, turn: Turn | None = None) -> Outcome:
        """Make one exchange, and wait for its outcome."""
        ended: asyncio.Future[Outcome] = self._loop.create_future()
        attempt = self.begin(request, turn, ended.set_result)
        self.depart()
        try:
            return await ended
        except asyncio.CancelledError:
            attempt.cancel()
            raise

    async def close(self) -> None:
        """Drop all connections."""
        for task in self._tasks:
            task.cancel()
        await self.connections.close()
        await self.resolver.close()

    # For its attempts.

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what has to wait."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def watch(self) -> None:
        """See to it that somebody looks at the time."""
        if not self._watching:
            self._watching = True
            self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self.connections.expire(self.mono())
        self._watching = bool(self.connections.talking)
        if self._watching:
            self._loop.call_later(TICK_S, self._tick)

    # Redirects.

    def hop(self, request: Request, outcome: Outcome, location: str | None) -> Request | None:
        """The request that a redirect asks for; None if it is not followed, which the outcome's reason tells."""
        if outcome.status not in REPEATING:
            outcome.reason = "a redirect that would drop the POST is not followed"
            return None
        if location is None:
            outcome.reason = "a redirect without a Location"
            return None
        if outcome.redirects >= REDIRECTS_MOST:
            outcome.reason = "too many redirects"
            return None
        try:
            absolute = urljoin(request.target.url, location)
        except ValueError:
            outcome.reason = "a redirect to what is no URL"
            return None
        target = parse_url(absolute, https_only=self.options.https_only, names=self.options.names)
        if isinstance(target, UrlProblem):
            outcome.reason = "a redirect to a URL that is not called"  # why is told where it is registered
            return None
        if request.target.scheme == "https" and target.scheme == "http":
            outcome.reason = "a redirect from https to http is not followed"
            return None
        if target.lane == request.target.lane and target.scheme == request.target.scheme:
            return replace(request, target=target, head=_with_path(request.head, target))
        if self.options.redirects == "same-host":
            outcome.reason = "a redirect to another host is not followed"
            return None
        named = CONTENT_TYPE.search(request.head)
        content_type = named[1].decode("ascii") if named else "application/json"
        head = prepare_head(target, {}, user_agent=self.options.user_agent, content_type=content_type)
        return replace(
            request, target=target, head=head, lines=b"content-length: %d\r\n\r\n" % len(request.body)
        )


def _with_path(head: bytes, target: Target) -> bytes:
    _, _, rest = head.partition(b"\r\n")
    return f"POST {target.path_and_query} HTTP/1.1\r\n".encode("ascii") + rest


def tls_context(ca_file: str) -> ssl.SSLContext:
    """The one context of a process: verified always, TLS 1.2 at least.  A context costs 15 ms and 0.7 MB."""
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def check_parts() -> list[str]:
    """What of the installed libraries hookd cannot work with; empty if all is well."""
    from importlib.metadata import version  # noqa: PLC0415 - needed once, at start

    problems = []
    for package, floor in FLOORS.items():
        installed = version(package)
        if tuple(int(n) for n in installed.split(".")[:3] if n.isdigit()) < floor:
            problems.append(
                f"{package} {installed} is too old: {'.'.join(map(str, floor))} or newer is needed"
            )
    if not version("aiohttp").startswith("3.14."):
        problems.append(f"aiohttp {version('aiohttp')} has not been checked with this hookd: 3.14 is needed")
    if http_parser.HttpResponseParser is http_parser.HttpResponseParserPy:
        problems.append("aiohttp was installed without its C parser: install it from a wheel")
    if list(inspect.signature(aiohttp.TCPConnector.connect).parameters) != [
        "self",
        "req",
        "traces",
        "timeout",
    ]:
        problems.append("aiohttp.TCPConnector.connect has changed: aiohttp 3.14 is needed")
    if not problems and not reads_answers():
        problems.append("aiohttp's HttpResponseParser has changed: aiohttp 3.14 is needed")
    return problems
