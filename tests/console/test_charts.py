"""Geometry of the charts, and values in words."""

from __future__ import annotations

import datetime
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookd.console.charts import HEIGHT, WIDTH, Series, count, lines, milliseconds, nice, spark, stacked
from hookd.console.markup import cells, sparkline, strips
from hookd.console.shown import ago, pill, pretty, share, short, size, when

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.mark.parametrize(
    ("most", "top"),
    [(0, 1), (0.7, 1), (1, 1), (3, 5), (17, 20), (24, 25), (99, 100), (100, 100), (101, 200), (4.2e6, 5e6)],
)
def test_the_top_of_an_axis_is_round(most: float, top: float) -> None:
    assert nice(most) == pytest.approx(top)


@given(st.lists(st.floats(0, 1e9, allow_nan=False) | st.none(), min_size=1, max_size=100))
def test_no_mark_leaves_the_box(values: list[float | None]) -> None:
    names = [str(n) for n in range(len(values))]
    chart = lines("x", names, [Series("a", "p50", values)], milliseconds)
    for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", chart.marks[0].path):
        assert -0.1 <= float(x) <= WIDTH + 0.1
        assert -0.1 <= float(y) <= HEIGHT + 0.1
    assert strips(chart).count('class="hit"') == cells(chart).count("<tr>") == len(values)
    assert len(chart.xs) <= 5
    assert chart.empty == (not any(values))


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1, max_size=100))
def test_stacks_stay_in_the_box(values: list[tuple[int, int]]) -> None:
    names = [str(n) for n in range(len(values))]
    series = [
        Series("good", "good", [float(g) for g, _ in values]),
        Series("bad", "bad", [float(b) for _, b in values]),
    ]
    chart = stacked("x", names, series, count)
    for mark in chart.marks:
        for y, height in re.findall(r"M[\d.]+ (-?[\d.]+)h[\d.]+v([\d.]+)", mark.path):
            assert float(y) >= -2.5  # two that are drawn at least a little high
            assert float(y) + float(height) <= HEIGHT + 0.1
    for path in spark([g for g, _ in values], [b for _, b in values]):
        assert all(float(n) <= 100.1 for n in NUMBER.findall(path))


def test_a_gap_stays_a_gap() -> None:
    chart = lines("x", list("abcde"), [Series("a", "p50", [1, None, 2, 3, None])], milliseconds)
    assert chart.marks[0].path.count("M") == 2
    assert chart.rows[1] == ("b", ["-"])
    assert 'data-say="a: a 1 ms"/>' in strips(chart)
    assert cells(chart).startswith(
        '<tr><td>a</td><td class="n">1 ms</td></tr><tr><td>b</td><td class="n">-</td></tr>'
    )


HOSTILE = "<i>\"&'"

SAFE = "&lt;i&gt;&#34;&amp;&#39;"


def test_what_is_written_without_a_template_is_escaped() -> None:
    chart = stacked(HOSTILE, [HOSTILE, "b"], [Series(HOSTILE, "good", [1.0, 2.0])], lambda _: HOSTILE)
    assert f'data-say="{SAFE}: {SAFE} {SAFE}"/>' in strips(chart)
    assert cells(chart).startswith(f'<tr><td>{SAFE}</td><td class="n">{SAFE}</td></tr>')
    assert f'aria-label="{SAFE}">' in sparkline([1], [2], HOSTILE)
    assert pill("active", HOSTILE) == f'<span class="pill good">{SAFE}</span>'
    assert pill(HOSTILE) == f'<span class="pill ">{SAFE}</span>'
    assert HOSTILE[:3] not in short(HOSTILE) + short(HOSTILE * 9)


def test_a_sparkline_is_one_path_for_what_went_well_and_one_for_what_did_not() -> None:
    assert sparkline([2, 0], [0, 1], "3 attempts") == (
        '<svg class="spark" viewBox="0 0 100 20" preserveAspectRatio="none" role="img" aria-label="3 attempts">'
        '<path class="area s-good" d="M0.0 0.0h40.0v20.0h-40.0z"/><path class="area s-bad" d="M50.0 10.0h40.0v10.0h-40.0z"/>'
        '<path class="grid" d="M0 20h100"/></svg>'
    )


@pytest.mark.parametrize(
    ("ms", "said"),
    [
        (0, "0 ms"),
        (0.25, "250 µs"),
        (1, "1 ms"),
        (12.34, "12.3 ms"),
        (850.4, "850 ms"),
        (1240, "1.24 s"),
        (210_000, "3.5 min"),
    ],
)
def test_milliseconds(ms: float, said: str) -> None:
    assert milliseconds(ms) == said


def test_a_share_is_never_rounded_to_all() -> None:
    assert share(99_999, 100_000) == "99.99 %"
    assert share(999_999_999, 10**9) == "99.99 %"
    assert (share(0, 0), share(3, 3), share(1, 3)) == ("-", "100 %", "33.3 %")
    assert (size(10), size(2048), size(3 << 20)) == ("10 B", "2.0 KiB", "3.0 MiB")


NOW = datetime.datetime(2026, 11, 25, 12, 0, tzinfo=datetime.UTC)


def test_times() -> None:
    today = NOW - datetime.timedelta(minutes=3)
    assert ">11:57:00</time>" in when(today, NOW)
    assert "3 min ago" in when(today, NOW)
    assert ">25 Oct 11:57</time>" in when(today.replace(month=10), NOW)
    assert ">2026-11-25 11:57:00.000</time>" in when(today, NOW, exact=True)
    assert (ago(NOW, NOW), ago(NOW + datetime.timedelta(hours=2), NOW)) == ("now", "in 2 h")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_laid_out_json_is_the_same_json(value: object) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert json.loads(pretty(text)) == value


def test_laid_out_json_keeps_what_parsing_would_lose() -> None:
    assert (
        pretty('{"b":12345678901234567890.10,"a":1,"a":2}')
        == '{\n  "b": 12345678901234567890.10,\n  "a": 1,\n  "a": 2\n}'
    )
    assert pretty("<html>") == "<html>"
    assert pretty("[" * 100_000) == "[" * 100_000
