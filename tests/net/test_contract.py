"""
The contract: on the same traffic the exchange ends as aiohttp's own ``ClientSession`` does.

Each answer is played twice by a raw receiver, whole and cut, and ended in several ways: once to ``ClientSession``, which
is the oracle, once to the exchange.  Where hookd differs on purpose, the case says why.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import trustme
import uvloop
from aiohttp.http_parser import HttpResponseParser

from hookd.core.model import OutcomeKind
from hookd.net import line
from hookd.net.exchange import ExchangeOptions
from tests.net.test_exchange import client_context, exchange, request, server_context
from tests.receiver import OK, Receiver, answer

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine, Sequence

    from hookd.core.model import Outcome
    from tests.receiver import Call

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@dataclass(frozen=True, slots=True)
class Ending:
    """What a client makes of an answer, in terms that both have."""

    status: int
    headers: tuple[str, ...] = ()
    body: bytes = b""
    whole: bool = True


async def by_session(url: str, context: ssl.SSLContext | None) -> Ending:
    """What ``ClientSession`` says; status 0 stands for no answer."""
    timeout = aiohttp.ClientTimeout(total=2)
    async with aiohttp.ClientSession(auto_decompress=False, timeout=timeout) as session:
        try:
            answer = await session.post(url, data=b"{}", allow_redirects=False, ssl=context or True)
        except (aiohttp.ClientError, ValueError):
            return Ending(0)
        headers = tuple(f"{n.decode()}: {v.decode()}" for n, v in answer.raw_headers)
        try:
            body, whole = await answer.read(), True
        except (aiohttp.ClientError, TimeoutError):
            # a chunk that breaks after its head was read leaves ClientSession waiting for the time-out
            body, whole = b"", False
        return Ending(answer.status, headers, body, whole)


def of(outcome: Outcome) -> Ending:
    """The same of an outcome."""
    if outcome.kind is not OutcomeKind.ANSWERED:
        assert outcome.kind in (OutcomeKind.CONNECTION_LOST, OutcomeKind.MALFORMED), outcome
        return Ending(0)
    whole = not outcome.body_truncated
    return Ending(
        outcome.status, tuple(outcome.headers.splitlines()), outcome.body.encode() if whole else b"", whole
    )


async def until_read() -> None:
    """Turns of the loop that both sides share: what was written is read before the next piece is."""
    for _ in range(5):
        await asyncio.sleep(0)


class Play(Receiver):
    """Answers every request with these bytes, in pieces of ``cut``, and ends as told."""

    def __init__(self, data: bytes, cut: int, end: str, context: ssl.SSLContext | None = None) -> None:
        super().__init__(self._play, context=context)
        self.data, self.cut, self.end = data, cut, end

    async def _play(self, _call: Call, writer: asyncio.StreamWriter) -> bool:
        for start in range(0, len(self.data), self.cut):
            writer.write(self.data[start : start + self.cut])
            await writer.drain()
            await until_read()
        if self.end == "reset":
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()
        return self.end != "held open"


def run(loop: str, work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(work)


async def same(data: bytes, cut: int, end: str, contexts: tuple[Any, Any] = (None, None)) -> Ending:
    server, client = contexts
    async with Play(data, cut, end, server) as receiver, exchange(context=client) as http:
        theirs = await by_session(receiver.url, client)
        ours = of(await http.send(request(receiver.url)))
        assert ours == theirs, (data, cut, end)
        return ours


HEAD = b"HTTP/1.1 200 OK\r\n"

ENDED_BY_THEMSELVES = [
    HEAD + b"content-length: 0\r\n\r\n",
    HEAD + b"Content-Length: 5\r\n\r\nhello",
    HEAD + b"CONTENT-LENGTH:5\r\nx-empty:\r\nx-blank:   \r\n\r\nhello",
    HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nx-trailer: 1\r\n\r\n",
    HEAD + b"transfer-encoding: CHUNKED\r\n\r\n0005\r\nhello\r\n000\r\n\r\n",
    HEAD + b"connection: keep-alive\r\ncontent-length: 2\r\n\r\nok",
    HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\nok",
    HEAD + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope",
    HEAD + b"set-Thing: a\r\nset-Thing: b\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok",
    b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok",
    b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\nok",
    b"HTTP/1.1 204 No Content\r\nx-a: b\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\ngone",
    b"HTTP/1.1 599 Whatever\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"content-length: 2\r\n\r\nok",
    b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\nok",
    b"HTTP/1.1 102 Processing\r\n\r\n" * 5 + HEAD + b"content-length: 2\r\n\r\nok",
]

ENDED_BY_THE_CLOSE = [
    b"HTTP/2.0 200 OK\r\n\r\n",
    HEAD + b"\r\nhello",
    HEAD + b"connection: close\r\n\r\nhello",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
    HEAD + b"content-length: 9\r\n\r\nhello",
    HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhel",
    HEAD + b"transfer-encoding: gzip\r\n\r\nhello",
]

NO_ANSWERS = [
    HEAD + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello",
    b"",
    b"\r\n",
    b"HTTP/1.1",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n",
    b"HTTP/1.1 20 OK\r\n\r\n",
    b"HTTP/1.1 abc OK\r\n\r\n",
    b"http/1.1 200 OK\r\n\r\n",
    b"ICY 200 OK\r\n\r\n",
    b"<html>hello</html>\r\n\r\n",
    b"\x15\x03\x01\x00\x02\x02\x16",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    HEAD + b"bad header\r\n\r\n",
    HEAD + b"bad name : x\r\n\r\n",
    HEAD + b": x\r\n\r\n",
    HEAD + b"x: a\x00b\r\n\r\n",
    HEAD + b"content-length: -1\r\n\r\n",
    HEAD + b"content-length: 5x\r\n\r\nhello",
    HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    HEAD + b"content-length: 99999999999999999999999\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
]

BROKEN_BODIES = [
    HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\nnothing",
    HEAD + "content-length: 4\r\n\r\näöüß".encode(),
    b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
    + HEAD
    + b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    b"\r\n\r\n" * 40 + b"no head at all",
]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cut", [1, 7, 10_000])
def test_answers_that_end_by_themselves(loop: str, cut: int) -> None:
    async def go() -> None:
        for data in ENDED_BY_THEMSELVES:
            for end in ("close", "held open"):
                ending = await same(data, cut, end)
                assert ending.status >= 200, data
                assert ending.whole, data

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cut", [1, 10_000])
def test_answers_that_end_with_the_connection(loop: str, cut: int) -> None:
    async def go() -> None:
        for data in ENDED_BY_THE_CLOSE:
            assert (await same(data, cut, "close")).status == 200, data

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cut", [1, 10_000])
def test_what_is_no_answer(loop: str, cut: int) -> None:
    async def go() -> None:
        for data in NO_ANSWERS:
            assert (await same(data, cut, "close")).status == 0, data

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
def test_bodies_that_break_do_not_undo_the_answer(loop: str) -> None:
    """
    A head that came counts.  In pieces ``ClientSession`` has it too; in one piece with what breaks it, it loses it, on purpose
    not so hookd: whoever answers a 204 with a body, or counts characters, has had the event.
    """

    async def go() -> None:
        for data in BROKEN_BODIES:
            in_pieces = await same(data, 1, "close")
            async with Play(data, 10_000, "close") as receiver, exchange() as http:
                whole = await http.send(request(receiver.url))
                assert of(whole).status == in_pieces.status, data
                assert (await http.send(request(receiver.url))).reused is False, data

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("data", [ENDED_BY_THEMSELVES[1], ENDED_BY_THEMSELVES[4], ENDED_BY_THEMSELVES[20]])
def test_an_end_after_each_byte(loop: str, data: bytes) -> None:
    async def go() -> None:
        for length in range(len(data)):
            await same(data[:length], 10_000, "close")

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_reset_after_each_byte(loop: str) -> None:
    """A reset may overtake what was sent before it, so either client may have seen less; neither may invent anything."""
    data = ENDED_BY_THEMSELVES[1]
    head = data.index(b"\r\n\r\n") + 4

    async def go() -> None:
        for length in range(len(data) + 1):
            async with Play(data[:length], 10_000, "reset") as receiver, exchange() as http:
                for ending in (
                    await by_session(receiver.url, None),
                    of(await http.send(request(receiver.url))),
                ):
                    assert ending.status in ((0, 200) if length >= head else (0,)), length
                    assert ending.body in (b"", b"hello"), length
                    assert not (ending.body and length < len(data)), length

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
def test_over_tls(loop: str) -> None:
    authority = trustme.CA()
    contexts = server_context(authority, "localhost"), client_context(authority)

    async def go() -> None:
        for data in (*ENDED_BY_THEMSELVES, *NO_ANSWERS):
            await same(data, 10_000, "close", contexts)
        for data in ENDED_BY_THEMSELVES[:6]:
            await same(data, 1, "close", contexts)

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
def test_what_comes_after_an_answer_is_never_the_next_one(loop: str) -> None:
    """
    On purpose not what ``ClientSession`` does: a pushed answer would be believed.

    Neither a second answer in one piece with the first, nor its beginning, whose rest follows the next request.
    """
    first = HEAD + b"content-length: 2\r\n\r\nno"

    async def go() -> None:
        for pushed in (
            HEAD + b"content-length: 6\r\n\r\nforged",
            b"HTTP/1.1 200 OK\r\ncontent-le",
            b"H",
            b"\r\n",
        ):
            async with Play(first + pushed, 10_000, "held open") as receiver, exchange() as http:
                for _ in range(3):
                    outcome = await http.send(request(receiver.url, timeout_s=2.0))
                    assert outcome.body in ("no", ""), pushed

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cut", [7, 10_000])
def test_an_answer_that_comes_again_is_what_it_was(loop: str, cut: int) -> None:
    """The exchange does not parse a second time what is the same to the byte: whatever it is, that must not show."""
    answers = [
        *ENDED_BY_THEMSELVES,
        b"HTTP/1.1 429 Slow\r\nretry-after: 7\r\ncontent-length: 2\r\n\r\nno",
        LONG,
        HEAD + b"content-length: 5\r\n\r\n\x00\xff\x1b[1",
    ]

    async def go() -> None:
        for data in answers:
            for most in (16384, 4):
                async with Play(data, cut, "held open") as receiver, exchange(max_response=most) as http:
                    first, *again = [await http.send(request(receiver.url, timeout_s=2.0)) for _ in range(4)]
                    for outcome in again:
                        for name in ("kind", "status", "retry_after", "headers", "body", "body_truncated"):
                            assert getattr(outcome, name) == getattr(first, name), (data, most, name)
                        assert outcome.first_byte_ms is not None
                    kept = (
                        not first.body_truncated
                        and b"close" not in data
                        and b"HTTP/1.0 200 OK\r\ncon" not in data
                    )
                    assert not kept or {outcome.reused for outcome in again} == {True}, (data, most)

    run(loop, go())


class Script(Receiver):
    """Answers each request with the next of these, each in its pieces."""

    def __init__(self, *answers: Sequence[bytes]) -> None:
        super().__init__(self._next)
        self.answers = list(answers)

    async def _next(self, _call: Call, writer: asyncio.StreamWriter) -> bool:
        for piece in self.answers.pop(0):
            writer.write(piece)
            await writer.drain()
            await until_read()
        return False


class Parsers:
    """Counts the parsers that are made."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, *arguments: Any) -> Any:
        self.made += 1
        return HttpResponseParser(*arguments)


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> Parsers:
    counting = Parsers()
    monkeypatch.setattr(line, "NewParser", counting)
    return counting


