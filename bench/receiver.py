"""
A lean receiver: answers every POST with an empty 200, and nothing else; about 15 µs of CPU a request.

    python bench/receiver.py PORTS

listens on so many ports of 127.0.0.1 and prints them as JSON.  ``GET /stats`` says how many requests came, when the first
and the last did (monotonic clock), and when each ``webhook-id`` of a ``/timed`` path did; it resets them.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import cast

import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
ID = re.compile(rb"\r\nwebhook-id: ([^\r]+)", re.IGNORECASE)


class Tally:
    """What came."""

    def __init__(self) -> None:
        self.count = 0
        self.first = 0.0
        self.last = 0.0
        self.timed: dict[str, float] = {}


class Protocol(asyncio.Protocol):
    tally = Tally()

    def __init__(self) -> None:
        self.buffer = b""

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
            now = time.monotonic()
            tally = Protocol.tally
            if not tally.count:
                tally.first = now
            tally.last = now
            tally.count += 1
            if buffer.startswith(b"POST /timed"):
                found = ID.search(buffer, 0, end)
                assert found is not None
                tally.timed[found[1].decode()] = now
            self.transport.write(ANSWER)
            buffer = buffer[total:]
        self.buffer = buffer


async def main(ports: int) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Protocol, "127.0.0.1", 0, backlog=4096) for _ in range(ports)]
    print(json.dumps([s.sockets[0].getsockname()[1] for s in servers]), flush=True)
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
