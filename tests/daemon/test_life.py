"""The daemon's life: drains, dies, comes back, loses its database, shares it, reloads."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from tests.daemon_process import DaemonProcess, wait_until
from tests.producing import add_endpoint, add_endpoint_with_id, fetch, send, wait_empty, wait_for_row
from tests.receiver import OK, Call, Receiver, answer

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_server")

Start = "Callable[..., DaemonProcess]"


def metric(daemon: DaemonProcess, name: str) -> float:
    with urllib.request.urlopen(f"{daemon.admin}/metrics", timeout=10) as got:
        for line in got.read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split(" ")[1])
    raise AssertionError(name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(
    dsn: str, start_daemon: Callable[..., DaemonProcess], number: signal.Signals
) -> None:
    daemon = start_daemon()
    release = asyncio.Event()

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(OK)

    async def go() -> None:
        async with Receiver(handle) as receiver:
            await add_endpoint(dsn, receiver.url)
            for _ in range(5):
                await send(dsn)
            await receiver.wait_for_calls(5)
            daemon.signal(number)
            said = await asyncio.to_thread(daemon.wait_for, "draining")
            assert said["signal"] == number.name
            late = await send(dsn)
            release.set()
            assert await asyncio.to_thread(daemon.process.wait, 30) == 0
            assert len(receiver.calls) == 5
            rows = await fetch(dsn, "select event_id::text, state from hookd.delivery_status")
            assert sorted(r["state"] for r in rows) == ["delivered"] * 5 + ["pending"]
            assert [r["event_id"] for r in rows if r["state"] == "pending"] == [late]

    asyncio.run(go())
    assert daemon.said("stopped")[0]["cut_off"] == 0


def test_a_second_signal_stops_at_once(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    """What was in flight is sent again by the next daemon, as the log has said."""
    daemon = start_daemon()
    stuck = True

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        if stuck:
            await asyncio.sleep(3600)
        writer.write(OK)

    async def go() -> None:
        nonlocal stuck
        async with Receiver(handle) as receiver:
            await add_endpoint(dsn, receiver.url)
            event = await send(dsn)
            await receiver.wait_for_calls(1)
            daemon.signal(signal.SIGTERM)
            await asyncio.to_thread(daemon.wait_for, "draining")
            daemon.signal(signal.SIGTERM)
            assert await asyncio.to_thread(daemon.process.wait, 10) == 0
            assert (daemon.said("stopped")[0]["cut_off"], daemon.said("stopped")[0]["may_be_sent_again"]) == (
                1,
                1,
            )
            stuck = False
            await asyncio.to_thread(start_daemon)
            await wait_empty(dsn)
            assert [c.event_id for c in receiver.calls] == [event, event]

    asyncio.run(go())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_as_closed_as_it_says() -> None:
    """Its exposure, from 0 to 10, by systemd's own count."""
    unit = Path(__file__).parent.parent.parent / "deploy" / "hookd@.service"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


