"""
What 10,000 exchanges in flight cost: memory, and how late the event loop becomes.

    python bench/inflight.py [--hosts 200] [--each 50] [--seconds 25] [--json]

200 hosts answer after 20 seconds; 50 exchanges may be under way at each, and more is pending, so that an
exchange that ends is followed by another one.  Once 10,000 are in flight, ``GET /healthz`` is asked for every
20 ms, for longer than one answer takes: every exchange ends and is followed within the time that is measured,
and most of them within the few seconds that filling up took.  The lag while it fills up, when each exchange
opens a connection, is shown but has no goal.

The latency of ``/healthz`` bounds the lag of the daemon's loop from above: it holds the loop's lag, the
handler (some 0.5 ms), and the lateness of this script, which is shown beside it.  While one is waited for the
next ones fall due and wait too, so a loop that stands still for a second is late fifty times.

Goals: resident memory <= 200 MB with 10,000 in flight, p99 of the lag <= 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from typing import Any

import asyncpg
from stage import Daemon, Stage, percentile, raise_descriptors

ANSWER_S = 20
PROBE_EVERY_S = 0.02
SPARE_DESCRIPTORS = 500
GOALS = {"resident_mb": 200.0, "lag_p99_ms": 50.0}

PENDING = """
insert into hookd.event (type, payload, tenant)
select 'bench.made', '{"n": 1}', 'tenant-' || n % $2 from generate_series(1, $1::integer) n
"""


async def lags(daemon: Daemon, enough: asyncio.Event) -> list[float]:
    """How long ``/healthz`` took; while one is being waited for, the next ones fall due and wait too."""
    port = int(daemon.admin.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = []
    due = time.monotonic()
    while not enough.is_set():
        if due > time.monotonic():
            await asyncio.sleep(due - time.monotonic())
            due = time.monotonic()  # if this script wakes up late, that is not the daemon's fault
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert length is not None
        await reader.readexactly(int(length[1]))
        found.append(time.monotonic() - due)
        due += PROBE_EVERY_S
    writer.close()
    return found


async def own_lateness(found: list[float]) -> None:
    """How late this script's own timers are."""
    while True:
        due = time.monotonic() + PROBE_EVERY_S / 4
        await asyncio.sleep(PROBE_EVERY_S / 4)
        found.append(time.monotonic() - due)


def in_flight(daemon: Daemon) -> int:
    found = re.search(r"^hookd_in_flight (\S+)", daemon.metrics(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


async def slow(stage: Stage, hosts: int, each: int, seconds: float) -> dict[str, Any]:
    """Fill up, then measure."""
    wanted = hosts * each
    await stage.fresh_database()
    await stage.add_endpoints(
        [stage.host(n) for n in range(hosts)], f"/later?s={ANSWER_S}", [f"tenant-{n}" for n in range(hosts)]
    )
    connection = await asyncpg.connect(stage.dsn)
    # one set in flight, one for each time that they end while it is measured, and one that goes on waiting
    rows = wanted * (3 + int(seconds / ANSWER_S))
    await connection.execute(PENDING, rows, hosts)
    await connection.execute("vacuum analyze")
    await connection.execute("checkpoint")
    await connection.close()
    stage.stats()
    daemon = stage.daemon(
        HOOKD_LIMITS__CONCURRENCY=str(each),
        HOOKD_DELIVERY__MAX_IN_FLIGHT=str(wanted * 11 // 10),
        HOOKD_DELIVERY__TIMEOUT="30s",
    )
    before = daemon.resident_mb()
    full = asyncio.Event()
    filling = asyncio.create_task(lags(daemon, full))
    until = time.monotonic() + 60
    while (now := await asyncio.to_thread(in_flight, daemon)) < wanted:
        assert time.monotonic() < until, f"only {now:,} in flight"
        await asyncio.sleep(0.2)
    filled = time.monotonic()
    full.set()
    lags_filling = await filling
    resident = daemon.resident_mb()
    enough = asyncio.Event()
    late: list[float] = []
    own = asyncio.create_task(own_lateness(late))
    cpu, begun = daemon.cpu_s(), time.monotonic()
    asyncio.get_running_loop().call_later(seconds, enough.set)
    found = await lags(daemon, enough)
    own.cancel()
    cpu, took = daemon.cpu_s() - cpu, time.monotonic() - begun
    at_the_end = in_flight(daemon)
    figures = {
        "in_flight": [wanted, at_the_end],
        "at_receiver": stage.stats()["most"]["later"],
        "filled_s": filled - daemon.ready,
        "idle_mb": before,
        "resident_mb": max(resident, daemon.resident_mb()),
        "peak_mb": daemon.resident_mb(most=True),
        "lag_p50_ms": percentile(found, 0.5) * 1000,
        "lag_p99_ms": percentile(found, 0.99) * 1000,
        "lag_most_ms": max(found) * 1000,
        "own_p99_ms": percentile(late, 0.99) * 1000,
        "own_most_ms": max(late) * 1000,
        "lag_filling_p99_ms": percentile(lags_filling, 0.99) * 1000,
        "core": cpu / took,
    }
    daemon.stop(at_once=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hosts", type=int, default=200)
    parser.add_argument("--each", type=int, default=50, help="in flight at each host")
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    needed = given.hosts * given.each * 11 // 10 + SPARE_DESCRIPTORS
    available = raise_descriptors(needed)
    if available < needed:
        reason = f"{needed:,} file descriptors are needed, the hard limit is {available:,} (ulimit -Hn)"
        print(json.dumps({"skipped": reason}) if given.json else f"skipped: {reason}")
        return
    stage = Stage()
    try:
        figures = asyncio.run(slow(stage, given.hosts, given.each, given.seconds))
    finally:
        stage.close()
    if given.json:
        print(json.dumps({"goals": GOALS} | figures))
    else:
        _print(figures, given)
    met = figures["resident_mb"] <= GOALS["resident_mb"] and figures["lag_p99_ms"] <= GOALS["lag_p99_ms"]
    sys.exit(0 if met else 1)


def _print(figures: dict[str, Any], given: argparse.Namespace) -> None:
    print(
        f"{given.hosts} hosts x {given.each} in flight, answers after {ANSWER_S} s; all in flight {figures['filled_s']:.1f} s after the start"
    )
    print(
        f"  in flight {figures['in_flight'][0]:,} at the beginning, {figures['in_flight'][1]:,} at the end; at the receiver {figures['at_receiver']:,} at most"
    )
    print(
        f"  resident {figures['idle_mb']:.0f} -> {figures['resident_mb']:.0f} MB, goal {GOALS['resident_mb']:g} MB   peak {figures['peak_mb']:.0f} MB"
    )
    print(
        f"  loop lag over {given.seconds:g} s: p50 {figures['lag_p50_ms']:.1f} ms, p99 {figures['lag_p99_ms']:.1f} ms, goal {GOALS['lag_p99_ms']:g} ms, at most {figures['lag_most_ms']:.0f} ms"
        f" (this script's own: p99 {figures['own_p99_ms']:.1f} ms, at most {figures['own_most_ms']:.0f} ms)   core {figures['core']:.2f}"
    )
    print(f"  while filling up: p99 {figures['lag_filling_p99_ms']:.0f} ms")


if __name__ == "__main__":
    main()
