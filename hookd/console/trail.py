"""The audit trail: who did what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookd.console.endpoints import entry
from hookd.console.query import Query, read, typed_of
from hookd.console.site import Message
from hookd.postgres import audit
from hookd.postgres.pages import BadCursor, Page, TooMuch
from hookd.postgres.search import BadFilter

if TYPE_CHECKING:
    from aiohttp import web

    from hookd.console.site import Site

KNOWN = frozenset({"endpoint", "event", "tenant", "since", "until"})


class Trail:
    """The page."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the route."""
        router.add_get("/audit", self.show)

    async def show(self, request: web.Request) -> web.Response:
        """``GET /audit``."""
        message = None
        page, asked = Page([], None, None, None), Query("/audit", typed=typed_of(request.query, KNOWN))
        try:
            asked = read("/audit", request.query, KNOWN, self._site.now())
            wanted = asked.filter
            sought = audit.Sought(
                endpoint=wanted.endpoint,
                event=wanted.event,
                tenant=wanted.tenant,
                since=wanted.since,
                until=wanted.until,
            )
            async with self._site.reading.session() as session:
                page = await audit.entries(session, sought, asked.cursor)
        except (BadFilter, BadCursor, TooMuch) as problem:
            message = Message("bad", f"{problem}.")
        page.rows[:] = [entry(row) for row in page.rows]
        return self._site.page(
            request,
            "audit.html",
            status=200 if message is None else 422,
            message=message,
            page=page,
            address=asked,
        )
