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

CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""All but tab and ends of lines; C1 too, which begins a terminal's sequences as ESC does."""
LINE_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")
REPLACEMENT = "\ufffd"

SECRET_HEADERS = frozenset({b"set-cookie", b"authorization", b"proxy-authenticate", b"www-authenticate"})
"""Kept by name only."""


def excerpt(body: bytes, most: int) -> str:
    """The beginning of a body as text, at most ``most`` bytes of it."""
    return CONTROLS.sub(REPLACEMENT, body[:most].decode("utf-8", "replace"))


def header_text(raw: Iterable[tuple[bytes, bytes]]) -> str:
    """An answer's headers as lines, as many as fit."""
    lines: list[bytes] = []
    size = 0
    for name, value in raw:
        size += len(name) + len(value)
        if size > HEADERS_BYTES_MOST or len(lines) == HEADERS_MOST:
            break
        lines.append(name + (b": ***" if name.lower() in SECRET_HEADERS else b": " + value))
    text = b"".join(lines)
    if not (text.isascii() and text.decode("ascii").isprintable()):
        return "\n".join(LINE_CONTROLS.sub(REPLACEMENT, line.decode("utf-8", "replace")) for line in lines)
    return b"\n".join(lines).decode("ascii")
