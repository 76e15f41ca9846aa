"""
How long nothing is delivered of what a daemon had, when it is killed beside another one.

    python bench/failover.py [--times 30] [--json]

Two daemons share the hosts of one database, and an event goes every 5 ms to 20 hosts in turn.  One is killed with SIGKILL;
from that moment until the first event arrives that was inserted after it for a host of the dead one's, nobody delivered
there: such an event can only come from the other daemon.  Then another daemon is started in place of the dead one, and so
on.  Ends with a check that every event has arrived, once or more.

With so few times the p99 is the worst of them.  Goal: p99 <= 250 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from typing import Any

import asyncpg
from scene import OWNED
from stage import Stage, percentile

HOSTS = 20
EVERY_S = 0.005
SETTLED_S = 1.0
GOAL_MS = 250.0

OWNED_TENANTS = f"select o.pid, e.tenant from ({OWNED}) o join hookd.endpoint e on e.shard = o.shard"

SEND = "select hookd.send('bench.made', '{\"n\": 1}'::text, tenant => $1)"


class Stream:
    """Events, one after another, and when each was inserted for whom."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.begun: dict[str, tuple[float, str]] = {}

    async def run(self) -> None:
        connection = await asyncpg.connect(self._stage.dsn)
        number = 0
        while True:
            begun = time.monotonic()
            number += 1
            tenant = f"tenant-{number % HOSTS}"
            event_id = await connection.fetchval(SEND, tenant)
            self.begun[str(event_id)] = (begun, tenant)
            await asyncio.sleep(EVERY_S)


async def measured(stage: Stage, times: int) -> dict[str, Any]:
    await stage.fresh_database()
    await stage.add_endpoints(
        [stage.host(n) for n in range(HOSTS)], "/timed", [f"tenant-{n}" for n in range(HOSTS)]
    )
    dice = random.Random(1)
    daemons = [await asyncio.to_thread(stage.daemon)]
    stream = Stream(stage)
    arrived: dict[str, float] = {}
    sending = asyncio.create_task(stream.run())
    gaps = []
    for _ in range(times):
        (owner,) = await _owners(stage, 1)
        daemons.append(await asyncio.to_thread(stage.daemon))
        await asyncio.sleep(SETTLED_S * dice.uniform(1, 1.5))
        theirs = (await _owners(stage, 2))[owner]
        victim = daemons.pop(0)
        killed = time.monotonic()
        victim.process.kill()
        victim.process.wait()
        first = None
        while first is None:
            if time.monotonic() > killed + 60:
                raise SystemExit("nobody delivers after the kill")
            await asyncio.sleep(0.05)
            arrived |= await asyncio.to_thread(_timed, stage)
            after = [
                arrived[i]
                for i, (begun, tenant) in stream.begun.items()
                if begun > killed and tenant in theirs and i in arrived
            ]
            first = min(after, default=None)
        gaps.append(first - killed)
    sending.cancel()
    connection = await asyncpg.connect(stage.dsn)
    await stage.drained(connection)
    await connection.close()
    arrived |= await asyncio.to_thread(_timed, stage)
    lost = [i for i in stream.begun if i not in arrived]
    assert not lost, f"{len(lost)} of {len(stream.begun):,} events have not arrived"
    for daemon in daemons:
        daemon.stop()
    return {
        "gaps_ms": [gap * 1000 for gap in gaps], "p50_ms": percentile(gaps, 0.5) * 1000,
        "p99_ms": percentile(gaps, 0.99) * 1000, "events": len(stream.begun),
    }  # fmt: skip


async def _owners(stage: Stage, count: int) -> dict[int, set[str]]:
    """Tenants by the session that owns the shard of their host, as soon as so many own all of them."""
    connection = await asyncpg.connect(stage.dsn)
    try:
        until = time.monotonic() + 60
        while True:
            found: dict[int, set[str]] = {}
            for row in await connection.fetch(OWNED_TENANTS):
                found.setdefault(row["pid"], set()).add(row["tenant"])
            if len(found) == count and sum(map(len, found.values())) == HOSTS:
                return found
            if time.monotonic() > until:
                raise SystemExit(f"{count} daemons do not divide the hosts: {found}")
            await asyncio.sleep(0.02)
    finally:
        await connection.close()


def _timed(stage: Stage) -> dict[str, float]:
    found: dict[str, float] = stage.stats()["timed"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage()
    try:
        figures = asyncio.run(measured(stage, given.times))
    finally:
        stage.close()
    if given.json:
        print(json.dumps(figures | {"goal": GOAL_MS}))
    else:
        print(f"{given.times} kills, {figures['events']:,} events, none lost")
        print(
            f"  kill to the other daemon's first delivery for its hosts: p50 {figures['p50_ms']:.0f} ms, p99 {figures['p99_ms']:.0f} ms, goal {GOAL_MS:g} ms"
        )
        print(f"  {', '.join(f'{gap:.0f}' for gap in figures['gaps_ms'])}")
    sys.exit(0 if figures["p99_ms"] <= GOAL_MS else 1)


if __name__ == "__main__":
    main()
