"""The SQL surface, on real PostgreSQL: what a producer may rely on."""

from __future__ import annotations

import asyncio
import datetime
import json
import time
from typing import Any

import asyncpg
import pytest

from hookd.postgres import registry
from hookd.postgres.migrate import CREATE_RECORD, RECORD, SchemaMismatch, migrate, migrations, pending
from tests.cluster import cluster
from tests.conftest import run_sql
from tests.producing import add_endpoint, add_endpoint_with_id, fetch, send


def on(dsn: str, *statements: str) -> list[list[asyncpg.Record]]:
    """Run statements in one session, each in its own transaction."""

    async def go() -> list[list[asyncpg.Record]]:
        connection = await asyncpg.connect(dsn)
        try:
            return [await connection.fetch(statement) for statement in statements]
        finally:
            await connection.close()

    return asyncio.run(go())


def endpoints(dsn: str, *urls: str, **change: Any) -> None:
    for url in urls:
        asyncio.run(add_endpoint(dsn, url, **change))


# Migrations.


def test_migrate_twice_is_a_no_op(empty_dsn: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(empty_dsn)
        assert len(await pending(connection)) == len(migrations())
        assert await migrate(connection) == migrations()
        assert await migrate(connection) == []
        await connection.close()

    asyncio.run(go())


def test_what_was_registered_before_headers_could_be_sealed_keeps_their_names(empty_dsn: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(empty_dsn)
        await connection.execute(CREATE_RECORD)
        for migration in migrations()[:5]:
            await connection.execute(migration.sql)
            await connection.execute(RECORD, migration.version, migration.name, migration.checksum)
        await connection.execute(
            """with e as (insert into hookd.endpoint (url, host, shard) values ('http://a.example/', 'a.example:80', 0) returning key)
               insert into hookd.endpoint_secret (endpoint, purpose, value)
               select e.key, v.purpose, v.value from e,
                      (values ('signing', 'whsec_x'), ('headers', '{"x-b": "2", "x-a": "1"}')) as v (purpose, value)"""
        )
        assert min(m.version for m in await migrate(connection)) == 6
        (record,) = await registry.listing(connection)
        assert (record.header_names, record.key_type, record.public_keys) == (["x-a", "x-b"], "hmac", [])
        await connection.close()

    asyncio.run(go())


def test_several_that_migrate_at_once_do_it_once(empty_dsn: str) -> None:
    async def one() -> int:
        connection = await asyncpg.connect(empty_dsn)
        applied = await migrate(connection)
        await connection.close()
        return len(applied)

    async def go() -> list[int]:
        return list(await asyncio.gather(*(one() for _ in range(4))))

    assert sorted(asyncio.run(go())) == [0, 0, 0, len(migrations())]


def test_an_older_hookd_refuses_a_newer_schema(dsn: str) -> None:
    run_sql(dsn, "insert into hookd.migration (version, name, checksum) values (9999, 'later', 'x')")

    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        with pytest.raises(SchemaMismatch, match="newer than this hookd"):
            await migrate(connection)
        await connection.close()

    asyncio.run(go())


def test_times_beyond_what_an_id_can_say_are_the_nearest(dsn: str) -> None:
    """What was before 1970 came out above every id that there is."""
    ((row,),) = on(
        dsn,
        """select hookd.uuid7_floor('1900-01-01 00:00+00') = hookd.uuid7_floor('1970-01-01 00:00+00') as early,
                  hookd.uuid7_floor('-infinity') = hookd.uuid7_floor('1970-01-01 00:00+00') as earliest,
                  hookd.uuid7_floor('infinity') > hookd.uuid7() as latest,
                  hookd.uuid7_floor(null) is null as never""",
    )
    assert tuple(row) == (True, True, True, True)


RELEASED = {
    1: "f9e24656a500426de7a92f0d5433df5d079bb6038103682a253e99806777349a",
    2: "25bf881fa5c0257092fe58e26b596f7e43ad20dd7b1cb4d71f7ffcd1a0845a15",
    3: "66b88bfe329b52a6141ff78e6cf459b39eb8648f2a1c86232d61f0c734fffcd5",
    4: "be67ed68fa437815b8f11354414643dde782489caca27bca6741971598450d83",
    5: "712f363423880977558dc79f9b00603bb4a8e3636610f1aec14795dcc61977d7",
    6: "a96bd43b642ca5c6e2306d80e690e71ea9c54bd2a7d2306b22b74972ee6f4dfb",
    7: "8a4cdcf17a72fdb8da310fdb0fd7f84adf26030cdac7efd6ebfd90777b6849b5",
    8: "8bfecd86700818ae83b424c1f68a996e5b8511596b2c7ce11c566013f7b3e6ab",
    9: "cc72f8e5cdd589d7d0fcfa07c82a4fb8f7199bc7916df1d6b01bf66ace3c4592",
    10: "9c6355f9902c5261926854c7c60750e6408cc8ce5dc092e4fbfa7c3e7f819d48",
    11: "e527fb90d4bdc47a3bf947750cbbc672cbeccc46cf8ddec2a3c78bc7fac6f76d",
    12: "a348a045b4fb3aa432df362ad906239367c4767683f8290a4fc8cb03fe06627a",
}
"""Of those that databases in use have recorded: one that is edited is refused there, and nothing is delivered any more."""


def test_released_migrations_are_as_they_were() -> None:
    ours = {m.version: m.checksum for m in migrations()}
    assert {version: ours.get(version) for version in RELEASED} == RELEASED


def test_a_migration_that_was_edited_is_refused(dsn: str) -> None:
    run_sql(dsn, "update hookd.migration set checksum = 'other' where version = 1")

    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        with pytest.raises(SchemaMismatch, match="differs"):
            await migrate(connection)
        await connection.close()

    asyncio.run(go())


def test_everything_has_a_comment(dsn: str) -> None:
    (missing,) = on(
        dsn,
        """select c.relname::text as name from pg_class c
            where c.relnamespace = 'hookd'::regnamespace and c.relkind in ('r', 'p', 'v') and not c.relispartition
              and obj_description(c.oid, 'pg_class') is null""",
    )
    assert [r["name"] for r in missing] == []


def test_no_superuser_is_needed(server_dsn: str, empty_dsn: str) -> None:
    from urllib.parse import urlsplit

    name = urlsplit(empty_dsn).path.lstrip("/")
    role = f"owner_{name}"
    run_sql(
        empty_dsn,
        f"create role {role} login password 'x' createrole",
        f'grant create on database "{name}" to {role}',
    )

    async def go() -> None:
        connection = await asyncpg.connect(empty_dsn, user=role, password="x")
        await migrate(connection)
        assert await connection.fetchval("select hookd.send('a.b', '{}'::text)")
        await connection.close()

    asyncio.run(go())
    run_sql(empty_dsn, f"drop owned by {role} cascade", f"drop role {role}")


# Sending.


def test_the_bytes_of_a_payload_are_kept(dsn: str) -> None:
    odd = '{ "b":1.000,\n"a": 12345678901234567890123, "b": 2}'
    event = asyncio.run(send(dsn, payload=odd))
    (rows,) = on(dsn, f"select payload from hookd.event where id = '{event}'")
    assert rows[0]["payload"] == odd


@pytest.mark.parametrize(
    ("call", "stored"),
    [
        ("""hookd.send('a', '{"x": 1}')""", '{"x": 1}'),
        ("""hookd.send('a', '{"x":  1}'::json)""", '{"x":  1}'),
        ("""hookd.send('a', '{"x":  1}'::jsonb)""", '{"x": 1}'),
        ("hookd.send('a', json_build_object('x', 1))", '{"x" : 1}'),
        ("hookd.send('a', 'null')", "null"),
    ],
)
def test_all_overloads(dsn: str, call: str, stored: str) -> None:
    (rows, events) = on(dsn, f"select {call} as id", "select id, payload from hookd.event")
    assert events[0]["id"] == rows[0]["id"]
    assert events[0]["payload"] == stored


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("select hookd.send('a', 'hello')", "payload of an event must be JSON"),
        ("select hookd.send('a', null::text)", "must not be NULL"),
        ("insert into hookd.event (type, payload) values ('a', '{')", "payload of an event must be JSON"),
        ("select hookd.send('has blank', '{}')", "1 to 255 characters, none of them a blank or"),
        ("select hookd.send('', '{}')", "1 to 255 characters"),
        ("select hookd.send('user.*', '{}')", "none of them a blank or"),
        ("select hookd.send(E'a\\nb', '{}')", "none of them a blank or"),
        ("select hookd.send(repeat('ä', 256), '{}')", "1 to 255 characters"),
        ("select hookd.send('a', '{}', tenant => '')", "tenant of an event has 1 to 255"),
        ("select hookd.send('a', '{}', order_key => repeat('k', 1025))", "at most 1024 characters"),
        ("select hookd.send('a', '{\"x\": \"\\u00zz\"}')", "payload of an event must be JSON"),
        ("select hookd.send('a', '{}', deliver_at => now() + interval '90 days')", "deliver_at is later"),
        ("select hookd.send('a', '{}', headers => '[1]')", "headers of an event are a JSON object"),
    ],
)
def test_bad_events_are_refused_with_their_own_message(dsn: str, statement: str, message: str) -> None:
    with pytest.raises(asyncpg.PostgresError, match=message):
        on(dsn, statement)


