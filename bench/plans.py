"""
The plans of the hot queries, on a queue of 1,000,000 rows: writes ``docs/queries.md``.

    python bench/plans.py [--rows 1000000] [--out docs/queries.md]

The statements are taken from ``hookd/postgres/queue.py`` and ``owner.py`` as they are, prepared, and explained with
ANALYZE and BUFFERS in a session whose plans are pinned like the feed's and the owner's.  Those that write are rolled back.  The queue
holds fresh rows of 100 endpoints, and of ten of them rows with a due time, an order key or a coalesce key; the table was
vacuumed and analyzed, and the caches are warm: each is explained twice, and the second time counts.  The exit status
is 1 where a plan walks over a whole table.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
from stage import Stage

from hookd.postgres import connect, owner, queue

if TYPE_CHECKING:
    from collections.abc import Sequence

ENDPOINTS = 100
AT_ONCE = 100_000
BATCH = 500
HEAD = """# The hot queries

What the daemon asks PostgreSQL while it delivers, and what PostgreSQL does for it. Written by `bench/plans.py` with
PostgreSQL {version} on a queue of {rows:,} rows ({fresh:,} fresh, {due:,} with a due time, {keyed:,} with an order or a coalesce key) of
{endpoints} endpoints, caches warm; run it again after a change of a query or an index. Times are those of one small machine,
`EXPLAIN`'s own clock included; what matters is how much more a plan reads than it returns, and that none walks over the
whole queue: where one does, it says so.

The feed and the owner pin their plans (`PIN_PLANS` in `hookd/postgres/connect.py`): statistics of a queue are always wrong, it is
empty, then it is not. Generic plans show no row estimates worth reading, so costs are left out.
"""

INSERT = """
insert into hookd.event (type, payload, tenant, deliver_at, order_key, coalesce_key)
select 'bench.made', '{"n": 1}', 'tenant-' || case when n % 20 < 3 then n / 20 % 10 else n % $3 end,
       case n % 20 when 0 then now() + make_interval(secs => n % 7200 + 60) end,
       case n % 20 when 1 then 'key-' || n % 997 end,
       case n % 20 when 2 then 'key-' || n % 997 end
  from generate_series($1::integer, $2::integer) n
