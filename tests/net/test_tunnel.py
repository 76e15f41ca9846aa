"""Egress proxies on real sockets: CONNECT, CONNECT over TLS, SOCKS5, and everything that a proxy can get wrong."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from typing import TYPE_CHECKING, Any, Self

import pytest
import trustme
import uvloop

from hookd.core.addresses import AddressRules
from hookd.core.model import Outcome, OutcomeKind
from hookd.core.proxies import Proxy, parse_proxy
from hookd.net.exchange import ExchangeOptions, HttpExchange
from hookd.net.resolver import Resolver
from hookd.net.tunnel import ByProxy
from tests.net.test_exchange import LOOPBACK, client_context, request, server_context
from tests.receiver import Receiver

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Coroutine

BASIC = "Basic dXNlcjpwOnc="


class ProxyServer:
    """A forwarding proxy that keeps a list of what it was asked for; ``say`` answers instead of connecting."""

    def __init__(
        self, kind: str = "http", *, say: bytes | None = None, context: ssl.SSLContext | None = None
    ) -> None:
        self.kind, self.say, self._context = kind, say, context
        self.asked: list[str] = []
        self.heads: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def url(self, user: str = "") -> str:
        scheme = "socks5" if self.kind == "socks5" else "https" if self._context else "http"
        host = "localhost" if self._context else "127.0.0.1"
        return f"{scheme}://{user}{host}:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await (self._socks if self.kind == "socks5" else self._connect)(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        self.asked.append(head.split(" ")[1])
        if self.say is not None:
            writer.write(self.say)
            await writer.drain()
            await reader.read()
            return
        host, _, port = self.asked[-1].rpartition(":")
        await self._pipe(
            host.strip("[]"), int(port), b"HTTP/1.1 200 Connection established\r\n\r\n", reader, writer
        )

    async def _socks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, count = await reader.readexactly(2)
        methods = await reader.readexactly(count)
        writer.write(bytes([5, methods[0]]))
        if methods[0] == 2:
            _, length = await reader.readexactly(2)
            user = await reader.readexactly(length)
            password = await reader.readexactly((await reader.readexactly(1))[0])
            self.heads.append(f"{user.decode()}:{password.decode()}")
            writer.write(bytes([1, 0 if user == b"user" else 1]))
        _, _, _, kind = await reader.readexactly(4)
        if kind == 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        else:
            host = str(ipaddress.ip_address(await reader.readexactly(4 if kind == 1 else 16)))
        port = int.from_bytes(await reader.readexactly(2), "big")
        self.asked.append(f"{host}:{port}")
        if self.say is not None:
            writer.write(self.say)
            await writer.drain()
            await reader.read()
            return
        await self._pipe(host, port, bytes([5, 0, 0, 1, 0, 0, 0, 0, 0, 0]), reader, writer)

    async def _pipe(
        self, host: str, port: int, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        far_reader, far_writer = await asyncio.open_connection(
            "127.0.0.1" if host == "localhost" else host, port
        )
        writer.write(first)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()

        try:
            async with asyncio.TaskGroup() as group:
                copies = [
                    group.create_task(copy(reader, far_writer)),
                    group.create_task(copy(far_reader, writer)),
                ]
                await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
                for task in copies:
                    task.cancel()
        finally:
            far_writer.transport.abort()
            with contextlib.suppress(OSError):
                await far_writer.wait_closed()


@contextlib.asynccontextmanager
async def through(
    proxy: Proxy,
    rules: AddressRules = LOOPBACK,
    *,
    resolves: bool = False,
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[HttpExchange]:
    made = HttpExchange(
        ByProxy() if resolves else Resolver(lambda: rules, mono=time.monotonic),
        lambda: rules,
        ExchangeOptions(),
        wall=time.time,
        mono=time.monotonic,
        context=context,
        proxy=proxy,
    )
    try:
        yield made
    finally:
        await made.close()


def run(
    work: Coroutine[Any, Any, None], loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("to", ["http", "https"])
@pytest.mark.parametrize("by", ["http", "https", "socks5"])
def test_deliveries_go_through_the_proxy(
    by: str, to: str, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    authority = trustme.CA()

    async def go() -> None:
        context = server_context(authority, "localhost")
        async with (
            Receiver(context=context if to == "https" else None) as receiver,
            ProxyServer(by, context=context if by == "https" else None) as server,
            through(parse_proxy(server.url("user:p%3Aw@")), context=client_context(authority)) as http,
        ):
            url = f"{to}://localhost:{receiver.port}/hook"
            outcomes = [await http.send(request(url, b"x" * 100_000)) for _ in range(3)]
            assert [(o.status, o.reused) for o in outcomes] == [(200, False), (200, True), (200, True)]
            assert [o.tls_ms is not None for o in outcomes] == [to == "https", False, False]
            assert [len(c.body) for c in receiver.calls] == [100_000] * 3
            assert server.asked == [f"127.0.0.1:{receiver.port}"], "a vetted address, not a name"
            assert BASIC in server.heads[0] or server.heads[0] == "user:p:w"
            assert "proxy-authorization" not in receiver.calls[0].headers

    run(go(), loop)


@pytest.mark.parametrize("by", ["http", "socks5"])
def test_a_proxy_that_resolves_gets_the_name(by: str) -> None:
    async def go() -> None:
        async with (
            Receiver() as receiver,
            ProxyServer(by) as server,
            through(parse_proxy(server.url()), AddressRules(), resolves=True) as http,
        ):
            outcome = await http.send(request(f"http://localhost:{receiver.port}/"))
            assert outcome.status == 200
            assert server.asked == [f"localhost:{receiver.port}"]

    run(go())


def test_the_guard_judges_the_target_and_not_the_proxy() -> None:
    async def go() -> None:
        async with ProxyServer() as server, through(parse_proxy(server.url()), AddressRules()) as http:
            for host in ("127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254"):
                outcome = await http.send(request(f"http://{host}:8080/"))
                assert outcome.kind is OutcomeKind.BLOCKED, host
            assert server.asked == []

    run(go())


async def refused(server: ProxyServer, url: str = "http://127.0.0.1:8081/", **options: Any) -> Outcome:
    async with server, through(parse_proxy(server.url(options.pop("user", "")))) as http:
        return await http.send(request(url, **options))


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", OutcomeKind.BLOCKED),
        (
            b"HTTP/1.1 407 Proxy Authentication Required\r\nX-Smokescreen-Error: denied\r\n\r\n",
            OutcomeKind.BLOCKED,
        ),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", OutcomeKind.OURS),
        (b"HTTP/1.1 500 Oops\r\n\r\n", OutcomeKind.OURS),
        (b"HTTP/1.1 503 Busy\r\n\r\n", OutcomeKind.OURS),
        (b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1/\r\n\r\n", OutcomeKind.OURS),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", OutcomeKind.CONNECT_FAILED),
        (b"HTTP/1.1 504 Gateway Timeout\r\n\r\n", OutcomeKind.CONNECT_TIMEOUT),
        (b"SSH-2.0-OpenSSH\r\n\r\n", OutcomeKind.OURS),
        (b"x" * 100_000, OutcomeKind.OURS),
        (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", OutcomeKind.MALFORMED),
    ],
)
def test_what_a_proxy_says_to_connect(said: bytes, kind: OutcomeKind) -> None:
    async def go() -> None:
        outcome = await refused(ProxyServer(say=said))
        assert (outcome.kind, outcome.sent) == (kind, False)
        assert "127.0.0.1" not in outcome.reason

    run(go())


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (1, OutcomeKind.OURS),
        (2, OutcomeKind.BLOCKED),
        (4, OutcomeKind.CONNECT_FAILED),
        (5, OutcomeKind.CONNECT_REFUSED),
        (6, OutcomeKind.CONNECT_TIMEOUT),
        (99, OutcomeKind.OURS),
    ],
)
def test_what_a_socks_proxy_says(reply: int, kind: OutcomeKind) -> None:
    async def go() -> None:
        outcome = await refused(ProxyServer("socks5", say=bytes([5, reply, 0, 1, 0, 0, 0, 0, 0, 0])))
        assert (outcome.kind, outcome.sent) == (kind, False)

    run(go())


def test_a_wrong_password_is_our_fault() -> None:
    async def go() -> None:
        outcome = await refused(ProxyServer("socks5"), user="other:secret@")
        assert outcome.kind is OutcomeKind.OURS
        assert "secret" not in outcome.reason

    run(go())


def test_a_proxy_that_is_down_is_our_fault() -> None:
    async def go() -> None:
        async with ProxyServer() as server:
            url = server.url()
        async with through(parse_proxy(url)) as http:
            outcome = await http.send(request("http://127.0.0.1:8081/"))
            assert (outcome.kind, outcome.reason) == (OutcomeKind.OURS, "the egress proxy cannot be reached")

    run(go())


def test_a_proxy_that_never_connects_is_a_time_out_of_the_target() -> None:
    async def go() -> None:
        outcome = await refused(ProxyServer(say=b""), connect_timeout_s=0.3)
        assert outcome.kind is OutcomeKind.CONNECT_TIMEOUT

    run(go())


def test_a_certificate_is_the_targets_business_through_a_proxy_too() -> None:
    authority = trustme.CA()

    async def go() -> None:
        context = server_context(trustme.CA(), "localhost")
        async with (
            Receiver(context=context) as receiver,
            ProxyServer() as server,
            through(parse_proxy(server.url()), context=client_context(authority)) as http,
        ):
            outcome = await http.send(request(f"https://localhost:{receiver.port}/"))
            assert outcome.kind is OutcomeKind.TLS_FAILED
            assert outcome.reason.startswith("the certificate is not accepted")

    run(go())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "proxy:3128",
        "ftp://proxy",
        "http://",
        "http://proxy:99999",
        "http://proxy/path",
        "http://pro xy",
        "socks4://p",
    ],
)
def test_bad_proxies_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write for example"):
        parse_proxy(text)


def test_a_proxys_password_is_not_shown() -> None:
    proxy = parse_proxy("http://user:hunter2@proxy.internal")
    assert (proxy.port, proxy.user, proxy.password.reveal()) == (3128, "user", "hunter2")
    assert "hunter2" not in repr(proxy) + str(proxy)
