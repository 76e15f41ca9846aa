"""
Who may ask the admin server: decided from a request's head alone.

On loopback anybody on this machine may, elsewhere whoever has the token.  Programs are not the danger: browsers are,
which carry requests of foreign pages to loopback.  What keeps those out:

- ``Host`` must be an address that is served here: a name that was rebound to loopback is not (DNS rebinding).
- ``Sec-Fetch-Site`` and ``Origin``, which a page cannot forge or leave out of a request that changes something, must be
  this server's own.  Programs send neither.
- A body must be ``application/json``, which a page can send to another site only after asking; nobody answers.

There is no CORS: nothing is ever allowed to another origin.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""For probes, which know neither name nor token; they say nothing that matters."""

CONSOLE = "/"

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
}
"""Of every answer.  Nothing inline runs: what a receiver or a tenant wrote stays text even if a page forgot that."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    code: str
    message: str


class Access:
    """The rules for one listening address."""

    def __init__(self, host: str, token: bytes) -> None:
        self._host = host.lower()
        self._token = token

    def __repr__(self) -> str:
        return f"<Access host={self._host} token={'yes' if self._token else 'no'}>"

    def refusal(
        self, method: str, path: str, headers: Mapping[str, str], *, has_body: bool, content_type: str
    ) -> Refusal | None:
        """What is wrong with a request; None: it is answered."""
        if method in ("GET", "HEAD") and path in OPEN_PATHS:
            return None
        host = headers.get("Host", "")
        if not self._served(host):
            return Refusal(403, "host", "this Host is not served here; call the address of admin.listen")
        if self._foreign(method, path, headers, host):
            return Refusal(403, "cross_site", "requests from other sites are refused")
        if has_body and content_type != "application/json":
            return Refusal(415, "content_type", "send application/json")
        if self._token and not self._has_token(headers.get("Authorization", "")):
            return Refusal(401, "token", "send the token of admin.token_file as Authorization: Bearer …")
        return None

    def _served(self, host: str) -> bool:
        if self._token:
            # what a rebound name lacks is the token; which names a proxy in front uses is not known here
            return bool(host)
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").lower()
        if name in ("localhost", self._host):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    @staticmethod
    def _foreign(method: str, path: str, headers: Mapping[str, str], host: str) -> bool:
        site = headers.get("Sec-Fetch-Site", "none")
        if site not in ("same-origin", "none"):
            # a link on another page may lead to the console: the page, not what it reads
            followed = method == "GET" and path == CONSOLE and headers.get("Sec-Fetch-Dest") == "document"
            if not followed:
                return True
        origin = headers.get("Origin")
        return origin is not None and origin.lower() not in (
            f"http://{host.lower()}",
            f"https://{host.lower()}",
        )

    def _has_token(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        # aiohttp hands bytes that are no UTF-8 on as surrogates
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token)
        return same and scheme.lower() == "bearer"
