"""
Where torture.py's trials happen: a database, the witness, daemons, a producer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

import asyncpg
from account import Account, Exchange, Fault, Seen, Sent, account_of
from clusters import Cluster, Programs, stop_all
from witness import ANSWERED, BAD, LOST, MADE, OPENED, RECORD

from hookd.postgres.migrate import migrate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

HERE = Path(__file__).parent
TICK_S = 0.02
BEHIND_S = 2.0
ROLLED_BACK = 0.05
"""Of the producer's transactions."""

ACCEPTED_S = 0.01
"""So long may the witness take to accept a connection."""

TRUSTED_S = 2.2
"""So long may a daemon that lives go on after its locks are gone: the 2 s of the fence, and a look."""

STUCK_S = 60.0
"""Without a change of what is pending."""

AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)

INSERT = """
insert into hookd.event (id, type, payload, tenant)
select id, 'torture', json_build_object('n', n)::text, 't' || host
  from unnest($1::uuid[], $2::bigint[], $3::integer[]) as e (id, n, host)
"""

ADD_ENDPOINTS = """
with added as (
  insert into hookd.endpoint (url, host, tenant, rate, concurrency)
  select u, h, t, r, c
    from unnest($1::text[], $2::text[], $3::text[], $4::double precision[], $5::integer[]) as e (u, h, t, r, c)
  returning key)
insert into hookd.endpoint_secret (endpoint, purpose, value) select key, 'signing', $6 from added
"""

OWNED = """
select l.pid, l.objid::integer as shard from pg_locks l
 where l.locktype = 'advisory' and l.classid = 1752133483 and l.granted and l.objsubid = 2
   and l.database = (select oid from pg_database where datname = current_database())
"""

SETTLED = """
select a.event_id, extract(epoch from a.at)::double precision as at
  from hookd.attempt a
 where a.verdict = 'delivered' and a.event_id >= $1 and a.event_id < $2
"""

DEAD = "select event_id from hookd.dead_letter where event_id >= $1 and event_id < $2"

PENDING = "select event_id from hookd.delivery where event_id >= $1 and event_id < $2"

NO_ID, EVERY_ID = bytes(16), b"\xff" * 16


