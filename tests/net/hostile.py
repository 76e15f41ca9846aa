"""
Receivers that mean harm, in a process of their own so that what they cost is not counted as hookd's.

Run as ``python -m tests.net.hostile``; prints its HTTP and its TLS port.  The path of a request names what it gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
BLOCK = b"a" * 65536

PAUSE_S = 0.1

STEP_S = 0.02
"""Between the bytes of a slow answer."""


def _for_ever(data: bytes) -> Iterator[bytes]:
    while True:
        yield data


PAUSE = b""
"""Between what has to arrive apart."""


def endless(first: bytes, then: bytes) -> Iterator[bytes]:
    """Something, and something else without end."""
    yield first
    yield PAUSE
    yield from _for_ever(then * max(1, 65536 // len(then)))


def bomb() -> Iterator[bytes]:
    """A gigabyte in a megabyte, as one honest answer."""
    data = gzip.compress(bytes(2**24), 9) * 64
    yield HEAD + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(data)
    yield data


def apart(*parts: bytes) -> Iterator[bytes]:
    """Some bytes, a while later others, and silence on an open connection."""
    for part in parts:
        yield part
        yield PAUSE


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "a header of 100 MB": lambda: endless(HEAD + b"x: ", b"a"),
    "headers without end": lambda: endless(HEAD, b"x-header: value\r\n"),
    "10,000 headers": lambda: apart(HEAD + b"x: y\r\n" * 10_000 + b"content-length: 0\r\n\r\n"),
    "a header name without end": lambda: endless(HEAD, b"a"),
    "a status line without end": lambda: endless(b"HTTP/1.1 200 ", b"a"),
    "folded lines without end": lambda: endless(HEAD + b"x: y\r\n", b" folded\r\n"),
    "no HTTP at all": lambda: endless(b"\x00\xff", b"\x00\xff\n"),
    "empty lines without end": lambda: endless(b"\r\n", b"\r\n"),
    "chunks without end": lambda: endless(CHUNKED, b"10000\r\n" + BLOCK + b"\r\n"),
    "tiny chunks without end": lambda: endless(CHUNKED, b"1\r\na\r\n"),
    "a chunk extension without end": lambda: endless(CHUNKED + b"1;", b"a"),
    "a chunk size without end": lambda: endless(CHUNKED, b"0"),
    "a bad chunk": lambda: apart(CHUNKED + b"1\r\na\r\n", b"zzz\r\n"),
    "a bad chunk at once": lambda: apart(CHUNKED, b"zzz\r\n"),
    "trailers without end": lambda: endless(CHUNKED + b"1\r\na\r\n0\r\n", b"x: y\r\n"),
    "a trailer of 100 MB": lambda: endless(CHUNKED + b"1\r\na\r\n0\r\nx: ", b"a"),
    "100 Continue without end": lambda: endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "103 Early Hints without end": lambda: endless(b"", b"HTTP/1.1 103 E\r\nlink: </x>; rel=preload\r\n\r\n"),
    "a body without end": lambda: endless(HEAD + b"\r\n", b"a"),
    "a body of 8 EB": lambda: endless(HEAD + b"content-length: 9223372036854775807\r\n\r\n", b"a"),
    "a gzip bomb": bomb,
    "an error page without end": lambda: endless(b"HTTP/1.1 500 X\r\n\r\n", b"a"),
    "answers without end": lambda: endless(b"", HEAD + b"content-length: 2\r\n\r\nok"),
    "a 204 with a body without end": lambda: endless(b"HTTP/1.1 204 No\r\n\r\n", b"a"),
    "101 and another protocol": lambda: endless(
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", b"a"
    ),
}

SMUGGLING = {
    "two answers": HEAD + b"content-length: 2\r\n\r\nok" + HEAD + b"content-length: 4\r\nx-forged: yes\r\n\r\nEVIL",
    "a 204 with a body": b"HTTP/1.1 204 No\r\ncontent-length: 0\r\n\r\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a 304 with a body": b"HTTP/1.1 304 No\r\n\r\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "length and chunks": HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "chunks and length": HEAD + b"transfer-encoding: chunked\r\ncontent-length: 100\r\n\r\n2\r\nok\r\n0\r\n\r\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "two lengths": HEAD + b"content-length: 2\r\ncontent-length: 60\r\n\r\nok" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "two lengths in one": HEAD + b"content-length: 2, 60\r\n\r\nok" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a negative length": HEAD + b"content-length: -1\r\n\r\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a length with a sign": HEAD + b"content-length: +2\r\n\r\nok" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a length in hex": HEAD + b"content-length: 0x2\r\n\r\nok" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a blank before the colon": HEAD + b"content-length : 2\r\n\r\nok" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a misspelt coding": HEAD + b"transfer-encoding: xchunked\r\ncontent-length: 2\r\n\r\nok" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a folded coding": HEAD + b"transfer-encoding:\r\n chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a chunk size too large": CHUNKED + b"fffffffffffffffff1\r\na\r\n0\r\n\r\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a chunk without its end": CHUNKED + b"2\r\nok0\r\n\r\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a bare LF after a chunk": CHUNKED + b"2\nok\n0\n\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "a 100 and two answers": b"HTTP/1.1 100 C\r\n\r\n" + HEAD + b"content-length: 2\r\n\r\nok" + HEAD + b"content-length: 4\r\n\r\nEVIL",
    "bytes after the end": HEAD + b"content-length: 2\r\n\r\nokEVIL",
    "an answer in the trailer": CHUNKED + b"2\r\nok\r\n0\r\nx: y\r\n\r\n" + HEAD + b"content-length: 4\r\n\r\nEVIL",
}  # fmt: skip

SLOW = {
    "a slow status line": b"HTTP/1.1 200 OK" + b"K" * 10_000,
    "slow headers": HEAD + b"x: y\r\n" * 10_000,
    "a slow body": HEAD + b"content-length: 100000\r\n\r\n" + b"a" * 100_000,
    "slow chunks": CHUNKED + b"1\r\na\r\n" * 10_000,
    "slow interim answers": b"HTTP/1.1 100 C\r\n\r\n" * 10_000,
    "silence": b"",
}


async def _drip(data: bytes) -> AsyncIterator[bytes]:
    # whole lines where there are any: a slow one has to look like progress
    for n in range(len(data)):
        yield data[n : n + 1]
        await asyncio.sleep(STEP_S)
    await asyncio.sleep(3600)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
            )
            await reader.readexactly(length)
            name = head.split(b" ")[1].decode().rpartition("/")[2].replace("_", " ")
            if name == "honest":
                writer.write(HEAD + b"content-length: 6\r\n\r\nhonest")
            elif name in FLOODS:
                for data in FLOODS[name]():
                    if data == PAUSE:
                        await asyncio.sleep(PAUSE_S)
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(0)
            elif name in SMUGGLING:
                writer.write(SMUGGLING[name])
            elif name == "a flood after the answer":
                writer.write(HEAD + b"content-length: 2\r\n\r\nok")
                await asyncio.sleep(0.2)
                for data in endless(b"", HEAD + b"content-length: 2\r\n\r\nok"):
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(0)
            else:
                async for data in _drip(SLOW[name]):
                    writer.write(data)
                    await writer.drain()
            await writer.drain()
    writer.transport.abort()


async def _tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A TLS handshake that never ends: a certificate of 16 MB, byte by byte."""
    with contextlib.suppress(OSError):
        await reader.read(1)
        writer.write(b"\x16\x03\x03\x40\x00\x0b\xff\xff\xff")
        while True:
            writer.write(b"\x00")
            await writer.drain()
            await asyncio.sleep(STEP_S)
    writer.transport.abort()


async def _main() -> None:
    plain = await asyncio.start_server(_serve, "127.0.0.1", 0, backlog=1000)
    tls = await asyncio.start_server(_tls, "127.0.0.1", 0, backlog=1000)
    print(plain.sockets[0].getsockname()[1], tls.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - whoever started it reads it
    # ends with whoever started it
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    plain.close()
    tls.close()


@contextlib.contextmanager
def started() -> Iterator[tuple[int, int]]:
    """Them in a process of their own: the HTTP and the TLS port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.net.hostile"],
        cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    plain, tls = map(int, process.stdout.readline().split())
    try:
        yield plain, tls
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    asyncio.run(_main())
