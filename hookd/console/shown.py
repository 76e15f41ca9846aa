"""Values as the pages show them: times, sizes, states and causes in words."""

from __future__ import annotations

import datetime
import json
import re
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from hookd.console.charts import count, milliseconds
from hookd.console.markup import cells, strips, written
from hookd.core.words import bounded, several, span

if TYPE_CHECKING:
    from collections.abc import Callable

    from markupsafe import Markup

TONES = {
    "delivered": "good", "active": "good", "verified": "good", "ok": "good",
    "pending": "info", "ready": "info", "unverified": "info",
    "retry": "wait", "retrying": "wait", "hold": "wait", "paused": "wait", "parked": "wait", "failing": "wait",
    "exhausted": "bad", "disabled": "bad", "failed": "bad",
}  # fmt: skip
"""How a state is coloured; what is not here is grey."""

PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+')
"""Of a text that is known to be JSON."""

PRETTY_MOST = 256 * 1024
"""Characters of JSON that are laid out; more is shown as it is."""

BODY_MOST = 64 * 1024
"""Characters of a payload or an answer that a page holds."""


def tone(state: str | None) -> str:
    """The colour of a state."""
    return TONES.get(state or "", "")


def pill(state: str, word: str | None = None) -> Markup:
    """A state in its colour, or another word in that colour."""
    return written(f'<span class="pill {tone(state)}">{escape(word or state)}</span>')


def when(at: datetime.datetime | None, now: datetime.datetime, *, exact: bool = False) -> Markup:
    """A time in UTC: of today's only the hour, and how long ago on hover; ``exact`` gives all of it, with milliseconds."""
    if at is None:
        return written('<span class="dim">-</span>')
    at = at.astimezone(datetime.UTC)
    if exact:
        said = f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03}"
    elif at.date() == now.date():
        said = f"{at:%H:%M:%S}"
    else:
        said = f"{at:%d %b %H:%M}" if at.year == now.year else f"{at:%d %b %Y}"
    # nothing in it is anybody's text
    return written(
        f'<time class="nowrap" datetime="{at.isoformat(timespec="milliseconds")}" '
        f'title="{at:%Y-%m-%d %H:%M:%S} UTC, {ago(at, now)}">{said}</time>'
    )


def ago(at: datetime.datetime, now: datetime.datetime) -> str:
    """How far a time is away: ``3 min ago``, ``in 2 h``."""
    seconds = (now - at).total_seconds()
    if abs(seconds) < 1:
        return "now"
    return f"{span(seconds, parts=1)} ago" if seconds > 0 else f"in {span(-seconds, parts=1)}"


def size(octets: int) -> str:
    """A number of bytes: ``412 B``, ``3.4 KiB``."""
    if octets < 1024:
        return f"{octets} B"
    return f"{octets / 1024:.1f} KiB" if octets < 1024 * 1024 else f"{octets / 1024 / 1024:.1f} MiB"


def short(value: Any) -> Markup:
    """An id in little room: of a uuid of version 7 the end tells neighbours apart; all of it on hover."""
    text = str(value)
    if len(text) < 20:
        return escape(text)
    return written(
        f'<span class="mono nowrap" title="{escape(text)}">{escape(text[:8])}…{escape(text[-6:])}</span>'
    )


def share(part: float, whole: float) -> str:
    """A share: ``99.95 %``, never rounded up to 100."""
    if not whole:
        return "-"
    of = part / whole * 100
    if part >= whole:
        return "100 %"
    return f"{min(of, 99.99):.2f} %" if of > 99 else f"{of:.1f} %"


def pretty(text: str) -> str:
    """
    JSON laid out for reading: white space is moved, nothing else; what is no JSON stays as it is.

    It is not parsed and printed again, which would lose long numbers, the order of keys and keys that come twice.
    """
    if len(text) > PRETTY_MOST:
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    lines, depth = [""], 0
    pieces = PIECE.findall(text)
    for n, piece in enumerate(pieces):
        if piece in "]}":
            depth -= 1
            if pieces[n - 1] not in "[{":
                lines.append("  " * depth)
        lines[-1] += piece + (" " if piece == ":" else "")
        if piece in "[{":
            depth += 1
        if piece == "," or (piece in "[{" and pieces[n + 1] not in "]}"):
            lines.append("  " * depth)
    return "\n".join(lines)


def filters() -> dict[str, Callable[..., Any]]:
    """What the templates may call, by name."""
    return {
        "tone": tone, "pill": pill, "when": when, "ago": ago, "size": size, "short": short, "share": share, "pretty": pretty,
        "ms": lambda value: milliseconds(value) if value is not None else "-",
        "count": lambda value: count(value) if value is not None else "-",
        "bounded": bounded, "several": several, "span": span, "cut": lambda text: text[:BODY_MOST],
        "strips": strips, "cells": cells,
    }  # fmt: skip
