"""
The console and the API over a long log: how long pages take, and what looking costs the dispatcher.

    python bench/console.py [--attempts 10000000] [--rounds 30] [--only pages|cost] [--json]
                            [--deliveries 120000] [--pairs 5] [--pause 0.5] [--keep FOLDER | --use FOLDER]

First the log is filled: so many attempts of a week, in their day partitions, with events, dead letters and what daemons
write down by the minute and by the hour; 2,000 endpoints of 200 tenants, 3 in 100 events with a failure, 1 in 500 given up.

*Pages*: each page and each route of the API is asked for ``--rounds`` times, in a shuffled order, one at a time, over HTTP, from a
daemon with nothing to deliver; filters that match much, little and nothing are among them.  Printed are p50 and p95, and the median of
the daemon's CPU for one (of its main thread; not PostgreSQL's), and that for the first page of the process.  Floor: p95 of each
<= 200 ms.

*Cost*: closed, open, open, closed …: the daemon delivers a backlog beside the long log, and while it is open a client reads
each page once, before the time counts, and then pages like somebody who looks for something: one after the other, ``--pause``
seconds between two.  Printed is the throughput of each, and the median of what open costs against the closed one beside it.  Floor: < 2 %.

``--keep`` leaves the database in FOLDER (some 1.1 GB for a million attempts), ``--use`` takes one that was kept.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import http.client
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import asyncpg
from stage import INSERT, Arrivals, Stage, percentile

from hookd.postgres.migrate import migrate

if TYPE_CHECKING:
    from stage import Daemon

PAGE_MOST_MS = 200.0
COST_MOST = 0.02

ENDPOINTS = 2000
TENANTS = 200
DAYS = 7
AT_ONCE = 100_000
"""Events that one statement makes."""

LOADING = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "8GB", "autovacuum": "off"}
"""Of PostgreSQL, while it is filled."""

# The first partition reaches back to the beginning: it is replaced by the days of a week.
PARTITIONS = """
do $$
declare
  parent text;
  first text;
  today date := (now() at time zone 'utc')::date;
begin
  foreach parent in array array['event', 'attempt'] loop
    first := hookd.partition_name(parent, today - 1);
    execute format('drop table hookd.%%I', first);
    for n in reverse %(days)s..1 loop
      execute format('create table hookd.%%I partition of hookd.%%I for values from (%%s) to (%%s)',
        hookd.partition_name(parent, today - n), parent,
        case when n = %(days)s then 'minvalue' else hookd.partition_bound(parent, (today - n)::timestamp at time zone 'utc') end,
        hookd.partition_bound(parent, (today - n + 1)::timestamp at time zone 'utc'));
    end loop;
  end loop;
end
$$
"""

# An event every so many seconds, oldest first, so that everything is appended. Ids are made for their time.
EVENTS = f"""
insert into hookd.event (id, key, created_at, type, tenant, payload)
select encode(set_bit(set_bit(overlay(uuid_send(md5(n::text)::uuid) placing substring(int8send((extract(epoch from at) * 1000)::bigint) from 3) from 1 for 6), 52, 1), 53, 1), 'hex')::uuid,
       n, at, (array['user.created', 'user.updated', 'order.paid', 'order.shipped', 'invoice.sent'])[n % 5 + 1],
       'tenant-' || n % {TENANTS}, '{{"id": ' || n || ', "amount": ' || n % 1000 || ', "fill": "' || repeat(md5(n::text), 5) || '"}}'
  from (select n, $3::timestamptz + n * $4::double precision * interval '1 second' as at
          from generate_series($1::bigint, $2::bigint) n) s
 order by n
"""  # fmt: skip

# Of 500 events one is given up after three attempts, 14 are delivered by the second one, the others by the first.
ATTEMPTS = f"""
insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, status, sent, reused, verdict, outcome, reason, retry_at,
                           total_ms, connect_ms, dns_ms, first_byte_ms, url, answer_headers, answer_body)
