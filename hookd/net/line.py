"""
A line: one connection, and the conversation on it: a request goes out in one write, one answer is read.

It is a protocol of our own on the transport that aiohttp's connector opened, with aiohttp's C parser behind it, and none
of the per-request objects of ``ClientSession``: no task, no future, no timer, no queue.  An answer that comes in one piece,
as nearly all do, is read, judged and handed on within the one call of the event loop that brought it.

What counts as an answer is a status line and headers.  A body that is cut, slow, endless or compressed changes nothing:
it is read up to a bound, never decompressed, and costs the connection if it does not end there.

A receiver tends to say the same again and again, on whichever of its connections.  The last 2xx that came in one piece, of at most
``REPEATED_MOST``, is not parsed when it comes again to the byte: from its start the parser could say nothing else.  (4 µs a
delivery; and what is kept is kept once for an origin: 18 of the 36 objects of a connection were copies of it.)

A line has nothing to say before it is asked.  Bytes that come while nobody asked, before the first request as after the
last, end it: aiohttp would take them for the answer to the next request (aiohttp#13656, seen with 3.14.5).
"""

from __future__ import annotations

import asyncio
import errno
import select
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp.client_exceptions import ClientPayloadError
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpResponseParser

from hookd.core.model import OutcomeKind
from hookd.net.answer import excerpt, header_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hookd.core.model import Outcome
    from hookd.core.request import Request

ONE_WRITE_MOST = 2048
"""Above this, head and body are written as two parts instead of being copied into one."""

INTERIM_MOST = 16
"""1xx answers before one that counts."""

HEAD_END = b"\r\n\r\n"

HEADER_LINE_MOST = 8190
HEADERS_MOST = 64

BEYOND_BODY_MOST = 256 * 1024
"""Bytes of an answer beside its body (head, 1xx, chunk extensions, trailers) that are read before it is cut off."""

REPEATED_MOST = 1024
"""Bytes of an answer that is kept for the case that it comes again: one of each origin."""

READ_BUFFER = 2**16
"""Only the parser's mark for flow control; what bounds an answer is ``max_response``."""

NewParser: Any = HttpResponseParser
PARSER = (
    READ_BUFFER,
    None,
    HEADER_LINE_MOST,
    HEADERS_MOST,
    HEADER_LINE_MOST,
    ClientPayloadError,
    True,
    True,
    False,
)
"""By place, which is a microsecond cheaper: limit, timer, max_line_size, max_headers, max_field_size, payload_exception,
response_with_body, read_until_eof, auto_decompress.  ``reads_answers`` and the contract tests hold aiohttp to it."""

BROKEN = (HttpProcessingError, ClientPayloadError, ValueError, RuntimeError, AssertionError)
"""What aiohttp's parser and its stream raise for what is not HTTP."""

SPOKE_FIRST = "the receiver spoke before it was asked"

REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Asker(Protocol):
    """Who asks on a line, and is told what came of it, once."""

    request: Request
    outcome: Outcome
    deadline: float
    most: int
    """Bytes of the body that are kept."""
    location: str | None
    """Of a redirect."""

    def wrote(self) -> None:
        """The request is being written."""
        ...

    def answered(self) -> None:
        """An answer came, and is in the outcome."""
        ...

    def unanswered(self, kind: OutcomeKind, reason: str, *, resend: bool = False) -> None:
        """None came; ``resend``: the connection had been used before, and closed without a byte."""
        ...


class Repeated:
    """What one origin said last, as it came and as it was read: shared by all connections to it."""

    __slots__ = ("__weakref__", "answer", "header_text", "raw_headers", "read_as")

    def __init__(self) -> None:
        self.raw_headers: tuple[tuple[bytes, bytes], ...] = ()
        self.header_text = ""
        self.answer = b""
        """The last 2xx that came in one piece, whatever came since."""
        self.read_as: tuple[int, int, str, str] = (0, 0, "", "")
        """What it came to: the bound that it was read with, status, headers, body."""


class Pool(Protocol):
    """Where a line comes from, and goes when it may be asked again."""

    talking: set[Line]
    """The lines that are being asked."""
    generation: int
    """Counts changes of what may be called: a line of an earlier one is asked nothing more."""

    def keep(self, line: Line) -> None:
        """Keep a line whose answer was read to its end."""
        ...

    def ended(self) -> None:
        """One line has ended; said once of each."""
        ...


