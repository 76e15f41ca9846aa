"""Upkeep: what PostgreSQL refuses of it is said and left for later, and what a tenure needs ends it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg
import pytest

from hookd.core.database import DatabaseHealth
from hookd.postgres import maintenance as module
from hookd.postgres.connect import DatabaseUnavailable
from hookd.postgres.maintenance import Maintenance, Refusals
from tests.producing import add_endpoint_with_id, fetch, send

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

DAY_S = 86400.0

# Once more as it is after an outage: the newest partition is open since a day that is less than two ahead.
REOPEN = """
do $$
declare
  newest text;
  before text;
  day date;
begin
  select name into newest from hookd.partition where parent = 'event' and before_day is null;
  select name, first_day into before, day from hookd.partition
   where parent = 'event' and before_day is not null order by first_day desc limit 1;
  execute format('drop table hookd.%I', newest);
  execute format('alter table hookd.event detach partition hookd.%I', before);
  execute format('alter table hookd.event attach partition hookd.%I for values from (%s) to (maxvalue)',
    before, hookd.partition_bound('event', day::timestamp at time zone 'utc'));
end
$$
"""

# One that takes its time.
SLOW_CUT = """
create or replace function hookd.add_partition(parent text, ahead integer default 2) returns text
language plpgsql as $$ begin perform pg_sleep(30); return 'late'; end $$
"""


class Upkeep:
    """A session, what was said of it, and a clock that is set."""

    def __init__(self, dsn: str, connection: asyncpg.Connection) -> None:
        self.dsn = dsn
        self.connection = connection
        self.now = 0.0
        self.said: list[tuple[str, str]] = []
        self.refusals = Refusals(lambda: self.now, lambda work, problem: self.said.append((work, problem)))
        self.maintenance = Maintenance(connection, self.refusals)

    async def purge(self) -> int:
        return await self.maintenance.purge(
            dead_letters_s=30 * DAY_S, events_s=30 * DAY_S, attempts_s=30 * DAY_S
        )

    async def examine(self) -> DatabaseHealth | str:
        return await self.maintenance.examine(
            events_s=30 * DAY_S, attempts_s=30 * DAY_S, dead_letters_s=30 * DAY_S
        )

    async def assert_alive(self) -> None:
        """The session is as good as before."""
        assert await self.maintenance.depth() is not None
        await self.maintenance.echo("still here")


def run(dsn: str, work: Callable[[Upkeep], Awaitable[None]]) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        upkeep = Upkeep(dsn, connection)
        try:
            await upkeep.maintenance.prepare()
            await work(upkeep)
        finally:
            connection.terminate()

    asyncio.run(go())


# Refused.


def test_a_purge_that_is_refused_keeps_no_other_from_its_work(dsn: str) -> None:
    async def work(upkeep: Upkeep) -> None:
        _, gone = await add_endpoint_with_id(dsn, "http://127.0.0.1:9001/gone")
        for statement in (
            f"update hookd.endpoint set state = 'removed' where id = '{gone}'",
            "update hookd.endpoint set state_at = now() - interval '40 days'",
            "create table public.subscription (endpoint integer references hookd.endpoint (key))",
            "insert into public.subscription select key from hookd.endpoint",
            "insert into hookd.idempotency values ('default', 'old', hookd.uuid7(), now() - interval '40 days')",
            "insert into hookd.audit (at, via, who, action) values (now() - interval '500 days', 'cli', 'me', 'pause')",
        ):
            await fetch(dsn, statement)
        assert await upkeep.purge() == 2
        ((what, problem),) = upkeep.said
        assert what == "purge endpoint"
        assert "subscription_endpoint_fkey" in problem
        assert await fetch(dsn, "select from hookd.idempotency") == []
        assert await fetch(dsn, "select from hookd.audit") == []
        await upkeep.assert_alive()
        await fetch(dsn, "drop table public.subscription")
        assert await upkeep.purge() == 1

    run(dsn, work)


def test_a_day_that_something_depends_on_is_not_dropped(dsn: str) -> None:
    async def work(upkeep: Upkeep) -> None:
        (oldest, *_) = await fetch(
            dsn, "select name from hookd.partition where parent = 'attempt' order by name"
        )
        await fetch(dsn, f"create view public.looking as select * from hookd.{oldest['name']}")
        assert await upkeep.maintenance.drop_partition("attempt", -DAY_S) is None
        ((what, problem),) = upkeep.said
        assert what == "drop attempt"
        assert oldest["name"] in problem
        await upkeep.assert_alive()
        await fetch(dsn, "drop view public.looking")
        assert await upkeep.maintenance.drop_partition("attempt", -DAY_S) == oldest["name"]

    run(dsn, work)


def test_a_day_that_cannot_be_cut_off_is_left_for_an_hour(dsn: str) -> None:
    """A try takes the table from producers; a session that is lost in between changes nothing about that."""

    async def work(upkeep: Upkeep) -> None:
        await fetch(dsn, REOPEN)
        name = await upkeep.connection.fetchval(
            "select hookd.partition_name('event', (now() at time zone 'utc')::date + 2)"
        )
        await fetch(dsn, f"create table hookd.{name} ()")
        assert await upkeep.maintenance.add_partition("event") is None
        ((what, problem),) = upkeep.said
        assert what == "cut event"
        assert name in problem
        await upkeep.assert_alive()
        await send(dsn)
        await fetch(dsn, f"drop table hookd.{name}")
        upkeep.now = 3599.0
        assert await Maintenance(upkeep.connection, upkeep.refusals).add_partition("event") is None
        upkeep.now = 3601.0
        assert await upkeep.maintenance.add_partition("event") == name
        assert len(upkeep.said) == 1

    run(dsn, work)


def test_a_day_that_takes_long_to_cut_off_is_left_to_people(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CUT_TIMEOUT_S", 0.2)

    async def work(upkeep: Upkeep) -> None:
        await fetch(dsn, SLOW_CUT)
        assert await upkeep.maintenance.add_partition("event") is None
        ((what, problem),) = upkeep.said
        assert what == "cut event"
        assert "select hookd.add_partition('event')" in problem
        await upkeep.assert_alive()
        upkeep.now = 3599.0
        assert await upkeep.maintenance.add_partition("event") is None
        assert len(upkeep.said) == 1, "it was not tried"
        upkeep.now = 3601.0
        assert await upkeep.maintenance.add_partition("event") is None
        assert len(upkeep.said) == 2
        await upkeep.assert_alive()
        assert (
            await fetch(
                dsn,
                "select query from pg_stat_activity where datname = current_database() and query ~ 'add_partition' and state = 'active'"
                " and pid <> pg_backend_pid()",
            )
            == []
        ), "it was broken off at the server, too"

    run(dsn, work)


@pytest.mark.parametrize("what", ["cut", "drop"])
def test_two_that_do_the_same_at_once_say_nothing(dsn: str, what: str) -> None:
    async def work(upkeep: Upkeep) -> None:
        await fetch(dsn, REOPEN)
        other = await asyncpg.connect(dsn)
        await other.execute("begin")
        if what == "cut":
            assert await other.fetchval("select hookd.add_partition('event')")
            assert await upkeep.maintenance.add_partition("event") is None
        else:
            assert await other.fetchval("select hookd.drop_partition('event', now())")
            assert await upkeep.maintenance.drop_partition("event", 0.0) is None
        await other.execute("commit")
        await other.close()
        assert upkeep.said == []
        await upkeep.assert_alive()

    run(dsn, work)


def test_a_statement_that_somebody_cancels_is_no_lost_session(dsn: str) -> None:
    async def work(upkeep: Upkeep) -> None:
        await fetch(dsn, SLOW_CUT)
        cutting = asyncio.create_task(upkeep.maintenance.add_partition("event"))
        async with asyncio.timeout(20):
            while not await fetch(
                dsn,
                "select pg_cancel_backend(pid) from pg_stat_activity where pid = $1 and wait_event = 'PgSleep'",
                upkeep.connection.get_server_pid(),
            ):
                await asyncio.sleep(0.01)
        assert await cutting is None
        assert [what for what, _ in upkeep.said] == ["cut event"]
        await upkeep.assert_alive()

    run(dsn, work)


# Retention, in slices.


def test_figures_and_the_trail_are_purged_in_slices(dsn: str) -> None:
    async def work(upkeep: Upkeep) -> None:
        for statement in (
            """
            insert into hookd.tally
            select 900, now() - interval '60 days' - make_interval(mins => n), 'me', 0, 0, 0, 0, '{}'
              from generate_series(1, 5500) n
            """,
            """
            insert into hookd.tally
            select 60, now() - interval '3 days' - make_interval(mins => n), 'me', 0, 0, 0, 0, '{}'
              from generate_series(1, 500) n
            """,
            """
            insert into hookd.tally
            values (60, now(), 'me', 0, 0, 0, 0, '{}'), (900, now() - interval '9 days', 'me', 0, 0, 0, 0, '{}')
            """,
            """
            insert into hookd.endpoint_hour
            select now() - interval '60 days', n, 0, 0, 0, 0 from generate_series(1, 6000) n
            """,
            "insert into hookd.endpoint_hour values (now(), 1, 0, 0, 0, 0)",
            """
            insert into hookd.audit (at, via, who, action)
            select now() - interval '500 days', 'cli', 'me', 'pause' from generate_series(1, 6000)
            """,
            "insert into hookd.audit (via, who, action) values ('cli', 'me', 'pause')",
        ):
            await fetch(dsn, statement)
        assert [await upkeep.purge() for _ in range(3)] == [15000, 3000, 0]
        for table, left in (("tally", 2), ("endpoint_hour", 1), ("audit", 1)):
            (row,) = await fetch(dsn, f"select count(*) from hookd.{table}")
            assert row["count"] == left, table
        assert upkeep.said == []

    run(dsn, work)


# Looking.


def test_health_that_cannot_be_seen_is_no_lost_session(dsn: str) -> None:
    async def work(upkeep: Upkeep) -> None:
        assert isinstance(await upkeep.examine(), DatabaseHealth)
        blocker = await asyncpg.connect(dsn)
        await blocker.execute("begin; lock table hookd.dead_letter in access exclusive mode")
        found = await upkeep.examine()
        assert isinstance(found, str)
        assert "locked" in found
        await blocker.execute("rollback")
        await blocker.close()
        await fetch(dsn, "alter view hookd.partition rename to away")
        found = await upkeep.examine()
        assert isinstance(found, str)
        assert "hookd.partition" in found
        await upkeep.assert_alive()

    run(dsn, work)


# What a tenure needs.


def needed() -> Iterator[tuple[str, str, Callable[[Upkeep], Awaitable[object]]]]:
    yield "alter function hookd.tell(text) rename to told", "tell", lambda u: u.maintenance.echo("x")
    yield "alter table hookd.setting rename to away", "setting", lambda u: u.maintenance.set({"a": "b"})
    yield "alter table hookd.thin_key rename to away", "thin_key", lambda u: u.maintenance.thin_key()
    yield "alter table hookd.node rename to away", "node", lambda u: u.maintenance.withdraw("me")


@pytest.mark.parametrize(
    ("break_it", "named", "ask"), list(needed()), ids=["echo", "set", "thin_key", "withdraw"]
)
def test_what_a_tenure_needs_ends_it(
    dsn: str, break_it: str, named: str, ask: Callable[[Upkeep], Awaitable[object]]
) -> None:
    async def work(upkeep: Upkeep) -> None:
        await fetch(dsn, break_it)
        with pytest.raises(DatabaseUnavailable, match=named):
            await ask(upkeep)
        assert upkeep.said == []

    run(dsn, work)


def test_a_session_that_is_lost_is_lost(dsn: str) -> None:
    async def work(upkeep: Upkeep) -> None:
        await fetch(dsn, "select pg_terminate_backend($1)", upkeep.connection.get_server_pid())
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable):
                await upkeep.purge()
        assert upkeep.said == []

    run(dsn, work)