select s.at, s.n, s.id, s.n % {ENDPOINTS} + 1, s.attempt, s.status, true, s.attempt = 1, s.verdict,
       case when s.status is null then 'timeout' else 'answered' end,
       case when s.verdict <> 'delivered' then case when s.status is null then 'no answer in time' else 'answered ' || s.status end end,
       case when s.verdict = 'retry' then s.at + interval '5 seconds' end,
       20 + s.n % 180, case when s.attempt > 1 then 3.1 end, case when s.attempt > 1 then 1.2 end, 15 + s.n % 170,
       'https://h' || s.n % {ENDPOINTS} || '.bench.localhost/hook',
       E'content-type: text/plain\\ncontent-length: 2\\ndate: Tue, 24 Nov 2026 12:00:00 GMT\\nserver: bench', 'ok'
  from (select e.key as n, e.id, e.created_at + interval '20 milliseconds' + (a.attempt - 1) * interval '5 seconds' as at, a.attempt::smallint,
               (case when a.attempt < f.last or f.last = 3 then case e.key % 3 when 0 then 503 when 1 then 500 end else 200 end)::smallint as status,
               case when a.attempt < f.last then 'retry' when f.last = 3 then 'exhausted' else 'delivered' end as verdict
          from hookd.event e
         cross join lateral (select case when e.key % 500 = 0 then 3 when e.key % 500 < 15 then 2 else 1 end as last) f
         cross join lateral generate_series(1, f.last) as a (attempt)
         where e.id >= hookd.uuid7_floor($1) and e.id < hookd.uuid7_floor($2)) s
 order by s.at
"""  # fmt: skip

DEAD_LETTERS = """
insert into hookd.dead_letter (delivery_id, event_id, endpoint, attempts, died_at, reason, tenant, type, payload, created_at)
select a.delivery_id, a.event_id, a.endpoint, a.attempt, a.at, a.reason, e.tenant, e.type, e.payload, e.created_at
  from hookd.attempt a join hookd.event e on e.id = a.event_id
 where a.verdict = 'exhausted'
"""

TALLY = """
insert into hookd.tally (seconds, at, node, delivery_id, pending, oldest_s, in_flight, figures)
select $3::smallint, m, 'bench', ((extract(epoch from m - $1::timestamptz) + $3) / $2::double precision)::bigint, 100, 0.5, 50,
       jsonb_build_object('verdict.delivered', c, 'verdict.retry', c / 33, 'outcome.2xx', c, 'outcome.5xx', c / 50, 'outcome.timeout', c / 100)
       || (select jsonb_object_agg(name || '.' || bound, c / 16)
             from unnest(array['attempt_ms', 'lag_ms']) name
            cross join unnest(array['5', '10', '25', '50', '75', '100', '250', '500', '750', '1000', '2500', '5000', '7500', '10000', '20000', 'inf']) bound)
  from generate_series(date_bin($3 * interval '1 second', greatest($1::timestamptz, now() - case $3 when 60 then interval '2 days' else interval '1 year' end),
                                '2000-01-01'), now(), $3 * interval '1 second') m
 cross join (select ($3 / $2::double precision)::bigint as c) s
"""

HOURS = """
insert into hookd.endpoint_hour (at, endpoint, delivered, failed, total_ms, slowest_ms)
select h, e, 100, e % 7, 10000, 190
  from generate_series(date_trunc('hour', $1::timestamptz), now(), interval '1 hour') h
 cross join generate_series(1, $2::integer) e
"""

AUDIT = """
insert into hookd.audit (at, via, who, action, tenant, endpoint_id)
select now() - n * interval '1 minute', 'cli', 'somebody@bench', 'endpoint.pause', e.tenant, e.id
  from generate_series(1, 10000) n
  join hookd.endpoint e on e.key = n % 100 + 1
"""

SAMPLE = """
select e.id as endpoint, e.tenant,
       (select a.event_id from hookd.attempt a where a.at < now() - interval '3 days' order by a.at desc limit 1) as old_event,
       a.event_id, a.delivery_id, a.at
  from (select * from hookd.attempt order by at desc offset 1000 limit 1) a
  join hookd.endpoint e on e.key = a.endpoint
