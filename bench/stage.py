"""What all load scripts share: a PostgreSQL, a receiver, a daemon, each on its core, and how to ask them.

The daemon (or the client that it is compared with) has one core of its own; the receiver, PostgreSQL and the script share
the others.  Load goes to loopback only: host names are ``h17.localhost``, which is loopback by RFC 6761.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg

from hookd.postgres.embedded import open_server
from hookd.postgres.migrate import migrate

HERE = Path(__file__).parent
DEADLINE_S = 300

ADD_ENDPOINTS = """
with added as (
  insert into hookd.endpoint (url, host, tenant, rate, concurrency)
  select u, h, t, r, c
    from unnest($1::text[], $2::text[], $3::text[], $4::double precision[], $5::integer[]) as e (u, h, t, r, c)
  returning key)
insert into hookd.endpoint_secret (endpoint, purpose, value)
select key, 'signing', 'whsec_' || encode(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()), 'base64')
  from added
"""


class Stage:
    """Everything a load script needs; ``close`` it."""

    def __init__(self, listeners: int = 1) -> None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        self.own_core = {cores[0]} if len(cores) > 1 else None
        if len(cores) > 1:
            os.sched_setaffinity(0, set(cores[1:]))
        self.folder = Path(tempfile.mkdtemp(prefix="hookd-bench-"))
        self.folder.chmod(0o755)
        self.server = open_server(str(self.folder / "pg"))
        arguments = self.server.connection_arguments()
        self._dsn = (
            f"postgresql://{arguments['user']}:{quote(str(arguments['password']))}@/{{}}"
            f"?host={quote(str(arguments['host']))}&port={arguments['port']}"
        )
        self.dsn = self._dsn.format(arguments["database"])
        self.receiver = subprocess.Popen(
            [sys.executable, str(HERE / "receiver.py"), str(listeners)], stdout=subprocess.PIPE, text=True
        )
        assert self.receiver.stdout is not None
        self.ports: list[int] = json.loads(self.receiver.stdout.readline())
        self._databases = 0

    def close(self) -> None:
        self.receiver.terminate()
        self.receiver.wait()
        self.server.leave()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def fresh_database(self) -> None:
        """Go on in a new database with nothing but the schema."""
        connection = await asyncpg.connect(self.dsn)
        self._databases += 1
        name = f"bench_{self._databases}"
        await connection.execute(f"create database {name}")
        await connection.close()
        self.dsn = self._dsn.format(name)
        connection = await asyncpg.connect(self.dsn)
        await migrate(connection)
        await connection.close()

    def host(self, number: int) -> str:
        return f"h{number}.localhost:{self.ports[0]}"

    async def add_endpoints(
        self,
        hosts: list[str],
        path: str,
        tenants: list[str],
        *,
        rates: list[float] | None = None,
        concurrency: list[int] | None = None,
    ) -> None:
        """Register an endpoint for each host, with the tenant of the same place."""
        connection = await asyncpg.connect(self.dsn)
        none = [None] * len(hosts)
        await connection.execute(
            ADD_ENDPOINTS,
            [f"http://{host}{path}" for host in hosts], hosts, tenants, rates or none, concurrency or none,
        )  # fmt: skip
        await connection.close()

    # The receiver.

    def stats(self) -> dict[str, Any]:
        """What came since this was asked last."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/stats") as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    # The daemon.

    def child(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A Python process on the core of its own."""
        core = self.own_core
        return subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"PYTHONPATH": str(HERE.parent)} | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr.log").open("a"),
            text=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, core)) if core else None,  # noqa: PLW1509 - no threads here
        )

    def daemon(self, **environment: str) -> Daemon:
        """Start one and wait until it delivers."""
        process = self.child(
            "-m", "hookd", "run",
            **{
                "HOOKD_DATABASE__DSN": self.dsn, "HOOKD_NETWORK__ALLOW": '["127.0.0.0/8"]',
                "HOOKD_ADMIN__LISTEN": "127.0.0.1:0", "HOOKD_LOG__FORMAT": "json",
            } | environment,
        )  # fmt: skip
        until = time.monotonic() + 60
        log = self.folder / "stderr.log"
        while True:
            for line in log.read_text().splitlines():
                if f'"pid":{process.pid}' in line and '"event":"ready"' in line:
                    return Daemon(process, json.loads(line)["admin"])
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the daemon did not start:\n" + log.read_text())
            time.sleep(0.01)

    async def drained(self, connection: asyncpg.Connection, where: str = "true") -> float:
        """Wait until no delivery is left (of those); returns when that was seen."""
        until = time.monotonic() + DEADLINE_S
        while await connection.fetchval(f"select exists (select from hookd.delivery where {where})"):
            assert time.monotonic() < until, "the queue does not become empty"
            await asyncio.sleep(0.02)
        return time.monotonic()


class Daemon:
    """A running daemon."""

    def __init__(self, process: subprocess.Popen[str], admin: str) -> None:
        self.process = process
        self.admin = admin

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.admin}/metrics") as answer:
            text: str = answer.read().decode()
            return text

    def cpu_s(self) -> float:
        """CPU time so far; needs /proc."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self, *, most: bool = False) -> float:
        """Memory now, or the most so far; needs /proc."""
        name = "VmHWM" if most else "VmRSS"
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
        raise LookupError(name)

    def stop(self, *, at_once: bool = False) -> None:
        """Drain and stop, or stop without waiting for slow receivers."""
        self.process.send_signal(signal.SIGTERM)
        if at_once:
            time.sleep(0.2)
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0


def percentile(values: list[float], share: float) -> float:
    """The value that so large a share stays below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