NO = answer(200, b"no")
FAILED = answer(500)
LONG = answer(200, 2000 * b"x")


@pytest.mark.parametrize(
    ("answers", "parsed"),
    [
        pytest.param([[OK]] * 3, 1, id="the same"),
        pytest.param([[OK], [NO], [OK]], 3, id="another between them"),
        pytest.param([[OK], [OK], [FAILED], [FAILED], [OK]], 3, id="failures are looked at each time"),
        pytest.param([[OK[:9], OK[9:]]] * 2, 2, id="in pieces"),
        pytest.param([[LONG]] * 2, 2, id="too long to be kept"),
        pytest.param([[OK], [OK + b"H"], [OK]], 3, id="something behind it"),
    ],
)
def test_an_answer_that_comes_again_in_one_piece_is_not_parsed_again(
    parsers: Parsers, answers: list[list[bytes]], parsed: int
) -> None:
    async def go() -> None:
        async with Script(*answers) as receiver, exchange() as http:
            for pieces in answers:
                outcome = await http.send(request(receiver.url))
                assert outcome.status == int(b"".join(pieces)[9:12])
            assert (receiver.connections, parsers.made) == (1, parsed)

    run("uvloop", go())


def test_what_an_origin_says_again_is_known_on_all_its_connections_and_on_no_others(parsers: Parsers) -> None:
    """And for as long as there are any: origins come and go."""
    gathered = asyncio.Event()

    async def when_all_have_come(call: Call, writer: asyncio.StreamWriter) -> None:
        if call.number == 8:
            gathered.set()
        await gathered.wait()
        writer.write(OK)

    async def go() -> None:
        async with Receiver(when_all_have_come) as one, Receiver() as other, exchange() as http:
            outcomes = await asyncio.gather(*(http.send(request(one.url)) for _ in range(8)))
            assert {(o.status, o.headers, o.body) for o in outcomes} == {(200, "content-length: 2", "ok")}
            assert (one.connections, parsers.made) == (8, 1)

            await http.send(request(other.url))
            assert parsers.made == 2, "another origin's"

            http.connections.drop_idle()
            await http.send(request(one.url))
            assert parsers.made == 3, "all its connections had ended"

    run("uvloop", go())


