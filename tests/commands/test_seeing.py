"""What ``status``, ``top`` and ``explain`` say, with real daemons, receivers and terminals."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import pytest

from hookd.commands.drawing import lanes as lanes_table
from hookd.commands.drawing import painted
from hookd.commands.top import frame, page
from hookd.postgres.explain import Owner, Owners, Pending, explain, why_pending
from hookd.postgres.status import Lane, Status, by_trouble, lane_of, status
from tests.cli import Cli
from tests.producing import add_endpoint_with_id, fetch, send, wait_for_row
from tests.receiver import Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.daemon_process import DaemonProcess
    from tests.receiver import Call

MANY = """
insert into hookd.event (type, payload, tenant) select 'thing.made', '{}', $2 from generate_series(1, $1::integer)
"""


@pytest.fixture
def cli(dsn: str, tmp_path: Path) -> Cli:
    return Cli(dsn, tmp_path)


async def hang(_call: Call, _writer: asyncio.StreamWriter) -> None:
    """Take the request and never answer."""
    await asyncio.Event().wait()


async def port_of_nobody() -> str:
    """A URL where nobody listens."""
    async with Receiver() as receiver:
        return receiver.url


class Because:
    """Asks why deliveries wait, until the answer is the expected one."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def comes_to(self, event: str, pattern: str, deadline_s: float = 30.0) -> str:
        said = None
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            (found,) = await explain(self._connection, UUID(event))
            said = str(found["because"])
            if re.match(pattern, said):
                return said
            await asyncio.sleep(0.02)
        raise AssertionError(f"{said!r} is not {pattern!r}")


# explain


