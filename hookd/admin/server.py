"""
The admin server: JSON API, metrics, probes and the console page, on ``[admin] listen``.

Who may ask: on loopback anybody on this machine, elsewhere whoever has the token.  Browsers are kept out of what is not
theirs: a foreign ``Host`` (DNS rebinding) and requests from other sites are refused, and writing takes
``application/json``, which no foreign page can send without being asked first.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import structlog
from aiohttp import web

from hookd import __version__
from hookd.admin.api import Api, problem
from hookd.admin.console import PAGE
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

OPEN_PATHS = frozenset({"/healthz", "/readyz"})

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
}


class AdminServer:
    """Everything that answers on ``[admin] listen``."""

    def __init__(self, daemon: Daemon, database: Database) -> None:
        self._daemon = daemon
        self._pool = database.pool("admin", SESSIONS)
        self._telemetry = Telemetry(daemon)
        self._runner: web.AppRunner | None = None
        self._token = _token(daemon.config.admin.token_file)
        self._host = ""

    async def start(self) -> str | None:
        """Listen; returns the URL, or None when it is off or the port is another's."""
        config = self._daemon.config
        address = config.admin_address()
        if address is None:
            return None
        self._host, port = address
        await self._pool
        app = web.Application(middlewares=[self._guarded, self._explained], client_max_size=BODY_MOST)
        app.router.add_get("/", self._console)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        Api(self._pool, self._daemon).add_to(app.router)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, port).start()
        except OSError as error:
            await self.stop()
            reason = (
                "another process listens there" if error.errno == errno.EADDRINUSE else str(error.strerror)
            )
            log.warning("admin server is off for this process", listen=config.admin.listen, reason=reason)
            return None
        bound = self._runner.addresses[0][1]
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{bound}"

    async def stop(self) -> None:
        """Listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
            self._pool.terminate()

    # Who may ask.

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        refusal = self._refusal(request)
        answer = refusal if refusal is not None else await handler(request)
        answer.headers.update(HEADERS)
        return answer

    def _refusal(self, request: web.Request) -> web.Response | None:
        if not self._known_host(request.host):
            return problem(403, "host", "this Host is not served here; call the address of admin.listen")
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        if site not in ("same-origin", "none"):
            return problem(403, "cross_site", "requests from other sites are refused")
        writes = request.method not in ("GET", "HEAD", "DELETE") and request.can_read_body
        if writes and request.content_type != "application/json":
            return problem(415, "content_type", "send application/json")
        if self._token and request.path not in OPEN_PATHS:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, self._token):
                return problem(401, "token", "send the token of admin.token_file as Authorization: Bearer …")
        return None

    def _known_host(self, host: str) -> bool:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").lower()
        if self._token or name in ("localhost", self._host):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    @web.middleware
    async def _explained(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            return problem(error.status, "http", error.reason)
        except (DatabaseUnavailable, DatabaseRefused) as error:
            return problem(503, "database", str(error))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            if unavailable(error) is None:
                log.exception("a request to the API failed", path=request.path)
                return problem(500, "internal", "this should not happen; the log says more")
            return problem(503, "database", "the database cannot be reached now")

    # Pages.

    async def _console(self, _request: web.Request) -> web.Response:
        return web.Response(text=PAGE.replace("@VERSION@", __version__), content_type="text/html")

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, _request: web.Request) -> web.Response:
        if self._daemon.ready.is_set() and self._daemon.tenure is not None:
            return web.json_response({"status": "ready", "shards": len(self._daemon.tenure.owner.shards)})
        return problem(503, "not_ready", "the database is away, or shards are being recovered")

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._telemetry.exposition(), headers={"Content-Type": CONTENT_TYPE})


def _token(file: str) -> bytes:
    return Path(file).read_text(encoding="utf-8").strip().encode() if file else b""
