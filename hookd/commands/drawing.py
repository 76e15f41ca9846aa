"""
How daemons, queue and lanes are drawn: lines of text for ``status`` and ``top``.

A line is cut to the terminal's width, never wrapped, and says everything without its colour.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from hookd.core.words import bounded, several, span

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hookd.postgres.status import Lane

INDENT = 11
"""Where facts begin, after their name."""

ERROR_LEAST, HOST_LEAST = 28, 20
"""Columns that the last error and the host must have at least, or the error gets a line of its own."""

HOST_LEAST_NARROW = 12

COLOURS: dict[str, dict[str, Any]] = {
    "head": {"bold": True},
    "bad": {"fg": "red"},
    "warn": {"fg": "yellow"},
    "dim": {"dim": True},
    "good": {"fg": "green"},
}


TIME_SHAPE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
UUID_SHAPE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Line:
    """A line, and how much it matters."""

    text: str
    mark: str = ""
    """``head``, ``bad``, ``warn``, ``dim``, ``good``, or nothing."""


def width_of_terminal() -> int | None:
    """The columns that lines are cut to; None where the output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def coloured() -> bool:
    """Whether to use colour: on a terminal, unless NO_COLOR is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def painted(line: Line, width: int | None, *, colour: bool) -> str:
    """A line as it is written."""
    text = cut(line.text, width).rstrip()
    return click.style(text, **COLOURS[line.mark]) if colour and line.mark and text else text


def show(lines: Iterable[Line]) -> None:
    """Print lines, cut to the terminal if it is one."""
    width, colour = width_of_terminal(), coloured()
    for line in lines:
        click.echo(painted(line, width, colour=colour), color=colour)


def printable(text: str) -> str:
    """A text in which nothing plays with the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def cut(text: str, width: int | None) -> str:
    """A text, without what does not fit; what could move the cursor is not printed."""
    text = printable(text)
    return text if width is None or len(text) <= width else text[: max(0, width - 1)] + "…"


