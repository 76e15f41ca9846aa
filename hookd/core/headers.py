"""
Which headers a subscriber or a producer may set.

aiohttp checks values but not names, and a prepared head bypasses even that: names such as ``X: injected``, a second
``Content-Length`` or a foreign ``Host`` would be sent as they are.  So names must be tokens and values visible ASCII
with blanks inside (RFC 9110, 5.5 and 5.6.2; no tabs, which it allows and some parsers fold), and none may frame, route,
change the method, speak for a proxy or sign.

Names are compared as the worst of readers does: without case, and with ``_`` for ``-`` (CGI and WSGI make both
``HTTP_WEBHOOK_SIGNATURE``).
"""

from __future__ import annotations

import re

TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,128}")
VALUE = re.compile(r"(?:[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?)?")

TOTAL_MOST = 8 * 1024

RESERVED = frozenset(
    {
        # framing: RFC 9110 and 9112, 6; of one connection: RFC 9110, 7.6.1, and 7540, 3.2.1
        "connection",
        "content-length",
        "expect",
        "http2-settings",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        # what the body is, which the format says; nothing is decompressed
        "accept-encoding",
        "content-encoding",
        "content-range",
        "content-type",
        "cookie",
        # routing: what proxies add (RFC 7239, 9110, 8470) and gateways, frameworks and CDNs believe
        "client-ip",
        "early-data",
        "host",
        "max-forwards",
        "proxy",  # HTTP_PROXY to CGI programs (CVE-2016-5385, "httpoxy")
        "true-client-ip",
        "via",
        "x-client-ip",
        "x-host",
        "x-real-ip",
        "x-rewrite-url",
        # another method than POST
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
        # signatures of requests (RFC 9421) and what they cover (RFC 9530, 3230, 1864)
        "content-digest",
        "content-md5",
        "digest",
        "repr-digest",
        "signature",
        "signature-input",
    }
)
RESERVED_PREFIXES = ("webhook-", "svix-", "hookd-", "proxy-", "forwarded", "x-forwarded", "x-original-")


def as_read(name: str) -> str:
    """A name as receivers may take it."""
    return name.lower().replace("_", "-")


def check_header(name: str, value: str) -> str | None:
    """What is wrong with a header, in words that do not repeat its value; None if nothing is."""
    if not TOKEN.fullmatch(name):
        return f"header name {name[:40]!r} is not a token of RFC 9110"
    read = as_read(name)
    if read in RESERVED or read.startswith(RESERVED_PREFIXES):
        return f"header {name!r} is set by hookd and cannot be chosen"
    if not VALUE.fullmatch(value):
        return f"the value of header {name!r} has characters other than visible ASCII, or blanks at its ends"
    return None


def check_headers(headers: object) -> str | None:
    """The same for all headers of an endpoint or event, and for their total size."""
    if not isinstance(headers, dict):
        return "the headers are no JSON object"
    total = 0
    seen = set()
    for name, value in headers.items():
        if not isinstance(value, str):
            return f"the value of header {name[:40]!r} is not a string"
        problem = check_header(name, value)
        if problem is not None:
            return problem
        if as_read(name) in seen:
            return f"header {name!r} is given twice"
        seen.add(as_read(name))
        total += len(name) + len(value) + 4
    if total > TOTAL_MOST:
        return f"the headers take {total} bytes; {TOTAL_MOST} are allowed"
    return None
