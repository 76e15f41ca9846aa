"""How long the fuzz tests run: a moment in an ordinary run, as long as wanted with ``HOOKD_FUZZ=N`` (N times as many examples)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("HOOKD_FUZZ", "1"))


def examples(count: int) -> settings:
    """Settings for so many examples, times ``HOOKD_FUZZ``; with more than one nothing is replayed, all is new."""
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
