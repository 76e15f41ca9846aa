"""What all load scripts share: a PostgreSQL, a receiver, a daemon, each on its core, and how to ask them.

The daemon (or the client that it is compared with) has one core of its own; the receiver, PostgreSQL and the script share
the others.  Load goes to loopback only: host names are ``h17.bench.localhost``, which is loopback by RFC 6761.

Two things may be elsewhere.  ``--dsn`` names a database made for this, without a schema ``hookd``, which is made there and
dropped at the end.  ``--target`` names a ``bench/receiver.py`` that somebody started to be loaded: whatever else answers
there is refused.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import asyncpg
from cores import used

from hookd.postgres.embedded import EmbeddedServer, open_server
from hookd.postgres.migrate import migrate

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from cores import Used

HERE = Path(__file__).parent
DEADLINE_S = 300
PR_SET_PTRACER = 0x59616D61

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


INSERT = """
insert into hookd.event (type, payload, tenant)
select 'bench.made', json_build_object('n', n, 'fill', repeat('x', $3))::text, 'tenant-' || n % $2
  from generate_series(1, $1::integer) n
"""


class Stage:
    """Everything a load script needs; ``close`` it."""

    def __init__(
        self,
        *,
        listeners: int = 1,
        tls: bool = False,
        settings: Mapping[str, str] | None = None,
        dsn: str = "",
        target: str = "",
        folder: Path | None = None,
    ) -> None:
        """``settings``: of PostgreSQL, beyond those that hookd's own server has; ``folder``: one that may be kept."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        self.own_core = cores[0] if len(cores) > 1 else None
        if len(cores) > 1:
            os.sched_setaffinity(0, set(cores[1:]))
        self.folder = folder.absolute() if folder else Path(tempfile.mkdtemp(prefix="hookd-bench-"))
        self.folder.mkdir(exist_ok=True)
        self.folder.chmod(0o755)
        self._databases = 0
        self._children: list[subprocess.Popen[str]] = []
        self.elsewhere = bool(dsn)
        self._schema_is_ours = False
        """Only then may it be dropped."""
        self.server: EmbeddedServer | None = None
        self.receiver: subprocess.Popen[str] | None = None
        self.ca_file = ""
        try:
            if dsn:
                self._dsn = self.dsn = dsn
                self._database = self._first_database = ""
                asyncio.run(self._schema_is_free())
            else:
                self._start_server(settings or {})
            if target:
                self._look_at(target)
            else:
                self._start_receiver(listeners, tls=tls)
        except BaseException:
            self.close()
            raise

    def _start_server(self, settings: Mapping[str, str]) -> None:
        self.server = open_server(str(self.folder / "pg"))
        arguments = self.server.connection_arguments()
        self._dsn = (
            f"postgresql://{arguments['user']}:{quote(str(arguments['password']))}@/{{}}"
            f"?host={quote(str(arguments['host']))}&port={arguments['port']}"
        )
        self._first_database = str(arguments["database"])
        self._use(self._first_database)
        if settings:
            asyncio.run(self._alter_system(settings))
            self.restart_server()

    def restart_server(self) -> None:
        """So that changed settings hold."""
        assert self.server is not None
        self.server.leave()
        self.server = open_server(str(self.folder / "pg"))

    async def _alter_system(self, settings: Mapping[str, str]) -> None:
        connection = await asyncpg.connect(self.dsn)
        for name, value in settings.items():
            await connection.execute(f"alter system set {name} = '{value}'")
        await connection.close()

    async def _schema_is_free(self) -> None:
        connection = await asyncpg.connect(self.dsn)
        taken = await connection.fetchval("select exists (select from pg_namespace where nspname = 'hookd')")
        await connection.close()
        if taken:
            raise SystemExit(
                "--dsn: this database has a schema hookd already, which would be dropped; make one for this: createdb bench"
            )
        self._schema_is_ours = True

    def _start_receiver(self, listeners: int, *, tls: bool) -> None:
        command = [sys.executable, str(HERE / "receiver.py"), str(listeners)]
        if tls:
            import trustme  # noqa: PLC0415 - only where it is asked for

            authority = trustme.CA()
            certificate = authority.issue_cert("*.bench.localhost")
            self.ca_file = str(self.folder / "ca.pem")
            authority.cert_pem.write_to_path(self.ca_file)
            certificate.private_key_and_cert_chain_pem.write_to_path(self.folder / "receiver.pem")
            command += ["--tls", str(self.folder / "receiver.pem")]
        self.receiver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.receiver.stdout is not None
        self.ports: list[int] = json.loads(self.receiver.stdout.readline())
        self._receiver_host = "127.0.0.1"
        self._allow = ["127.0.0.0/8"]

    def _look_at(self, target: str) -> None:
        """Take a receiver elsewhere, if it is one of ours: whoever started it wants the load."""
        parts = urlsplit(target)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise SystemExit(f"--target: {target} is not of the form http://HOST:PORT")
        try:
            with urllib.request.urlopen(f"http://{parts.hostname}:{parts.port}/stats", timeout=5) as answer:
                self.ports = json.load(answer)["ports"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"--target: no bench/receiver.py answers at {target} ({error}); nothing else is sent load to"
            ) from None
        self._receiver_host = parts.hostname
        self._allow = sorted({f"{info[4][0]}" for info in socket.getaddrinfo(parts.hostname, parts.port)})

    def close(self, *, keep: bool = False) -> None:
        """End everything; ``keep`` leaves the database in its folder."""
        for child in self._children:
            # only where a script failed: a daemon without a database would wait for one for ever
            if child.poll() is None:
                child.kill()
                child.wait()
        if self.receiver is not None:
            self.receiver.terminate()
            self.receiver.wait()
        if self._schema_is_ours:
            asyncio.run(self._drop_schema())
        if self.server is not None:
            self.server.leave()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _drop_schema(self) -> None:
        connection = await asyncpg.connect(self.dsn)
        await connection.execute("drop schema if exists hookd cascade")
        await connection.close()

    async def fresh_database(self, like: str | None = None, *, migrated: bool = True) -> str:
        """Go on in a new database, with nothing but the schema or a copy of another one; returns its name."""
        if self.elsewhere:
            await self._drop_schema()
            connection = await asyncpg.connect(self.dsn)
            await migrate(connection)
            await connection.close()
            return ""
        connection = await asyncpg.connect(self.dsn)
        self._databases += 1
        name = f"bench_{self._databases}"
        if like is None:
            await connection.execute(f"create database {name}")
        else:
            if like == self._database:
                raise ValueError("a database that is in use cannot be copied; leave it first")
            await connection.execute(f"create database {name} template {like} strategy file_copy")
        await connection.close()
        self._use(name)
        if like is None and migrated:
            connection = await asyncpg.connect(self.dsn)
            await migrate(connection)
            await connection.close()
        return name

    async def leave_database(self, *, drop: bool = True) -> None:
        """Go back to the first database; the present one is dropped, so that nobody vacuums it meanwhile."""
        left = self._database
        self._use(self._first_database)
        if drop and left != self._first_database:
            connection = await asyncpg.connect(self.dsn)
            await connection.execute(f"drop database {left} with (force)")
            await connection.close()

    def _use(self, database: str) -> None:
        self._database = database
        self.dsn = self._dsn.format(database)

    def host(self, number: int, *, tls: bool = False) -> str:
        """Each is a lane of its own; of a receiver elsewhere there are as many as it has ports."""
        if self.receiver is None:
            return f"{self._receiver_host}:{self.ports[number % len(self.ports)]}"
        return f"h{number}.bench.localhost:{self.ports[-1 if tls else 0]}"

    async def add_endpoints(
        self,
        hosts: list[str],
        path: str,
        tenants: list[str],
        *,
        rates: Sequence[float | None] | None = None,
        concurrency: Sequence[int | None] | None = None,
        scheme: str = "http",
    ) -> None:
        """Register an endpoint for each host, with the tenant, rate and concurrency of the same place."""
        connection = await asyncpg.connect(self.dsn)
        none = [None] * len(hosts)
        await connection.execute(
            ADD_ENDPOINTS,
            [f"{scheme}://{host}{path}" for host in hosts], hosts, tenants, rates or none, concurrency or none,
        )  # fmt: skip
        await connection.close()

    # The receiver.

    def stats(self) -> dict[str, Any]:
        """What came since this was asked last."""
        with urllib.request.urlopen(f"http://{self.receiver_at[0]}:{self.receiver_at[1]}/stats") as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    @property
    def receiver_at(self) -> tuple[str, int]:
        """Address and port."""
        return self._receiver_host, self.ports[0]

    def receiver_ahead_s(self) -> float:
        """How much the receiver's wall clock is ahead of this machine's: known to half of the quickest round trip."""
        if self.receiver is not None:
            return 0.0
        found = []
        for _ in range(20):
            begun = time.time()
            there = self.stats()["now"]["wall"]
            ended = time.time()
            found.append((ended - begun, there - (begun + ended) / 2))
        return float(min(found)[1])

    # The daemon.

    def child(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A Python process on the core of its own."""
        return self.program(sys.executable, *command, **environment)

    def program(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A process on the core of its own."""
        core = self.own_core
        child = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)} | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr.log").open("a"),
            text=True,
            preexec_fn=lambda: _settle_down(core),  # noqa: PLW1509 - no threads here
        )
        self._children.append(child)
        return child

    def daemon(self, program: Sequence[str] = ("-m", "hookd"), **environment: str) -> Daemon:
        """Start one and wait until it delivers; ``program`` is what Python runs."""
        begun = time.monotonic()
        process = self.child(
            *program, "run",
            **{
                "HOOKD_DATABASE__DSN": self.dsn, "HOOKD_NETWORK__ALLOW": json.dumps(self._allow),
                "HOOKD_NETWORK__CA_FILE": self.ca_file,
                "HOOKD_ADMIN__LISTEN": "127.0.0.1:0", "HOOKD_LOG__FORMAT": "json",
            } | environment,
        )  # fmt: skip
        until = time.monotonic() + 60
        log = self.folder / "stderr.log"
        while True:
            for line in log.read_text().splitlines():
                if f'"pid":{process.pid}' in line and '"event":"ready"' in line:
                    return Daemon(process, json.loads(line)["admin"], begun, time.monotonic(), self.own_core)
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the daemon did not start:\n" + log.read_text())
            time.sleep(0.01)

    # PostgreSQL.

    def postgres_cpu_s(self) -> float:
        """CPU time of all its processes so far, those that have ended too; needs /proc, and 0 for one elsewhere."""
        if self.server is None:
            return 0.0
        postmaster = (self.folder / "pg" / "data" / "postmaster.pid").read_text().splitlines()[0]
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, _, rest = stat.read_text().partition(" ")
            except (FileNotFoundError, ProcessLookupError):
                continue
            fields = rest.rpartition(")")[2].split()
            if pid == postmaster:
                ticks += sum(map(int, fields[11:15]))
            elif fields[1] == postmaster:
                ticks += sum(map(int, fields[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    async def nothing_lost(self, inserted: int, arrived: int) -> None:
        """With no daemon running: every delivery is pending or logged, and none was sent twice."""
        connection = await asyncpg.connect(self.dsn)
        pending = await connection.fetchval("select count(*) from hookd.delivery")
        logged = await connection.fetchval("select count(*) from hookd.attempt where verdict = 'delivered'")
        await connection.close()
        assert pending + logged == inserted, f"{inserted:,} inserted, {pending:,} pending, {logged:,} logged"
        assert logged == arrived, f"{logged:,} logged, {arrived:,} arrived"

    async def drained(self, connection: asyncpg.Connection, where: str = "true") -> float:
        """Wait until no delivery is left (of those); returns when that was seen."""
        until = time.monotonic() + DEADLINE_S
        while await connection.fetchval(f"select exists (select from hookd.delivery where {where})"):
            assert time.monotonic() < until, "the queue does not become empty"
            await asyncio.sleep(0.02)
        return time.monotonic()


def _settle_down(core: int | None) -> None:
    """In a child: take its core, and let a profiler of the same user trace it (Yama allows parents only)."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, -1, 0, 0, 0)


class Daemon:
    """A running daemon."""

    def __init__(
        self, process: subprocess.Popen[str], admin: str, begun: float, ready: float, core: int | None
    ) -> None:
        self._core = core
        self.process = process
        self.admin = admin
        self.begun = begun
        """When the process was started, on the monotonic clock."""
        self.ready = ready
        """When it was seen to say that it is ready: up to 10 ms late."""

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.admin}/metrics") as answer:
            text: str = answer.read().decode()
            return text

    def used(self) -> Used:
        """What it has had of its core so far."""
        return used(self.process.pid, self._core)

    def cpu_s(self) -> float:
        """CPU time so far; needs /proc."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ran_s(self) -> float:
        """CPU time so far of its main thread, to the nanosecond; needs Linux."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e9

    def displaced_s(self) -> float:
        """Time so far that it was ready to run and somebody else had its core; needs Linux."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[1]) / 1e9

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
        status = {0}
        if at_once:
            time.sleep(0.2)
            self.process.send_signal(signal.SIGTERM)
            # where the first one was enough, the second may come when the daemon listens no more
            status.add(-signal.SIGTERM)
        assert self.process.wait(60) in status, self.process.returncode


class Arrivals:
    """How many requests have come to the receiver, and when: asked for over a connection that stays open."""

    def __init__(self, stage: Stage) -> None:
        self._at = stage.receiver_at
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.count = 0
        self.first = 0.0
        self.last = 0.0
        self.now: dict[str, float] = {}
        """The receiver's clocks, and the CPU that it has used and waited for, at the last look."""
        self.curve: list[tuple[int, float]] = []
        """How many had come by when, at each look."""

    async def look(self) -> int:
        """Ask, and return how many have come so far."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._at)
        reader, writer = self._streams
        writer.write(b"GET /stats HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        stats = json.loads(await reader.readexactly(int(head.rpartition(b":")[2])))
        self.now = stats["now"]
        if stats["count"]:
            if not self.count:
                self.first = stats["first"]
                self.curve.append((0, self.first))
            self.last = stats["last"]
            self.count += stats["count"]
            self.curve.append((self.count, stats["last"]))
        return self.count

    def reached(self, count: int) -> float:
        """When so many had come; between two looks they are taken to have come evenly."""
        place = bisect_left(self.curve, (count, 0.0))
        if place == 0:
            return self.first
        (less, before), (more, after) = self.curve[place - 1 : place + 1]
        return before + (after - before) * (count - less) / (more - less)

    def by(self, moment: float) -> int:
        """How many had come by then, as of the last look before it."""
        return max((count for count, at in self.curve if at <= moment), default=0)

    def per_s(self, start: int, end: int) -> float:
        """How many came a second, from the ``start``th to the ``end``th."""
        return (end - start) / (self.reached(end) - self.reached(start))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


class Producer:
    """
    Keeps so many deliveries pending: inserts as many as have arrived, ``EACH`` in a transaction.

    It commits without waiting for the disk, because its own cost is not what is measured; the daemon's wait.
    """

    EACH = 80
    PAUSE_S = 0.004

    def __init__(
        self, stage: Stage, arrivals: Arrivals, *, tenants: int, payload: int, inserted: int
    ) -> None:
        """``inserted``: how many were pending when nothing had arrived."""
        self._stage = stage
        self._arrivals = arrivals
        self._tenants = tenants
        self._payload = payload
        self.inserted = inserted

    async def keep(self, pending: int, *, until: Callable[[], bool]) -> None:
        """Keep so many pending until that is so."""
        connection = await asyncpg.connect(self._stage.dsn)
        await connection.execute("set synchronous_commit = off")
        deadline = time.monotonic() + DEADLINE_S
        while not until():
            assert time.monotonic() < deadline, f"only {self._arrivals.count:,} have arrived"
            await self._arrivals.look()
            while self.inserted - self._arrivals.count <= pending - self.EACH:
                await connection.execute(INSERT, self.EACH, self._tenants, self._payload)
                self.inserted += self.EACH
            await asyncio.sleep(self.PAUSE_S)
        await connection.close()


def raise_descriptors(wanted: int) -> int:
    """Let this process, and those it starts, open so many files; returns how many the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def percentile(values: list[float], share: float) -> float:
    """The value that so large a share stays below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def elsewhere(parser: argparse.ArgumentParser) -> None:
    """The options of a script that can measure another database, or send to another machine."""
    parser.add_argument(
        "--dsn", default="", help="a database made for this, without a schema hookd: it is made, and dropped"
    )
    parser.add_argument(
        "--target", default="", help="http://HOST:PORT of a bench/receiver.py that was started there"
    )
