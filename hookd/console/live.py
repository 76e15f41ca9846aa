"""
The live tail: attempts as they are settled, as a page and as a stream of server-sent events.

A look takes the newest rows and no more, so a stream costs the same however busy the log is.  An attempt is written after
it ended, with the time at which it began: each look goes some way back, and remembers what it has shown.  On a busy log the
newest rows are the quick ones, so failures, which are slow, are looked for apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import asyncpg
from aiohttp import web

from hookd.console.query import Query, read, typed_of
from hookd.console.site import Message
from hookd.postgres import search
from hookd.postgres.pages import BadCursor, Page, TooMuch
from hookd.postgres.reading import Busy
from hookd.postgres.search import BadFilter, Filter

if TYPE_CHECKING:
    from hookd.console.site import Site

SHOWN = 50
"""Rows of the page, and of one look."""

STREAMS = 8
"""At once in this process; one more is told to come back."""

EVERY_S = 1.0

LIFE_S = 600.0
"""Of one stream; the browser begins another."""

BACK = datetime.timedelta(seconds=60)
"""How far back a look goes."""

KNOWN = search.ATTEMPT_FILTERS - {"since", "until", "failed"}

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}


class Live:
    """The page and its stream."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._open = 0

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the routes."""
        router.add_get("/live", self.show)
        router.add_get("/live/stream", self.stream)

    async def show(self, request: web.Request) -> web.Response:
        """``GET /live``: the newest attempts, without JavaScript too."""
        message = None
        page, asked = Page([], None, None, None), Query("/live", typed=typed_of(request.query, KNOWN))
        try:
            asked = read("/live", request.query, KNOWN, self._site.now())
            async with self._site.reading.session() as session:
                page = await search.attempts(session, asked.filter, asked.cursor, SHOWN)
        except (BadFilter, BadCursor, TooMuch) as problem:
            message = Message("bad", f"{problem}.")
        return self._site.page(
            request,
            "live.html",
            status=200 if message is None else 422,
            message=message,
            page=page,
            address=asked,
            verdicts=search.VERDICTS,
            stream="" if message is not None or asked.cursor else asked.at("/live/stream"),
        )

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """``GET /live/stream``: ``rows`` as HTML, ``left-out`` where there were more, ``end`` before it ends."""
        asked = read("/live", request.query, KNOWN, self._site.now())
        answer = web.StreamResponse(headers=HEADERS)
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            if self._open >= STREAMS:
                await _say(answer, "end", f"{STREAMS} streams are open already; trying again")
                return answer
            self._open += 1
            try:
                await self._follow(answer, asked.filter)
            finally:
                self._open -= 1
        return answer

    async def _follow(self, answer: web.StreamResponse, wanted: Filter) -> None:
        tail = Tail(wanted)
        loop = asyncio.get_running_loop()
        until = loop.time() + LIFE_S
        reason = "The stream begins anew"
        while loop.time() < until:
            if self._site.daemon.stopping:
                reason = "The daemon stops"
                break
            try:
                async with self._site.reading.session() as session:
                    rows, more = await tail.look(session, self._site.now())
            except (Busy, TooMuch):
                await answer.write(b": busy\n\n")
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
                reason = "The database cannot be reached"
                break
            else:
                if rows:
                    await _say(
                        answer, "rows", self._site.render("rows.html", rows=rows, now=self._site.now())
                    )
                if more:
                    await _say(answer, "left-out", f"more than {SHOWN} a second, the newest are shown")
                if not rows:
                    await answer.write(b": nothing new\n\n")  # finds out that nobody listens any more
            await asyncio.sleep(EVERY_S)
        await _say(answer, "end", reason)


class Tail:
    """What is new from one look to the next."""

    def __init__(self, wanted: Filter) -> None:
        self._wanted = wanted
        self._seen: dict[tuple[Any, ...], datetime.datetime] = {}
        self._begun = False
        self._from = datetime.datetime.min.replace(tzinfo=datetime.UTC)
        """What began before the first row that was shown is old."""

    async def look(
        self, session: asyncpg.Connection, now: datetime.datetime
    ) -> tuple[list[dict[str, Any]], bool]:
        """Rows that were not there before, oldest first; and whether there were more than a look takes."""
        recent = replace(self._wanted, since=now - BACK)
        page = await search.attempts(session, recent, None, SHOWN)
        rows = list(page.rows)
        if page.older is not None and self._begun and not self._wanted.states:
            rows += (await search.attempts(session, replace(recent, failed=True), None, SHOWN)).rows
        fresh = {}
        for row in rows:
            if _key(row) not in self._seen:
                fresh[_key(row)] = row
        more = self._begun and page.older is not None and all(_key(r) in fresh for r in page.rows)
        if not self._begun:
            self._begun = True
            self._from = min((r["at"] for r in page.rows), default=now - BACK)
        fresh = {k: r for k, r in fresh.items() if r["at"] >= self._from}
        # what began before the look goes is not met again
        self._seen = {k: at for k, at in self._seen.items() if at >= now - BACK} | {
            k: r["at"] for k, r in fresh.items()
        }
        return sorted(fresh.values(), key=lambda r: (r["at"], r["delivery_id"], r["attempt"])), more


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["delivery_id"], row["attempt"], row["at"]


async def _say(answer: web.StreamResponse, event: str, text: str) -> None:
    lines = "".join(f"data: {line}\n" for line in text.splitlines() if line)
    await answer.write(f"event: {event}\n{lines}\n".encode())
