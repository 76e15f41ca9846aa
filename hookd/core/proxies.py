"""
An egress proxy, as it is configured, and what its refusals mean.

Every connection is a tunnel, for http as for https: through a forwarding proxy its own errors could not be told from a
receiver's answers.  A fault of the proxy itself is ours and is never charged to an endpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from hookd.core.model import ConnectFailure, OutcomeKind, Secret

SCHEMES = {"http": 3128, "https": 443, "socks5": 1080}

EXAMPLE = 'write for example "http://proxy.internal:3128", "https://proxy.internal:443" or "socks5://user:password@10.0.0.9:1080"'

UNREACHABLE = "the egress proxy cannot be reached"
REFUSED_BY_PROXY = "the egress proxy does not allow it"


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where it is."""

    scheme: str
    host: str
    port: int
    user: str = field(default="", repr=False)
    password: Secret = field(default=Secret(""), repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_proxy(text: str) -> Proxy:
    """
    Read a proxy's URL.

    Raises:
        ValueError: it is none; the message does not repeat it, for it may hold a password.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"is no proxy's URL; {EXAMPLE}") from None
    if parts.scheme not in SCHEMES:
        known = "http, https and socks5"
        raise ValueError(f"only proxies of {known} are known; {EXAMPLE}")
    if (
        not host
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
        or re.search(r"[\s\x00-\x1f]", text)
    ):
        raise ValueError(f"is no proxy's URL; {EXAMPLE}")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if len(user.encode()) > 255 or len(password.encode()) > 255:
        raise ValueError("the proxy's user name and password have at most 255 bytes each (RFC 1929)")
    return Proxy(parts.scheme, host, port or SCHEMES[parts.scheme], user, Secret(password))


def connect_refusal(status: int, headers: bytes) -> ConnectFailure | None:
    """
    What a proxy's answer to CONNECT means; None: the tunnel stands.

    smokescreen says 407 to what it does not allow, and names itself in a header; 502 and 504 are about the target (RFC
    9110, 15.6); everything else is between the proxy and us.
    """
    if 200 <= status < 300:
        return None
    if status == 403 or (status == 407 and b"x-smokescreen-error" in headers.lower()):
        return ConnectFailure(OutcomeKind.BLOCKED, REFUSED_BY_PROXY)
    if status == 502:
        return ConnectFailure(OutcomeKind.CONNECT_FAILED, "the connection could not be opened")
    if status == 504:
        return ConnectFailure(OutcomeKind.CONNECT_TIMEOUT, "the connection timed out")
    return ConnectFailure(OutcomeKind.OURS, f"the egress proxy answered {status}")


SOCKS_REPLIES = {
    2: ConnectFailure(OutcomeKind.BLOCKED, REFUSED_BY_PROXY),
    3: ConnectFailure(OutcomeKind.CONNECT_FAILED, "the connection could not be opened"),
    4: ConnectFailure(OutcomeKind.CONNECT_FAILED, "the connection could not be opened"),
    5: ConnectFailure(OutcomeKind.CONNECT_REFUSED, "the connection was refused"),
    6: ConnectFailure(OutcomeKind.CONNECT_TIMEOUT, "the connection timed out"),
}
"""RFC 1928, 6; the others are between the proxy and us."""


def socks_refusal(reply: int) -> ConnectFailure | None:
    """What a SOCKS5 reply means; None: the tunnel stands."""
    if reply == 0:
        return None
    return SOCKS_REPLIES.get(reply) or ConnectFailure(
        OutcomeKind.OURS, f"the egress proxy answered with error {reply}"
    )
