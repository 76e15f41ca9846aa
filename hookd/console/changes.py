"""What is done from the console: to endpoints, and to deliveries that are over.  Forms in, a redirect or a page out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from hookd.admin.problems import Refused
from hookd.admin.schema import EndpointPatch, NewEndpoint
from hookd.config import duration
from hookd.console.charts import milliseconds
from hookd.console.endpoints import found
from hookd.console.history import delivery_of, request_text
from hookd.console.query import Query, read, uuid
from hookd.console.site import Message, Problem, typed_in
from hookd.core.model import Secret
from hookd.core.signing import public_key
from hookd.core.words import span
from hookd.postgres import resending, search
from hookd.postgres.audit import Actor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from hookd.admin.actions import Actions
    from hookd.console.site import Site
    from hookd.postgres.registry import EndpointRecord

NUMBERS: dict[str, type] = {"rate": float, "concurrency": int}

EMPTY = {"url": "", "tenant": "default", "types": "*", "filter": "", "description": "", "rate": "", "concurrency": "",
         "format": "", "ordered": "", "headers": "", "key_type": "hmac"}  # fmt: skip


class Changes:
    """The forms, and what they do."""

    def __init__(self, site: Site, actions: Actions) -> None:
        self._site = site
        self._actions = actions

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the routes.  Those of the forms come before ``/endpoints/ID``."""
        router.add_get("/endpoints/add", self.new)
        router.add_post("/endpoints/add", self.add)
        router.add_get("/endpoints/{id}/edit", self.edit)
        router.add_post("/endpoints/{id}/edit", self.save)
        for name in ("pause", "resume", "verify", "rotate", "test", "remove"):
            router.add_post(f"/endpoints/{{id}}/{name}", getattr(self, name))
        router.add_post("/events/{event}/resend", self.resend_event)
        router.add_post("/events/{event}/{delivery}/resend", self.resend_delivery)
        router.add_get("/resend", self.count)
        router.add_post("/resend", self.resend)

    def _actor(self, request: web.Request) -> Actor:
        """Who acts, as far as it is known: there are sessions, not names."""
        return Actor(
            "console", self._site.sessions.name(request.headers.get("Cookie", "")) or str(request.remote)
        )

    # Endpoints.

    async def new(self, request: web.Request) -> web.Response:
        """``GET /endpoints/add``."""
        return self._form(request, None, EMPTY)

    async def add(self, request: web.Request) -> web.Response:
        """``POST /endpoints/add``: registers, and shows the secret this once."""
        typed = EMPTY | {"ordered": ""} | await typed_in(request)
        try:
            wanted = msgspec.convert(
                _settings(typed, clear=False) | {"tenant": typed["tenant"], "key_type": typed["key_type"]},
                NewEndpoint,
            )
            added = await self._actions.add(self._actor(request), wanted)
        except (Refused, Wrong, msgspec.ValidationError) as problem:
            return self._form(request, None, typed, _said(problem))
        return self._secret(
            request, added.record, added.secret, "Registered", verification=added.verification
        )

    async def edit(self, request: web.Request) -> web.Response:
        """``GET /endpoints/ID/edit``."""
        record = await self._record(request)
        return self._form(request, record, _typed_of(record))

    async def save(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/edit``: what is empty is cleared, but headers, which are not shown."""
        record = await self._record(request)
        typed = EMPTY | {"ordered": ""} | await typed_in(request)
        try:
            settings = _settings(typed, clear=True)
            if settings["url"] == record.url:
                # it is not judged and verified again
                del settings["url"]
            if typed.get("no_headers"):
                settings["headers"] = None
            patch = msgspec.convert(settings, EndpointPatch)
            await self._actions.update(self._actor(request), record.id, patch)
        except (Refused, Wrong, msgspec.ValidationError) as problem:
            return self._form(request, record, typed, _said(problem))
        raise web.HTTPSeeOther(f"/endpoints/{record.id}?done=saved")

    async def pause(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/pause``."""
        wanted, typed = _id(request), await typed_in(request)
        try:
            await self._actions.pause(self._actor(request), wanted, typed.get("reason") or None)
        except Refused as problem:
            raise _stays(problem) from None
        raise web.HTTPSeeOther(f"/endpoints/{wanted}?done=paused")

    async def resume(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/resume``."""
        wanted, typed = _id(request), await typed_in(request)
        try:
            resumed = await self._actions.resume(self._actor(request), wanted, typed.get("missed") or "none")
        except Refused as problem:
            raise _stays(problem) from None
        asked = resumed.verification
        if asked is not None and not asked.verified:
            raise Problem(
                409, "Not verified", f"It receives nothing until it answers its challenge: {asked.reason}."
            )
        count = f"&n={resumed.queued}" if resumed.queued else ""
        raise web.HTTPSeeOther(f"/endpoints/{wanted}?done=resumed{count}")

    async def verify(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/verify``."""
        wanted = _id(request)
        try:
            checked = await self._actions.verify(self._actor(request), wanted)
        except Refused as problem:
            raise _stays(problem) from None
        if checked.verification is not None and not checked.verification.verified:
            raise Problem(
                409, "Not verified", f"It did not answer the challenge: {checked.verification.reason}."
            )
        raise web.HTTPSeeOther(f"/endpoints/{wanted}?done=verified")

    async def rotate(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/rotate``: shows the new secret this once."""
        wanted, typed = _id(request), await typed_in(request)
        try:
            overlap_s = duration(typed.get("overlap") or "1d")
            added = await self._actions.rotate(self._actor(request), wanted, overlap_s)
        except ValueError as problem:
            raise Problem(422, "Not understood", f"The overlap: {problem}.") from None
        except Refused as problem:
            raise _stays(problem) from None
        return self._secret(
            request,
            added.record,
            added.secret,
            "A new secret",
            overlap=f"the old one signs too for {span(overlap_s)}",
        )

    async def test(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/test``: shows the exchange."""
        wanted = _id(request)
        try:
            tried = await self._actions.test(self._actor(request), wanted)
        except Refused as problem:
            raise _stays(problem) from None
        answered = f"answered {tried['status']}" if tried["status"] else tried["reason"] or tried["outcome"]
        async with self._site.reading.session() as session:
            record = await found(session, wanted)
        return self._site.page(
            request,
            "test.html",
            e=record,
            tried=tried,
            request_text=request_text(tried["request"]),
            words=f"{answered} after {milliseconds(tried['total_ms'])}",
        )

    async def remove(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/remove``."""
        wanted, typed = _id(request), await typed_in(request)
        if typed.get("sure") != "yes":
            raise Problem(422, "Not removed", "Tick the box that says that you want it.")
        try:
            await self._actions.remove(self._actor(request), wanted)
        except Refused as problem:
            raise _stays(problem) from None
        raise web.HTTPSeeOther(f"/endpoints/{wanted}?done=removed")

    def _form(
        self, request: web.Request, record: EndpointRecord | None, typed: Mapping[str, str], wrong: str = ""
    ) -> web.Response:
        return self._site.page(
            request,
            "endpoint_form.html",
            status=422 if wrong else 200,
            message=Message("bad", wrong) if wrong else None,
            e=record,
            typed=typed,
            action=request.path,
        )

    def _secret(
        self, request: web.Request, record: EndpointRecord, secret: str | None, title: str, *, overlap: str = "",
        verification: Any = None,
    ) -> web.Response:  # fmt: skip
        assert secret is not None
        return self._site.page(
            request,
            "secret.html",
            e=record,
            title=title,
            secret=secret,
            public_key=public_key(Secret(secret)),
            overlap=overlap,
            verification=verification,
        )

    async def _record(self, request: web.Request) -> EndpointRecord:
        async with self._site.reading.session() as session:
            return await found(session, _id(request))

    # Deliveries.

    async def resend_event(self, request: web.Request) -> web.Response:
        """``POST /events/ID/resend``: to all its endpoints."""
        event = uuid(request.match_info["event"], "event")
        try:
            queued = await self._actions.resend(self._actor(request), event)
        except Refused as problem:
            raise _stays(problem) from None
        raise web.HTTPSeeOther(f"/events/{event}?done=resent&n={queued}")

    async def resend_delivery(self, request: web.Request) -> web.Response:
        """``POST /events/ID/NUMBER/resend``: leads to the event, where the new delivery is."""
        event, number = delivery_of(request)
        try:
            await self._actions.resend(self._actor(request), event, number)
        except Refused as problem:
            raise _stays(problem) from None
        raise web.HTTPSeeOther(f"/events/{event}?done=resent")

    async def count(self, request: web.Request) -> web.Response:
        """``GET /resend?…``: how many would be queued, and a button."""
        asked = read("/resend", request.query, search.DELIVERY_FILTERS, self._site.now())
        wanted = self._bounded(asked)
        found = await resending.matching(self._site.reading, wanted)
        # what comes after the count, and what was not reached, is not what the button is about
        until = wanted.until or self._site.now()
        since = (
            found.back_to if found.back_to is not None and len(found.found) < resending.MOST else wanted.since
        )
        return self._site.page(
            request,
            "resend.html",
            here="/deliveries",
            typed=dict(asked.typed),
            fields=dict(asked.typed)
            | {"until": until.isoformat()}
            | ({"since": since.isoformat()} if since else {}),
            states=resending.resendable(wanted).states,
            back=asked.at("/deliveries"),
            matching=found,
            most=resending.MOST,
        )

    async def resend(self, request: web.Request) -> web.Response:
        """``POST /resend``: queues what was counted."""
        typed = await typed_in(request)
        asked = read("/resend", typed, search.DELIVERY_FILTERS, self._site.now())
        wanted = self._bounded(asked)
        found = await resending.matching(self._site.reading, wanted, look_s=2 * resending.LOOK_S)
        told = {name: getattr(wanted, name) for name in wanted.given()}
        queued = await self._actions.resend_these(
            self._actor(request), found.found, told | {"states": resending.resendable(wanted).states}
        )
        raise web.HTTPSeeOther(f"/deliveries?done=resent&n={queued}")

    @staticmethod
    def _bounded(asked: Query) -> search.Filter:
        if not asked.typed:
            raise Problem(
                422,
                "Not so fast",
                "Say which: search for a state, a tenant, an endpoint, a type or a time first.",
            )
        return asked.filter


class Wrong(ValueError):
    """A field of a form cannot be read; the message says which."""


def _id(request: web.Request) -> UUID:
    return uuid(request.match_info["id"], "endpoint")


def _stays(problem: Refused) -> Problem:
    text = str(problem)
    return Problem(problem.status, "Not done", f"{text[:1].upper()}{text[1:]}.")


def _said(problem: Exception) -> str:
    text = str(problem).replace("`", "").replace("$.", "")
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."


def _settings(typed: Mapping[str, str], *, clear: bool) -> dict[str, Any]:
    """
    The fields of the form as the API takes them; with ``clear`` an empty one is none, else it is left out.

    Raises:
        Wrong: one cannot be read.
    """
    given: dict[str, Any] = {
        "url": typed["url"],
        "types": [t for t in typed["types"].replace(",", " ").split() if t] or ["*"],
        "ordered": bool(typed.get("ordered")),
    }
    for name in ("filter", "format", "description", *NUMBERS):
        text = typed[name]
        if text:
            given[name] = _number(name, text) if name in NUMBERS else text
        elif clear:
            given[name] = None
    if typed["headers"]:
        given["headers"] = _headers(typed["headers"])
    return given


def _number(name: str, text: str) -> float:
    try:
        return NUMBERS[name](text)  # type: ignore[no-any-return]
    except ValueError:
        raise Wrong(f"{name}: {text[:50]!r} is no number") from None


def _headers(text: str) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if line.strip():
            if not colon:
                raise Wrong(f"headers: {name[:50]!r} has no colon; write Name: value")
            found[name.strip()] = value.strip()
    return found


def _typed_of(record: EndpointRecord) -> dict[str, str]:
    """An endpoint as its form shows it."""
    return EMPTY | {
        "url": record.url,
        "types": ", ".join(record.types),
        "filter": record.filter or "",
        "description": record.description or "",
        "rate": f"{record.rate:g}" if record.rate else "",
        "concurrency": str(record.concurrency or ""),
        "format": record.format or "",
        "ordered": "yes" if record.ordered else "",
    }
