"""
Who may ask the admin server: decided from a request's head alone.

On loopback anybody on this machine may, elsewhere whoever has the token, or a session that was opened with it.  Programs
are not the danger: browsers are, which carry requests of foreign pages to loopback.  What keeps those out:

- ``Host`` must be an address that is served here: a name that was rebound to loopback is not (DNS rebinding).  A token
  changes nothing about that.  Only beyond loopback, and with no names configured, it is not known what is served.
- ``Sec-Fetch-Site`` and ``Origin``, which a page can neither forge nor, in browsers since 2020, leave out of a request that
  changes something, must be this server's own.  Programs send neither.
- So a POST to the API that comes with neither and with no token may be a page's in an older browser.  It has to hold what a
  page can send to another site only after asking, and nobody answers that (CORS): ``application/json``, with or without a
  body, or the header that names who acts.  ``PATCH``, ``PUT`` and ``DELETE`` no page sends without asking.
- A body must be ``application/json``.  The forms of the console are the exception: they, and whatever else changes
  something with a session, have to say that they come from here.

There is no CORS: nothing is ever allowed to another origin.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hookd.admin.sessions import Sessions

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""For probes, which know neither name nor token; they say nothing that matters."""

WITHOUT_TOKEN = frozenset({"/login", "/console.css", "/console.js", "/icon.svg"})
"""What the log-in page needs."""

FORM = "application/x-www-form-urlencoded"

JSON = "application/json"

ACTOR_HEADER = "Hookd-Actor"
"""For whom a program acts, for the audit trail: taken for what it says."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # not no-referrer, under which forms say "Origin: null"
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
}
"""Of every answer.  Nothing inline runs: what a receiver or a tenant wrote stays text even if a page forgot that."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    code: str
    message: str


def is_page(path: str) -> bool:
    """Whether a path is the console's: what is refused there is said in a page."""
    return not path.startswith("/api/") and path not in OPEN_PATHS and path != "/metrics"


class Access:
    """The rules for one listening address."""

    def __init__(self, host: str, token: bytes, sessions: Sessions, names: Sequence[str] = ()) -> None:
        self._hosts = frozenset({"localhost", host.lower(), *(name.lower() for name in names)})
        # beyond loopback a proxy or DNS gives this server names that are not known here
        self._any_host = bool(token) and not names and not _is_loopback(host)
        self._token = token
        self._sessions = sessions

    def __repr__(self) -> str:
        return f"<Access hosts={sorted(self._hosts)} token={'yes' if self._token else 'no'}>"

    def refusal(
        self, method: str, path: str, headers: Mapping[str, str], *, has_body: bool, content_type: str
    ) -> Refusal | None:
        """What is wrong with a request; None: it is answered."""
        reads = method in ("GET", "HEAD")
        if reads and path in OPEN_PATHS:
            return None
        host = headers.get("Host", "")
        if not self._served(host):
            return Refusal(
                403,
                "host",
                "this Host is not served here; call the address of admin.listen, or name the host in admin.hosts",
            )
        if self._foreign(method, path, headers, host):
            return Refusal(403, "cross_site", "requests from other sites are refused")
        page = is_page(path)
        if has_body and content_type != (FORM if page else JSON):
            return Refusal(415, "content_type", f"send {FORM if page else JSON}")
        own = self._own(headers, host)
        if page and not reads and not own:
            return Refusal(
                403, "cross_site", "forms are taken from the console's own pages; programs use /api/v1"
            )
        if method == "POST" and not (page or self._token or own or _asked_for(headers, content_type)):
            return Refusal(
                403,
                "cross_site",
                f"another site's page could have sent this: add the header Content-Type: {JSON}, with or without a body, "
                f"or {ACTOR_HEADER}: NAME",
            )
        if not self._token or path in WITHOUT_TOKEN or self.has_token(headers.get("Authorization", "")):
            return None
        if self.has_session(headers) and (reads or own):
            return None
        return Refusal(401, "token", "send the token of admin.token_file as Authorization: Bearer …")

    @property
    def needs_token(self) -> bool:
        """Whether there is one to be typed."""
        return bool(self._token)

    def has_session(self, headers: Mapping[str, str]) -> bool:
        """Whether a request comes with a session of the console."""
        return self._sessions.holds(headers.get("Cookie", ""))

    def _served(self, host: str) -> bool:
        if self._any_host:
            return bool(host)
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").lower()
        return bool(name) and (name in self._hosts or _is_loopback(name))

    @staticmethod
    def _foreign(method: str, path: str, headers: Mapping[str, str], host: str) -> bool:
        site = headers.get("Sec-Fetch-Site", "none")
        if site not in ("same-origin", "none"):
            # a link on another page may lead to a page of the console, which no frame and no script of its can read
            followed = method == "GET" and is_page(path) and headers.get("Sec-Fetch-Dest") == "document"
            if not followed:
                return True
        origin = headers.get("Origin")
        return origin is not None and not _same(origin, host)

    @staticmethod
    def _own(headers: Mapping[str, str], host: str) -> bool:
        """Whether a browser says that a page of this server sent it; what says otherwise has been refused."""
        return headers.get("Sec-Fetch-Site") == "same-origin" or _same(headers.get("Origin", ""), host)

    def has_token(self, authorization: str) -> bool:
        """Whether it is the token, as ``Bearer …``."""
        scheme, _, given = authorization.partition(" ")
        return self.is_token(given.strip()) and scheme.lower() == "bearer"

    def is_token(self, given: str) -> bool:
        """Whether it is the token; in a time that says nothing of it."""
        # aiohttp hands bytes that are no UTF-8 on as surrogates
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token)


def _asked_for(headers: Mapping[str, str], content_type: str) -> bool:
    """Whether a page of another site would have needed leave to send it, or a person sent it by hand."""
    return content_type == JSON or ACTOR_HEADER in headers or headers.get("Sec-Fetch-Site") == "none"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _same(origin: str, host: str) -> bool:
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
