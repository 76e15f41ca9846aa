"""
Fresh events while a replay waits: how much later do they start?

    python bench/replay.py [--replayed 100000] [--events 300] [--hosts 10] [--rate 200] [--json]

Each host has one endpoint, and all of the replay is theirs, so every fresh event goes to an endpoint that has thousands of
replayed ones before it in the queue.  Single events, 20 to 80 ms apart, from their INSERT to the start of their exchange, by
the log: first with nothing else to do, then beside the replay.  Twice: with hosts that have no rate (the replay keeps the
daemon at its limit), and with ``--rate`` requests a second for each.

Where the replay was through before all events were sent, the figure is not printed and the exit status is 2.  Goal: at most
200 ms at the median, whatever waits; a place behind the replay would cost some ten seconds, and with the rate fifty.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
from typing import Any

import asyncpg
from stage import HERE, Stage, percentile

GOAL_MS = 200.0

SETTLED = """
with e as (
  insert into hookd.event (type, payload, tenant)
  select 'bench.old', json_build_object('n', n)::text, 'tenant-' || n % $2 from generate_series(1, $1::integer) n
  returning id, tenant)
insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, status, verdict, reason)
select now(), nextval('hookd.delivery_id'), e.id, p.key, 10, 503, 'exhausted', 'answered 503'
  from e join hookd.endpoint p using (tenant)
"""

LAGS = """
select extract(epoch from a.at - e.created_at)::double precision
  from hookd.attempt a join hookd.event e on e.id = a.event_id
 where not a.replay and e.type = 'bench.made'
"""

PENDING = "select count(*) from hookd.delivery where replay"


async def fresh(connection: asyncpg.Connection, events: int, hosts: int) -> list[float]:
    """Send them, and say how long each waited for its start, sorted."""
    await connection.execute("delete from hookd.event where type = 'bench.made'")
    dice = random.Random(1)
    for n in range(events):
        await asyncio.sleep(dice.uniform(0.02, 0.08))
        await connection.execute("select hookd.send('bench.made', '{}', tenant => $1)", f"tenant-{n % hosts}")
    while True:
        lags = [r[0] for r in await connection.fetch(LAGS)]
        if len(lags) >= events:
            return sorted(lags)
        await asyncio.sleep(0.05)


async def measure(stage: Stage, given: argparse.Namespace, rate: float | None) -> dict[str, Any]:
    await stage.fresh_database()
    hosts = [stage.host(n) for n in range(given.hosts)]
    await stage.add_endpoints(hosts, "/hook", [f"tenant-{n}" for n in range(given.hosts)])
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute(SETTLED, given.replayed, given.hosts)
    await connection.execute("delete from hookd.delivery")
    await connection.execute("vacuum analyze")
    daemon = stage.daemon(HOOKD_LIMITS__RATE=str(rate or 0.0))
    alone = await fresh(connection, given.events, given.hosts)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hookd", "replay", "--state", "exhausted", "--yes",
        env=os.environ | {"HOOKD_DATABASE__DSN": stage.dsn, "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0, "the replay failed"
    beside = await fresh(connection, given.events, given.hosts)
    pending = await connection.fetchval(PENDING)
    daemon.stop(at_once=True)
    await connection.close()
    return {
        "rate": rate,
        "pending_at_the_end": pending,
        **{
            f"{name}_{which}_ms": percentile(lags, share) * 1000
            for which, lags in (("alone", alone), ("beside", beside))
            for name, share in (("p50", 0.5), ("p99", 0.99))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--replayed", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=120)
    parser.add_argument("--hosts", type=int, default=10)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage()
    try:
        figures = [asyncio.run(measure(stage, given, rate)) for rate in (None, given.rate)]
    finally:
        stage.close()
    if given.json:
        print(json.dumps({"runs": figures, "goal_ms": GOAL_MS}))
    else:
        for f in figures:
            limit = f"{f['rate']:g}/s a host" if f["rate"] else "no rate"
            print(
                f"{limit}: INSERT to start, fresh events alone p50 {f['p50_alone_ms']:.1f} p99 {f['p99_alone_ms']:.1f} ms;"
                f" beside a replay of {given.replayed:,} p50 {f['p50_beside_ms']:.1f} p99 {f['p99_beside_ms']:.1f} ms"
                f" ({f['pending_at_the_end']:,} still waiting at the end)"
            )
    if any(not f["pending_at_the_end"] for f in figures):
        print("the replay was through before the events were: take more of it", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if all(f["p50_beside_ms"] <= GOAL_MS for f in figures) else 1)


if __name__ == "__main__":
    main()
