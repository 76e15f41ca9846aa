"""
The admin server: JSON API, metrics, probes and the console, on ``[admin] listen``.

Every request passes ``access`` first, and every answer leaves with its headers.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import asyncpg
import orjson
import structlog
from aiohttp import web

from hookd.admin.access import HEADERS, Access, is_page
from hookd.admin.actions import Actions
from hookd.admin.api import Api
from hookd.admin.openapi import document
from hookd.admin.operations import PREFIX, operations, route
from hookd.admin.problems import problem
from hookd.admin.sessions import Sessions
from hookd.config import read_token
from hookd.console.pages import Console
from hookd.console.site import Problem
from hookd.postgres.connect import DatabaseRefused, DatabaseUnavailable, unavailable
from hookd.postgres.pages import TooMuch
from hookd.postgres.reading import Busy, Reading
from hookd.postgres.search import BadFilter
from hookd.telemetry import CONTENT_TYPE, Telemetry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hookd.daemon import Daemon
    from hookd.postgres.connect import Database

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger("hookd")

BODY_MOST = 1024 * 1024

LINE_MOST = 64 * 1024
"""Of a request line: a search has a path of 1,000 characters, each of which may be twelve bytes long in a URL."""

SESSIONS = 2
"""For what is done; they are opened when they are needed and closed when they are idle."""

GRACE_S = 3.0
"""For answers under way when the server stops."""


EXPECTED = (
    ((DatabaseUnavailable, DatabaseRefused), 503, "database"),
    ((asyncpg.UndefinedTableError,), 503, "schema"),
    ((BadFilter,), 422, "filter"),
    ((Busy, TooMuch), 503, "busy"),
)
"""What may go wrong, and how it is answered."""

NO_SCHEMA = "the database has no schema of hookd's yet"


class AdminServer:
    """Everything that answers on ``[admin] listen``."""

    def __init__(self, daemon: Daemon, database: Database) -> None:
        self._daemon = daemon
        self._pool = database.pool("admin", SESSIONS)
        self.reading = Reading(database)
        self.actions = Actions(self._pool, daemon)
        self._telemetry = Telemetry(daemon)
        self._runner: web.AppRunner | None = None
        self._token = read_token(daemon.config.admin.token_file)
        self._sessions = Sessions(daemon.wall)
        self._access = Access("", self._token, self._sessions)
        self._console = Console(daemon, self.reading, self.actions, self._sessions, daemon.wall)

    async def start(self) -> str | None:
        """Listen; returns the URL, or None when it is off or the port is another's."""
        config = self._daemon.config
        address = config.admin_address()
        if address is None:
            return None
        host, port = address
        self._access = Access(host, self._token, self._sessions, config.admin.hosts)
        await self._pool
        await self.reading.open()
        app = web.Application(middlewares=[self._guarded, self._explained], client_max_size=BODY_MOST)
        app.on_response_prepare.append(_with_policy)
        self._console.add_to(app.router, self._access)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._add_api(app.router)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=GRACE_S, max_line_size=LINE_MOST)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self.stop()
            reason = (
                "another process listens there" if error.errno == errno.EADDRINUSE else str(error.strerror)
            )
            log.warning("admin server is off for this process", listen=config.admin.listen, reason=reason)
            return None
        bound = self._runner.addresses[0][1]
        self._sessions.cookie = f"hookd_{bound}"
        return f"http://{f'[{host}]' if ':' in host else host}:{bound}"

    async def stop(self) -> None:
        """Listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
            self._pool.terminate()
            self.reading.close()

    def _add_api(self, router: web.UrlDispatcher) -> None:
        api, described = Api(self.reading, self.actions, self._daemon), operations(Api)
        for each in described:
            router.add_route(*route(api, each))
        said = orjson.dumps(document(described))

        async def openapi(_request: web.Request) -> web.Response:
            return web.Response(body=said, content_type="application/json")

        router.add_route("GET", f"{PREFIX}/openapi.json", openapi)

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        page = is_page(request.path)
        if page:
            await self._console.warm()
        refusal = self._access.refusal(
            request.method,
            request.path,
            request.headers,
            has_body=request.can_read_body,
            content_type=request.content_type,
        )
        if refusal is None:
            return await handler(request)
        if page:
            answer = self._console.refused(request, refusal)
        else:
            answer = problem(refusal.status, refusal.code, refusal.message)
        if refusal.status == 401:
            answer.headers["WWW-Authenticate"] = "Bearer"
        return answer

    @web.middleware
    async def _explained(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            answer = self._failed(request, error.status, "http", error.reason)
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except Problem as error:
            return self._console.failed(request, error.status, str(error), error.title)
        except Exception as error:
            for kinds, status, code in EXPECTED:
                if isinstance(error, kinds):
                    return self._failed(request, status, code, NO_SCHEMA if code == "schema" else str(error))
            if unavailable(error) is None:
                log.exception("a request to the admin server failed", path=request.path)
                return self._failed(request, 500, "internal", "this should not happen; the log says more")
            return self._failed(request, 503, "database", "the database cannot be reached now")

    def _failed(self, request: web.Request, status: int, code: str, message: str) -> web.Response:
        """What went wrong, for a program or for a person."""
        if is_page(request.path):
            return self._console.failed(request, status, message)
        return problem(status, code, message)

    # Pages.

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, _request: web.Request) -> web.Response:
        trouble = self._daemon.trouble()
        tenure = self._daemon.tenure
        if trouble or tenure is None:
            return problem(503, "not_ready", trouble)
        return web.json_response({"status": "ready", "shards": len(tenure.owner.shards)})

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._telemetry.exposition(), headers={"Content-Type": CONTENT_TYPE})


async def _with_policy(_request: web.Request, answer: web.StreamResponse) -> None:
    """Every answer leaves with the headers; what is cached says so itself."""
    for name, value in HEADERS.items():
        answer.headers.setdefault(name, value)
