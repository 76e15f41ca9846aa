"""
``/api/v1``: how an application registers its customers' callback URLs without a shell.

Every error is ``{"error": {"code", "message"}}``.  What the guard found out about addresses stays here: a message may be
shown to whoever typed the URL.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from uuid import UUID

import msgspec
import orjson
from aiohttp import web
from msgspec import UNSET, UnsetType

from hookd.config import duration
from hookd.core.headers import check_headers
from hookd.core.model import EndpointKey
from hookd.core.signing import chosen_secret
from hookd.net.vetting import vet
from hookd.postgres import history, registry
from hookd.postgres.queue import Queue
from hookd.postgres.registry import EndpointChange, NotPossible
from hookd.postgres.status import status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import asyncpg

    from hookd.core.model import Secret
    from hookd.core.signing import KeyType
    from hookd.core.urls import Target
    from hookd.daemon import Daemon
    from hookd.postgres.registry import EndpointRecord

Body = TypeVar("Body", bound=msgspec.Struct)

LIST_MOST = 1000

OVERLAP_S = 86400.0

CLEARABLE = ("filter", "format", "rate", "concurrency", "description")

HIDDEN = ("key", "shard")


class NewEndpoint(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /endpoints``."""

    url: str
    tenant: str = "default"
    types: list[str] | None = None
    filter: str | None = None
    format: str | None = None
    ordered: bool = False
    rate: float | None = None
    concurrency: int | None = None
    description: str | None = None
    headers: dict[str, str] | None = None
    key_type: Literal["hmac", "ed25519"] | None = None
    secret: str | None = None


