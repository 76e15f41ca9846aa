"""Rows that nobody should have written, by somebody who may: each fails by itself, and its neighbours do not notice."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.cli import Cli
from tests.producing import add_endpoint, send
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon_process import DaemonProcess

# As the owner of the tables can write them: without hookd's checks.
UNGUARDED = """
alter table hookd.event drop constraint event_is_valid;
drop trigger event_before on hookd.event
"""

EVENT = "insert into hookd.event (tenant, {}) values ('poisoned', {})"

EVENTS = {
    "an empty payload": ("type, payload", "'a', ''"),
    "a payload that is no JSON": ("type, payload", "'a', '{{'"),
    "a payload of two JSON texts": ("type, payload", "'a', '1 2'"),
    "a payload with a lone surrogate": ("type, payload", r"'a', '\"\ud800\"'"),
    "a payload that is nested too deep": ("type, payload", "'a', repeat('[', 100000)"),
    "a payload of 10 MB": ("type, payload", "'a', '\"' || repeat('x', 10000000) || '\"'"),
    "a number without end": ("type, payload", "'a', repeat('9', 100000)"),
    "an empty type": ("type, payload", "'', '1'"),
    "a type with a line break": ("type, payload", r"E'a\r\nx-injected: 1', '1'"),
    "a type of 100,000 characters": ("type, payload", "repeat('a', 100000), '1'"),
    "headers that are a list": ("type, payload, headers", "'a', '1', '[1]'"),
    "headers that are a string": ("type, payload, headers", "'a', '1', '\"x\"'"),
    "a header that is a list": ("type, payload, headers", "'a', '1', '{\"x-a\": [1]}'"),
    "a header with a line break": ("type, payload, headers", "'a', '1', jsonb_build_object('x-a', E'b\r\nx-injected: 1')"),
    "a header with a bad name": ("type, payload, headers", "'a', '1', '{\"x a:\": \"b\"}'"),
    "a header without a name": ("type, payload, headers", "'a', '1', '{\"\": \"b\"}'"),
    "a header that is hookd's": ("type, payload, headers", "'a', '1', '{\"webhook-id\": \"b\"}'"),
    "1,000 headers": ("type, payload, headers", "'a', '1', (select jsonb_object_agg('x-' || n, n::text) from generate_series(1, 1000) n)"),
    "due at the end of time": ("type, payload, deliver_at", "'a', '1', '294276-12-31 23:59:59'"),
    "due never": ("type, payload, deliver_at", "'a', '1', 'infinity'"),
    "due before everything": ("type, payload, deliver_at", "'a', '1', '-infinity'"),
    "over before it began": ("type, payload, expires_at", "'a', '1', '-infinity'"),
    "never over": ("type, payload, expires_at", "'a', '1', 'infinity'"),
    "over at the end of time": ("type, payload, expires_at", "'a', '1', '294276-12-31 23:59:59'"),
    "made before everything": ("type, payload, created_at", "'a', '1', '-infinity'"),
    "made at the end of time": ("type, payload, created_at", "'a', '1', '294276-12-31 23:59:59'"),
    "an order key of 1,000 characters": ("type, payload, order_key", "'a', '1', repeat('k', 1000)"),
    "an empty coalesce key": ("type, payload, coalesce_key", "'a', '1', ''"),
}  # fmt: skip

ENDPOINT = "insert into hookd.endpoint (tenant, url, host{}) values ('poisoned', {})"

ENDPOINTS = {
    "no URL": ("", "'', ''"),
    "no URL at all": ("", "'not a url', 'not a url'"),
    "another scheme": ("", "'ftp://127.0.0.1/', '127.0.0.1'"),
    "a host of 300 characters": ("", "'http://' || repeat('a', 300) || '/', repeat('a', 300)"),
    "a port that is none": ("", "'http://127.0.0.1:99999999/', '127.0.0.1:99999999'"),
    "a URL with a line break": ("", r"E'http://127.0.0.1/\r\nx: y', '127.0.0.1:80'"),
    "a URL of a megabyte": ("", "'http://127.0.0.1:1/' || repeat('a', 1000000), '127.0.0.1:1'"),
    "a host that is not the URL's": ("", "'http://127.0.0.1:1/', 'example.com:80'"),
    "a negative rate": (", rate", "'http://127.0.0.1:1/', '127.0.0.1:1', -1"),
    "no rate": (", rate", "'http://127.0.0.1:1/', '127.0.0.1:1', 'NaN'"),
    "an endless rate": (", rate", "'http://127.0.0.1:1/', '127.0.0.1:1', 'Infinity'"),
    "none at once": (", concurrency", "'http://127.0.0.1:1/', '127.0.0.1:1', 0"),
    "a format that is none": (", format", "'http://127.0.0.1:1/', '127.0.0.1:1', 'xml'"),
    "a state that is none": (", state", "'http://127.0.0.1:1/', '127.0.0.1:1', 'confused'"),
    "types with nothing in it": (", types", "'http://127.0.0.1:1/', '127.0.0.1:1', array[null, '*']"),
    "a filter that fails": (", filter", "'http://127.0.0.1:1/', '127.0.0.1:1', '$.a.double() > 1'"),
    "failing before everything": (", failing_since", "'http://127.0.0.1:1/', '127.0.0.1:1', '-infinity'"),
    "parked at the end of time": (", failing_since, parked_at", "'http://127.0.0.1:1/', '127.0.0.1:1', now(), '294276-12-31'"),
}  # fmt: skip

# On an endpoint of their own.
SECRET = """
with made as (
  insert into hookd.endpoint (tenant, url, host)
  select tenant, url || '/{}', host from hookd.endpoint where tenant = 'poisoned' and url like '%/hook' limit 1
  returning key)