def test_explain_names_the_one_thing(dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]) -> None:
    """One daemon, a host for each reason."""

    async def overloaded(call: Call, writer: asyncio.StreamWriter) -> None:
        if call.number > 4:
            await hang(call, writer)
        writer.write(answer(502))

    receivers = {
        "rate": Receiver(),
        "own rate": Receiver(),
        "concurrency": Receiver(hang),
        "own concurrency": Receiver(hang),
        "lowered": Receiver(overloaded),
        "hold": Receiver(always(answer(429, retry_after="60"))),
        "retry": Receiver(always(answer(500))),
        "ordered": Receiver(always(answer(500))),
        "paused": Receiver(),
        "later": Receiver(),
        "sending": Receiver(hang),
    }
    limits = {
        "rate": "rate = 0.01",
        "concurrency": "concurrency = 2",
        "lowered": "concurrency = 4",
        "hold": "concurrency = 1",
    }
    own: dict[str, dict[str, Any]] = {
        "own rate": {"rate": 0.02},
        "own concurrency": {"concurrency": 1},
        "ordered": {"ordered": True},
    }

    async def go() -> None:
        async with AsyncExitStack() as stack:
            endpoints = {}
            for name, receiver in receivers.items():
                await stack.enter_async_context(receiver)
                _, endpoints[name] = await add_endpoint_with_id(
                    dsn, receiver.url, tenant=name, **own.get(name, {})
                )
            await add_endpoint_with_id(dsn, await port_of_nobody(), tenant="breaker")
            await fetch(dsn, "update hookd.endpoint set state = 'paused' where id = $1", endpoints["paused"])
            hosts = ", ".join(f'"127.0.0.1:{receivers[n].port}" = {{ {text} }}' for n, text in limits.items())
            await asyncio.to_thread(
                start_daemon,
                HOOKD_LIMITS__HOSTS=f"{{ {hosts} }}",
                HOOKD_DELIVERY__TIMEOUT="2m",
                HOOKD_RETRY__SCHEDULE='["1s", "1h"]',
            )
            connection = await asyncpg.connect(dsn)
            because = Because(connection)

            first = {}
            for name in (*receivers, "breaker"):
                if name != "later":
                    first[name] = await send(dsn, tenant=name)
            last = {}
            for name in ("rate", "own rate", "concurrency", "own concurrency", "ordered"):
                await send(dsn, tenant=name)
                last[name] = await send(dsn, tenant=name)
            for name, count in (("lowered", 9), ("hold", 2), ("breaker", 9)):
                await fetch(dsn, MANY, count, name)
                last[name] = await send(dsn, tenant=name)
            first["later"] = await send(
                dsn,
                tenant="later",
                deliver_at=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2),
            )

            await because.comes_to(
                last["rate"],
                r"it waits for its host's rate limit \(0\.01/s\); 1 ahead of it in its endpoint's queue$",
            )
            await because.comes_to(
                last["own rate"], r"it waits for its endpoint's own rate limit \(0\.02/s\); 1 ahead"
            )
            await because.comes_to(
                last["concurrency"],
                r"it waits for its host's concurrency: 2 in flight, 2 allowed now; 2 ahead of it",
            )
            await because.comes_to(
                last["own concurrency"],
                r"it waits for its endpoint's own concurrency \(1 at once\); 2 ahead of it",
            )
            await because.comes_to(
                last["lowered"],
                r"it waits for its host's concurrency: ([12]) in flight, \1 allowed now, 4 at most; \d+ ahead",
            )
            await because.comes_to(
                last["hold"], r"its host asked to be left alone for (\d+ s|1 min) more \(Retry-After\)$"
            )
            await because.comes_to(first["sending"], r"it is being sent now$")
            await because.comes_to(
                first["retry"],
                r"retry at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(in (1 h|\d+ min).*\), after 2 attempts; the last: answered 500$",
            )
            head = await wait_for_row(
                dsn, "select min(id) as id from hookd.delivery where event_id = $1", UUID(first["ordered"])
            )
            await because.comes_to(
                last["ordered"],
                rf"it waits behind delivery {head['id']} of the same order key; that one: retry at .* after 2 attempts",
            )
            await because.comes_to(
                first["paused"], rf"its endpoint is paused; `hookd endpoint resume {endpoints['paused']}`$"
            )
            await because.comes_to(
                first["later"], r"not before \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(in (2 h|1 h 59 min)\)$"
            )

            # a retry whose time has come waits for what its host lets it wait for; the last of them is probed last
            due = await wait_for_row(
                dsn,
                "select d.event_id from hookd.delivery d join hookd.endpoint e on e.key = d.endpoint"
                " where e.tenant = 'breaker' and d.attempt = 1 and d.due_at < now() - interval '1 second'"
                " order by d.due_at desc limit 1",
            )
            await because.comes_to(
                str(due["event_id"]),
                r"its host does not answer; the next probe goes in .* \(last error: .*refused.*, \d+ s ago\)$",
            )
            await connection.close()

            said = await asyncio.to_thread(cli.ok, "explain", str(head["id"]))
            assert said.startswith(f"retrying  {receivers['ordered'].url}\n  retry at ")
            (explained,) = await asyncio.to_thread(cli.json, "explain", first["paused"])
            assert explained["state"] == "pending"
            assert explained["because"].startswith("its endpoint is paused")

    asyncio.run(go())


def lane(host: str = "h:443", **said: Any) -> Lane:
    published = {
        "host": host, "in_flight": 0, "concurrency": 50, "cap": 50, "rate": 0.0, "held_s": 0.0, "waiting": 0,
        "why": "idle", "problem": "", "problem_s": 0.0,
    }  # fmt: skip
    return lane_of(published | said, "d", 0.0)


def pending(**known: Any) -> Pending:
    row: dict[str, Any] = {
        "id": 7, "event_id": UUID(int=1), "endpoint": 1, "attempt": 0, "due_at": None, "due_in_s": None, "age_s": 60.0,
        "shard": 3, "order_key": None, "endpoint_id": UUID(int=2), "url": "https://h/", "host": "h:443",
        "state": "active", "state_reason": None, "parked_at": None, "failing_reason": None, "rate": None, "concurrency": None, "endpoint_shard": 3,
        "expired": False, "behind": None, "state_before": None, "replaced_by": None, "ahead": 0, "last_reason": None,
    }  # fmt: skip
    return Pending(**row | known)


def owners(*lanes: Lane, in_flight: frozenset[int] | None = None, stalled: str = "") -> Owners:
    return Owners({3: 100}, {100: Owner({at.host: at for at in lanes}, in_flight, 0.5, stalled)})


WHEN = datetime.datetime(2026, 11, 24, 10, tzinfo=datetime.UTC)


BUSY: dict[str, Any] = {"why": "ready", "in_flight": 5, "waiting": 9}


