"""
PostgreSQL clusters of torture.py's own: on loopback, in a folder that is removed, with the binaries that hookd embeds.

They are real ones: made by initdb or pg_basebackup, restarted in any mode, killed with all their processes, promoted, and
starved of disk where root can mount a small tmpfs under them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hookd.postgres import embedded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_S = 60

CONF = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
max_connections = 60
shared_buffers = 64MB
min_wal_size = {wal}
max_wal_size = {wal_most}
wal_keep_size = {wal}
max_wal_senders = 4
hot_standby = on
wal_receiver_status_interval = 1s
restart_after_crash = on
log_min_messages = warning
"""


class Programs:
    """The binaries, and the user that may run them: PostgreSQL refuses root."""

    def __init__(self, folder: Path) -> None:
        account = embedded._account(folder)  # noqa: SLF001 - the one place that knows who
        binaries = embedded.find_binaries()
        if account.other and not embedded._reachable(binaries.folder, account):  # noqa: SLF001
            binaries = embedded._copied(binaries)  # noqa: SLF001
        self._account = account
        self._binaries = binaries
        self.version = binaries.version

    def give(self, path: Path) -> None:
        """To the user that runs PostgreSQL."""
        if self._account.other:
            os.chown(path, self._account.uid, self._account.gid)

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return embedded._run([str(self._binaries.folder / program), *arguments], self._account, "")  # noqa: SLF001

    def must(self, program: str, *arguments: str) -> None:
        done = self.run(program, *arguments)
        if done.returncode != 0:
            raise SystemExit(f"{program} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Cluster:
    """One server."""

    def __init__(self, programs: Programs, folder: Path, password: str = "", *, small: bool = False) -> None:
        """``small``: with as little WAL as there can be, for a disk that is to fill up."""
        self.programs = programs
        self.folder = folder
        self.data = folder / "data"
        self.port = free_port()
        self.password = password or secrets.token_hex(12)
        self._small = small
        self._full: Path | None = None
        folder.mkdir(mode=0o700, exist_ok=True)
        programs.give(folder)

    def __repr__(self) -> str:
        return f"<Cluster {self.folder.name} on {self.port}>"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def dsn(self, database: str = "hookd", *others: Cluster) -> str:
        """Of this one, and others for when it is gone."""
        hosts = ",".join(c.address for c in (self, *others))
        return f"postgresql://hookd:{self.password}@{hosts}/{database}"

    # How it is made.

    def make(self, *, wal: Path | None = None) -> None:
        """A new one, and start it; ``wal``: where the WAL goes instead."""
        password = self.folder / "password"
        password.write_text(self.password + "\n")
        password.chmod(0o600)
        self.programs.give(password)
        elsewhere = ["--waldir", str(wal)] if wal else []
        size = ["--wal-segsize", "1"] if self._small else []
        self.programs.must("initdb", "-D", str(self.data), "-U", "hookd", "-E", "UTF8", "--locale=C", "-A", "scram-sha-256", "-N",
                           "--pwfile", str(password), *elsewhere, *size)  # fmt: skip
        self._configure("")
        self.start()

    def follow(self, primary: Cluster) -> None:
        """Become a streaming standby of another one, and start."""
        shutil.rmtree(self.data, ignore_errors=True)
        self.programs.must("pg_basebackup", "-D", str(self.data), "-R", "-X", "stream", "-c", "fast",
                           "-d", f"{primary.dsn('')}?application_name={self.folder.name}")  # fmt: skip
        self._configure("")
        self.start()

    def _configure(self, synchronous: str) -> None:
        conf = self.data / "torture.conf"
        wal, most = ("8MB", "12MB") if self._small else ("80MB", "512MB")
        text = CONF.format(port=self.port, wal=wal, wal_most=most)
        if self._small:
            text += "max_wal_senders = 0\nwal_level = minimal\nwal_keep_size = 0\n"
        conf.write_text(text + f"synchronous_standby_names = '{synchronous}'\n")
        self.programs.give(conf)
        main = self.data / "postgresql.conf"
        if "torture.conf" not in main.read_text():
            with main.open("a") as file:
                file.write("\ninclude 'torture.conf'\n")

    def wait_for(self, standby: str) -> None:
        """From now on no COMMIT is answered before that standby has it."""
        self._configure(standby)
        self.programs.must("pg_ctl", "reload", "-D", str(self.data))

    # What is done to it.

    def start(self) -> None:
        """Start it, however it ended; its old processes may take a moment to go."""
        until = time.monotonic() + START_S
        log = self.folder / "server.log"
        while True:
            done = self.programs.run(
                "pg_ctl", "start", "-D", str(self.data), "-l", str(log), "-w", "-t", str(START_S)
            )
            if done.returncode == 0:
                return
            if time.monotonic() > until:
                raise SystemExit(f"{self} does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)

    def running(self) -> bool:
        return self.programs.run("pg_ctl", "status", "-D", str(self.data)).returncode == 0

    def stop(self, mode: str = "fast") -> None:
        self.programs.run("pg_ctl", "stop", "-D", str(self.data), "-m", mode, "-w", "-t", "30")

    def kill(self, *, alone: bool = False) -> None:
        """SIGKILL to all its processes, as when its machine dies; or to the first one ``alone``: the others end themselves."""
        postmaster = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        children = [] if alone else list(_children(postmaster))
        for pid in (postmaster, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def promote(self) -> None:
        self.programs.must("pg_ctl", "promote", "-D", str(self.data), "-w", "-t", "60")


def _children(parent: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            yield int(stat.parent.name)


class SmallDisk:
    """A tmpfs of so many MiB, which can be filled and emptied.  Needs root, and Linux."""

    def __init__(self, programs: Programs, folder: Path, mib: int) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "tmpfs", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise OSError(done.stderr.strip() or "mount failed")
        programs.give(folder)

    def fill(self) -> None:
        """Take all that is free."""
        with (self.folder / "ballast").open("ab") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(65536))
                file.flush()

    def empty(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)


def why_no_small_disk() -> str:
    """Why a disk cannot be made small here; empty if it can."""
    if os.geteuid() != 0:
        return "only root may mount a small tmpfs to fill up"
    if shutil.which("mount") is None or not Path("/proc/mounts").exists():
        return "there is no mount here, or no tmpfs"
    return ""


def stop_all(clusters: Sequence[Cluster]) -> None:
    for cluster in clusters:
        if (cluster.data / "postmaster.pid").exists():
            cluster.stop("immediate")