class EndpointPatch(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``PATCH /endpoints/ID``: what is absent stays, null clears."""

    url: str | UnsetType = UNSET
    types: list[str] | UnsetType = UNSET
    filter: str | UnsetType | None = UNSET
    format: str | UnsetType | None = UNSET
    ordered: bool | UnsetType = UNSET
    rate: float | UnsetType | None = UNSET
    concurrency: int | UnsetType | None = UNSET
    description: str | UnsetType | None = UNSET
    headers: dict[str, str] | UnsetType | None = UNSET


class Resume(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /endpoints/ID/resume``."""

    missed: str = "none"


class Rotate(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /endpoints/ID/rotate``."""

    overlap: str = "1d"
    key_type: Literal["hmac", "ed25519"] | None = None
    secret: str | None = None


class Pause(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /endpoints/ID/pause``."""

    reason: str | None = None


class Replay(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /replay``."""

    event: UUID | None = None
    endpoint: UUID | None = None
    tenant: str | None = None
    states: list[str] | None = None
    dry_run: bool = False


class BadRequest(Exception):
    """What was sent is not what is expected; the message says why."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def problem(status: int, code: str, message: str) -> web.Response:
    """An error as every client of the API gets it."""
    return answer({"error": {"code": code, "message": message}}, status)


def answer(value: Any, status: int = 200) -> web.Response:
    """A value as JSON."""
    return web.Response(body=orjson.dumps(value, default=str), status=status, content_type="application/json")


class Api:
    """The handlers."""

    def __init__(self, pool: asyncpg.Pool, daemon: Daemon) -> None:
        self._pool = pool
        self._daemon = daemon

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add all routes."""
        for method, path, handler in (
            ("GET", "/endpoints", self.list_endpoints),
            ("POST", "/endpoints", self.add_endpoint),
            ("GET", "/endpoints/{id}", self.show_endpoint),
            ("PATCH", "/endpoints/{id}", self.change_endpoint),
            ("DELETE", "/endpoints/{id}", self.remove_endpoint),
            ("POST", "/endpoints/{id}/pause", self.pause_endpoint),
            ("POST", "/endpoints/{id}/resume", self.resume_endpoint),
            ("POST", "/endpoints/{id}/rotate", self.rotate_endpoint),
            ("POST", "/endpoints/{id}/verify", self.verify_endpoint),
            ("GET", "/events", self.list_events),
            ("GET", "/events/{id}", self.show_event),
            ("GET", "/deliveries", self.list_deliveries),
            ("GET", "/attempts", self.list_attempts),
            ("POST", "/replay", self.replay),
            ("GET", "/status", self.status),
        ):
            router.add_route(method, "/api/v1" + path, _plainly(handler))

    # Endpoints.

    async def list_endpoints(self, request: web.Request) -> web.Response:
        """``GET /endpoints?tenant=&state=&after=&limit=``: in order of creation."""
        limit = _limit(request)
        after = request.query.get("after")
        async with self._session() as connection:
            records = await registry.listing(
                connection,
                tenant=request.query.get("tenant"),
                state=request.query.get("state"),
                after=_uuid(after) if after else None,
                limit=limit,
            )
        return answer(
            {"data": [_shown(r) for r in records], "next": records[-1].id if len(records) == limit else None}
        )

    async def add_endpoint(self, request: web.Request) -> web.Response:
        """
        ``POST /endpoints``: 201 with the endpoint and its secret, which is shown this once.

        With security.require_verification the endpoint is asked first, and ``verification`` says what came of it.
        """
        wanted = await _read(request, NewEndpoint)
        target = await self._judged(wanted.url)
        secret = _secret(wanted.key_type, wanted.secret)
        change = EndpointChange(
            url=target.url,
            host=target.lane,
            types=wanted.types or None,
            filter=wanted.filter,
            format=wanted.format,
            ordered=wanted.ordered,
            rate=wanted.rate,
            concurrency=wanted.concurrency,
            description=wanted.description,
            headers=_headers(wanted.headers),
        )
        async with self._session() as connection:
            record = await registry.add(
                connection, wanted.tenant, change, secret,
                keyring=self._daemon.keyring, verified=not self._daemon.config.security.require_verification,
            )  # fmt: skip
        return answer(await self._asked(record) | _shown_once(wanted.secret, secret), 201)

    async def show_endpoint(self, request: web.Request) -> web.Response:
        """``GET /endpoints/ID``."""
        async with self._session() as connection:
            return answer(_shown(await self._found(connection, request)))

    async def change_endpoint(self, request: web.Request) -> web.Response:
        """``PATCH /endpoints/ID``."""
        patch = await _read(request, EndpointPatch)
        target = await self._judged(patch.url) if patch.url is not UNSET else None
        headers = None
        if patch.headers is not UNSET:
            headers = _headers(patch.headers) or {}
        change = EndpointChange(
            url=target.url if target else None,
            host=target.lane if target else None,
            headers=headers,
            clear=frozenset(n for n in CLEARABLE if getattr(patch, n) is None),
            **{
                n: getattr(patch, n)
                for n in ("types", "ordered", *CLEARABLE)
                if getattr(patch, n) not in (UNSET, None)
            },
        )
        async with self._session() as connection:
            record = await self._found(connection, request)
            record = await registry.update(
                connection, record.id, change,
                keyring=self._daemon.keyring, verified=not self._daemon.config.security.require_verification,
            )  # fmt: skip
        return answer(await self._asked(record) if target else _shown(record))

    async def remove_endpoint(self, request: web.Request) -> web.Response:
        """``DELETE /endpoints/ID``: 204."""
        async with self._session() as connection:
            record = await self._found(connection, request)
            await registry.remove(connection, record.id)
        return web.Response(status=204)

    async def pause_endpoint(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/pause``: its deliveries wait."""
        wanted = await _read(request, Pause)
        async with self._session() as connection:
            record = await self._found(connection, request)
            return answer(_shown(await registry.pause(connection, record.id, wanted.reason)))

    async def resume_endpoint(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/resume`` with ``{"missed": "all" | "latest" | "none"}``."""
        wanted = await _read(request, Resume)
        if wanted.missed not in ("all", "latest", "none"):
            raise BadRequest(422, "missed", "missed is all, latest or none")
        async with self._session() as connection:
            record = await self._found(connection, request)
            record, queued = await registry.resume(
                connection,
                record.id,
                wanted.missed,
                ask_again_after_s=self._daemon.config.ask_again_after_s(),
            )
        return answer(await self._asked(record) | {"queued": queued})

    async def rotate_endpoint(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/rotate`` with ``{"overlap": "1d"}``: a new secret, shown this once."""
        wanted = await _read(request, Rotate)
        try:
            overlap_s = duration(wanted.overlap)
        except ValueError as error:
            raise BadRequest(422, "overlap", str(error)) from None
        async with self._session() as connection:
            record = await self._found(connection, request)
            same = cast("KeyType | None", record.key_type)
            secret = _secret(wanted.key_type or (None if wanted.secret else same), wanted.secret)
            record = await registry.rotate(
                connection, record.id, secret, overlap_s, keyring=self._daemon.keyring
            )
        return answer(_shown(record) | _shown_once(wanted.secret, secret))

    async def verify_endpoint(self, request: web.Request) -> web.Response:
        """``POST /endpoints/ID/verify``: ask it whether it wants to be called; ``verification`` says what came of it."""
        async with self._session() as connection:
            record = await self._found(connection, request)
        if record.state == "removed":
            raise BadRequest(422, "refused", f"endpoint {record.id} was removed")
        return answer(await self._verified(record))

    # Events and deliveries.

    async def list_events(self, request: web.Request) -> web.Response:
        """``GET /events?tenant=&type=&before=&limit=``: newest first."""
        limit = _limit(request)
        before = request.query.get("before")
        async with self._session() as connection:
            rows = await history.events(
                connection,
                tenant=request.query.get("tenant"),
                type_pattern=request.query.get("type"),
                before=_uuid(before) if before else None,
                limit=limit,
            )
        return answer({"data": rows, "next": rows[-1]["id"] if len(rows) == limit else None})

    async def show_event(self, request: web.Request) -> web.Response:
        """``GET /events/ID``: with its payload and deliveries."""
        wanted = _uuid(request.match_info["id"])
        async with self._session() as connection:
            found = await history.event(connection, wanted)
        if found is None:
            raise BadRequest(404, "not_found", f"there is no event {wanted}")
        found["payload"] = orjson.Fragment(found["payload"])
        return answer(found)

    async def list_deliveries(self, request: web.Request) -> web.Response:
        """``GET /deliveries?event=ID``."""
        wanted = request.query.get("event")
        if not wanted:
            raise BadRequest(422, "event", "say of which event: ?event=ID")
        async with self._session() as connection:
            return answer({"data": await history.deliveries(connection, _uuid(wanted))})

    async def list_attempts(self, request: web.Request) -> web.Response:
        """``GET /attempts?event=&endpoint=&limit=``: newest first."""
        event, endpoint = request.query.get("event"), request.query.get("endpoint")
        async with self._session() as connection:
            rows = await history.attempts(
                connection,
                event_id=_uuid(event) if event else None,
                endpoint_id=_uuid(endpoint) if endpoint else None,
                limit=_limit(request),
            )
        return answer({"data": rows})

    async def replay(self, request: web.Request) -> web.Response:
        """``POST /replay``: queue settled deliveries again."""
        wanted = await _read(request, Replay)
        if not (wanted.event or wanted.endpoint or wanted.tenant or wanted.states):
            raise BadRequest(422, "selection", "say what to replay: event, endpoint, tenant or states")
        bad = set(wanted.states or ()) - set(history.SETTLED_STATES)
        if bad:
            raise BadRequest(422, "states", f"states are {', '.join(history.SETTLED_STATES)}")
        selection = {
            "event": wanted.event,
            "endpoint": wanted.endpoint,
            "tenant": wanted.tenant,
            "states": wanted.states or (history.SETTLED_STATES if wanted.event else ("exhausted",)),
        }
        queued = 0
        async with self._session() as connection:
            matching = await history.count_replayable(connection, selection)
            if not wanted.dry_run:
                async for total in history.replay(connection, selection):
                    queued = total
        return answer({"matching": matching, "queued": queued}, 200 if wanted.dry_run else 202)

    async def status(self, _request: web.Request) -> web.Response:
        """``GET /status``: what ``hookd status --json`` prints."""
        async with self._session() as connection:
            now = await status(connection)
        return answer(now.facts())

    # Help.

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[asyncpg.Connection]:
        async with self._pool.acquire() as connection:
            yield cast("asyncpg.Connection", connection)

    async def _asked(self, record: EndpointRecord) -> dict[str, Any]:
        """An endpoint as it is shown, after it was asked if it has to be."""
        return await self._verified(record) if record.state == "unverified" else _shown(record)

    async def _verified(self, record: EndpointRecord) -> dict[str, Any]:
        """Ask it; no session is held meanwhile."""
        async with self._session() as connection:
            queue = Queue(connection, lambda: self._daemon.keyring)
            found = await queue.endpoints([EndpointKey(record.key)])
        if record.id in queue.unreadable or not found:
            raise BadRequest(
                503, "secrets", "the secrets of this endpoint cannot be read; the daemon's log says more"
            )
        said = await self._daemon.ask(found[0])
        async with self._session() as connection:
            record = await registry.note_verification(
                connection, record.id, record.url, None if said.verified else said.reason
            )
        return _shown(record) | {"verification": {"verified": said.verified, "reason": said.reason or None}}

    async def _judged(self, url: str) -> Target:
        found = await vet(url, self._daemon.resolver, https_only=self._daemon.config.network.https_only)
        if not found.allowed or found.target is None:
            raise BadRequest(422, "url", f"the URL is refused: {found.reason}")
        return found.target

    @staticmethod
    async def _found(connection: Any, request: web.Request) -> EndpointRecord:
        try:
            return await registry.show(connection, _uuid(request.match_info["id"]))
        except NotPossible:
            raise BadRequest(404, "not_found", f"there is no endpoint {request.match_info['id']}") from None


def _plainly(
    handler: Callable[[web.Request], Awaitable[web.Response]],
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def explained(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except BadRequest as error:
            return problem(error.status, error.code, str(error))
        except NotPossible as error:
            return problem(422, "refused", str(error))

    return explained


async def _read(request: web.Request, kind: type[Body]) -> Body:
    raw = await request.read()
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise BadRequest(422, "body", str(error).replace("`", "'").replace("Object", "the body")) from None
    except msgspec.DecodeError as error:
        raise BadRequest(400, "json", f"the body is not JSON: {error}") from None


def _headers(headers: dict[str, str] | None) -> dict[str, str] | None:
    wrong = check_headers(headers or {})
    if wrong is not None:
        raise BadRequest(422, "headers", wrong)
    return headers


def _secret(kind: KeyType | None, given: str | None) -> Secret:
    try:
        return chosen_secret(kind, given, secrets.token_bytes(32))
    except ValueError as error:
        raise BadRequest(422, "secret", str(error)) from None


def _shown_once(given: str | None, secret: Secret) -> dict[str, Any]:
    """A secret that was made here; one that was given is known already."""
    return {} if given is not None else {"secret": secret.reveal()}


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise BadRequest(422, "id", f"{text[:50]!r} is no id") from None


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", "100")
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= LIST_MOST):
        raise BadRequest(422, "limit", f"limit is a number from 1 to {LIST_MOST}")
    return int(text)


def _shown(record: EndpointRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__ if name not in HIDDEN}