@pytest.mark.parametrize(
    ("row", "where", "said"),
    [
        # marks on the queue and the endpoint
        ({"state": None}, owners(), "its endpoint is gone"),
        ({"state": "disabled", "state_reason": "answered 410 Gone"}, owners(), "its endpoint is disabled (answered 410 Gone)"),
        ({"state": "removed"}, owners(), "its endpoint is removed (by hand)"),
        ({}, Owners({}, {}), "no daemon owns shard 3"),
        ({}, Owners({3: 100}, {}), "the daemon that owns shard 3 has not said anything lately"),
        ({"endpoint_shard": 4}, owners(), "its endpoint moved to another host"),
        ({"expired": True}, owners(), "its event has expired"),
        ({"behind": 5}, owners(), "it waits behind delivery 5 of the same order key, which has just been settled"),
        ({"replaced_by": UUID(int=9)}, owners(), f"event {UUID(int=9)} of the same coalesce key is newer"),
        ({"parked_at": WHEN, "failing_reason": "answered 500"}, owners(), "its endpoint has been parked since 2026-11-24 10:00:00 UTC (answered 500)"),
        # the lane
        ({"parked_at": WHEN, "failing_reason": "answered 500"}, owners(in_flight=frozenset({7})), "it is being sent now"),
        ({"state_before": 6}, owners(in_flight=frozenset({6})), "it waits until delivery 6 of the same coalesce key has ended"),
        ({"state_before": 6}, owners(in_flight=frozenset({5})), "it is about to be sent"),
        ({}, owners(lane(why="share", waiting=9)), "it waits for a free slot (delivery.max_in_flight)"),
        ({"rate": 1.0}, owners(lane(why="endpoint", waiting=9)), "it waits for its endpoint's own rate limit (1/s)"),
        ({}, owners(stalled="PostgreSQL"), "it waits for PostgreSQL"),
        ({"rate": 1.0}, owners(lane(why="endpoint", waiting=9), stalled="PostgreSQL"), "it waits for its endpoint's own rate"),
        ({}, owners(), "it is about to be sent"),
        ({}, owners(lane(in_flight=1)), "it is being sent now"),
        ({"age_s": 0.5}, owners(lane(in_flight=1)), "it is about to be sent"),
        ({}, owners(lane(in_flight=1), in_flight=frozenset({8})), "it is about to be sent"),
        ({}, owners(lane(**BUSY), in_flight=frozenset({7})), "it is being sent now"),
        ({"ahead": 1001}, owners(lane(**BUSY)), "it waits for its turn; 1,000+ ahead of it in its endpoint's queue"),
        # an endpoint's own limits, where they are stricter
        ({"rate": 5.0}, owners(lane(why="rate", rate=2.0, waiting=9)), "it waits for its host's rate limit (2/s)"),
        ({"rate": 1.0}, owners(lane(why="rate", rate=2.0, waiting=9)), "it waits for its endpoint's own rate limit (1/s)"),
        ({"rate": 1.0}, owners(lane(**BUSY)), "it waits for its endpoint's own rate limit (1/s)"),
        ({"concurrency": 5}, owners(lane(**BUSY)), "it waits for its endpoint's own concurrency (5 at once)"),
        ({"concurrency": 6}, owners(lane(**BUSY)), "it is about to be sent"),
        ({"rate": 1.0, "concurrency": 5}, owners(lane(**BUSY)), "it waits for its endpoint's own limits (1/s, 5 at once)"),
        (
            {"rate": 1.0, "concurrency": 80},
            owners(lane(why="concurrency", in_flight=50, waiting=9)),
            "it waits for its host's concurrency: 50 in flight, 50 allowed now",
        ),
        ({}, owners(lane(why="rate", waiting=9, in_flight=1)), "it is about to be sent"),
    ],
)  # fmt: skip
def test_why(row: dict[str, Any], where: Owners, said: str) -> None:
    assert why_pending(pending(**row), where).startswith(said)


# status