def test_idempotency(dsn: str) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/")
    first, again, other = on(
        dsn,
        "select hookd.send('a', '{}', idempotency_key => 'k') as id",
        "select hookd.send('a', '{\"other\": 1}', idempotency_key => 'k') as id",
        "select hookd.send('a', '{}', tenant => 'other', idempotency_key => 'k') as id",
    )
    assert first[0]["id"] == again[0]["id"] != other[0]["id"]
    (count,) = on(dsn, "select count(*) from hookd.delivery")
    assert count[0]["count"] == 1
    (bulk,) = on(
        dsn,
        """insert into hookd.event (type, payload, idempotency_key)
           select 'a', '{}', 'k' || n % 3 from generate_series(1, 9) n returning id""",
    )
    assert len(bulk) == 3


def test_idempotency_under_concurrency(dsn: str) -> None:
    async def go() -> set[str]:
        return set(await asyncio.gather(*(send(dsn, idempotency_key="same") for _ in range(20))))

    assert len(asyncio.run(go())) == 1


@pytest.mark.parametrize(
    ("patterns", "type_", "matches"),
    [
        (["user.created"], "user.created", True),
        (["user.created"], "user.created.twice", False),
        (["user.*"], "user.created", True),
        (["user.*"], "user.created.twice", True),
        (["user.*"], "user", False),
        (["user.*"], "users.created", False),
        (["*"], "anything", True),
        (["a", "user.*"], "user.x", True),
        (["a"], "A", False),
    ],
)
def test_type_patterns(dsn: str, patterns: list[str], type_: str, matches: bool) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/", types=patterns)
    asyncio.run(send(dsn, type_))
    (rows,) = on(dsn, "select count(*) from hookd.delivery")
    assert rows[0]["count"] == matches


