"""
What a receiver answered, bounded and made harmless before it goes anywhere.

An answer is hostile: NUL makes PostgreSQL refuse a whole batch, lone surrogates cannot be encoded, control characters
play with terminals, and it may be endless.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADERS_BYTES_MOST = 8 * 1024

CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""All but tab and ends of lines; C1 too, which begins a terminal's sequences as ESC does."""
LINE_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")
VISIBLE = bytes(range(0x20, 0x7F))
REPLACEMENT = "\ufffd"

SECRET_HEADERS = frozenset({b"set-cookie", b"authorization", b"proxy-authenticate", b"www-authenticate"})
"""Kept by name only."""


def excerpt(body: bytes, most: int) -> str:
    """The beginning of a body as text, at most ``most`` bytes of it."""
    return CONTROLS.sub(REPLACEMENT, body[:most].decode("utf-8", "replace"))


def header_text(raw: Sequence[tuple[bytes, bytes]]) -> str:
    """An answer's headers as lines, as many as fit."""
    text = b"\n".join([name + b": " + value for name, value in raw])
    if (
        text.translate(None, VISIBLE) == b"\n" * (len(raw) - 1)
        and len(text) <= HEADERS_BYTES_MOST
        and SECRET_HEADERS.isdisjoint([name.lower() for name, _ in raw])
    ):
        return text.decode("ascii")
    lines: list[str] = []
    size = 0
    for name, value in raw:
        size += len(name) + len(value)
        if size > HEADERS_BYTES_MOST:
            break
        line = name + (b": ***" if name.lower() in SECRET_HEADERS else b": " + value)
        lines.append(LINE_CONTROLS.sub(REPLACEMENT, line.decode("utf-8", "replace")))
    return "\n".join(lines)
