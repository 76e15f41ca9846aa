"""
Whether limits are kept and used: 200 hosts with rates from 1 to 100 a second and concurrency from 1 to 10, all with a
backlog.

    python bench/limits.py [--seconds 40] [--daemons 2] [--json]

180 hosts have rates that grow on a logarithmic scale, more of them low than high, so that all together stay at about half of
what a core can send (a daemon that has no time left is late whatever its timers are), and the concurrency goes round with
them; their answers take so long that concurrency would allow four times the rate, 50 ms
at most.  At the other 20 the concurrency is the limit: rate 100, answers after 50 ms for each that may be under way, which
leaves 20 a second.  Half of the hosts have their limits in ``[limits.hosts]`` of the configuration, some of them with a
burst of 5, the others in the columns of their endpoint.

*Overshoot*: in any window of t seconds, from the first request on, how many more requests came to the receiver than
rate * t + max(1, burst).  Divided by the rate it is the time by which a request was early beside an earlier one: jitter on
the way explains that much.  The receiver notes a request late when its own loop is late, which is shown beside it.
*Used*: after five seconds to warm up, the requests in the window against rate * seconds, where the rate is the limit.

With ``--daemons 2`` two divide the hosts among them first, one on the core that is otherwise one daemon's, the other beside
the receiver and PostgreSQL; then the events are inserted.

Goals: overshoot explained by 5 ms beyond the receiver's own lateness, concurrency never exceeded, used >= 0.99 in total.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import asyncpg
from stage import Daemon, Stage, percentile

HOSTS = 200
WARM_UP_S = 5
MARGIN_S = 10
"""So much more than can be sent is pending everywhere."""
BURST = 5
GOALS = {"jitter_ms": 5.0, "over_concurrency": 0, "used": 0.99}

PENDING = """
insert into hookd.event (type, payload, tenant)
select 'bench.made', '{"n": 1}', q.tenant
  from unnest($1::text[], $2::integer[]) as q (tenant, wanted) cross join generate_series(1, q.wanted)
"""

EMPTY = """
select e.host from hookd.endpoint e where not exists (select from hookd.delivery d where d.endpoint = e.key)
"""


@dataclass(frozen=True)
class Limited:
    """A host and its limits."""

    name: str
    rate: float
    concurrency: int
    burst: int
    in_file: bool
    answer_ms: int
    most_per_s: float
    """That its limits let through: less than the rate, if the concurrency is the limit."""

    def by_rate(self) -> bool:
        return self.most_per_s == self.rate


def hosts(stage: Stage) -> list[Limited]:
    """Nine by rate, one by concurrency, and so on; rate, concurrency, burst and place do not go together."""
    found = []
    for n in range(HOSTS):
        name = stage.host(n)
        tens, ones = divmod(n, 10)
        in_file = tens % 2 == 0
        if ones == 9:
            concurrency = tens // 2 + 1
            found.append(Limited(name, 100.0, concurrency, 0, in_file, 50 * concurrency, 20.0))
        else:
            place = tens * 9 + ones
            rate = round(100 ** ((place / (HOSTS * 0.9 - 1)) ** 2), 2)
            concurrency = place * 7 % 10 + 1
            burst = BURST if in_file and place % 3 == 0 else 0
            answer_ms = max(1, min(50, int(250 * concurrency / rate)))
            found.append(Limited(name, rate, concurrency, burst, in_file, answer_ms, rate))
    return found


def overshoot(came: list[float], host: Limited) -> float:
    """
    The most requests above rate * t + max(1, burst), over all windows.

    A window from the ith to the jth request holds j - i + 1 of them, so only the least of ``i - rate * t_i`` so
    far matters.
    """
    worst, least = 0.0, float("inf")
    for n, at in enumerate(came):
        ahead = n - host.rate * (at - came[0])
        least = min(least, ahead)
        worst = max(worst, ahead - least + 1 - max(1, host.burst))
    return worst


def used(came: list[float], host: Limited, begun: float, ended: float) -> float:
    """
    Of what the rate allows.

    Counted from the last request before the window to the last one in it, or to one interval before the window's
    end: at one a second the ends of the window would else matter more than what is measured.
    """
    first, last = bisect_left(came, begun), bisect_left(came, ended)
    since = came[first - 1] if first else begun
    until = max(came[last - 1] if last else begun, ended - 1 / host.rate)
    return (last - first) / (host.rate * (until - since))


OWNED = """
select count(*) as shards from pg_locks
 where locktype = 'advisory' and classid = 1752133483 and granted
   and database = (select oid from pg_database where datname = current_database())
 group by pid
