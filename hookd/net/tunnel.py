"""
The way through an egress proxy: HTTP CONNECT, plain or over TLS, or SOCKS5 (RFC 9110, 9.3.6; RFC 1928, 1929).

The proxy is the only thing that is connected to, and its own address is not judged: it is the operator's, and usually
private.  What it is asked for is an address that the guard has vetted, so that it has nothing to resolve; or, where it
vets addresses itself (``proxy_resolves``), the name.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import re
from typing import TYPE_CHECKING

from hookd.core.model import ConnectFailure, OutcomeKind
from hookd.core.proxies import UNREACHABLE, connect_refusal, socks_refusal
from hookd.net.line import SPOKE_FIRST
from hookd.net.resolver import Resolution

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from hookd.core.proxies import Proxy
    from hookd.core.urls import Target

HEAD_MOST = 16 * 1024
"""Of the answer to CONNECT."""

REACH_S = 2.0
"""The proxy is near: if it cannot be reached within this it is down, and that is no fault of the endpoint's."""

STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")


class NoTunnel(Exception):
    """There is no connection through the proxy."""

    def __init__(self, failure: ConnectFailure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class ByProxy:
    """In place of a resolver where the proxy resolves, and vets what it finds."""

    async def resolve(self, host: str) -> Resolution:
        """The name itself."""
        return Resolution((host,))

    async def silent(self) -> bool:
        """Nobody is asked."""
        return False

    async def close(self) -> None:
        """Nothing is open."""


class _Handshake(asyncio.Protocol):
    """Collects what the proxy says."""

    def __init__(self) -> None:
        self.said = bytearray()
        self._came = asyncio.Event()
        self._ended = False

    def data_received(self, data: bytes) -> None:
        self.said += data
        self._came.set()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._ended = True
        self._came.set()

    async def take(self, length: Callable[[bytes], int]) -> bytes:
        """Wait until ``length`` says how many bytes belong together, and take them; 0: not yet."""
        while True:
            count = length(bytes(self.said))
            if count:
                taken = bytes(self.said[:count])
                del self.said[:count]
                return taken
            if self._ended or len(self.said) > HEAD_MOST:
                raise NoTunnel(ConnectFailure(OutcomeKind.OURS, "the egress proxy closed the connection"))
            self._came.clear()
            await self._came.wait()

    async def exactly(self, count: int) -> bytes:
        return await self.take(lambda said: count if len(said) >= count else 0)


async def open_tunnel(
    proxy: Proxy, target: Target, address: str, context: ssl.SSLContext
) -> tuple[asyncio.Transport, asyncio.Protocol]:
    """
    Connect to the proxy and have it connect to ``address``; TLS with the target, which is the caller's, has not begun.

    The caller sets the deadline.  ``context`` is for a proxy that is spoken to over TLS.

    Raises:
        NoTunnel: and why.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(REACH_S):
            transport, handshake = await loop.create_connection(
                _Handshake, proxy.host, proxy.port, ssl=context if proxy.scheme == "https" else None
            )
    except (OSError, TimeoutError):
        raise NoTunnel(ConnectFailure(OutcomeKind.OURS, UNREACHABLE)) from None
    try:
        await _through(transport, handshake, proxy, target, address)
    except BaseException:
        transport.abort()
        raise
    return transport, handshake


async def _through(
    transport: asyncio.Transport,
    handshake: _Handshake,
    proxy: Proxy,
    target: Target,
    address: str,
) -> None:
    if proxy.scheme == "socks5":
        await _by_socks(transport, handshake, proxy, target, address)
    else:
        await _by_connect(transport, handshake, proxy, target, address)
    if handshake.said:
        # before TLS this would be somebody in between, without TLS an answer to nothing
        raise NoTunnel(ConnectFailure(OutcomeKind.MALFORMED, SPOKE_FIRST))


async def _by_connect(
    transport: asyncio.Transport, handshake: _Handshake, proxy: Proxy, target: Target, address: str
) -> None:
    host = f"[{address}]" if ":" in address else address
    authority = f"{host}:{target.port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if proxy.user:
        both = f"{proxy.user}:{proxy.password.reveal()}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(both.encode()).decode()}")
    transport.write("".join(line + "\r\n" for line in [*lines, ""]).encode("ascii"))
    head = await handshake.take(lambda said: said.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in said else 0)
    status = STATUS.match(head)
    if status is None:
        raise NoTunnel(ConnectFailure(OutcomeKind.OURS, "the egress proxy does not speak HTTP"))
    refusal = connect_refusal(int(status[1]), head)
    if refusal is not None:
        raise NoTunnel(refusal)


async def _by_socks(
    transport: asyncio.Transport, handshake: _Handshake, proxy: Proxy, target: Target, address: str
) -> None:
    method = 2 if proxy.user else 0
    transport.write(bytes([5, 1, method]))
    version, chosen = await handshake.exactly(2)
    if version != 5:
        raise NoTunnel(ConnectFailure(OutcomeKind.OURS, "the egress proxy does not speak SOCKS5"))
    if chosen != method:
        raise NoTunnel(ConnectFailure(OutcomeKind.OURS, "the egress proxy asks for another authentication"))
    if method == 2:
        user, password = proxy.user.encode(), proxy.password.reveal().encode()
        transport.write(bytes([1, len(user)]) + user + bytes([len(password)]) + password)
        if (await handshake.exactly(2))[1] != 0:
            raise NoTunnel(
                ConnectFailure(OutcomeKind.OURS, "the egress proxy does not accept the user name or password")
            )
    transport.write(bytes([5, 1, 0]) + _socks_address(address) + target.port.to_bytes(2, "big"))
    _, reply, _, kind = await handshake.exactly(4)
    refusal = socks_refusal(reply)
    if refusal is not None:
        raise NoTunnel(refusal)
    rest = {1: 4, 4: 16}.get(kind)
    if rest is None:
        rest = (await handshake.exactly(1))[0]
    await handshake.exactly(rest + 2)


def _socks_address(address: str) -> bytes:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        name = address.encode("ascii")
        return bytes([3, len(name)]) + name
    return bytes([1 if ip.version == 4 else 4]) + ip.packed
