"""
The report of a run of ``all.py``: the table of goals, a section for each script, and plots.

A goal's row is made from what its script found; a script that did not run leaves its rows open.  Plots are matplotlib's:
logarithmic axes, ticks and legends that do not collide are more than a few lines of SVG, and it is in the extra
``bench`` only.  Without it the report has no plots, and says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Figures = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A row of the table: what, of which script, what is wanted, what was found."""

    what: str
    script: str
    goal: float
    side: str
    """``<=`` or ``>=`` the goal is met."""
    found: Callable[[Figures], float | None]
    form: str = "{:.2f}"

    def row(self, figures: Figures) -> tuple[str, str, str]:
        """What was found, what is wanted, and whether it is met."""
        value = self.found(figures)
        wanted = f"{self.side} {self.form.format(self.goal)}"
        if value is None:
            return "no ratio", wanted, "not measured"
        met = value <= self.goal if self.side == "<=" else value >= self.goal
        return self.form.format(value), wanted, "yes" if met else "**no**"


GOALS = (
    Goal("deliveries/s against the bare `ClientSession` loop (500 in flight, 20 hosts, 1 KiB)", "throughput", 1.8, ">=", lambda f: f["cases"][0]["ratio"], "{:.2f}x"),
    Goal("deliveries/s against the best other queue with the same POST", "peers", 4.0, ">=", lambda f: f["ratio"], "{:.1f}x"),
    Goal("SQL statements a delivery", "cost", 0.02, "<=", lambda f: f["statements"], "{:.4f}"),
    Goal("commits a delivery", "cost", 0.01, "<=", lambda f: f["commits"], "{:.4f}"),
    Goal("updates a delivery that succeeds", "cost", 0, "<=", lambda f: f["updates"], "{:.4g}"),
    Goal("WAL of a delivery's whole life at 200 B payload, bytes", "cost", 1000, "<=", lambda f: f["wal_bytes"], "{:,.0f}"),
    Goal("INSERT to arrival, idle: p50, ms", "latency", 3.0, "<=", lambda f: f["idle"]["p50_ms"]),
    Goal("INSERT to arrival, idle: p99, ms", "latency", 10.0, "<=", lambda f: f["idle"]["p99_ms"]),
    Goal("deliveries/s with a reader's transaction held open: last tenth against first", "horizon", 0.95, ">=", lambda f: f["ratio"], "{:.2f}x"),
    Goal("deliveries/s at 1,000,000 pending against 1,000", "backlog", 0.95, ">=", lambda f: f["speed"], "{:.2f}x"),
    Goal("peak memory at 1,000,000 pending against 1,000", "backlog", 1.1, "<=", lambda f: f["memory"], "{:.2f}x"),
    Goal("healthy hosts' p99 beside a dead one that owns 90 % of the backlog, against without", "isolation", 1.2, "<=", lambda f: f["hole"]["ratio"] if "hole" in f else None, "{:.2f}x"),
    Goal("kill -9 of a daemon to the next one's first delivery: p99, ms", "failover", 250, "<=", lambda f: f["p99_ms"], "{:.0f}"),
    Goal("database connections of a daemon with 500 in flight", "throughput", 4, "<=", lambda f: f["cases"][0]["hookd"]["connections"], "{:.0f}"),
    Goal("producers' commits/s beside a busy daemon against a plain insert there (worst)", "producer", 0.7, ">=", lambda f: min(r["busy_beside"] for r in f["rows"])),
    Goal("resident memory with 10,000 slow exchanges in flight, MB", "inflight", 200, "<=", lambda f: f.get("resident_mb"), "{:.0f}"),
    Goal("free hosts' deliveries/s beside 10,000 throttled ones, against without", "throttled", 0.97, ">=", lambda f: f["ratio"], "{:.2f}x"),
    Goal("use of the rates of 180 limited hosts", "limits", 0.99, ">=", lambda f: f["used"], "{:.3f}"),
)  # fmt: skip


