"""
Metrics in Prometheus' text format, read from what the engine counts; nothing is counted twice for them.

No label has a value that customers choose: a tenant with a million hosts must not become a million series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from hookd import __version__
from hookd.core.database import HOLDERS, Holder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from hookd.core.database import DatabaseHealth
    from hookd.core.histogram import Histogram
    from hookd.daemon import Daemon

TIMED_HOLDERS = ("session", "prepared_transaction")
"""Those of which PostgreSQL knows since when."""

NOBODY = Holder("", 0, None, "")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Telemetry:
    """The metrics of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def exposition(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus' library asks for."""
        daemon = self._daemon
        counts = daemon.dispatcher.counts
        yield _counter("hookd_attempts", "HTTP exchanges by what came of them", "outcome", counts.outcomes)
        yield _counter(
            "hookd_verdicts", "What followed from attempts and endings", "verdict", counts.verdicts
        )
        yield _histogram("hookd_attempt_seconds", "One whole attempt", counts.attempt_s)
        yield _histogram(
            "hookd_delivery_lag_seconds", "From the event's insert to the first byte sent, first attempts only",
            counts.lag_s,
        )  # fmt: skip
        yield _gauge("hookd_build_info", "1", {"version": __version__}, 1)
        yield _gauge(
            "hookd_config_reload_success", "Whether the last reload was applied", None, int(daemon.reload_ok)
        )
        yield _gauge("hookd_in_flight", "Exchanges under way", None, len(daemon.dispatcher.in_flight()))
        if daemon.depth:
            yield _gauges(
                "hookd_queue_depth", "Pending deliveries and dead letters, each counted up to 100,000", "state",
                {s: daemon.depth[s] for s in ("fresh", "scheduled", "dead_letter")},
            )  # fmt: skip
            yield _gauge(
                "hookd_oldest_pending_seconds", "Age of the oldest event that has a fresh delivery", None,
                daemon.depth["oldest_s"],
            )  # fmt: skip
        if daemon.database_health is not None:
            yield from _database(daemon.database_health)
        yield _gauges(
            "hookd_lanes", "Hosts with something waiting or in flight", "state", daemon.lane_states()
        )
        yield _gauge(
            "hookd_endpoints_unreadable", "Endpoints whose secrets cannot be decrypted", None, len(daemon.unreadable())
        )  # fmt: skip
        recorder = daemon.recorder
        yield _histogram(
            "hookd_settle_batch_size", "Results of one settling transaction", recorder.batch_rows
        )
        yield _histogram("hookd_settle_seconds", "One settling transaction", recorder.settle_s)
        yield _counter(
            "hookd_statements", "SQL statements of settling and reading", "session", daemon.statements()
        )
        yield _gauge("hookd_unwritten", "Results that are not committed yet", None, len(recorder.unwritten()))
        yield CounterMetricFamily(
            "hookd_results_dropped",
            "Results whose shard had another owner when they could be written; it may send again",
            recorder.dropped,
        )
        yield _gauge(
            "hookd_ready",
            "Whether it delivers: 0 while /readyz says why not",
            None,
            int(not daemon.trouble()),
        )
        owned = len(daemon.tenure.owner.shards) if daemon.tenure is not None else 0
        yield _gauge("hookd_shards_owned", "Shards whose locks this daemon holds", None, owned)
        yield _gauge("hookd_shards", "Shards that there are", None, daemon.shards_in_all)
        yield _gauge(
            "hookd_database_up", "Whether PostgreSQL answers and the locks are sure", None, int(daemon.database_answers())
        )  # fmt: skip


def _database(health: DatabaseHealth) -> Iterator[Metric]:
    """PostgreSQL, as far as the queue depends on it.  Who holds what is for doctor and the log: it is no label."""
    found = {kind: health.holding(kind) for kind in HOLDERS}
    yield _gauges(
        "hookd_horizon_transactions", "Transactions since the oldest snapshot that vacuum has to respect", "holder",
        {kind: h.transactions if h is not None else 0 for kind, h in found.items()},
    )  # fmt: skip
    yield _gauges(
        "hookd_horizon_seconds", "For how long it has been held", "holder",
        {kind: (found[kind] or NOBODY).seconds or 0.0 for kind in TIMED_HOLDERS},
    )  # fmt: skip
    yield _gauge(
        "hookd_sessions_visible", "Whether this role sees other roles' sessions", None, int(health.visible)
    )
    yield _gauge(
        "hookd_longest_transaction_seconds", "The longest open transaction of this database", None,
        health.longest_transaction_s,
    )  # fmt: skip
    yield _gauge(
        "hookd_notify_queue_usage", "The part of the NOTIFY queue that is full", None, health.notify_usage
    )
    yield _gauge(
        "hookd_queue_dead_rows",
        "Settled rows of the queue that vacuum has not removed",
        None,
        health.dead_rows,
    )
    yield _gauge("hookd_queue_bytes", "Size of the queue with its indexes", None, health.queue_bytes)
    if health.vacuumed_s is not None:
        yield _gauge(
            "hookd_queue_vacuumed_seconds", "Time since the queue was vacuumed", None, health.vacuumed_s
        )
    yield _gauges("hookd_partitions_ahead", "Days made ahead of time", "table", health.ahead)
    yield _gauges(
        "hookd_retention_behind_seconds", "For how long something is kept beyond its retention", "table", health.behind_s
    )  # fmt: skip


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family


def _gauge(name: str, text: str, labels: Mapping[str, str] | None, value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels or ()))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets = []
    total = 0
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets, histogram.sum)
    return family
