"""
What 10,000 throttled hosts with a backlog cost the free ones: how fast the same backlog of free hosts drains, with them
and without.

    python bench/throttled.py [--hosts 10000] [--deliveries 60000] [--rounds 3] [--json]

Each throttled host has 20 deliveries pending and a rate between one request in six minutes and one in an hour: 12 a second
together, so that what is seen is what waiting costs, and not what sending to many hosts does.  35 seconds after the start, when their first ones have gone and the connections of these were closed
again, 60,000 deliveries to 8 free hosts are inserted in one statement; the time runs from the first arrival there until
PostgreSQL has every result.  Rounds with and without take turns, each in a new database.

Goal: >= 0.97x.
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
from stage import Stage

FREE = 8
BACKLOG_EACH = 20
RATES = 0.0003, 0.003
WAIT_S = 35
GOAL = 0.97

PENDING = """
insert into hookd.event (type, payload, tenant)
select 'bench.made', '{"n": 1}', $2 || n % $3 from generate_series(1, $1::integer) n
"""


async def drain(stage: Stage, hosts: int, deliveries: int) -> dict[str, Any]:
    await stage.fresh_database()
    connection = await asyncpg.connect(stage.dsn)
    await stage.add_endpoints(
        [stage.host(n) for n in range(FREE)], "/hook", [f"free{n}" for n in range(FREE)]
    )
    if hosts:
        await stage.add_endpoints(
            [stage.host(1000 + n) for n in range(hosts)],
            "/aside",
            [f"slow{n}" for n in range(hosts)],
            rates=[RATES[0] * (RATES[1] / RATES[0]) ** (n / hosts) for n in range(hosts)],
        )
        await connection.execute(PENDING, hosts * BACKLOG_EACH, "slow", hosts)
        await connection.execute("checkpoint")
    stage.stats()
    daemon = stage.daemon()
    begun = time.monotonic()
    gone = 0
    while gone < hosts:
        await asyncio.sleep(0.2)
        gone += stage.stats()["others"]
    if hosts:
        await asyncio.sleep(begun + WAIT_S - 5 - time.monotonic())
    cpu = daemon.cpu_s()
    await asyncio.sleep(5)
    idle = (daemon.cpu_s() - cpu) / 5
    free = await connection.fetch("select key from hookd.endpoint where tenant like 'free%'")
    await connection.execute(PENDING, deliveries, "free", FREE)
    cpu = daemon.cpu_s()
    settled = await stage.drained(connection, f"endpoint in ({', '.join(str(r[0]) for r in free)})")
    stats = stage.stats()
    assert stats["count"] == deliveries, stats["count"]
    figures = {
        "per_s": deliveries / (settled - stats["first"]),
        "throttled": stats["others"],
        "cpu_us": (daemon.cpu_s() - cpu) / deliveries * 1e6,
        "idle_cpu": idle,
        "resident_mb": daemon.resident_mb(),
    }
    daemon.stop()
    await connection.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hosts", type=int, default=10_000)
    parser.add_argument("--deliveries", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage()
    rounds = []
    try:
        for _ in range(given.rounds):
            without = asyncio.run(drain(stage, 0, given.deliveries))
            with_them = asyncio.run(drain(stage, given.hosts, given.deliveries))
            rounds.append(
                {"ratio": with_them["per_s"] / without["per_s"], "with": with_them, "without": without}
            )
    finally:
        stage.close()
    ratio = statistics.median(r["ratio"] for r in rounds)
    if given.json:
        print(json.dumps({"ratio": ratio, "goal": GOAL, "rounds": rounds}))
    else:
        print(
            f"{given.deliveries:,} deliveries to {FREE} free hosts, beside {given.hosts:,} throttled ones with {BACKLOG_EACH} pending each"
        )
        for r in rounds:
            w, o = r["with"], r["without"]
            print(f"  {o['per_s']:7,.0f}/s -> {w['per_s']:7,.0f}/s ({r['ratio']:.2f}x)   CPU {o['cpu_us']:.0f} -> {w['cpu_us']:.0f} µs each   idle core {o['idle_cpu']:.3f} -> {w['idle_cpu']:.3f}"
                  f"   resident {o['resident_mb']:.0f} -> {w['resident_mb']:.0f} MB   throttled {w['throttled']}")  # fmt: skip
        print(f"  {ratio:.2f}x, goal {GOAL}x")
    sys.exit(0 if ratio >= GOAL else 1)


if __name__ == "__main__":
    main()