class Line(asyncio.Protocol):
    """A connection; at most one request at a time is under way on it."""

    __slots__ = (
        "_asker",
        "_ended",
        "_interim",
        "_loop",
        "_message",
        "_mono",
        "_parser",
        "_payload",
        "_pool",
        "_received",
        "_repeated",
        "_transport",
        "_written_mono",
        "descriptor",
        "generation",
        "idle_since",
        "origin",
        "spoke",
        "tls_ms",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        origin: str,
        pool: Pool,
        repeated: Repeated,
        mono: Callable[[], float],
        tls_ms: float | None = None,
    ) -> None:
        """Take over a connection that was just opened; ``tls_ms`` is what the handshake took."""
        self._pool = pool
        self._repeated = repeated
        self._transport = transport
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._mono = mono
        self._asker: Asker | None = None
        self._parser: Any = None
        self._message: Any = None
        self._payload: Any = None
        self._interim = 0
        self._received = 0
        self._written_mono = 0.0
        self.origin = origin
        self.idle_since = 0.0
        self.tls_ms = tls_ms
        self.generation = pool.generation
        self.spoke = False
        """It said something before it was asked."""
        self.descriptor: int = transport.get_extra_info("socket").fileno()
        transport.set_protocol(self)

    def __repr__(self) -> str:
        return f"<Line {self.origin} {'asked' if self._asker is not None else 'idle'}>"

    def closing(self) -> bool:
        """Whether it was closed: its descriptor may be another's by now."""
        return self._transport.is_closing()

    def ask(self, asker: Asker) -> None:
        """Write a request; ``asker`` is told of its end, later."""
        self._asker = asker
        self._message = self._payload = self._parser = None
        self._interim = self._received = 0
        self._pool.talking.add(self)
        asker.wrote()
        request = asker.request
        if len(request.body) <= ONE_WRITE_MOST:
            self._transport.write(request.head + request.lines + request.body)
        else:
            self._transport.writelines((request.head + request.lines, request.body))
        asker.outcome.sent = True
        self._written_mono = self._mono()

    def expire(self, now: float) -> None:
        """End what is under way if its time is up; when the head of an answer came, that counts."""
        asker = self._asker
        if asker is None or asker.deadline > now:
            return
        if self._message is not None:
            self._end_answered(whole=False)
        else:
            self._end_unanswered(OutcomeKind.TIMEOUT, "no answer in time")

    def drop(self) -> None:
        """End it without a word; nobody is told."""
        self._asker = None
        self._pool.talking.discard(self)
        self._end()

    # What the event loop says.

    def data_received(self, data: bytes) -> None:
        """Read on in the answer."""
        asker = self._asker
        if asker is None:
            self.spoke = True
            self.drop()
        elif data == self._repeated.answer and not self._received and asker.most == self._repeated.read_as[0]:
            self._end_repeated(asker)
        else:
            self._read(asker.most, data)

    def _read(self, most: int, data: bytes) -> None:
        self._received += len(data)
        if self._parser is None:
            # One for each answer: bytes that came behind the one before must not begin this one.
            self._parser = NewParser(self, self._loop, *PARSER)
        try:
            messages, upgraded, _ = self._parser.feed_data(data)
        except BROKEN:
            if self._message is None and self._received == len(data) and not self._heads_alone(data):
                return
            if self._message is not None:
                self._end_answered(whole=False)
            else:
                self._end_unanswered(OutcomeKind.MALFORMED, "the answer is not HTTP")
            return
        if messages and not self._heads(messages, upgraded):
            return
        payload = self._payload
        if payload is not None and payload.is_eof():
            self._end_answered(whole=True, piece=data if self._received == len(data) else b"")
        elif payload is not None and payload.total_bytes > most:
            self._end_answered(whole=False)
        elif self._received > most + BEYOND_BODY_MOST:
            if payload is not None:
                self._end_answered(whole=False)
            else:
                self._end_unanswered(OutcomeKind.MALFORMED, "the answer is not HTTP")

    def _heads_alone(self, data: bytes) -> bool:
        """
        Read an answer's head again, without what is behind it and could not be read; whether the conversation goes on.

        The parser that fails at a body tells nothing of the head that it has read when both came in one piece: a 204 with a
        body, a Content-Length that counts characters.
        """
        self._parser = NewParser(self, self._loop, *PARSER)
        start = 0
        for _ in range(INTERIM_MOST):
            end = data.find(HEAD_END, start) + len(HEAD_END)
            if end < len(HEAD_END) or self._message is not None:
                break
            try:
                messages, upgraded, _ = self._parser.feed_data(data[start:end])
            except BROKEN:
                break
            if messages and not self._heads(messages, upgraded):
                return False
            start = end
        return True

    def eof_received(self) -> None:
        """The other end has closed: so do we."""

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        if self._asker is None:
            self._end()
        elif self._message is not None:
            try:
                self._parser.feed_eof()
                whole = exc is None and self._payload.is_eof()
            except BROKEN:
                whole = False
            self._end_answered(whole=whole, lost=True)
        else:
            code = exc.errno if isinstance(exc, OSError) else None
            crossed = exc is None or code in (errno.ECONNRESET, errno.EPIPE)
            self._end_unanswered(
                OutcomeKind.CONNECTION_LOST,
                "the connection was closed before an answer"
                if exc is None
                else "the connection was reset before an answer",
                resend=crossed and not self._received,
            )

    def pause_reading(self) -> None:
        """The stream asks for it; nothing is paused, what is too large is cut off."""

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's signature
        """The other half."""

    # The answer.

    def _heads(self, messages: Any, upgraded: bool) -> bool:  # noqa: FBT001
        """Take what was parsed; whether the conversation goes on."""
        for message, payload in messages:
            if self._message is not None:
                # a second answer: the first one counts, the connection does not
                self._end_answered(whole=False)
                return False
            code = message.code
            if code < 200 or upgraded:
                self._interim += 1
                if code == 101 or upgraded or self._interim >= INTERIM_MOST:
                    self._end_unanswered(OutcomeKind.MALFORMED, "the answer is not one to a POST")
                    return False
                continue
            self._message = message
            self._payload = payload
            asker = self._asker
            assert asker is not None
            outcome = asker.outcome
            outcome.first_byte_ms = (self._mono() - self._written_mono) * 1000
            outcome.status = code
            repeated = self._repeated
            if message.raw_headers != repeated.raw_headers:
                repeated.raw_headers = message.raw_headers
                repeated.header_text = header_text(message.raw_headers)
            outcome.headers = repeated.header_text
            if code >= 300:
                outcome.retry_after = message.headers.get("Retry-After")
                if code in REDIRECTS:
                    asker.location = message.headers.get("Location")
        return True

    def _end_answered(self, *, whole: bool, lost: bool = False, piece: bytes = b"") -> None:
        """``piece``: the whole answer, if it came as one."""
        asker, message, payload = self._asker, self._message, self._payload
        assert asker is not None
        most, outcome = asker.most, asker.outcome
        body = payload.read_nowait(-1) if payload.total_bytes and payload.exception() is None else b""
        outcome.body = text = excerpt(body, most) if body else ""
        outcome.body_truncated = not whole or len(body) > most
        stays = whole and not lost and not message.should_close
        if stays and piece and len(piece) <= REPEATED_MOST and outcome.status < 300 and len(body) <= most:
            repeated = self._repeated
            repeated.answer, repeated.read_as = piece, (most, outcome.status, outcome.headers, text)
        self._hand_over(asker, stays=stays)

    def _end_repeated(self, asker: Asker) -> None:
        outcome = asker.outcome
        outcome.first_byte_ms = (self._mono() - self._written_mono) * 1000
        _, outcome.status, outcome.headers, outcome.body = self._repeated.read_as
        self._hand_over(asker, stays=True)

    def _hand_over(self, asker: Asker, *, stays: bool) -> None:
        self._asker = None
        self._pool.talking.discard(self)
        # an early answer may come before the request was fully written
        if stays and not self._transport.get_write_buffer_size():
            self._message = self._payload = self._parser = None
            self._pool.keep(self)
        else:
            self.drop()
        asker.answered()

    def _end_unanswered(self, kind: OutcomeKind, reason: str, *, resend: bool = False) -> None:
        asker = self._asker
        assert asker is not None
        self.drop()
        asker.unanswered(kind, reason, resend=resend)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._pool.ended()
        self._transport.abort()


def silent(lines: Sequence[Line]) -> list[bool]:
    """
    Which of these are open and have nothing to say; asked just before they are used.

    An idle connection that is readable is closing or lying.  One system call looks at all of them.
    """
    poll = select.poll()
    usable = [None if line.closing() else line.descriptor for line in lines]
    for descriptor in usable:
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN | select.POLLPRI)
    speaking = {descriptor for descriptor, _ in poll.poll(0)}
    return [descriptor is not None and descriptor not in speaking for descriptor in usable]


def reads_answers() -> bool:
    """Whether the installed aiohttp's parser does what is asked of it here."""
    try:
        parser = NewParser(Line.__new__(Line), object(), *PARSER)
        messages, upgraded, _ = parser.feed_data(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: b\r\n\r\nok")
        ((message, payload),) = messages
        return (
            not upgraded
            and (message.code, message.should_close) == (200, False)
            and message.raw_headers == ((b"Content-Length", b"2"), (b"X-A", b"b"))
            and message.headers.get("x-a") == "b"
            and payload.is_eof()
            and (payload.total_bytes, payload.exception(), payload.read_nowait(-1)) == (2, None, b"ok")
        )
    except (*BROKEN, TypeError, AttributeError):
        return False
