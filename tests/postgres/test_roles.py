"""Who may do what: the roles against every way to a secret and to the schema."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest
from psycopg.conninfo import conninfo_to_dict

from hookd.postgres import registry
from tests.cli import Cli
from tests.conftest import run_sql
from tests.producing import add_endpoint, fetch, send, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.daemon_process import DaemonProcess

SECRETS = (
    "select value from hookd.endpoint_secret",
    "select * from hookd.endpoint_secret",
    "select s::text from hookd.endpoint_secret s",
    "copy hookd.endpoint_secret to stdout",
    "select key from hookd.thin_key",
    "select hookd.hmac_sha256('', key) from hookd.thin_key",
    "create table stolen as table hookd.endpoint_secret",
    "insert into hookd.endpoint_secret (endpoint, purpose, value) values (1, 'signing', 'whsec_mine')",
    "update hookd.endpoint_secret set value = 'whsec_mine'",
    "update hookd.endpoint_secret set expires_at = null where value like 'whsec_A%'",
    "delete from hookd.endpoint_secret",
)

SCHEMA = (
    "create table hookd.mine (a integer)",
    "create function hookd.mine() returns void language sql as ''",
    "alter table hookd.endpoint add column mine text",
    "alter table hookd.delivery disable trigger all",
    "alter function hookd.fan_out() security invoker",
    "create trigger mine after insert on hookd.event execute function hookd.fan_out()",
    "create index on hookd.delivery (attempt)",
    "comment on table hookd.event is ''",
    "drop table hookd.dead_letter",
    "drop schema hookd cascade",
    "truncate hookd.delivery",
    "alter table hookd.event owner to current_user",
    "insert into hookd.migration (version, name, checksum) values (9999, 'x', 'x')",
    "update hookd.migration set checksum = 'x'",
    "select hookd.drop_partition('endpoint_secret', now())",
)


def denied(dsn: str, role: str, *statements: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(f"set role {role}")
            for statement in statements:
                # a grant by somebody who has no right to give it is an error too
                with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.RaiseError)):
                    await connection.execute(statement)
                    pytest.fail(f"{role} may: {statement}")
        finally:
            await connection.close()

    asyncio.run(go())


def test_nobody_passes_on_rights(dsn: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        for role in ("hookd_producer", "hookd_reader", "hookd_daemon"):
            await connection.execute(f"set role {role}")
            # an error for whoever has no right at all, a warning for whoever has some and may give none away
            with contextlib.suppress(asyncpg.InsufficientPrivilegeError):
                await connection.execute("grant select on hookd.endpoint_secret to public")
            await connection.execute("reset role")
        granted = "select has_table_privilege('public', 'hookd.endpoint_secret', 'select')"
        assert await connection.fetchval(granted) is False
        await connection.close()

    asyncio.run(go())


@pytest.fixture
def filled(dsn: str) -> str:
    asyncio.run(add_endpoint(dsn, "http://127.0.0.1:9001/", headers={"authorization": "Bearer hidden"}))
    return dsn


@pytest.mark.parametrize("role", ["hookd_producer", "hookd_reader"])
def test_secrets_are_not_for_producers_and_readers(filled: str, role: str) -> None:
    denied(filled, role, *SECRETS)


@pytest.mark.parametrize("role", ["hookd_producer", "hookd_reader", "hookd_daemon"])
def test_nobody_but_the_owner_alters_the_schema(filled: str, role: str) -> None:
    denied(filled, role, *SCHEMA)


def test_the_roles_own_nothing(dsn: str) -> None:
    rows = asyncio.run(
        fetch(
            dsn,
            """select c.oid::regclass::text from pg_class c
                where c.relowner in ('hookd_producer'::regrole, 'hookd_reader'::regrole, 'hookd_daemon'::regrole)
                union all
               select p.oid::regprocedure::text from pg_proc p
                where p.proowner in ('hookd_producer'::regrole, 'hookd_reader'::regrole, 'hookd_daemon'::regrole)""",
        )
    )
    assert rows == []


def test_a_reader_sees_what_may_be_shown_of_a_secret(filled: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(filled)
        await connection.execute("set role hookd_reader")
        rows = await connection.fetch("select purpose, shown from hookd.endpoint_secret order by id")
        assert [tuple(r) for r in rows] == [("signing", None), ("headers", ["authorization"])]
        (record,) = await registry.listing(connection)
        assert (record.header_names, record.key_type, record.secrets) == (["authorization"], "hmac", 1)
        await connection.close()

    asyncio.run(go())


@contextlib.contextmanager
def member_of(dsn: str, role: str) -> Iterator[str]:
    """A DSN of a login role that is a member of this one and of nothing else."""
    name = f"service_{uuid4().hex[:8]}"
    run_sql(dsn, f"create role {name} login password 'of-the-service' in role {role}")
    yield re.sub(r"//[^@]*@", f"//{name}:of-the-service@", dsn)
    run_sql(dsn, f"drop role {name}")


def test_a_producer_may_send_from_a_shell(dsn: str, tmp_path: Path) -> None:
    """It was told that the schema is not up to date: it may not look at what was migrated."""
    with member_of(dsn, "hookd_producer") as of_producer:
        cli = Cli(of_producer, tmp_path)
        event = cli.ok("send", "user.created", "--data", "{}").strip()
        assert asyncio.run(fetch(dsn, "select id::text from hookd.event"))[0]["id"] == event
        assert "permission denied for table endpoint" in cli.fails(1, "endpoint", "list")
        assert "this role may not look at hookd's schema" in cli.fails(1, "run")


@pytest.fixture
def service(dsn: str) -> Iterator[str]:
    with member_of(dsn, "hookd_daemon") as of_daemon:
        yield of_daemon


def test_the_daemon_works_as_a_role_that_owns_nothing(
    dsn: str, service: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(
        HOOKD_DATABASE__DSN=service,
        HOOKD_DATABASE__MIGRATE="false",
        HOOKD_RETRY__SCHEDULE='["100ms"]',
        HOOKD_DELIVERY__TIMEOUT="2s",
    )

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url, types=["good"])
            await add_endpoint(dsn, "http://127.0.0.1:9009/gone", types=["bad"])
            await send(dsn, "good")
            await send(dsn, "bad")
            await wait_empty(dsn)
            assert len(receiver.calls) == 1
        backends = await fetch(
            dsn,
            "select distinct usename from pg_stat_activity where datname = current_database() and application_name like 'hookd %'",
        )
        assert [r["usename"] for r in backends] == [conninfo_to_dict(service)["user"]]
        verdicts = await fetch(dsn, "select verdict from hookd.attempt order by verdict")
        assert {r["verdict"] for r in verdicts} >= {"delivered", "exhausted"}

    asyncio.run(go())
