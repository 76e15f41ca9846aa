"""
What a receiver answered, bounded and made harmless before it goes anywhere.

An answer is hostile: NUL makes PostgreSQL refuse a whole batch, lone surrogates cannot be encoded, control characters
play with terminals, and it may be endless.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

HEADERS_MOST = 64
HEADERS_BYTES_MOST = 8 * 1024

CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
LINE_CONTROLS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
REPLACEMENT = "\ufffd"

SECRET_HEADERS = frozenset({"set-cookie", "authorization", "proxy-authenticate", "www-authenticate"})
"""Kept by name only."""


def excerpt(body: bytes, most: int) -> str:
    """The beginning of a body as text, at most ``most`` bytes of it."""
    return CONTROLS.sub(REPLACEMENT, body[:most].decode("utf-8", "replace"))


def kept_headers(raw: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[str, str], ...]:
    """Names and values of an answer's headers, as many as fit."""
    kept: list[tuple[str, str]] = []
    size = 0
    for name, value in raw:
        size += len(name) + len(value)
        if size > HEADERS_BYTES_MOST or len(kept) == HEADERS_MOST:
            break
        text = _line(name)
        kept.append((text, "***" if text.lower() in SECRET_HEADERS else _line(value)))
    return tuple(kept)


def _line(text: bytes) -> str:
    return LINE_CONTROLS.sub(REPLACEMENT, text.decode("utf-8", "replace"))
