"""
What a delivery costs in PostgreSQL: statements, commits, WAL, dead rows, disk.

    python bench/cost.py [--deliveries 50000] [--payload 200] [--json]

Three stretches, each between two looks at PostgreSQL's own counters: events are inserted one a commit, then as many 100
a commit, with no daemon; then the daemon delivers them all, its start included.  A stretch begins after a checkpoint.

- Statements and commits are those of the daemon's role of the run, by ``pg_stat_statements`` (BEGIN and COMMIT are
  counted) and ``pg_stat_database``.
- WAL comes from ``pg_walinspect``, which tells records and images of full pages apart: a page's first change after a
  checkpoint writes the whole page, so these depend on how often there is a checkpoint, not on the delivery.  Both are
  printed; the goal is for the records, from INSERT to settled.
- Dead rows and updates are those of the tables of schema ``hookd``, but for four that are written by the clock and not
  by the delivery: the settings (when a daemon starts), the summary that it publishes every second in an unlogged table, and
  the counts for the console (every ten seconds, and by the minute).
- Disk is what the tables and their indexes have grown by: the event and the log stay until retention drops their day.

Goals: statements <= 0.02, commits <= 0.01, WAL <= 1,000 bytes of records (inserted 100 a commit), no updates.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any

import asyncpg
from stage import Arrivals, Stage

HOSTS = 20
IN_FLIGHT_EACH = 50
AT_ONCE = 100
COMMITTERS = 4
GOALS = {"statements": 0.02, "commits": 0.01, "wal_bytes": 1000.0, "updates": 0.0}
SETTINGS = {
    "shared_preload_libraries": "pg_stat_statements",
    # all of a stretch's WAL has to be there to be looked at
    "min_wal_size": "1GB",
    "max_wal_size": "4GB",
    "wal_keep_size": "4GB",
    "checkpoint_timeout": "1h",
}

INSERT = """
insert into hookd.event (type, payload, tenant)
select 'bench.made', '{"n": "' || lpad(n::text, 7, '0') || '", "fill": "' || repeat('x', $3) || '"}', 'tenant-' || n % $2
  from generate_series($4::integer, $4 + $1::integer - 1) n
"""

LOOK = """
select (select coalesce(sum(calls), 0) from pg_stat_statements(false) where dbid = d.oid) as statements,
       s.xact_commit as commits, pg_current_wal_insert_lsn()::text as lsn,
       (select sum(n_tup_upd) from pg_stat_user_tables where schemaname = 'hookd' and relname not in ('node', 'setting', 'tally', 'endpoint_hour')) as updates,
       (select sum(n_tup_del) from pg_stat_user_tables where schemaname = 'hookd' and relname not in ('node', 'setting', 'tally', 'endpoint_hour')) as dead,
       (select json_object_agg(t.name, t.bytes) from (
          select regexp_replace(relname, '_?[0-9].*$', '') as name, sum(pg_total_relation_size(relid)) as bytes
            from pg_stat_user_tables where schemaname = 'hookd' group by 1) t)::text as disk
  from pg_database d join pg_stat_database s on s.datid = d.oid
 where d.datname = current_database()
"""

STATEMENTS = """
select regexp_replace(left(regexp_replace(query, '[[:space:]]+', ' ', 'g'), 60), '^ | $', '', 'g') as statement, calls
  from pg_stat_statements
 where dbid = (select oid from pg_database where datname = current_database())
 order by calls desc limit 8
"""

WAL = """
select "resource_manager/record_type" as what, count, record_size, fpi_size
  from pg_get_wal_stats($1::text::pg_lsn, $2::text::pg_lsn)
 where count > 0
"""


@dataclass(frozen=True)
class Look:
    """PostgreSQL's counters at a moment."""

    statements: int
    commits: int
    lsn: str
    updates: int
    dead: int
    disk: dict[str, int]


async def look(stage: Stage) -> Look:
    # a new session each time: the counters of one that ended are there for certain
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute("select pg_stat_force_next_flush()")
    await connection.execute("select pg_stat_clear_snapshot()")
    row = await connection.fetchrow(LOOK)
    await connection.close()
    assert row is not None
    return Look(
        statements=int(row["statements"]),
        commits=int(row["commits"]),
        lsn=row["lsn"],
        updates=int(row["updates"] or 0),
        dead=int(row["dead"] or 0),
        disk=json.loads(row["disk"]),
    )


async def checkpoint(stage: Stage) -> None:
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute("checkpoint")
    await connection.close()
    await asyncio.sleep(1.5)  # counters of ended sessions are written within a second


