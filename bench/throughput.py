"""
The whole daemon beside a bare client, in the same run.

    python bench/throughput.py [--deliveries 40000] [--rounds 3] [--matrix | --matrix full] [--json]
                               [--concurrency 500] [--hosts 20] [--payload 1024] [--tls] [--numbered] [--dsn …] [--target …]

Each round: a bare ``ClientSession.post`` loop (``bench/bare.py``), then the daemon with a backlog of as many
deliveries, to the same receiver, with bodies of the same size and the same number of exchanges in flight.  The client
or the daemon has one core; the receiver, PostgreSQL and this script have the other.  Both are warm: the loop has
opened its connections, and of the daemon's deliveries the first some thousand are not counted.  Its time ends when
PostgreSQL has every result; results that were unwritten when it began are its too, which is to its disadvantage.

A ratio is printed only where both figures are those of the clients: the loop had, or wanted, its core nearly all of the
time, the receiver did not, and others disturbed both alike (``cores.py``).  Else the exit status is 2.

``--matrix`` goes from this case along each axis: concurrency 50 and 2,000, hosts 1 and 1,000, payloads of 200 B,
20 KiB and 200 KiB, TLS, numbered answers; with ``full`` through the 72 combinations of the first four.  The counts are smaller
the larger the payload is.  Answers are alike, and hookd parses one only if it differs from the last (``net.line``); ``--numbered``:
no two are, and each has a header more.

Floor, in the case without options: ratio >= 1.8.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import asyncpg
from cores import BUSY, SATURATED, disturbance
from stage import DEADLINE_S, HERE, Arrivals, Stage, elsewhere, raise_descriptors

FLOOR = 1.8
CONCURRENCIES = (50, 500, 2000)
HOSTS = (1, 20, 1000)
PAYLOADS = (200, 1024, 20 * 1024, 200 * 1024)

AT_ONCE = 64 * 2**20
"""Bytes of payload that one statement inserts."""

# The filler is random: PostgreSQL would compress anything else, and a body that costs no reading would be measured.
INSERT = """
insert into hookd.event (type, payload, tenant)
select 'bench.made', '{"n": "' || lpad(n::text, 7, '0') || '", "fill": "' || $3 || '"}', 'tenant-' || n % $2::integer
  from generate_series(1, $1::integer) n
"""

CONNECTIONS = """
select count(*) from pg_stat_activity
 where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