def test_status_shows_trouble_first(dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(HOOKD_DELIVERY__TIMEOUT="2m")

    async def go() -> None:
        async with Receiver(hang) as busy:
            url = await port_of_nobody()
            down = url.split("/")[2]
            await add_endpoint_with_id(dsn, busy.url, tenant="busy")
            await add_endpoint_with_id(dsn, url, tenant="down")
            await fetch(dsn, MANY, 10_200, "busy")
            await fetch(dsn, MANY, 70, "down")
            async with asyncio.timeout(30):
                while True:
                    (facts,) = await asyncio.to_thread(cli.json, "status")
                    hosts = [at["host"] for at in facts["lanes"]]
                    if hosts == [down, f"127.0.0.1:{busy.port}"]:
                        first, second = facts["lanes"]
                        if first["why"] == "breaker" and second["in_flight"] == 50:
                            break
            assert (first["breaker_open"], first["why"], first["queued"], first["queued_more"]) == (
                True,
                "breaker",
                70,
                False,
            )
            assert first["problem_s"] < 60
            assert (second["breaker_open"], second["in_flight"], second["cap"]) == (False, 50, 50)
            assert (second["queued"], second["queued_more"]) == (10_000, True)

            async with asyncio.timeout(30):
                while True:  # a probe that is under way at this moment is told otherwise
                    lines = (await asyncio.to_thread(cli.ok, "status")).splitlines()
                    head, *rows = lines[lines.index("") + 1 :]
                    cells = [re.split(r" {2,}", row) for row in (head, *rows)]
                    if cells[1][5] == "probe" and cells[2][1] == "50":
                        break
            assert re.match(
                r"daemon     \S+, hookd \S+, up \d+ s, 64 shards, \d+ in flight, [\d,]+ in memory$", lines[0]
            )
            assert lines[1].startswith("queue      10,000+ fresh, ")
            assert lines[2] == "endpoints  2 active, 1 of them failing, 0 paused, 0 disabled"
            assert cells[0] == [
                "LANE", "IN FLIGHT", "LIMIT", "RATE", "BREAKER", "WAITS FOR", "IN MEMORY", "IN QUEUE", "LAST ERROR",
            ]  # fmt: skip
            assert cells[1][0] == down
            assert cells[1][2].endswith("/50")
            assert cells[1][4].startswith("open, probe ")
            assert cells[1][7] == "70"
            assert re.match(r"\d+ s ago: .*refused", cells[1][8])
            assert cells[2][1:6] == ["50", "50/50", "-", "closed", "concurrency"]
            assert cells[2][7:] == ["10,000+", "-"]
            assert "\x1b" not in "".join(lines)

            said = await asyncio.to_thread(cli.ok, "status", "--lanes", "1")
            assert said.splitlines()[-1] == "1 more; `hookd status --lanes 2` shows them"

    asyncio.run(go())


PUBLISH = """
insert into hookd.node (id, backend, started_at, seen_at, summary) values ($1, 0, now(), now(), $2::text::jsonb)
"""


def test_what_a_host_with_many_endpoints_is_owed_is_counted_up_to_a_bound(dsn: str) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute(
            """insert into hookd.endpoint (url, host, tenant) select 'https://h/', h, h || n from unnest($1::text[], $2::integer[]) k (h, c), generate_series(1, c) n""",
            ["many:443", "few:443", "rich:443"], [5001, 3, 1],
        )  # fmt: skip
        await connection.execute(
            """insert into hookd.delivery (event_id, endpoint, shard, due_at)
               select hookd.uuid7(), e.key, e.shard, case when n % 2 = 0 then now() end
                 from hookd.endpoint e, generate_series(1, case e.host when 'rich:443' then 10001 when 'few:443' then 4 else 1 end) n
                where e.host <> 'many:443' or e.tenant = 'many:4431'"""
        )
        published = {
            "version": "0", "in_flight": 0, "waiting": 0, "verdicts": {}, "at": 0,
            "lanes": [
                {"host": host, "in_flight": 1, "concurrency": 1, "cap": 0, "rate": 0, "held_s": 0, "waiting": 0, "why": "idle", "problem": "", "problem_s": 0}
                for host in ("many:443", "few:443", "rich:443", "gone:443")
            ],
        }  # fmt: skip
        await connection.execute(PUBLISH, "a", json.dumps(published))
        # whoever may read may see
        await connection.execute("set role hookd_reader")
        counted = {at.host: (at.queued, at.queued_more) for at in (await status(connection)).lanes}
        assert counted == {
            "rich:443": (10_000, True),
            "few:443": (12, False),
            "many:443": (1, True),  # at least: not all of its endpoints were looked at
            "gone:443": (0, False),
        }
        event = await connection.fetchval("select event_id from hookd.delivery limit 1")
        (explained,) = await explain(connection, event)
        assert explained["because"].startswith("no daemon owns shard")
        await connection.close()

    asyncio.run(go())


def test_lanes_are_sorted_by_trouble() -> None:
    lanes = [
        lane("calm"),
        lane("busy", why="rate", waiting=900),
        lane("failed long ago", problem="answered 500", problem_s=600.0, waiting=1),
        lane("failed", problem="answered 500", problem_s=5.0, waiting=1),
        lane("failed, busy", problem="answered 500", problem_s=50.0, waiting=10),
        lane("held", why="hold", held_s=5.0),
        lane("open, nothing waits", breaker_open=True),
        lane("open", why="breaker", held_s=0.0),
    ]
    assert [at.host for at in by_trouble(lanes)] == [
        "open", "open, nothing waits", "held", "failed, busy", "failed", "busy", "failed long ago", "calm",
    ]  # fmt: skip


# top


AT = datetime.datetime(2026, 11, 23, 12, tzinfo=datetime.UTC)

QUEUE = {
    "fresh": 10_001, "waiting": 12, "dead_letters": 1, "oldest_at": AT, "shards": 64, "active": 9, "unverified": 0, "paused": 1,
    "disabled": 2, "failing": 3, "parked": 0,
}  # fmt: skip


def node(
    second: float, started: float = -1000.0, name: str = "a", shards: int = 64, **verdicts: int
) -> dict[str, Any]:
    """A daemon as it was read, with what it published in this second."""
    at = AT.timestamp() + second
    return {
        "id": name, "backend": 1, "shards": shards, "started_at": AT + datetime.timedelta(seconds=started),
        "seen_at": AT, "silence": datetime.timedelta(seconds=0.2),
        "summary": {"version": "1", "at": at, "verdicts": verdicts, "in_flight": 2, "waiting": 3, "lanes": []},
    }  # fmt: skip


def reading(second: float, *nodes: dict[str, Any], lanes: list[Lane] | None = None) -> Status:
    return Status(AT + datetime.timedelta(seconds=second), list(nodes), QUEUE, lanes or [], 0)


@pytest.mark.parametrize(
    ("before", "after", "rates"),
    [
        # the time between is that between the summaries, not between the readings
        (
            [node(0, delivered=100, retry=10, exhausted=1, expired=5)],
            [node(2, delivered=300, retry=20, exhausted=3, expired=50)],
            (106.0, 100.0, 6.0),
        ),
        ([node(0)], [node(1)], (0.0, 0.0, 0.0)),
        # nothing new was said
        ([node(0, delivered=1)], [node(0, delivered=1)], None),
        ([], [], None),
        # a kind that comes up only now
        ([node(0, delivered=5)], [node(1, delivered=5, retry=2)], (2.0, 0.0, 2.0)),
        # counters went back: what they say has happened since the start
        ([node(0, delivered=1000)], [node(2, started=1.0, delivered=30)], (30.0, 30.0, 0.0)),
        ([node(0, delivered=1000)], [node(2, delivered=30)], (15.0, 15.0, 0.0)),
        # another daemon has taken over: it has counted since it began, if that was in between
        ([node(0, delivered=1000)], [node(2, started=1.0, name="b", delivered=40)], (40.0, 40.0, 0.0)),
        ([node(0, delivered=1000)], [node(2, name="b", delivered=40)], None),
        # several
        (
            [node(0, delivered=0), node(0.5, name="b", retry=0)],
            [node(1, delivered=10), node(1.5, name="b", retry=5)],
            (15.0, 10.0, 5.0),
        ),
    ],
)  # fmt: skip
def test_rates_are_the_difference_of_two_summaries(before: list[Any], after: list[Any], rates: Any) -> None:
    made = frame(reading(0.3, *before), reading(2.3, *after)).rates
    assert (made and (made.attempts, made.delivered, made.failed)) == rates
    assert frame(None, reading(2.3, *after)).rates is None


TROUBLED = [
    lane("a-host-with-quite-a-long-name.eu-central-1.customers.example.com:443", why="breaker", waiting=1000, held_s=12.5, concurrency=1, problem="the connection was refused", problem_s=3.0),
    lane("b.example.com:443", why="hold", waiting=20, held_s=40.0, problem="answered 429", problem_s=90.0),
    *(lane(f"c{n}.example.com:443", why="rate", rate=12.5, waiting=n, in_flight=2) for n in range(100)),
]  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 100, 140, 200])
@pytest.mark.parametrize("height", [14, 24, 50])
def test_a_frame_fits_the_terminal_and_says_the_same_at_any_width(width: int, height: int) -> None:
    shown = frame(reading(0, node(0, delivered=0)), reading(1, node(1, delivered=1234), lanes=TROUBLED))
    lines = [painted(line, width, colour=False) for line in page(shown, width, height)]
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    said = " ".join(" ".join(lines).split())
    for fact in (
        "2 in flight, 3 in memory, 1 daemon",
        "1,234/s attempts, 1,234/s delivered, 0.0/s failed",
        "10,000+ fresh, 12 with a due time, 1 dead letter, oldest 1 s",
        "9 active, 3 of them failing, 1 paused, 2 disabled",
    ):
        assert fact in said
    if width < 80:
        return
    for fact in (
        "probe in 12 s",
        "Retry-After 40 s",
        "3 s ago: the connection was",
        "1 min ago: answered 429",
        "12.5/s",
    ):
        assert fact in said
    table = lines[lines.index("") + 1 :]
    assert [len(line.partition("LIMIT")[0]) for line in table[:1]] == [
        line.find("1/50") - 1 for line in table[1:2]
    ]
    shown_lanes = sum(bool(re.match(r"\S+:443 ", line)) for line in table)
    assert shown_lanes >= 2
    assert lines[-1] == f"{len(TROUBLED) - shown_lanes} more"


