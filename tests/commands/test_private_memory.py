"""Nobody reads secrets out of the daemon: no core dump, no arguments, no look from outside."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

LINUX = sys.platform == "linux"

pytestmark = pytest.mark.usefixtures("one_server")

DIE = """
import os, resource
from hookd.commands.run import keep_memory_private

os.chdir({folder!r})
most = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (most, most))
{keep}
os.abort()
"""


def dumped(folder: Path, keep: str) -> bool:
    """Whether a process that dies badly leaves a core dump."""
    program = DIE.format(keep=keep, folder=str(folder))
    quiet = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ, file_actions=[quiet])
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    return os.WCOREDUMP(status)


def test_it_leaves_no_core_dump(tmp_path: Path) -> None:
    if not dumped(tmp_path, ""):
        pytest.skip("nobody leaves core dumps here")
    assert not dumped(tmp_path, "keep_memory_private()")


@pytest.mark.skipif(not LINUX, reason="PR_SET_DUMPABLE is Linux'")
def test_the_flag_holds_where_dumps_are_piped_and_no_limit_counts() -> None:
    program = (
        "import ctypes; from hookd.commands.run import keep_memory_private as k; p = ctypes.CDLL(None).prctl;"
        "print(p(3), end=' '); k(); print(p(3))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1 0\n"


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_the_daemon_does_so_unless_told_otherwise(
    start_daemon: Callable[..., DaemonProcess], request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["server_dsn"] == "system":
        pytest.skip("one server is enough")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("core dumps are off here for everybody")
    limits = {}
    for value in ("false", "true"):
        daemon = start_daemon(HOOKD_SECURITY__CORE_DUMPS=value)
        proc = Path(f"/proc/{daemon.process.pid}")
        line = next(t for t in (proc / "limits").read_text().splitlines() if t.startswith("Max core file"))
        limits[value] = line.split()[4:6]
        # what it was configured with came by the environment or by files
        assert (proc / "cmdline").read_bytes().split(b"\0")[1:] == [b"-m", b"hookd", b"run", b""]
        daemon.stop()
    assert limits["false"] == ["0", "0"]
    assert limits["true"] != ["0", "0"]
