"""
The admin server: JSON API, metrics, probes and the console page, on ``[admin] listen``.

Every request passes ``access`` first, and every answer leaves with its headers.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import asyncpg
import orjson
import structlog
from aiohttp import web

from hookd import __version__
from hookd.admin.access import CONSOLE, HEADERS, Access
from hookd.admin.actions import Actions
from hookd.admin.api import Api
from hookd.admin.console import PAGE, SCRIPT, STYLE
from hookd.admin.openapi import document
from hookd.admin.operations import PREFIX, operations, route
from hookd.admin.problems import problem
from hookd.config import read_token
from hookd.postgres.connect import DatabaseRefused, DatabaseUnavailable, unavailable
from hookd.postgres.reading import Reading
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
        self._access = Access("", self._token)

    async def start(self) -> str | None:
        """Listen; returns the URL, or None when it is off or the port is another's."""
        config = self._daemon.config
        address = config.admin_address()
        if address is None:
            return None
        host, port = address
        self._access = Access(host, self._token)
        await self._pool
        await self.reading.open()
        app = web.Application(middlewares=[self._guarded, self._explained], client_max_size=BODY_MOST)
        app.router.add_get(CONSOLE, _content(PAGE.replace("@VERSION@", __version__), "text/html"))
        app.router.add_get("/console.css", _content(STYLE, "text/css"))
        app.router.add_get("/console.js", _content(SCRIPT, "text/javascript"))
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._add_api(app.router)
        self._runner = web.AppRunner(app, access_log=None, max_line_size=LINE_MOST)
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
        router.add_route("GET", f"{PREFIX}/openapi.json", _content(said, "application/json"))

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        refusal = self._access.refusal(
            request.method,
            request.path,
            request.headers,
            has_body=request.can_read_body,
            content_type=request.content_type,
        )
        if refusal is None:
            answer = await handler(request)
        else:
            answer = problem(refusal.status, refusal.code, refusal.message)
            if refusal.status == 401:
                answer.headers["WWW-Authenticate"] = "Bearer"
        answer.headers.update(HEADERS)
        return answer

    @web.middleware
    async def _explained(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            answer = problem(error.status, "http", error.reason)
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except (DatabaseUnavailable, DatabaseRefused) as error:
            return problem(503, "database", str(error))
        except asyncpg.UndefinedTableError:
            return problem(503, "database", "the database has no schema of hookd's yet")
        except Exception as error:
            if unavailable(error) is None:
                log.exception("a request to the API failed", path=request.path)
                return problem(500, "internal", "this should not happen; the log says more")
            return problem(503, "database", "the database cannot be reached now")

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


def _content(said: str | bytes, content_type: str) -> Handler:
    body = said.encode() if isinstance(said, str) else said

    async def content(_request: web.Request) -> web.StreamResponse:
        return web.Response(
            body=body,
            content_type=content_type,
            charset="utf-8" if content_type.startswith("text/") else None,
        )

    return content
