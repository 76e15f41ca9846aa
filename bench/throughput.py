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
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg

from hookd.core.signing import new_secret
from hookd.postgres import registry
from hookd.postgres.embedded import open_server
from hookd.postgres.migrate import migrate
from hookd.postgres.registry import EndpointChange

HERE = Path(__file__).parent
HOSTS = 8
IN_FLIGHT_EACH = 50
PAYLOAD = 200
FLOORS = {"ratio": 0.8, "idle_p50_ms": 5.0, "idle_p99_ms": 20.0}
DEADLINE_S = 300

INSERT = """
insert into hookd.event (type, payload, tenant)
select 'bench.made', json_build_object('n', n, 'fill', repeat('x', $3))::text, 'tenant-' || n % $2
  from generate_series(1, $1::integer) n
"""


class Bench:
    def __init__(self, deliveries: int, idle: int) -> None:
        self.deliveries = deliveries
        self.idle = idle
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        self.own_core = {cores[0]} if len(cores) > 1 else None
        if len(cores) > 1:
            os.sched_setaffinity(0, {cores[1]})
        self.folder = Path(tempfile.mkdtemp(prefix="hookd-bench-"))
        self.folder.chmod(0o755)
        self.server = open_server(str(self.folder / "pg"))
        arguments = self.server.connection_arguments()
        self.dsn = (
            f"postgresql://{arguments['user']}:{quote(str(arguments['password']))}@/{arguments['database']}"
            f"?host={quote(str(arguments['host']))}&port={arguments['port']}"
        )
        self.receiver = subprocess.Popen(
            [sys.executable, str(HERE / "receiver.py"), str(HOSTS)], stdout=subprocess.PIPE, text=True
        )
        assert self.receiver.stdout is not None
        self.ports: list[int] = json.loads(self.receiver.stdout.readline())

    def close(self) -> None:
        self.receiver.terminate()
        self.receiver.wait()
        self.server.leave()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/stats") as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def child(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        core = self.own_core
        return subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"PYTHONPATH": str(HERE.parent)} | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr.log").open("a"),
            text=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, core)) if core else None,  # noqa: PLW1509 - no threads here
        )

    def bare(self) -> dict[str, Any]:
        urls = json.dumps([f"http://127.0.0.1:{port}/hook" for port in self.ports])
        process = self.child(
            str(HERE / "bare.py"), urls, str(self.deliveries), str(HOSTS * IN_FLIGHT_EACH), str(PAYLOAD)
        )
        out, _ = process.communicate(timeout=DEADLINE_S)
        self.stats()
        found: dict[str, Any] = json.loads(out)
        return found

    async def prepare(self) -> None:
        connection = await asyncpg.connect(self.dsn)
        await migrate(connection)
        for n, port in enumerate(self.ports):
            await registry.add(
                connection,
                f"tenant-{n}",
                EndpointChange(url=f"http://127.0.0.1:{port}/hook", host=f"127.0.0.1:{port}"),
                new_secret(os.urandom(32)),
            )
        await registry.add(
            connection,
            "timed",
            EndpointChange(url=f"http://127.0.0.1:{self.ports[0]}/timed", host=f"127.0.0.1:{self.ports[0]}"),
            new_secret(os.urandom(32)),
        )
        await connection.close()

    def daemon(self) -> tuple[subprocess.Popen[str], str]:
        process = self.child(
            "-m", "hookd", "run",
            HOOKD_DATABASE__DSN=self.dsn, HOOKD_NETWORK__ALLOW='["127.0.0.0/8"]', HOOKD_ADMIN__LISTEN="127.0.0.1:0",
            HOOKD_LIMITS__CONCURRENCY=str(IN_FLIGHT_EACH), HOOKD_LOG__FORMAT="json",
        )  # fmt: skip
        until = time.monotonic() + 60
        while True:
            for line in (self.folder / "stderr.log").read_text().splitlines():
                if f'"pid":{process.pid}' in line and '"event":"ready"' in line:
                    return process, json.loads(line)["admin"]
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the daemon did not start:\n" + (self.folder / "stderr.log").read_text())
            time.sleep(0.01)

    async def whole(self) -> dict[str, Any]:
        connection = await asyncpg.connect(self.dsn)
        await connection.execute(INSERT, self.deliveries, HOSTS, PAYLOAD)
        await connection.execute("checkpoint")
        commits = await _commits(connection)
        self.stats()
        process, admin = self.daemon()
        until = time.monotonic() + DEADLINE_S
        while await connection.fetchval("select exists (select from hookd.delivery)"):
            assert time.monotonic() < until, "the queue does not become empty"
            await asyncio.sleep(0.02)
        settled = time.monotonic()
        stats = self.stats()
        assert stats["count"] == self.deliveries, stats["count"]
        cpu = _cpu_s(process.pid)
        with urllib.request.urlopen(f"{admin}/metrics") as answer:
            statements = sum(
                map(
                    float,
                    re.findall(r"^hookd_statements_total\S* (\S+)", answer.read().decode(), re.MULTILINE),
                )
            )
        await asyncio.sleep(1.5)  # PostgreSQL's own counters lag by a second
        commits = await _commits(connection) - commits
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        await connection.close()
        return {
            "seconds": settled - stats["first"],
            "cpu_s": cpu,
            "statements": statements,
            "commits": commits,
        }

    async def latency(self) -> list[float]:
        process, _ = self.daemon()
        connection = await asyncpg.connect(self.dsn)
        dice = random.Random(1)
        sent: dict[str, float] = {}
        try:
            await asyncio.sleep(2)
            self.stats()
            for _ in range(self.idle):
                await asyncio.sleep(dice.uniform(0.02, 0.2))
                begun = time.monotonic()
                event_id = await connection.fetchval(
                    "select hookd.send('bench.made', '{}'::text, tenant => 'timed')"
                )
                sent[str(event_id)] = begun
            until = time.monotonic() + 30
            while await connection.fetchval("select exists (select from hookd.delivery)"):
                assert time.monotonic() < until, "the queue does not become empty"
                await asyncio.sleep(0.05)
            arrived: dict[str, float] = self.stats()["timed"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            await connection.close()
        return sorted((arrived[i] - begun) * 1000 for i, begun in sent.items())


async def _commits(connection: asyncpg.Connection) -> int:
    return int(
        await connection.fetchval(
            "select xact_commit from pg_stat_database where datname = current_database()"
        )
    )


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--deliveries", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=int, default=300, help="single events for the latency")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    bench = Bench(given.deliveries, given.idle)
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
        bench.close()
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
