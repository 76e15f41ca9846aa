"""The daemon with a PostgreSQL of its own, as a stranger starts it in an empty directory."""

from __future__ import annotations

import base64
import contextlib
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


def hookd(place: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hookd", *arguments],
        env={"PATH": "/usr/bin:/bin", "HOOKD_NETWORK__ALLOW": '["127.0.0.0/8"]', **environment},
        capture_output=True, text=True, cwd=place, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


AUDIT = """
import os, sys
started = os.open(os.environ["STARTED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system"):
        os.write(started, f"{event} {arguments!r}\\n".encode())
sys.addaudithook(hook)
"""
"""For ``sitecustomize``: writes down every process that is started, however short it lives, with arguments and environment."""


def test_no_process_has_a_secret_in_its_arguments(place: Path) -> None:
    (place / "sitecustomize.py").write_text(AUDIT)
    token, master, signing, header = (f"planted-{n}-{'0' * 20}" for n in range(4))
    key, secret = (base64.b64encode(text.ljust(32).encode()[:32]).decode() for text in (master, signing))
    for name, text in (
        ("token", token),
        ("key", key),
        ("secret", f"whsec_{secret}"),
        ("header", f"x-key: {header}"),
    ):
        (place / name).write_text(text)
        (place / name).chmod(0o600)
    environment = {
        "PYTHONPATH": str(place), "STARTED": str(place / "started"), "HOOKD_ADMIN__TOKEN_FILE": "token",
        "HOOKD_SECURITY__MASTER_KEY_FILE": "key",
    }  # fmt: skip
    daemon = DaemonProcess(place, environment)
    daemon.wait_ready()
    more = {"HOOKD_SECURITY__MASTER_KEY_FILE": "key"}
    endpoint = hookd(
        place,
        "endpoint",
        "add",
        "http://127.0.0.1:9000/",
        "--secret",
        "@secret",
        "--header",
        "@header",
        **more,
    )
    assert secret not in endpoint
    password = next(place.rglob("password")).read_text().strip()
    planted = (token, key, secret, header, password)
    assert all(len(text) > 15 for text in planted)
    running = ""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            running += file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace") + "\n"
    assert "-m hookd run" in running or not Path("/proc/self").exists()
    assert daemon.stop() == 0
    daemon.kill()
    started = (place / "started").read_text()
    assert "initdb" in started, "the hook is at work"
    assert "--pwfile" in started
    for text in planted:
        assert text not in started
        assert text not in running


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
