"""
The whole daemon beside a bare client, in the same run.

    python bench/throughput.py [--deliveries 40000] [--rounds 3] [--json]

Each round: a bare ``ClientSession.post`` loop (``bench/bare.py``), then the daemon with a backlog of as many deliveries, to
the same receiver, with the same bodies and the same number of exchanges in flight.  The client or the daemon has one
core; the receiver, PostgreSQL and this script have the other.  The daemon's time ends when PostgreSQL has every result.

Then, with the daemon idle, single events: from the moment before the INSERT is sent to the moment that the request has
arrived.

Floors: ratio >= 0.8, idle p50 <= 5 ms, p99 <= 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from typing import Any

import asyncpg
from stage import DEADLINE_S, HERE, INSERT, Daemon, Stage

HOSTS = 8
IN_FLIGHT_EACH = 50
PAYLOAD = 200
FLOORS = {"ratio": 0.8, "idle_p50_ms": 5.0, "idle_p99_ms": 20.0}


class Throughput:
    """The rounds of one run."""

    def __init__(self, stage: Stage, deliveries: int, idle: int) -> None:
        self.stage = stage
        self.deliveries = deliveries
        self.idle = idle
        self.hosts = [f"127.0.0.1:{port}" for port in stage.ports]

    def bare(self) -> dict[str, Any]:
        urls = json.dumps([f"http://{host}/hook" for host in self.hosts])
        process = self.stage.child(
            str(HERE / "bare.py"), urls, str(self.deliveries), str(HOSTS * IN_FLIGHT_EACH), str(PAYLOAD)
        )
        out, _ = process.communicate(timeout=DEADLINE_S)
        self.stage.stats()
        found: dict[str, Any] = json.loads(out)
        return found

    async def prepare(self) -> None:
        await self.stage.fresh_database()
        await self.stage.add_endpoints(self.hosts, "/hook", [f"tenant-{n}" for n in range(HOSTS)])
        await self.stage.add_endpoints(self.hosts[:1], "/timed", ["timed"])

    def daemon(self) -> Daemon:
        return self.stage.daemon(HOOKD_LIMITS__CONCURRENCY=str(IN_FLIGHT_EACH))

    async def whole(self) -> dict[str, Any]:
        connection = await asyncpg.connect(self.stage.dsn)
        await connection.execute(INSERT, self.deliveries, HOSTS, PAYLOAD)
        await connection.execute("checkpoint")
        commits = await _commits(connection)
        self.stage.stats()
        daemon = self.daemon()
        settled = await self.stage.drained(connection)
        stats = self.stage.stats()
        assert stats["count"] == self.deliveries, stats["count"]
        cpu = daemon.cpu_s()
        statements = sum(
            map(float, re.findall(r"^hookd_statements_total\S* (\S+)", daemon.metrics(), re.MULTILINE))
        )
        await asyncio.sleep(1.5)  # PostgreSQL's own counters lag by a second
        commits = await _commits(connection) - commits
        daemon.stop()
        await connection.close()
        return {
            "seconds": settled - stats["first"],
            "cpu_s": cpu,
            "statements": statements,
            "commits": commits,
        }

    async def latency(self) -> list[float]:
        daemon = self.daemon()
        connection = await asyncpg.connect(self.stage.dsn)
        dice = random.Random(1)
        sent: dict[str, float] = {}
        try:
            await asyncio.sleep(2)
            self.stage.stats()
            for _ in range(self.idle):
                await asyncio.sleep(dice.uniform(0.02, 0.2))
                begun = time.monotonic()
                event_id = await connection.fetchval(
                    "select hookd.send('bench.made', '{}'::text, tenant => 'timed')"
                )
                sent[str(event_id)] = begun
            await self.stage.drained(connection)
            arrived: dict[str, float] = self.stage.stats()["timed"]
        finally:
            daemon.stop()
            await connection.close()
        return sorted((arrived[i] - begun) * 1000 for i, begun in sent.items())


async def _commits(connection: asyncpg.Connection) -> int:
    return int(
        await connection.fetchval(
            "select xact_commit from pg_stat_database where datname = current_database()"
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--deliveries", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=int, default=300, help="single events for the latency")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage(HOSTS)
    bench = Throughput(stage, given.deliveries, given.idle)
    ratios, rows = [], []
    try:
        asyncio.run(bench.prepare())
        for _ in range(given.rounds):
            bare = bench.bare()
            whole = asyncio.run(bench.whole())
            ratios.append(bare["seconds"] / whole["seconds"])
            rows.append((bare, whole))
        idle = asyncio.run(bench.latency())
    finally:
        stage.close()
    count = given.deliveries
    bare, whole = rows[ratios.index(sorted(ratios)[len(ratios) // 2])]
    figures = {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "bare_per_s": count / bare["seconds"],
        "hookd_per_s": count / whole["seconds"],
        "bare_cpu_us": bare["cpu_s"] / count * 1e6,
        "hookd_cpu_us": whole["cpu_s"] / count * 1e6,
        "statements_per_delivery": whole["statements"] / count,
        "commits_per_delivery": whole["commits"] / count,
        "idle_p50_ms": idle[len(idle) // 2],
        "idle_p99_ms": idle[int(len(idle) * 0.99)],
    }
    if given.json:
        print(json.dumps(figures))
    else:
        _print(figures, given)
    met = (
        figures["ratio"] >= FLOORS["ratio"]
        and figures["idle_p50_ms"] <= FLOORS["idle_p50_ms"]
        and figures["idle_p99_ms"] <= FLOORS["idle_p99_ms"]
    )
    sys.exit(0 if met else 1)


def _print(figures: dict[str, Any], given: argparse.Namespace) -> None:
    print(
        f"{given.deliveries:,} deliveries, {HOSTS} hosts x {IN_FLIGHT_EACH} in flight, {PAYLOAD} B payload, {given.rounds} rounds"
    )
    print(
        f"  bare ClientSession.post   {figures['bare_per_s']:9,.0f}/s   {figures['bare_cpu_us']:6.1f} µs CPU each"
    )
    print(
        f"  hookd, settled            {figures['hookd_per_s']:9,.0f}/s   {figures['hookd_cpu_us']:6.1f} µs CPU each (start-up included)"
    )
    print(
        f"  ratio                     {figures['ratio']:9.2f}     floor {FLOORS['ratio']}   rounds {', '.join(f'{r:.2f}' for r in figures['ratios'])}"
    )
    print(
        f"  SQL statements a delivery {figures['statements_per_delivery']:9.4f}     commits {figures['commits_per_delivery']:.4f}"
    )
    print(f"  idle, insert to arrival   p50 {figures['idle_p50_ms']:.2f} ms (floor {FLOORS['idle_p50_ms']:g}), "
          f"p99 {figures['idle_p99_ms']:.2f} ms (floor {FLOORS['idle_p99_ms']:g}), {given.idle} events")  # fmt: skip


if __name__ == "__main__":
    main()
