"""
The exchange: one signed POST, one outcome.  Every request that hookd makes goes through here.

It takes aiohttp's connector and response parser, and none of the per-request objects of its ``ClientSession``: the head
was prepared by the dispatcher, head and body go out in one write, and one timer bounds the whole attempt, from looking
up the name to the last byte of the answer that is read.

What counts as an answer is a status line and headers.  A body that is cut, slow, endless or compressed changes
nothing: it is read up to a bound, never decompressed, and costs the connection if it does not end.

A reused connection that is closed before any byte of an answer is replaced once, on the same deadline: servers close
idle connections, and the request that crosses their FIN was, as a rule, never read.  The outcome says so (``resent``),
because the rule has exceptions.

Redirects, where they are on: 307 and 308 repeat the POST; 301, 302 and 303 would turn it into a GET and are failures.
Each hop passes the grammar and the guard, none goes from https to http, there are at most three, and neither
signatures nor the endpoint's own headers go to another host.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import ssl
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urljoin

import aiohttp
from aiohttp import http_parser
from aiohttp.client_exceptions import ClientOSError, ClientPayloadError, ServerDisconnectedError
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError

from hookd.core.model import Outcome, OutcomeKind
from hookd.core.request import Request, prepare_head
from hookd.core.urls import Target, UrlProblem, parse_url
from hookd.net.answer import excerpt, kept_headers
from hookd.net.connections import ConnectFailure, Connections, Line

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookd.core.addresses import AddressRules
    from hookd.net.resolver import Resolver

ONE_WRITE_MOST = 2048
"""Above this, head and body are written as two parts instead of being copied into one."""

INTERIM_MOST = 16
"""1xx answers before one that counts."""

REDIRECTS_MOST = 3

HEADER_LINE_MOST = 8190
HEADERS_MOST = 64

REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
REPEATING = frozenset({307, 308})

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


class _DeadlinePassed(Exception):
    """Set on a connection's protocol when the attempt's time is up."""


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """What all exchanges have in common."""

    max_response: int = 16 * 1024
    redirects: str = "never"
    https_only: bool = False
    user_agent: str = "hookd"


class _Unanswered(Exception):
    """The exchange ended without an answer."""

    def __init__(self, kind: OutcomeKind, reason: str, *, resend: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.resend = resend


class HttpExchange:
    """Makes requests."""

    def __init__(
        self,
        resolver: Resolver,
        rules: Callable[[], AddressRules],
        options: ExchangeOptions,
        *,
        wall: Callable[[], float],
        mono: Callable[[], float],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._resolver = resolver
        self.options = options
        self._wall = wall
        self._mono = mono
        self._loop = asyncio.get_running_loop()
        self.connections = Connections(resolver, rules, context or tls_context(""), mono)

    def __repr__(self) -> str:
        return f"<HttpExchange {self.connections!r}>"

    async def send(self, request: Request, turn: Turn | None = None) -> Outcome:
        """
        Make one exchange; it ends within ``timeout_s``, and nothing that the network does is raised.

        ``turn`` is asked before each write to the request's host, where that has a rate.
        """
        begun = self._mono()
        outcome = Outcome(OutcomeKind.ANSWERED, started_at=self._wall(), url=request.target.url)
        deadline = begun + request.timeout_s
        try:
            await self._send(request, outcome, deadline, turn)
            while outcome.status in REDIRECT_STATUSES and self.options.redirects != "never":
                hop = self._hop(request, outcome)
                if hop is None:
                    break
                if hop.target.lane != request.target.lane:
                    turn = None  # another host's rate is not asked
                request = hop
                outcome.redirects += 1
                outcome.url = hop.target.url
                await self._send(request, outcome, deadline, turn)
        except _Unanswered as end:
            outcome.kind, outcome.reason, outcome.status = end.kind, end.reason, 0
        outcome.total_ms = (self._mono() - begun) * 1000
        return outcome

    async def close(self) -> None:
        """Drop all connections."""
        await self.connections.close()
        await self._resolver.close()

    # One request and its answer.

    async def _send(self, request: Request, outcome: Outcome, deadline: float, turn: Turn | None) -> None:
        if turn is not None and self.connections.has_idle(request.target):
            # before the idle connection is looked at: that has to be just before it is used
            await self._wait(turn)
        line = self.connections.take(request.target)
        outcome.reused = line is not None
        if line is not None:
            try:
                await self._converse(line, request, outcome, deadline, turn)
            except _Unanswered as end:
                if not end.resend:
                    raise
                outcome.resent = True
            else:
                return
        line = await self._connect(request, outcome, deadline)
        if turn is not None:
            try:
                await self._wait(turn)
            except BaseException:
                line.drop()
                raise
        await self._converse(line, request, outcome, deadline, turn)

    @staticmethod
    async def _wait(turn: Turn) -> None:
        if not await turn.wait():
            raise _Unanswered(OutcomeKind.OURS, "the host's rate was lowered meanwhile")

    async def _connect(self, request: Request, outcome: Outcome, deadline: float) -> Line:
        begun = self._mono()
        left = min(request.connect_timeout_s, deadline - begun)
        try:
            async with asyncio.timeout(left):
                resolution = await self._resolver.resolve(request.target.host)
                outcome.dns_ms = (self._mono() - begun) * 1000
                if resolution.blocked:
                    raise _Unanswered(OutcomeKind.BLOCKED, resolution.problem)
                if resolution.problem:
                    raise _Unanswered(OutcomeKind.DNS_FAILED, resolution.problem)
                line = await self.connections.open(request.target)
        except TimeoutError:
            if outcome.dns_ms is None:
                raise _Unanswered(
                    OutcomeKind.DNS_FAILED, "the name's servers did not answer in time"
                ) from None
            raise _Unanswered(OutcomeKind.CONNECT_TIMEOUT, "the connection timed out") from None
        if isinstance(line, ConnectFailure):
            raise _Unanswered(line.kind, line.reason)
        outcome.connect_ms = (self._mono() - begun) * 1000 - outcome.dns_ms
        return line

    async def _converse(
        self, line: Line, request: Request, outcome: Outcome, deadline: float, turn: Turn | None
    ) -> None:
        """Write the request and read the answer; the connection is kept or dropped before this returns."""
        timer = self._loop.call_at(deadline, _expire, line.protocol)
        keep = False
        try:
            line.protocol.set_response_params(
                read_until_eof=True,
                auto_decompress=False,
                read_bufsize=2**14,
                max_line_size=HEADER_LINE_MOST,
                max_field_size=HEADER_LINE_MOST,
                max_headers=HEADERS_MOST,
            )
            self._write(line, request, outcome, turn)
            written = self._mono()
            payload = await self._read_head(line, outcome)
            outcome.first_byte_ms = (self._mono() - written) * 1000
            keep = await self._read_body(line, payload, outcome)
        finally:
            timer.cancel()
            if keep:
                self.connections.keep(line)
            else:
                line.drop()

    def _write(self, line: Line, request: Request, outcome: Outcome, turn: Turn | None) -> None:
        transport = line.transport
        if transport.is_closing():
            raise _Unanswered(OutcomeKind.CONNECT_FAILED, "the connection was closed", resend=outcome.reused)
        if turn is not None:
            turn.wrote()
        head = request.head + request.lines
        if len(request.body) <= ONE_WRITE_MOST:
            transport.write(head + request.body)
        else:
            transport.writelines((head, request.body))
        outcome.sent = True
        if not outcome.written_at:
            outcome.written_at = self._wall()

    async def _read_head(self, line: Line, outcome: Outcome) -> Any:
        for _ in range(INTERIM_MOST):
            try:
                message, payload = await line.protocol.read()
            except _DeadlinePassed:
                raise _Unanswered(OutcomeKind.TIMEOUT, "no answer in time") from None
            except ServerDisconnectedError as error:
                silent = not isinstance(error.message, aiohttp.http_parser.RawResponseMessage)
                raise _Unanswered(
                    OutcomeKind.CONNECTION_LOST,
                    "the connection was closed before an answer",
                    resend=outcome.reused and not outcome.resent and silent,
                ) from None
            except ClientOSError as error:
                raise _Unanswered(
                    OutcomeKind.CONNECTION_LOST,
                    "the connection was reset before an answer",
                    resend=outcome.reused
                    and not outcome.resent
                    and error.errno in (errno.ECONNRESET, errno.EPIPE),
                ) from None
            except (HttpProcessingError, ClientPayloadError, ValueError):
                raise _Unanswered(OutcomeKind.MALFORMED, "the answer is not HTTP") from None
            except (aiohttp.ClientError, OSError, EOFError):
                raise _Unanswered(
                    OutcomeKind.CONNECTION_LOST, "the connection was lost before an answer"
                ) from None
            if message.code >= 200:
                outcome.kind = OutcomeKind.ANSWERED
                outcome.status = message.code
                outcome.headers = kept_headers(message.raw_headers)
                outcome.retry_after = message.headers.get("Retry-After")
                return payload
            if message.code == 101:
                break
        raise _Unanswered(OutcomeKind.MALFORMED, "the answer is not one to a POST")

    async def _read_body(self, line: Line, payload: Any, outcome: Outcome) -> bool:
        """Read a bounded part of the body; whether it ended, so that the connection may live."""
        most = self.options.max_response
        if payload.is_eof() and payload.exception() is None:
            data = payload.read_nowait(-1)
            outcome.body, outcome.body_truncated = excerpt(data, most), len(data) > most
            return self._clean(line)
        parts = []
        size = 0
        whole = False
        try:
            while size <= most:
                part = await payload.readany()
                if not part:
                    whole = payload.is_eof()
                    break
                parts.append(part)
                size += len(part)
        except (_DeadlinePassed, aiohttp.ClientError, HttpProcessingError, OSError, EOFError, ValueError):
            pass
        outcome.body, outcome.body_truncated = excerpt(b"".join(parts), most), not whole or size > most
        return whole and self._clean(line)

    @staticmethod
    def _clean(line: Line) -> bool:
        # an early answer may come before the request was fully written
        return line.transport.get_write_buffer_size() == 0

    # Redirects.

    def _hop(self, request: Request, outcome: Outcome) -> Request | None:
        """The request that a redirect asks for; None if it is not followed, which the outcome's reason tells."""
        location = next((v for n, v in outcome.headers if n.lower() == "location"), None)
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
        target = parse_url(absolute, https_only=self.options.https_only)
        if isinstance(target, UrlProblem):
            outcome.reason = f"redirected to a URL that is not called: {target.reason}"
            return None
        if request.target.scheme == "https" and target.scheme == "http":
            outcome.reason = "a redirect from https to http is not followed"
            return None
        if target.lane == request.target.lane and target.scheme == request.target.scheme:
            return replace(request, target=target, head=_with_path(request.head, target))
        if self.options.redirects == "same-host":
            outcome.reason = "a redirect to another host is not followed"
            return None
        head = prepare_head(target, {}, user_agent=self.options.user_agent, content_type="application/json")
        return replace(
            request, target=target, head=head, lines=b"content-length: %d\r\n\r\n" % len(request.body)
        )


def _with_path(head: bytes, target: Target) -> bytes:
    _, _, rest = head.partition(b"\r\n")
    return f"POST {target.path_and_query} HTTP/1.1\r\n".encode("ascii") + rest


def _expire(protocol: ResponseHandler) -> None:
    """The attempt's time is up: whoever reads from the connection is told."""
    passed = _DeadlinePassed()
    payload = protocol._payload  # noqa: SLF001 - held to by check_parts and the contract tests
    protocol.set_exception(passed)
    if payload is not None and not payload.is_eof():
        payload.set_exception(passed)


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
    wanted = {
        "read_until_eof",
        "auto_decompress",
        "read_bufsize",
        "max_line_size",
        "max_field_size",
        "max_headers",
    }
    if not wanted <= set(inspect.signature(ResponseHandler.set_response_params).parameters):
        problems.append("aiohttp's ResponseHandler.set_response_params has changed: aiohttp 3.14 is needed")
    return problems
