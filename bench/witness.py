"""
The receiver that torture.py believes: it writes down all that it saw, and nothing else counts.

    python bench/witness.py LOG SECRET [--tls CERTIFICATE-AND-KEY.pem]

Prints its ports as JSON: plain, TLS (or 0), and that of its control.  Every request is checked against SECRET (an independent
HMAC of the Standard Webhooks signature) and noted in LOG, which holds nothing but RECORD after RECORD.  The control takes a
JSON object a line: ``{"hold_ms": [200, 300], "fail": 0.05}`` changes how requests to ``/hook`` are answered, ``{}`` changes
nothing; each line is answered with the length of the log, of which then nothing is held back, and by how much a timer was late
at most since the last one, and how many requests have come: a request may be noted so much later than it came.

``/forge/VARIANT`` is for one request at a time: the receiver's own answer is a 500 to the first attempt of some, and
around it goes what it never meant as an answer to anything; see FORGERIES.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hmac
import json
import random
import re
import ssl
import struct
import time
from pathlib import Path
from typing import BinaryIO, ClassVar, cast
from uuid import UUID

import uvloop

RECORD = struct.Struct("<cdIH16sHHQ")
"""What, when (monotonic), connection, host, webhook-id, attempt, status, the payload's number."""

MADE, LOST, OPENED, ANSWERED, BAD = b"m", b"x", b"o", b"a", b"!"
"""A connection was made; lost; a whole request was read; its answer was written; one was not signed as it should be."""

HEAD = b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n"
OK = HEAD % 200
NUMBER = re.compile(rb'"n" ?: ?(\d+)')
HOST = re.compile(rb"h(\d+)\.")

FAILS = 2
"""The first attempt of one event in so many is answered with a 500: whatever is forged is a 200."""

CROSSED_S = 0.3
"""A lie is judged that was there for so long before the request was read, however late this process may have been."""

FORGERIES = {
    "doubled": "two answers in one write: the second waits for the next request",
    "late": "a second answer up to 200 ms later, while the connection idles",
    "soon": "a second answer in the next turn of the event loop, when the next request may be on its way",
    "first": "an answer at once on every new connection, before it is asked anything",
    "half": "the first bytes of a second answer, the rest up to 200 ms later",
}


class Witness:
    """What all connections share."""

    log: BinaryIO
    secret = b""
    hold_ms: ClassVar[list[float]] = [0.0, 0.0]
    fail = 0.0
    dice = random.Random(1)
    connections = 0
    opened = 0
    noted = 0
    late = 0.0
    buffer = bytearray()

    @classmethod
    def note(cls, what: bytes, connection: int, host: int, id_: bytes, attempt: int, status: int, number: int) -> None:  # fmt: skip
        cls.buffer += RECORD.pack(
            what, time.monotonic(), connection, host, id_, attempt, status, number & 0xFFFFFFFFFFFFFFFF
        )
        if len(cls.buffer) > 1 << 18:
            cls.flush()

    @classmethod
    def flush(cls) -> int:
        cls.log.write(cls.buffer)
        cls.log.flush()
        cls.noted += len(cls.buffer)
        cls.buffer.clear()
        return cls.noted


