"""The exchange on real sockets: what it sends, what it takes for an answer, which connections it uses again."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import inspect
import ipaddress
import os
import random
import socket
import ssl
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import aiohttp
import pytest
import trustme
import uvloop

from hookd.core.addresses import AddressRules
from hookd.core.composer import Composer, Wire
from hookd.core.model import (
    BodyFormat,
    Delivery,
    DeliveryId,
    Endpoint,
    EndpointKey,
    Event,
    HostSign,
    Outcome,
    OutcomeKind,
)
from hookd.core.verdict import host_sign
from hookd.net.exchange import Attempt, ExchangeOptions, HttpExchange, check_parts
from hookd.net.resolver import Resolution, Resolver
from tests.receiver import OK, Call, Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hookd.core.request import Request
    from hookd.net.line import Line

LOOPBACK = AddressRules(allow=(ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")))


@contextlib.asynccontextmanager
async def exchange(
    rules: AddressRules | Callable[[], AddressRules] = LOOPBACK,
    context: ssl.SSLContext | None = None,
    *,
    resolver: Any = None,
    connections_most: int | None = None,
    **options: Any,
) -> AsyncIterator[HttpExchange]:
    def now() -> AddressRules:
        return rules() if callable(rules) else rules

    made = HttpExchange(
        resolver or Resolver(now, mono=time.monotonic),
        now,
        ExchangeOptions(**options),
        wall=time.time,
        mono=time.monotonic,
        context=context,
        connections_most=connections_most,
    )
    try:
        yield made
    finally:
        await made.close()


def request(
    url: str, payload: bytes = b"{}", timeout_s: float = 5.0, connect_timeout_s: float = 2.0, **headers: str
) -> Request:
    endpoint = Endpoint(EndpointKey(1), UUID(int=1), "t", url, "", 0, headers=headers)
    event = Event(UUID(int=2), "a.b", "t", payload, time.time())
    wire = Wire("hookd/test", BodyFormat.RAW, timeout_s, connect_timeout_s)
    return Composer(endpoint, wire).compose(
        Delivery(DeliveryId(1), EndpointKey(1), event, 0, 0), int(time.time())
    )


def test_the_libraries_are_as_they_were_checked() -> None:
    assert check_parts() == []


@pytest.mark.parametrize(
    ("package", "installed"),
    [("aiohttp", "3.14.3"), ("aiohttp", "3.15.0"), ("pycares", "5.0.1"), ("yarl", "1.20.0")],
)
def test_old_and_unknown_libraries_are_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, installed: str
) -> None:
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: installed if name == package else real(name)
    )
    assert any(package in problem and installed in problem for problem in check_parts())


def test_a_missing_c_parser_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp import http_parser

    monkeypatch.setattr(http_parser, "HttpResponseParser", http_parser.HttpResponseParserPy)
    assert any("C parser" in problem for problem in check_parts())


def test_a_connection_is_used_again() -> None:
    async def go() -> None:
        async with Receiver() as receiver, exchange() as http:
            outcomes = [await http.send(request(receiver.url)) for _ in range(5)]
            assert receiver.connections == 1
            assert [o.reused for o in outcomes] == [False, True, True, True, True]
            assert outcomes[0].connect_ms is not None
            assert outcomes[1].connect_ms is None
            assert all(o.status == 200 and o.body == "ok" and o.sent for o in outcomes)

    asyncio.run(go())


@pytest.mark.parametrize("size", [0, 1, 2000, 2048, 2049, 500_000, 5_000_000])
def test_bodies_of_any_size_arrive_whole(size: int) -> None:
    payload = random.Random(size).randbytes(size)

    async def go() -> None:
        async with Receiver() as receiver, exchange() as http:
            for _ in range(2):
                assert (await http.send(request(receiver.url, payload))).status == 200
            assert [c.body for c in receiver.calls] == [payload] * 2

    asyncio.run(go())


def test_an_answer_before_the_body_was_sent() -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        await done.wait()
        writer.transport.abort()
        await writer.wait_closed()

    done = asyncio.Event()

    async def go() -> None:
        server = await asyncio.start_server(early, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with exchange() as http:
            outcome = await http.send(request(f"http://127.0.0.1:{port}/", b"x" * 20_000_000))
            assert (outcome.kind, outcome.status) == (OutcomeKind.ANSWERED, 202)
        done.set()
        server.close()
        await server.wait_closed()

    asyncio.run(go())


def test_a_stale_connection_is_replaced_once_and_said_so() -> None:
    async def handle(call: Call, writer: asyncio.StreamWriter) -> bool:
        if call.number == 2:
            return True  # closes without an answer
        writer.write(OK)
        return False

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http:
            assert (await http.send(request(receiver.url))).status == 200
            outcome = await http.send(request(receiver.url))
            assert (outcome.status, outcome.resent) == (200, True)
            assert len(receiver.calls) == 3

    asyncio.run(go())


def test_a_fresh_connection_that_closes_is_not_sent_again() -> None:
    async def handle(_call: Call, _writer: asyncio.StreamWriter) -> bool:
        return True

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http:
            outcome = await http.send(request(receiver.url))
            assert (outcome.kind, outcome.sent, outcome.resent) == (OutcomeKind.CONNECTION_LOST, True, False)
            assert len(receiver.calls) == 1

    asyncio.run(go())


def test_an_idle_connection_that_was_closed_is_not_tried() -> None:
    async def handle(_call: Call, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK)
        return True

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http:
            for _ in range(3):
                outcome = await http.send(request(receiver.url))
                assert (outcome.status, outcome.resent) == (200, False)
                await receiver.wait_closed()

    asyncio.run(go())


def test_a_second_answer_does_not_answer_the_next_request() -> None:
    """A receiver that answers twice would mark somebody else's delivery as delivered."""

    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(500, b"mine") + (OK if call.number == 1 else b""))

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http:
            for _ in range(3):
                assert (await http.send(request(receiver.url))).status == 500
            async with asyncio.timeout(10):
                while receiver.connections < 2:
                    await asyncio.sleep(0.01)

    asyncio.run(go())


