"""
A lean receiver: answers every POST with an empty 200 in about 11 µs of CPU, or misbehaves as the path says.

    python bench/receiver.py PORTS [--listen 127.0.0.1] [--tls CERTIFICATE-AND-KEY.pem]

listens on so many ports, and on one more with TLS where it has a certificate, and prints them as JSON.  A body is skipped
by its length, and looked at only where the path asks for it.  On another machine, for ``--target``, ``--listen`` gives
the address; what asks for ``GET /stats`` there may also send load, so let nobody else reach it.

| path | does |
| --- | --- |
| ``/each`` | 200, with one header more, a number of its own: no two answers are alike |
| ``/timed`` | 200; notes when each ``webhook-id`` came |
| ``/lag`` | 200; notes how long ago the payload's ``"at"`` was (wall clock) |
| ``/paced?ms=N`` | 200 after N ms; notes when each request of each host came, and how many were under way at once |
| ``/later?s=N`` | 200 after N seconds; notes how many were under way at once |
| ``/aside`` | 200; is not counted |
| ``/hole`` | never answers |
| ``/fail`` | 500 |
| ``/drip`` | an answer's head at one byte a second |

``GET /stats`` says what came since it was asked last, on the monotonic clock; what the clocks say now; and the CPU that
was used, and waited for, so far.  From the first ``/paced`` on it also says how late a timer of 1 ms fired: a request
may be noted so much later than it came.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import ssl
import time
from collections import defaultdict
from typing import ClassVar, cast

import uvloop
from cores import used

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
NUMBERED = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-request-id: %d\r\n\r\n"
FAILED = b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
ID = re.compile(rb"\r\nwebhook-id: ([^\r]+)", re.IGNORECASE)
HOST = re.compile(rb"\r\nhost: ([^\r]+)", re.IGNORECASE)
AT = re.compile(rb'"at" ?: ?([\d.]+)')
NUMBER = re.compile(rb"=(\d+)")


class Tally:
    """What came."""

    def __init__(self) -> None:
        self.count = 0
        self.first = 0.0
        self.last = 0.0
        self.timed: dict[str, float] = {}
        self.lags: list[float] = []
        self.others = 0
        self.paced: dict[str, list[float]] = defaultdict(list)
        self.most: dict[str, int] = defaultdict(int)
        self.late: list[float] = []


class Protocol(asyncio.Protocol):
    tally = Tally()
    under_way: ClassVar[dict[str, int]] = defaultdict(int)
    ticking = False
    ports: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.buffer = b""
        self.skip = 0
        """Bytes of a plain request's body that are still to come."""
        self.numbered = False
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        if self.skip:
            if len(data) < self.skip:
                self.skip -= len(data)
                return
            data = data[self.skip :]
            self.skip = 0
            self.plain()
        buffer = self.buffer + data if self.buffer else data
        while buffer:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                break
            if buffer.startswith(b"GET /stats"):
                body = self.stats()
                self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
                buffer = buffer[end + 4 :]
                continue
            length = LENGTH.search(buffer, 0, end)
            total = end + 4 + (int(length[1]) if length else 0)
            if buffer.startswith((b"POST /hook ", b"POST /each ")):
                self.numbered = buffer.startswith(b"POST /each ")
                if len(buffer) < total:
                    self.skip = total - len(buffer)
                    buffer = b""
                    break
                self.plain()
            elif len(buffer) < total:
                break
            else:
                self.take(buffer, end, total)
            buffer = buffer[total:]
        self.buffer = buffer

    def plain(self) -> None:
        tally = Protocol.tally
        tally.last = time.monotonic()
        if not tally.count:
            tally.first = tally.last
        tally.count += 1
        self.transport.write(NUMBERED % tally.count if self.numbered else ANSWER)

    @staticmethod
    def stats() -> bytes:
        tally, Protocol.tally = Protocol.tally, Tally()
        spent = used()
        now = {
            "mono": time.monotonic(),
            "wall": time.time(),
            "cpu_s": spent.cpu_s,
            "waited_s": spent.waited_s,
        }
        return json.dumps(vars(tally) | {"now": now, "ports": Protocol.ports}).encode()

    def take(self, request: bytes, end: int, total: int) -> None:
        now = time.monotonic()
        tally = Protocol.tally
        path = request[5:9]
        if path in (b"/asi", b"/hol", b"/fai", b"/dri"):
            tally.others += 1
            if path == b"/asi":
                self.transport.write(ANSWER)
            elif path == b"/fai":
                self.transport.write(FAILED)
            elif path == b"/dri":
                self.drip(0)
            return
        if not tally.count:
            tally.first = now
        tally.last = now
        tally.count += 1
        if path == b"/lag":
            found = AT.search(request, end, total)
            assert found is not None
            tally.lags.append(time.time() - float(found[1]))
        elif path == b"/tim":
            found = ID.search(request, 0, end)
            assert found is not None
            tally.timed[found[1].decode()] = now
        elif path == b"/pac":
            self.paced(request, now)
            return
        elif path == b"/lat":
            number = NUMBER.search(request, 0, end)
            assert number is not None
            self.begin("later")
            self.loop.call_later(int(number[1]), self.answer, "later")
            return
        self.transport.write(ANSWER)

    def paced(self, request: bytes, now: float) -> None:
        host = HOST.search(request)
        number = NUMBER.search(request)
        assert host is not None
        assert number is not None
        name = host[1].decode()
        Protocol.tally.paced[name].append(now)
        self.begin(name)
        self.loop.call_later(int(number[1]) / 1000, self.answer, name)
        if not Protocol.ticking:
            Protocol.ticking = True
            tick(self.loop, None)

    def begin(self, name: str) -> None:
        Protocol.under_way[name] += 1
        Protocol.tally.most[name] = max(Protocol.tally.most[name], Protocol.under_way[name])

    def answer(self, name: str) -> None:
        Protocol.under_way[name] -= 1
        self.transport.write(ANSWER)

    def drip(self, sent: int) -> None:
        if sent < len(ANSWER) and not self.transport.is_closing():
            self.transport.write(ANSWER[sent : sent + 1])
            self.loop.call_later(1.0, self.drip, sent + 1)


def tick(loop: asyncio.AbstractEventLoop, before: float | None) -> None:
    now = time.monotonic()
    if before is not None:
        Protocol.tally.late.append(max(0.0, now - before - 0.001))
    loop.call_later(0.001, tick, loop, now)


async def main(given: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    contexts: list[ssl.SSLContext | None] = [None] * given.ports
    if given.tls:
        encrypted = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        encrypted.load_cert_chain(given.tls)
        contexts.append(encrypted)
    for context in contexts:
        server = await loop.create_server(Protocol, given.listen, 0, backlog=4096, ssl=context)
        Protocol.ports.append(server.sockets[0].getsockname()[1])
    print(json.dumps(Protocol.ports), flush=True)
    await loop.create_future()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("ports", type=int)
    parser.add_argument("--listen", default="127.0.0.1")
    parser.add_argument("--tls", default="")
    uvloop.run(main(parser.parse_args()))
