"""The overview: how deliveries go, over time and now, and what is in trouble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from hookd.console.charts import Series, count, lines, milliseconds, stacked
from hookd.console.shown import share
from hookd.core.words import bounded, per_second, span
from hookd.postgres import overview
from hookd.postgres.status import COUNT_MOST, status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web

    from hookd.console.charts import Chart
    from hookd.console.site import Site
    from hookd.postgres.overview import Interval, Rates
    from hookd.postgres.status import Lane, Status


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of time that ends now."""

    seconds: int
    intervals: int
    names: str
    """How the intervals are called, for strftime."""


RANGES = {
    "1h": Range(3600, 60, "%H:%M"),
    "6h": Range(6 * 3600, 72, "%H:%M"),
    "24h": Range(86400, 96, "%H:%M"),
    "7d": Range(7 * 86400, 84, "%d %b %H:%M"),
}

LANES = 12


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure."""

    name: str
    value: str
    tone: str = ""
    note: str = ""


class Overview:
    """The front page."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the route."""
        router.add_get("/", self.show)

    async def show(self, request: web.Request) -> web.Response:
        """``GET /?range=1h``."""
        name = request.query.get("range", "1h")
        chosen = RANGES.get(name, RANGES["1h"])
        async with self._site.reading.session() as session:
            rates = await overview.rates(session, seconds=chosen.seconds, intervals=chosen.intervals)
            now = await status(session, LANES)
            failures = await overview.failures(session, since=rates.since)
        return self._site.page(
            request,
            "overview.html",
            ranges=tuple(RANGES),
            range=name if name in RANGES else "1h",
            warnings=warnings(now),
            tiles=tiles(rates, now, name),
            charts=charts(rates.intervals, chosen.names),
            failures=[cause(f) for f in failures.causes],
            failures_note=(
                f"of the newest {overview.FAILURES_MOST:,}, since {failures.looked_back_to:%d %b %H:%M}"
                if failures.looked_back_to
                else ""
            ),
            lanes=[lane(found) for found in now.lanes],
            lanes_note=f"{now.lanes_left_out:,} more without trouble"
            if now.lanes_left_out
            else "those in trouble first",
        )


def warnings(now: Status) -> list[str]:
    """What somebody has to see."""
    said = []
    if not now.nodes:
        said.append("No daemon runs: nothing is delivered.")
    said += [f"Daemon {n['id']} has not spoken for {span(n['silence'].total_seconds())}." for n in now.silent]
    said += [
        f"Daemon {n['id']} holds deliveries back: {n['summary']['stalled']}."
        for n in now.nodes
        if n["summary"].get("stalled")
    ]
    return said


def tiles(rates: Rates, now: Status, name: str) -> list[Tile]:
    """The figures on top."""
    whole, queue = rates.whole, now.queue
    # the last interval has only begun
    recent = rates.intervals[-2] if len(rates.intervals) > 1 else rates.intervals[-1]
    success = whole.success
    tone = "" if success is None else "good" if success >= 0.99 else "wait" if success >= 0.9 else "bad"
    oldest = (now.at - queue["oldest_at"]).total_seconds() if queue["oldest_at"] else None
    waiting = queue["fresh"] + queue["waiting"]
    most = COUNT_MOST if max(queue["fresh"], queue["waiting"]) > COUNT_MOST else waiting
    return [
        Tile("Attempts", per_second(recent.per_second), note=f"{count(whole.attempts)} in {name}"),
        Tile("Success", share(whole.delivered, whole.attempts), tone=tone, note=f"{count(whole.failed)} failed"),
        Tile("Lag, p95", shown_ms(whole.lag_ms.p95), note=f"p50 {shown_ms(whole.lag_ms.p50)}"),
        Tile("Latency, p95", shown_ms(whole.latency_ms.p95), note=f"p50 {shown_ms(whole.latency_ms.p50)}"),
        Tile("In the queue", bounded(waiting, most), note=f"{bounded(queue['waiting'], COUNT_MOST)} for later"),
        Tile("Oldest pending", span(oldest, parts=1) if oldest is not None else "-", note=f"{count(now.total('in_flight'))} in flight"),
        Tile(
            "Dead letters", bounded(queue["dead_letters"], COUNT_MOST), tone="wait" if queue["dead_letters"] else "",
            note="not sent again",
        ),
        Tile(
            "Failing endpoints", count(queue["failing"]), tone="wait" if queue["failing"] else "",
            note=f"{queue['disabled']} disabled" + (f", {queue['paused']} paused" if queue["paused"] else ""),
        ),
    ]  # fmt: skip


