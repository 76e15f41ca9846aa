"""Events, deliveries, dead letters and the search line: what happened, found and shown."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from aiohttp import web

from hookd.console.query import Query, read, typed_of, uuid, words
from hookd.console.site import Message, Problem
from hookd.postgres import search, timeline
from hookd.postgres.pages import BadCursor, Page, TooMuch
from hookd.postgres.search import BadFilter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    import asyncpg

    from hookd.console.site import Site

    Search = Callable[[asyncpg.Connection, search.Filter, str | None], Awaitable[Page]]

NOTHING = Page([], None, None, None)

PHASES = {"dns": "DNS", "connect": "connect", "tls": "TLS", "first_byte": "first byte", "rest": "rest"}
"""What the log keeps of where an attempt's time went."""

KINDS = {"dns": "dns", "connect": "connect", "tls": "tls", "first_byte": "first", "rest": "rest"}


class History:
    """The pages about what happened."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the routes."""
        router.add_get("/events", self.events)
        router.add_get("/events/{event}", self.event)
        router.add_get("/events/{event}/{delivery}", self.delivery)
        router.add_get("/deliveries", self.deliveries)
        router.add_get("/deliveries/{delivery}", self.delivery_by_number)
        router.add_get("/dead-letters", self.dead_letters)
        router.add_get("/search", self.search)

    async def events(self, request: web.Request) -> web.Response:
        """``GET /events``."""
        return await self._list(request, "events.html", search.EVENT_FILTERS, search.events)

    async def deliveries(self, request: web.Request) -> web.Response:
        """``GET /deliveries``."""
        return await self._list(
            request, "deliveries.html", search.DELIVERY_FILTERS, search.deliveries, states=search.STATES
        )

    async def dead_letters(self, request: web.Request) -> web.Response:
        """``GET /dead-letters``."""
        # a time is that of the death here, and of the event there
        same = typed_of(
            request.query, search.DEAD_LETTER_FILTERS & search.DELIVERY_FILTERS - {"since", "until"}
        )
        resend = Query("/deliveries", typed=same | {"state": "exhausted"}).url(None)
        return await self._list(
            request, "dead_letters.html", search.DEAD_LETTER_FILTERS, search.dead_letters, resend=resend
        )

    async def _list(
        self, request: web.Request, template: str, known: Collection[str], find: Search, **values: Any
    ) -> web.Response:
        message = None
        page, asked = NOTHING, Query(request.path, typed=typed_of(request.query, known))
        try:
            asked = read(request.path, request.query, known, self._site.now())
            async with self._site.reading.session() as session:
                page = await find(session, asked.filter, asked.cursor)
        except (BadFilter, BadCursor, TooMuch) as problem:
            message = Message("bad", f"{problem}.")
        return self._site.page(
            request,
            template,
            status=200 if message is None else 422,
            message=message,
            page=page,
            address=asked,
            **{"resend": asked.at("/resend")} | values,
        )

    async def event(self, request: web.Request) -> web.Response:
        """``GET /events/ID``."""
        wanted = uuid(request.match_info["event"], "event")
        async with self._site.reading.session() as session:
            found = await timeline.event(session, wanted)
        if found is None:
            raise Problem(404, "No such event", f"There is no event {wanted}, or it is past its retention.")
        return self._site.page(request, "event.html", event=found, deliveries=found["deliveries"])

    async def delivery_by_number(self, request: web.Request) -> web.Response:
        """``GET /deliveries/NUMBER``: where it is."""
        number = request.match_info["delivery"]
        async with self._site.reading.session() as session:
            found = await timeline.find(session, number) if number.isdigit() else None
        if found is None:
            raise Problem(
                404, "No such delivery", f"There is no delivery {number[:40]}, or it is past its retention."
            )
        raise web.HTTPSeeOther(f"/events/{found.event}/{found.delivery}")

    async def delivery(self, request: web.Request) -> web.Response:
        """``GET /events/ID/NUMBER``: a delivery as the timeline of its attempts."""
        event_id, number = delivery_of(request)
        daemon = self._site.daemon
        async with self._site.reading.session() as session:
            found = await timeline.delivery(
                session, number, event_id, wire=daemon.wire(), keyring=daemon.keyring
            )
            event = await timeline.event(session, event_id)
        if found is None:
            raise Problem(404, "No such delivery", f"Event {event_id} has no delivery {number}.")
        siblings = [
            d for d in (event or {}).get("deliveries", ()) if d["endpoint_id"] == found["endpoint_id"]
        ]
        others = [
            {
                "delivery_id": d["delivery_id"],
                "word": "resent later" if d["delivery_id"] > number else "the one before",
            }
            for d in siblings
            if d["delivery_id"] != number
        ]
        return self._site.page(
            request,
            "delivery.html",
            here="/deliveries",
            delivery=found,
            event=event,
            others=others,
            attempts=[shown_attempt(a) for a in reversed(found["attempts"])],
            can_resend=found["state"] not in search.PENDING_STATES and event is not None,
        )

    async def search(self, request: web.Request) -> web.Response:
        """``GET /search?q=``: to what an id belongs to, else to the deliveries that match."""
        line = request.query.get("q", "").strip()
        if not line:
            raise web.HTTPSeeOther("/deliveries")
        async with self._site.reading.session() as session:
            found = await timeline.find(session, line)
        if found is not None:
            where = {
                "event": f"/events/{found.event}",
                "delivery": f"/events/{found.event}/{found.delivery}",
                "endpoint": f"/endpoints/{found.endpoint}",
            }[found.kind]
            raise web.HTTPSeeOther(where)
        if line.startswith(("http://", "https://")):
            raise web.HTTPSeeOther(Query("/endpoints", typed={"url": line}).url(None))
        if line.removeprefix("#").isdigit():
            raise Problem(404, "Nothing found", f"No delivery has the number {line[:40]}.")
        try:
            uuid(line, "id")
        except BadFilter:
            typed = words(line)
        else:
            raise Problem(404, "Nothing found", f"No event and no endpoint has the id {line}.")
        raise web.HTTPSeeOther(Query("/deliveries", typed=typed).url(None))


