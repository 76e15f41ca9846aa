"""A receiver that does exactly what a test says, byte by byte."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass(slots=True)
class Call:
    """One request."""

    method: str
    path: str
    version: str
    headers: dict[str, str]
    body: bytes
    number: int
    """Counted from 1, in the order of arrival at this receiver."""
    raw_head: bytes

    @property
    def event_id(self) -> str:
        return self.headers["webhook-id"]


Handler = "Callable[[Call, asyncio.StreamWriter], Awaitable[bool | None]]"


def answer(status: int = 200, body: bytes = b"", **headers: str) -> bytes:
    """An ordinary answer."""
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def always(data: bytes) -> Callable[[Call, asyncio.StreamWriter], Awaitable[bool | None]]:
    """Answers every request alike."""

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return handle


class Receiver:
    """Listens on loopback; ``handle`` writes the answer, and returns True to end the connection."""

    def __init__(
        self,
        handle: Callable[[Call, asyncio.StreamWriter], Awaitable[bool | None]] | None = None,
        *,
        context: ssl.SSLContext | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        self.handle = handle or always(OK)
        self.calls: list[Call] = []
        self.connections = 0
        self._context = context
        self._address = address
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, self._address, self.port, ssl=self._context, backlog=1000
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    @property
    def url(self) -> str:
        scheme = "https" if self._context else "http"
        return f"{scheme}://{'localhost' if self._context else self._address}:{self.port}/hook"

    async def wait_for_calls(self, count: int, deadline_s: float = 30.0) -> None:
        async with asyncio.timeout(deadline_s):
            while len(self.calls) < count:
                await asyncio.sleep(0.01)

    async def wait_closed(self, deadline_s: float = 10.0) -> None:
        """Wait until it has closed all connections, and their ends have seen it."""
        async with asyncio.timeout(deadline_s):
            while self._tasks:
                await asyncio.sleep(0.005)
            await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self._writers.append(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, version = first.split(" ")
        headers = {}
        for line in lines:
            if line:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        call = Call(method, path, version, headers, body, len(self.calls) + 1, head)
        self.calls.append(call)
        done = await self.handle(call, writer)
        await writer.drain()
        return not done
