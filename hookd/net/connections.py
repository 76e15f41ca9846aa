"""
Connections: opened through aiohttp's connector, kept in a pool of our own.

aiohttp's connector gives what is hard to write well: TCP set-up and happy eyeballs.  Its pool is not used, for two
reasons.  It reuses the connection that has been idle longest, which is the one most likely to be closed by the peer; and
it hands out a connection on which the peer has already pushed bytes.  So: last in, first out, and ``line.silent`` is asked
before each use.

The guard is here too: ``socket_factory`` sees the address that is about to be dialled, whatever a resolver said or was
not asked, and the peer of the connected socket is looked at once more before a byte is written.  Therefore TLS begins here
and not in the connector, which would have said its ClientHello, with the host's name in it, before anybody could look.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_reqrep import ConnectionKey
from yarl import URL

from hookd.core.addresses import TENANT_REASON, AddressRules, classify
from hookd.core.model import ConnectFailure, OutcomeKind
from hookd.net.line import SPOKE_FIRST, Line, Repeated, silent
from hookd.net.tunnel import ByProxy, NoTunnel, open_tunnel

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.client_proto import ResponseHandler

    from hookd.core.proxies import Proxy
    from hookd.core.urls import Target
    from hookd.net.resolver import Resolver

IDLE_MOST_S = 15.0
"""Below the idle time-out of common servers (nginx 75 s, many balancers 60 s, Node.js and uvicorn 5 s are found by
the readable socket)."""

SWEEP_S = 5.0

NO_DESCRIPTORS = "this machine allows hookd no more file descriptors (ulimit -n)"
NO_MEMORY = "this machine has no memory left for connections"
NO_ROUTE = "this machine has no route to the network"

OUR_FAULTS = {
    errno.EMFILE: NO_DESCRIPTORS,
    errno.ENFILE: NO_DESCRIPTORS,
    errno.ENOBUFS: NO_MEMORY,
    errno.ENOMEM: NO_MEMORY,
    errno.EADDRNOTAVAIL: "this machine has no local ports left for this host",
    errno.ENETUNREACH: NO_ROUTE,
    errno.ENETDOWN: NO_ROUTE,
}
"""What no receiver can be blamed for."""

ERRNO = re.compile(r"\[Errno (\d+)\]")
"""aiohappyeyeballs puts the errors of several addresses into one text."""

ADDRESSES_TRIED = 2
"""Of those that a name has, through a proxy."""

ADDRESSES_DIALLED = 3
"""
Of each family, without one: happy eyeballs (RFC 8305) keeps all that do not answer open at once, and counts as one connection.

