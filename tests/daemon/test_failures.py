"""Receivers that fail, each in its way: the end is what the verdict table says, and the log of attempts tells why."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
import time
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest

from tests.producing import add_endpoint_with_id, fetch, send, wait_empty, wait_for_row
from tests.receiver import OK, Call, Receiver, always, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from tests.daemon_process import DaemonProcess

pytestmark = pytest.mark.usefixtures("one_server")

QUICK = {"HOOKD_RETRY__SCHEDULE": '["100ms", "150ms"]', "HOOKD_DELIVERY__TIMEOUT": "2s"}


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    return start_daemon(**QUICK)


def hookd(dsn: str, *arguments: str) -> list[Any]:
    """Run a command; returns its JSON lines."""
    done = subprocess.run(
        [sys.executable, "-m", "hookd", *arguments, "--json"],
        env={"HOOKD_DATABASE__DSN": dsn, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


async def deliver(dsn: str, receiver_url: str, **change: Any) -> tuple[str, list[Any]]:
    """Send one event to one endpoint, wait for its end; returns the attempts as ``hookd attempts`` shows them, oldest first."""
    await add_endpoint_with_id(dsn, receiver_url, **change)
    event = await send(dsn)
    await wait_empty(dsn)
    attempts = await asyncio.to_thread(hookd, dsn, "attempts", "--event", event)
    return event, attempts[::-1]


async def state_of(dsn: str, event: str) -> tuple[str, str | None]:
    (row,) = await fetch(dsn, "select state, reason from hookd.delivery_status where event_id = $1", event)
    return row["state"], row["reason"]


def scenario(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def run(dsn: str, daemon: DaemonProcess) -> None:
        asyncio.run(test(dsn))
        assert daemon.process.poll() is None
        assert not daemon.said("internal error")

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@scenario
async def test_500_twice_then_200(dsn: str) -> None:
    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(500, b"not now") if call.number <= 2 else OK)

    async with Receiver(handle) as receiver:
        event, attempts = await deliver(dsn, receiver.url)
        assert [a["verdict"] for a in attempts] == ["retry", "retry", "delivered"]
        assert [a["status"] for a in attempts] == [500, 500, 200]
        assert attempts[0]["answer_body"] == "not now"
        assert [c.headers["hookd-attempt"] for c in receiver.calls] == ["1", "2", "3"]
        assert len({c.event_id for c in receiver.calls}) == 1
        assert len({c.body for c in receiver.calls}) == 1
        assert await state_of(dsn, event) == ("delivered", None)


@scenario
async def test_always_500_then_dead_letter_then_replay(dsn: str) -> None:
    async with Receiver(always(answer(500))) as receiver:
        await add_endpoint_with_id(dsn, receiver.url.replace("/hook", "/operator"), tenant="hookd")
        event, attempts = await deliver(dsn, receiver.url)
        assert [a["verdict"] for a in attempts] == ["retry", "retry", "exhausted"]
        assert await state_of(dsn, event) == ("exhausted", "answered 500")
        (letter,) = await fetch(dsn, "select * from hookd.dead_letter where type = 'thing.made'")
        assert str(letter["event_id"]) == event
        assert letter["attempts"] == 3
        # the fact is an event of its own, to the operator's endpoint, which raises no further one when that fails
        (fact,) = await fetch(dsn, "select payload from hookd.event where type = 'hookd.delivery.exhausted'")
        assert json.loads(fact["payload"])["event_id"] == event
        receiver.handle = always(OK)
        assert (await asyncio.to_thread(hookd, dsn, "replay", "--event", event))[0]["queued"] == 1
        await wait_empty(dsn)
        assert await state_of(dsn, event) == ("delivered", None)
        last = [c for c in receiver.calls if c.path == "/hook"][-1]
        assert (last.event_id, last.headers["hookd-attempt"]) == (event, "1")
        (letter,) = await fetch(dsn, "select replayed_at from hookd.dead_letter where type = 'thing.made'")
        assert letter["replayed_at"] is not None


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_429_with_retry_after(dsn: str, daemon: DaemonProcess, form: str) -> None:
    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        value = "2" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)
        writer.write(answer(429, retry_after=value) if call.number == 1 else OK)

    async def go() -> None:
        async with Receiver(handle) as receiver:
            begun = time.monotonic()
            _, attempts = await deliver(dsn, receiver.url)
            assert [a["status"] for a in attempts] == [429, 200]
            # the schedule says 0.1 s; what the receiver asked for puts it off
            assert time.monotonic() - begun > 1.5

    asyncio.run(go())
    assert daemon.process.poll() is None


@scenario
async def test_410_disables_the_endpoint_and_missed_events_can_be_had(dsn: str) -> None:
    async with Receiver(always(answer(410))) as receiver:
        _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
        first = await send(dsn)
        row = await wait_for_row(
            dsn, "select state_reason from hookd.endpoint where id = $1 and state = 'disabled'", endpoint
        )
        assert row["state_reason"] == "answered 410 Gone"
        await wait_empty(dsn)
        assert (await state_of(dsn, first))[0] == "exhausted"
        second = await send(dsn)
        assert not await fetch(dsn, "select 1 from hookd.delivery")
        assert await fetch(dsn, "select 1 from hookd.event where type = 'hookd.endpoint.disabled'")
        receiver.handle = always(OK)
        (resumed,) = await asyncio.to_thread(
            hookd, dsn, "endpoint", "resume", str(endpoint), "--missed", "all"
        )
        assert resumed["state"] == "active"
        await wait_empty(dsn)
        assert [c.event_id for c in receiver.calls][-1] == second


@scenario
async def test_a_disabled_endpoints_pending_deliveries_become_dead_letters(dsn: str) -> None:
    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(410) if call.number == 4 else answer(500))

    async with Receiver(handle) as receiver:
        await add_endpoint_with_id(dsn, receiver.url, concurrency=1)
        for _ in range(4):
            await send(dsn)
        await wait_empty(dsn)
        reasons = await fetch(dsn, "select reason from hookd.dead_letter order by delivery_id")
        assert min(r["reason"] for r in reasons) == "answered 410 Gone"
        assert {r["reason"] for r in reasons[:3]} == {"endpoint disabled: answered 410 Gone"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_failures(dsn: str, daemon: DaemonProcess, status: int) -> None:
    async def go() -> None:
        async with (
            Receiver() as elsewhere,
            Receiver(always(answer(status, location=elsewhere.url))) as receiver,
        ):
            event, attempts = await deliver(dsn, receiver.url)
            assert [a["status"] for a in attempts] == [status] * 3
            assert (await state_of(dsn, event))[0] == "exhausted"
            assert not elsewhere.calls

    asyncio.run(go())
    assert daemon.process.poll() is None


@scenario
async def test_a_timeout_was_sent(dsn: str) -> None:
    async def handle(call: Call, writer: asyncio.StreamWriter) -> bool:
        if call.number == 1:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 20)
            return True
        writer.write(OK)
        return False

    async with Receiver(handle) as receiver:
        _, attempts = await deliver(dsn, receiver.url)
        assert [a["outcome"] for a in attempts] == ["timeout", "answered"]
        assert attempts[0]["sent"] is True
        assert 1900 < attempts[0]["total_ms"] < 4000


@scenario
async def test_a_timeout_in_the_middle_of_the_body_is_an_answer(dsn: str) -> None:
    async def handle(_call: Call, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(writer.wait_closed(), 20)
        return True

    async with Receiver(handle) as receiver:
        _, attempts = await deliver(dsn, receiver.url)
        (attempt,) = attempts
        assert (attempt["verdict"], attempt["status"], attempt["answer_body"]) == ("delivered", 200, "begun")
        assert attempt["answer_truncated"] is True


@scenario
async def test_a_refused_connection_was_not_sent(dsn: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        event, attempts = await deliver(dsn, f"http://127.0.0.1:{port}/")
    assert [a["outcome"] for a in attempts] == ["connect_refused"] * 3
    assert not any(a["sent"] for a in attempts)
    assert await state_of(dsn, event) == ("exhausted", "the connection was refused")


@scenario
async def test_a_reset_in_the_middle_of_the_answer(dsn: str) -> None:
    async def handle(call: Call, writer: asyncio.StreamWriter) -> bool:
        if call.number == 1:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf of it")
        await writer.drain()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return True

    async with Receiver(handle) as receiver:
        _, attempts = await deliver(dsn, receiver.url)
        # before the headers were complete: no answer; after them: an answer, whatever becomes of the body
        assert [a["outcome"] for a in attempts] == ["connection_lost", "answered"]
        assert attempts[0]["sent"] is True
        assert attempts[1]["verdict"] == "delivered"


@scenario
async def test_an_answer_of_50_megabytes_is_read_to_the_bound(dsn: str) -> None:
    written = 0

    async def handle(_call: Call, writer: asyncio.StreamWriter) -> bool:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 52428800\r\n\r\n")
        for _ in range(800):
            writer.write(b"x" * 65536)
            await writer.drain()
            written += 65536
        return True

    async with Receiver(handle) as receiver:
        _, attempts = await deliver(dsn, receiver.url)
        (attempt,) = attempts
        assert attempt["verdict"] == "delivered"
        assert attempt["answer_body"] == "x" * 16384
        assert attempt["answer_truncated"] is True
        assert written < 50 * 2**20
        await send(dsn)
        await wait_empty(dsn)
        assert receiver.connections == 2, "the connection with the rest of the answer must not be used again"


@scenario
async def test_a_hostile_answer_is_stored_harmless(dsn: str) -> None:
    hostile = b"nul \x00 esc \x1b[31m" + b" \xed\xa0\x80 \xff\xfe end"
    data = b"HTTP/1.1 500 X\r\nx-odd: \xff\xfe\x1b\r\ncontent-length: %d\r\n\r\n%b" % (len(hostile), hostile)
    async with Receiver(always(data)) as receiver:
        _, attempts = await deliver(dsn, receiver.url)
        assert len(attempts) == 3
        assert attempts[0]["status"] == 500
        for character in ("\x00", "\x1b", "\ud800"):
            assert character not in attempts[0]["answer_body"] + attempts[0]["answer_headers"]
        assert attempts[0]["answer_body"].endswith("end")


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 299 Odd\r\ncontent-type: image/png\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\n\x1f\x8bx",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200\r\nconnection: close\r\n\r\n",
    ],
    ids=["http-1.0", "no-content", "gzip-that-is-not", "interim", "chunked", "no-reason"],
)
def test_any_2xx_is_success(dsn: str, daemon: DaemonProcess, data: bytes) -> None:
    async def handle(_call: Call, writer: asyncio.StreamWriter) -> bool:
        writer.write(data)
        return True

    async def go() -> None:
        async with Receiver(handle) as receiver:
            _, attempts = await deliver(dsn, receiver.url)
            assert [a["verdict"] for a in attempts] == ["delivered"]

    asyncio.run(go())
    assert daemon.process.poll() is None


@scenario
async def test_what_is_not_http_is_malformed(dsn: str) -> None:
    async def handle(_call: Call, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        return True

    async with Receiver(handle) as receiver:
        event, attempts = await deliver(dsn, receiver.url)
        assert {a["outcome"] for a in attempts} == {"malformed"}
        assert await state_of(dsn, event) == ("exhausted", "the answer is not HTTP")


@scenario
async def test_a_poison_row_ends_as_its_own_failure(dsn: str) -> None:
    async with Receiver() as receiver:
        _, bad_url = await add_endpoint_with_id(dsn, receiver.url.replace("/hook", "/a"))
        _, bad_header = await add_endpoint_with_id(
            dsn, receiver.url.replace("/hook", "/b"), headers={"x-a": "b"}
        )
        await add_endpoint_with_id(dsn, receiver.url)
        await fetch(
            dsn, "update hookd.endpoint set url = 'http://127.0.0.1:99999999/' where id = $1", bad_url
        )
        await fetch(
            dsn,
            """update hookd.endpoint_secret set value = '{"x-a": "b\\r\\nx-injected: 1"}'
               where purpose = 'headers' and endpoint = (select key from hookd.endpoint where id = $1)""",
            bad_header,
        )
        await fetch(dsn, "update hookd.endpoint set updated_at = now() where id = $1", bad_header)
        event = await send(dsn)
        await wait_empty(dsn)
        rows = await fetch(
            dsn, "select endpoint_id, state, reason from hookd.delivery_status where event_id = $1", event
        )
        found = {r["endpoint_id"]: (r["state"], r["reason"]) for r in rows}
        assert found[bad_url] == ("exhausted", "the port is not a number from 1 to 65535")
        assert found[bad_header][0] == "exhausted"
        assert "x-a" in found[bad_header][1]
        assert [c.path for c in receiver.calls] == ["/hook"]


@scenario
async def test_a_blocked_address_is_not_dialled(dsn: str) -> None:
    event, attempts = await deliver(dsn, "http://10.1.2.3/")
    assert {a["outcome"] for a in attempts} == {"blocked"}
    assert not any(a["sent"] for a in attempts)
    assert await state_of(dsn, event) == ("exhausted", "the address is not allowed")


@scenario
async def test_an_events_own_bad_header_ends_that_event_alone(dsn: str) -> None:
    async with Receiver() as receiver:
        await add_endpoint_with_id(dsn, receiver.url)
        bad = await send(dsn, headers='{"host": "evil.example"}')
        good = await send(dsn, headers='{"x-trace": "1"}')
        await wait_empty(dsn)
        state, reason = await state_of(dsn, bad)
        assert state == "exhausted"
        assert "set by hookd" in str(reason)
        assert [c.event_id for c in receiver.calls] == [good]


def test_nothing_but_failures_disables(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(
        HOOKD_RETRY__SCHEDULE='["50ms", "50ms", "600ms", "50ms", "50ms"]', HOOKD_RETRY__DISABLE_AFTER="500ms"
    )

    async def go() -> None:
        async with Receiver(always(answer(500))) as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            await send(dsn)
            await wait_empty(dsn)
            (row,) = await fetch(
                dsn, "select state, state_reason, failing_since from hookd.endpoint where id = $1", endpoint
            )
            assert row["state"] == "disabled"
            assert row["state_reason"].startswith("nothing but failures for")
            assert row["failing_since"] is not None
            assert len(receiver.calls) == 4

    asyncio.run(go())


def test_a_success_in_between_does_not(dsn: str, start_daemon: Callable[..., DaemonProcess]) -> None:
    start_daemon(
        HOOKD_RETRY__SCHEDULE='["50ms", "50ms", "600ms", "50ms"]', HOOKD_RETRY__DISABLE_AFTER="500ms"
    )

    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(OK if call.number == 3 else answer(500))

    async def go() -> None:
        async with Receiver(handle) as receiver:
            _, endpoint = await add_endpoint_with_id(dsn, receiver.url)
            await send(dsn)
            await wait_empty(dsn)
            (row,) = await fetch(
                dsn, "select state, failing_since from hookd.endpoint where id = $1", endpoint
            )
            assert tuple(row) == ("active", None)

    asyncio.run(go())