def test_bytes_of_a_body_are_no_answer_that_comes_again() -> None:
    """An answer within an answer: kept is the whole, and compared is the beginning."""
    around = b"content-length: %d\r\n\r\n" % len(OK)

    async def bodies(*answers: Sequence[bytes]) -> list[str]:
        async with Script(*answers) as receiver, exchange() as http:
            return [(await http.send(request(receiver.url))).body for _ in answers]

    async def go() -> None:
        inner = OK.decode()
        assert await bodies([HEAD + around, OK], [OK]) == [inner, "ok"]
        assert await bodies([OK], [HEAD + b"x-a: 1\r\n" + around, OK]) == ["ok", inner]

    run("uvloop", go())


def test_an_answer_that_comes_again_after_a_reload_is_cut_as_asked_now() -> None:
    async def go() -> None:
        async with Script([OK], [OK]) as receiver, exchange() as http:
            assert (await http.send(request(receiver.url))).body == "ok"
            http.options = ExchangeOptions(max_response=1)
            outcome = await http.send(request(receiver.url))
            assert (outcome.body, outcome.body_truncated, outcome.reused) == ("o", True, True)

    run("uvloop", go())


@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_redirect_said_stays_with_it(loop: str) -> None:
    """Neither its body, headers nor their length are those of the answer after it, nor of one that comes again."""

    async def go() -> None:
        empty = HEAD + b"content-length: 0\r\n\r\n"
        for said in (b"FROM-A", 1500 * b"x"):
            async with Script([empty], [empty], [empty]) as target:
                sent_on = b"HTTP/1.1 307 On\r\nlocation: %b\r\nretry-after: 9\r\ncontent-length: %d\r\n\r\n%b"
                sent_on %= (target.url.encode(), len(said), said)
                async with Script([sent_on]) as first, exchange(redirects="any", max_response=1000) as http:
                    outcomes = [await http.send(request(u)) for u in (first.url, target.url, target.url)]
                assert outcomes[0].redirects == 1
                for outcome in outcomes:
                    assert outcome.status == 200
                    assert (outcome.body, outcome.body_truncated, outcome.retry_after) == ("", False, None)
                    assert outcome.headers == "content-length: 0"

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
def test_of_a_redirect_to_nowhere_nothing_is_shown(loop: str) -> None:
    async def go() -> None:
        async with Script([]) as gone:
            url = gone.url
        sent_on = b"HTTP/1.1 307 On\r\nlocation: %b\r\ncontent-length: 6\r\n\r\nFROM-A" % url.encode()
        async with Script([sent_on]) as first, exchange(redirects="any") as http:
            outcome = await http.send(request(first.url))
        assert (outcome.kind, outcome.status) == (OutcomeKind.CONNECT_REFUSED, 0)
        assert (outcome.headers, outcome.body) == ("", "")

    run(loop, go())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tls", [False, True])
def test_an_answer_before_the_request_is_none(loop: str, tls: bool) -> None:
    """On purpose not what ``ClientSession`` does: nobody has read the event yet."""
    authority = trustme.CA()

    class AfterItSpoke:
        async def wait(self) -> bool:
            await asyncio.wait_for(spoken.wait(), 10)
            return True

        def wrote(self) -> None:
            pass

    class Hasty(Receiver):
        async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            writer.write(HEAD + b"content-length: 0\r\n\r\n")
            spoken.set()
            asked.append(await reader.read(1))
            return False

    async def go() -> None:
        context = server_context(authority, "localhost") if tls else None
        async with Hasty(context=context) as receiver, exchange(context=client_context(authority)) as http:
            outcome = await http.send(request(receiver.url), AfterItSpoke())
            assert (outcome.kind, outcome.sent) == (OutcomeKind.MALFORMED, False)

    asked: list[bytes] = []
    spoken = asyncio.Event()
    run(loop, go())
    assert not any(asked)