insert into hookd.endpoint_secret (endpoint, purpose, value) select key, '{}', '{}' from made
"""

REFUSED = {
    "a negative rate",
    "no rate",
    "an endless rate",
    "none at once",
    "a format that is none",
    "a state that is none",
}
"""By constraints of the table, whoever writes it."""

SECRETS = {
    "a secret that is none": ("signing", "whsec_!!!"),
    "a secret that is empty": ("signing", ""),
    "a sealed secret of another key": ("signing", "sealed:v1:AAAA"),
    "headers that are no JSON": ("headers", "{{"),
    "headers of an endpoint that are a list": ("headers", "[1]"),
}

DELIVERY = """
insert into hookd.delivery (event_id, endpoint, shard, due_at, attempt)
select e.id, {}
  from (select id from hookd.event where tenant = 'poisoned' and type = 'fine' limit 1) e,
       (select key, shard from hookd.endpoint where tenant = 'poisoned' and url like '%/hook' limit 1) p
"""

DELIVERIES = {
    "an endpoint that is none": "987654, 1, null, 0",
    "a shard that is none": "p.key, 999, null, 0",
    "another shard": "p.key, (p.shard + 1) % 64, null, 0",
    "due when nobody lives": "p.key, p.shard, '294276-12-31 23:59:59', 0",
    "due since ever": "p.key, p.shard, '-infinity', 0",
    "the last attempt that a number holds": "p.key, p.shard, null, 32767",
    "attempts below none": "p.key, p.shard, null, -5",
}

NO_EVENT = """
insert into hookd.delivery (event_id, endpoint, shard)
select hookd.uuid7(), key, shard from hookd.endpoint where tenant = 'poisoned' and url like '%/hook' limit 1
"""

# Nothing stays but what nobody owns, what cannot be written down, what is for later, and what waits for readable headers.
STAYS = """
select count(*) from hookd.delivery
 where shard <> 999 and attempt <> 32767 and (due_at is null or due_at < '9000-01-01')
   and endpoint not in (select endpoint from hookd.endpoint_secret where purpose = 'headers')
"""

ENDED = """
select (select max(n) from (select count(*) as n from hookd.attempt group by delivery_id) c),
       (select count(*) from hookd.attempt where verdict <> 'delivered' and reason is null)
"""


def statements() -> dict[str, str]:
    """What is wrong, and how it comes in."""
    return {
        **{name: EVENT.format(*what) for name, what in EVENTS.items()},
        **{name: ENDPOINT.format(*what) for name, what in ENDPOINTS.items()},
        **{name: SECRET.format(n, *what) for n, (name, what) in enumerate(SECRETS.items())},
        **{name: DELIVERY.format(what) for name, what in DELIVERIES.items()},
        "an event that is none": NO_EVENT,
    }


@pytest.mark.usefixtures("one_server")
def test_poison_rows(dsn: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]) -> None:
    async def go() -> None:
        daemon = start_daemon(HOOKD_RETRY__SCHEDULE='["50ms"]')
        connection = await asyncpg.connect(dsn)
        async with Receiver() as poisoned, Receiver() as neighbour:
            await add_endpoint(dsn, neighbour.url, tenant="neighbour")
            await add_endpoint(dsn, poisoned.url, tenant="poisoned")
            await connection.execute(UNGUARDED)
            await send(dsn, "fine", tenant="poisoned")
            for n, (name, sql) in enumerate(statements().items(), 1):
                try:
                    await connection.execute(sql)
                except asyncpg.CheckViolationError:
                    assert name in REFUSED
                else:
                    assert name not in REFUSED
                await send(dsn, "fine", tenant="poisoned")
                await send(dsn, tenant="neighbour")
                try:
                    await neighbour.wait_for_calls(n)
                except TimeoutError:
                    pytest.fail(f"{name}: {daemon.log()[-1]}")
            async with asyncio.timeout(30):
                while await connection.fetchval(STAYS):
                    await asyncio.sleep(0.05)
            ((most, nameless),) = await connection.fetch(ENDED)
            assert most <= 2, "none is tried again and again"
            assert nameless == 0, "each says why"
            unwritable = await connection.fetchval("select id from hookd.delivery where attempt = 32767")
            assert [line["delivery_id"] for line in daemon.said("not stored")] == [unwritable] * 2
            odd = [
                str(row["id"])
                for row in await connection.fetch(
                    "select id from hookd.event where tenant = 'poisoned' and type <> 'fine' order by created_at"
                )
            ]
        await connection.close()
        # whoever looks at them sees them
        cli = Cli(dsn, tmp_path)
        for command in (
            "status",
            "endpoint list",
            "event list --tenant poisoned",
            "attempts",
        ):
            cli.ok(*command.split())
        for event in odd[::9]:
            cli.ok("event", "show", event)
        for path in ("", "events", "endpoints", "deliveries", *[f"events/{event}" for event in odd]):
            try:
                urllib.request.urlopen(f"{daemon.admin}/{path}", timeout=30).close()
            except urllib.error.HTTPError as error:
                with error:
                    pytest.fail(f"{path}: {daemon.wait_for('a request to the admin server failed')}")
        assert daemon.process.poll() is None
        assert not daemon.said("internal error")
        assert not daemon.said("database lost")

    asyncio.run(go())
