"""
From an event's commit to its arrival: idle, and under load up to saturation.

    python bench/latency.py [--idle 300] [--seconds 8] [--loads 25,50,75,90] [--committers 16] [--json]
                            [--dsn …] [--target …]

*Idle*: single events, one after another, 20 to 200 ms apart.  From just before the INSERT is sent to the arrival at the
receiver, so the commit itself is in it.

*Under load*: first saturation is found, by keeping 2,000 pending at 20 hosts for as many seconds.  Then events come at
moments drawn beforehand (a Poisson process with that share of the rate), whatever the daemon does: an open loop.  What is
due is inserted by a few committers, every 2 ms by one that is free, at most 50 in a transaction.  Latency is
counted from the moment that was drawn, so an event that had to wait for its committer has waited, and nothing is left
out because the system was slow (no coordinated omission).  All samples are kept and sorted, so percentiles are exact; a
histogram would save memory that is not missed.

Where the committers themselves were late (p99 of drawn moment to INSERT above 20 ms), or the receiver had no time to
spare, the figures are those of the script: they are not printed, and the exit status is 2.

Floors: idle p50 <= 3 ms, p99 <= 10 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import deque
from typing import Any

import asyncpg
from cores import SATURATED
from stage import DEADLINE_S, Arrivals, Daemon, Producer, Stage, elsewhere, percentile

HOSTS = 20
IN_FLIGHT_EACH = 50
PAYLOAD = 200
PENDING = 2000
WARM_UP_S = 1.0
AT_ONCE = 50
TICK_S = 0.002
LATE_MOST_S = 0.02
FLOORS = {"p50_ms": 3.0, "p99_ms": 10.0}
SHARES = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}

SEND = "insert into hookd.event (type, payload, tenant) select 'bench.made', p, t from unnest($1::text[], $2::text[]) as e (p, t)"


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {name: percentile(ordered, share) * 1000 for name, share in SHARES.items()}


async def prepare(stage: Stage) -> None:
    await stage.fresh_database()
    for path, tenant in (("/hook", "tenant"), ("/lag", "lag")):
        await stage.add_endpoints(
            [stage.host(n) for n in range(HOSTS)], path, [f"{tenant}-{n}" for n in range(HOSTS)]
        )
    if not stage.elsewhere:
        connection = await asyncpg.connect(stage.dsn)
        await connection.execute("checkpoint")
        await connection.close()


async def idle(stage: Stage, events: int) -> dict[str, Any]:
    connection = await asyncpg.connect(stage.dsn)
    dice = random.Random(1)
    ahead_s = stage.receiver_ahead_s()
    await connection.execute(SEND, [_payload(time.time())], ["lag-0"])  # opens the connection
    await asyncio.sleep(2)
    stage.stats()
    for n in range(events):
        await asyncio.sleep(dice.uniform(0.02, 0.2))
        await connection.execute(SEND, [_payload(time.time())], [f"lag-{n % HOSTS}"])
    await stage.drained(connection)
    await connection.close()
    lags = stage.stats()["lags"]
    assert len(lags) == events, f"{events} sent, {len(lags)} arrived"
    return {"events": events, **percentiles([lag - ahead_s for lag in lags])}


async def saturation(stage: Stage, seconds: float) -> float:
    """Deliveries a second while there is always something pending."""
    stage.stats()
    arrivals = Arrivals(stage)
    producer = Producer(stage, arrivals, tenants=HOSTS, payload=PAYLOAD, inserted=0)
    begun = time.monotonic()
    await producer.keep(PENDING, until=lambda: time.monotonic() > begun + WARM_UP_S and arrivals.count > 0)
    start = arrivals.count
    until = time.monotonic() + seconds
    await producer.keep(PENDING, until=lambda: time.monotonic() > until)
    rate = arrivals.per_s(start, arrivals.count)
    while await arrivals.look() < producer.inserted:
        await asyncio.sleep(0.02)
    arrivals.close()
    return rate


class OpenLoop:
    """Events that come when they come."""

    def __init__(self, stage: Stage, per_s: float, seconds: float, *, warm_up: float) -> None:
        self._stage = stage
        dice = random.Random(2)
        moments = itertools.accumulate(dice.expovariate(per_s) for _ in itertools.count())
        self._moments = deque(itertools.takewhile(lambda at: at < warm_up + seconds, moments))
        self.count = len(self._moments)
        self._warm_up = warm_up
        self._taken_at = 0.0
        self._numbers = itertools.count()
        self.late: list[float] = []
        """From the drawn moment to the INSERT."""
        self.committed: list[float] = []
        """From the drawn moment to the answer to the commit."""
        self.measured = 0

    async def run(self, committers: int) -> None:
        begun = time.time() + 0.1
        async with asyncio.TaskGroup() as group:
            for _ in range(committers):
                group.create_task(self._commit(begun))

    async def _commit(self, begun: float) -> None:
        connection = await asyncpg.connect(self._stage.dsn)
        moments = self._moments
        while moments:
            wait = max(begun + moments[0], self._taken_at + TICK_S) - time.time()
            if wait > 0:
                await asyncio.sleep(wait)
                continue
            due: list[float] = []
            now = self._taken_at = time.time()
            while moments and begun + moments[0] <= now and len(due) < AT_ONCE:
                due.append(moments.popleft())
            # what comes while it warms up is sent along, and not counted
            warm = [at > self._warm_up for at in due]
            tenants = [f"{'lag' if w else 'tenant'}-{next(self._numbers) % HOSTS}" for w in warm]
            await connection.execute(SEND, [_payload(begun + at) for at in due], tenants)
            done = time.time()
            self.measured += sum(warm)
            self.late += [now - begun - at for at, w in zip(due, warm, strict=True) if w]
            self.committed += [done - begun - at for at, w in zip(due, warm, strict=True) if w]
        await connection.close()


async def loaded(
    stage: Stage, daemon: Daemon, rate: float, share: float, seconds: float, committers: int
) -> dict[str, Any]:
    ahead_s = stage.receiver_ahead_s()
    before = stage.stats()["now"]
    spent = daemon.used()
    loop = OpenLoop(stage, rate * share, seconds, warm_up=WARM_UP_S)
    await loop.run(committers)
    spent = daemon.used() - spent
    lags: list[float] = []
    arrived, deadline = 0, time.monotonic() + DEADLINE_S
    while arrived < loop.count:
        assert time.monotonic() < deadline, f"{loop.count:,} sent, {arrived:,} arrived"
        await asyncio.sleep(0.1)
        stats = stage.stats()
        arrived += stats["count"]
        lags += stats["lags"]
    assert len(lags) == loop.measured, f"{loop.measured:,} sent, {len(lags):,} arrived"
    now = stats["now"]
    wanted = (now["cpu_s"] - before["cpu_s"] + now["waited_s"] - before["waited_s"]) / (
        now["mono"] - before["mono"]
    )
    late_s = percentile(loop.late, 0.99)
    troubles = []
    if late_s > LATE_MOST_S:
        troubles.append(f"the committers were late: p99 {late_s * 1000:.0f} ms")
    if wanted > SATURATED:
        troubles.append(f"the receiver had no time to spare ({wanted:.0%} of its core wanted)")
    return {
        "share": share,
        "per_s": rate * share,
        "events": len(lags),
        **percentiles([lag - ahead_s for lag in lags]),
        "committed": percentiles(loop.committed),
        "late_p99_ms": late_s * 1000,
        "core": spent.share,
        "displaced": spent.displaced,
        "troubles": troubles,
    }


def _payload(at: float) -> str:
    return f'{{"at": {at:.6f}, "fill": "{"x" * (PAYLOAD - 40)}"}}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--idle", type=int, default=300, help="single events")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--loads", default="25,50,75,90", help="per cent of saturation; empty for none")
    parser.add_argument("--committers", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    elsewhere(parser)
    given = parser.parse_args()
    stage = Stage(dsn=given.dsn, target=given.target)
    figures: dict[str, Any] = {"floors": FLOORS, "loads": []}
    try:
        asyncio.run(prepare(stage))
        daemon = stage.daemon(HOOKD_LIMITS__CONCURRENCY=str(IN_FLIGHT_EACH))
        figures["idle"] = asyncio.run(idle(stage, given.idle))
        shares = [int(load) / 100 for load in given.loads.split(",") if load]
        if shares:
            figures["saturation_per_s"] = asyncio.run(saturation(stage, given.seconds))
        for share in shares:
            figures["loads"].append(
                asyncio.run(
                    loaded(stage, daemon, figures["saturation_per_s"], share, given.seconds, given.committers)
                )
            )
        daemon.stop()
    finally:
        stage.close()
    if given.json:
        print(json.dumps(figures))
    else:
        _print(figures)
    if any(load["troubles"] for load in figures["loads"]):
        sys.exit(2)
    sys.exit(0 if all(figures["idle"][name] <= floor for name, floor in FLOORS.items()) else 1)


def _print(figures: dict[str, Any]) -> None:
    alone = figures["idle"]
    print(f"idle, INSERT to arrival: p50 {alone['p50_ms']:.2f} ms (floor {FLOORS['p50_ms']:g}), "
          f"p99 {alone['p99_ms']:.2f} ms (floor {FLOORS['p99_ms']:g}), {alone['events']:,} events")  # fmt: skip
    if figures["loads"]:
        print(f"saturation {figures['saturation_per_s']:,.0f}/s; from the drawn moment, ms:")
        print(
            "  load       /s   events      p50      p99    p99.9   committed p50, p99   the daemon's core: it, others"
        )
    for f in figures["loads"]:
        if f["troubles"]:
            print(f"  {f['share']:4.0%} {f['per_s']:8,.0f}   {'; '.join(f['troubles'])}")
        else:
            print(f"  {f['share']:4.0%} {f['per_s']:8,.0f} {f['events']:8,} {f['p50_ms']:8.2f} {f['p99_ms']:8.2f} {f['p999_ms']:8.2f}"
                  f"   {f['committed']['p50_ms']:.2f}, {f['committed']['p99_ms']:.2f}   {f['core']:.2f}, {f['displaced']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