"""


async def made(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await migrate(connection)
    await connection.close()


async def move_live(stage: Stage) -> None:
    """The receiver has another port than when the database was filled."""
    connection = await asyncpg.connect(stage.dsn)
    await migrate(connection)
    for n in range(20):
        host = stage.host(n)
        await connection.execute(
            "update hookd.endpoint set url = $1, host = $2 where tenant = $3",
            f"http://{host}/hook",
            host,
            f"live-{n}",
        )
    await connection.close()


async def fill(dsn: str, attempts: int) -> None:
    connection = await asyncpg.connect(dsn)
    begun = time.monotonic()
    events = round(attempts / 1.032)
    start = await connection.fetchval(
        "select now() - interval '1 minute' - $1::integer * interval '1 day'", DAYS
    )
    step = DAYS * 86400 / events
    for statement in (
        "set synchronous_commit = off",
        "set session_replication_role = replica",  # no fan-out: the deliveries are over
        "set maintenance_work_mem = '256MB'",
        "alter table hookd.event drop constraint event_is_valid",
        PARTITIONS % {"days": DAYS},
    ):
        await connection.execute(statement)
    for first in range(1, events + 1, AT_ONCE):
        await connection.execute(EVENTS, first, min(events, first + AT_ONCE - 1), start, step)
        lower = start + datetime.timedelta(seconds=(first - 0.5) * step)
        upper = start + datetime.timedelta(seconds=(first + AT_ONCE - 0.5) * step)
        await connection.execute(ATTEMPTS, lower, upper)
        done = min(events, first + AT_ONCE - 1) / events
        _say(f"\r  filling: {done:4.0%}, {time.monotonic() - begun:,.0f} s")
    await connection.execute(DEAD_LETTERS)
    for seconds in (60, 900):
        await connection.execute(TALLY, start, step, seconds)
    await connection.execute(HOURS, start, ENDPOINTS)
    await connection.execute(AUDIT)
    await connection.execute("select setval('hookd.delivery_id', $1), setval('hookd.event_key', $1)", events)
    await connection.execute(
        "alter table hookd.event add constraint event_is_valid"
        " check (hookd.valid_event(type, tenant, payload, order_key, coalesce_key, idempotency_key, headers)) not valid"
    )
    _say("\r  vacuuming                    ")
    await connection.execute("vacuum analyze")
    rows = await connection.fetchval(
        "select sum(greatest(0, reltuples))::bigint from pg_class where relkind = 'r' and relname like 'attempt\\_2%'"
    )
    size = await connection.fetchval("select pg_database_size(current_database())")
    await connection.close()
    _say(
        f"\r{rows:,} attempts in {DAYS} days, {size / 1e9:.1f} GB, filled in {time.monotonic() - begun:,.0f} s\n"
    )


async def pages(dsn: str) -> dict[str, str]:
    """What is asked for, by name."""
    connection = await asyncpg.connect(dsn)
    sample = await connection.fetchrow(SAMPLE)
    await connection.close()
    assert sample is not None
    endpoint, tenant, event, delivery = (sample[n] for n in ("endpoint", "tenant", "event_id", "delivery_id"))
    api = "/api/v1"
    rare = quote("$.id ? (@ == 77)")
    return {
        "page overview": "/",
        "page endpoints": "/endpoints",
        "page endpoint": f"/endpoints/{endpoint}",
        "page events": "/events",
        "page event": f"/events/{event}",
        "page delivery": f"/events/{event}/{delivery}",
        "page deliveries": "/deliveries",
        "page dead letters": "/dead-letters",
        "page live": "/live",
        "page audit": "/audit",
        "endpoints": f"{api}/endpoints",
        "endpoint": f"{api}/endpoints/{endpoint}",
        "endpoint health": f"{api}/endpoints/{endpoint}/health?hours=168",
        "events": f"{api}/events",
        "events of a tenant": f"{api}/events?tenant={tenant}",
        "events of a type": f"{api}/events?type=order.*",
        "events, path that matches one": f"{api}/events?path={rare}",
        "events of nobody": f"{api}/events?tenant=nobody",
        "events, 1000": f"{api}/events?limit=1000",
        "event": f"{api}/events/{event}",
        "old event": f"{api}/events/{sample['old_event']}",
        "deliveries": f"{api}/deliveries",
        "deliveries of an endpoint": f"{api}/deliveries?endpoint={endpoint}",
        "deliveries of a tenant": f"{api}/deliveries?tenant={tenant}",
        "deliveries exhausted": f"{api}/deliveries?state=exhausted",
        "deliveries pending": f"{api}/deliveries?state=pending",
        "deliveries of a type": f"{api}/deliveries?type=invoice.sent",
        "deliveries, path": f"{api}/deliveries?path={rare}",
        "delivery": f"{api}/deliveries/{delivery}?event={event}",
        "delivery by number": f"{api}/deliveries/{delivery}",
        "attempts": f"{api}/attempts",
        "attempts of an endpoint": f"{api}/attempts?endpoint={endpoint}",
        "attempts failed": f"{api}/attempts?failed=true",
        "attempts failed, of an endpoint": f"{api}/attempts?failed=true&endpoint={endpoint}",
        "attempts 503": f"{api}/attempts?status=503",
        "attempts with no such outcome": f"{api}/attempts?outcome=dns_failed",
        "attempts, path": f"{api}/attempts?path={rare}",
        "attempts three days ago": f"{api}/attempts?until={_days_ago(3)}",
        "dead letters": f"{api}/dead-letters",
        "dead letters of an endpoint": f"{api}/dead-letters?endpoint={endpoint}",
        "status": f"{api}/status",
        "rates, an hour": f"{api}/rates",
        "rates, a day": f"{api}/rates?seconds=86400&intervals=96",
        "failures, an hour": f"{api}/failures",
        "failures, a week": f"{api}/failures?since={_days_ago(7)}",
        "audit": f"{api}/audit",
        "openapi": f"{api}/openapi.json",
    }  # fmt: skip


def _days_ago(days: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * 86400))


SETTLED_S = 0.003
"""After an answer: the kernel counts the time of a thread when it stops running, not while it does."""


def first_page(daemon: Daemon) -> dict[str, float]:
    """Of the process, a second after it began to deliver: milliseconds, of the clock and of its main thread's CPU."""
    time.sleep(1)
    before, begun = daemon.ran_s(), time.perf_counter()
    with urllib.request.urlopen(f"{daemon.admin}/") as answer:
        answer.read()
    took = (time.perf_counter() - begun) * 1000
    time.sleep(SETTLED_S)
    return {"took": took, "cpu": (daemon.ran_s() - before) * 1000}