@pytest.mark.parametrize("type_", ["a", "a.b", "a.b.c", "a.b.c.d", "a.", "ä.ö", "a-b.c_d"])
def test_one_event_is_matched_as_many_are(dsn: str, type_: str) -> None:
    """One event goes a way of its own through the fan-out."""
    (rows,) = on(dsn, f"select unnest(hookd.type_patterns('{type_}')) as pattern")
    patterns = [row["pattern"] for row in rows]
    assert patterns[:2] == ["*", type_]
    assert patterns[2:] == [type_[: n + 1] + "*" for n, letter in enumerate(type_) if letter == "."]
    for n, pattern in enumerate([*patterns, "b", "b.*"]):
        endpoints(dsn, f"http://127.0.0.1:{9001 + n}/", types=[pattern])
    asyncio.run(send(dsn, type_))
    (one,) = on(dsn, "select endpoint from hookd.delivery order by endpoint")
    assert len(one) == len(patterns)
    on(dsn, f"insert into hookd.event (type, payload) select '{type_}', '1' from generate_series(1, 2)")
    (all_,) = on(dsn, "select endpoint from hookd.delivery order by id")
    assert [r["endpoint"] for r in all_] == 3 * [r["endpoint"] for r in one]


def test_tenants_do_not_see_each_other(dsn: str) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/", tenant="acme")
    asyncio.run(send(dsn, tenant="other"))
    asyncio.run(send(dsn))
    (rows,) = on(dsn, "select count(*) from hookd.delivery")
    assert rows[0]["count"] == 0


