"""``hookd replay``: what is chosen, what a condition may do, and that fresh events go first."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from tests.cli import Cli
from tests.producing import add_endpoint_with_id, fetch, send, wait_empty
from tests.receiver import OK, Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess
    from tests.receiver import Call

SETTLED = """
with e as (
  insert into hookd.event (type, payload, tenant)
  select $1, json_build_object('n', n)::text, $2 from generate_series(1, $3::integer) n
  returning id),
gone as (select)
insert into hookd.attempt (at, delivery_id, event_id, endpoint, attempt, status, verdict, reason)
select now(), nextval('hookd.delivery_id'), e.id, p.key, 1, 404, $4, 'answered 404'
  from e, hookd.endpoint p where p.id = $5
"""

FORGET_PENDING = "delete from hookd.delivery"


@pytest.fixture
def cli(dsn: str, tmp_path: Path) -> Cli:
    return Cli(dsn, tmp_path)


async def settled(
    dsn: str,
    endpoint: Any,
    count: int,
    *,
    type_: str = "thing.made",
    verdict: str = "exhausted",
    tenant: str = "default",
) -> None:
    """Deliveries that are over, without having been made."""
    await fetch(dsn, SETTLED, type_, tenant, count, verdict, endpoint)
    await fetch(dsn, FORGET_PENDING)


def matching(cli: Cli, *arguments: str) -> int:
    (said,) = cli.json("replay", "--dry-run", *arguments)
    assert said["queued"] == 0
    return int(said["matching"])


@pytest.mark.parametrize("server_dsn", ["embedded"], indirect=True)
def test_what_is_chosen(dsn: str, cli: Cli) -> None:
    async def prepare() -> tuple[str, str]:
        _, one = await add_endpoint_with_id(dsn, "http://127.0.0.1:8089/a")
        _, other = await add_endpoint_with_id(dsn, "http://127.0.0.1:8089/b", tenant="acme")
        await settled(dsn, one, 3, type_="user.created")
        await settled(dsn, one, 4, type_="order.paid", verdict="delivered")
        await settled(dsn, other, 5, type_="user.removed", tenant="acme")
        return str(one), str(other)

    one, other = asyncio.run(prepare())
    assert matching(cli, "--state", "exhausted") == 8
    assert matching(cli, "--endpoint", one) == 3, "exhausted ones, where no state is said"
    assert matching(cli, "--endpoint", one, "--state", "delivered", "--state", "exhausted") == 7
    assert matching(cli, "--tenant", "acme") == 5
    assert matching(cli, "--type", "user.*") == 8
    assert matching(cli, "--type", "user.created", "--type", "user.removed") == 8
    assert matching(cli, "--type", "user.created") == 3
    assert matching(cli, "--type", "user") == 0
    assert matching(cli, "--type", "*", "--state", "delivered") == 4
    assert matching(cli, "--since", "1h") == 8
    assert matching(cli, "--until", "1h") == 0
    assert matching(cli, "--where", "url like '%/b' and last_status = 404 -- a comment") == 5
    assert matching(cli, "--where", "true") == 12, "all settled states"
    assert matching(cli, "--where", "true", "--state", "delivered") == 4
    assert (
        matching(cli, "--where", "event_id in (select id from hookd.event where payload::json ->> 'n' = '1')")
        == 3
    )
    said = cli.ok("replay", "--dry-run", "--where", "true")
    assert said == "12 deliveries would be queued: 4 delivered, 8 exhausted; at 2 endpoints\n"

    cli.ok("endpoint", "remove", other)
    assert matching(cli, "--state", "exhausted") == 3, "nobody is there any more to be sent the others"
    asyncio.run(fetch(dsn, "update hookd.endpoint set state = 'disabled' where id = $1", one))
    (said_of,) = cli.json("replay", "--state", "exhausted")
    assert (said_of["matching"], said_of["of_disabled_endpoints"]) == (0, 3)
    assert "hookd endpoint resume" in cli("replay", "--state", "exhausted").stderr


BAD_CONDITIONS = [
        ("stat = 'exhausted'", 'column "stat" does not exist; it is a condition on hookd.delivery_status: event_id, endpoint_id,'),
        ("state = ", "syntax error"),
        ("attempts", "must be type boolean"),
        ("true); delete from hookd.event; select (true", "syntax error"),
        ("true) s; delete from hookd.event; --", "syntax error"),
        ("1/0 = 1", "division by zero"),
        ("setval('hookd.event_key', 1) > 0", "permission denied"),
        ("exists (select from hookd.endpoint_secret where value <> '')", "permission denied"),
        ("pg_terminate_backend(pg_backend_pid())", "it may read what hookd_reader may read"),
]  # fmt: skip


def test_a_condition_that_cannot_be_used(dsn: str, cli: Cli) -> None:
    _, endpoint = asyncio.run(add_endpoint_with_id(dsn, "http://127.0.0.1:8089/a"))
    asyncio.run(settled(dsn, endpoint, 1))
    for where, said in BAD_CONDITIONS:
        error = cli.fails(2, "replay", "--where", where)
        assert error.startswith("hookd: --where: "), where
        assert said in error, where
        assert error.count("\n") == 1, where


def test_a_condition_only_reads_where_there_are_no_roles(dsn: str, cli: Cli) -> None:
    """The daemon's role may not become hookd_reader."""
    _, endpoint = asyncio.run(add_endpoint_with_id(dsn, "http://127.0.0.1:8089/a"))
    asyncio.run(settled(dsn, endpoint, 1))
    role = f"service_{uuid4().hex[:8]}"
    asyncio.run(fetch(dsn, f"create role {role} login password 'secret' in role hookd_daemon"))
    try:
        service = Cli(re.sub(r"//[^@]*@", f"//{role}:secret@", dsn), cli.folder)
        assert matching(service, "--where", "state = 'exhausted'") == 1
        error = service.fails(2, "replay", "--where", "setval('hookd.event_key', 1) > 0")
        assert "in a read-only transaction; it may only read" in error
    finally:
        asyncio.run(fetch(dsn, f"drop role {role}"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to replay"),
        (["--missing"], "--missing needs --endpoint"),
        (["--missing", "--endpoint", "01890a5d-ac96-774b-bcce-b302099a8057", "--state", "delivered"], "and nothing else"),
        (["--since", "yesterday"], "no time"),
        (["--state", "pending"], "is not one of"),
        (["--rate", "0"], "0"),
    ],
)  # fmt: skip
def test_wrong_usage(cli: Cli, arguments: list[str], said: str) -> None:
    assert said in cli.fails(2, "replay", *arguments)


