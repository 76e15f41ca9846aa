"""
The admin server: JSON API, metrics, probes and the console page, on ``[admin] listen``.

Every request passes ``access`` first, and every answer leaves with its headers.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import asyncpg
import structlog
from aiohttp import web

from hookd import __version__
from hookd.admin.access import CONSOLE, HEADERS, Access
from hookd.admin.api import Api, problem
from hookd.admin.console import PAGE, SCRIPT, STYLE
from hookd.config import read_token
from hookd.postgres.connect import DatabaseRefused, DatabaseUnavailable, unavailable
from hookd.telemetry import CONTENT_TYPE, Telemetry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hookd.daemon import Daemon
    from hookd.postgres.connect import Database

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger("hookd")

BODY_MOST = 1024 * 1024

SESSIONS = 2
"""Of the API; they are opened when it is used and closed when it is idle."""


class AdminServer:
    """Everything that answers on ``[admin] listen``."""

    def __init__(self, daemon: Daemon, database: Database) -> None:
        self._daemon = daemon
        self._pool = database.pool("admin", SESSIONS)
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
        app = web.Application(middlewares=[self._guarded, self._explained], client_max_size=BODY_MOST)
        app.router.add_get(CONSOLE, _content(PAGE.replace("@VERSION@", __version__), "text/html"))
        app.router.add_get("/console.css", _content(STYLE, "text/css"))
        app.router.add_get("/console.js", _content(SCRIPT, "text/javascript"))
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        Api(self._pool, self._daemon).add_to(app.router)
        self._runner = web.AppRunner(app, access_log=None)
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
            return problem(error.status, "http", error.reason)
        except (DatabaseUnavailable, DatabaseRefused) as error:
            return problem(503, "database", str(error))
        except asyncpg.UndefinedTableError:
            return problem(503, "database", "the database has no schema of hookd's yet")
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
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


def _content(text: str, content_type: str) -> Handler:
    async def content(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=text, content_type=content_type)

    return content
