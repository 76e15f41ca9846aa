"""
A receiver for development: takes webhooks, says whether their signatures hold, and misbehaves on request.

``hookd listen`` prints what it is told here, ``hookd demo`` counts it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web

from hookd.core.challenge import challenge_in
from hookd.core.signing import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BODY_MOST = 16 * 1024 * 1024

FORWARD_TIMEOUT_S = 30.0

NOT_FORWARDED = frozenset({"host", "content-length", "transfer-encoding", "connection", "accept-encoding"})


@dataclass(slots=True)
class Received:
    """One request, as it came and as it was answered."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = field(repr=False)
    signed: bool | None
    """None: there is no secret to check it with."""
    problem: str
    """What is wrong with the signature."""
    status: int = 200
    forwarded_to: str = ""


@dataclass(frozen=True, slots=True)
class Manners:
    """How a receiver behaves."""

    status: int = 200
    fail_rate: float = 0.0
    """Share of requests that are answered with 500."""
    delay_s: float = 0.0
    relents_after: int | None = None
    """After so many requests ``status`` gives way to 200."""
    forward_to: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Receiver:
    """An HTTP server on loopback."""

    def __init__(
        self,
        manners: Manners,
        secrets: Sequence[str],
        received: Callable[[Received], None],
        *,
        wall: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        self._manners = manners
        self._secrets = list(secrets)
        self._received = received
        self._wall = wall
        self._draw = draw
        self._taken = 0
        self.next_statuses: deque[int] = deque()
        """What the next requests are answered with, whatever the manners say; then it is as before."""
        self._runner: web.AppRunner | None = None
        self._client: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"<Receiver {self._manners!r}>"

    async def start(self, port: int, host: str = "127.0.0.1") -> int:
        """Listen; port 0 takes any.  Returns the port.  Raises ``OSError`` where it is taken."""
        app = web.Application(client_max_size=BODY_MOST)
        app.router.add_route("*", "/{path:.*}", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        if self._manners.forward_to:
            self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FORWARD_TIMEOUT_S))
        return int(self._runner.addresses[0][1])

    def always(self, status: int) -> None:
        """Answer with it from now on."""
        self._manners = replace(self._manners, status=status, relents_after=None)

    @property
    def to_come(self) -> str:
        """What the next requests are answered with, in words."""
        return ", ".join([*map(str, self.next_statuses), f"then always {self._manners.status}"])

    async def stop(self) -> None:
        """Listen no more."""
        if self._client is not None:
            await self._client.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self._taken += 1
        signed: bool | None = None
        problem = ""
        if self._secrets:
            reports = [verify(secret, request.headers, body, self._wall()) for secret in self._secrets]
            signed = any(report.valid for report in reports)
            problem = "" if signed else reports[0].explanation
        received = Received(request.method, request.path_qs, dict(request.headers), body, signed, problem)
        if self._manners.delay_s:
            await asyncio.sleep(self._manners.delay_s)
        answer = await self._answer(received)
        received.status = answer.status
        self._received(received)
        return answer

    async def _answer(self, received: Received) -> web.Response:
        if self.next_statuses:
            return web.Response(status=self.next_statuses.popleft())
        if self._manners.fail_rate and self._draw() < self._manners.fail_rate:
            return web.Response(status=500, text="failed on request (--fail)\n")
        if received.signed is False:
            return web.Response(status=401, text=f"signature: {received.problem}\n")
        if self._client is not None:
            return await self._forwarded(self._client, received)
        challenge = challenge_in(received.body)
        if challenge is not None:
            return web.json_response({"challenge": challenge})
        relents_after = self._manners.relents_after
        if relents_after is not None and self._taken > relents_after:
            return web.Response(status=200)
        return web.Response(status=self._manners.status, headers=self._manners.headers)

    async def _forwarded(self, client: aiohttp.ClientSession, received: Received) -> web.Response:
        received.forwarded_to = self._manners.forward_to
        headers = {k: v for k, v in received.headers.items() if k.lower() not in NOT_FORWARDED}
        try:
            async with client.post(
                self._manners.forward_to, data=received.body, headers=headers, allow_redirects=False
            ) as answer:
                content: Any = await answer.content.read(64 * 1024)
                return web.Response(status=answer.status, body=content)
        except (aiohttp.ClientError, TimeoutError) as error:
            return web.Response(status=502, text=f"{self._manners.forward_to}: {type(error).__name__}\n")
