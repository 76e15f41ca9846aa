"""
One request, prepared: what the dispatcher hands to the exchange.

The head is written once for each endpoint, the lines for each attempt; nothing checks them afterwards, so everything
that could split or reframe a request is refused here (RFC 9110, 5.5; RFC 9112, 11.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hookd.core.headers import check_headers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hookd.core.urls import Target


class InvalidRequest(ValueError):
    """The request cannot be built; the message is fit for a tenant."""


@dataclass(slots=True, eq=False)
class Request:
    """A signed POST.  Not frozen, for that costs a microsecond; nobody writes to one."""

    target: Target
    head: bytes = field(repr=False)
    """Request line and the headers that stay the same, each ending in CRLF.  May hold credentials."""
    lines: bytes = field(repr=False)
    """The headers of this attempt, ending in an empty line."""
    body: bytes = field(repr=False)
    timeout_s: float
    connect_timeout_s: float


def prepare_head(target: Target, headers: Mapping[str, str], *, user_agent: str, content_type: str) -> bytes:
    """
    The part of a request that stays the same from one delivery to the next.

    Raises:
        InvalidRequest: a header could split, frame or route the request.
    """
    problem = check_headers(headers)
    if problem is not None:
        raise InvalidRequest(problem)
    own = {
        "host": target.host_header,
        "content-type": content_type,
        "accept": "*/*",
        "accept-encoding": "identity",
        "user-agent": user_agent,
    }
    chosen = {name.lower() for name in headers}
    lines = [f"POST {target.path_and_query} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in own.items() if name not in chosen]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "".join(line + "\r\n" for line in lines).encode("ascii")


def attempt_lines(
    *,
    event_id: str,
    timestamp: int,
    signature: str,
    attempt: int,
    length: int,
    headers: Mapping[str, str] | None,
) -> bytes:
    """
    The headers of one attempt; ``headers`` came with the event.

    Raises:
        InvalidRequest: one of those could split, frame or route the request.
    """
    extra = ""
    if headers:
        problem = check_headers(headers)
        if problem is not None:
            raise InvalidRequest(problem)
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return (
        f"content-length: {length}\r\nwebhook-id: {event_id}\r\nwebhook-timestamp: {timestamp}\r\n"
        f"webhook-signature: {signature}\r\nhookd-attempt: {attempt}\r\n{extra}\r\n"
    ).encode("ascii")
