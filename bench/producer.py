"""
What hookd costs those who insert: commits a second of 1, 16 and 100 committers, one event a transaction.

    python bench/producer.py [--seconds 4] [--rounds 1] [--committers 1,16,100] [--json]

``pgbench`` inserts, as fast as it can, into five tables in turn:

- *plain*: columns, defaults and primary key of ``hookd.event``, without its checks, triggers and partitions;
- *naive*: the same with a trigger that sends a NOTIFY for every row, and somebody who listens;
- *hookd, absent*: ``hookd.event`` with 20 endpoints, one of which gets the event, and no daemon;
- *hookd, busy*: the same while a daemon delivers a backlog of another tenant, and so has all it can do;
- *plain, beside*: the plain table while a daemon does that.

The last one is there because PostgreSQL, ``pgbench`` and the receiver share what cores the daemon leaves: a busy daemon
takes CPU from every producer, hookd's or not.  What hookd's trigger costs is *busy* against *beside*; what a producer
feels on this machine is *busy* against *plain*.  Each commit waits for the disk (``synchronous_commit = on``).

Where ``pgbench`` is not beside the server's other programs, its part is played by as many connections of asyncpg in
two processes; its own cost is higher, which hides some of the difference.

Floor: busy >= 0.7 of beside, with each number of committers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import asyncpg
from stage import DEADLINE_S, HERE, INSERT, Daemon, Stage

if TYPE_CHECKING:
    from pathlib import Path

HOSTS = 20
BUSY_HOSTS = 8
IN_FLIGHT_EACH = 50
PAYLOAD = 200
BACKLOG = 30_000
"""That the daemon gets for each second that it has to be busy: more than it can deliver."""
CONNECTED_PER_S = 25
"""Sessions that are begun meanwhile: pgbench counts that into its time, though not into its rate."""
FLOOR = 0.7
KINDS = ("plain", "naive", "hookd, absent", "plain, beside", "hookd, busy")

TABLES = """
create table plain (like hookd.event including defaults including indexes);
create table naive (like hookd.event including defaults including indexes);
create function naive_notify() returns trigger language plpgsql
  as $$ begin perform pg_notify('naive', new.id::text); return null; end $$;
