"""
Whether speed or memory depend on how much is pending: 1,000,000 deliveries against 1,000.

    python bench/backlog.py [--deliveries 100000] [--rounds 3] [--pending 1000000] [--few 1000]
                            [--between 10000,100000] [--all] [--json]

Each round starts the daemon on a copy of a database with so many deliveries pending at 8 free hosts, and a
producer keeps them at that number, by inserting as many as arrive.  After two seconds to warm up, deliveries
a second are taken over the next 100,000 arrivals; then the daemon's peak of resident memory, and that every
row inserted is either logged or pending.  Rounds with many and with few take turns; ``--between`` adds a round for each of
these numbers, for the curve.

The producer runs in both rounds, so that they differ in nothing but what is pending: PostgreSQL and the
receiver have the core that the producer's inserts cost, and a backlog that only shrinks would be compared
with one that is fed.  ``--all`` measures that too: it drains the 1,000,000 with no producer, to the last one.

The daemon is measured, not the aftermath of the bulk insert: each database was vacuumed and analyzed after
it, copied file by file, and a checkpoint is made before the daemon starts.  What the daemon's own deletes
cause belongs to the figure.

Goals: deliveries a second >= 0.95x, memory <= 1.1x, first delivery within 2 s of the process's start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

import asyncpg
from stage import DEADLINE_S, INSERT, Arrivals, Daemon, Producer, Stage

HOSTS = 8
IN_FLIGHT_EACH = 50
PAYLOAD = 200
AT_ONCE = 100_000
"""Rows of one statement of the bulk insert."""
WARM_UP_S = 2.0
GOALS = {"speed": 0.95, "memory": 1.1, "first_s": 2.0}


async def prepared(stage: Stage, pending: int) -> str:
    """A database with so many pending, to be copied; returns its name."""
    name = await stage.fresh_database()
    await stage.add_endpoints(
        [stage.host(n) for n in range(HOSTS)], "/hook", [f"tenant-{n}" for n in range(HOSTS)]
    )
    connection = await asyncpg.connect(stage.dsn)
    for start in range(0, pending, AT_ONCE):
        await connection.execute(INSERT, min(AT_ONCE, pending - start), HOSTS, PAYLOAD)
    await connection.execute("vacuum analyze")
    await connection.close()
    await stage.leave_database(drop=False)
    return name


async def _copied(stage: Stage, like: str) -> None:
    await stage.fresh_database(like)
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute("checkpoint")
    await connection.close()
    stage.stats()


async def _ended(stage: Stage, daemon: Daemon, arrivals: Arrivals, inserted: int) -> None:
    daemon.stop()
    await stage.nothing_lost(inserted, await arrivals.look())
    arrivals.close()
    await stage.leave_database()


async def steady(stage: Stage, like: str, pending: int, deliveries: int) -> dict[str, Any]:
    """Start the daemon on a copy, keep so many pending, and measure a stretch."""
    await _copied(stage, like)
    daemon = stage.daemon(HOOKD_LIMITS__CONCURRENCY=str(IN_FLIGHT_EACH))
    arrivals = Arrivals(stage)
    producer = Producer(stage, arrivals, tenants=HOSTS, payload=PAYLOAD, inserted=pending)
    warm = daemon.ready + WARM_UP_S
    await producer.keep(pending, until=lambda: bool(arrivals.count) and time.monotonic() > warm)
    start, cpu, begun = arrivals.count, daemon.cpu_s(), time.monotonic()
    await producer.keep(pending, until=lambda: arrivals.count >= start + deliveries)
    cpu, took = daemon.cpu_s() - cpu, time.monotonic() - begun
    figures = {
        "first_s": arrivals.first - daemon.begun,
        "first_from_ready_s": arrivals.first - daemon.ready,
        "per_s": arrivals.per_s(start, start + deliveries),
        "cpu_us": cpu / (arrivals.count - start) * 1e6,
        "core": cpu / took,
        "peak_mb": daemon.resident_mb(most=True),
    }
    await _ended(stage, daemon, arrivals, producer.inserted)
    return figures


async def drained(stage: Stage, like: str, pending: int) -> dict[str, Any]:
    """Drain it all, with no producer."""
    await _copied(stage, like)
    daemon = stage.daemon(HOOKD_LIMITS__CONCURRENCY=str(IN_FLIGHT_EACH))
    arrivals = Arrivals(stage)
    while await arrivals.look() < pending:
        assert time.monotonic() < daemon.begun + DEADLINE_S, f"only {arrivals.count:,} have arrived"
        await asyncio.sleep(0.05)
    tenth = pending // 10
    figures = {
        "first_s": arrivals.first - daemon.begun,
        "per_s": pending / (arrivals.reached(pending) - arrivals.first),
        "tenths_per_s": [arrivals.per_s(n * tenth, (n + 1) * tenth) for n in range(10)],
        "cpu_us": daemon.cpu_s() / pending * 1e6,
        "peak_mb": daemon.resident_mb(most=True),
    }
    await _ended(stage, daemon, arrivals, pending)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--deliveries", type=int, default=100_000, help="that a stretch is measured over")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pending", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=1000)
    parser.add_argument("--between", default="", help="more numbers pending, with commas between")
    parser.add_argument("--all", action="store_true", help="also drain all that is pending")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage()
    rounds: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"goals": GOALS, "rounds": rounds}
    try:
        many = asyncio.run(prepared(stage, given.pending))
        few = asyncio.run(prepared(stage, given.few))
        for _ in range(given.rounds):
            with_few = asyncio.run(steady(stage, few, given.few, given.deliveries))
            with_many = asyncio.run(steady(stage, many, given.pending, given.deliveries))
            rounds.append(
                {
                    "speed": with_many["per_s"] / with_few["per_s"],
                    "memory": with_many["peak_mb"] / with_few["peak_mb"],
                    "many": with_many,
                    "few": with_few,
                }
            )
        curve = [(given.few, rounds[0]["few"])]
        for pending in sorted(int(n) for n in given.between.split(",") if n):
            like = asyncio.run(prepared(stage, pending))
            curve.append((pending, asyncio.run(steady(stage, like, pending, given.deliveries))))
        figures["curve"] = [*curve, (given.pending, rounds[0]["many"])]
        if given.all:
            figures["all"] = asyncio.run(drained(stage, many, given.pending))
    finally:
        stage.close()
    figures["speed"] = statistics.median(r["speed"] for r in rounds)
    figures["memory"] = statistics.median(r["memory"] for r in rounds)
    figures["first_s"] = max(r["many"]["first_s"] for r in rounds)
    if given.json:
        print(json.dumps(figures))
    else:
        _print(figures, given)
    met = (
        figures["speed"] >= GOALS["speed"]
        and figures["memory"] <= GOALS["memory"]
        and figures["first_s"] <= GOALS["first_s"]
    )
    sys.exit(0 if met else 1)


def _print(figures: dict[str, Any], given: argparse.Namespace) -> None:
    print(
        f"{given.few:,} -> {given.pending:,} pending at {HOSTS} hosts x {IN_FLIGHT_EACH}, kept there by a producer; "
        f"over {given.deliveries:,} deliveries"
    )
    for r in figures["rounds"]:
        f, m = r["few"], r["many"]
        print(f"  {f['per_s']:7,.0f}/s -> {m['per_s']:7,.0f}/s ({r['speed']:.2f}x)   CPU {f['cpu_us']:.0f} -> {m['cpu_us']:.0f} µs each, core {f['core']:.2f} -> {m['core']:.2f}"
              f"   peak {f['peak_mb']:.0f} -> {m['peak_mb']:.0f} MB ({r['memory']:.2f}x)"
              f"   first delivery {f['first_s']:.2f} -> {m['first_s']:.2f} s ({m['first_from_ready_s']:+.2f} s from ready)")  # fmt: skip
    for pending, f in figures["curve"][1:-1]:
        print(
            f"  {pending:,} pending: {f['per_s']:,.0f}/s   CPU {f['cpu_us']:.0f} µs each   peak {f['peak_mb']:.0f} MB"
        )
    if "all" in figures:
        a = figures["all"]
        print(f"  all {given.pending:,} drained: {a['per_s']:,.0f}/s, tenths {' '.join(f'{t:,.0f}' for t in a['tenths_per_s'])}"
              f"   CPU {a['cpu_us']:.0f} µs each, start-up included   peak {a['peak_mb']:.0f} MB   first delivery {a['first_s']:.2f} s")  # fmt: skip
    print(f"  deliveries a second {figures['speed']:.2f}x, goal {GOALS['speed']}x   memory {figures['memory']:.2f}x, goal {GOALS['memory']}x"
          f"   first delivery {figures['first_s']:.2f} s, goal {GOALS['first_s']:g} s")  # fmt: skip


if __name__ == "__main__":
    main()