async def stretch(stage: Stage, before: Look, after: Look, count: int) -> dict[str, Any]:
    connection = await asyncpg.connect(stage.dsn)
    rows = await connection.fetch(WAL, before.lsn, after.lsn)
    await connection.close()
    return {
        "statements": (after.statements - before.statements) / count,
        "commits": (after.commits - before.commits) / count,
        "wal_bytes": sum(float(r["record_size"]) for r in rows) / count,
        "wal_page_images_bytes": sum(float(r["fpi_size"]) for r in rows) / count,
        "wal_records": sum(r["count"] for r in rows) / count,
        "wal_by_kind": {
            r["what"]: float(r["record_size"]) / count
            for r in sorted(rows, key=lambda r: -r["record_size"])
            if r["record_size"] / count >= 1
        },
        "updates": (after.updates - before.updates) / count,
        "dead": (after.dead - before.dead) / count,
        "disk_bytes": {
            name: (after.disk[name] - before.disk.get(name, 0)) / count
            for name in after.disk
            if after.disk[name] != before.disk.get(name, 0)
        },
    }


async def produce(stage: Stage, deliveries: int, payload: int, each: int) -> None:
    starts = list(range(1, deliveries + 1, each))
    fill = max(0, payload - 33)

    async def commit() -> None:
        connection = await asyncpg.connect(stage.dsn)
        while starts:
            start = starts.pop()
            await connection.execute(INSERT, min(each, deliveries + 1 - start), HOSTS, fill, start)
        await connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(COMMITTERS):
            group.create_task(commit())


async def measured(stage: Stage, deliveries: int, payload: int) -> dict[str, Any]:
    await stage.fresh_database()
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute("create extension pg_walinspect; create extension pg_stat_statements")
    await connection.close()
    await stage.add_endpoints(
        [stage.host(n) for n in range(HOSTS)], "/hook", [f"tenant-{n}" for n in range(HOSTS)]
    )
    figures: dict[str, Any] = {}
    for name, each in (("inserted singly", 1), ("inserted in bulk", AT_ONCE)):
        await checkpoint(stage)
        before = await look(stage)
        await produce(stage, deliveries, payload, each)
        await asyncio.sleep(1.5)
        figures[name] = await stretch(stage, before, await look(stage), deliveries)
    await checkpoint(stage)
    stage.stats()
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute("select pg_stat_statements_reset()")
    before = await look(stage)
    daemon = stage.daemon(HOOKD_LIMITS__CONCURRENCY=str(IN_FLIGHT_EACH))
    arrivals = Arrivals(stage)
    while await arrivals.look() < 2 * deliveries:
        await asyncio.sleep(0.05)
    daemon.stop()
    arrivals.close()
    await asyncio.sleep(1.5)
    figures["delivered"] = await stretch(stage, before, await look(stage), 2 * deliveries)
    figures["delivered"]["by_statement"] = {
        r["statement"]: r["calls"] / (2 * deliveries) for r in await connection.fetch(STATEMENTS)
    }
    await connection.close()
    await stage.nothing_lost(2 * deliveries, arrivals.count)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--deliveries", type=int, default=50_000, help="inserted singly, and as many in bulk")
    parser.add_argument("--payload", type=int, default=200, help="bytes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage(settings=SETTINGS)
    try:
        stretches = asyncio.run(measured(stage, given.deliveries, given.payload))
    finally:
        stage.close()
    bulk, delivered = stretches["inserted in bulk"], stretches["delivered"]
    figures = {
        "goals": GOALS,
        "statements": delivered["statements"],
        "commits": delivered["commits"],
        "wal_bytes": bulk["wal_bytes"] + delivered["wal_bytes"],
        "updates": delivered["updates"],
        "stretches": stretches,
    }
    if given.json:
        print(json.dumps(figures))
    else:
        _print(figures, given)
    sys.exit(0 if all(figures[name] <= goal for name, goal in GOALS.items()) else 1)


def _print(figures: dict[str, Any], given: argparse.Namespace) -> None:
    print(f"{given.deliveries:,} events of {given.payload} B inserted singly, {given.deliveries:,} {AT_ONCE} a commit; all delivered; for each:")  # fmt: skip
    print(
        "                   statements  commits  WAL bytes  + page images  records  dead  updates   disk bytes"
    )
    for name, f in figures["stretches"].items():
        disk = ", ".join(f"{table} {size:,.0f}" for table, size in f["disk_bytes"].items() if abs(size) >= 1)
        print(f"  {name:17}{f['statements']:10.4f} {f['commits']:8.4f} {f['wal_bytes']:10,.0f} {f['wal_page_images_bytes']:14,.0f}"
              f" {f['wal_records']:8.1f} {f['dead']:5.2f} {f['updates']:8.4f}   {disk}")  # fmt: skip
    for name, f in figures["stretches"].items():
        kinds = ", ".join(f"{kind} {size:,.0f}" for kind, size in f["wal_by_kind"].items())
        print(f"  WAL {name}: {kinds}")
    for statement, each in figures["stretches"]["delivered"]["by_statement"].items():
        print(f"  {each:.4f} of {statement}")
    for name, goal in GOALS.items():
        print(f"  {name} {figures[name]:,.4g}, goal {goal:g}")


if __name__ == "__main__":
    main()
