"""
Markup that Python writes instead of a template.

What comes a hundred times on a page: in a template each value is looked up, called and escaped by itself.  As f-strings these
pieces, and times, ids and pills, took 15 to 32 % off the CPU of the lists (``bench/console.py --only pages``).  Who writes markup escapes
what is in it.
"""

from __future__ import annotations

from operator import add
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from hookd.console.charts import HEIGHT, WIDTH, spark

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookd.console.charts import Chart


def written(html: str) -> Markup:
    """
    Markup as it is: everything in it that is not known here has been escaped.

    ``Markup.format`` and ``%`` would escape it, and are written in Python: many times as slow as an f-string.
    """
    return Markup(html)  # noqa: S704 - the one place of its kind


def sparkline(good: Sequence[int], bad: Sequence[int], say: str) -> Markup:
    """What went well and what did not as a small chart; ``say`` is for who does not see it."""
    well, badly = spark(good, bad)
    return written(
        f'<svg class="spark" viewBox="0 0 100 20" preserveAspectRatio="none" role="img" aria-label="{escape(say)}">'
        f'<path class="area s-good" d="{well}"/><path class="area s-bad" d="{badly}"/><path class="grid" d="M0 20h100"/></svg>'
    )


def strips(chart: Chart) -> Markup:
    """Over each bucket of a chart a strip that says under the pointer what it holds."""
    named = [f"{s.name} " for s in chart.series]
    said = "\n".join(f"{name}: " + ", ".join(map(add, named, values)) for name, values in chart.rows)
    slot = WIDTH / max(1, len(chart.rows))
    return written(
        "".join(
            f'<rect class="hit" x="{n * slot:.1f}" width="{slot:.1f}" y="0" height="{HEIGHT:.0f}" data-say="{say}"/>'
            for n, say in enumerate(_escaped(said).split("\n"))
        )
    )


def cells(chart: Chart) -> Markup:
    """A chart as the rows of a table: a bucket's name and its values."""
    text = "\n".join("\t".join((name, *values)) for name, values in chart.rows)
    inner = _escaped(text).replace("\t", '</td><td class="n">').replace("\n", "</td></tr><tr><td>")
    return written(f"<tr><td>{inner}</td></tr>")


def _escaped(text: str) -> str:
    """All words of a chart at once: escaping leaves tabs and ends of lines alone, and no word has one."""
    return str(escape(text))