def shown_ms(value: float | None) -> str:
    """A time, or that there is none."""
    return milliseconds(value) if value is not None else "-"


def charts(intervals: Sequence[Interval], names_of: str) -> list[Chart]:
    """Attempts, queue, lag and latency over time."""
    names = [f"{i.at:{names_of}}" for i in intervals]
    return [
        stacked(
            "Attempts",
            names,
            [
                Series("delivered", "good", [float(i.delivered) for i in intervals]),
                Series("failed", "bad", [float(i.failed) for i in intervals]),
            ],
            count,
        ),
        stacked(
            "In the queue, at most",
            names,
            [Series("pending", "p50", [float(i.pending) for i in intervals])],
            count,
        ),
        percentiles("Lag: insert to first byte", names, [i.lag_ms for i in intervals]),
        percentiles("Latency of an attempt", names, [i.latency_ms for i in intervals]),
    ]


def percentiles(title: str, names: Sequence[str], found: Sequence[Any]) -> Chart:
    """Three lines."""
    series = [Series(p, p, [getattr(f, p) for f in found]) for p in ("p99", "p95", "p50")]
    return lines(title, names, series, milliseconds)


def cause(found: dict[str, Any]) -> dict[str, Any]:
    """A group of failures in words, and where its attempts are listed."""
    endpoints = found["endpoints"]
    where = (found["host"] or "a removed endpoint") if endpoints == 1 else f"{endpoints} endpoints"
    asked = {
        "outcome": found["outcome"],
        "status": found["status"],
        "endpoint": found["endpoint_id"] if endpoints == 1 else None,
    }
    href = (
        "/live?" + urlencode({k: v for k, v in asked.items() if v})
        if found["outcome"]
        else "/live?state=exhausted"
    )
    return {
        "count": f"{found['failures']:,}",
        "cause": found["reason"] or f"answered {found['status']}",
        "where": where,
        "last_at": found["last_at"],
        "href": href,
        "delivery": f"/events/{found['event_id']}/{found['delivery_id']}",
    }


WHY = {
    "rate": "at its rate limit", "concurrency": "at its concurrency", "hold": "asked for a pause", "breaker": "does not answer",
    "endpoint": "endpoints' own limits", "share": "at its share", "ready": "sending", "idle": "idle",
}  # fmt: skip


def lane(found: Lane) -> dict[str, Any]:
    """A lane as its row shows it."""
    tone = "bad" if found.breaker_open else "wait" if found.stopped or found.failed_lately else "good"
    state = {"bad": "exhausted", "wait": "retry", "good": "ok"}[tone]
    word = "failed lately" if found.why == "idle" and found.failed_lately else WHY.get(found.why, found.why)
    if found.stopped and found.held_s >= 1:
        word += f", {span(found.held_s, parts=1)} more"
    limit = found.concurrency or found.cap
    used = min(100, round(100 * found.in_flight / limit)) if limit else 0
    return {
        "host": found.host,
        "tone_of": state if found.why != "idle" or found.stopped or found.failed_lately else "",
        "word": word,
        "in_flight": found.in_flight,
        "limit": limit or "no limit",
        "used": used,
        "full": used >= 100,
        "rate": f"{found.rate:g}/s" if found.rate else "none",
        "queued": f"{found.queued:,}+" if found.queued_more else f"{found.queued:,}",
        "problem": f"{found.problem}, {span(found.problem_s, parts=1)} ago"
        if found.problem_s is not None
        else "",
    }
