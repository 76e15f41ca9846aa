"""What the daemon writes its log to: closed, full, or read by nobody."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

import hookd.logs
from hookd.config import LogConfig
from hookd.logs import Outlet, configure
from tests.daemon_process import DEFAULTS, wait_until
from tests.producing import add_endpoint, fetch, send, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("one_server")

MANY = "insert into hookd.event (type, payload) select 'a', '1' from generate_series(1, $1::integer)"

EVENTS = 2000
"""A line each, ten times what a pipe holds."""


def start(dsn: str, folder: Path, streams: str = "", **named: Any) -> subprocess.Popen[bytes]:
    settings = {
        **DEFAULTS,
        "HOOKD_DATABASE__DSN": dsn,
        "HOOKD_LOG__LEVEL": "debug",
        "HOOKD_SECURITY__CORE_DUMPS": "true",  # so that /proc shows its files
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HOOKD_")}
    return subprocess.Popen(
        ["sh", "-c", f'exec "$0" -m hookd run {streams}', sys.executable],
        env=inherited | settings,
        cwd=folder,
        **named,
    )


def test_closed_streams_are_not_taken_by_sockets(dsn: str, tmp_path: Path) -> None:
    daemon = start(dsn, tmp_path, "0<&- 1>&- 2>&-")

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            await send(dsn)
            await receiver.wait_for_calls(1)
            await wait_empty(dsn)

    try:
        asyncio.run(go())
        if Path("/proc/self/fd").exists():
            files = [Path(f"/proc/{daemon.pid}/fd/{n}").readlink() for n in (0, 1, 2)]
            assert files == [Path(os.devnull)] * 3
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0
    finally:
        daemon.kill()
        daemon.wait(10)


@pytest.mark.parametrize("read", [True, False])
def test_a_log_that_nobody_reads_holds_up_nothing(dsn: str, tmp_path: Path, *, read: bool) -> None:
    """It is read in the end, whole; or never, and the daemon ends all the same."""
    daemon = start(dsn, tmp_path, stderr=subprocess.PIPE)
    assert daemon.stderr is not None

    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            await fetch(dsn, MANY, EVENTS)
            await receiver.wait_for_calls(EVENTS)
            await wait_empty(dsn)

    try:
        asyncio.run(go())
        lines: list[bytes] = []
        reader = threading.Thread(target=lambda: lines.extend(daemon.stderr or []))
        if read:
            reader.start()
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0
        if read:
            reader.join(30)
            said = [json.loads(line)["event"] for line in lines]
            assert said.count("delivered") == EVENTS
            assert said[-1] == "stopped"
    finally:
        daemon.kill()
        daemon.wait(10)
        daemon.stderr.close()


@pytest.fixture
def configured() -> Iterator[None]:
    before = logging.root.handlers[:]
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = before


@pytest.mark.usefixtures("configured")
def test_lines_beyond_the_bound_are_lost_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(hookd.logs, "LINES_KEPT", 100)
    outlet = Outlet(writing)
    configure(LogConfig(format="json"), outlet)
    written = 1000
    for n in range(written):
        structlog.get_logger("hookd").info("x" * 2000, n=n)  # a pipe holds 64 KiB
    outlet.drain(0.0)
    numbers: list[int] = []
    lost = 0

    def take() -> None:
        nonlocal lost
        with os.fdopen(reading, "rb") as file:
            for line in map(json.loads, file):
                if "lost" in line["event"]:
                    lost += line["count"]
                else:
                    numbers.append(line["n"])
                if len(numbers) + lost == written:
                    return

    reader = threading.Thread(target=take)
    reader.start()
    wait_until(lambda: not reader.is_alive(), "the line that tells what was lost", 30)
    os.close(writing)
    assert lost > 0
    assert numbers == sorted(numbers)
    assert numbers[:100] == list(range(100)), "those that came when there was room"


@pytest.mark.usefixtures("configured")
def test_what_libraries_log_goes_the_same_way() -> None:
    reading, writing = os.pipe()
    outlet = Outlet(writing)
    configure(LogConfig(format="json"), outlet)
    logging.getLogger("asyncio").error("Task %s was never retrieved", 7)
    logging.getLogger("asyncio").info("not this")
    outlet.drain()
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        (line,) = map(json.loads, file)
    assert (line["event"], line["library"]) == ("a library says", "asyncio")
    assert line["said"] == "Task 7 was never retrieved"


@pytest.mark.usefixtures("configured")
def test_a_log_that_is_gone_harms_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    outlet = Outlet(writing)
    configure(LogConfig(format="json"), outlet)
    structlog.get_logger("hookd").info("to nobody")
    outlet.drain()
    assert outlet._lines.unfinished_tasks == 0, (
        "and it is not told to nobody, again and again, that nobody listens"
    )
    os.close(writing)