class Log(Seen):
    """The witness's log, read as it grows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._rest = b""
        self._open: dict[int, Exchange] = {}
        self.opened: list[float] = []

    def read(self) -> list[Exchange]:
        """Take in what is new; returns the exchanges that were opened."""
        data = self._rest + self._file.read()
        whole = len(data) - len(data) % RECORD.size
        self._rest = data[whole:]
        new = []
        for what, at, connection, host, id_, attempt, status, number in RECORD.iter_unpack(data[:whole]):
            if what == OPENED:
                exchange = Exchange(id_, attempt, host, connection, at)
                self._open[connection] = exchange
                self.exchanges.setdefault(id_, []).append(exchange)
                self.numbers[id_] = number
                self.opened.append(at)
                new.append(exchange)
            elif what == ANSWERED:
                exchange = self._open.pop(connection)
                exchange.answered = exchange.ended = at
                exchange.status = status
            elif what == MADE:
                self.made[connection] = at
            elif what == LOST:
                if connection in self._open:
                    self._open.pop(connection).ended = at
            elif what == BAD:
                self.bad += 1
        return new

    def take(self, until: bytes) -> Seen:
        """Let go of what was seen of events with ids below this."""
        taken = Seen(made=self.made, bad=self.bad)
        self.bad = 0
        for id_ in [i for i in self.exchanges if i < until]:
            taken.exchanges[id_] = self.exchanges.pop(id_)
            taken.numbers[id_] = self.numbers.pop(id_)
        oldest = min((all_of_it[0].opened for all_of_it in self.exchanges.values()), default=float("inf"))
        del self.opened[: bisect_left(self.opened, oldest)]
        return taken


class Hookd:
    """A daemon's process."""

    def __init__(self, folder: Path, number: int, program: tuple[str, ...], environment: dict[str, str]) -> None:  # fmt: skip
        self.log = folder / f"daemon-{number}.log"
        self.begun = time.monotonic()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HOOKD_")}
        with self.log.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, *program, "run"],
                env=inherited | {"PYTHONPATH": str(HERE.parent)} | environment,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def said(self, event: str) -> list[dict[str, Any]]:
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            if event in line:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return [line for line in found if str(line.get("event", "")).startswith(event)]

    async def ready(self, deadline_s: float = 60.0) -> None:
        until = time.monotonic() + deadline_s
        while not self.said("ready"):
            if not self.alive or time.monotonic() > until:
                raise Broken(f"a daemon did not get ready: {self.log.read_text()[-1500:]}")
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def stop(self, deadline_s: float = 90.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, deadline_s)

    def resident_mb(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        return 0.0


class Broken(Exception):
    """What must always work did not; the message says what."""


class Producer:
    """
    Commits events at a steady rate, whatever becomes of them, and knows which.

    It makes the ids itself, before BEGIN.  A transaction whose COMMIT was sent and not answered is *unknown*: its events may
    arrive or not.  It holds back while more than ``BEHIND_S`` of its events wait: a machine that cannot keep up is no fault.
    Beside one in twenty goes another
    that is rolled back: its events must never arrive.
    """

    def __init__(self, dsn: str, hosts: list[int], dice: random.Random, ask: Callable[[], Awaitable[None]]) -> None:  # fmt: skip
        """``ask`` has ``received`` be told."""
        self.dsn = dsn
        self._ask = ask
        self._asked = 0.0
        self._received = self._received_before = 0
        self.seconds = 0.0
        """How long it inserted."""
        self.hosts = hosts
        self.rate = 0.0
        self._dice = dice
        self._task: asyncio.Task[None] | None = None
        self.numbers: dict[bytes, int] = {}
        self.begun: dict[bytes, float] = {}
        self.committed: set[bytes] = set()
        self.unknown: set[bytes] = set()
        self.rolled_back = 0
        self.errors = 0
        self.n = 0

    def start(self, rate: float) -> None:
        self.rate = rate
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """At the end of a transaction."""
        if self._task is not None:
            self.rate = 0.0
            await self._task
            self._task = None

    def received(self, count: int) -> None:
        """So many requests have come, since the witness was started."""
        self._received = count

    async def _behind(self) -> bool:
        """Whether so many wait that there is no sense in inserting more."""
        now = time.monotonic()
        if now - self._asked > 0.2:
            self._asked = now
            await self._ask()
        waiting = len(self.committed) - (self._received - self._received_before)
        return waiting > BEHIND_S * self.rate

    def events(self, count: int) -> tuple[list[bytes], list[int], list[int]]:
        millis = int(time.time() * 1000).to_bytes(6, "big")
        now = time.monotonic()
        ids = []
        for _ in range(count):
            noise = bytearray(self._dice.randbytes(10))
            noise[0] = 0x70 | noise[0] & 0x0F
            noise[2] = 0x80 | noise[2] & 0x3F
            ids.append(millis + bytes(noise))
        numbers = list(range(self.n + 1, self.n + 1 + count))
        self.n += count
        for id_, n in zip(ids, numbers, strict=True):
            self.numbers[id_] = n
            self.begun[id_] = now
        return ids, numbers, [self.hosts[n % len(self.hosts)] for n in numbers]

    async def _run(self) -> None:
        due = 0.0
        last = time.monotonic()
        connection: asyncpg.Connection | None = None
        try:
            while self.rate:
                now = time.monotonic()
                # what an outage kept it from inserting is not made up for: the rate before and after it is compared
                due = min(due + (now - last) * self.rate, 5 * self.rate * TICK_S)
                self.seconds += now - last
                last = now
                if due >= 1 and not await self._behind():
                    count = int(due)
                    due -= count
                    connection = await self._insert(connection, count)
                await asyncio.sleep(max(0.0, TICK_S - (time.monotonic() - now)))
        finally:
            if connection is not None:
                connection.terminate()

    async def _insert(self, connection: asyncpg.Connection | None, count: int) -> asyncpg.Connection | None:
        committing = False
        ids: list[bytes] = []
        try:
            if connection is None or connection.is_closed():
                connection = await asyncpg.connect(self.dsn, timeout=5, command_timeout=30)
            if self._dice.random() < ROLLED_BACK:
                await connection.execute("begin")
                await self._execute(connection, *self.events(count))
                await connection.execute("rollback")
                self.rolled_back += count
            ids, numbers, hosts = self.events(count)
            await connection.execute("begin")
            await self._execute(connection, ids, numbers, hosts)
            committing = True
            await connection.execute("commit")
            self.committed.update(ids)
        except AWAY:
            self.errors += 1
            if committing:
                self.unknown.update(ids)
            if connection is not None:
                connection.terminate()
            await asyncio.sleep(0.05)
            return None
        return connection

    async def backlog(self, count: int) -> None:
        """So many at once."""
        connection = await asyncpg.connect(self.dsn)
        for start in range(0, count, 10_000):
            ids, numbers, hosts = self.events(min(10_000, count - start))
            await self._execute(connection, ids, numbers, hosts)
            self.committed.update(ids)
        await connection.close()

    @staticmethod
    async def _execute(connection: asyncpg.Connection, ids: list[bytes], numbers: list[int], hosts: list[int]) -> None:  # fmt: skip
        await connection.execute(INSERT, [UUID(bytes=i) for i in ids], numbers, hosts)

    def take(self, until: bytes, requests: int) -> Sent:
        """Let go of events with ids below this, of which so many ``requests`` have come."""
        numbers = {i: self.numbers.pop(i) for i in [i for i in self.numbers if i < until]}
        taken = Sent(self.committed & numbers.keys(), self.unknown & numbers.keys(), numbers, self.seconds)
        for id_ in numbers:
            del self.begun[id_]
        self.committed -= taken.committed
        self.unknown -= taken.unknown
        self._received_before += requests
        self.seconds = 0.0
        return taken


class Scene:
    """Everything that a row needs; ``async with`` it."""

    kept = False
    """Whether the folder, with what the daemons and servers said, outlives this."""

    def __init__(
        self, *, hosts: int = 20, seed: int = 1, tls: bool = False, limits: Mapping[int, tuple[float | None, int | None]] | None = None,
        path: str = "/hook", standby: bool = False, program: tuple[str, ...] = ("-m", "hookd"), hold_ms: tuple[float, float] = (230.0, 270.0), environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """``program``: what Python runs; ``limits``: of a host by number, rate and concurrency; ``hold_ms``: how long the receiver takes to answer."""
        self.folder = Path(tempfile.mkdtemp(prefix="hookd-torture-"))
        self.folder.chmod(0o755)
        self.programs = Programs(self.folder)
        self.clusters: list[Cluster] = []
        self.hosts = hosts
        self.dice = random.Random(seed)
        self.secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        self.daemons: list[Hookd] = []
        self.faults: list[Fault] = []
        self._telling = asyncio.Lock()
        self.late_s = 0.0
        """By how much the witness was late at most."""
        self._tls = tls
        self._limits = limits or {}
        self._path = path
        self._standby = standby
        self._program = program
        self._hold_ms = hold_ms
        self._environment = dict(environment or {})
        self._accounted = NO_ID
        """What has an id below this is in an account already."""
        self._started = 0
        self._witness: subprocess.Popen[str] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _open(self) -> None:
        await self.make_primary()
        connection = await asyncpg.connect(self.primary.dsn("postgres"))
        await connection.execute("create database hookd")
        await connection.close()
        if self._standby:
            standby = Cluster(self.programs, self.folder / "pg2", self.primary.password)
            self.clusters.append(standby)
            await asyncio.to_thread(standby.follow, self.primary)
            await asyncio.to_thread(self.primary.wait_for, "*")
        self.dsn = self.primary.dsn("hookd", *self.clusters[1:])
        self.writable = self.dsn + "?target_session_attrs=read-write"
        self._start_witness()
        async with self.sql() as connection:
            await migrate(connection)
        self.producer = Producer(self.writable, list(range(self.hosts)), self.dice, self.tell)
        await self.tell(hold_ms=self._hold_ms)
        await self.add_endpoints(range(self.hosts))

    async def make_primary(self) -> None:
        """The first cluster."""
        self.primary = Cluster(self.programs, self.folder / "pg1")
        self.clusters.append(self.primary)
        await asyncio.to_thread(self.primary.make)

    def _start_witness(self) -> None:
        command = [sys.executable, str(HERE / "witness.py"), str(self.folder / "witness.log"), self.secret]
        self._ca_file = ""
        if self._tls:
            import trustme  # noqa: PLC0415 - only where it is asked for

            authority = trustme.CA()
            self._ca_file = str(self.folder / "ca.pem")
            authority.cert_pem.write_to_path(self._ca_file)
            certificate = self.folder / "witness.pem"
            authority.issue_cert("*.torture.localhost").private_key_and_cert_chain_pem.write_to_path(
                certificate
            )
            command += ["--tls", str(certificate)]
        self._witness = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._witness.stdout is not None
        self.ports: dict[str, int] = json.loads(self._witness.stdout.readline())
        self.log = Log(self.folder / "witness.log")
        self._control: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def add_endpoints(self, hosts: range, path: str = "", port: str = "hook") -> None:
        scheme = "https" if port.endswith("-tls") else "http"
        names = [f"h{n}.torture.localhost:{self.ports[port]}" for n in hosts]
        limits = [self._limits.get(n, (None, None)) for n in hosts]
        async with self.sql() as connection:
            await connection.execute(
                ADD_ENDPOINTS,
                [f"{scheme}://{name}{path or self._path}" for name in names], names, [f"t{n}" for n in hosts],
                [rate for rate, _ in limits], [most for _, most in limits], self.secret,
            )  # fmt: skip

    @contextlib.asynccontextmanager
    async def sql(self) -> Any:
        """A connection to whichever server can be written to."""
        connection = await asyncpg.connect(self.writable, timeout=10)
        try:
            yield connection
        finally:
            connection.terminate()

    async def close(self) -> None:
        with contextlib.suppress(AttributeError):
            await self.producer.stop()
        for daemon in self.daemons:
            if daemon.alive:
                daemon.process.send_signal(signal.SIGCONT)
                daemon.kill()
        if self._witness is not None:
            self._witness.terminate()
            self._witness.wait()
        await asyncio.to_thread(stop_all, self.clusters)
        self.clean_up()

    def clean_up(self) -> None:
        if Scene.kept:
            print(f"kept: {self.folder}", file=sys.stderr)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    # The witness.

    async def tell(self, **wanted: Any) -> None:
        """Change how the witness answers; with nothing, have its log written."""
        async with self._telling:
            if self._control is None:
                self._control = await asyncio.open_connection("127.0.0.1", self.ports["control"])
            reader, writer = self._control
            writer.write(json.dumps(wanted).encode() + b"\n")
            answer = json.loads(await reader.readline())
        self.late_s = max(self.late_s, answer["late_s"])
        self.producer.received(answer["opened"])

    async def look(self) -> list[Exchange]:
        """What has come since the last look."""
        await self.tell()
        return self.log.read()

    async def arrives(self, condition: Any, what: str, deadline_s: float = 60.0) -> Exchange:
        """Wait for an exchange of which that is so, from now on."""
        until = time.monotonic() + deadline_s
        while True:
            for exchange in await self.look():
                if condition(exchange):
                    return exchange
            if time.monotonic() > until:
                raise Broken(f"never: {what}")
            await asyncio.sleep(0.01)

    async def next_owner(self, moment: float, *, another: bool = True) -> float:
        """
        When somebody delivered who did not before that moment.

        That is an event that was inserted after it, or a request on a connection that was made after it: the last ones that a
        dead daemon made were accepted within a few milliseconds.  Not ``another``: the same one goes on, only events tell.
        """
        begun, made = self.producer.begun, self.log.made
        return (
            await self.arrives(
                lambda e: (
                    begun.get(e.id, 0.0) > moment or (another and made[e.connection] > moment + ACCEPTED_S)
                ),
                "nobody delivers any more",
            )
        ).opened

    def rate_between(self, start: float, end: float) -> float:
        """Requests a second."""
        opened = self.log.opened
        return (bisect_left(opened, end) - bisect_left(opened, start)) / (end - start)

    async def steady(self, share: float, rate: float, *, since: float, window_s: float = 1.0, deadline_s: float = 30.0) -> float:  # fmt: skip
        """Seconds from then until the beginning of a window in which so much of the rate arrived; the deadline if it never did."""
        while True:
            await self.look()
            now = time.monotonic()
            start = since
            while start + window_s <= now - 0.05:
                if self.rate_between(start, start + window_s) >= share * rate:
                    return start - since
                start += 0.1
            if now - since > deadline_s:
                return deadline_s
            await asyncio.sleep(0.05)

    # Daemons.

    async def daemon(self, *, ready: bool = True, **environment: str) -> Hookd:  # fmt: skip
        """Start one, and wait until it delivers or stands by."""
        self._started += 1
        defaults = {
            "HOOKD_DATABASE__DSN": self.dsn, "HOOKD_NETWORK__ALLOW": '["127.0.0.0/8"]', "HOOKD_NETWORK__CA_FILE": self._ca_file,
            "HOOKD_ADMIN__LISTEN": "", "HOOKD_LOG__FORMAT": "json", "HOOKD_LIMITS__CONCURRENCY": "200",
            "HOOKD_RETRY__SCHEDULE": json.dumps(["200ms"] * 12),
        }  # fmt: skip
        daemon = Hookd(self.folder, self._started, self._program, defaults | self._environment | environment)
        self.daemons.append(daemon)
        if ready:
            await daemon.ready()
        return daemon

    async def owners(self) -> dict[int, set[int]]:
        """Shards by the process id of the session that owns them."""
        async with self.sql() as connection:
            found: dict[int, set[int]] = {}
            for row in await connection.fetch(OWNED):
                found.setdefault(row["pid"], set()).add(row["shard"])
            return found

    async def shared(self, daemons: int, deadline_s: float = 30.0) -> None:
        """Wait until so many daemons have their shares."""
        until = time.monotonic() + deadline_s
        async with self.sql() as connection:
            while True:
                owned: dict[int, int] = {}
                for row in await connection.fetch(OWNED):
                    owned[row["pid"]] = owned.get(row["pid"], 0) + 1
                counts = owned.values()
                if len(owned) == daemons and sum(counts) == 64 and max(counts) - min(counts) <= 1:
                    return
                if time.monotonic() > until:
                    raise Broken(f"{daemons} daemons do not divide the shards: {owned}")
                await asyncio.sleep(0.02)

    def fault(self, *, lives: bool = False) -> Fault:
        """Something is being done to them now; ``lives``: to somebody who may not know it for a moment."""
        at = time.monotonic()
        found = Fault(at, time.time(), at + (TRUSTED_S if lives else 0.0))
        self.faults.append(found)
        return found

    async def in_flight(self) -> int:
        """Requests that are open."""
        await self.look()
        return len(self.log._open)  # noqa: SLF001

    # The end of a stretch.

    async def drained(self) -> set[bytes]:
        """Insert nothing more and wait until nothing is pending; returns what is left when nothing has moved for a long time."""
        await self.producer.stop()
        left, moved = -1, time.monotonic()
        while time.monotonic() - moved < STUCK_S:
            with contextlib.suppress(*AWAY):
                async with self.sql() as connection:
                    while time.monotonic() - moved < STUCK_S:
                        now_left = await connection.fetchval("select count(*) from hookd.delivery")
                        if not now_left:
                            return set()
                        if now_left != left:
                            left, moved = now_left, time.monotonic()
                        await asyncio.sleep(0.1)
                    rows = await connection.fetch("select event_id from hookd.delivery")
                    return {row["event_id"].bytes for row in rows}
            await asyncio.sleep(0.2)
        raise Broken("the database does not come back")

    async def settle_accounts(self) -> Account:
        """Wait until nothing is pending, and say what became of all that was sent since this was asked last."""
        pending = await self.drained()
        await self.look()
        await asyncio.sleep(max(self._hold_ms) / 1000 + 0.1)  # what was sent twice is answered twice
        await self.look()
        account = await self._account(EVERY_ID, pending)
        self.faults.clear()
        if not pending:
            async with self.sql() as connection:
                await connection.execute("set lock_timeout = '10s'")
                await connection.execute("truncate hookd.attempt, hookd.event, hookd.dead_letter")
        self._accounted = NO_ID
        return account

    async def settle_older(self, than_s: float) -> Account:
        """What became of events that were sent longer ago than this; the load goes on, and they are forgotten."""
        until = int((time.time() - than_s) * 1000).to_bytes(6, "big") + bytes(10)
        give_up = time.monotonic() + STUCK_S
        async with self.sql() as connection:
            while True:
                pending = await self._ids(connection, PENDING, until)
                if not pending or time.monotonic() > give_up:
                    break
                await asyncio.sleep(0.1)
        await self.look()
        return await self._account(until, pending)

    async def _ids(self, connection: asyncpg.Connection, query: str, until: bytes) -> set[bytes]:
        rows = await connection.fetch(query, UUID(bytes=self._accounted), UUID(bytes=until))
        return {row["event_id"].bytes for row in rows}

    async def _account(self, until: bytes, pending: set[bytes]) -> Account:
        async with self.sql() as connection:
            settled: dict[bytes, float] = {}
            for row in await connection.fetch(SETTLED, UUID(bytes=self._accounted), UUID(bytes=until)):
                settled[row["event_id"].bytes] = max(row["at"], settled.get(row["event_id"].bytes, 0.0))
            dead = await self._ids(connection, DEAD, until)
        seen = self.log.take(until)
        sent = self.producer.take(until, sum(map(len, seen.exchanges.values())))
        self._accounted = until
        # in a thread: the load goes on
        return await asyncio.to_thread(account_of, seen, sent, list(self.faults), settled, dead, pending)