def test_what_a_receiver_caused_cannot_move_the_cursor() -> None:
    (_, [line, *_]) = lanes_table([lane(problem="\x1b[2Jgone\nfor good", problem_s=1.0)], None)
    assert "1 s ago: ?[2Jgone?for good" in painted(line, None, colour=False)


@pytest.mark.usefixtures("one_server")
def test_top_prints_frames(dsn: str, cli: Cli, start_daemon: Callable[..., DaemonProcess]) -> None:
    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint_with_id(dsn, receiver.url)
            said = (await asyncio.to_thread(cli.ok, "top", "--once")).splitlines()
            assert said[1] == "no daemon is running; start one with `hookd run`"
            await asyncio.to_thread(start_daemon, HOOKD_LIMITS__RATE="20")
            await fetch(dsn, MANY, 10_000, "default")
            await receiver.wait_for_calls(
                60
            )  # three seconds: every summary that is still of use is of steady work

            frames = await asyncio.to_thread(cli.json, "top", "--count", "3", "--every", "500ms")
            assert len(frames) == 3
            at = [datetime.datetime.fromisoformat(f["at"]) for f in frames]
            assert all(
                later - earlier >= datetime.timedelta(seconds=0.5)
                for earlier, later in itertools.pairwise(at)
            )
            for shown in frames:
                assert 10 <= shown["rates"]["delivered"] <= 30
                assert shown["rates"]["attempts"] == shown["rates"]["delivered"]
                assert shown["rates"]["failed"] == 0
                assert shown["lanes"][0]["rate"] == 20
            assert frames[0]["lanes"][0]["queued"] > frames[2]["lanes"][0]["queued"]

            said = (await asyncio.to_thread(cli.ok, "top", "--once")).splitlines()
            assert said[0].startswith("hookd top  ")
            assert re.match(r"rates      \d+\.\d/s attempts, \d+\.\d/s delivered, 0\.0/s failed$", said[2])
            assert re.match(rf"127\.0\.0\.1:{receiver.port} .* 20/s  closed   (rate|its turn) ", said[-1])
            two = await asyncio.to_thread(cli.ok, "top", "--count", "2")
            assert two.count("hookd top  ") == 2
            assert "\x1b" not in two

    asyncio.run(go())


