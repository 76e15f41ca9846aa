"""Endpoints: the list, and one with its health over time."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

from hookd.console.charts import Series, count, lines, milliseconds, stacked
from hookd.console.markup import sparkline
from hookd.console.overview import cause
from hookd.console.overview import lane as lane_row
from hookd.console.query import Query, uuid
from hookd.console.shown import share
from hookd.console.site import Problem
from hookd.core.words import bounded
from hookd.postgres import audit, overview, registry, search
from hookd.postgres.registry import NotPossible
from hookd.postgres.status import COUNT_MOST, lanes_of, nodes, pending_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from aiohttp import web

    from hookd.console.charts import Chart
    from hookd.console.site import Site
    from hookd.postgres.registry import EndpointRecord

ROWS = 50

HOURS = 24
"""Of the list's small charts."""

NOT_CALLED = [0] * HOURS, [0] * HOURS

HEALTH_HOURS = 72

LATEST = 10

FIELDS = ("url", "tenant", "state")


class Endpoints:
    """The pages that show endpoints."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the routes."""
        router.add_get("/endpoints", self.listing)
        router.add_get("/endpoints/{id}", self.show)

    async def listing(self, request: web.Request) -> web.Response:
        """``GET /endpoints``: in order of creation."""
        typed = {n: request.query[n].strip() for n in FIELDS if request.query.get(n, "").strip()}
        if not "".join(typed.values()).isprintable():
            raise Problem(422, "Not understood", "There is a character in it that does not print.")
        asked = Query("/endpoints", typed=typed, cursor=request.query.get("cursor") or None)
        after = uuid(asked.cursor, "cursor") if asked.cursor else None
        async with self._site.reading.session() as session:
            records = await registry.listing(
                session,
                tenant=typed.get("tenant"),
                state=typed.get("state"),
                after=after,
                limit=ROWS + 1,
                url=typed.get("url"),
            )
            more, records = len(records) > ROWS, records[:ROWS]
            made = await overview.hourly_outcomes(session, [r.id for r in records], hours=HOURS)
        return self._site.page(
            request,
            "endpoints.html",
            rows=[listed(r, *made.get(r.id, NOT_CALLED)) for r in records],
            address=asked,
            next=str(records[-1].id) if more else None,
        )

    async def show(self, request: web.Request) -> web.Response:
        """``GET /endpoints/ID``."""
        wanted = uuid(request.match_info["id"], "endpoint")
        now = self._site.now()
        async with self._site.reading.session() as session:
            record = await found(session, wanted)
            hours = await overview.endpoint_hours(session, [wanted], hours=HEALTH_HOURS)
            failures = await overview.failures(
                session, since=now - datetime.timedelta(hours=24), endpoint=wanted
            )
            latest = await search.deliveries(session, search.Filter(endpoint=wanted), None, LATEST)
            trail = await audit.entries(session, audit.Sought(endpoint=wanted), None, LATEST)
            lanes = {lane.host: lane for lane in lanes_of(await nodes(session))}
            fresh, waiting = await pending_of(session, record.key)
        state, note = standing(record)
        lane = lanes.get(record.host)
        return self._site.page(
            request,
            "endpoint.html",
            e=record,
            base=f"/endpoints/{record.id}",
            shown_state=state,
            note=note,
            pending=f"{bounded(fresh, COUNT_MOST)} fresh, {bounded(waiting, COUNT_MOST)} for later",
            lane=lane_row(lane) if lane is not None else None,
            charts=charts(hours[wanted], now),
            causes=[cause(f) for f in failures.causes],
            deliveries=latest.rows,
            audit=[entry(row) for row in trail.rows],
        )


async def found(session: Any, wanted: UUID) -> EndpointRecord:
    """An endpoint, or the page that says that there is none."""
    try:
        return await registry.show(session, wanted)
    except NotPossible:
        raise Problem(404, "No such endpoint", f"There is no endpoint {wanted}.") from None


def standing(record: EndpointRecord) -> tuple[str, str]:
    """How an endpoint is, in a word and in a sentence."""
    if record.state == "active" and record.parked_at:
        return "parked", record.failing_reason or ""
    if record.state == "active" and record.failing_since:
        return "failing", record.failing_reason or ""
    return record.state, record.state_reason or ""


def listed(record: EndpointRecord, delivered: Sequence[int], failed: Sequence[int]) -> dict[str, Any]:
    """An endpoint as a row."""
    state, note = standing(record)
    well, badly = sum(delivered), sum(failed)
    return {
        "id": record.id,
        "url": record.url,
        "tenant": record.tenant,
        "types": record.types,
        "shown_state": state,
        "note": note or record.description or "",
        "spark": sparkline(delivered, failed, f"{well + badly:,} attempts in 24 hours, {badly:,} failed"),
        "success": share(well, well + badly),
    }


def charts(hours: Sequence[Mapping[str, Any]], now: datetime.datetime) -> list[Chart]:
    """Health over time: what was delivered and what failed, and how long it took."""
    known = {row["at"]: row for row in hours}
    this = now.replace(minute=0, second=0, microsecond=0)
    times = [this - datetime.timedelta(hours=n) for n in reversed(range(HEALTH_HOURS))]
    slots = [known.get(at) for at in times]
    names = [f"{at:%d %b %H:00}" for at in times]
    return [
        stacked(
            "Attempts by the hour",
            names,
            [
                Series("delivered", "good", [float(s["delivered"]) if s else 0.0 for s in slots]),
                Series("failed", "bad", [float(s["failed"]) if s else 0.0 for s in slots]),
            ],
            count,
        ),
        lines(
            "Latency by the hour",
            names,
            [
                Series("slowest", "p99", [s["slowest_ms"] if s else None for s in slots]),
                Series("average", "p50", [s["average_ms"] if s else None for s in slots]),
            ],
            milliseconds,
        ),
    ]


def entry(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the audit trail, with its details as text."""
    details = ", ".join(
        f"{k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in row["details"].items()
    )
    return dict(row) | {"shown": details}
