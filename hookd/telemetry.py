"""
Metrics in Prometheus' text format, read from what the engine counts; nothing is counted twice for them.

No label has a value that customers choose: a tenant with a million hosts must not become a million series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from hookd import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from hookd.core.histogram import Histogram
    from hookd.daemon import Daemon

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
        yield _gauges(
            "hookd_queue_depth", "Pending deliveries and dead letters, each counted up to 100,000", "state",
            {s: daemon.depth.get(s, 0) for s in ("fresh", "scheduled", "dead_letter")},
        )  # fmt: skip
        yield _gauge(
            "hookd_oldest_pending_seconds", "Age of the oldest event that has a fresh delivery", None,
            daemon.depth.get("oldest_s", 0),
        )  # fmt: skip
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