@pytest.mark.parametrize(
    ("path", "payload", "matches"),
    [
        ("$.amount ? (@ > 100)", '{"amount": 200}', True),
        ("$.amount ? (@ > 100)", '{"amount": 20}', False),
        ("$.amount ? (@ > 100)", '{"amount": "much"}', False),
        ("$.amount > 100", '{"amount": 200}', True),
        ("$.amount > 100", '{"amount": 20}', False),
        ('$.kind == "a"', "[]", False),
        ("strict $.a.b", '{"a": 1}', False),
        ("$.a", '{"a": "\\u0000"}', False),
        ("$.a", '{"a": 1e999999}', False),
    ],
)
def test_filters_never_fail_the_producer(dsn: str, path: str, payload: str, matches: bool) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/", filter=path)
    asyncio.run(send(dsn, payload=payload))
    (rows,) = on(dsn, "select count(*) from hookd.delivery")
    assert rows[0]["count"] == matches


def test_paused_gets_rows_disabled_gets_none(dsn: str) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/", "http://127.0.0.1:9002/", "http://127.0.0.1:9003/")
    run_sql(
        dsn,
        "update hookd.endpoint set state = 'paused' where url like '%9001%'",
        "update hookd.endpoint set state = 'disabled' where url like '%9002%'",
        "update hookd.endpoint set state = 'removed' where url like '%9003%'",
    )
    asyncio.run(send(dsn))
    (rows,) = on(dsn, "select url, d.state from hookd.delivery_status d")
    assert [(r["url"], r["state"]) for r in rows] == [("http://127.0.0.1:9001/", "pending")]


def test_deliver_at_is_a_due_time(dsn: str) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/")
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    asyncio.run(send(dsn, deliver_at=at))
    asyncio.run(send(dsn, deliver_at=at - datetime.timedelta(hours=2)))
    (rows,) = on(dsn, "select due_at from hookd.delivery order by id")
    assert [r["due_at"] for r in rows] == [at, None]


def test_a_fan_out_to_10_000_endpoints(dsn: str) -> None:
    run_sql(
        dsn,
        """insert into hookd.endpoint (tenant, url, host, types, shard)
           select 'default', 'http://h' || n || '.example.com/', 'h' || n || '.example.com:80', '{*}', 0
             from generate_series(1, 10000) n""",
    )
    asyncio.run(send(dsn))
    (rows, shards) = on(
        dsn,
        "select count(*) from hookd.delivery",
        "select count(distinct shard) from hookd.delivery",
    )
    assert rows[0]["count"] == 10_000
    assert shards[0]["count"] == 64


def test_a_million_events_in_one_statement(dsn: str) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/", types=["rare"])
    begun = time.monotonic()
    run_sql(
        dsn,
        """insert into hookd.event (type, payload)
           select case when n % 1000 = 0 then 'rare' else 'common' end, '{}' from generate_series(1, 1000000) n""",
    )
    assert time.monotonic() - begun < 150
    (rows,) = on(dsn, "select count(*) from hookd.delivery")
    assert rows[0]["count"] == 1000


def test_the_order_of_insertion_is_the_order_of_ids(dsn: str) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/")
    run_sql(
        dsn, "insert into hookd.event (type, payload) select 'a', n::text from generate_series(1, 5000) n"
    )
    (rows,) = on(
        dsn,
        "select v.payload::integer as n from hookd.delivery d join hookd.event v on v.id = d.event_id order by d.id",
    )
    assert [r["n"] for r in rows] == list(range(1, 5001))


def test_rolled_back_with_the_callers_transaction(dsn: str) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/")
    run_sql(dsn, "begin", "select hookd.send('a', '{}')", "rollback")
    (rows, events) = on(dsn, "select count(*) from hookd.delivery", "select count(*) from hookd.event")
    assert rows[0]["count"] == events[0]["count"] == 0


# NOTIFY.