create trigger naive_notify after insert on naive for each row execute function naive_notify()
"""

TABLE = {"plain": "plain", "plain, beside": "plain", "naive": "naive"}

SCRIPT = """\\set n random(0, {last})
insert into {table} (type, payload, tenant) values ('bench.made', '{{"n": 1, "fill": "{fill}"}}', 'quiet-' || :n);
"""

BUSY = INSERT.replace("'tenant-'", "'busy-'")


class Committers:
    """``pgbench``, or what stands in for it."""

    def __init__(self, stage: Stage, seconds: float) -> None:
        assert stage.server is not None
        self._stage = stage
        self.seconds = max(1, round(seconds))
        program = stage.server.binaries.folder / "pgbench"
        self.program: Path | None = program if program.exists() else None

    def lasts_s(self, count: int) -> int:
        """With the sessions' beginning."""
        return self.seconds + (count // CONNECTED_PER_S if self.program else 0)

    def run(self, table: str, count: int) -> tuple[float, int]:
        """Commits a second, and commits."""
        statement = SCRIPT.format(last=HOSTS - 1, table=table, fill="x" * (PAYLOAD - 20))
        if self.program is None:
            return self._stand_in(statement.splitlines()[1].replace(":n", "(random() * 19)::integer"), count)
        script = self._stage.folder / "producer.sql"
        script.write_text(statement)
        done = subprocess.run(
            [self.program, "--no-vacuum", f"--client={count}", "--jobs=1", f"--time={self.lasts_s(count)}",
             "--protocol=prepared", f"--file={script}", self._stage.dsn],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
        number = re.search(r"actually processed: (\d+)", done.stdout)
        if (
            done.returncode
            or found is None
            or number is None
            or "number of failed transactions: 0 " not in done.stdout
        ):
            raise SystemExit(f"pgbench failed: {done.stderr or done.stdout}")
        return float(found[1]), int(number[1])

    def _stand_in(self, statement: str, count: int) -> tuple[float, int]:
        wanted = json.dumps(
            {"dsn": self._stage.dsn, "statement": statement, "count": count, "seconds": self.seconds}
        )
        done = subprocess.run(
            [sys.executable, str(HERE / "producer.py"), "--stand-in", wanted],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"a committer failed: {done.stderr}")
        return float(done.stdout), round(float(done.stdout) * self.seconds)


async def stand_in(dsn: str, statement: str, count: int, seconds: float) -> float:
    connections = [await asyncpg.connect(dsn) for _ in range(count)]
    until = time.monotonic() + seconds
    commits = 0

    async def work(connection: asyncpg.Connection) -> None:
        nonlocal commits
        insert = await connection.prepare(statement)
        while time.monotonic() < until:
            await insert.fetch()
            commits += 1

    await asyncio.gather(*map(work, connections))
    for connection in connections:
        connection.terminate()
    return commits / seconds


async def prepare(stage: Stage) -> None:
    await stage.fresh_database()
    for hosts, path, tenant in ((HOSTS, "/aside", "quiet"), (BUSY_HOSTS, "/hook", "busy")):
        await stage.add_endpoints(
            [stage.host(n + (100 if tenant == "busy" else 0)) for n in range(hosts)],
            path,
            [f"{tenant}-{n}" for n in range(hosts)],
        )
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute(TABLES)
    await connection.close()


async def cleared(stage: Stage) -> None:
    """Nothing left of the run before; nobody but a daemon may do so on a table that is in use."""
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute("truncate plain, naive, hookd.event, hookd.delivery, hookd.attempt")
    await connection.execute("checkpoint")
    await connection.close()


async def backlog(stage: Stage, rows: int) -> None:
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute(BUSY, rows, BUSY_HOSTS, PAYLOAD)
    await connection.execute("checkpoint")
    await connection.close()


def busy_daemon(stage: Stage, seconds: float) -> Daemon:
    asyncio.run(backlog(stage, round(BACKLOG * (seconds + 1))))
    stage.stats()
    daemon = stage.daemon(HOOKD_LIMITS__CONCURRENCY=str(IN_FLIGHT_EACH))
    until = time.monotonic() + 30
    while not stage.stats()["count"]:
        assert time.monotonic() < until, "the daemon does not deliver"
        time.sleep(0.05)
    return daemon


async def left(stage: Stage) -> int:
    connection = await asyncpg.connect(stage.dsn)
    count = await connection.fetchval("select count(*) from hookd.delivery where endpoint in (select key from hookd.endpoint where tenant like 'busy-%')")  # fmt: skip
    await connection.close()
    return int(count)


def measured(stage: Stage, committers: Committers, kind: str, count: int) -> dict[str, Any]:
    asyncio.run(cleared(stage))
    beside = kind in ("plain, beside", "hookd, busy")
    daemon = busy_daemon(stage, committers.lasts_s(count)) if beside else None
    listener = _listener(stage) if kind == "naive" else None
    spent = daemon.used() if daemon else None
    stage.stats()
    postgres = stage.postgres_cpu_s()
    per_s, commits = committers.run(TABLE.get(kind, "hookd.event"), count)
    postgres = stage.postgres_cpu_s() - postgres
    # the beginning of the sessions, and what the daemon's do, where there is one, are in it
    figures: dict[str, Any] = {"commits_per_s": per_s, "postgres_us": postgres / commits * 1e6}
    if daemon and spent:
        spent = daemon.used() - spent
        figures |= {"deliveries_per_s": stage.stats()["count"] / spent.seconds, "daemon_core": spent.share}
        daemon.stop(at_once=True)
        if asyncio.run(left(stage)) == 0:
            raise SystemExit(f"{kind}: the daemon had delivered all before the end; it was not busy")
    if listener is not None:
        listener.terminate()
        listener.wait()
    return figures


def _listener(stage: Stage) -> subprocess.Popen[bytes]:
    """In a process of its own, for the session has to read while nothing else here does."""
    return subprocess.Popen([sys.executable, str(HERE / "producer.py"), "--listen", stage.dsn])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--committers", default="1,16,100")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stand-in", help=argparse.SUPPRESS)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stand_in:
        print(asyncio.run(stand_in(**json.loads(given.stand_in))))
        return
    if given.listen:
        asyncio.run(_listen_for_ever(given.listen))
    counts = [int(n) for n in given.committers.split(",")]
    stage = Stage(settings={"max_connections": str(max(100, max(counts) + 50))})
    rows: list[dict[str, Any]] = []
    try:
        asyncio.run(prepare(stage))
        committers = Committers(stage, given.seconds)
        for count in counts:
            rounds = [
                {kind: measured(stage, committers, kind, count) for kind in KINDS}
                for _ in range(given.rounds)
            ]
            rows.append({"committers": count, "rounds": rounds, **_medians(rounds)})
    finally:
        stage.close()
    by = "pgbench" if committers.program else "asyncpg"
    if given.json:
        print(json.dumps({"floor": FLOOR, "by": by, "rows": rows}))
    else:
        _print(rows, by)
    sys.exit(0 if all(row["busy_beside"] >= FLOOR for row in rows) else 1)


async def _listen_for_ever(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.add_listener("naive", lambda *_: None)
    await asyncio.get_running_loop().create_future()


def _medians(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    commits = {kind: statistics.median(r[kind]["commits_per_s"] for r in rounds) for kind in KINDS}

    def ratio(kind: str, beside: str) -> float:
        ratios = [float(r[kind]["commits_per_s"] / r[beside]["commits_per_s"]) for r in rounds]
        return statistics.median(ratios)

    return {
        "commits_per_s": commits,
        "postgres_us": {kind: statistics.median(r[kind]["postgres_us"] for r in rounds) for kind in KINDS},
        "deliveries_per_s": statistics.median(r["hookd, busy"]["deliveries_per_s"] for r in rounds),
        "naive_plain": ratio("naive", "plain"),
        "absent_plain": ratio("hookd, absent", "plain"),
        "busy_plain": ratio("hookd, busy", "plain"),
        "busy_beside": ratio("hookd, busy", "plain, beside"),
    }


def _print(rows: list[dict[str, Any]], by: str) -> None:
    print(f"commits a second, one event each, by {by}; in brackets against plain")
    print(
        "  committers    plain           naive   hookd, absent   plain, beside   hookd, busy   busy/beside   daemon meanwhile"
    )
    for row in rows:
        c = row["commits_per_s"]
        print(f"  {row['committers']:10} {c['plain']:8,.0f} {c['naive']:8,.0f} ({row['naive_plain']:.2f})"
              f" {c['hookd, absent']:8,.0f} ({row['absent_plain']:.2f}) {c['plain, beside']:15,.0f}"
              f" {c['hookd, busy']:6,.0f} ({row['busy_plain']:.2f}) {row['busy_beside']:10.2f}, floor {FLOOR}"
              f" {row['deliveries_per_s']:8,.0f}/s")  # fmt: skip
        p = row["postgres_us"]
        print(
            f"             PostgreSQL's CPU a commit: plain {p['plain']:.0f} µs, naive {p['naive']:.0f} µs, hookd, absent {p['hookd, absent']:.0f} µs"
        )


if __name__ == "__main__":
    main()
