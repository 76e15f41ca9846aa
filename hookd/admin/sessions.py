"""
Sessions of the console: the token is typed once, a signed cookie stands for it until it expires or is logged out.

The signing key is random and lives as long as the process, so a cookie says nothing about the token that could be guessed
at, and a restart ends all sessions.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LIFETIME_S = 12 * 3600
"""A working day."""


class Sessions:
    """Opens, checks and closes the sessions of one process."""

    def __init__(self, wall: Callable[[], float]) -> None:
        """``wall`` is the time in seconds since the epoch."""
        self._wall = wall
        self._key = secrets.token_bytes(32)
        self._closed: dict[str, int] = {}
        """Ids of sessions that were logged out, and when they would have expired."""
        self.cookie = "hookd"
        """Its name.  Cookies do not know ports: the server adds its own, so that two daemons on a machine do not meet."""

    def open(self) -> str:
        """A new session: the cookie's value."""
        said = f"{int(self._wall()) + LIFETIME_S}.{secrets.token_urlsafe(18)}"
        return f"{said}.{self._signature(said)}"

    def holds(self, cookies: str) -> bool:
        """Whether a ``Cookie`` header has a session that is open."""
        return self._found(cookies) is not None

    def name(self, cookies: str) -> str:
        """What the audit trail calls a session; empty where there is none.  It opens nothing."""
        found = self._found(cookies)
        return f"session {found[1][:6]}" if found is not None else ""

    def close(self, cookies: str) -> None:
        """Log out: the cookie is worth nothing any more, wherever else it is kept."""
        found = self._found(cookies)
        if found is not None:
            now = self._wall()
            self._closed = {i: until for i, until in self._closed.items() if until > now}
            expires, session_id = found
            self._closed[session_id] = expires

    def _found(self, cookies: str) -> tuple[int, str] | None:
        # by hand: http.cookies stops at the first odd cookie of another program on the same host
        named = (part.strip().partition("=") for part in cookies.split(";"))
        value = next((value for name, _, value in named if name == self.cookie), "")
        said, _, signature = value.rpartition(".")
        # aiohttp hands bytes that are no UTF-8 on as surrogates
        given = signature.encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._signature(said).encode()):
            return None
        expires, _, session_id = said.partition(".")
        if int(expires) <= self._wall() or session_id in self._closed:
            return None
        return int(expires), session_id

    def _signature(self, said: str) -> str:
        return hmac.new(self._key, said.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
