"""
A world from a seed: how many daemons, hosts and endpoints there are, who sends what, and what goes wrong.

It has two phases.  In the first everything may fail, and what has to be true is looked at with everything that happens.  Then
all is healed: whoever was killed is started again, and what is owed must be settled within a bound of virtual time, the
daemons must have divided the shards evenly, and must stop when they are told to.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

import hookd.core.backlogs
import hookd.dispatcher
import hookd.feed
import hookd.recorder
from hookd.config import (
    Config,
    DeliveryConfig,
    HostConfig,
    LimitsConfig,
    RetryConfig,
    SecurityConfig,
)
from hookd.postgres import owner as owner_module

from .connection import COMMIT, COPY
from .database import Blocked, Database
from .network import Answer, Network
from .process import Process, log_to
from .timeline import Stuck, Timeline
from .truth import Truth

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from .connection import Connection
    from .database import Session, Transaction

EPOCH = 1_800_000_000.0

SETTLED_WITHIN_S = 120.0
"""From the moment when all is healed.  Hosts fail for some seconds, so their breakers probe again within as many."""

STOPPED_WITHIN_S = 60.0

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

SETTLES = frozenset({owner_module.SETTLE_FINAL, owner_module.SETTLE_RETRY, COMMIT, COPY})

FAULTS = (
    "crash", "term", "freeze", "partition", "terminate", "storm", "restart_db", "slow_db", "breaks", "disk_full", "deaf",
    "hosts", "ours", "wall", "db_clock", "reload", "pause", "disable", "remove", "move", "limits", "replay", "late",
    "rollback", "poison", "repeatable", "slow_reads",
)  # fmt: skip
"""What may go wrong; a seed has about a third of them.  And ``sluggish``, which is only asked for: slow hosts from the start."""

SMALL: dict[tuple[Any, str], tuple[Any, ...]] = {
    (hookd.recorder, "HIGH_WATER"): (2, 10, 5000),
    (hookd.recorder, "BATCH_MOST"): (1, 3, 1000),
    (hookd.recorder, "BATCH_ENOUGH"): (2, 250),
    (hookd.dispatcher, "TURN_MOST"): (1, 3, 100),
    (hookd.core.backlogs, "REFILL_MOST"): (1, 5, 2000),
    (hookd.core.backlogs, "REFILL_TIMED_MOST"): (1, 5, 500),
    (hookd.feed, "EVENTS_AT_ONCE"): (1, 2, 500),
    (hookd.feed, "REPLACED_AT_ONCE"): (1, 2, 1000),
    (hookd.feed, "BUSY_READS"): (2, 20),
    (hookd.feed, "QUIET_S"): (0.05, 0.3, 1.0),
    (hookd.feed, "PAUSE_S"): (0.004, 0.02, 0.05),
    (hookd.core.backlogs, "QUEUE_LEAST"): (1, 2, 4),
    (hookd.core.backlogs, "QUEUE_MOST"): (4, 1024),
}
"""Sizes that a world of some dozen deliveries would never reach, and smaller ones that it does."""

MODES: dict[str, tuple[tuple[float, str], ...]] = {
    "ok": ((1.0, "ok"),),
    "slow": ((0.7, "slow"), (0.3, "ok")),
    "errors": ((0.9, "500"), (0.1, "ok")),
    "flaky": ((0.5, "ok"), (0.2, "500"), (0.15, "lost_before"), (0.15, "lost_after")),
    "throttles": ((0.6, "429"), (0.4, "ok")),
    "unavailable": ((0.8, "503"), (0.2, "502")),
    "refuses": ((1.0, "refused"),),
    "unreachable": ((1.0, "connect_timeout"),),
    "nameless": ((1.0, "dns"),),
    "untrusted": ((1.0, "tls"),),
    "hangs": ((0.8, "hangs"), (0.2, "ok")),
    "loses": ((0.6, "lost_after"), (0.2, "lost_before"), (0.2, "ok")),
    "garbles": ((0.7, "malformed"), (0.3, "ok")),
    "forges": ((0.4, "forged"), (0.6, "500")),
    "far": ((1.0, "far"),),
    "gone": ((0.1, "410"), (0.9, "ok")),
}


@dataclass
class Host:
    """A receiver."""

    name: str
    mode: str = "ok"
    since: float = 0.0


@dataclass
class Report:
    """How a world went."""

    seed: int
    violations: list[str]
    events: int
    deliveries: int
    exchanges: int
    duplicates: int
    settles: int
    virtual_s: float
    healed_s: float
    faults: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    digest: int = 0


class World:
    """One seed's."""

    def __init__(
        self, seed: int, trace: Callable[[str], None] | None = None, *, also: Collection[str] = ()
    ) -> None:
        """``trace`` is told everything; ``also`` are faults that happen whatever the seed says."""
        self.seed = seed
        self.tracing = trace is not None
        self._write = trace
        self.dice = random.Random(seed)
        self.timeline = Timeline()
        self.healed = False
        self.db_step_s = 0.0
        self._uuids = random.Random(seed + 1)
        dice = self.dice
        self.database = Database(dice.choice((2, 4, 4, 8)), lambda: self.wall() + self.db_step_s, self._uuid)
        self.truth = Truth(self.database, self.timeline, self.trace)
        self.network = Network(self.timeline, self._answer, self.truth, random.Random(seed + 2))
        self.network.lag_s = dice.choice((0.0002, 0.001, 0.02))
        self.faults = {f for f in FAULTS if dice.random() < 0.3}.union(also)
        self.faults_s = dice.uniform(1.0, 8.0)
        self.happened: Counter[str] = Counter()
        self.processes: list[Process] = []
        self._starts = 0
        self._applications = 0
        self._link_lag_s = dice.choice((0.0001, 0.0005, 0.005))
        self._break_rate = dice.choice((0.002, 0.02, 0.1))
        self._slow_s = 0.0
        self._full_until = 0.0
        self._deaf = dice.choice((0.2, 1.0)) if "deaf" in self.faults else 0.0
        self.hosts = [Host(f"h{n}.example.com:80") for n in range(dice.randint(1, 4))]
        if "sluggish" in self.faults:
            for host in self.hosts:
                host.mode = "slow"
        self._made_up = 0
        self.config = self._config()
        self.sizes = {k: dice.choice(v) for k, v in SMALL.items()} if dice.random() < 0.9 else {}
        if self.sizes:
            # by dice of its own, or every seed that failed once would be another one
            self.sizes[owner_module, "FORWARD_MOST"] = random.Random(seed + 3).choice((1, 3, 1000))
        self._end_at = math.inf

    # What others ask.

    def wall(self) -> float:
        """The true wall time."""
        return EPOCH + self.timeline.now

    def trace(self, text: str) -> None:
        """One more line."""
        if self._write is not None:
            self._write(f"{self.timeline.now - 1000:11.6f}  {text}")

    def _uuid(self) -> UUID:
        return UUID(int=self._uuids.getrandbits(128))

    def _config(self) -> Config:
        dice = self.dice
        schedule = dice.choice(
            ([0.2, 0.5, 1.0, 2.0], [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2], [0.5], [1.0, 1.0, 5.0])
        )
        self.truth.schedule_most_s = max(schedule) * 1.5
        self.truth.attempts_most = len(schedule) + 1
        return Config(
            delivery=DeliveryConfig(
                max_in_flight=dice.choice((1, 2, 5, 20, 100)),
                timeout=dice.choice((0.5, 2.0)),
                connect_timeout=0.4,
                drain=dice.choice((0.2, 2.0, 5.0)),
                format="raw",
            ),
            retry=RetryConfig(
                schedule=schedule, jitter=dice.choice((0.0, 0.2)), disable_after=dice.choice((3.0, 1e6, 1e6))
            ),
            limits=self._limits(),
            security=SecurityConfig(),
        )

    def _limits(self) -> LimitsConfig:
        dice = self.dice
        named = {
            h.name: HostConfig(
                rate=dice.choice((0.0, 5.0, 20.0)),
                burst=dice.choice((0, 1, 5)),
                concurrency=dice.choice((0, 1, 3)),
            )
            for h in self.hosts
            if dice.random() < 0.4
        }
        return LimitsConfig(
            rate=dice.choice((0.0, 0.0, 10.0, 50.0)),
            burst=dice.choice((0, 3)),
            concurrency=dice.choice((1, 2, 5, 50)),
            hosts=named,
        )

    # Running it.

    def run(self) -> Report:
        """Both phases, and the end."""
        was = log_to(self)
        try:
            with self._sized():
                self._set_up()
                self._run_until(self.timeline.now + self.faults_s, lambda: False)
                begun = self.timeline.now
                if not self.truth.violations:
                    self._heal()
                    self._run_until(begun + SETTLED_WITHIN_S, self._all_settled)
                    self._look_at_the_end()
                healed_s = self.timeline.now - begun
                if not self.truth.violations:
                    self._stop()
        except Stuck as stuck:
            self.truth.wrong(str(stuck))
            healed_s = 0.0
        finally:
            for process in self.processes:
                self.kill(process)
            log_to(None, was)
        tally = self.truth.tally
        return Report(
            self.seed,
            self.truth.violations,
            len(self.database.events),
            tally.deliveries,
            tally.exchanges,
            tally.duplicates,
            tally.settles,
            self.timeline.now - 1000,
            healed_s,
            self.happened,
            Counter(o.verdict for o in self.truth.owed.values() if o.verdict),
        )

    @contextlib.contextmanager
    def _sized(self) -> Iterator[None]:
        before = {key: getattr(*key) for key in self.sizes}
        for (module, name), value in self.sizes.items():
            setattr(module, name, value)
        try:
            yield
        finally:
            for (module, name), value in before.items():
                setattr(module, name, value)

    def _run_until(self, until: float, enough: Callable[[], bool]) -> None:
        violations = self.truth.violations
        self.timeline.run(until, lambda: bool(violations) or enough())

    def _set_up(self) -> None:
        dice = self.dice
        tx = self.database.begin()
        tenants = ["t", "t", "u", "hookd"] if dice.random() < 0.2 else ["t", "t", "t", "u"]
        for _ in range(dice.randint(1, 7)):
            self._add_endpoint(tx, dice.choice(tenants))
        self.database.commit(tx)
        for n in range(dice.choice((1, 1, 2, 2, 3))):
            self.timeline.after(dice.choice((0.0, dice.uniform(0, 2))), self.start, "abc"[n])
        for _ in range(dice.randint(1, 3)):
            self._produce_for(dice.uniform(0.02, 0.5))
        for name in sorted(self.faults):
            inject = getattr(self, f"_fault_{name}", None)
            if inject is not None:
                self._again(name, inject)
        self.trace(f"seed {self.seed}: faults {', '.join(sorted(self.faults))}; {self.config}; {self.sizes}")

    def _again(self, name: str, inject: Callable[[], None]) -> None:
        every_s = self.faults_s / self.dice.choice((1, 2, 5))

        def happen() -> None:
            if not self.healed:
                self.happened[name] += 1
                inject()
                self.timeline.after(self.dice.expovariate(1 / every_s), happen)

        self.timeline.after(self.dice.expovariate(1 / every_s), happen)

    def _add_endpoint(self, tx: Transaction, tenant: str) -> None:
        dice = self.dice
        host = dice.choice(self.hosts).name
        self._made_up += 1
        self.database.add_endpoint(
            tx,
            f"http://{host.removesuffix(':80')}/e{self._made_up}",
            host,
            SECRET,
            tenant=tenant,
            types=dice.choice((("*",), ("*",), ("a.*",), ("a.x", "b"))),
            ordered=dice.random() < 0.25,
            rate=dice.choice((None, None, None, 20.0)),
            concurrency=dice.choice((None, None, 1, 2)),
        )

    # Daemons.

    def start(self, name: str) -> None:
        """Start a daemon."""
        self._starts += 1
        process = Process(self, f"{name}{self._starts}", self.config, self.seed * 1000 + self._starts)
        self.processes.append(process)
        self.trace(f"{process.name} starts")

    def link_faults(self, process: Process) -> None:
        """What may happen on the way of a process to the database."""
        link = process.link
        link.lag_s = self._link_lag_s
        link.server_s = lambda query: self._slow_s if query in SETTLES else 0.0
        link.fails = self._fails
        if "slow_reads" in self.faults:
            link.answer_s = self._answers_late
        if "breaks" in self.faults:
            link.breaks = self._breaks

    def _fails(self, connection: Connection, query: str) -> Exception | None:
        if (
            self._full_until > self.timeline.now
            and (query in SETTLES or query == owner_module.FORWARD)
            and query != COMMIT
        ):
            return asyncpg.DiskFullError("could not extend file: No space left on device")
        return None

    def _answers_late(self, query: str) -> float:
        if self.healed or query in SETTLES or self.dice.random() < 0.7:
            return 0.0
        return self.dice.uniform(0.0, 0.1)

    def _breaks(self, query: str) -> str | None:
        if self.healed or self.dice.random() >= (
            self._break_rate if query in SETTLES else self._break_rate / 10
        ):
            return None
        self.happened["broken"] += 1
        return self.dice.choice(("before", "after"))

    def ended(self, process: Process) -> None:
        """A daemon has ended by itself."""
        self.trace(f"{process.name} ends with {process.exit_status}")
        self.timeline.after(0.0, self._after_end, process)

    def _after_end(self, process: Process) -> None:
        self.kill(process)
        if not self.healed:
            self.timeline.after(self.dice.uniform(0.0, 2.0), self.start, process.name[0])

    def kill(self, process: Process) -> None:
        """SIGKILL, or what is left when it has ended."""
        if not process.dead:
            self.truth.deaf = True  # what its remains say when they are cancelled means nothing
            try:
                process.kill()
            finally:
                self.truth.deaf = False

    def alive(self) -> list[Process]:
        """Those that run."""
        return [p for p in self.processes if not p.dead]

    # Applications.

    def _produce_for(self, every_s: float) -> None:
        if self.healed:
            return
        self._produce()
        self.timeline.after(self.dice.expovariate(1 / every_s), self._produce_for, every_s)

    def _produce(self) -> None:
        if not self.database.up or len(self.truth.owed) > 150:
            return
        dice = self.dice
        session = self.database.connect("application")
        tx = self.database.begin(session)
        if "repeatable" in self.faults and dice.random() < 0.5:
            tx.sees = dict(self.database.endpoints)
        self._applications += 1
        count = dice.choice((1, 1, 1, 2, 5, 12))
        late = "late" in self.faults and dice.random() < 0.4
        for n in range(count):
            delay = dice.uniform(0, 1.5) if late else n * 0.0005
            self.timeline.after(delay, self._insert, session)
        end_s = 1.6 if late else count * 0.0005 + dice.uniform(0.0005, 0.02)
        self.timeline.after(end_s, self._finish, session, "rollback" in self.faults and dice.random() < 0.3)

    def _insert(self, session: Session) -> None:
        if not session.alive or session.tx is None:
            return
        dice = self.dice
        now = self.database.now()
        more: dict[str, Any] = {}
        if dice.random() < 0.3:
            more["order_key"] = dice.choice("kl")
        if dice.random() < 0.25:
            more["coalesce_key"] = dice.choice("st")
        if dice.random() < 0.1:
            more["deliver_at"] = now + datetime.timedelta(seconds=dice.uniform(-0.5, 4))
        if dice.random() < 0.1:
            more["expires_at"] = now + datetime.timedelta(seconds=dice.uniform(0.0, 6))
        self.database.insert_event(
            session.tx, dice.choice(("a.x", "a.y", "b")), dice.choice("tttu"), "{}", **more
        )

    def _finish(self, session: Session, rollback: bool) -> None:
        self._applications -= 1
        if session.alive and session.tx is not None:
            if rollback:
                self.database.rollback(session.tx)
            else:
                self.database.commit(session.tx)
        self.database.end(session, self.timeline.now)

    # Receivers.

    def _answer(self, host: str, path: str) -> Answer:
        dice = self.network.dice
        mode = next((h.mode for h in self.hosts if h.name == host), "ok")
        ((_, what),) = dice.choices(MODES[mode], [weight for weight, _ in MODES[mode]])
        takes_s = dice.uniform(0.0005, 0.02)
        match what:
            case "ok":
                body = "nul \0" if "poison" in self.faults and dice.random() < 0.1 and not self.healed else ""
                return Answer(
                    "answered", takes_s=takes_s, body=body, connect_s=dice.choice((0.0, 0.0, 0.003))
                )
            case "slow":
                return Answer("answered", takes_s=dice.uniform(0.2, 2.4))
            case "far":
                return Answer("answered", takes_s=takes_s, connect_s=dice.uniform(0.01, 0.3))
            case "429" | "503":
                retry_after = dice.choice((None, "1", "2", "junk"))
                return Answer("answered", int(what), takes_s, retry_after=retry_after)
            case "500" | "502" | "410":
                return Answer("answered", int(what), takes_s)
            case "hangs":
                return Answer("hangs", takes_s=dice.choice((0.01, 3.0)))
            case _:
                return Answer(what, takes_s=takes_s)

    # Faults.

    def _one(self) -> Process | None:
        alive = [p for p in self.alive() if not p.stopping]
        return self.dice.choice(alive) if alive else None

    def _fault_crash(self) -> None:
        process = self._one()
        if process is not None:
            self.trace(f"{process.name} is killed")
            self.kill(process)
            self.timeline.after(self.dice.choice((0.0, 0.1, 1.5)), self._start_unless_healed, process.name[0])

    def _start_unless_healed(self, name: str) -> None:
        if not self.healed:
            self.start(name)

    def _fault_term(self) -> None:
        process = self._one()
        if process is not None:
            self.trace(f"{process.name} is told to stop")
            process.stop()
            if self.dice.random() < 0.2:
                self.timeline.after(self.dice.uniform(0, 0.5), process.stop)

    def _fault_freeze(self) -> None:
        process = self._one()
        if process is not None and not process.stopped:
            self.trace(f"{process.name} is frozen")
            process.freeze()
            seconds = self.dice.choice((0.1, 1.0, 4.0))
            if self.dice.random() < 0.7:
                self.timeline.after(seconds * self.dice.random(), self._end_sessions, process, "owner")
            self.timeline.after(seconds, self._thaw, process)

    def _thaw(self, process: Process) -> None:
        if process.stopped:
            self.trace(f"{process.name} goes on")
            process.thaw()

    def _fault_partition(self) -> None:
        process = self._one()
        if process is not None and not process.link.cut:
            self.trace(f"{process.name} is cut off from the database")
            process.link.sever()
            self.timeline.after(self.dice.choice((0.2, 2.0, 5.0, 9.0)), self._mend, process)

    def _mend(self, process: Process) -> None:
        if process.link.cut:
            self.trace(f"{process.name} reaches the database again")
            process.link.mend()

    def _end_sessions(self, process: Process, purpose: str) -> None:
        for connection in list(process.link.connections):
            if purpose in ("all", connection.session.purpose):
                self.trace(
                    f"the {connection.session.purpose} session {connection.session.pid} of {process.name} is ended"
                )
                self.database.end(
                    connection.session,
                    self.timeline.now,
                    asyncpg.AdminShutdownError("terminating connection due to administrator command"),
                )

    def _fault_terminate(self) -> None:
        process = self._one()
        if process is not None:
            self._end_sessions(process, self.dice.choice(("owner", "owner", "feed", "upkeep", "all")))

    def _fault_storm(self) -> None:
        for n in range(6):
            self.timeline.after(n * 0.5, self._storm)

    def _storm(self) -> None:
        if not self.healed:
            for process in self.alive():
                self._end_sessions(process, "all")

    def _fault_restart_db(self) -> None:
        if self.database.up:
            self.trace("the database goes down")
            self.database.stop(self.timeline.now)
            self.timeline.after(self.dice.choice((0.05, 0.5, 3.0)), self._start_db)

    def _start_db(self) -> None:
        if not self.database.up:
            self.trace("the database is up")
            self.database.start()

    def _fault_slow_db(self) -> None:
        self._slow_s = self.dice.choice((0.0, 0.05, 0.4, 1.5))
        self.trace(f"settling takes {self._slow_s} s a statement")

    def _fault_disk_full(self) -> None:
        self._full_until = self.timeline.now + self.dice.choice((0.2, 2.0))
        self.trace("the database has no space left")

    def _fault_hosts(self) -> None:
        host = self.dice.choice(self.hosts)
        host.mode = self.dice.choice(sorted(MODES)) if self.dice.random() < 0.8 else "ok"
        self.trace(f"{host.name} {host.mode}")

    def _fault_ours(self) -> None:
        process = self._one()
        if process is not None:
            process.ours_until = self.timeline.now + self.dice.choice((0.1, 1.0))
            self.trace(f"{process.name} has no descriptors left")

    def _fault_wall(self) -> None:
        process = self._one()
        if process is not None:
            process.wall_step_s = self.dice.choice((-3600.0, -5.0, 0.0, 5.0, 3600.0))
            self.truth.wall_slack_s = 3600.0
            self.trace(f"the clock of {process.name} is off by {process.wall_step_s} s")

    def _fault_db_clock(self) -> None:
        step = self.dice.choice((-2.0, 3.0, 60.0))
        self.truth.clock_went_back |= step < 0
        self.truth.wall_slack_s = 3600.0
        self.db_step_s += step
        self.trace(f"the clock of the database steps by {step} s")

    def _fault_reload(self) -> None:
        from msgspec.structs import replace

        self.config = replace(
            self.config,
            limits=self._limits(),
            delivery=replace(self.config.delivery, max_in_flight=self.dice.choice((1, 5, 50))),
        )
        self.trace(f"reload: {self.config.limits}")
        for process in self.alive():
            process.reload(self.config)

    # Operators.

    def _operate(self, work: Callable[[Transaction], object], hold_s: float = 0.0) -> None:
        """Run a transaction that may have to wait for others."""
        if not self.database.up:
            return
        session = self.database.connect("operator")
        tx = self.database.begin(session)
        try:
            work(tx)
        except Blocked as blocked:
            self.database.rollback(tx)
            self.database.end(session, self.timeline.now)
            blocked.holder.waiters.append(lambda: self.timeline.after(0.0, self._operate, work, hold_s))
            return
        self._applications += 1
        self.timeline.after(hold_s, self._finish, session, False)

    def _change(self, states: tuple[str, ...], **change: Any) -> None:
        found = [e for e in self.database.endpoints.values() if e.state in states]
        if found:
            endpoint = self.dice.choice(found)
            self.trace(f"endpoint {endpoint.key} becomes {change}")
            hold_s = self.dice.choice((0.0, 0.0, 0.3))
            self._operate(partial(self._update, key=endpoint.key, states=states, change=change), hold_s)

    def _update(self, tx: Transaction, key: int, states: tuple[str, ...], change: dict[str, Any]) -> None:
        if self.database.endpoints[key].state in states:
            self.database.change_endpoint(tx, key, **change)

    def _fault_pause(self) -> None:
        self._change(("active",), state="paused", state_reason="by hand")
        self.timeline.after(self.dice.uniform(0, 2), self._resume)

    def _resume(self) -> None:
        change: dict[str, Any] = {
            "state_reason": None,
            "failing_since": None,
            "failing_reason": None,
            "parked_at": None,
        }
        self._change(("paused", "disabled"), state="active", **change)

    def _fault_disable(self) -> None:
        self._change(("active", "paused"), state="disabled", state_reason="by hand")
        self.timeline.after(self.dice.uniform(0, 4), self._resume)

    def _fault_remove(self) -> None:
        self._change(("active", "paused", "disabled"), state="removed", state_reason=None)
        self._operate(lambda tx: self._add_endpoint(tx, "t"))

    def _fault_move(self) -> None:
        host = self.dice.choice(self.hosts).name
        self._made_up += 1
        url = f"http://{host.removesuffix(':80')}/m{self._made_up}"
        self._change(("active", "paused"), host=host, url=url)

    def _fault_limits(self) -> None:
        self._change(
            ("active", "paused"),
            rate=self.dice.choice((None, 5.0, 50.0)),
            concurrency=self.dice.choice((None, 1, 4)),
        )

    def _fault_replay(self) -> None:
        letters = [d for d in self.database.dead.values() if not d.replayed][:3]
        if letters:
            self.trace(f"replay of {[d.delivery_id for d in letters]}")
            self._operate(lambda tx: self.database.replay(tx, letters))

    # The second phase.

    def _heal(self) -> None:
        self.trace("all is healed")
        self.healed = True
        self._slow_s = self._full_until = self._deaf = 0.0
        self._start_db()
        for host in self.hosts:
            host.mode = "ok"
        for process in self.alive():
            self._thaw(process)
            self._mend(process)
            process.ours_until = 0.0
        running = {p.name[0] for p in self.alive() if not p.stopping}
        for name in sorted({p.name[0] for p in self.processes} or {"a"}):
            if name not in running:
                self.start(name)
        for _ in range(3):
            self.timeline.after(self.dice.uniform(0, 1.0), self._produce)
        self.timeline.after(1.0, self._resume_all)
        self._settled_from = self.timeline.now + 1.2

    def _resume_all(self) -> None:
        for key in list(self.database.endpoints):
            self._operate(partial(self._update, key=key, states=("paused",), change={"state": "active"}))

    def _all_settled(self) -> bool:
        return (
            not self.database.deliveries
            and not self._applications
            and self.timeline.now > self._settled_from
            and self._divided()
        )

    def _divided(self) -> bool:
        """Whether each daemon owns its share, and all shards have an owner."""
        running = [p for p in self.alive() if not p.stopping]
        owned = Counter(session.pid for session in self.database.locks.values())
        counts = [owned[s.pid] if (s := p.session()) is not None else -1 for p in running]
        return sum(counts) == self.database.shards and max(counts) - min(counts) <= 1

    def _look_at_the_end(self) -> None:
        truth = self.truth
        if truth.violations:
            return
        pending = truth.pending()
        if not pending and not self._divided():
            truth.wrong(f"the shards are not divided evenly: {self.database.locks}")
        if pending:
            truth.wrong(f"{len(pending)} deliveries are not settled {SETTLED_WITHIN_S:.0f} s after all was healed: {[o.row for o in pending[:5]]}")  # fmt: skip

    def _stop(self) -> None:
        # who was told to before may have had no database to write to within its grace
        running = [p for p in self.alive() if not p.stopping]
        for process in running:
            process.stop()
        self._run_until(self.timeline.now + STOPPED_WITHIN_S, lambda: not self.alive())
        for process in running:
            if process.exit_status != 0:
                self.truth.wrong(f"{process.name} was told to stop and ended with {process.exit_status}")
