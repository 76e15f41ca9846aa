"""
The four forms of a body.

The payload's bytes are spliced in as they were given: parsing and printing them again would reorder keys, lose digits
of large numbers, and cost more than all the rest of an attempt.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import quote

from hookd.core.model import RAW, STANDARD, BodyFormat

if TYPE_CHECKING:
    from hookd.core.model import Event

CONTENT_TYPES = {
    STANDARD: "application/json",
    RAW: "application/json",
    BodyFormat.CLOUDEVENTS: "application/cloudevents+json",
    BodyFormat.THIN: "application/json",
}


@dataclass(frozen=True, slots=True)
class ThinLink:
    """Where the receiver of a thin event fetches its payload, and how that URL is signed."""

    template: str
    """With ``{event_id}`` in it."""
    key: bytes
    lifetime_s: float

    def __repr__(self) -> str:
        return f"ThinLink({self.template!r}, '***', {self.lifetime_s!r})"

    def url(self, event_id: str, created_at: float) -> str:
        """
        The URL for an event: the same over all retries, so that the body is too.

        It expires ``lifetime_s`` after the event was inserted.
        """
        expires = int(created_at + self.lifetime_s)
        signature = thin_signature(self.key, event_id, expires)
        url = self.template.replace("{event_id}", quote(event_id, safe=""))
        return f"{url}{'&' if '?' in url else '?'}expires={expires}&signature={signature}"


def thin_signature(key: bytes, event_id: str, expires: int) -> str:
    """HMAC-SHA256 of ``{event_id}.{expires}`` in hex; ``hookd.check_thin`` in the database checks it."""
    return hmac.digest(key, f"{event_id}.{expires}".encode(), hashlib.sha256).hex()


def content_type(form: BodyFormat) -> str:
    """The media type of a body."""
    return CONTENT_TYPES[form]


def body(event: Event, form: BodyFormat, *, thin: ThinLink | None = None, source: str = "hookd") -> bytes:
    """
    The body of an event, written once and kept with it.

    Raises:
        ValueError: a thin event without a thin_url; an event that was written past hookd's checks.
    """
    for known, written in event.bodies:
        if known is form:
            return written
    written = _write(event, form, thin, source)
    event.bodies += ((form, written),)
    return written


def _write(event: Event, form: BodyFormat, thin: ThinLink | None, source: str) -> bytes:
    if form is RAW:
        return event.payload
    if form is STANDARD:
        second, millisecond = divmod(_milliseconds(event.created_at), 1000)
        return b"".join(
            (_standard_head(event.type, second), MILLISECONDS[millisecond], b'","data":', event.payload, b"}")
        )
    kind = _quoted(event.type)
    at = rfc3339(event.created_at).encode()
    match form:
        case BodyFormat.CLOUDEVENTS:
            return (
                b'{"specversion":"1.0","id":"%b","source":%b,"type":%b,"time":"%b",'
                b'"datacontenttype":"application/json","data":%b}'
            ) % (str(event.id).encode(), json.dumps(source).encode(), kind, at, event.payload)
        case BodyFormat.THIN:
            if thin is None:
                raise ValueError(NO_THIN_URL)
            url = json.dumps(thin.url(str(event.id), event.created_at)).encode()
            return b'{"type":%b,"timestamp":"%b","id":"%b","url":%b}' % (
                kind,
                at,
                str(event.id).encode(),
                url,
            )


NO_THIN_URL = "the format is thin, but delivery.thin_url is not set"


def format_problem(form: str | None, thin_url: str) -> str:
    """Why nothing could be sent in a format; empty: it can.  ``thin_url`` is the configuration's."""
    return NO_THIN_URL if form == BodyFormat.THIN and not thin_url else ""


@lru_cache(1024)
def _quoted(text: str) -> bytes:
    return json.dumps(text).encode()


@lru_cache(1024)
def _standard_head(type_: str, second: int) -> bytes:
    return b'{"type":%b,"timestamp":"%b' % (_quoted(type_), _second(second).encode())


MILLISECONDS = tuple(f".{n:03d}Z".encode() for n in range(1000))


YEAR_1_S, YEAR_10000_S = -62_135_596_800, 253_402_300_800
"""The years of four digits (RFC 3339, 1), in seconds since 1970."""


def _milliseconds(wall: float) -> int:
    if not YEAR_1_S <= wall < YEAR_10000_S:
        raise ValueError("the event's created_at is beyond the years that RFC 3339 can write")
    # half a microsecond, so that what PostgreSQL has as .123 is not .122999…
    return int(wall * 1000 + 0.0005)


def rfc3339(wall: float) -> str:
    """A time as ``2026-11-23T20:15:00.123Z``."""
    second, millisecond = divmod(_milliseconds(wall), 1000)
    return _second(second) + MILLISECONDS[millisecond].decode()


@lru_cache(64)
def _second(second: int) -> str:
    # events come in the order of their time, and printing one costs 4 µs
    return f"{datetime.datetime.fromtimestamp(second, datetime.UTC):%Y-%m-%dT%H:%M:%S}"