A name may have 16 of each; 500 attempts at such names took all descriptors that there are.
"""

NEXT_ADDRESS = frozenset(
    {
        OutcomeKind.CONNECT_FAILED,
        OutcomeKind.CONNECT_REFUSED,
        OutcomeKind.CONNECT_TIMEOUT,
        OutcomeKind.BLOCKED,
    }
)
"""After which the next address of a name is tried."""

NO_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)


NO_HANDSHAKE = "the TLS handshake failed"

RULES_CHANGED = "what may be called was changed meanwhile"

CLOSED_FIRST = "the connection was closed before it was asked"


class AddressBlocked(OSError):
    """The guard refused an address that was about to be dialled."""


class _Dial:
    """What the connector reads of a request when it opens a connection."""

    __slots__ = (
        "connection_key",
        "headers",
        "host",
        "port",
        "proxy",
        "proxy_auth",
        "proxy_headers",
        "request_info",
        "server_hostname",
        "ssl",
        "url",
    )

    def __init__(self, target: Target) -> None:
        self.url = URL(target.url)
        self.host = target.host
        self.port = target.port
        self.ssl = True
        self.proxy = None
        self.proxy_auth = None
        self.proxy_headers = None
        self.headers: dict[str, str] = {}
        self.server_hostname = None
        self.request_info = None
        self.connection_key = ConnectionKey(
            target.host,
            target.port,
            is_ssl=False,
            ssl=True,
            proxy=None,
            proxy_auth=None,
            proxy_headers_hash=None,
        )

    @staticmethod
    def is_ssl() -> bool:
        """Not yet: TLS begins when the peer was looked at."""
        return False


class _Vetted(AbstractResolver):
    """Hands the connector the addresses that our resolver has vetted."""

    def __init__(self, resolver: Resolver | ByProxy) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        resolution = await self._resolver.resolve(host)
        if resolution.ours:
            raise OSError(errno.ENETDOWN, resolution.problem)
        if not resolution.addresses:
            raise (AddressBlocked if resolution.blocked else OSError)(errno.EACCES, resolution.problem)
        by_family: dict[socket.AddressFamily, list[str]] = {socket.AF_INET: [], socket.AF_INET6: []}
        for address in resolution.addresses:
            by_family[socket.AF_INET6 if ":" in address else socket.AF_INET].append(address)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=kind,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, addresses in by_family.items()
            if family in (socket.AF_UNSPEC, kind)
            for address in addresses[:ADDRESSES_DIALLED]
        ]

    async def close(self) -> None:
        """The resolver belongs to the exchange."""


class Connections:
    """Opens connections and keeps idle ones."""

    def __init__(
        self,
        resolver: Resolver | ByProxy,
        rules: Callable[[], AddressRules],
        context: ssl.SSLContext,
        mono: Callable[[], float],
        proxy: Proxy | None = None,
        most: int | None = None,
    ) -> None:
        """``most`` connections are held at once, idle ones too: what descriptors allow.  None: that is no limit."""
        self._resolver = resolver
        self._proxy = proxy
        self._rules = rules
        self._context = context
        self._mono = mono
        self._connector = aiohttp.TCPConnector(
            limit=0,  # lanes are the only limit: waiting inside the connector costs O(hosts) on every release
            use_dns_cache=False,
            resolver=_Vetted(resolver),
            socket_factory=self._guarded_socket,
            force_close=True,  # its pool stays empty
        )
        self._idle: dict[str, deque[Line]] = {}
        """By origin: connections are shared by everybody on the same scheme, host and port."""
        self.talking: set[Line] = set()
        """Lines on which an answer is awaited."""
        self._repeated: WeakValueDictionary[str, Repeated] = WeakValueDictionary()
        """By origin, as long as there is a line to it."""
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        self.most = most
        self.generation = 0
        self.opened = 0
        self._held = 0
        """Those that are open or being opened."""

    def __repr__(self) -> str:
        return f"<Connections idle={sum(map(len, self._idle.values()))} opened={self.opened}>"

    def has_idle(self, target: Target) -> bool:
        """Whether there is an idle connection to the target, good or not."""
        return bool(self._idle.get(target.origin))

    def take(self, target: Target) -> Line | None:
        """An idle connection to the target, the one that was used last; whether it is ``silent`` is still to be asked."""
        lines = self._idle.get(target.origin)
        if not lines:
            return None
        line = lines.pop()
        if line.idle_since > self._mono() - IDLE_MOST_S:
            return line
        # the others have been idle for longer still
        line.drop()
        while lines:
            lines.pop().drop()
        return None

    def take_silent(self, target: Target) -> Line | None:
        """The same, to be used at once: those that are closed, or have something to say, are dropped."""
        while (line := self.take(target)) is not None:
            if silent((line,))[0]:
                return line
            line.drop()
        return None

    def keep(self, line: Line) -> None:
        """Keep a connection whose answer was read to its end."""
        if line.generation != self.generation:
            line.drop()
            return
        line.idle_since = self._mono()
        lines = self._idle.get(line.origin)
        if lines is None:
            lines = self._idle[line.origin] = deque()
        lines.append(line)

    async def open(self, target: Target) -> Line | ConnectFailure:
        """A new connection to a vetted address of the target.  The caller sets the deadline."""
        if self.most is not None and self._held >= self.most and not self._drop_one():
            return ConnectFailure(OutcomeKind.OURS, NO_DESCRIPTORS)
        self._held += 1
        generation = self.generation
        opened = None
        try:
            opened = await (
                self._open_by(self._proxy, target) if self._proxy is not None else self._open(target)
            )
        finally:
            if not isinstance(opened, Line):
                self._held -= 1
        if isinstance(opened, Line) and generation != self.generation:
            opened.drop()
            return ConnectFailure(OutcomeKind.OURS, RULES_CHANGED)
        return opened

    async def _open(self, target: Target) -> Line | ConnectFailure:
        dial: Any = _Dial(target)
        try:
            connection = await self._connector.connect(dial, [], NO_TIMEOUT)
        except Exception as error:
            failure = connect_failure(error)
            if failure is None:
                raise
            return failure
        handler = connection.protocol
        if handler is None or handler.transport is None:
            connection.close()
            return ConnectFailure(OutcomeKind.CONNECT_FAILED, CLOSED_FIRST)

        try:
            begun = await self._begun_well(handler, target)
            if isinstance(begun, ConnectFailure):
                return begun
            # The line takes it over, and what aiohttp had around it can go.
            transport, handler.transport = handler.transport, None
        finally:
            handler.abort()  # which closes what it still has
            connection.close()
        return self._line(transport, target, begun)

    async def _begun_well(self, handler: ResponseHandler, target: Target) -> ConnectFailure | float | None:
        """
        Look at the peer of a new connection, and speak TLS with it where that is wanted.

        Returns how many milliseconds TLS took; None without it.
        """
        assert handler.transport is not None
        peer = handler.transport.get_extra_info("peername")
        if peer is None:
            # it was reset already: whoever stands before a dead receiver accepts, and closes
            return ConnectFailure(OutcomeKind.CONNECT_FAILED, CLOSED_FIRST)
        if not classify(peer[0], self._rules()).allowed:
            return ConnectFailure(OutcomeKind.BLOCKED, TENANT_REASON)
        try:
            handler.transport, took = await self._secured(handler.transport, handler, target)
        except (OSError, ValueError) as error:
            return connect_failure(error) or ConnectFailure(OutcomeKind.TLS_FAILED, NO_HANDSHAKE)
        if handler.transport is None:
            return ConnectFailure(OutcomeKind.CONNECT_FAILED, CLOSED_FIRST)
        if handler.should_close:
            # what it said before the line took over is in aiohttp's hands
            return ConnectFailure(OutcomeKind.MALFORMED, SPOKE_FIRST)
        return took

    async def _secured(
        self, transport: asyncio.Transport, protocol: asyncio.BaseProtocol, target: Target
    ) -> tuple[asyncio.Transport | None, float | None]:
        """
        Speak TLS where the target wants it; also returns how many milliseconds that took, None without it.

        Raises:
            OSError, ValueError: it failed.
        """
        if target.scheme != "https":
            return transport, None
        begun = self._mono()
        loop = asyncio.get_running_loop()
        secured = await loop.start_tls(transport, protocol, self._context, server_hostname=target.host)
        return secured, (self._mono() - begun) * 1000

    async def _open_by(self, proxy: Proxy, target: Target) -> Line | ConnectFailure:
        resolution = await self._resolver.resolve(target.host)
        kind = OutcomeKind.OURS if resolution.ours else OutcomeKind.DNS_FAILED
        failure = ConnectFailure(kind, resolution.problem)
        for address in resolution.addresses[:ADDRESSES_TRIED]:
            # once more, as a socket's address is: unless it is a name, which the proxy judges
            if not isinstance(self._resolver, ByProxy) and not classify(address, self._rules()).allowed:
                return ConnectFailure(OutcomeKind.BLOCKED, TENANT_REASON)
            try:
                transport, tls_ms = await self._through(proxy, target, address)
            except NoTunnel as error:
                failure = error.failure
            except (OSError, ValueError) as error:
                failure = connect_failure(error) or failure
                if failure.kind is not OutcomeKind.TLS_FAILED:
                    # after the tunnel stood, all that is between the target and us is TLS
                    failure = ConnectFailure(OutcomeKind.TLS_FAILED, NO_HANDSHAKE)
            else:
                return self._line(transport, target, tls_ms)
            if failure.kind not in NEXT_ADDRESS:
                break
        return failure

    async def _through(
        self, proxy: Proxy, target: Target, address: str
    ) -> tuple[asyncio.Transport, float | None]:
        plain, handshake = await open_tunnel(proxy, target, address, self._context)
        try:
            transport, tls_ms = await self._secured(plain, handshake, target)
        except BaseException:
            plain.abort()
            raise
        if transport is None:
            plain.abort()
            raise NoTunnel(ConnectFailure(OutcomeKind.TLS_FAILED, NO_HANDSHAKE))
        return transport, tls_ms

    def _line(self, transport: asyncio.Transport, target: Target, tls_ms: float | None) -> Line:
        self.opened += 1
        repeated = self._repeated.get(target.origin)
        if repeated is None:
            repeated = self._repeated[target.origin] = Repeated()
        return Line(transport, target.origin, self, repeated, self._mono, tls_ms)

    def ended(self) -> None:
        """One of its lines has ended."""
        self._held -= 1

    def _drop_one(self) -> bool:
        """Drop a connection that is idle; False if none is.  One that its peer has closed makes no room: it is counted no more."""
        while self._idle:
            origin, lines = next(iter(self._idle.items()))
            while lines:
                line = lines.popleft()
                held = self._held
                line.drop()
                if self._held < held:
                    return True
            del self._idle[origin]
        return False

    def rules_changed(self) -> None:
        """Drop what is idle now, and the others when they have their answer."""
        self.generation += 1
        self.drop_idle()

    def drop_idle(self) -> None:
        """Drop what is idle."""
        for lines in self._idle.values():
            for line in lines:
                line.drop()
        self._idle.clear()

    def expire(self, now: float) -> None:
        """End what is under way for too long."""
        for line in list(self.talking):
            line.expire(now)

    async def close(self) -> None:
        """Drop everything."""
        self._sweeper.cancel()
        self.drop_idle()
        for line in list(self.talking):
            line.drop()
        await self._connector.close()

    def _guarded_socket(self, addr_info: tuple[Any, ...]) -> socket.socket:
        family, kind, proto, _, address = addr_info
        if not classify(address[0], self._rules()).allowed:
            raise AddressBlocked(errno.EACCES, TENANT_REASON)
        return socket.socket(family, kind, proto)

    def _sweep(self) -> None:
        """Drop what has been idle for too long, oldest first; hosts that are never called again must not keep theirs."""
        oldest = self._mono() - IDLE_MOST_S
        for key in list(self._idle):
            lines = self._idle[key]
            while lines and lines[0].idle_since < oldest:
                lines.popleft().drop()
            if not lines:
                del self._idle[key]
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)


def connect_failure(error: Exception) -> ConnectFailure | None:
    """What an error of the connector or the system means; None: it is a bug."""
    match error:
        case aiohttp.ClientConnectorDNSError() if isinstance(error.os_error, AddressBlocked):
            return ConnectFailure(OutcomeKind.BLOCKED, str(error.os_error.strerror))
        case aiohttp.ClientConnectorDNSError() if error.os_error.errno == errno.ENETDOWN:
            return ConnectFailure(OutcomeKind.OURS, str(error.os_error.strerror))
        case aiohttp.ClientConnectorDNSError():
            reason = str(error.os_error.strerror or "the name could not be resolved")
            return ConnectFailure(OutcomeKind.DNS_FAILED, reason)
        case ssl.SSLCertVerificationError():
            return ConnectFailure(OutcomeKind.TLS_FAILED, certificate_reason(error))
        case ssl.SSLError():
            return ConnectFailure(OutcomeKind.TLS_FAILED, NO_HANDSHAKE)
        case aiohttp.ClientConnectorError():
            return _system_failure(error.os_error)
        case OSError():
            return _system_failure(error)
        case aiohttp.ClientError() | ValueError():
            return ConnectFailure(OutcomeKind.CONNECT_FAILED, "the connection could not be opened")
    return None


def _system_failure(error: OSError) -> ConnectFailure:
    if isinstance(error, AddressBlocked) or TENANT_REASON in str(error):
        return ConnectFailure(OutcomeKind.BLOCKED, TENANT_REASON)
    # of several addresses those that failed by themselves are to blame; without any it is this machine
    codes = {error.errno} if error.errno else {int(n) for n in ERRNO.findall(str(error))}
    theirs = codes - OUR_FAULTS.keys()
    if codes and not theirs:
        return ConnectFailure(OutcomeKind.OURS, OUR_FAULTS[min(codes)])
    if errno.ECONNREFUSED in theirs:
        return ConnectFailure(OutcomeKind.CONNECT_REFUSED, "the connection was refused")
    if errno.ETIMEDOUT in theirs or isinstance(error, TimeoutError):
        return ConnectFailure(OutcomeKind.CONNECT_TIMEOUT, "the connection timed out")
    return ConnectFailure(OutcomeKind.CONNECT_FAILED, "the connection could not be opened")


UNKNOWN_ISSUER = "the certificate is not accepted: nobody who is trusted here has issued it"

CERTIFICATE_REASONS = {
    9: "the certificate is not accepted: it is not valid yet",
    10: "the certificate is not accepted: it has expired",
    18: UNKNOWN_ISSUER,
    19: UNKNOWN_ISSUER,
    20: UNKNOWN_ISSUER,
    21: UNKNOWN_ISSUER,
    62: "the certificate is not accepted: it is for another name",
    64: "the certificate is not accepted: it is for another address",
}
"""By OpenSSL's ``X509_V_ERR_*``.  Its own sentences differ between versions, and are not a fixed few."""


def certificate_reason(error: ssl.SSLCertVerificationError) -> str:
    """Which check a certificate failed."""
    return CERTIFICATE_REASONS.get(error.verify_code, "the certificate is not accepted")