class Protocol(asyncio.Protocol):
    def __init__(self) -> None:
        self.buffer = b""
        self.loop = asyncio.get_running_loop()
        self.to_push: asyncio.Handle | None = None
        self.pushed = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        Witness.connections += 1
        self.number = Witness.connections
        Witness.note(MADE, self.number, 0, bytes(16), 0, 0, 0)

    def connection_lost(self, _exc: Exception | None) -> None:
        Witness.note(LOST, self.number, 0, bytes(16), 0, 0, 0)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            first, *lines = self.buffer[:end].split(b"\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)
            }
            total = end + 4 + int(headers.get(b"content-length", b"0"))
            if len(self.buffer) < total:
                return
            body, self.buffer = self.buffer[end + 4 : total], self.buffer[total:]
            self.take(first.split(b" ")[1].decode(), headers, body)

    def take(self, path: str, headers: dict[bytes, bytes], body: bytes) -> None:
        name = headers[b"webhook-id"]
        id_ = UUID(name.decode()).bytes
        attempt = int(headers[b"hookd-attempt"])
        host = HOST.match(headers[b"host"])
        number = NUMBER.search(body)
        about = (int(host[1]) if host else 0, id_, attempt)
        n = int(number[1]) if number else 0
        signed = hmac.digest(
            Witness.secret, b"%b.%b.%b" % (name, headers[b"webhook-timestamp"], body), "sha256"
        )
        if b"v1," + base64.b64encode(signed) not in headers[b"webhook-signature"].split(b" "):
            Witness.note(BAD, self.number, *about, 0, n)
        Witness.note(OPENED, self.number, *about, 0, n)
        Witness.opened += 1
        if path.startswith("/forge/"):
            if self.to_push is not None:
                self.to_push.cancel()  # it lies only while it is not asked
            # a lie that may have crossed this request on the wire cannot be told from its answer, by anybody
            there = time.monotonic() - self.pushed > CROSSED_S
            status = 500 if attempt == 1 and id_[-1] % FAILS == 0 and there else 200
            self.forge(path.removeprefix("/forge/"), status, about, n)
            return
        status = 500 if Witness.fail and Witness.dice.random() < Witness.fail else 200
        least, most = Witness.hold_ms
        if most:
            self.loop.call_later(Witness.dice.uniform(least, most) / 1000, self.answer, status, about, n)
        else:
            self.answer(status, about, n)

    def answer(self, status: int, about: tuple[int, bytes, int], n: int, more: bytes = b"") -> None:
        if self.transport.is_closing():
            return
        Witness.note(ANSWERED, self.number, *about, status, n)
        self.transport.write(HEAD % status + more)

    def push(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.pushed = time.monotonic()
            self.transport.write(data)

    def forge(self, variant: str, status: int, about: tuple[int, bytes, int], n: int) -> None:
        if variant == "doubled":
            self.pushed = time.monotonic()
            self.answer(status, about, n, OK)
            return
        self.answer(status, about, n)
        later = Witness.dice.uniform(0.0005, 0.2)
        if variant == "late":
            self.to_push = self.loop.call_later(later, self.push, OK)
        elif variant == "soon":
            self.to_push = self.loop.call_soon(self.push, OK)
        elif variant == "half":
            self.push(OK[:9])
            self.to_push = self.loop.call_later(later, self.push, OK[9:])


class Forward(Protocol):
    """On the port of its own of the variant ``first``: speaks before it is asked."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.to_push = self.loop.call_later(Witness.dice.choice((0.0, 0.0005, 0.002)), self.push, OK)


async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        wanted = json.loads(line)
        Witness.hold_ms = wanted.get("hold_ms", Witness.hold_ms)
        Witness.fail = wanted.get("fail", Witness.fail)
        size, late = Witness.flush(), Witness.late
        Witness.late = 0.0
        writer.write(json.dumps({"size": size, "late_s": late, "opened": Witness.opened}).encode() + b"\n")
    writer.close()


async def tick() -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.002)
        Witness.late = max(Witness.late, time.monotonic() - before - 0.002)


async def main(given: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    Witness.log = Path(given.log).open("wb")  # noqa: SIM115 - it stays open for as long as this runs
    Witness.secret = base64.b64decode(given.secret.removeprefix("whsec_"))
    context = None
    if given.tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(given.tls)
    ports = {}
    for name, protocol in (("hook", Protocol), ("first", Forward)):
        server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=4096)
        ports[name] = server.sockets[0].getsockname()[1]
        if context is not None:
            server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=4096, ssl=context)
            ports[name + "-tls"] = server.sockets[0].getsockname()[1]
    asked = await asyncio.start_server(control, "127.0.0.1", 0)
    ports["control"] = asked.sockets[0].getsockname()[1]
    print(json.dumps(ports), flush=True)
    await tick()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("log")
    parser.add_argument("secret")
    parser.add_argument("--tls", default="")
    uvloop.run(main(parser.parse_args()))