def test_a_new_endpoint_gets_what_was_there_before(dsn: str, cli: Cli) -> None:
    async def prepare() -> None:
        for type_ in ("user.created", "user.removed", "order.paid"):
            await fetch(
                dsn,
                "insert into hookd.event (type, payload) select $1, '{}' from generate_series(1, 10)",
                type_,
            )
        await fetch(
            dsn, "insert into hookd.event (type, payload, tenant) values ('user.created', '{}', 'acme')"
        )

    asyncio.run(prepare())
    (added,) = cli.json("endpoint", "add", "http://127.0.0.1:8089/new", "--type", "user.*", "--since", "7d")
    assert added["queued"] == 20
    assert "past events  20 queued" in cli.ok(
        "endpoint", "add", "http://127.0.0.1:8089/2", "--type", "user.*", "--since", "7d"
    )
    assert "past events" not in cli.ok("endpoint", "add", "http://127.0.0.1:8089/3", "--type", "user.*")
    again = ("replay", "--endpoint", added["id"], "--since", "7d", "--missing")
    assert cli.json(*again)[0]["matching"] == 0, "nothing is missing any more"
    cli.ok("endpoint", "update", added["id"], "--type", "user.*", "--type", "order.*")
    assert matching(cli, *again[1:], "--type", "user.*") == 0
    assert cli.json(*again)[0] == {
        "matching": 10, "queued": 10, "states": {"missing": 10}, "endpoints": 1, "of_disabled_endpoints": 0,
    }  # fmt: skip
    rows = asyncio.run(
        fetch(dsn, "select count(*), count(due_at) as timed from hookd.delivery d join hookd.endpoint e on e.key = d.endpoint where e.id = $1 and d.replay", added["id"])
    )  # fmt: skip
    assert tuple(rows[0]) == (30, 30)
    assert "there is no endpoint" in cli.fails(
        1, "replay", "--missing", "--endpoint", "01890a5d-ac96-774b-bcce-b302099a8057"
    )


def test_a_rate_spreads_what_is_queued(dsn: str, cli: Cli) -> None:
    _, endpoint = asyncio.run(add_endpoint_with_id(dsn, "http://127.0.0.1:8089/a"))
    asyncio.run(settled(dsn, endpoint, 11))
    cli.ok("replay", "--endpoint", str(endpoint), "--rate", "0.5")
    (row,) = asyncio.run(
        fetch(
            dsn,
            "select extract(epoch from max(due_at) - min(due_at))::float as s, count(distinct due_at) as n from hookd.delivery",
        )
    )
    assert (row["s"], row["n"]) == (20.0, 11)


def test_fresh_events_go_before_replayed_ones(
    dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """
    More is replayed to an endpoint than memory holds; what is inserted then is not behind it, nor is what is resent.

    """

    async def go() -> None:
        seen: list[str] = []
        hold = asyncio.Event()

        async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
            seen.append(call.event_id)
            if not hold.is_set():
                await hold.wait()
            writer.write(OK)

        async with Receiver(handle) as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            await settled(dsn, endpoint, 3000)
            await asyncio.to_thread(start_daemon, HOOKD_LIMITS__CONCURRENCY="1", HOOKD_RETRY__SCHEDULE="[]")
            old = str(
                (await fetch(dsn, "select event_id from hookd.attempt order by event_id desc limit 1"))[0][0]
            )
            await asyncio.to_thread(cli.ok, "replay", "--endpoint", str(endpoint), "--yes")
            await receiver.wait_for_calls(1)
            fresh = [await send(dsn) for _ in range(5)]
            # this one is among those that are replayed, last of all: it is pending, so it is not resent
            assert "pending still" in await asyncio.to_thread(cli.fails, 1, "resend", old)
            hold.set()
            await wait_empty(dsn)
            places = [seen.index(event) for event in fresh]
            assert max(places) < 50, places
            assert seen.index(old) > 2000
            assert len(seen) == 3005
            assert len(set(seen)) == 3005
            # a replay says nothing about how late events are
            lag = await fetch(
                dsn, "select count(*) from hookd.attempt where replay and verdict = 'delivered'"
            )
            assert lag[0][0] == 3000

    asyncio.run(go())


def test_resending_to_a_disabled_endpoint_says_so(
    dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon()

    async def go() -> None:
        async with Receiver(always(answer(410))) as receiver:
            await add_endpoint_with_id(dsn, receiver.url)
            event = await send(dsn)
            await wait_empty(dsn)
            assert "endpoint is disabled" in await asyncio.to_thread(cli.fails, 1, "resend", event)

    asyncio.run(go())