"""


@dataclass(frozen=True)
class Case:
    concurrency: int = 500
    hosts: int = 20
    payload: int = 1024
    tls: bool = False
    numbered: bool = False
    """No two answers are alike."""

    def __str__(self) -> str:
        size = f"{self.payload} B" if self.payload < 1024 else f"{self.payload / 1024:g} KiB"
        kind = "TLS" if self.tls else "plain"
        kind += ", numbered answers" if self.numbered else ""
        return f"{self.concurrency:,} in flight, {self.hosts:,} host{'s'[: self.hosts > 1]}, {size}, {kind}"

    @property
    def path(self) -> str:
        return "/each" if self.numbered else "/hook"

    def deliveries(self, wanted: int) -> int:
        """How many, for a payload of so many bytes to cost about as long as a small one."""
        return min(wanted, max(wanted // 20, wanted * 20 * 1024 // max(self.payload, 20 * 1024)))

    @property
    def warm_up(self) -> int:
        return max(2000, 2 * self.concurrency, 2 * self.hosts)


FLOOR_CASE = Case()


def cases(matrix: str, first: Case) -> list[Case]:
    if matrix == "full":
        return [Case(*values) for values in product(CONCURRENCIES, HOSTS, PAYLOADS, (False, True))]
    if matrix == "axes":
        found = [first]
        found += [replace(first, concurrency=n) for n in CONCURRENCIES]
        found += [replace(first, hosts=n) for n in HOSTS]
        found += [replace(first, payload=n) for n in PAYLOADS]
        found += [replace(first, tls=True), replace(first, numbered=True)]
        return list(dict.fromkeys(found))
    return [first]


class Throughput:
    """The rounds of one run."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def bare(self, case: Case, deliveries: int) -> dict[str, Any]:
        scheme = "https" if case.tls else "http"
        hosts = [self.stage.host(n, tls=case.tls) for n in range(case.hosts)]
        process = self.stage.child(
            str(HERE / "bare.py"),
            json.dumps({
                "urls": [f"{scheme}://{host}{case.path}" for host in hosts], "requests": deliveries,
                "concurrency": case.concurrency, "payload": case.payload, "core": self.stage.own_core,
                "ca_file": self.stage.ca_file if case.tls else "",
            }),
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        before = self.stage.stats()["now"]
        out, _ = process.communicate(timeout=DEADLINE_S)
        if process.returncode:
            raise SystemExit(
                "the bare client failed:\n" + (self.stage.folder / "stderr.log").read_text()[-2000:]
            )
        after = self.stage.stats()
        found = json.loads(out)
        per_s = found["requests"] / found["seconds"]
        return {
            "per_s": per_s,
            "cpu_us": found["cpu_s"] / found["requests"] * 1e6,
            "core": found["cpu_s"] / found["seconds"],
            "wanted": found["wanted"],
            "displaced": found["displaced"],
            "receiver": _receiver(before, after["now"], after["count"], per_s),
        }

    async def whole(self, case: Case, deliveries: int) -> dict[str, Any]:
        stage = self.stage
        total = deliveries + case.warm_up
        await stage.fresh_database()
        hosts = [stage.host(n, tls=case.tls) for n in range(case.hosts)]
        await stage.add_endpoints(
            hosts,
            case.path,
            [f"tenant-{n}" for n in range(case.hosts)],
            scheme="https" if case.tls else "http",
        )
        connection = await asyncpg.connect(stage.dsn)
        fill = os.urandom(max(1, (case.payload - 30) // 2)).hex()
        each = max(1, AT_ONCE // case.payload)
        for start in range(0, total, each):
            await connection.execute(INSERT, min(each, total - start), case.hosts, fill)
        if not stage.elsewhere:
            await connection.execute("vacuum analyze hookd.delivery")
            await connection.execute("checkpoint")
        stage.stats()
        # Twice its share for each host: what binds is the total, as it is in the loop.
        daemon = stage.daemon(
            HOOKD_DELIVERY__MAX_IN_FLIGHT=str(case.concurrency),
            HOOKD_LIMITS__CONCURRENCY=str(max(2, 2 * case.concurrency // case.hosts)),
        )
        arrivals = Arrivals(stage)
        while await arrivals.look() < case.warm_up:
            await asyncio.sleep(0.01)
        begun, count, before = time.monotonic(), arrivals.count, arrivals.now
        spent, postgres = daemon.used(), stage.postgres_cpu_s()
        connections = await connection.fetchval(CONNECTIONS)
        while await arrivals.look() < total:
            await asyncio.sleep(0.02)
        settled = await stage.drained(connection)
        spent, postgres = daemon.used() - spent, stage.postgres_cpu_s() - postgres
        measured = total - count
        per_s = measured / (settled - begun)
        figures = {
            "deliveries": measured,
            "per_s": per_s,
            "cpu_us": spent.cpu_s / measured * 1e6,
            "system_us": spent.system_s / measured * 1e6,
            "postgres_us": postgres / measured * 1e6,
            "core": spent.share,
            "wanted": spent.wanted,
            "displaced": spent.displaced,
            "connections": connections,
            "resident_mb": daemon.resident_mb(most=True),
            "receiver": _receiver(before, arrivals.now, measured, per_s),
        }
        daemon.stop()
        arrivals.close()
        await connection.close()
        await stage.nothing_lost(total, arrivals.count)
        await stage.leave_database()
        return figures


def _receiver(
    before: dict[str, float], after: dict[str, float], count: int, per_s: float
) -> dict[str, float]:
    """What the receiver costs, and its share of a core at this rate: in the stretch between, nothing else came."""
    cpu_s, waited_s = after["cpu_s"] - before["cpu_s"], after["waited_s"] - before["waited_s"]
    return {
        "cpu_us": cpu_s / count * 1e6,
        "core": cpu_s / count * per_s,
        "wanted": (cpu_s + waited_s) / count * per_s,
    }


def troubles(bare: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """Why the two may not be compared; empty if they may."""
    found = []
    if bare["wanted"] and bare["wanted"] < BUSY:
        found.append(
            f"the bare client had time to spare ({bare['wanted']:.0%} of its core wanted): something else held it up"
        )
    found += [
        f"the receiver had no time to spare beside {name} ({f['receiver']['wanted']:.0%} of its core wanted)"
        for name, f in (("the bare client", bare), ("hookd", whole))
        if f["receiver"]["wanted"] > SATURATED
    ]
    found += disturbance("the bare client", bare["displaced"], "hookd", whole["displaced"])
    return found


def measured(bench: Throughput, case: Case, deliveries: int, rounds: int) -> dict[str, Any]:
    """A B A B …; medians, and every round."""
    each: list[dict[str, Any]] = []
    for _ in range(rounds):
        bare = bench.bare(case, deliveries)
        whole = asyncio.run(bench.whole(case, deliveries))
        each.append({"bare": bare, "hookd": whole, "troubles": troubles(bare, whole)})
    ratios = [r["hookd"]["per_s"] / r["bare"]["per_s"] for r in each if not r["troubles"]]
    return {
        "case": str(case), **asdict(case), "deliveries": deliveries, "rounds": each, "ratios": ratios,
        "ratio": statistics.median(ratios) if len(ratios) * 2 > rounds else None,
        "bare": _medians([r["bare"] for r in each]), "hookd": _medians([r["hookd"] for r in each]),
        "troubles": sorted({t for r in each for t in r["troubles"]}),
    }  # fmt: skip


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: _medians([r[key] for r in rounds])
        if isinstance(value, dict)
        else statistics.median(r[key] for r in rounds)
        for key, value in rounds[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--deliveries", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=FLOOR_CASE.concurrency, help="exchanges in flight")
    parser.add_argument("--hosts", type=int, default=FLOOR_CASE.hosts)
    parser.add_argument("--payload", type=int, default=FLOOR_CASE.payload, help="bytes")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--numbered", action="store_true", help="no two answers are alike")
    parser.add_argument(
        "--matrix", nargs="?", const="axes", default="", choices=("axes", "full"), help="more cases"
    )
    parser.add_argument("--json", action="store_true")
    elsewhere(parser)
    given = parser.parse_args()
    wanted = cases(
        given.matrix, Case(given.concurrency, given.hosts, given.payload, given.tls, given.numbered)
    )
    if given.target and any(case.tls for case in wanted):
        parser.error("--target has no TLS; leave --tls and --matrix away")
    allowed = raise_descriptors(2 * max(max(case.concurrency, case.hosts) for case in wanted) + 500)
    if allowed < max(case.concurrency for case in wanted) + 500:
        parser.error(f"this system allows {allowed} open files; lower --concurrency")
    stage = Stage(tls=any(case.tls for case in wanted), dsn=given.dsn, target=given.target)
    found = []
    try:
        for case in wanted:
            found.append(measured(Throughput(stage), case, case.deliveries(given.deliveries), given.rounds))
            if not given.json:
                _print(found[-1])
    finally:
        stage.close()
    if given.json:
        print(json.dumps({"floor": FLOOR, "cases": found}))
    sys.exit(_status(found))


def _status(found: list[dict[str, Any]]) -> int:
    if any(f["ratio"] is None for f in found):
        return 2
    floor_case = [f for f in found if f["case"] == str(FLOOR_CASE)]
    return 0 if all(f["ratio"] >= FLOOR for f in floor_case) else 1


def _print(f: dict[str, Any]) -> None:
    bare, whole = f["bare"], f["hookd"]
    print(f"{f['case']}; {f['deliveries']:,} deliveries, {len(f['rounds'])} rounds")
    for name, c in (("bare ClientSession.post", bare), ("hookd, settled", whole)):
        print(f"  {name:24}{c['per_s']:8,.0f}/s   {c['cpu_us']:6.1f} µs CPU each, {c['core']:.2f} of its core, others {c['displaced']:.2f}"
              f"   receiver {c['receiver']['cpu_us']:.1f} µs each, {1 - c['receiver']['wanted']:.0%} of its core to spare")  # fmt: skip
    print(f"  {'PostgreSQL':24}{'':10}   {whole['postgres_us']:6.1f} µs CPU each")
    if f["ratio"] is None:
        print(f"  no ratio: {'; '.join(f['troubles'])}")
        return
    floor = f"   floor {FLOOR}" if f["case"] == str(FLOOR_CASE) else ""
    dropped = f"   dropped: {'; '.join(f['troubles'])}" if f["troubles"] else ""
    print(
        f"  {'ratio':24}{f['ratio']:8.2f}{floor}   rounds {', '.join(f'{r:.2f}' for r in f['ratios'])}{dropped}"
    )


if __name__ == "__main__":
    main()