def write(report: dict[str, Any], out: Path) -> dict[str, list[str]]:
    """Write all files; returns each script's rows of the table of goals, as lines."""
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    found = {name: s["figures"] for name, s in report["scripts"].items() if "figures" in s}
    rows: list[str] = []
    lines: dict[str, list[str]] = {}
    for goal in GOALS:
        if goal.script not in found or report["scripts"][goal.script]["state"] == "skipped":
            rows.append(f"| {goal.what} | | | | `bench/{goal.script}.py` |")
            continue
        value, wanted, met = goal.row(found[goal.script])
        rows.append(
            f"| {goal.what} | {wanted} | {value} | {met} | `{report['scripts'][goal.script]['command']}` |"
        )
        lines.setdefault(goal.script, []).append(f"{goal.what}: {value}, goal {wanted}")
    plots = plot(found, out)
    m = report["machine"]
    ran_on = f"{m['cores']} cores of {m['cpu']}, {m['memory_gib']} GiB, {m['system']}"
    taken = f"The machine's host took {report.get('taken_by_host', 0):.0%} of its cores away meanwhile"
    text = [
        "# Figures of hookd\n",
        f"{report['at']}, hookd {m['hookd']}, Python {m['python']}; {ran_on}.\n{taken}; the load before was {m['load_before']:.1f}.\n",
    ]
    if report["size"] != "full":
        text.append("**Sizes are small: these figures try the scripts and say nothing about hookd.**\n")
    text += ["| figure | goal | measured | met | how |", "| --- | --- | --- | --- | --- |", *rows, ""]
    for name, section in SECTIONS.items():
        if name in found:
            text += section(found[name])
    text += [f"![{title}]({file})\n" for file, title in plots]
    if not plots:
        text.append(
            "No plots: matplotlib is not installed (`pip install -e '.[bench]'`), or there is nothing to plot.\n"
        )
    text += ["## Runs\n", "| script | ended | took |", "| --- | --- | --- |"]
    text += [
        f"| `{s['command']}` | {s['state']}{': ' * bool(s['problem'])}{s['problem'].replace('|', '/')} | {s['seconds']:.0f} s |"
        for s in report["scripts"].values()
    ]
    (out / "report.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return lines


# Sections.


def _table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"## {title}\n", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _throughput(f: Figures) -> list[str]:
    head = [
        "case",
        "bare/s",
        "hookd/s",
        "ratio",
        "bare µs",
        "hookd µs",
        "PostgreSQL µs",
        "receiver's core to spare",
    ]
    rows = []
    for c in f["cases"]:
        bare, hookd = c["bare"], c["hookd"]
        spare = f"{1 - max(bare['receiver']['wanted'], hookd['receiver']['wanted']):.0%}"
        ratio = (
            f"{c['ratio']:.2f} ({', '.join(f'{r:.2f}' for r in c['ratios'])})"
            if c["ratio"]
            else "; ".join(c["troubles"])
        )
        rows.append([c["case"], f"{bare['per_s']:,.0f}", f"{hookd['per_s']:,.0f}", ratio, f"{bare['cpu_us']:.0f}",
                     f"{hookd['cpu_us']:.0f}", f"{hookd['postgres_us']:.0f}", spare])  # fmt: skip
    return _table("Throughput, settled, and CPU a delivery", head, rows)


def _latency(f: Figures) -> list[str]:
    rows = [["idle", "", *(f"{f['idle'][p]:.2f}" for p in ("p50_ms", "p99_ms", "p999_ms")), ""]]
    for load in f["loads"]:
        values = [f"{load[p]:.2f}" for p in ("p50_ms", "p99_ms", "p999_ms")]
        if load["troubles"]:
            values = ["; ".join(load["troubles"]), "", ""]
        rows.append([f"{load['share']:.0%} of {f['saturation_per_s']:,.0f}/s", f"{load['events']:,}", *values, f"{load['late_p99_ms']:.1f}"])  # fmt: skip
    return _table("Latency, ms, from the moment an event was due to be inserted", ["load", "events", "p50", "p99", "p99.9", "committers late, p99"], rows)  # fmt: skip


def _cost(f: Figures) -> list[str]:
    rows = [
        [name, f"{s['statements']:.4f}", f"{s['commits']:.4f}", f"{s['wal_bytes']:,.0f}", f"{s['wal_page_images_bytes']:,.0f}",
         f"{s['dead']:.2f}", f"{s['updates']:.4g}", ", ".join(f"{t} {b:,.0f}" for t, b in s["disk_bytes"].items() if abs(b) >= 1)]
        for name, s in f["stretches"].items()
    ]  # fmt: skip
    return _table("What an event costs in PostgreSQL", ["", "statements", "commits", "WAL bytes", "and page images", "dead rows", "updates", "disk bytes"], rows)  # fmt: skip


def _producer(f: Figures) -> list[str]:
    kinds = list(f["rows"][0]["commits_per_s"])
    rows = [
        [str(r["committers"]), *(f"{r['commits_per_s'][k]:,.0f}" for k in kinds), f"{r['busy_beside']:.2f}", f"{r['deliveries_per_s']:,.0f}"]
        for r in f["rows"]
    ]  # fmt: skip
    return _table("Producers' commits a second, one event each", ["committers", *kinds, "busy/beside", "deliveries/s meanwhile"], rows)  # fmt: skip


def _peers(f: Figures) -> list[str]:
    hookd = f["queues"]["hookd"]["per_s"]
    rows = [
        [
            name,
            f"{q['per_s']:,.0f}",
            f"{q['cpu_us']:.0f}",
            f"{q['postgres_us']:.0f}",
            f"{hookd / q['per_s']:.1f}x",
        ]
        for name, q in sorted(f["queues"].items(), key=lambda item: -item[1]["per_s"])
    ]
    rows += [[name, f"skipped: {why}", "", "", ""] for name, why in f["skipped"].items()]
    return _table("The same POST from other queues", ["queue", "requests/s", "CPU µs", "PostgreSQL µs", "hookd against it"], rows)  # fmt: skip


def _profile(f: Figures) -> list[str]:
    rows = [
        [name, f"{p['us']:.1f} ± {p['error_us']:.1f}", f"{p['share']:.1%}", "; ".join(f"`{fn}` {us:.1f}" for fn, us in p["most"])]
        for name, p in f["parts"].items()
    ]  # fmt: skip
    rows.append(["together", f"{f['cpu_us']:.1f}", "", f"{f['system_us']:.1f} in the kernel, by its own count; {f['samples']:,} samples"])  # fmt: skip
    return _table("Where the daemon's CPU goes, µs a delivery", ["part", "µs", "share", "most of it"], rows)


def _guard(f: Figures) -> list[str]:
    rows = [
        [f"{name}, {kind} connection", f"{v['us']:.1f}", f"{v['costs_us']:.2f} ± {v['error_us']:.2f}" if "costs_us" in v else ""]
        for kind, variants in f["kinds"].items() for name, v in variants.items()
    ]  # fmt: skip
    rows += [[f"{name}, alone", f"{us:.2f}", ""] for name, us in f["alone"].items()]
    return _table(
        "What guard, resolver and signing cost, µs of CPU a delivery", ["", "µs", "so it costs"], rows
    )


SECTIONS: dict[str, Callable[[Figures], list[str]]] = {
    "throughput": _throughput,
    "matrix": _throughput,
    "latency": _latency,
    "cost": _cost,
    "producer": _producer,
    "peers": _peers,
    "profile": _profile,
    "guard": _guard,
}


# Plots.


def plot(found: dict[str, Figures], out: Path) -> list[tuple[str, str]]:
    """Draw what there are figures for; returns the files and their titles."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - in the extra bench only
    except ImportError:
        return []
    mpl.use("svg")
    # the same figures make the same file
    mpl.rcParams.update({"svg.hashsalt": "hookd", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9})
    drawn = []
    for draw in (_by_concurrency, _by_load, _memory, _backlog, _horizon):
        title, file = draw.__doc__ or "", draw.__name__.strip("_") + ".svg"
        if draw(found, out / file):
            drawn.append((file, title.strip().rstrip(".")))
    return drawn


def _axes(count: int) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt  # noqa: PLC0415 - see plot

    pair: tuple[Any, Any] = plt.subplots(1, count, figsize=(4.5 * count, 3.2), layout="constrained")
    return pair


def _from_zero(axes: Any) -> None:
    axes.set_ylim(0, axes.dataLim.ymax * 1.08)


def _save(figure: Any, file: Path) -> bool:
    from matplotlib import pyplot as plt  # noqa: PLC0415 - see plot

    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True


def _sweep(found: dict[str, Figures]) -> list[Figures]:
    """The cases that differ from the floor case in their concurrency only."""
    cases = [c for name in ("throughput", "matrix") if name in found for c in found[name]["cases"]]
    cases = [
        c for c in cases if (c["hosts"], c["payload"], c["tls"], c["numbered"]) == (20, 1024, False, False)
    ]
    return sorted(
        {c["concurrency"]: c for c in reversed(cases)}.values(), key=lambda c: int(c["concurrency"])
    )


def _by_concurrency(found: dict[str, Figures], file: Path) -> bool:
    """Throughput and CPU by concurrency."""
    cases = _sweep(found)
    if len(cases) < 2:
        return False
    figure, (left, right) = _axes(2)
    at = [c["concurrency"] for c in cases]
    for name, label in (("bare", "bare ClientSession"), ("hookd", "hookd")):
        left.plot(at, [c[name]["per_s"] for c in cases], "o-", label=label)
        right.plot(at, [c[name]["cpu_us"] for c in cases], "o-", label=label)
    for axes, title in ((left, "deliveries a second"), (right, "CPU a delivery, µs")):
        axes.set(xscale="log", xlabel="in flight", title=title, xticks=at, xticklabels=map(str, at))
        axes.minorticks_off()
        _from_zero(axes)
        axes.legend()
    return _save(figure, file)


def _by_load(found: dict[str, Figures], file: Path) -> bool:
    """Latency percentiles by load."""
    if "latency" not in found:
        return False
    loads = [load for load in found["latency"]["loads"] if not load["troubles"]]
    if not loads:
        return False
    idle = found["latency"]["idle"]
    figure, axes = _axes(1)
    for key, label in (("p50_ms", "p50"), ("p99_ms", "p99"), ("p999_ms", "p99.9")):
        axes.plot([0, *(load["share"] * 100 for load in loads)], [idle[key], *(load[key] for load in loads)], "o-", label=label)  # fmt: skip
    axes.set(yscale="log", xlabel="% of saturation (0: idle)", title="from due to arrival, ms")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    return _save(figure, file)


def _memory(found: dict[str, Figures], file: Path) -> bool:
    """Peak memory by exchanges in flight."""
    points = [(int(c["concurrency"]), c["hookd"]["resident_mb"]) for c in _sweep(found)]
    if "peak_mb" in found.get("inflight", {}):
        points.append((found["inflight"]["in_flight"][0], found["inflight"]["peak_mb"]))
    if len(points) < 2:
        return False
    figure, axes = _axes(1)
    axes.plot(*zip(*sorted(points), strict=True), "o-")
    axes.set(xscale="log", xlabel="in flight", title="peak of resident memory, MB")
    _from_zero(axes)
    return _save(figure, file)


def _backlog(found: dict[str, Figures], file: Path) -> bool:
    """Deliveries a second and memory by what is pending."""
    if "backlog" not in found:
        return False
    figure, (left, right) = _axes(2)
    at = [n for n, _ in found["backlog"]["curve"]]
    for axes, key in ((left, "per_s"), (right, "peak_mb")):
        axes.plot(at, [f[key] for _, f in found["backlog"]["curve"]], "o-")
        axes.set(xscale="log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    left.set(title="deliveries a second", xlabel="pending")
    right.set(title="peak of resident memory, MB", xlabel="pending")
    for axes in (left, right):
        _from_zero(axes)
    return _save(figure, file)


def _horizon(found: dict[str, Figures], file: Path) -> bool:
    """Deliveries a second while a transaction is held open, by tenths of the run."""
    if "horizon" not in found:
        return False
    figure, axes = _axes(1)
    for name, label in (("control", "not held"), ("held", "held")):
        axes.plot(range(1, 11), found["horizon"][name]["tenths_per_s"], "o-", label=label)
    axes.set(title="deliveries a second", xlabel="tenth of the run")
    _from_zero(axes)
    axes.legend()
    return _save(figure, file)