def test_bytes_that_come_while_it_is_idle_end_the_connection() -> None:
    writers: list[asyncio.StreamWriter] = []

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(answer(500))

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http:
            assert (await http.send(request(receiver.url))).status == 500
            writers[0].write(OK)
            await writers[0].drain()
            assert (await http.send(request(receiver.url))).status == 500
            assert receiver.connections == 2

    asyncio.run(go())


def test_of_many_that_depart_together_those_that_have_something_to_say_are_replaced() -> None:
    """A group is looked at at once (``ABOARD_MOST``); each of its connections counts for itself."""
    writers: list[asyncio.StreamWriter] = []

    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(answer(500, call.body))

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http:

            async def all_at_once() -> list[Outcome]:
                ended: list[asyncio.Future[Outcome]] = [asyncio.Future() for _ in range(40)]
                for n, future in enumerate(ended):
                    http.begin(request(receiver.url, b"%d" % n), None, future.set_result)
                http.depart()
                return await asyncio.gather(*ended)

            await all_at_once()
            assert receiver.connections == 40
            for n, writer in enumerate(writers):
                # past the event loop: it must not see them before they are used
                descriptor = writer.get_extra_info("socket").fileno()
                if n % 4 == 1:
                    os.write(descriptor, OK)
                elif n % 4 == 3:
                    with socket.socket(fileno=os.dup(descriptor)) as end:
                        end.shutdown(socket.SHUT_WR)
            outcomes = await all_at_once()
            assert [(o.status, o.body) for o in outcomes] == [(500, str(n)) for n in range(40)]
            assert not any(o.resent for o in outcomes), "what was known to be bad was not written to"
            assert receiver.connections == 60

    asyncio.run(go())


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_what_departs_is_written_before_anything_else_is_read(authority: trustme.CA, secure: bool) -> None:
    """A loop that kept it until it had read all sockets would take what was pushed meanwhile for the answer to it."""
    ends: list[int] = []

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        ends.append(writer.get_extra_info("socket").fileno())
        writer.write(OK)

    async def go() -> None:
        context = server_context(authority, "localhost") if secure else None
        async with (
            Receiver(handle, context=context) as receiver,
            exchange(context=client_context(authority) if secure else None) as http,
        ):
            await http.send(request(receiver.url))
            ended: asyncio.Future[Outcome] = asyncio.Future()
            http.begin(request(receiver.url), None, ended.set_result)
            http.depart()
            with socket.socket(fileno=os.dup(ends[0])) as end:
                assert end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT), "the request is there"
            assert (await ended).status == 200
            assert receiver.connections == 1

    uvloop.run(go())


