"""What all pages have in common: templates, the frame, messages, errors and logging in."""

from __future__ import annotations

import datetime
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hookd import __version__
from hookd.console.shown import filters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hookd.admin.access import Access, Refusal
    from hookd.admin.sessions import Sessions
    from hookd.daemon import Daemon
    from hookd.postgres.reading import Reading

log = structlog.get_logger("hookd")

HERE = Path(__file__).parent

STATIC = {"console.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}

THEMES = ("light", "dark")

SAY_AGAIN = datetime.timedelta(minutes=1)

INSIDE = re.compile(r"/(?![/\\])[\x21-\x7e]*")
"""A path on this server: ``//elsewhere`` is another."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a page says on top of itself."""

    tone: str
    text: str


class Problem(Exception):
    """A page cannot be shown as it was asked for; the message says why."""

    def __init__(self, status: int, title: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.title = title


class Site:
    """Renders pages."""

    def __init__(
        self, daemon: Daemon, reading: Reading, sessions: Sessions, wall: Callable[[], float]
    ) -> None:
        """``wall`` is seconds since the epoch."""
        self.daemon = daemon
        self.reading = reading
        self.sessions = sessions
        self._wall = wall
        self._environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.filters.update(filters())
        files = {name: (HERE / "static" / name).read_bytes() for name in STATIC}
        self._files = files
        stamp = hashlib.sha256(b"".join(files.values())).hexdigest()[:12]
        self._environment.globals.update(version=__version__, stamp=stamp)

    def compile(self) -> None:
        """
        Make code of all templates, once a process: 0.2 s of CPU and 2 MB, to be spent in a thread.

        On the event loop the first page held everything up for 60 ms.  (Spent at the start, for whoever never opens a page too, it
        cost 6 µs of each of the first 40,000 deliveries.)
        """
        for name in self._environment.list_templates():
            self._environment.get_template(name)

    def add_to(self, router: web.UrlDispatcher, access: Access) -> None:
        """Add what is no page of its own: files, log-in and log-out."""
        for name in STATIC:
            router.add_get(f"/{name}", self._file)
        door = Door(self, access)
        router.add_get("/login", door.show)
        router.add_post("/login", door.log_in)
        router.add_post("/logout", door.log_out)

    def now(self) -> datetime.datetime:
        """The time that pages are about."""
        return datetime.datetime.fromtimestamp(self._wall(), datetime.UTC)

    def render(self, name: str, **values: Any) -> str:
        """A template as text."""
        return self._environment.get_template(name).render(**values)

    def page(
        self,
        request: web.Request,
        template: str,
        *,
        status: int = 200,
        message: Message | None = None,
        **values: Any,
    ) -> web.Response:
        """A whole page; ``message`` is said on top, else what the URL says was done."""
        theme = request.cookies.get("hookd_theme", "")
        shared = {
            "theme": theme if theme in THEMES else "",
            "session": self.sessions.holds(request.headers.get("Cookie", "")),
            "here": "/" + request.path.split("/")[1],
            "now": self.now(),
            "message": message or done(request.query),
            "q": request.query.get("q", ""),
        }
        text = self.render(template, **(shared | values))
        return web.Response(text=text, status=status, content_type="text/html", charset="utf-8")

    def problem(self, request: web.Request, status: int, title: str, text: str) -> web.Response:
        """A page that says why there is none."""
        return self.page(request, "problem.html", status=status, title=title, text=text)

    def refused(self, request: web.Request, refusal: Refusal) -> web.Response:
        """For who may not ask: the log-in page where a token is missing."""
        if refusal.status == 401:
            return self.log_in_page(request, request.path_qs, status=401)
        return self.problem(request, refusal.status, "Refused", refusal.message)

    def log_in_page(
        self, request: web.Request, wanted: str, *, status: int = 200, wrong: bool = False
    ) -> web.Response:
        """Asks for the token, and goes on to what was wanted."""
        # a link on another site leads here without the cookie, which is sent to requests of this site only
        again = request.method == "GET" and request.headers.get("Sec-Fetch-Site") in (
            "cross-site",
            "same-site",
        )
        return self.page(
            request,
            "login.html",
            status=status,
            wrong=wrong,
            next=inside(wanted),
            again=again and status == 401,
        )

    async def _file(self, request: web.Request) -> web.Response:
        name = request.path.removeprefix("/")
        return web.Response(
            body=self._files[name],
            content_type=STATIC[name],
            charset="utf-8",
            headers={"Cache-Control": "private, max-age=86400"},
        )


class Door:
    """Logging in and out."""

    def __init__(self, site: Site, access: Access) -> None:
        self._site = site
        self._access = access
        self._wrong = 0
        self._said_at = datetime.datetime.min.replace(tzinfo=datetime.UTC)

    async def show(self, request: web.Request) -> web.Response:
        """``GET /login``."""
        if not self._access.needs_token:
            raise web.HTTPSeeOther("/")
        return self._site.log_in_page(request, "/")

    async def log_in(self, request: web.Request) -> web.Response:
        """``POST /login``: the token once, then a cookie."""
        typed = await typed_in(request)
        given, wanted = typed.get("token", ""), inside(typed.get("next", "/"))
        if not self._access.needs_token:
            raise web.HTTPSeeOther("/")
        if not self._access.is_token(given):
            self._say_wrong(request)
            return self._site.log_in_page(request, wanted, status=401, wrong=True)
        sessions = self._site.sessions
        value = sessions.open()
        log.info(
            "console: logged in", session=sessions.name(f"{sessions.cookie}={value}"), remote=request.remote
        )
        answer = web.Response(status=303, headers={"Location": wanted})
        answer.set_cookie(
            sessions.cookie,
            value,
            httponly=True,
            samesite="Strict",
            # the port speaks plain HTTP; that a browser came by TLS, its Origin says
            secure=request.headers.get("Origin", "").lower().startswith("https://"),
        )
        return answer

    def _say_wrong(self, request: web.Request) -> None:
        """At most one line a minute: whoever guesses must not fill the log."""
        self._wrong += 1
        now = self._site.now()
        if now - self._said_at >= SAY_AGAIN:
            log.warning("console: wrong tokens", count=self._wrong, remote=request.remote)
            self._said_at, self._wrong = now, 0

    async def log_out(self, request: web.Request) -> web.Response:
        """``POST /logout``."""
        self._site.sessions.close(request.headers.get("Cookie", ""))
        answer = web.Response(status=303, headers={"Location": "/login"})
        answer.del_cookie(self._site.sessions.cookie)
        return answer


async def typed_in(request: web.Request) -> dict[str, str]:
    """
    The fields of a form.

    Raises:
        Problem: it cannot be read.
    """
    # whoever asks would choose the decoder: a megabyte of punycode takes minutes, in which nothing is delivered
    if (request.charset or "utf-8").lower() != "utf-8":
        raise Problem(415, "Not understood", "The form is not UTF-8.")
    try:
        form = await request.post()
    except ValueError:
        raise Problem(422, "Not understood", "The form is not UTF-8.") from None
    typed = {name: value.strip() for name, value in form.items() if isinstance(value, str)}
    if any("\0" in value for value in typed.values()):
        raise Problem(422, "Not understood", "There is a NUL in the form, which PostgreSQL does not take.")
    return typed


def inside(path: str) -> str:
    """Where to go on: on this server, or to the front page."""
    return path if INSIDE.fullmatch(path) and not path.startswith("/log") else "/"


DONE = {
    "added": ("good", "The endpoint is registered."),
    "saved": ("good", "Saved."),
    "paused": ("good", "Paused: its deliveries wait."),
    "resumed": ("good", "It receives again."),
    "removed": ("good", "Removed: what was pending is cancelled, its history stays."),
    "verified": ("good", "Verified: it answered the challenge."),
    "resent": ("good", "Queued again. It goes out at once, under the same webhook-id; what happened before stays in the log."),
}  # fmt: skip
"""What an action says on the page that it leads to."""


def done(query: Mapping[str, str]) -> Message | None:
    """What was done, from the URL: only sentences that are known here."""
    said = DONE.get(query.get("done", ""))
    if said is None:
        return None
    tone, text = said
    count = query.get("n", "")
    if count.isascii() and count.isdigit() and len(count) < 12:
        text += f" {int(count):,} queued."
    return Message(tone, text)