"""


async def divided(connection: asyncpg.Connection, daemons: int) -> None:
    """Wait until each daemon has its share."""
    async with asyncio.timeout(30):
        while True:
            owned = [row["shards"] for row in await connection.fetch(OWNED)]
            if len(owned) == daemons and sum(owned) == 64 and max(owned) - min(owned) <= 1:
                return
            await asyncio.sleep(0.05)


async def measured(stage: Stage, seconds: float, count: int = 1) -> dict[str, Any]:
    limited = hosts(stage)
    tenants = [host.name for host in limited]
    await stage.fresh_database()
    config = stage.folder / "limits.toml"
    config.write_text(
        "".join(
            f'[limits.hosts."{h.name}"]\nrate = {h.rate}\nburst = {h.burst}\nconcurrency = {h.concurrency}\n'
            for h in limited
            if h.in_file
        )
    )
    for host in limited:
        await stage.add_endpoints(
            [host.name],
            f"/paced?ms={host.answer_ms}",
            [host.name],
            rates=[None if host.in_file else host.rate],
            concurrency=[None if host.in_file else host.concurrency],
        )
    connection = await asyncpg.connect(stage.dsn)
    wanted = [int(h.most_per_s * (WARM_UP_S + seconds + MARGIN_S)) + h.burst + 20 for h in limited]
    daemons: list[Daemon] = []
    if count > 1:
        daemons = [stage.daemon(HOOKD_CONFIG=str(config)) for _ in range(count)]
        await divided(connection, count)
        if stage.own_core is not None:
            shared = os.sched_getaffinity(0) - {stage.own_core}
            for daemon in daemons[1::2]:
                os.sched_setaffinity(daemon.process.pid, shared)
        stage.stats()
    await connection.execute(PENDING, tenants, wanted)
    if count == 1:
        await connection.execute("vacuum analyze")
        await connection.execute("checkpoint")
        stage.stats()
        daemons = [stage.daemon(HOOKD_CONFIG=str(config))]
    await asyncio.sleep(WARM_UP_S)
    begun, cpu = time.monotonic(), sum(d.cpu_s() for d in daemons)
    await asyncio.sleep(seconds)
    ended, cpu = time.monotonic(), sum(d.cpu_s() for d in daemons) - cpu
    stats = stage.stats()
    empty = await connection.fetch(EMPTY)
    assert not empty, f"nothing is pending any more at {[r[0] for r in empty]}"
    if count > 1:
        await divided(connection, count)
    for daemon in daemons:
        daemon.stop()
    await connection.close()
    await stage.nothing_lost(sum(wanted), stats["count"] + stage.stats()["count"])
    return figures(limited, stats, begun, ended) | {"core": cpu / (ended - begun)}


def figures(limited: list[Limited], stats: dict[str, Any], begun: float, ended: float) -> dict[str, Any]:
    """What the receiver's notes say."""
    rows = []
    for host in limited:
        came = stats["paced"].get(host.name, [])
        over = overshoot(came, host)
        in_window = bisect_left(came, ended) - bisect_left(came, begun)
        rows.append(
            {
                "host": host.name.partition(".")[0],
                "rate": host.rate,
                "concurrency": host.concurrency,
                "burst": host.burst,
                "in": "file" if host.in_file else "columns",
                "over": over,
                "jitter_ms": over / host.rate * 1000,
                "jitter_warm_ms": overshoot(came[bisect_left(came, begun) :], host) / host.rate * 1000,
                "most": stats["most"].get(host.name, 0),
                "in_window": in_window,
                "used": used(came, host, begun, ended) if host.by_rate() else None,
                "used_of_concurrency": None
                if host.by_rate()
                else in_window / (ended - begun) / host.most_per_s,
            }
        )
    by_rate = [host for host in limited if host.by_rate()]
    allowed = sum(host.rate for host in by_rate) * (ended - begun)
    by_jitter = sorted(rows, key=lambda r: r["jitter_ms"])
    return {
        "over": max(r["over"] for r in rows),
        "jitter_ms": by_jitter[-1]["jitter_ms"],
        "jitter_p50_ms": by_jitter[len(rows) // 2]["jitter_ms"],
        "jitter_warm_ms": max(r["jitter_warm_ms"] for r in rows),
        "worst": by_jitter[-1],
        "late_p999_ms": percentile(stats["late"], 0.999) * 1000,
        "late_most_ms": max(stats["late"]) * 1000,
        "over_concurrency": max(r["most"] - r["concurrency"] for r in rows),
        "at_concurrency": sum(r["most"] == r["concurrency"] for r in rows),
        "used": sum(r["in_window"] for r in rows if r["used"] is not None) / allowed,
        "used_median": statistics.median(r["used"] for r in rows if r["used"] is not None),
        "least": min((r for r in rows if r["used"] is not None), key=lambda r: r["used"]),
        "used_of_concurrency": [r["used_of_concurrency"] for r in rows if r["used"] is None],
        "per_s": sum(r["in_window"] for r in rows) / (ended - begun),
        "hosts": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--daemons", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="with the figures of each host")
    given = parser.parse_args()
    stage = Stage()
    try:
        found = asyncio.run(measured(stage, given.seconds, given.daemons))
    finally:
        stage.close()
    if given.json:
        print(json.dumps({"goals": GOALS} | found))
    else:
        _print(found, given)
    met = (
        found["jitter_ms"] <= GOALS["jitter_ms"] + found["late_most_ms"]
        and found["over_concurrency"] <= GOALS["over_concurrency"]
        and found["used"] >= GOALS["used"]
    )
    sys.exit(0 if met else 1)


def _print(found: dict[str, Any], given: argparse.Namespace) -> None:
    worst, least = found["worst"], found["least"]
    shares = found["used_of_concurrency"]
    print(
        f"{HOSTS} hosts with a backlog for {given.seconds:g} s, {given.daemons} daemon{'s' * (given.daemons > 1)}: {found['per_s']:,.0f}/s, core {found['core']:.2f}"
    )
    print(f"  above rate * t + burst: {found['over']:.2f} requests at most; explained by jitter of {found['jitter_ms']:.1f} ms at most ({_said(worst)}), {found['jitter_p50_ms']:.1f} ms at the median host, {found['jitter_warm_ms']:.1f} ms at most after warm-up; "
          f"goal {GOALS['jitter_ms']:g} ms + the receiver's lateness: {found['late_p999_ms']:.1f} ms at p99.9, {found['late_most_ms']:.1f} ms at most")  # fmt: skip
    print(
        f"  above the concurrency: {found['over_concurrency']} at most, goal 0; {found['at_concurrency']} hosts reached it"
    )
    print(
        f"  used of the rate: {found['used']:.4f} in total, goal {GOALS['used']}; median {found['used_median']:.4f}, least {least['used']:.4f} ({_said(least)})"
    )
    print(
        f"  used of the concurrency, where that is the limit: median {statistics.median(shares):.3f}, least {min(shares):.3f}"
    )


def _said(row: dict[str, Any]) -> str:
    return f"{row['host']}: rate {row['rate']:g}, concurrency {row['concurrency']}, limits in {row['in']}"


if __name__ == "__main__":
    main()