def test_a_fault_in_one_of_a_group_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with Receiver(always(OK)) as receiver, exchange() as http:
            await asyncio.gather(*(http.send(request(receiver.url)) for _ in range(3)))
            ask, asked = Attempt.ask, iter(range(3))

            def faulty(attempt: Attempt, line: Line, *, reused: bool) -> None:
                if next(asked, None) == 1:
                    raise RuntimeError("a bug")
                ask(attempt, line, reused=reused)

            monkeypatch.setattr(Attempt, "ask", faulty)
            ended = [asyncio.get_running_loop().create_future() for _ in range(3)]
            for future in ended:
                http.begin(request(receiver.url), None, future.set_result)
            http.depart()
            outcomes = await asyncio.gather(*ended)
            assert [o.kind for o in outcomes] == [
                OutcomeKind.ANSWERED,
                OutcomeKind.OURS,
                OutcomeKind.ANSWERED,
            ]
            assert isinstance(outcomes[1].fault, RuntimeError)

    asyncio.run(go())


def test_the_deadline_covers_everything() -> None:
    async def slow_body(_call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        for _ in range(400):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.1)

    async def silent(_call: Call, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async def go() -> None:
        async with Receiver(slow_body) as dripping, Receiver(silent) as quiet, exchange() as http:
            async with asyncio.timeout(20):
                dripped, waited = await asyncio.gather(
                    http.send(request(dripping.url, timeout_s=1.0)),
                    http.send(request(quiet.url, timeout_s=1.0)),
                )
            assert (dripped.status, dripped.body_truncated) == (200, True)
            assert (waited.kind, waited.sent, waited.status) == (OutcomeKind.TIMEOUT, True, 0)

    asyncio.run(go())


def test_connecting_has_a_time_of_its_own() -> None:
    async def go() -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            fillers = [socket.socket() for _ in range(8)]
            for filler in fillers:
                filler.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    filler.connect(("127.0.0.1", port))
            async with exchange() as http:
                asked = request(f"http://127.0.0.1:{port}/", timeout_s=60, connect_timeout_s=0.5)
                async with asyncio.timeout(20):
                    outcome = await http.send(asked)
                assert (outcome.kind, outcome.sent) == (OutcomeKind.CONNECT_TIMEOUT, False)
            for filler in fillers:
                filler.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"nonsense\r\n\r\n", OutcomeKind.MALFORMED),
        (b"HTTP/1.1 abc OK\r\n\r\n", OutcomeKind.MALFORMED),
        (b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n", OutcomeKind.MALFORMED),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", OutcomeKind.MALFORMED),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 500 + b"\r\n", OutcomeKind.MALFORMED),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 50, OutcomeKind.MALFORMED),
        (
            b"HTTP/1.1 101 Switching\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
            OutcomeKind.MALFORMED,
        ),
        (b"", OutcomeKind.CONNECTION_LOST),
        (b"HTTP/1.1 200", OutcomeKind.CONNECTION_LOST),
    ],
)
def test_what_is_no_answer(data: bytes, kind: OutcomeKind) -> None:
    async def handle(_call: Call, writer: asyncio.StreamWriter) -> bool:
        writer.write(data)
        return True

    async def go() -> Outcome:
        async with Receiver(handle) as receiver, exchange() as http:
            outcome = await http.send(request(receiver.url))
            assert (await http.send(request(receiver.url))).kind == outcome.kind
            return outcome

    assert asyncio.run(go()).kind is kind


def test_the_guard_sees_every_address_that_is_dialled() -> None:
    async def go() -> None:
        async with Receiver() as receiver, exchange(AddressRules()) as http:
            for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"):
                outcome = await http.send(request(f"http://{host}:{receiver.port}/"))
                assert outcome.kind is OutcomeKind.BLOCKED, host
                assert not outcome.sent
            assert receiver.connections == 0

    asyncio.run(go())