"""


@dataclass(frozen=True)
class Query:
    """One statement, and what to ask it with."""

    name: str
    sql: str
    why: str
    arguments: Sequence[Any]


async def fill(connection: asyncpg.Connection, rows: int) -> None:
    for start in range(1, rows + 1, AT_ONCE):
        await connection.execute(INSERT, start, min(rows, start + AT_ONCE - 1), ENDPOINTS)
    # half of those with a time are due by now
    await connection.execute(
        "update hookd.delivery set due_at = due_at - interval '1 hour' where due_at is not null"
    )
    await connection.execute("vacuum analyze")


async def queries(connection: asyncpg.Connection) -> list[Query]:
    """With arguments as a busy daemon has them: a full batch, a place in the middle of each queue."""
    keys = [r[0] for r in await connection.fetch("select key from hookd.endpoint order by key")]
    middle = await connection.fetchval("select percentile_disc(0.5) within group (order by id) from hookd.delivery where due_at is null")  # fmt: skip
    batch = await connection.fetch("select event_id, id, attempt, xid::text as xid from hookd.delivery where due_at is null order by id limit $1", BATCH)  # fmt: skip
    newest = await connection.fetchrow("select xid::text as xid from hookd.delivery where due_at is null order by id desc limit 1")  # fmt: skip
    ordered = await connection.fetch("select distinct on (order_key) endpoint, order_key, id from hookd.delivery where order_key is not null order by order_key, id limit 50")  # fmt: skip
    coalesced = await connection.fetch("select distinct on (coalesce_key) endpoint, coalesce_key, id, event_id from hookd.delivery where coalesce_key is not null order by coalesce_key, id desc limit 50")  # fmt: skip
    assert newest is not None
    shards = list(range(64))
    events, ids, attempts = ([r[name] for r in batch] for name in ("event_id", "id", "attempt"))
    some = keys[:10]
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2)
    # Arrivals of the last transaction only: its rows are the newest AT_ONCE.
    recent = newest["xid"]
    later = str(int(recent) + 1)
    return [
        Query("ARRIVALS", queue.ARRIVALS, "nothing new, which is what a busy feed asks most: by the two bounds of a snapshot", (later, [later], shards, 8001)),
        Query("ARRIVALS", queue.ARRIVALS, "a window full of new rows, out of an insert of many", (recent, [], shards, 8001)),
        Query("ARRIVAL_PLACES", queue.ARRIVAL_PLACES, f"an arrival larger than the window ({AT_ONCE:,} rows), as one row for each endpoint", (recent, [], shards)),
        Query("REFILL_FRESH", queue.REFILL_FRESH, "the next 50 fresh rows of each of 10 endpoints, from the middle of their queues", (some, [middle] * 10, [50] * 10)),
        Query("REFILL_DUE", queue.REFILL_DUE, "the next 50 due rows of each of 10 endpoints, and the first that is not due", (some, [since] * 10, [0] * 10, [50] * 10, [False] * 10)),
        Query("HEADS", queue.HEADS, "the oldest row of each of 50 order keys", ([r[0] for r in ordered], [r[1] for r in ordered], [0] * len(ordered))),
        Query("LATEST", queue.LATEST, "the newest row of each of 50 coalesce keys", ([r[0] for r in coalesced], [r[1] for r in coalesced])),
        Query("OLDER", queue.OLDER, "what 50 newer rows replace", ([r[0] for r in coalesced], [r[1] for r in coalesced], [r[2] for r in coalesced], [r[3] for r in coalesced], 100)),
        Query("RECOVER", queue.RECOVER, "which endpoints have rows: once for each start of a daemon, one probe for each endpoint", ()),
        Query("EVENTS", queue.EVENTS, f"the events of {BATCH} deliveries", (events,)),
        Query("FORWARD", owner.FORWARD, "a slice of an endpoint's rows, of each kind, when it may have moved", ([keys[0]], [2**63 - 1], ["infinity"], [2**63 - 1], shards, [], owner.FORWARD_MOST)),
        Query("SETTLE_FINAL", owner.SETTLE_FINAL, f"{BATCH} verdicts that end a delivery", (events, ids, attempts)),
        Query("SETTLE_RETRY", owner.SETTLE_RETRY, f"{BATCH} verdicts that try again later", (events, ids, attempts, [5.0] * BATCH)),
    ]  # fmt: skip


async def explained(connection: asyncpg.Connection, query: Query) -> str:
    types = (await connection.prepare(query.sql)).get_parameters()
    prepared = f"prepare hot ({', '.join(f'{t.schema}.{_type(t.name)}' for t in types)}) as {query.sql}"
    await connection.execute(prepared.replace(" () as ", " as "))
    plan: list[Any] = []
    for _ in range(2):
        transaction = connection.transaction()
        await transaction.start()
        try:
            values = ", ".join(
                _literal(value, t.name) for value, t in zip(query.arguments, types, strict=True)
            )
            call = f"execute hot ({values})" if values else "execute hot"
            plan = await connection.fetch(f"explain (analyze, buffers, costs off) {call}")
        finally:
            await transaction.rollback()
    await connection.execute("deallocate hot")
    return "\n".join(re.sub(r"(.{200}).+", r"\1 …", row[0]) for row in plan)


def _type(name: str) -> str:
    return f'"_{name[:-2]}"' if name.endswith("[]") else f'"{name}"'


def _literal(value: Any, name: str) -> str:
    if isinstance(value, list):
        items = ", ".join(_literal(v, name) for v in value)
        return f"array[{items}]::{name if name.endswith('[]') else name + '[]'}"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return "'" + str(value).replace("'", "''") + "'"


async def written(stage: Stage, rows: int) -> tuple[str, list[str]]:
    """The page, and the queries that walk over a whole table."""
    await stage.fresh_database()
    await stage.add_endpoints(
        [stage.host(n) for n in range(ENDPOINTS)], "/hook", [f"tenant-{n}" for n in range(ENDPOINTS)]
    )
    connection = await asyncpg.connect(stage.dsn)
    await fill(connection, rows)
    wanted = await queries(connection)
    counts = await connection.fetchrow("select count(*) filter (where due_at is null) as fresh, count(*) filter (where due_at is not null) as due, count(*) filter (where order_key is not null or coalesce_key is not null) as keyed from hookd.delivery")  # fmt: skip
    assert counts is not None
    version = (await connection.fetchval("show server_version")).split()[0]
    await connection.execute(connect.PIN_PLANS)
    parts = [HEAD.format(version=version, rows=rows, endpoints=ENDPOINTS, **counts)]
    walks: list[str] = []
    for query in wanted:
        plan = await explained(connection, query)
        note = ""
        if re.search(r"Seq Scan on (event|delivery)", plan):
            walks.append(query.name)
            note = "This one walks over the whole table, dead rows included.\n\n"
        parts.append(f"\n## {query.name}: {query.why}\n\n{note}```\n{plan}\n```\n")
    await connection.close()
    return "".join(parts), walks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "queries.md")
    given = parser.parse_args()
    stage = Stage()
    try:
        text, walks = asyncio.run(written(stage, given.rows))
    finally:
        stage.close()
    given.out.write_text(text, encoding="utf-8")
    print(f"{given.out}: {text.count('## ')} plans on {given.rows:,} rows")
    if walks:
        print(f"over a whole table: {', '.join(walks)}")
    sys.exit(1 if walks else 0)


if __name__ == "__main__":
    main()
