"""
Whether a transaction that stays open slows the queue down: 500,000 deliveries, and vacuum may not clean up.

    python bench/horizon.py [--deliveries 500000] [--json]

A session begins a REPEATABLE READ transaction and reads, so that it holds a snapshot; then deliveries are
inserted in step with draining, so that some 5,000 are always pending and arrivals, refill and settling all
work beside the dead rows.  The figure is the rate of the last tenth against that of the first, by when the
requests came to the receiver; what came in the first second is not counted, for connections are opened in it.
A run without the held transaction comes first, as the control, and what PostgreSQL's processes cost is shown
for the same tenths: they share a core with the receiver and the producer, so dead rows are felt there before
deliveries slow down.  A rate is worth nothing where somebody else took the daemon's core, so that is shown
too.

Goal: >= 0.95x with the transaction held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from itertools import pairwise
from typing import Any

import asyncpg
from stage import Arrivals, Daemon, Producer, Stage

HOSTS = 8
IN_FLIGHT_EACH = 50
PAYLOAD = 200
PENDING = 5000
WARM_UP_S = 1.0
GOAL = 0.95

HOLDS = "select backend_xmin is not null from pg_stat_activity where pid = $1"

GROWN = """
select pg_table_size('hookd.delivery') / 1e6 as table_mb,
       pg_indexes_size('hookd.delivery') / 1e6 as indexes_mb
"""


async def _watch(stage: Stage, daemon: Daemon, costs: list[tuple[float, ...]]) -> None:
    """Note twice a second what the daemon and PostgreSQL have used, and how long the daemon got no core."""
    while True:
        costs.append((time.monotonic(), daemon.cpu_s(), stage.postgres_cpu_s(), daemon.displaced_s()))
        await asyncio.sleep(0.5)


def _costs(costs: list[tuple[float, ...]], begin: float, end: float, count: int) -> dict[str, float]:
    """CPU a delivery of both between these moments, and for which share of that the daemon got no core."""
    before = max((c for c in costs if c[0] <= begin), default=costs[0])
    after = min((c for c in costs if c[0] >= end), default=costs[-1])
    seconds, hookd, postgres, displaced = (b - a for a, b in zip(before, after, strict=True))
    each = (end - begin) / seconds / count * 1e6
    return {"hookd_us": hookd * each, "postgres_us": postgres * each, "displaced": displaced / seconds}


async def drain(stage: Stage, deliveries: int, *, held: bool) -> dict[str, Any]:
    await stage.fresh_database()
    await stage.add_endpoints(
        [stage.host(n) for n in range(HOSTS)], "/hook", [f"tenant-{n}" for n in range(HOSTS)]
    )
    connection = await asyncpg.connect(stage.dsn)
    holder = await asyncpg.connect(stage.dsn)
    if held:
        await holder.execute("begin isolation level repeatable read")
        await holder.fetchval("select count(*) from hookd.delivery")
    stage.stats()
    daemon = stage.daemon(HOOKD_LIMITS__CONCURRENCY=str(IN_FLIGHT_EACH))
    arrivals = Arrivals(stage)
    producer = Producer(stage, arrivals, tenants=HOSTS, payload=PAYLOAD, inserted=0)
    costs: list[tuple[float, ...]] = []
    watch = asyncio.create_task(_watch(stage, daemon, costs))
    await producer.keep(
        PENDING, until=lambda: bool(arrivals.count) and time.monotonic() > arrivals.first + WARM_UP_S
    )
    start = arrivals.count
    await producer.keep(PENDING, until=lambda: arrivals.count >= start + deliveries)
    await asyncio.sleep(0.5)
    watch.cancel()
    assert await connection.fetchval(HOLDS, holder.get_server_pid()) is held
    size = await connection.fetchrow(GROWN)
    assert size is not None
    bounds = [start + n * deliveries // 10 for n in range(11)]
    tenths = [arrivals.per_s(a, b) for a, b in pairwise(bounds)]
    first, last = (
        _costs(costs, arrivals.reached(a), arrivals.reached(b), b - a) for a, b in (bounds[:2], bounds[-2:])
    )
    figures = {
        "ratio": tenths[-1] / tenths[0],
        "per_s": arrivals.per_s(bounds[0], bounds[-1]),
        "tenths_per_s": tenths,
        "first": first,
        "last": last,
        "table_mb": float(size["table_mb"]),
        "indexes_mb": float(size["indexes_mb"]),
    }
    daemon.stop()
    await holder.close()
    await connection.close()
    await stage.nothing_lost(producer.inserted, await arrivals.look())
    arrivals.close()
    await stage.leave_database()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--deliveries", type=int, default=500_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage()
    try:
        control = asyncio.run(drain(stage, given.deliveries, held=False))
        held = asyncio.run(drain(stage, given.deliveries, held=True))
    finally:
        stage.close()
    if given.json:
        print(json.dumps({"ratio": held["ratio"], "goal": GOAL, "held": held, "control": control}))
    else:
        _print(held, control, given)
    sys.exit(0 if held["ratio"] >= GOAL else 1)


def _print(held: dict[str, Any], control: dict[str, Any], given: argparse.Namespace) -> None:
    print(
        f"{given.deliveries:,} deliveries to {HOSTS} hosts x {IN_FLIGHT_EACH}, {PENDING:,} pending at any time"
    )
    for title, f in (("no transaction held", control), ("one transaction held", held)):
        a, b = f["first"], f["last"]
        print(
            f"  {title:21}{f['per_s']:7,.0f}/s   tenths {' '.join(f'{t:,.0f}' for t in f['tenths_per_s'])}   last/first {f['ratio']:.2f}x"
        )
        print(f"  {'':21}first -> last tenth: CPU each hookd {a['hookd_us']:.0f} -> {b['hookd_us']:.0f} µs, PostgreSQL {a['postgres_us']:.0f} -> {b['postgres_us']:.0f} µs"
              f"; hookd's core taken by others {a['displaced']:.0%} -> {b['displaced']:.0%}   hookd.delivery {f['table_mb']:.0f} MB + {f['indexes_mb']:.0f} MB of indexes")  # fmt: skip
    print(
        f"  {held['ratio']:.2f}x, goal {GOAL}x   held against not held {held['per_s'] / control['per_s']:.2f}x"
    )


if __name__ == "__main__":
    main()
