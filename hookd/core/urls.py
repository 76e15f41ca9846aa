"""
The grammar of a URL that hookd may call: one function, used when an endpoint is written and again when it is called.

``yarl`` accepts spaces, tabs, empty labels, percent-encoded hosts and full-width digits, and aiohttp dials some of
these without asking any resolver, so nothing is left to them: a URL is taken apart here, judged, and put together in
one canonical form.  The one import from outside the standard library is ``idna``, which is pure.

The host is lower-case A-labels without a trailing dot, or a canonical IP literal.  Everything that *could* be an IPv4
address in some other spelling (octal, hex, short, decimal, full-width) is refused: by the WHATWG "ends in a number"
rule a host whose last label is numeric must be a canonical dotted quad.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import idna

if TYPE_CHECKING:
    from collections.abc import Sequence

URL_MOST = 2048

DEFAULT_PORTS = {"http": 80, "https": 443}

# WHATWG Fetch, "port blocking": services that a request could be made to speak to.
BAD_PORTS = frozenset(
    {
        1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109,
        110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530,
        531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190,
        5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080,
    }
)  # fmt: skip

# What stores data or runs machines and, on a network that trusts itself, asks for no password: POSTs have been
# smuggled into these.  Nobody receives webhooks there.
SERVICE_PORTS = frozenset(
    {
        1433,  # SQL Server
        1521,  # Oracle
        2375, 2376,  # Docker
        2379, 2380,  # etcd
        3306,  # MySQL
        3389,  # remote desktop
        5432,  # PostgreSQL
        5900,  # VNC
        6379,  # Redis
        10250,  # kubelet
        11211,  # memcached
        27017,  # MongoDB
    }
)  # fmt: skip

PRIVATE_SUFFIXES = (
    "local",
    "localdomain",
    "internal",
    "private",
    "arpa",
    "onion",
    "alt",
    "lan",
    "intranet",
    "corp",
    "home",
    "invalid",
    "test",
)
"""
Names that the public DNS does not have (RFC 6761, 6762, 7686, 9476; ICANN's reservation of .internal), or that stand for
networks and not for hosts (.arpa, RFC 3172; home.arpa, RFC 8375; ipv4only.arpa, RFC 7050).
"""

LOCALHOST = ("localhost", "ip6-localhost", "ip6-loopback")
"""Resolved to loopback (RFC 6761, 6.3) and then judged by the address guard like any other."""

URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<query>\?[^#]*)?(?P<fragment>#.*)?",
    re.DOTALL,
)
AUTHORITY = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>.*))?", re.DOTALL)
LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_\-]{0,61}[a-z0-9_])?")
NUMERIC_LABEL = re.compile(r"\d+|0[xX][0-9A-Fa-f]*")
PCHAR = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?|\[\]{}^`\\\"<>]|%[0-9A-Fa-f]{2})*")
CONTROL = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class UrlProblem:
    """Why a URL is refused, fit for whoever wrote it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be called, as far as its form goes; its addresses are judged when it is."""

    url: str
    scheme: str
    host: str
    """Lower-case A-label without trailing dot, or an IP literal without brackets."""
    port: int
    path_and_query: str
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    """For a literal."""
    origin: str = ""
    """Scheme, host and port: what connections are shared by."""

    @property
    def lane(self) -> str:
        """The name of its lane: host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def host_header(self) -> str:
        """Host and, where it is not the scheme's own, port (RFC 9110, 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


class _Refused(Exception):
    pass


def is_localhost(host: str) -> bool:
    """Whether a name is loopback by convention, without asking anybody."""
    return host in LOCALHOST or host.endswith(".localhost")


NO_FULL_NAME = "the host has a single label; write its full name"
PRIVATE_NAME = "the host is a private name, which the public DNS does not have"


def is_named(host: str, names: Sequence[str]) -> bool:
    """Whether a host is one of ``names``, or below one that is written ``*.suffix`` or ``.suffix``; all are lower-case."""
    return any(host.endswith(n.removeprefix("*")) if n.startswith(("*.", ".")) else host == n for n in names)


def parse_url(text: str, *, https_only: bool = False, names: Sequence[str] = ()) -> Target | UrlProblem:
    """
    Take a URL apart and judge its form; one call costs about 8 µs.

    ``names`` are hosts that may be called although the public DNS does not have them (``network.allow_names``).
    """
    try:
        return _parse(text, https_only=https_only, names=names)
    except _Refused as problem:
        return UrlProblem(str(problem))


def _parse(text: str, *, https_only: bool, names: Sequence[str]) -> Target:
    if len(text) > URL_MOST:
        raise _Refused(f"the URL is longer than {URL_MOST} characters")
    if CONTROL.search(text):
        raise _Refused("the URL has a space or a control character in it")
    parts = URL.fullmatch(text)
    if parts is None:
        raise _Refused("this is no URL; write https://host/path")
    scheme = parts["scheme"].lower()
    if scheme not in DEFAULT_PORTS:
        raise _Refused(f"the scheme is {scheme[:20]!r}; only https and http are called")
    if https_only and scheme != "https":
        raise _Refused("only https is allowed here (network.https_only)")
    authority = parts["authority"]
    if "@" in authority:
        raise _Refused("a user name or password in the URL is not allowed; set a header instead")
    if "\\" in authority or "%" in authority:
        raise _Refused("the host must not be percent-encoded or hold a backslash or zone")
    pieces = AUTHORITY.fullmatch(authority)
    if pieces is None:
        raise _Refused("host and port cannot be told apart")
    port = _port(pieces["port"], scheme)
    host, ip = _literal6(pieces["v6"]) if pieces["v6"] is not None else _host(pieces["host"], names)
    path_and_query = _path(parts["path"] or "/", parts["query"] or "")
    target = Target("", scheme, host, port, path_and_query, ip)
    url = f"{scheme}://{target.host_header}{path_and_query}"
    if len(url) > URL_MOST:
        # percent-encoding has made it longer; what is stored must be accepted again when it is called
        raise _Refused(f"the URL is longer than {URL_MOST} characters")
    return replace(target, url=url, origin=f"{scheme}://{target.lane}")


def _port(text: str | None, scheme: str) -> int:
    if text is None:
        return DEFAULT_PORTS[scheme]
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= 65535):
        raise _Refused("the port is not a number from 1 to 65535")
    port = int(text)
    if port in BAD_PORTS or port in SERVICE_PORTS:
        raise _Refused(f"port {port} belongs to another protocol and is never called")
    return port


def _literal6(text: str) -> tuple[str, ipaddress.IPv6Address]:
    try:
        ip = ipaddress.IPv6Address(text)
    except ValueError:
        raise _Refused("what stands in brackets is no IPv6 address") from None
    return str(ip), ip


def _host(text: str, names: Sequence[str]) -> tuple[str, ipaddress.IPv4Address | None]:
    if not text:
        raise _Refused("the URL has no host")
    if len(text) > 253 + 1:
        raise _Refused("the host is longer than 253 characters")
    host = text.removesuffix(".").lower() if text.isascii() else _to_ascii(text)
    labels = host.split(".")
    if NUMERIC_LABEL.fullmatch(labels[-1]):
        try:
            ip = ipaddress.IPv4Address(host)
        except ValueError:
            ip = None
        if ip is None or str(ip) != host or text != host:
            raise _Refused("the host looks like an IPv4 address but is not written as four decimal numbers")
        return host, ip
    _check_name(host, labels, names)
    return host, None


def _check_name(host: str, labels: list[str], names: Sequence[str]) -> None:
    if len(host) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise _Refused("the host is not a valid name")
    for label in labels:
        if label.startswith("xn--"):
            _check_a_label(label)
    if is_localhost(host) or is_named(host, names):
        return
    if len(labels) == 1:
        raise _Refused(NO_FULL_NAME)
    if host.endswith(tuple("." + suffix for suffix in PRIVATE_SUFFIXES)):
        raise _Refused(PRIVATE_NAME)


def _to_ascii(text: str) -> str:
    try:
        return idna.encode(text, uts46=True, transitional=False).decode("ascii").lower().removesuffix(".")
    except (idna.IDNAError, UnicodeError):
        raise _Refused("the host is not a valid international name") from None


def _check_a_label(label: str) -> None:
    try:
        idna.ulabel(label)
    except (idna.IDNAError, UnicodeError):
        raise _Refused("the host has an xn-- label that does not decode") from None


def _path(path: str, query: str) -> str:
    both = path + query
    if not both.isascii():
        both = "".join(
            c if c.isascii() else "".join(f"%{b:02X}" for b in c.encode("utf-8", "surrogatepass"))
            for c in both
        )
    if not PCHAR.fullmatch(both):
        raise _Refused("the path or query has a stray % or a character that must be percent-encoded")
    return both