@pytest.mark.parametrize("arguments", [["--every", "1x"], ["--every", "10ms"], ["--count", "0"]])
def test_top_refuses(cli: Cli, arguments: list[str]) -> None:
    assert len(cli.fails(2, "top", *arguments).splitlines()) == 1


CONTROL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "hookd", *sys.argv[1:]])
"""
"""Makes the terminal that of its session, so that Ctrl-C is a signal."""


class Terminal:
    """A pseudo-terminal with a program on it."""

    def __init__(self, *arguments: str, width: int, height: int, environment: dict[str, str]) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (height, width))
        self.before = termios.tcgetattr(self.slave)
        self.shown = ""
        """What nobody has waited for yet."""
        self.everything = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROL, *arguments],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "TERM": "xterm", **environment},
        )  # fmt: skip

    def wait_for(self, what: str, deadline_s: float = 30.0) -> None:
        """Wait until it has shown something since this was asked last."""
        until = time.monotonic() + deadline_s
        while what not in self.shown:
            assert time.monotonic() < until, f"never {what!r}: {self.shown!r}"
            self._read(0.1)
        self.shown = self.shown.partition(what)[2]

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait(self, deadline_s: float = 20.0) -> int:
        """Read on until it ends; returns its exit status."""
        until = time.monotonic() + deadline_s
        while self.process.poll() is None:
            assert time.monotonic() < until, f"it does not end: {self.shown!r}"
            self._read(0.05)
        while self._read(0.0):
            pass
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self.master)
        os.close(self.slave)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        said = os.read(self.master, 65536).decode()
        self.shown += said
        self.everything += said
        return True


@pytest.fixture
def terminal(dsn: str) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(*arguments: str, width: int = 80, height: int = 24, **environment: str) -> Terminal:
        opened.append(
            Terminal(
                *arguments,
                width=width,
                height=height,
                environment={"HOOKD_DATABASE__DSN": dsn, **environment},
            )
        )
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


ENTERED, LEFT = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


@pytest.mark.parametrize("key", ["q", "\x03", "SIGTERM"])
def test_top_takes_the_terminal_and_gives_it_back(
    dsn: str, terminal: Callable[..., Terminal], start_daemon: Callable[..., DaemonProcess], key: str
) -> None:
    start_daemon(HOOKD_LIMITS__RATE="0.01")

    async def prepare() -> str:
        url = await port_of_nobody()
        await add_endpoint_with_id(dsn, url)
        await fetch(dsn, MANY, 5, "default")
        return url.split("/")[2]

    host = asyncio.run(prepare())
    shown = terminal("top", "--every", "200ms")
    shown.wait_for(ENTERED)
    shown.wait_for("\x1b[1mhookd top")
    shown.wait_for(host)
    assert not termios.tcgetattr(shown.slave)[3] & (termios.ECHO | termios.ICANON)
    shown.wait_for("\x1b[1mhookd top")  # again and again
    # another size: drawn anew, on fewer lines
    termios.tcsetwinsize(shown.slave, (9, 140))
    shown.process.send_signal(signal.SIGWINCH)
    shown.wait_for("BREAKER")
    if key == "SIGTERM":
        shown.process.terminate()
    else:
        shown.type("x" + key)
    assert shown.wait() == 0
    assert shown.shown.endswith(LEFT)
    assert termios.tcgetattr(shown.slave) == shown.before


def test_top_survives_the_loss_of_its_session_and_needs_no_colour(
    dsn: str, terminal: Callable[..., Terminal], start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon()
    shown = terminal("top", "--every", "200ms", NO_COLOR="1")
    shown.wait_for("1 daemon")
    asyncio.run(
        fetch(dsn, "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'hookd top' and datname = current_database()")
    )  # fmt: skip
    shown.wait_for("PostgreSQL is away, trying again")
    shown.wait_for("hookd top  ")
    shown.type("q")
    assert shown.wait() == 0
    assert re.findall(r"\x1b\[[\d;]*m", shown.everything) == []


def test_top_that_cannot_begin_leaves_the_terminal_as_it_was(terminal: Callable[..., Terminal]) -> None:
    shown = terminal("top", HOOKD_DATABASE__DSN="postgresql://nobody@127.0.0.1:1/none")
    assert shown.wait() == 1
    assert shown.shown.count("nobody@127.0.0.1:1") == 1
    assert "Traceback" not in shown.shown
    assert termios.tcgetattr(shown.slave) == shown.before
    assert shown.shown.rindex(LEFT) < shown.shown.rindex("nobody")