@pytest.mark.parametrize("asleep", [True, False])
def test_only_a_sleeper_is_notified(dsn: str, asleep: bool) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/")
    run_sql(dsn, f"select setval(sleeper, {2 if asleep else 1}) from hookd.shard")

    async def go() -> int:
        told: list[str] = []
        listener = await asyncpg.connect(dsn)
        await listener.add_listener("hookd", lambda *args: told.append(args[3]))
        await send(dsn)
        await send(dsn)
        # notifications of earlier commits come before a later one's
        async with asyncio.timeout(10):
            while "end" not in told:
                await listener.execute("select pg_notify('hookd', 'end')")
                await asyncio.sleep(0)
        await listener.close()
        return told.count("")

    assert asyncio.run(go()) == (2 if asleep else 0)


def test_who_prepares_transactions_asks_for_no_notification() -> None:
    """PREPARE TRANSACTION is refused after a NOTIFY: it depended on whether a daemon was asleep."""

    async def go(dsn: str) -> None:
        await add_endpoint(dsn, "http://127.0.0.1:9001/")
        connection = await asyncpg.connect(dsn)
        await connection.execute("select setval(sleeper, 2) from hookd.shard")
        await connection.execute("set role hookd_producer")
        many = "insert into hookd.event (type, payload) values ('a', '1'), ('a', '2')"
        for statement in ("select hookd.send('a', '{}'::text)", many):
            await connection.execute("begin")
            await connection.execute(statement)
            with pytest.raises(asyncpg.FeatureNotSupportedError):
                await connection.execute("prepare transaction 'one'")
            await connection.execute("begin")
            await connection.execute("set local hookd.notify = 'off'")
            await connection.execute(statement)
            await connection.execute("prepare transaction 'one'")
            await connection.execute("commit prepared 'one'")
        await connection.execute("reset role")
        assert await connection.fetchval("select count(*) from hookd.delivery") == 3
        # the setting was local: others are told as before
        await connection.execute("begin; select hookd.send('a', '{}'::text)")
        with pytest.raises(asyncpg.FeatureNotSupportedError):
            await connection.execute("prepare transaction 'one'")
        await connection.close()

    with cluster(max_prepared_transactions="5") as server:
        asyncio.run(go(server.create("prepared")))


# Roles.


def as_role(dsn: str, role: str, *statements: str) -> list[list[asyncpg.Record]]:
    return on(dsn, f"set role {role}", *statements)[1:]


