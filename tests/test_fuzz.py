"""Input of strangers, at random: the configuration loader, and the way of an answer from the socket to what is stored."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookd.config import SECTIONS, Config, ConfigInvalid, address_rules, parse
from hookd.core.model import Outcome, OutcomeKind
from hookd.net.answer import HEADERS_BYTES_MOST, excerpt, header_text
from hookd.net.line import HEADERS_MOST
from tests.fuzzing import TIMES, examples
from tests.net.test_exchange import exchange, request
from tests.receiver import Call, Receiver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hookd.net.exchange import HttpExchange

# The configuration.

VALUES = st.one_of(
    st.text(max_size=20), st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.dates(), st.times(),
    st.sampled_from([
        "5s", "1d", "0ms", "16KiB", "never", "10.0.0.0/8", "::/0", "64:ff9b::/96", "10.0.0.1/8", "127.0.0.1:8440", "[::1]:1",
        "0.0.0.0:1", ":", "[", "]", "%", "\x00", "postgresql://u:p@h/d", "embedded", "https://x.example/{event_id}", "/dev/null",
        "fe80::%eth0/64", "::ffff:1.2.3.4/128", "²", "1" * 400, "9" * 30 + "d",
    ]),
)  # fmt: skip
VALUES_NESTED = st.recursive(
    VALUES,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3),
    max_leaves=5,
)
KEYS = [(section, key) for section, kind in SECTIONS.items() for key in get_type_hints(kind)]


def _read(text: str, environment: dict[str, str]) -> Config | None:
    try:
        config = parse(text, "config.toml", environment).config
    except ConfigInvalid as problem:
        assert problem.mistakes
        assert all(m.message and m.where for m in problem.mistakes)
        return None
    # what was accepted can be used
    address_rules(config.network, frozenset())
    config.retry_policy()
    config.default_limits()
    config.host_limits()
    config.admin_address()
    return config


@examples(300)
@given(st.text(max_size=300))
def test_no_text_breaks_the_configuration_loader(text: str) -> None:
    _read(text, {})


@examples(500)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES_NESTED, max_size=4))
def test_no_value_breaks_the_configuration_loader(values: dict[tuple[str, str], Any]) -> None:
    lines = [f"{section}.{key} = {_toml(value)}" for (section, key), value in values.items()]
    _read("\n".join(lines), {})
    _read("", {f"HOOKD_{section}__{key}".upper(): _toml(value) for (section, key), value in values.items()})
    _read("", {f"HOOKD_{section}__{key}".upper(): str(value) for (section, key), value in values.items()})


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return str(value)


@examples(300)
@given(st.dictionaries(st.text(max_size=30).map(lambda t: "HOOKD_" + t), st.text(max_size=30), max_size=4))
def test_no_environment_breaks_the_configuration_loader(environment: dict[str, str]) -> None:
    _read("", environment)


# Answers.


def _storable(text: str) -> bool:
    text.encode("utf-8")
    return "\x00" not in text


@examples(500)
@given(
    st.binary(max_size=300),
    st.integers(0, 300),
    st.lists(st.tuples(st.binary(max_size=50), st.binary(max_size=9000)), max_size=80),
)
def test_what_is_kept_of_an_answer_is_bounded_and_storable(
    body: bytes, most: int, headers: list[tuple[bytes, bytes]]
) -> None:
    kept = excerpt(body, most)
    assert _storable(kept)
    assert len(kept) <= most
    text = header_text(headers)
    assert _storable(text)
    assert len(text) <= HEADERS_BYTES_MOST + len(": ***\n") * len(headers)
    lines = text.split("\n") if text else []
    assert len(lines) <= len(headers), "no value makes a line of its own"
    assert not any(c < " " for line in lines for c in line)


PIECES = st.one_of(
    st.sampled_from([
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 204 No\r\n", b"HTTP/1.1 304 N\r\n", b"HTTP/1.1 100 C\r\n\r\n",
        b"HTTP/1.1 101 S\r\nupgrade: x\r\nconnection: upgrade\r\n", b"HTTP/1.1 999 X\r\n", b"HTTP/1.1 99 X\r\n", b"HTTP/2 200\r\n",
        b"HTTP/9.9 200 OK\r\n", b"HTTP/1.1 2000 X\r\n", b"HTTP/1.1 \r\n", b"content-length: 2\r\n", b"content-length: 0\r\n",
        b"Content-Length: 5\r\n", b"content-length: -1\r\n", b"content-length: 99999999999999999999\r\n", b"content-length: 2, 2\r\n",
        b"content-length: +2\r\n", b"content-length : 2\r\n", b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip, chunked\r\n",
        b"transfer-encoding: chunked, identity\r\n", b"Transfer-Encoding: xchunked\r\n", b"content-encoding: gzip\r\n",
        b"connection: close\r\n", b"connection: keep-alive\r\n", b"retry-after: 1\r\n", b"x: \x00\r\n", b"x: \xff\xfe\r\n", b" folded\r\n",
        b"x:y\n", b": empty\r\n", b"set-cookie: secret\r\n", b"x: " + b"a" * 9000 + b"\r\n", b"x: y\r\n" * 70,
        b"\r\n", b"\n", b"\r", b"ok", b"2\r\nok\r\n", b"0\r\n\r\n", b"2;ext=1\r\nok\r\n", b"g\r\n", b"ffffffffffffffff\r\n", b"-1\r\n", b"0\r\nt: r\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nEVIL", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"\x1f\x8b\x08\x00", b"\x00",
    ]),
    st.binary(max_size=30),
)  # fmt: skip
ANSWERS = st.lists(PIECES, max_size=12).map(b"".join)


class Laboratory:
    """An exchange and a receiver on a loop that goes on from one example to the next."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.receiver = Receiver(self.handle)
        self.answer = b""
        self.then_close = True
        self.runner.run(self.open())

    async def open(self) -> None:
        await self.stack.enter_async_context(self.receiver)
        self.http: HttpExchange = await self.stack.enter_async_context(exchange(max_response=1024))

    async def handle(self, call: Call, writer: asyncio.StreamWriter) -> bool:
        if call.path == "/honest":
            body = b"honest %d" % call.number
            writer.write(b"HTTP/1.1 201 Created\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            return False
        writer.write(self.answer)
        return self.then_close

    async def attempt(self) -> tuple[Outcome, Outcome, int]:
        base = f"http://127.0.0.1:{self.receiver.port}"
        async with asyncio.timeout(5):
            first = await self.http.send(request(f"{base}/hostile", timeout_s=0.25))
        second = await self.http.send(request(f"{base}/honest"))
        return first, second, self.receiver.calls[-1].number

    def close(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    made = Laboratory()
    yield made
    made.close()


@pytest.mark.timeout(0 if TIMES > 1 else 120)
def test_no_answer_breaks_the_exchange_or_answers_somebody_else(laboratory: Laboratory) -> None:
    @examples(300)
    @given(ANSWERS, st.booleans())
    def fuzz(answer: bytes, then_close: bool) -> None:
        laboratory.answer, laboratory.then_close = answer, then_close
        first, second, number = laboratory.runner.run(laboratory.attempt())
        assert first.kind in (
            OutcomeKind.ANSWERED, OutcomeKind.MALFORMED, OutcomeKind.CONNECTION_LOST, OutcomeKind.TIMEOUT,
        )  # fmt: skip
        assert (first.status != 0) == (first.kind is OutcomeKind.ANSWERED)
        assert first.status == 0 or 200 <= first.status <= 999
        assert _storable(first.body + first.reason + first.headers)
        assert len(first.body) <= 1024
        assert len(first.headers.splitlines()) <= HEADERS_MOST
        assert first.total_ms < 5000
        assert "secret" not in first.headers
        assert (second.kind, second.status, second.body) == (OutcomeKind.ANSWERED, 201, f"honest {number}")
        laboratory.receiver.calls.clear()

    fuzz()