def cut_middle(text: str, width: int) -> str:
    """A host's name without its middle: both of its ends tell it from others."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


SHORT_ID = 13
"""Of an id on a narrow terminal: its time to the millisecond, which every command takes for the whole."""

CELL_LEAST = 12
"""Characters of a cell that are shown anyhow; what does not fit then is cut at the end of the line."""


def table(rows: Sequence[Sequence[str]], header: Sequence[str], width: int | None) -> list[Line]:
    """
    Lines of a table under its head, fitted to the terminal's width.

    Where it is too wide the widest cells lose their middles, ids all but their beginnings, and times their year.
    """
    cells = [[name.upper() for name in header], *([printable(text) for text in row] for row in rows)]
    sizes = [max(len(line[n]) for line in cells) for n in range(len(header))]
    if width is not None:
        _fit(cells, sizes, width - 2 * (len(header) - 1))
    texts = [
        "  ".join(cut_middle(c, size).ljust(size) for c, size in zip(line, sizes, strict=True)).rstrip()
        for line in cells
    ]
    return [Line(texts[0], "head"), *map(Line, texts[1:])]


def _fit(cells: list[list[str]], sizes: list[int], spare: int) -> None:
    """Make columns narrower, the least needed parts first."""
    columns = range(len(sizes))
    ids, times = (
        [n for n in columns if any(shape.fullmatch(line[n]) for line in cells[1:])]
        for shape in (UUID_SHAPE, TIME_SHAPE)
    )
    others = [n for n in columns if n not in ids and n not in times]
    _shrink(sizes, others, spare, 2 * CELL_LEAST)
    for kept, chosen in ((slice(SHORT_ID), ids), (slice(len("2026-"), None), times)):
        if sum(sizes) > spare:
            for n in chosen:
                for line in cells[1:]:
                    line[n] = line[n][kept] if len(line[n]) > CELL_LEAST else line[n]
                sizes[n] = max(len(line[n]) for line in cells)
    _shrink(sizes, others, spare, CELL_LEAST)


def _shrink(sizes: list[int], which: Sequence[int], spare: int, least: int) -> None:
    """Take from the widest of these columns until all fit, or none is wider than ``least``."""
    while sum(sizes) > spare:
        widest = max(which, key=lambda n: sizes[n], default=None)
        if widest is None or sizes[widest] <= least:
            return
        sizes[widest] -= 1


def fact(name: str, said: Sequence[str], width: int | None, mark: str = "") -> list[Line]:
    """A name and what is said of it; what does not fit on the line goes on the next."""
    lines, text = [], name.ljust(INDENT)
    for n, part in enumerate(said):
        more = part + ("," if n + 1 < len(said) else "")
        if width is not None and text.strip() and len(text) + len(more) > width and len(text) > INDENT:
            lines.append(Line(text.rstrip(), mark))
            text = " " * INDENT
        text += more + " "
    return [*lines, Line(text.rstrip(), mark)]


def daemons(nodes: Sequence[Mapping[str, Any]], at: Any, width: int | None) -> list[Line]:
    """One fact a daemon."""
    if not nodes:
        return [Line("no daemon is running; start one with `hookd run`", "bad")]
    from hookd.postgres.status import SILENT_S  # noqa: PLC0415 - not for --help

    lines = []
    for node in nodes:
        summary, silence_s = node["summary"], node["silence"].total_seconds()
        silent = silence_s > SILENT_S
        said = [
            node["id"],
            f"hookd {summary['version']}",
            f"up {span((at - node['started_at']).total_seconds())}",
            several(node["shards"], "shard"),
            f"{summary['in_flight']:,} in flight",
            f"{summary['waiting']:,} in memory",
            *([f"silent for {span(silence_s)}"] if silent else []),
            *([f"waits for {summary['stalled']}"] if summary.get("stalled") else []),
            *([f"holds deliveries back: {fault}" for fault in summary.get("faults", ())]),
        ]
        lines += fact("daemon", said, width, "bad" if silent or summary.get("faults") else "")
    return lines


def unowned(nodes: Sequence[Mapping[str, Any]], shards: int) -> list[Line]:
    """A warning where nobody delivers a part of what is pending."""
    missing = shards - sum(node["shards"] for node in nodes)
    if not nodes or missing <= 0:
        return []
    return [Line(f"{several(missing, 'shard')} without a daemon: what is pending there waits", "bad")]


def queue(facts: Mapping[str, Any], at: Any, most: int, width: int | None) -> list[Line]:
    """The queue, and the endpoints."""
    dead = bounded(facts["dead_letters"], most)
    waits = [
        f"{bounded(facts['fresh'], most)} fresh",
        f"{bounded(facts['waiting'], most)} with a due time",
        f"{dead} dead letter{'' if dead == '1' else 's'}",
    ]
    if facts["oldest_at"] is not None:
        waits.append(f"oldest {span((at - facts['oldest_at']).total_seconds())}")
    endpoints = [
        f"{facts['active']:,} active",
        f"{facts['failing']:,} of them failing",
        *([f"{facts['parked']:,} of them parked"] if facts["parked"] else []),
        *([f"{facts['unverified']:,} unverified"] if facts["unverified"] else []),
        f"{facts['paused']:,} paused",
        f"{facts['disabled']:,} disabled",
    ]
    return [*fact("queue", waits, width), *fact("endpoints", endpoints, width)]


# Lanes.

WIDE = {
    "host": "lane", "in_flight": "in flight", "limit": "limit", "rate": "rate", "breaker": "breaker",
    "waits": "waits for", "memory": "in memory", "queue": "in queue", "error": "last error",
}  # fmt: skip

NARROW = {
    "host": "lane", "in_flight": "in flight", "limit": "limit", "rate": "rate", "waits_until": "waits for",
    "memory": "memory", "queue": "queue",
}  # fmt: skip
"""On a narrow terminal what a lane waits for says what its breaker does, and the last error has a line of its own."""

RIGHT = frozenset({"in_flight", "limit", "rate", "memory", "queue"})


def lanes(shown: Sequence[Lane], width: int | None) -> list[list[Line]]:
    """The table of lanes: its head, then the lines of each."""
    rows = [_cells(lane) for lane in shown]
    table = _aligned(rows, WIDE, width, spare=ERROR_LEAST)
    wide = table is not None
    head, *texts = table if table is not None else _aligned(rows, NARROW, width, anyhow=True) or [""]
    blocks = [[Line(head, "head")]]
    for lane, row, text in zip(shown, rows, texts, strict=True):
        mark = _mark(lane)
        blocks.append([Line(text, mark)])
        if lane.problem and not wide:
            blocks[-1].append(Line(f"  {row['error']}", mark))
    return blocks


def _mark(lane: Lane) -> str:
    if lane.stopped:
        return "bad"
    if lane.failed_lately:
        return "warn"
    return "" if lane.waiting or lane.in_flight else "dim"


def _cells(lane: Lane) -> dict[str, str]:
    wait = f" {span(lane.held_s, parts=1)}" if lane.held_s >= 1 else ""
    breaker = "closed"
    if lane.breaker_open:
        breaker = f"open, probe in{wait}" if wait else "open, probe now"
    error = "-"
    if lane.problem_s is not None:
        # the age first: it is the end that is cut
        error = f"{span(lane.problem_s, parts=1)} ago: {lane.problem}"
    what, timed = _waits_for(lane)
    return {
        "host": lane.host,
        "in_flight": f"{lane.in_flight:,}",
        "limit": f"{lane.concurrency}/{lane.cap or '-'}",
        "rate": f"{lane.rate:g}/s" if lane.rate else "-",
        "breaker": breaker,
        "waits": what if lane.breaker_open or not timed else what + wait,
        "waits_until": f"{what} in{wait}" if lane.breaker_open and wait else what + (wait if timed else ""),
        "memory": f"{lane.waiting:,}",
        "queue": f"{lane.queued:,}{'+' if lane.queued_more else ''}",
        "error": error,
    }


def _waits_for(lane: Lane) -> tuple[str, bool]:
    """What is waited for, and whether it is a matter of time."""
    match lane.why:
        case "breaker":
            return "probe", True
        case "hold":
            return "Retry-After", True
        case "machine":
            return "this machine", True
        case "endpoint":
            return "endpoint limits", False
        case "share":
            return "a free slot", False
        case "ready":
            return "its turn", False
        case "idle" if lane.held_s > 0:
            return "hold", True
        case "idle":
            return "-", False
    return lane.why, False


def _aligned(
    rows: Sequence[Mapping[str, str]],
    columns: Mapping[str, str],
    width: int | None,
    *,
    spare: int = 0,
    anyhow: bool = False,
) -> list[str] | None:
    """
    The head and the lines of a table; None where they do not fit, even with the first column cut.

    Of the last column, ``spare`` characters are enough, if that is given.  ``anyhow``: whether they fit or not.
    """
    sizes = {key: max(len(head), *(len(row[key]) for row in rows)) for key, head in columns.items()}
    first, *_, last = columns
    if width is not None:
        needed = sum(sizes.values()) + 2 * (len(columns) - 1)
        if spare:
            needed -= max(0, sizes[last] - spare)
        least = min(HOST_LEAST_NARROW if anyhow else HOST_LEAST, sizes[first])
        sizes[first] -= max(0, needed - width)
        if sizes[first] < least:
            if not anyhow:
                return None
            sizes[first] = least

    def line(cells: Mapping[str, str]) -> str:
        fitted = {
            key: cut_middle(cells[key], size) if key == first else cells[key] for key, size in sizes.items()
        }
        return "  ".join(
            text.rjust(sizes[key]) if key in RIGHT else text.ljust(sizes[key]) for key, text in fitted.items()
        ).rstrip()

    return [line({key: head.upper() for key, head in columns.items()}), *map(line, rows)]
