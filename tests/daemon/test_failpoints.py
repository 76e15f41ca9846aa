"""A daemon dies at each of the ten moments where that is worst, and the next one goes on: nothing lost, little twice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from hookd.failpoints import MOMENTS, FailpointUnknown, arm
from tests.daemon_process import DaemonProcess
from tests.producing import add_endpoint, fetch, wait_empty, wait_for_row
from tests.receiver import OK, Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.receiver import Call

EVENTS = 300

PASSES = {
    "before-send": 20, "after-send": 1, "answer-read": 1, "verdict-queued": 1, "batch-built": 1, "commit-sent": 1,
    "commit-answered": 1, "memory-cleaned": 2, "recovery-page": 2, "shard-released": 1,
}  # fmt: skip
"""Which pass each dies at; few have another daemon beside them, so that one comes last."""

NOTHING_SETTLED = {"after-send", "answer-read", "verdict-queued", "batch-built"}
"""At those passes: no COMMIT was sent."""


@pytest.fixture
def start(dsn: str, tmp_path: Path) -> Iterator[Callable[[str], DaemonProcess]]:
    daemons: list[DaemonProcess] = []

    def begin(failpoint: str) -> DaemonProcess:
        daemons.append(DaemonProcess(tmp_path, {"HOOKD_DATABASE__DSN": dsn, "HOOKD_FAILPOINT": failpoint}))
        return daemons[-1]

    yield begin
    for daemon in daemons:
        daemon.kill()


async def insert(dsn: str) -> set[str]:
    rows = await fetch(
        dsn,
        "insert into hookd.event (type, payload) select 'a.b', '{}' from generate_series(1, $1::integer) returning id",
        EVENTS,
    )
    return {str(row["id"]) for row in rows}


async def settled(dsn: str) -> set[str]:
    """Once the dead daemon's sessions have ended: what they did not commit by then they never will."""
    await wait_for_row(
        dsn,
        """select 1 where not exists (select from pg_stat_activity
            where application_name like 'hookd %' and datname = current_database())""",
    )
    rows = await fetch(dsn, "select event_id from hookd.attempt where verdict = 'delivered'")
    return {str(row["event_id"]) for row in rows}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("server_dsn", ["embedded"], indirect=True)
def test_a_crash_at_each_moment_loses_nothing(dsn: str, start: Callable[[str], DaemonProcess]) -> None:
    assert set(PASSES) == set(MOMENTS)
    answered: Counter[str] = Counter()

    async def handle(call: Call, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.005)
        writer.write(OK)
        answered[call.event_id] += 1

    async def go() -> None:
        async with Receiver(handle) as receiver:
            await add_endpoint(dsn, receiver.url)
            inserted: set[str] = set()
            in_hand = 0
            for moment, nth in PASSES.items():
                inserted |= await insert(dsn)
                done_before = await settled(dsn)
                calls_before = len(receiver.calls)
                daemon = start(f"{moment}=crash@{nth}")
                second = None
                if moment == "shard-released":
                    await asyncio.to_thread(daemon.wait_ready)
                    second = start("")
                await asyncio.to_thread(daemon.process.wait, 60)
                assert daemon.process.returncode == -signal.SIGKILL, daemon.log()
                if second is not None:
                    await wait_empty(dsn)
                    assert second.stop() == 0
                done = await settled(dsn)
                assert done_before <= done
                if moment in NOTHING_SETTLED:
                    assert done == done_before, moment
                if moment in ("commit-sent", "commit-answered"):
                    assert done > done_before, f"{moment}: the COMMIT was on its way"
                if moment != "recovery-page":
                    assert len(receiver.calls) > calls_before, moment
                # whatever was settled before is not sent again
                again = Counter(call.event_id for call in receiver.calls[calls_before:])
                assert not done_before & set(again), moment
                if second is None:
                    # and what one life sends, it sends once
                    assert set(again.values()) <= {1}, moment
                    in_hand += len(set(again) - done)
            last = start("")
            await asyncio.to_thread(last.wait_ready)
            await wait_empty(dsn)
            assert last.stop() == 0
            assert set(answered) == inserted, "every event arrived, and none that was not sent"
            assert await settled(dsn) == inserted
            assert len(receiver.calls) - len(inserted) <= in_hand, (
                "twice at most: what was in flight or unsettled"
            )

    asyncio.run(go())


@pytest.mark.parametrize("server_dsn", ["embedded"], indirect=True)
def test_a_pause_is_a_stop_that_can_be_ended(dsn: str, start: Callable[[str], DaemonProcess]) -> None:
    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            inserted = await insert(dsn)
            daemon = start("commit-sent=pause")
            _, status = await asyncio.to_thread(os.waitpid, daemon.process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            # the COMMIT reached PostgreSQL, which may be at it still; nobody reads its answer
            row = await wait_for_row(dsn, "select count(*) as n from hookd.attempt having count(*) > 0")
            assert 0 < row["n"] <= len(inserted), "the COMMIT reached PostgreSQL, nobody reads its answer"
            daemon.signal(signal.SIGCONT)
            await wait_empty(dsn)
            assert Counter(call.event_id for call in receiver.calls) == Counter(inserted)
            assert daemon.stop() == 0

    asyncio.run(go())


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("commit-sent", "not of the form NAME=crash@N"),
        ("commit-sent=crash@0", "not of the form NAME=crash@N"),
        ("commit=crash@1", "commit is none of before-send"),
        ("commit-sent=explode", "explode is none of crash, pause"),
    ],
)
def test_a_wrong_failpoint_is_refused_in_one_line(spelled: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hookd", "run"],
        env={"HOOKD_FAILPOINT": spelled, "HOOKD_DATABASE__DSN": "postgresql://nobody@127.0.0.1:1/x"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    with pytest.raises(FailpointUnknown, match="HOOKD_FAILPOINT"):
        arm(spelled)