def delivery_of(request: web.Request) -> tuple[Any, int]:
    """The event's id and the delivery's number of a path."""
    number = request.match_info["delivery"]
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        raise Problem(404, "No such delivery", f"{number[:40]!r} is no number of a delivery.")
    return uuid(request.match_info["event"], "event"), int(number)


def shown_attempt(attempt: Mapping[str, Any]) -> dict[str, Any]:
    """An attempt as the template draws it: phases as bars, request and answer as text."""
    request, answer = attempt["request"], attempt["answer"]
    said: dict[str, Any] = {"bars": bars(attempt["phases"], attempt["total_ms"] or 0.0), "curl": None}
    if request is not None and "problem" not in request:
        said["request_text"] = request_text(request)
        said["curl"] = curl(request)
    if answer is not None:
        said["answer_head"] = "\n".join(f"{name}: {value}" for name, value in answer["headers"])
    return dict(attempt) | said


def bars(phases: list[dict[str, Any]], total_ms: float) -> list[dict[str, Any]]:
    """Where each phase begins and how wide it is, of 1000."""
    scale = 1000 / max(total_ms, sum(p["ms"] for p in phases), 0.001)
    found, x = [], 0.0
    for phase in phases:
        width = phase["ms"] * scale
        found.append(
            {
                "name": PHASES[phase["name"]],
                "kind": KINDS[phase["name"]],
                "ms": phase["ms"],
                "x": f"{x:.1f}",
                "width": f"{width:.1f}",
            }
        )
        x += width
    return found


def request_text(request: Mapping[str, Any]) -> str:
    """A request as it went over the wire."""
    lines = [
        f"{request['method']} {request['url']}",
        *(f"{name}: {value}" for name, value in request["headers"]),
    ]
    return "\n".join(lines) + f"\n\n{request['body']}"


def curl(request: Mapping[str, Any]) -> str:
    """The same for a shell; what curl sets itself is left out."""
    own = ("host", "content-length", "accept-encoding")
    headers = [
        f"-H {shlex.quote(f'{name}: {value}')}" for name, value in request["headers"] if name not in own
    ]
    return " ".join(
        ["curl", "-i", *headers, f"--data-binary {shlex.quote(request['body'])}", shlex.quote(request["url"])]
    )
