"""
A lean receiver: answers every POST with an empty 200 in about 15 µs of CPU, or misbehaves as the path says.

    python bench/receiver.py PORTS

listens on so many ports of 127.0.0.1 and prints them as JSON.

| path | does |
| --- | --- |
| ``/timed`` | 200; notes when each ``webhook-id`` came |
| ``/lag`` | 200; notes how long ago the payload's ``"at"`` was (wall clock) |
| ``/paced?ms=N`` | 200 after N ms; notes when each request of each host came, and how many were under way at once |
| ``/later?s=N`` | 200 after N seconds; notes how many were under way at once |
| ``/aside`` | 200; is not counted |
| ``/hole`` | never answers |
| ``/fail`` | 500 |
| ``/drip`` | an answer's head at one byte a second |

``GET /stats`` says what came since it was asked last, on the monotonic clock.  From the first ``/paced`` on it
also says how late a timer of 1 ms fired: a request may be noted so much later than it came.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import defaultdict
from typing import ClassVar, cast

import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
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

    def __init__(self) -> None:
        self.buffer = b""
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer + data if self.buffer else data
        while True:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                break
            if buffer.startswith(b"GET /stats"):
                tally, Protocol.tally = Protocol.tally, Tally()
                body = json.dumps(vars(tally)).encode()
                self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
                buffer = buffer[end + 4 :]
                continue
            length = LENGTH.search(buffer, 0, end)
            total = end + 4 + (int(length[1]) if length else 0)
            if len(buffer) < total:
                break
            self.take(buffer, end, total)
            buffer = buffer[total:]
        self.buffer = buffer

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


async def main(ports: int) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Protocol, "127.0.0.1", 0, backlog=4096) for _ in range(ports)]
    print(json.dumps([s.sockets[0].getsockname()[1] for s in servers]), flush=True)
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