def test_the_other_end_is_looked_at_before_the_first_byte() -> None:
    """0.0.0.0 is dialled and 127.0.0.1 answers: no other layer can see that."""
    rules = AddressRules(allow=(ipaddress.ip_network("0.0.0.0/32"),))

    async def go() -> None:
        async with Receiver() as receiver, exchange(rules) as http:
            outcome = await http.send(request(f"http://0.0.0.0:{receiver.port}/"))
            assert (outcome.kind, outcome.sent) == (OutcomeKind.BLOCKED, False)
            async with asyncio.timeout(30):
                while not receiver.connections:  # it did get that far
                    await asyncio.sleep(0.005)
            await receiver.wait_closed()
            assert receiver.calls == []

    asyncio.run(go())


def test_the_other_end_is_looked_at_before_tls_begins() -> None:
    """A ClientHello has the host's name in it, and makes a service that is not one for TLS do something."""
    rules = AddressRules(allow=(ipaddress.ip_network("0.0.0.0/32"),))

    async def go() -> None:
        came: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                came.set_result(await reader.read())
            writer.close()

        async with await asyncio.start_server(take, "127.0.0.1", 0) as server, exchange(rules) as http:
            port = server.sockets[0].getsockname()[1]
            outcome = await http.send(request(f"https://0.0.0.0:{port}/"))
            assert (outcome.kind, outcome.sent) == (OutcomeKind.BLOCKED, False)
            async with asyncio.timeout(30):
                assert await came == b""

    asyncio.run(go())


def test_a_blocked_attempt_has_no_times() -> None:
    """They would say whether a name is known inside, and what the cache holds."""

    async def go() -> None:
        async with exchange(AddressRules()) as http:
            outcome = await http.send(request("http://127.0.0.1:8000/"))
        assert outcome.kind is OutcomeKind.BLOCKED
        times = outcome.dns_ms, outcome.connect_ms, outcome.tls_ms, outcome.first_byte_ms, outcome.total_ms
        assert times == (None, None, None, None, 0)

    asyncio.run(go())


def test_why_there_was_no_connection_is_one_of_a_fixed_few() -> None:
    """What a tenant reads holds nothing that was found out: no text of a library, of a server or of the system is built in."""
    built = []
    for module in ("connections", "exchange", "line", "resolver", "tunnel"):
        path = Path(inspect.getfile(Resolver)).with_name(f"{module}.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Name(id="ConnectFailure" | "_NotAsked"), args=[_, ast.JoinedStr() as said]
                ):
                    built.append(ast.unparse(said))
                case ast.Assign(targets=[ast.Attribute(attr="reason")], value=ast.JoinedStr() as said):
                    built.append(ast.unparse(said))
    assert built == []


def test_rules_that_change_hold_for_connections_that_were_asked_meanwhile() -> None:
    rules = LOOPBACK
    asked, said = asyncio.Event(), asyncio.Event()

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await said.wait()
        writer.write(OK)

    async def go() -> None:
        nonlocal rules
        async with Receiver(handle) as receiver, exchange(lambda: rules) as http:
            under_way = asyncio.create_task(http.send(request(receiver.url)))
            await asked.wait()
            rules = AddressRules()
            http.connections.rules_changed()
            said.set()
            assert (await under_way).status == 200
            assert (await http.send(request(receiver.url))).kind is OutcomeKind.BLOCKED

    asyncio.run(go())


def test_rules_that_change_hold_for_idle_connections_too() -> None:
    rules = LOOPBACK

    async def go() -> None:
        nonlocal rules
        async with Receiver() as receiver, exchange(lambda: rules) as http:
            assert (await http.send(request(receiver.url))).status == 200
            rules = AddressRules()
            http.connections.rules_changed()
            assert (await http.send(request(receiver.url))).kind is OutcomeKind.BLOCKED

    asyncio.run(go())


