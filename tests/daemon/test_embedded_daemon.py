"""The daemon with a PostgreSQL of its own, as a stranger starts it in an empty directory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon_process import DaemonProcess, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hookd-"))
    folder.chmod(0o755)
    yield folder
    for pid_file in folder.rglob("postmaster.pid"):
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGQUIT)
    shutil.rmtree(folder, ignore_errors=True)


def hookd(place: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hookd", *arguments],
        env={"PATH": "/usr/bin:/bin", "HOOKD_NETWORK__ALLOW": '["127.0.0.0/8"]'},
        capture_output=True, text=True, cwd=place, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def postmaster(place: Path) -> int:
    return int((place / ".hookd" / "data" / "postmaster.pid").read_text().split()[0])


def test_from_nothing_to_an_event_that_arrived(place: Path) -> None:
    daemon = DaemonProcess(place, {})
    daemon.wait_ready()
    assert len(daemon.said("embedded PostgreSQL is for trying out")) == 1
    listen = subprocess.Popen(
        [sys.executable, "-m", "hookd", "listen", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
    )
    assert listen.stderr is not None
    assert listen.stdout is not None
    url = re.search(r"http://\S+", listen.stderr.readline())
    assert url
    added = hookd(place, "endpoint", "add", url[0], "--type", "order.*")
    assert "whsec_" in added
    event = hookd(place, "send", "order.paid", "--data", '{"order": 17}').strip()
    told = ""
    while '"data":{"order": 17}' not in told:
        line = listen.stdout.readline()
        assert line, told
        told += line
    assert event in told
    listen.terminate()
    listen.communicate()
    pid = postmaster(place)
    assert daemon.stop() == 0
    daemon.kill()
    assert not (place / ".hookd" / "data" / "postmaster.pid").exists(), (
        f"the server {pid} stops with its last user"
    )
    assert event in hookd(place, "event", "list"), "and what it knew is there the next time"


def test_two_daemons_on_one_data_dir_and_a_kill_9(place: Path) -> None:
    first = DaemonProcess(place, {})
    first.wait_ready()
    second = DaemonProcess(place, {})
    second.wait_ready()
    pid = postmaster(place)
    first.kill()
    second.wait_for("shards acquired")
    assert postmaster(place) == pid
    assert second.stop() == 0
    second.kill()
    assert not (place / ".hookd" / "data" / "postmaster.pid").exists()


def test_a_server_that_died_is_started_again(place: Path) -> None:
    daemon = DaemonProcess(place, {})
    daemon.wait_ready()
    pid = postmaster(place)
    os.kill(pid, signal.SIGKILL)
    daemon.wait_for("database is back")
    assert postmaster(place) != pid
    hookd(place, "send", "a")
    assert daemon.stop() == 0
    daemon.kill()


def test_an_empty_directory_refuses_loopback_and_says_why(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hookd", "endpoint", "add", "http://127.0.0.1:9000/"],
        env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, cwd=place, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "network.allow" in done.stderr


def test_a_daemon_that_is_killed_leaves_nothing_behind_that_stops_the_next(place: Path) -> None:
    for _ in range(3):
        daemon = DaemonProcess(place, {})
        daemon.wait_ready()
        daemon.kill()
    wait_until((place / ".hookd" / "data" / "postmaster.pid").exists, "the server runs on")
    last = DaemonProcess(place, {})
    last.wait_ready()
    assert last.stop() == 0
    last.kill()
    assert not (place / ".hookd" / "data" / "postmaster.pid").exists()
