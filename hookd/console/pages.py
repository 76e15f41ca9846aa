"""The console as the admin server sees it: its pages, and what it answers when there is none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hookd.console.changes import Changes
from hookd.console.endpoints import Endpoints
from hookd.console.history import History
from hookd.console.live import Live
from hookd.console.overview import Overview
from hookd.console.site import Site
from hookd.console.trail import Trail

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from hookd.admin.access import Access, Refusal
    from hookd.admin.actions import Actions
    from hookd.admin.sessions import Sessions
    from hookd.daemon import Daemon
    from hookd.postgres.reading import Reading

TITLES = {
    403: "Refused",
    404: "Not found",
    405: "Not allowed",
    422: "Not understood",
    500: "Something failed",
    503: "Not now",
}


class Console:
    """All pages."""

    def __init__(
        self,
        daemon: Daemon,
        reading: Reading,
        actions: Actions,
        sessions: Sessions,
        wall: Callable[[], float],
    ) -> None:
        self._site = Site(daemon, reading, sessions, wall)
        self._actions = actions
        self._compiling: asyncio.Future[None] | None = None

    def add_to(self, router: web.UrlDispatcher, access: Access) -> None:
        """Add all routes."""
        self._site.add_to(router, access)
        # an earlier route wins: /endpoints/add is no id
        Changes(self._site, self._actions).add_to(router)
        for part in (Overview, Endpoints, History, Live, Trail):
            part(self._site).add_to(router)

    async def warm(self) -> None:
        """Make code of the templates when the first page is asked for, beside the event loop."""
        if self._compiling is None:
            self._compiling = asyncio.ensure_future(asyncio.to_thread(self._site.compile))
        await asyncio.shield(self._compiling)

    def refused(self, request: web.Request, refusal: Refusal) -> web.Response:
        """For who may not ask."""
        return self._site.refused(request, refusal)

    def failed(self, request: web.Request, status: int, message: str, title: str = "") -> web.Response:
        """For what cannot be shown now, or as it was asked for."""
        text = f"{message[:1].upper()}{message[1:]}".rstrip(".") + "."
        return self._site.problem(request, status, title or TITLES.get(status, "Not possible"), text)