def page_times(daemon: Daemon, asked: dict[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, of the clock and of the daemon's CPU, and how many rows they brought."""
    where = urlsplit(daemon.admin)
    client = http.client.HTTPConnection(str(where.hostname), where.port, timeout=30)
    taken: dict[str, list[float]] = {name: [] for name in asked}
    cost: dict[str, list[float]] = {name: [] for name in asked}
    rows: dict[str, int] = {}
    for number in range(rounds + 1):
        for name in random.sample(list(asked), len(asked)):
            if name not in taken:
                continue
            before = daemon.ran_s()
            begun = time.perf_counter()
            client.request("GET", asked[name])
            answer = client.getresponse()
            body = answer.read()
            took = (time.perf_counter() - begun) * 1000
            if answer.status == 404 and name.startswith("page "):
                del taken[name]  # this hookd has no such page
                continue
            assert answer.status == 200, (name, answer.status, body[:500])
            said = json.loads(body) if asked[name].startswith("/api/") else {}
            if "data" in said:
                rows[name] = len(said["data"])
            if number:  # the first round warms
                taken[name].append(took)
                time.sleep(SETTLED_S)
                cost[name].append((daemon.ran_s() - before) * 1000)
    client.close()
    return {
        name: {
            "p50": percentile(t, 0.5),
            "p95": percentile(t, 0.95),
            "most": max(t),
            "cpu": statistics.median(cost[name]),
            "rows": rows.get(name, -1),
        }
        for name, t in taken.items()
    }


WARM_UP = 80_000
"""
Deliveries before the time counts: six seconds, in which the reader asks for each page once without a pause.

What a process does for its first pages only (sessions, statements) is no part of what they cost from then on.
"""

READER = """
import http.client, json, random, sys, time
host, port, paths, pause = json.loads(sys.stdin.readline())
client = http.client.HTTPConnection(host, port, timeout=30)
def status(path):
    client.request("GET", path)
    answer = client.getresponse()
    answer.read()
    return answer.status
for path in random.sample(paths, len(paths)):
    status(path)
read = 0
while True:
    time.sleep(pause)
    read += status(random.choice(paths)) == 200
    print(read, flush=True)
"""


async def per_second(
    stage: Stage, deliveries: int, asked: dict[str, str], pause: float | None
) -> tuple[float, int]:
    """The throughput of a backlog, and how many pages were read meanwhile; ``pause`` None: closed."""
    connection = await asyncpg.connect(stage.dsn)
    total = deliveries + WARM_UP
    await connection.execute(INSERT.replace("'tenant-'", "'live-'"), total, 20, 900)
    await connection.execute("vacuum hookd.delivery")
    await connection.execute("checkpoint")
    stage.stats()
    daemon = stage.daemon(HOOKD_DELIVERY__MAX_IN_FLIGHT="500")
    arrivals = Arrivals(stage)
    where = urlsplit(daemon.admin)
    reader = None
    if pause is not None:
        # on the cores of the others, as a browser elsewhere would be
        reader = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert reader.stdin is not None
        print(
            json.dumps([where.hostname, where.port, list(asked.values()), pause]),
            file=reader.stdin,
            flush=True,
        )
    try:
        while await arrivals.look() < WARM_UP:
            await asyncio.sleep(0.01)
        begun, count = time.monotonic(), arrivals.count
        while await arrivals.look() < total:
            await asyncio.sleep(0.02)
        settled = await stage.drained(connection)
    finally:
        read = 0
        if reader is not None:
            reader.kill()
            assert reader.stdout is not None
            read = len(reader.stdout.read().splitlines())
            reader.wait()
    daemon.stop()
    arrivals.close()
    await connection.close()
    return (total - count) / (settled - begun), read


async def restart(stage: Stage, settings: dict[str, str] | None) -> None:
    """Go on with PostgreSQL as it is with these settings; None: with its own."""
    connection = await asyncpg.connect(stage.dsn)
    if settings is None:
        await connection.execute("checkpoint")
        await connection.execute("alter system reset all")
    for name, value in (settings or {}).items():
        await connection.execute(f"alter system set {name} = '{value}'")
    await connection.close()
    stage.restart_server()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--attempts", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=30, help="of pages")
    parser.add_argument("--only", choices=("pages", "cost"))
    parser.add_argument("--deliveries", type=int, default=120_000, help="of one half of a pair")
    parser.add_argument("--pairs", type=int, default=5, help="closed and open")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two pages")
    parser.add_argument("--keep", metavar="FOLDER", help="leave the filled database there")
    parser.add_argument("--use", metavar="FOLDER", help="one that was kept")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage(folder=Path(given.use or given.keep) if given.use or given.keep else None)
    found: dict[str, Any] = {"attempts": given.attempts}
    try:
        if not given.use:
            asyncio.run(restart(stage, LOADING))
            asyncio.run(made(stage.dsn))
            live = [stage.host(n) for n in range(20)]
            hosts = [f"h{n}.bench.localhost:443" for n in range(ENDPOINTS)]
            asyncio.run(
                stage.add_endpoints(
                    hosts, "/hook", [f"tenant-{n % TENANTS}" for n in range(ENDPOINTS)], scheme="https"
                )
            )
            asyncio.run(stage.add_endpoints(live, "/hook", [f"live-{n}" for n in range(20)]))
            asyncio.run(fill(stage.dsn, given.attempts))
            asyncio.run(restart(stage, None))
        else:
            asyncio.run(move_live(stage))
        asked = asyncio.run(pages(stage.dsn))
        if given.only != "cost":
            daemon = stage.daemon()
            found["first"] = first_page(daemon)
            found["pages"] = page_times(daemon, asked, given.rounds)
            daemon.stop()
            if not given.json:
                print_pages(found["pages"])
                print(f"first page {found['first']['took']:.0f} ms, CPU {found['first']['cpu']:.1f} ms")
        if given.only != "pages":
            found["pairs"] = []
            for number in range(given.pairs):
                # each first as often as the other: the machine's pace drifts, and the log grows
                order = (None, given.pause) if number % 2 == 0 else (given.pause, None)
                got = {
                    pause: asyncio.run(per_second(stage, given.deliveries, asked, pause)) for pause in order
                }
                (closed, _), (opened, read) = got[None], got[given.pause]
                found["pairs"].append({"closed": closed, "open": opened, "pages": read})
                if not given.json:
                    print(
                        f"closed {closed:,.0f}/s   open {opened:,.0f}/s, {read} pages read   {opened / closed - 1:+.1%}"
                    )
            found["cost"] = 1 - statistics.median(p["open"] / p["closed"] for p in found["pairs"])
            if not given.json:
                print(f"an open console costs {found['cost']:.1%}   floor {COST_MOST:.0%}")
    finally:
        stage.close(keep=bool(given.keep or given.use))
    if given.json:
        print(json.dumps(found))
    slow = [p for p in found.get("pages", {}).values() if p["p95"] > PAGE_MOST_MS]
    sys.exit(1 if slow or found.get("cost", 0) >= COST_MOST else 0)


def print_pages(found: dict[str, dict[str, float]]) -> None:
    width = max(map(len, found))
    print(f"{'':{width}}  rows     p50     p95    most     CPU  ms")
    for name, f in found.items():
        rows = f"{f['rows']:.0f}" if f["rows"] >= 0 else ""
        slow = "  > 200" if f["p95"] > PAGE_MOST_MS else ""
        print(
            f"{name:{width}}  {rows:>4}  {f['p50']:6.1f}  {f['p95']:6.1f}  {f['most']:6.1f}  {f['cpu']:6.2f}{slow}"
        )
    print(
        f"CPU of a page, on average: {statistics.fmean(f['cpu'] for n, f in found.items() if n.startswith('page ')):.2f} ms\n"
        f"{len(found)} pages and routes, p95 of the slowest {max(f['p95'] for f in found.values()):.0f} ms   floor {PAGE_MOST_MS:.0f}"
    )


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
