"""A request as people are shown it: every header, but the values of an endpoint's own, which may be credentials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from hookd.core.request import Request

HIDDEN = "***"


def shown(request: Request, hidden: Collection[str]) -> dict[str, Any]:
    """The method, url, line (``POST /path HTTP/1.1``), headers (pairs), body (text) and body_bytes of a request; ``hidden``: names, in any case."""
    own = {name.lower() for name in hidden}
    line, *lines = (request.head + request.lines).decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = []
    for text in lines:
        name, _, value = text.partition(":")
        headers.append((name, HIDDEN if name.lower() in own else value.strip()))
    return {
        "method": line.partition(" ")[0],
        "url": request.target.url,
        "line": line,
        "headers": headers,
        "body": request.body.decode("utf-8", "replace"),
        "body_bytes": len(request.body),
    }