def test_systemd_is_told_what_it_waits_for(dsn: str, tmp_path: Path) -> None:
    """Stopping as it begins to stop, not when it has; and at a start without a database that it is not to be killed for that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        address = str(tmp_path / "notify")
        listener.bind(address)
        listener.settimeout(30)
        said: list[str] = []

        def wait_for(state: str) -> None:
            while not any(state in s for s in said):
                said.append(listener.recv(1000).decode())

        nobody = DaemonProcess(
            tmp_path, {"HOOKD_DATABASE__DSN": "postgresql://x@127.0.0.1:1/x", "NOTIFY_SOCKET": address}
        )
        daemon = nobody
        try:
            wait_for("EXTEND_TIMEOUT_USEC=")
            wait_for("STATUS=waiting for the database")
            assert nobody.stop() == 0
            said.clear()
            daemon = DaemonProcess(tmp_path, {"HOOKD_DATABASE__DSN": dsn, "NOTIFY_SOCKET": address})
            wait_for("READY=1")
            asyncio.run(_stops_with_one_in_flight(dsn, daemon, lambda: wait_for("STOPPING=1")))
        finally:
            nobody.kill()
            daemon.kill()


async def _stops_with_one_in_flight(
    dsn: str, daemon: DaemonProcess, stopping_is_said: Callable[[], None]
) -> None:
    release = asyncio.Event()

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(OK)

    async with Receiver(handle) as receiver:
        await add_endpoint(dsn, receiver.url)
        await send(dsn)
        await receiver.wait_for_calls(1)
        daemon.signal(signal.SIGTERM)
        await asyncio.to_thread(stopping_is_said)
        assert daemon.process.poll() is None
        release.set()
        assert await asyncio.to_thread(daemon.process.wait, 30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what the limit is")
def test_descriptors_are_raised_as_far_as_the_system_allows(dsn: str, tmp_path: Path) -> None:
    """At the start: what a reload wants beyond that needs a restart, and is told."""
    file = tmp_path / "c.toml"
    file.write_text("")
    settings = {"HOOKD_DATABASE__DSN": dsn, "HOOKD_CONFIG": str(file)}
    daemon = DaemonProcess(tmp_path, settings, ["sh", "-c", 'ulimit -S -n 150 && exec "$@"', "sh"])
    try:
        daemon.wait_ready()
        limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
        soft, hard = line.split()[3:5]
        assert int(soft) == min(int(hard), 2 * 2000 + 1024)
        assert not daemon.said("fewer file descriptors")
        file.write_text("[delivery]\nmax_in_flight = 100000\n")
        daemon.signal(signal.SIGHUP)
        assert daemon.wait_for("these keys have changed")["keys"] == ["delivery.max_in_flight"]
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_kill_9_loses_nothing(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.002)
        writer.write(OK)

    async def go() -> None:
        async with Receiver(handle) as receiver:
            await add_endpoint(dsn, receiver.url)
            await fetch(
                dsn,
                "insert into hookd.event (type, payload) select 'a', n::text from generate_series(1, 6000) n",
            )
            in_flight = 50
            daemon = await asyncio.to_thread(start_daemon)
            for rounds in (800, 2500):
                await receiver.wait_for_calls(rounds)
                daemon.kill()
                daemon = await asyncio.to_thread(start_daemon)
            await wait_empty(dsn)
            arrived = [c.event_id for c in receiver.calls]
            assert len(set(arrived)) == 6000
            # in flight, or answered and not yet settled: a batch or two
            assert len(arrived) - 6000 <= 2 * (in_flight + 2000)
            (row,) = await fetch(dsn, "select count(*) from hookd.attempt where verdict = 'delivered'")
            assert row["count"] == 6000

    asyncio.run(go())


def test_the_database_goes_and_comes_back(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon()

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            for expected in (1, 2, 3):
                await fetch(
                    dsn,
                    """select pg_terminate_backend(pid) from pg_stat_activity
                        where datname = current_database() and application_name like 'hookd %'""",
                )
                await send(dsn)
                await wait_empty(dsn)
                assert len(receiver.calls) == expected

    asyncio.run(go())
    daemon.wait_for("database is back")
    assert len(daemon.said("database lost")) <= 3
    assert not daemon.said("internal error")
    assert daemon.stop() == 0


def test_results_of_a_lost_session_are_settled_on_the_next(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """The answer comes while the database is away: it is not sent again."""
    start_daemon()
    release = asyncio.Event()

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(OK)

    async def go() -> None:
        async with Receiver(handle) as receiver:
            await add_endpoint(dsn, receiver.url)
            await send(dsn)
            await receiver.wait_for_calls(1)
            await fetch(
                dsn,
                """select pg_terminate_backend(pid) from pg_stat_activity
                    where datname = current_database() and application_name like 'hookd %'""",
            )
            release.set()
            await wait_empty(dsn)
            assert len(receiver.calls) == 1

    asyncio.run(go())


def test_two_daemons_share_a_database_and_one_takes_over(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    first = start_daemon()
    second = start_daemon()

    async def until_owned(shards: float) -> None:
        async with asyncio.timeout(20):
            while metric(second, "hookd_shards_owned") != shards:
                await asyncio.sleep(0.05)

    async def go() -> None:
        await until_owned(32)
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            await send(dsn)
            await wait_empty(dsn)
            first.kill()
            await send(dsn)
            await wait_empty(dsn)
            assert len(receiver.calls) == 2
        await until_owned(64)

    asyncio.run(go())


NOT_APPLIED = "configuration not applied"

BAD_FILES = (
    ('[delivery]\nformat = "rwa"\n', "delivery.format"),
    ('[delivery]\nformat = "standard"\ntimeuot = "3s"\n', "timeuot"),
    ('[delivery]\nformat = "stan', "c.toml"),
    ('[delivry]\nformat = "standard"\n', "delivry"),
    ("[delivery]\ntimeout = -1\n", "delivery.timeout"),
    ("\x00\xff", "c.toml"),
    (None, "c.toml"),
)
"""Half-written, unknown keys, values that cannot be; and the mistake that is told."""


def test_a_reload_applies_what_can_be_and_a_bad_one_changes_nothing(
    dsn: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[delivery]\nformat = "standard"\n')
    daemon = start_daemon(HOOKD_CONFIG=str(file))

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            file.write_text('[delivery]\nformat = "raw"\n')
            daemon.signal(signal.SIGHUP)
            await asyncio.to_thread(daemon.wait_for, "configuration applied")
            await send(dsn, payload='{"a":  1}')
            await wait_empty(dsn)
            assert receiver.calls[0].body == b'{"a":  1}'
            file.write_text('[delivery]\nformat = "raw"\n[network]\nnameservers = ["127.0.0.9"]\n')
            daemon.signal(signal.SIGHUP)
            said = await asyncio.to_thread(daemon.wait_for, "these keys have changed and need a restart")
            assert said["keys"] == ["network.nameservers"]
            for n, (text, mistake) in enumerate(BAD_FILES, 1):
                if text is None:
                    file.unlink()
                    file.mkdir()  # it cannot be read
                else:
                    file.write_text(text)
                daemon.signal(signal.SIGHUP)
                await asyncio.to_thread(wait_until, lambda: len(daemon.said(NOT_APPLIED)) == n, "refused")  # noqa: B023
                assert mistake in daemon.said(NOT_APPLIED)[-1]["mistakes"][0]
                assert await asyncio.to_thread(metric, daemon, "hookd_config_reload_success") == 0
                await send(dsn, payload='{"a":  2}')
                await wait_empty(dsn)
                assert receiver.calls[n].body == b'{"a":  2}', "as the last good file said"

    asyncio.run(go())
    assert len(daemon.said("configuration applied")) == 2


def test_a_reload_that_denies_a_host_ends_what_is_open_to_it(
    dsn: str, tmp_path: Path, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """The connection that was kept is not used again."""
    file = tmp_path / "c.toml"
    file.write_text("")
    daemon = start_daemon(HOOKD_CONFIG=str(file))

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            await send(dsn)
            await receiver.wait_for_calls(1)
            await wait_empty(dsn)
            file.write_text('[network]\ndeny = ["127.0.0.0/8"]\n')
            daemon.signal(signal.SIGHUP)
            await asyncio.to_thread(daemon.wait_for, "configuration applied")
            await receiver.wait_closed()
            await send(dsn)
            row = await wait_for_row(
                dsn, "select outcome, reason from hookd.attempt where verdict <> 'delivered'"
            )
            assert row["outcome"] == "blocked"
            assert len(receiver.calls) == receiver.connections == 1

    asyncio.run(go())


def test_pause_resume_remove(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon()

    async def set_state(endpoint: Any, state: str) -> None:
        await fetch(dsn, "update hookd.endpoint set state = $2 where id = $1", endpoint, state)

    async def go() -> None:
        async with Receiver() as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            await set_state(endpoint, "paused")
            event = await send(dsn)
            _, witness = await add_endpoint_with_id(dsn, receiver.url, types=["witness"])
            await send(dsn, "witness")
            await wait_for_row(
                dsn,
                "select 1 from hookd.delivery_status where endpoint_id = $1 and state = 'delivered'",
                witness,
            )
            (row,) = await fetch(dsn, "select state from hookd.delivery_status where event_id = $1", event)
            assert row["state"] == "pending"
            await set_state(endpoint, "active")
            await wait_empty(dsn)
            assert event in [c.event_id for c in receiver.calls]
            await set_state(endpoint, "paused")
            waiting = await send(dsn)
            await set_state(endpoint, "removed")
            await wait_empty(dsn)
            (row,) = await fetch(
                dsn, "select state, reason, attempts from hookd.delivery_status where event_id = $1", waiting
            )
            assert tuple(row) == ("cancelled", "endpoint removed", 0)

    asyncio.run(go())


def test_times(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon()

    async def go() -> None:
        async with Receiver() as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            now = datetime.datetime.now(datetime.UTC)
            later = await send(dsn, deliver_at=now + datetime.timedelta(seconds=1.5))
            await fetch(dsn, "update hookd.endpoint set state = 'paused' where id = $1", endpoint)
            expired = await send(dsn, expires_at=now + datetime.timedelta(seconds=1))
            await wait_for_row(
                dsn, "select 1 where clock_timestamp() > $1", now + datetime.timedelta(seconds=1)
            )
            await fetch(dsn, "update hookd.endpoint set state = 'active' where id = $1", endpoint)
            await wait_empty(dsn)
            assert datetime.datetime.now(datetime.UTC) >= now + datetime.timedelta(seconds=1.5)
            assert [c.event_id for c in receiver.calls] == [later]
            (row,) = await fetch(dsn, "select state from hookd.delivery_status where event_id = $1", expired)
            assert row["state"] == "expired"

    asyncio.run(go())


def test_formats_and_headers(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(HOOKD_DELIVERY__THIN_URL="https://api.example.com/events/{event_id}")

    async def go() -> None:
        async with Receiver() as receiver:
            for form in ("standard", "raw", "cloudevents", "thin"):
                await add_endpoint(
                    dsn, receiver.url.replace("/hook", f"/{form}"), format=form, headers={"x-form": form}
                )
            event = await send(dsn, "user.created", '{"id":  1}', headers='{"x-trace": "t"}')
            await wait_empty(dsn)
            calls = {c.path: c for c in receiver.calls}
            assert set(calls) == {"/standard", "/raw", "/cloudevents", "/thin"}
            for path, call in calls.items():
                assert call.method == "POST"
                assert call.headers["x-form"] == path[1:]
                assert call.headers["x-trace"] == "t"
                assert call.headers["accept-encoding"] == "identity"
                assert call.headers["user-agent"].startswith("hookd/")
                assert call.event_id == event
            assert calls["/raw"].body == b'{"id":  1}'
            assert calls["/cloudevents"].headers["content-type"] == "application/cloudevents+json"
            thin = json.loads(calls["/thin"].body)
            query = dict(part.split("=") for part in thin["url"].partition("?")[2].split("&"))
            (row,) = await fetch(
                dsn,
                "select hookd.check_thin($1, $2, $3) as ok",
                event,
                int(query["expires"]),
                query["signature"],
            )
            assert row["ok"] is True

    asyncio.run(go())


def test_a_rotated_secret_signs_beside_the_new_one(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    from hookd.core.sealing import PLAIN
    from hookd.core.signing import new_secret, verify
    from hookd.postgres import registry

    start_daemon()

    async def go() -> None:
        async with Receiver() as receiver:
            old, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            new = new_secret(b"n" * 32)
            connection = await asyncpg.connect(dsn)
            await registry.rotate(connection, endpoint, new, 1.5, keyring=PLAIN)
            await send(dsn)
            await wait_empty(dsn)
            call = receiver.calls[0]
            now = int(call.headers["webhook-timestamp"])
            assert verify(old, call.headers, call.body, now).valid
            assert verify(new.reveal(), call.headers, call.body, now).valid
            async with asyncio.timeout(20):
                while True:
                    await send(dsn)
                    await wait_empty(dsn)
                    call = receiver.calls[-1]
                    assert verify(new.reveal(), call.headers, call.body, now + 1).valid
                    if not verify(old, call.headers, call.body, now + 1).valid:
                        break
            await connection.close()

    asyncio.run(go())


def test_an_endpoint_that_moves_takes_its_deliveries_along(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["200ms", "200ms", "200ms", "200ms", "200ms"]')

    async def fail(_call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(500))

    async def go() -> None:
        async with Receiver(fail) as before, Receiver() as after:
            _, endpoint = await add_endpoint_with_id(dsn, before.url)
            event = await send(dsn)
            await before.wait_for_calls(1)
            await fetch(
                dsn,
                "update hookd.endpoint set url = $2, host = $3 where id = $1",
                endpoint,
                after.url,
                f"127.0.0.1:{after.port}",
            )
            await wait_empty(dsn)
            assert [c.event_id for c in after.calls] == [event]

    asyncio.run(go())


def test_a_backlog_larger_than_memory(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    """20,000 deliveries inserted at once, to a window of 400 rows, beside an endpoint that is quick to serve."""
    daemon = start_daemon(HOOKD_DELIVERY__MAX_IN_FLIGHT="100")

    async def go() -> None:
        async with Receiver() as big, Receiver() as small:
            await add_endpoint(dsn, big.url, types=["big"])
            await add_endpoint(dsn, small.url, types=["small"])
            await fetch(
                dsn,
                "insert into hookd.event (type, payload) select 'big', n::text from generate_series(1, 20000) n",
            )
            await big.wait_for_calls(100)
            event = await send(dsn, "small")
            await small.wait_for_calls(1)
            assert small.calls[0].event_id == event
            assert len(big.calls) < 20000
            await wait_empty(dsn)
            arrived = [c.event_id for c in big.calls]
            assert len(arrived) == len(set(arrived)) == 20000

    asyncio.run(go())
    assert not daemon.said("internal error")


def test_order_keys(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(HOOKD_RETRY__SCHEDULE='["50ms", "50ms", "50ms", "50ms", "50ms"]')

    def fails(call: Call) -> bool:
        return json.loads(call.body)[1] % 4 == 0 and int(call.headers["hookd-attempt"]) < 3

    async def sometimes(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(500) if fails(call) else OK)

    async def go() -> None:
        async with Receiver(sometimes) as receiver:
            await add_endpoint(dsn, receiver.url, format="raw")
            for n in range(30):
                await send(dsn, payload=json.dumps([n % 3, n]), order_key=f"k{n % 3}")
            await wait_empty(dsn)
            delivered: dict[int, list[int]] = {0: [], 1: [], 2: []}
            for call in receiver.calls:
                if not fails(call):
                    key, n = json.loads(call.body)
                    delivered[key].append(n)
            for key, numbers in delivered.items():
                assert numbers == list(range(key, 30, 3))

    asyncio.run(go())


def test_probes(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon()
    for path in ("/healthz", "/readyz", "/metrics", "/"):
        with urllib.request.urlopen(daemon.admin + path, timeout=10) as got:
            assert got.status == 200
    refused = urllib.request.Request(daemon.admin + "/api/v1/status", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(refused, timeout=10)
    assert raised.value.code == 403
    raised.value.close()


def test_the_log_holds_no_secret(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = start_daemon(HOOKD_LOG__LEVEL="debug", HOOKD_RETRY__SCHEDULE="[]")

    async def echo(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(500, call.body + call.raw_head))

    async def go() -> str:
        async with Receiver(echo) as receiver:
            secret, _ = await add_endpoint_with_id(
                dsn, receiver.url, headers={"authorization": "Bearer hidden-token"}
            )
            await send(dsn, payload='"hidden-payload"')
            await wait_empty(dsn)
            return secret

    secret = asyncio.run(go())
    wait_until(lambda: bool(daemon.said("attempt failed")), "the failure is logged")
    text = json.dumps(daemon.log())
    for hidden in (secret, secret.removeprefix("whsec_"), "hidden-token", "hidden-payload"):
        assert hidden not in text
    with contextlib.suppress(IndexError):
        assert {"delivery_id", "endpoint_id", "host", "attempt", "event_id"} <= set(
            daemon.said("attempt failed")[0]
        )


def test_a_slow_database_slows_the_sending(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    """While results cannot be written nothing piles up without bound, and nothing is sent twice afterwards."""
    daemon = start_daemon(HOOKD_LIMITS__CONCURRENCY="0")

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            blocker = await asyncpg.connect(dsn)
            await blocker.execute("begin")
            await blocker.execute("lock table hookd.attempt in share mode")
            await fetch(
                dsn,
                "insert into hookd.event (type, payload) select 'a', '1' from generate_series(1, 30000) n",
            )
            await receiver.wait_for_calls(100)
            settled = 0
            async with asyncio.timeout(30):
                while settled < 40:  # two seconds without a request: it has stopped
                    before = len(receiver.calls)
                    await asyncio.sleep(0.05)
                    settled = settled + 1 if len(receiver.calls) == before else 0
            assert len(receiver.calls) <= 5000 + 2000
            await blocker.execute("rollback")
            await blocker.close()
            await wait_empty(dsn, deadline_s=100)
            arrived = [c.event_id for c in receiver.calls]
            assert len(arrived) == len(set(arrived)) == 30000

    asyncio.run(go())
    assert not daemon.said("internal error")