class Waiting:
    """A turn that comes when it is told."""

    def __init__(self, *allowed: bool) -> None:
        self.allowed = list(allowed) or [True]
        self.come = asyncio.Event()

    async def wait(self) -> bool:
        await asyncio.wait_for(self.come.wait(), 10)
        return self.allowed.pop(0)

    def wrote(self) -> None:
        pass


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_who_accepts_and_closes_has_not_spoken(how: str) -> None:
    """So does a proxy before a dead receiver; were it an answer, its circuit breaker would never open."""

    async def go() -> None:
        turn = Waiting()

        async def close(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if how == "RST":
                peer = writer.get_extra_info("socket")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            turn.come.set()

        async with await asyncio.start_server(close, "127.0.0.1", 0) as server, exchange() as http:
            port = server.sockets[0].getsockname()[1]
            outcome = await http.send(request(f"http://127.0.0.1:{port}/"), turn)
            assert (outcome.kind, outcome.sent) == (OutcomeKind.CONNECT_FAILED, False)
            assert host_sign(outcome) is HostSign.DOWN

    asyncio.run(go())


def test_a_name_with_many_addresses_does_not_take_all_descriptors() -> None:
    dialled = 0

    class Many:
        async def resolve(self, _host: str) -> Resolution:
            return Resolution(tuple(f"127.0.0.{n}" for n in range(2, 18)))

        async def silent(self) -> bool:
            return False

        async def close(self) -> None:
            pass

    def rules() -> AddressRules:
        nonlocal dialled
        dialled += 1
        return LOOPBACK

    async def go() -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        async with exchange(rules, resolver=Many()) as http:
            outcome = await http.send(request(f"http://many.example:{port}/"))
            assert outcome.kind is OutcomeKind.CONNECT_REFUSED

    asyncio.run(go())
    # those that fail are left out, and the others tried again (aiohttp): 3 + 2 + 1, not 16 + 15 + …
    assert 0 < dialled <= 6


def test_an_idle_connection_that_its_peer_has_closed_makes_no_room() -> None:
    both, first_closed = asyncio.Event(), asyncio.Event()

    async def pair(call: Call, writer: asyncio.StreamWriter) -> bool:
        if call.number == 2:
            both.set()
        await both.wait()
        if call.number == 2:
            await first_closed.wait()
        writer.write(OK)
        return call.number == 1

    async def never(_call: Call, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def go() -> None:
        async with Receiver(pair) as one, Receiver(never) as other, exchange(connections_most=2) as http:
            first, second = (asyncio.create_task(http.send(request(one.url))) for _ in range(2))
            async with asyncio.timeout(10):
                await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
                while http.connections._held > 1:
                    await asyncio.sleep(0.005)
            first_closed.set()
            await asyncio.gather(first, second)
            others = [asyncio.create_task(http.send(request(other.url, timeout_s=30))) for _ in range(2)]
            async with asyncio.timeout(10):
                while len(other.calls) < 2:
                    await asyncio.sleep(0.005)
            # of two that may be open two are in use: the one that was idle had to go
            await one.wait_closed()
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    asyncio.run(go())


# TLS.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, name: str, **options: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, **options).configure_cert(context)
    return context


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_an_answer_that_came_while_the_process_stood_still_counts() -> None:
    """As after SIGSTOP: when it goes on, a deadline has passed, and what waits in its sockets is read first."""
    received, answer_now, answered = threading.Event(), threading.Event(), threading.Event()

    def serve(listening: socket.socket) -> None:
        peer, _ = listening.accept()
        with peer:
            peer.settimeout(10)
            peer.recv(65536)
            received.set()
            answer_now.wait(10)
            peer.sendall(OK)
            answered.set()
            peer.recv(1)

    async def go(port: int) -> None:
        async with exchange() as http:
            url = f"http://127.0.0.1:{port}/"
            sending = asyncio.create_task(http.send(request(url, timeout_s=1.0)))
            async with asyncio.timeout(10):
                while not received.is_set():
                    await asyncio.sleep(0.001)
            answer_now.set()
            assert answered.wait(10)  # the loop stands still from here on, as it does in a stopped process
            time.sleep(1.2)
            outcome = await sending
            assert (outcome.kind, outcome.status) == (OutcomeKind.ANSWERED, 200)
            assert outcome.total_ms > 1000

    with socket.create_server(("127.0.0.1", 0)) as listening:
        receiver = threading.Thread(target=serve, args=(listening,))
        receiver.start()
        uvloop.run(go(listening.getsockname()[1]))
        receiver.join()


def test_cookies_are_not_kept() -> None:
    async def handle(_: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(200, set_cookie="session=1; Path=/"))

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http:
            for _ in range(3):
                assert (await http.send(request(receiver.url))).status == 200
            assert not [c for c in receiver.calls if "cookie" in c.headers]

    asyncio.run(go())


def test_a_receiver_that_never_reads_a_large_body_ends_in_time() -> None:
    """Its window closes and the write waits: the deadline is of the whole attempt, and nothing else is held up."""
    payload = b'"' + b"x" * 16_000_000 + b'"'

    async def go() -> None:
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            async with exchange() as http, Receiver() as honest:
                url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
                stuck = asyncio.create_task(http.send(request(url, payload, timeout_s=1.0)))
                good = [await http.send(request(honest.url)) for _ in range(20)]
                outcome = await stuck
                assert {o.status for o in good} == {200}
                assert outcome.kind is OutcomeKind.TIMEOUT
                assert 1000 <= outcome.total_ms < 2000
                assert not http.connections.talking

    asyncio.run(go())


REQUESTS = 2000

FAILURES_MOST = 2
"""A thousandth: of a connection that is reused while its peer closes it, the one replacement is closed in time seldom."""


def test_connections_that_are_closed_after_some_answers_cost_no_attempt() -> None:
    """The peer closes 0 to 5 ms after each answer, in the moment in which the next request is written."""
    dice = random.Random(6)

    async def handle(_: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        if dice.random() < 0.5:
            asyncio.get_running_loop().call_later(dice.random() * 0.005, writer.close)

    async def one(http: HttpExchange, url: str) -> list[Outcome]:
        outcomes = []
        for _ in range(REQUESTS // 20):
            outcomes.append(await http.send(request(url)))
            await asyncio.sleep(dice.random() * 0.005)
        return outcomes

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http:
            each = await asyncio.gather(*(one(http, receiver.url) for _ in range(20)))
            outcomes = [o for some in each for o in some]
            failed = [o for o in outcomes if o.status != 200]
            assert len(failed) <= FAILURES_MOST, failed[:3]
            answered = len(outcomes) - len(failed)
            came = len(receiver.calls)
            assert answered <= came <= len(outcomes) + sum(o.resent for o in outcomes), (
                "none twice without a mark"
            )
            assert sum(o.reused for o in outcomes) > REQUESTS / 4

    asyncio.run(go())


def test_tls(authority: trustme.CA) -> None:
    async def go() -> None:
        async with (
            Receiver(context=server_context(authority, "localhost")) as receiver,
            exchange(context=client_context(authority)) as http,
        ):
            outcomes = [await http.send(request(receiver.url)) for _ in range(3)]
            assert [(o.status, o.reused) for o in outcomes] == [(200, False), (200, True), (200, True)]
            assert [o.tls_ms is None for o in outcomes] == [False, True, True]
            assert outcomes[0].tls_ms is not None
            assert 0 < outcomes[0].tls_ms < outcomes[0].total_ms

    asyncio.run(go())


@pytest.mark.parametrize("case", ["unknown authority", "another name", "plain server"])
def test_tls_that_is_not_accepted(authority: trustme.CA, case: str) -> None:
    async def go() -> None:
        context = {
            "unknown authority": server_context(trustme.CA(), "localhost"),
            "another name": server_context(authority, "other.example"),
            "plain server": None,
        }[case]
        async with Receiver(context=context) as receiver, exchange(context=client_context(authority)) as http:
            outcome = await http.send(request(f"https://localhost:{receiver.port}/"))
            assert outcome.kind in (OutcomeKind.TLS_FAILED, OutcomeKind.CONNECT_TIMEOUT), outcome
            assert not outcome.sent
            assert "127.0.0.1" not in outcome.reason
            if case != "plain server":
                assert outcome.kind is OutcomeKind.TLS_FAILED
                assert outcome.reason.startswith("the certificate is not accepted")

    asyncio.run(go())


def test_session_tickets_are_nothing_that_was_said(authority: trustme.CA) -> None:
    """They lie in the socket, and the loop has not read them yet, when the connection is looked at."""
    listening = socket.create_server(("127.0.0.1", 0))
    shaken = threading.Event()

    def serve() -> None:
        plain, _ = listening.accept()
        with server_context(authority, "localhost").wrap_socket(plain, server_side=True) as peer:
            shaken.set()
            peer.settimeout(10)
            asked = b""
            while b"\r\n\r\n" not in asked and (data := peer.recv(65536)):
                asked += data
            peer.sendall(OK)

    class Standing:
        async def wait(self) -> bool:
            # the loop stands still on purpose: the server writes its tickets at the end of the handshake
            return shaken.wait(10)

        def wrote(self) -> None:
            pass

    async def go() -> None:
        async with exchange(context=client_context(authority)) as http:
            url = f"https://localhost:{listening.getsockname()[1]}/"
            outcome = await http.send(request(url), Standing())
            assert (outcome.status, outcome.reason) == (200, "")

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    with listening:
        asyncio.run(go())
    serving.join(10)


# Redirects.


def test_a_redirect_that_the_rate_does_not_allow_uses_up_an_attempt() -> None:
    """Were it held, the first URL would be asked again and again, for as long as the event is kept."""

    async def go() -> None:
        async with (
            Receiver(always(answer(307, location="/there"))) as receiver,
            exchange(redirects="same-host") as http,
        ):
            turn = Waiting(True, False)
            turn.come.set()
            outcome = await http.send(request(receiver.url), turn)
            assert (outcome.kind, outcome.status, len(receiver.calls)) == (OutcomeKind.ANSWERED, 307, 1)
            assert outcome.reason == "the host's rate does not allow the redirect in time"
            assert (outcome.url, outcome.redirects) == (receiver.url, 0), "what was called"

    asyncio.run(go())


def test_where_a_redirect_leads_is_kept_without_its_query_and_gets_the_same_content_type() -> None:
    async def go() -> None:
        async with (
            Receiver() as other,
            Receiver(always(answer(307, location=other.url + "?token=hidden"))) as receiver,
            exchange(redirects="any") as http,
        ):
            plain = request(receiver.url)
            head = plain.head.replace(b"application/json", b"application/cloudevents+json")
            outcome = await http.send(dataclasses.replace(plain, head=head))
            assert (outcome.status, outcome.url) == (200, other.url)
            assert other.calls[0].path.endswith("?token=hidden")
            assert other.calls[0].headers["content-type"] == "application/cloudevents+json"

    asyncio.run(go())


def test_redirects_on_the_same_host() -> None:
    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(308, location="/there?x=1") if call.path == "/hook" else OK)

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange(redirects="same-host") as http:
            outcome = await http.send(request(receiver.url, b"body", authorization="Bearer x"))
            assert (outcome.status, outcome.redirects) == (200, 1)
            assert receiver.calls[1].path == "/there?x=1"
            assert receiver.calls[1].body == b"body"
            assert receiver.calls[1].headers["authorization"] == "Bearer x"

    asyncio.run(go())


@pytest.mark.parametrize("status", [301, 302, 303])
def test_redirects_that_would_drop_the_post_are_not_followed(status: int) -> None:
    async def go() -> None:
        async with (
            Receiver(always(answer(status, location="/there"))) as receiver,
            exchange(redirects="any") as http,
        ):
            outcome = await http.send(request(receiver.url))
            assert outcome.status == status
            assert "drop the POST" in outcome.reason
            assert len(receiver.calls) == 1

    asyncio.run(go())


def test_redirects_to_another_host_take_no_secrets_along() -> None:
    async def go() -> None:
        async with Receiver() as other, Receiver(always(answer(307, location=other.url))) as receiver:
            async with exchange(redirects="any") as http:
                outcome = await http.send(
                    request(receiver.url, b"body", authorization="Bearer x", x_env="prod")
                )
                assert outcome.status == 200
                assert other.calls[0].body == b"body"
                secret = {
                    "authorization",
                    "x_env",
                    "webhook-id",
                    "webhook-timestamp",
                    "webhook-signature",
                    "hookd-attempt",
                }
                assert secret <= set(receiver.calls[0].headers), "it had them"
                assert dict(other.calls[0].headers) == {
                    "host": other.url.split("/")[2], "content-type": "application/json", "accept": "*/*",
                    "accept-encoding": "identity", "user-agent": "hookd", "content-length": "4",
                }  # fmt: skip
            async with exchange(redirects="same-host") as http:
                outcome = await http.send(request(receiver.url))
                assert (outcome.status, len(other.calls)) == (307, 1)

    asyncio.run(go())


BLOCKED = (OutcomeKind.BLOCKED, 0, 1, 1)
NOT_FOLLOWED = (OutcomeKind.ANSWERED, 307, 0, 1)
NOT_CALLED = "to a URL that is not called"


@pytest.mark.parametrize(
    ("location", "ending", "reason"),
    [
        ("http://10.0.0.1/", BLOCKED, "the address is not allowed"),
        ("http://169.254.169.254/latest", BLOCKED, "the address is not allowed"),
        ("//[fd00:ec2::254]/", BLOCKED, "the address is not allowed"),
        ("ftp://example.com/", NOT_FOLLOWED, NOT_CALLED),
        ("http://user:pw@127.0.0.1/", NOT_FOLLOWED, NOT_CALLED),
        ("http://127.1/", NOT_FOLLOWED, NOT_CALLED),
        ("http://receiver/", NOT_FOLLOWED, NOT_CALLED),
        ("//127.0.0.1:6379/", NOT_FOLLOWED, NOT_CALLED),
        ("http://[::1", NOT_FOLLOWED, "a redirect to what is no URL"),
    ],
)
def test_redirects_to_forbidden_places(
    location: str, ending: tuple[OutcomeKind, int, int, int], reason: str
) -> None:
    async def go() -> None:
        async with (
            Receiver(always(answer(307, location=location))) as receiver,
            exchange(redirects="any") as http,
        ):
            outcome = await http.send(request(receiver.url))
            assert (outcome.kind, outcome.status, outcome.redirects, len(receiver.calls)) == ending
            assert reason in outcome.reason

    asyncio.run(go())


@pytest.mark.parametrize("names", [(), ("receiver",)])
def test_a_redirect_to_a_private_name_is_followed_where_it_is_allowed(names: tuple[str, ...]) -> None:
    async def go() -> None:
        async with exchange(redirects="any", names=names) as http:
            outcome = Outcome(OutcomeKind.ANSWERED, status=307)
            hop = http.hop(request("http://127.0.0.1:9000/"), outcome, "http://receiver:9000/x")
            assert (hop is not None) is bool(names)
            assert (NOT_CALLED in outcome.reason) is not bool(names)

    asyncio.run(go())


def test_redirects_have_an_end() -> None:
    async def go() -> None:
        async with (
            Receiver(always(answer(307, location="/hook"))) as receiver,
            exchange(redirects="any") as http,
        ):
            outcome = await http.send(request(receiver.url))
            assert outcome.reason == "too many redirects"
            assert len(receiver.calls) == 4

    asyncio.run(go())


# The contract with ClientSession.

ANSWERS = [
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nx-trailer: 1\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nx-a: 1\r\nx-a: 2\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-type: text/plain; charset=latin-1\r\n\r\n\xe4\xf6\xfc",
]


@pytest.mark.parametrize("data", ANSWERS)
@pytest.mark.parametrize("cut", [1, 7, 10_000])
def test_it_reads_what_client_session_reads(data: bytes, cut: int) -> None:
    async def handle(_call: Call, writer: asyncio.StreamWriter) -> bool:
        for start in range(0, len(data), cut):
            writer.write(data[start : start + cut])
            await writer.drain()
            await asyncio.sleep(0)
        return True

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http, aiohttp.ClientSession() as session:
            async with session.post(receiver.url, data=b"{}", allow_redirects=False) as theirs:
                body = await theirs.read()
            ours = await http.send(request(receiver.url))
            assert ours.status == theirs.status
            assert ours.body.encode() == body or b"\xe4" in body
            assert ours.headers.splitlines() == [f"{n.decode()}: {v.decode()}" for n, v in theirs.raw_headers]

    asyncio.run(go())


def test_many_at_once() -> None:
    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.01)
        writer.write(answer(200, call.body))

    async def go() -> None:
        async with Receiver(handle) as receiver, exchange() as http:
            bodies = [str(n).encode() for n in range(2000)]
            gate = asyncio.Semaphore(200)

            async def one(body: bytes) -> None:
                async with gate:
                    outcome = await http.send(request(receiver.url, body, timeout_s=30))
                    assert outcome.body.encode() == body, "every request has its own answer"

            await asyncio.gather(*(one(body) for body in bodies))
            assert receiver.connections <= 210

    asyncio.run(go())