def test_a_producer_may_send_and_sees_no_secret(dsn: str) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/", headers={"authorization": "Bearer secret"}, filter="$.a")
    sent, inserted, found = as_role(
        dsn,
        "hookd_producer",
        "select hookd.send('a', '{\"a\": 1}', idempotency_key => 'x', order_key => 'k') as id",
        "insert into hookd.event (type, payload) values ('a', '{\"a\": 2}') returning id",
        "select id from hookd.event",
    )
    assert {r["id"] for r in sent + inserted} == {r["id"] for r in found}
    (rows,) = on(dsn, "select count(*) from hookd.delivery")
    assert rows[0]["count"] == 2
    for forbidden in (
        "select * from hookd.endpoint_secret",
        "select * from hookd.thin_key",
        "select payload from hookd.event",
        "select * from hookd.endpoint",
        "select * from hookd.delivery",
        "delete from hookd.event",
        "update hookd.endpoint set url = 'x'",
        "select hookd.drop_partition('event', now())",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            as_role(dsn, "hookd_producer", forbidden)


def test_a_reader_reads_and_sees_no_secret(dsn: str) -> None:
    endpoints(dsn, "http://127.0.0.1:9001/")
    asyncio.run(send(dsn))
    as_role(
        dsn,
        "hookd_reader",
        "select * from hookd.event",
        "select * from hookd.endpoint",
        "select * from hookd.delivery",
        "select * from hookd.attempt",
        "select * from hookd.dead_letter",
        "select * from hookd.delivery_status",
    )
    for forbidden in (
        "select * from hookd.endpoint_secret",
        "select * from hookd.thin_key",
        "delete from hookd.event",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            as_role(dsn, "hookd_reader", forbidden)


def test_functions_that_run_as_their_owner_do_not_trust_the_callers_path(dsn: str) -> None:
    (rows,) = on(
        dsn,
        """select p.oid::regprocedure::text as name from pg_proc p
            where p.pronamespace = 'hookd'::regnamespace and p.prosecdef
              and not exists (select from unnest(p.proconfig) c where c like 'search_path=pg_catalog%')""",
    )
    assert rows == []


# Partitions.


def test_partitions_of_days_to_come(dsn: str) -> None:
    for parent in ("event", "attempt"):
        (rows,) = on(
            dsn, f"select name, before_day from hookd.partition where parent = '{parent}' order by name"
        )
        assert len(rows) == 4
        assert rows[-1]["before_day"] is None


def test_add_and_drop(dsn: str) -> None:
    asyncio.run(send(dsn))
    made, none, dropped, kept = on(
        dsn,
        "select hookd.add_partition('event', 5) as name",
        "select hookd.add_partition('event', 5) as name",
        "select hookd.drop_partition('event', now() + interval '1 day') as name",
        "select count(*) from hookd.event",
    )
    assert made[0]["name"]
    assert none[0]["name"] is None
    assert dropped[0]["name"]
    assert kept[0]["count"] == 1


def test_a_reader_does_not_let_upkeep_block_producers(dsn: str) -> None:
    async def go() -> None:
        reader, upkeep = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        await reader.execute("begin")
        await reader.fetch("select * from hookd.event")
        begun = time.monotonic()
        with pytest.raises(asyncpg.LockNotAvailableError):
            await upkeep.fetchval("select hookd.add_partition('event', 9)")
        assert time.monotonic() - begun < 5
        await send(dsn)
        await reader.execute("rollback")
        assert await upkeep.fetchval("select hookd.add_partition('event', 9)")
        await reader.close()
        await upkeep.close()

    asyncio.run(go())


def where_they_are(dsn: str, table: str) -> dict[str, str]:
    """The partition of each row; by a column that says which it is."""
    name = "payload" if table == "event" else "answer_body"
    (rows,) = on(
        dsn,
        f"select t.{name} as name, c.relname::text as day from hookd.{table} t join pg_class c on c.oid = t.tableoid",
    )
    return {row["name"]: row["day"] for row in rows}


def day(table: str, ahead: int) -> str:
    on_that = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=ahead)
    return f"{table}_{on_that:%Y%m%d}"


AT = "(((now() at time zone 'utc')::date + {})::timestamp at time zone 'utc')"
"""Midnight, so many days from now."""

STRAYS = {
    "event": f"""
insert into hookd.event (id, type, payload, headers)
select hookd.uuid7_floor({AT.format(0)} + at), 'a', name, '{{"x": "1"}}'
  from (values (interval '1 day', '"near"'), ('4 days 23 hours 59 minutes', '"last"'), ('5 days', '"first"'),
               ('40 days', '"far"')) as v (at, name)
""",
    "attempt": f"""
insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, status, verdict, answer_body, answer_truncated, tls_ms)
select {AT.format(0)} + at, 7, hookd.uuid7(), 1, 1, 200, 'delivered', name, true, 1.5
  from (values (interval '1 day', '"near"'), ('4 days 23 hours 59 minutes', '"last"'), ('5 days', '"first"'),
               ('40 days', '"far"')) as v (at, name)
""",
}


@pytest.mark.parametrize("table", STRAYS)
def test_what_lies_beyond_a_cut_goes_along(dsn: str, table: str) -> None:
    """Ids that somebody made himself, or a clock that was ahead: no day was ever cut off again."""
    endpoints(dsn, "http://127.0.0.1:9001/")
    run_sql(dsn, STRAYS[table])
    everything = (
        f"select * from hookd.{table} order by 1",
        "select id, event_id, xid::text as xid from hookd.delivery order by id",
    )
    before = on(dsn, *everything)
    assert where_they_are(dsn, table) == {
        '"near"': day(table, 1),
        **dict.fromkeys(('"last"', '"first"', '"far"'), day(table, 2)),
    }
    cut, *after = on(dsn, f"select hookd.add_partition('{table}', 5) as name", *everything)
    assert cut[0]["name"] == day(table, 5)
    assert after == before, "and nothing was fanned out again"
    assert where_they_are(dsn, table) == {
        '"near"': day(table, 1),
        '"last"': day(table, 2),
        **dict.fromkeys(('"first"', '"far"'), day(table, 5)),
    }
    again, none = on(dsn, *[f"select hookd.add_partition('{table}', 6) as name"] * 2)
    assert again[0]["name"] == day(table, 6)
    assert none[0]["name"] is None
    assert where_they_are(dsn, table)['"far"'] == day(table, 6)
    assert on(dsn, *everything) == before
    # both take what comes
    on(dsn, STRAYS[table].replace(AT.format(0), AT.format(0) + " + interval '1 second'"))
    (counted,) = on(
        dsn,
        f"""select c.relname::text as day, count(*)
              from hookd.{table} t join pg_class c on c.oid = t.tableoid group by c.relname""",
    )
    assert {r["day"]: r["count"] for r in counted} == {day(table, n): 2 for n in (1, 2, 5, 6)}


def test_a_day_is_cut_off_where_everything_is_published(dsn: str) -> None:
    """A DELETE in a table without a key is refused there."""
    run_sql(dsn, "create publication everything for all tables")
    (cut,) = on(dsn, "select hookd.add_partition('attempt', 5) as name")
    assert cut[0]["name"] == day("attempt", 5)


def test_two_that_cut_at_once_cut_once(dsn: str) -> None:
    """The second one failed: there was the table already."""

    async def go() -> None:
        first, second = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        add = "select hookd.add_partition($1, $2)"
        drop = "select hookd.drop_partition('event', now() + interval '1 day')"
        await first.execute("begin")
        assert await first.fetchval(add, "event", 5)
        assert await second.fetchval(add, "event", 5) is None
        assert await second.fetchval(drop) is None
        await first.execute("commit")
        assert await second.fetchval(add, "event", 5) is None
        assert await second.fetchval(add, "event", 6)
        await first.execute("begin")
        assert await first.fetchval(drop)
        assert await second.fetchval(drop) is None
        await first.execute("commit")
        await first.close()
        await second.close()

    asyncio.run(go())


# Thin events.


def test_check_thin_agrees_with_what_hookd_signs(dsn: str) -> None:
    from urllib.parse import parse_qs, urlsplit

    from hookd.core.bodies import ThinLink

    async def go() -> list[bool]:
        connection = await asyncpg.connect(dsn)
        key = await connection.fetchval("select key from hookd.thin_key")
        event = await send(dsn)
        now = time.time()
        link = ThinLink("https://api.example.com/events/{event_id}", key, 60)
        answers = []
        for url in (link.url(event, now), link.url(event, now - 120)):
            query = parse_qs(urlsplit(url).query)
            expires, signature = int(query["expires"][0]), query["signature"][0]
            for tried in (signature, signature[:-1] + ("0" if signature[-1] != "0" else "1"), "x", ""):
                ok = await connection.fetchval("select hookd.check_thin($1, $2, $3)", event, expires, tried)
                answers.append(ok)
        await connection.close()
        return answers

    assert asyncio.run(go()) == [True, False, False, False] + [False] * 4


def test_delivery_status_has_the_newest(dsn: str) -> None:
    async def go() -> None:
        _, endpoint = await add_endpoint_with_id(dsn, "http://127.0.0.1:9001/")
        event = await send(dsn, payload=json.dumps({"a": 1}))
        await fetch(
            dsn,
            """insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, verdict, status)
               select now(), d.id, d.event_id, d.endpoint, 1, 'exhausted', 500 from hookd.delivery d""",
        )
        await fetch(dsn, "delete from hookd.delivery")
        (row,) = await fetch(dsn, "select * from hookd.delivery_status where event_id = $1", event)
        assert (row["state"], row["endpoint_id"], row["last_status"]) == ("exhausted", endpoint, 500)
        await fetch(
            dsn,
            """insert into hookd.delivery (shard, endpoint, event_id, replay)
               select shard, key, $1, true from hookd.endpoint""",
            event,
        )
        (row,) = await fetch(dsn, "select * from hookd.delivery_status where event_id = $1", event)
        assert (row["state"], row["replay"]) == ("pending", True)

    asyncio.run(go())
