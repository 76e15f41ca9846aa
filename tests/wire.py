"""What stands between a daemon and PostgreSQL, and does to the messages what a test says."""

from __future__ import annotations

import asyncio
import struct
from typing import Self

NOTIFICATION = b"A"
COMMITTED = b"C", b"COMMIT\x00"


class Wire:
    """A proxy on loopback."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.deaf = False
        """Notifications do not get through."""
        self.lose_commits = 0
        """So often the answer to a COMMIT is lost, and its connection with it."""
        self.port = 0
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def hold(self) -> None:
        """Let nothing through, and close nothing either."""
        self._open.clear()

    def release(self) -> None:
        """Let all through, and what was held first."""
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            there, to_there = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        pumps = [
            asyncio.ensure_future(self._requests(reader, to_there)),
            asyncio.ensure_future(self._answers(there, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # the streams' callback would report it
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            writer.transport.abort()
            to_there.transport.abort()
            self._tasks.discard(task)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._open.wait()
            writer.write(data)
            await writer.drain()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readexactly(5)
            body = await reader.readexactly(struct.unpack(">I", head[1:])[0] - 4)
            await self._open.wait()
            if self.lose_commits and (head[:1], body) == COMMITTED:
                self.lose_commits -= 1
                return
            if not (self.deaf and head[:1] == NOTIFICATION):
                writer.write(head + body)
                await writer.drain()
