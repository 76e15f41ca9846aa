"""
What trouble next door does to healthy hosts: the lag of the same load, with it and without.

    python bench/isolation.py [--seconds 15] [--rounds 3] [--json]

*One hole*: 50 healthy hosts at a steady rate; beside them a host that accepts and never answers, with 900,000 deliveries
pending, and 100,000 more that are not due yet.  *Many dead*: 1,000 hosts at a steady rate, 100 of which are dead: a quarter
each refuses, never answers, answers 500, sends a byte a second.  The lag is from the INSERT (``clock_timestamp()``) to the
request's arrival at a healthy host; rounds with and without trouble take turns, each in a new database.

Goals: p99 <= 1.2x with the hole, <= 1.3x with the dead ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from typing import Any

import asyncpg
from stage import Stage, percentile

RATE = 2000
"""Events a second at healthy hosts, in transactions of ``EACH``."""
EACH = 10

GOALS = {"hole": 1.2, "dead": 1.3}

STEADY = """
insert into hookd.event (type, payload, tenant)
select 'bench.made', json_build_object('at', extract(epoch from clock_timestamp()))::text, t
  from unnest($1::text[]) t
"""

PENDING = """
insert into hookd.event (type, payload, tenant, deliver_at)
select 'bench.made', '{"at": 0}', $2, case when $3::float8 > 0 then now() + make_interval(secs => $3::float8) end
  from generate_series(1, $1::integer)
"""

TROUBLED = {
    "HOOKD_DELIVERY__TIMEOUT": "3s",
    "HOOKD_DELIVERY__CONNECT_TIMEOUT": "2s",
    "HOOKD_RETRY__SCHEDULE": '["1s", "2s", "4s", "8s", "1h"]',
}


async def steady(stage: Stage, tenants: list[str], seconds: float) -> None:
    """Insert events for these tenants in turn, at ``RATE``."""
    connection = await asyncpg.connect(stage.dsn)
    begun = time.monotonic()
    sent = 0
    while sent < RATE * seconds:
        await asyncio.sleep(max(0.0, begun + sent / RATE - time.monotonic()))
        await connection.execute(STEADY, [tenants[(sent + n) % len(tenants)] for n in range(EACH)])
        sent += EACH
    await connection.close()


async def measured(
    stage: Stage, tenants: list[str], healthy: int, seconds: float, **environment: str
) -> dict[str, Any]:
    """Lags at healthy hosts: after two seconds to warm up, for ``seconds``."""
    daemon = stage.daemon(**TROUBLED, **environment)
    await steady(stage, tenants, 2)
    await asyncio.sleep(0.5)
    stage.stats()
    cpu = daemon.cpu_s()
    await steady(stage, tenants, seconds)
    await asyncio.sleep(1)
    stats = stage.stats()
    expected = int(RATE * seconds * healthy / len(tenants))
    assert abs(len(stats["lags"]) - expected) <= EACH * 2, (len(stats["lags"]), expected)
    figures = {
        "p50_ms": percentile(stats["lags"], 0.5) * 1000,
        "p99_ms": percentile(stats["lags"], 0.99) * 1000,
        "cpu": (daemon.cpu_s() - cpu) / seconds,
        "resident_mb": daemon.resident_mb(),
        "troubled": stats["others"],
    }
    daemon.stop(at_once=True)
    return figures


async def hole(stage: Stage, seconds: float, *, trouble: bool) -> dict[str, Any]:
    await stage.fresh_database()
    tenants = [f"t{n}" for n in range(50)]
    await stage.add_endpoints([stage.host(n) for n in range(50)], "/lag", tenants)
    if trouble:
        await stage.add_endpoints([stage.host(1000)], "/hole", ["hole"])
        connection = await asyncpg.connect(stage.dsn)
        await connection.execute(PENDING, 900_000, "hole", 0)
        await connection.execute(PENDING, 100_000, "t0", 3600)
        await connection.execute("checkpoint")
        await connection.close()
    return await measured(stage, tenants, 50, seconds)


async def dead(stage: Stage, seconds: float, *, trouble: bool) -> dict[str, Any]:
    await stage.fresh_database()
    tenants = [f"t{n}" for n in range(1000)]
    hosts = [stage.host(n) for n in range(1000)]
    for first, path in ((0, "/refused"), (25, "/hole"), (50, "/fail"), (75, "/drip")):
        part = slice(first, first + 25)
        unhealthy = hosts[part]
        if trouble and path == "/refused":
            with socket.socket() as unused:
                unused.bind(("127.0.0.1", 0))
                unhealthy = [f"h{n}.localhost:{unused.getsockname()[1]}" for n in range(25)]
        await stage.add_endpoints(unhealthy, path if trouble else "/lag", tenants[part])
    await stage.add_endpoints(hosts[100:], "/lag", tenants[100:])
    return await measured(stage, tenants, 900 if trouble else 1000, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(GOALS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage()
    figures: dict[str, Any] = {}
    try:
        for name, scene in (("hole", hole), ("dead", dead)):
            if given.only in (None, name):
                rounds = []
                for _ in range(given.rounds):
                    without = asyncio.run(scene(stage, given.seconds, trouble=False))
                    with_it = asyncio.run(scene(stage, given.seconds, trouble=True))
                    rounds.append(
                        {
                            "ratio": with_it["p99_ms"] / without["p99_ms"],
                            "with": with_it,
                            "without": without,
                        }
                    )
                figures[name] = {
                    "ratio": statistics.median(r["ratio"] for r in rounds),
                    "goal": GOALS[name],
                    "rounds": rounds,
                }
    finally:
        stage.close()
    if given.json:
        print(json.dumps(figures))
    else:
        _print(figures, given)
    sys.exit(0 if all(f["ratio"] <= f["goal"] for f in figures.values()) else 1)


def _print(figures: dict[str, Any], given: argparse.Namespace) -> None:
    print(f"{RATE:,} events a second for {given.seconds:g} s, {given.rounds} rounds each")
    titles = {
        "hole": "50 healthy hosts beside one that owns 900,000 of 1,000,000 pending",
        "dead": "900 healthy hosts beside 100 dead ones",
    }
    for name, found in figures.items():
        print(f"  {titles[name]}")
        for r in found["rounds"]:
            w, o = r["with"], r["without"]
            print(
                f"    p50 {o['p50_ms']:6.2f} -> {w['p50_ms']:6.2f} ms   p99 {o['p99_ms']:6.2f} -> {w['p99_ms']:6.2f} ms ({r['ratio']:.2f}x)"
                f"   core {o['cpu']:.2f} -> {w['cpu']:.2f}   resident {o['resident_mb']:.0f} -> {w['resident_mb']:.0f} MB"
                f"   exchanges in trouble {w['troubled']}"
            )
        print(f"    healthy p99 {found['ratio']:.2f}x, goal {found['goal']}x")


if __name__ == "__main__":
    main()
