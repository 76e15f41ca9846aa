"""
Charts as geometry: what a template draws as SVG.

Marks live in a box of ``WIDTH`` by ``HEIGHT`` that is stretched to the page; words stay outside of it, so that they never
are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from operator import add
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH = 600.0
HEIGHT = 120.0

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)

XS_MOST = 5


@dataclass(frozen=True, slots=True)
class Series:
    """One line or one layer: a name, the class that colours it, and a value for each bucket; None where there is none."""

    name: str
    kind: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Mark:
    """What is drawn of a series: an SVG path."""

    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything that a template needs."""

    title: str
    series: Sequence[Series]
    marks: Sequence[Mark]
    xs: Sequence[str]
    ys: Sequence[str]
    """From top to bottom."""
    filled: bool
    rows: Sequence[tuple[str, Sequence[str]]]
    """The same as a table: a bucket's name and its values in words."""

    @property
    def empty(self) -> bool:
        """There is nothing to draw."""
        return not any(value for series in self.series for value in series.values)


def nice(most: float) -> float:
    """The smallest round number that is not below ``most``."""
    if most < 1e-9 or not math.isfinite(most):
        return 1.0
    size = 10.0 ** math.floor(math.log10(most))
    return next(step * size for step in STEPS if step * size >= most * (1 - 1e-9))


def stacked(
    title: str, names: Sequence[str], series: Sequence[Series], word: Callable[[float], str]
) -> Chart:
    """Bars, one series upon the other."""
    totals = [sum(values) for values in zip(*[[v or 0.0 for v in s.values] for s in series], strict=True)]
    top = nice(max(totals, default=0.0))
    if word is count:
        top = max(2.0, top)  # the middle of the axis is a whole number too
    slot = WIDTH / max(1, len(names))
    bar = slot * 0.78
    marks = []
    floor = [0.0] * len(names)
    for layer in series:
        path = []
        for n, value in enumerate(layer.values):
            if value:
                height = max(1.2, value / top * HEIGHT)
                x, y = n * slot + (slot - bar) / 2, HEIGHT - floor[n] - height
                path.append(f"M{x:.1f} {y:.1f}h{bar:.1f}v{height:.1f}h-{bar:.1f}z")
                floor[n] += height
        marks.append(Mark(layer.kind, "".join(path)))
    return _chart(title, names, series, marks, top, word, filled=True)


def lines(title: str, names: Sequence[str], series: Sequence[Series], word: Callable[[float], str]) -> Chart:
    """A line a series; a gap where a bucket has no value."""
    top = nice(max((v for s in series for v in s.values if v is not None), default=0.0))
    slot = WIDTH / max(1, len(names))
    marks = [Mark(s.kind, _line(s.values, slot, top)) for s in series]
    return _chart(title, names, series, marks, top, word, filled=False)


def spark(good: Sequence[int], bad: Sequence[int]) -> tuple[str, str]:
    """Two paths in a box of 100 by 20: how much went well and how much did not, upon each other."""
    top = max(map(add, good, bad), default=0) or 1
    lefts, width = _bars(len(good))
    paths: tuple[list[str], list[str]] = ([], [])
    for left, g, b in zip(lefts, good, bad, strict=True):
        below = 0.0
        if g:
            below = max(2.0, g / top * 20)
            paths[0].append(f"{left}{20 - below:.1f}h{width}v{below:.1f}h-{width}z")
        if b:
            height, below = max(2.0, b / top * 20), min(18.0, below)
            paths[1].append(f"{left}{20 - below - height:.1f}h{width}v{height:.1f}h-{width}z")
    return "".join(paths[0]), "".join(paths[1])


@lru_cache(maxsize=4)
def _bars(bars: int) -> tuple[tuple[str, ...], str]:
    """Where the bars of a sparkline begin, and how wide they are: the same in each of the 50 on a page."""
    slot = 100 / max(1, bars)
    return tuple(f"M{n * slot:.1f} " for n in range(bars)), f"{slot * 0.8:.1f}"


def count(value: float) -> str:
    """A number of things."""
    return f"{value:,.0f}"


def milliseconds(value: float) -> str:
    """A time as a person reads it: ``850 µs``, ``12.3 ms``, ``1.24 s``, ``3.5 min``."""
    if value <= 0:
        return "0 ms"
    if value < 1:
        return f"{value * 1000:.0f} µs"
    if value < 1000:
        return f"{value:.1f}".removesuffix(".0") + " ms" if value < 100 else f"{value:.0f} ms"
    seconds = value / 1000
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _line(values: Sequence[float | None], slot: float, top: float) -> str:
    path = []
    pen = "M"
    for n, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        x, y = (n + 0.5) * slot, HEIGHT - value / top * HEIGHT
        alone = pen == "M" and (n + 1 == len(values) or values[n + 1] is None)
        # a single value would draw nothing: a short dash
        path.append(f"M{x - slot * 0.3:.1f} {y:.1f}h{slot * 0.6:.1f}" if alone else f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(path)


def _chart(
    title: str,
    names: Sequence[str],
    series: Sequence[Series],
    marks: Sequence[Mark],
    top: float,
    word: Callable[[float], str],
    *,
    filled: bool,
) -> Chart:
    rows = [
        (name, [word(v) if v is not None else "-" for v in values])
        for name, values in zip(names, zip(*(s.values for s in series), strict=True), strict=True)
    ]
    # spread from edge to edge: the first, the last, and some between
    last = len(names) - 1
    xs = [names[round(n * last / (XS_MOST - 1))] for n in range(XS_MOST)] if last >= XS_MOST else list(names)
    return Chart(title, series, marks, xs, [word(top), word(top / 2), word(0)], filled, rows)
