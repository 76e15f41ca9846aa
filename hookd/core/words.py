"""Numbers as people read them."""

from __future__ import annotations

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def span(seconds: float, *, parts: int = 2) -> str:
    """A length of time: ``12 s``, ``3 min 5 s``, ``2 d``; with one part ``3 min``."""
    left = max(0, int(seconds))
    said: list[str] = []
    for size, unit in UNITS:
        count, left = divmod(left, size)
        if count or said:
            said.append(f"{count} {unit}" if count else "")
        if len(said) == parts:
            break
    return " ".join(filter(None, said)) or "0 s"


def bounded(count: int, most: int) -> str:
    """A count that was made up to a bound: ``1,234``, or ``10,000+`` above it."""
    return f"{most:,}+" if count > most else f"{count:,}"


def per_second(rate: float) -> str:
    """A rate: ``0.5/s``, ``12.3/s``, ``1,234/s``."""
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.1f}/s"


def several(count: int, what: str) -> str:
    """``1 shard``, ``64 shards``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")
