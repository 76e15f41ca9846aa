"""
Whether anything is ever lost: real daemons and a real PostgreSQL, killed, stopped, starved and lied to.

    python bench/torture.py [--rows kill-standby,zombie,…] [--trials N] [--short] [--resume] [--rate 2000] [--list]

Each row of the table is a fault, tried so and so many times under load.  What was lost, doubled or wrongly settled is judged by
the receiver's own log (``bench/witness.py``, a process that nothing happens to) against what the producer's transactions
committed; ``bench/account.py`` says how.  Beside a zero stands what it proves: with 95 % confidence the rate of such an event
is below 3/N.

Trials are made in batches; each batch that ended is kept in ``.bench/torture.jsonl``, and ``--resume`` makes only the trials
that are still missing, as long as neither hookd nor these scripts have changed.  ``.bench/torture.md`` and ``.bench/torture.json`` are written anew after each batch.  ``--short`` is
what CI runs: a few trials of each row under a small load, of which only the counts mean anything.  ``--spoilt`` runs a daemon
with a bug (``bench/spoilt.py``): the row that is about it has to fail.

Needs Linux.  Rows that need root (to fill up a disk) are skipped elsewhere, and say so.  Load goes to loopback only.
Exit status: 0 all rows passed, 1 one did not, 2 one broke down or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
from account import Account
from clusters import Cluster, SmallDisk, why_no_small_disk
from scene import AWAY, Broken, Hookd, Scene
from spoilt import BUGS
from stage import percentile
from witness import FORGERIES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from account import Exchange

HERE = Path(__file__).parent
RECOVERED = 0.98
"""Of the rate before."""

FULL_MOST_S = 60
"""For so long may a full disk go unnoticed."""

PRESSED_MB = 40
"""More than the ``max_wal_size`` of a small cluster, faster than a checkpoint."""

PRESS = "select pg_logical_emit_message(false, 'torture', repeat('x', 1000000))"

BACKLOG = 100_000
STARTS_S = 0.1
"""No daemon sends anything so soon after its start: Python takes longer.  What the witness notes until then the one before it
had written, and a witness that is kept from its core notes late (by 30 ms in two of 500 trials beside other load)."""

JITTER_S = 0.05
"""So early beside its host's rate may a request be noted, beyond the receiver's own lateness."""

TERMINATE = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'hookd %' and datname = current_database()"

BEFORE = "select event_id from hookd.attempt where at <= to_timestamp($1) and verdict = 'delivered'"


@dataclass(slots=True)
class Run:
    """A batch of trials of a row, as it is asked for."""

    trials: int
    rate: float
    short: bool
    seed: int
    step: Callable[[], None]
    bug: str = ""
    """Of ``bench/spoilt.py``."""

    @property
    def program(self) -> tuple[str, ...]:
        """What Python runs."""
        return (str(HERE / "spoilt.py"), self.bug) if self.bug else ("-m", "hookd")

    @property
    def dice(self) -> random.Random:
        return random.Random(self.seed)

    def long(self, at_length: float, in_short: float) -> float:
        return in_short if self.short else at_length


@dataclass(slots=True)
class Found:
    """What a batch of trials showed."""

    trials: int = 0
    account: Account = field(default_factory=Account)
    times: dict[str, list[float]] = field(default_factory=dict)
    """By what they are of; milliseconds."""
    wrong: dict[str, float] = field(default_factory=dict)
    """What must be 0 beside what every account counts."""
    shown: dict[str, float] = field(default_factory=dict)
    """Figures that nobody judges, of the last batch."""

    def time(self, name: str, seconds: float) -> None:
        self.times.setdefault(name, []).append(seconds * 1000)

    def count(self, name: str, number: float) -> None:
        self.wrong[name] = self.wrong.get(name, 0) + number


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    title: str
    run: Callable[[Run], Awaitable[Found]]
    trials: int
    batch: int
    short: int
    goals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of the times: percentile, and milliseconds at most."""
    unit: str = "trials"
    missing: Callable[[], str] = lambda: ""
    """Why it cannot be run here."""


# The rows.


async def under_load(scene: Scene, run: Run) -> None:
    """Until as much is in flight as the load makes."""
    scene.producer.start(run.rate)
    await scene.arrives(lambda _: True, "nothing arrives")
    await asyncio.sleep(run.long(1.0, 0.3))


async def kill_standby(run: Run) -> Found:
    found = Found()
    dice = run.dice
    async with Scene(seed=run.seed, program=run.program) as scene:
        owner = await scene.daemon()
        await under_load(scene, run)
        for _ in range(run.trials):
            standby = await scene.daemon()
            await scene.shared(2)
            await asyncio.sleep(dice.uniform(0.2, 1.2) * run.long(1.0, 0.5))
            owner.process.kill()
            fault = scene.fault()
            found.time("kill to the next owner's first delivery", await scene.next_owner(fault.at) - fault.at)
            owner.kill()
            owner = standby
            run.step()
        found.account = await scene.settle_accounts()
    return found


async def kill_lone(run: Run) -> Found:
    found = Found()
    dice = run.dice
    wanted = int(run.long(BACKLOG, 2000))
    async with Scene(
        seed=run.seed, program=run.program, environment={"HOOKD_DELIVERY__MAX_IN_FLIGHT": "500"}
    ) as scene:
        await scene.producer.backlog(wanted)
        daemon = await scene.daemon()
        await scene.arrives(lambda _: True, "nothing arrives")
        for _ in range(run.trials):
            await asyncio.sleep(dice.uniform(0.2, 1.2))
            daemon.process.kill()
            fault = scene.fault()
            daemon.kill()
            async with scene.sql() as connection:
                pending = await connection.fetchval("select count(*) from hookd.delivery")
            await scene.producer.backlog(max(0, wanted - pending))
            await scene.look()
            daemon = await scene.daemon(ready=False)
            fault.until = daemon.begun + STARTS_S  # until then nobody else can have sent
            first = await scene.arrives(
                lambda e, begun=daemon.begun: scene.log.made[e.connection] > begun + STARTS_S,
                "nobody delivers",
            )
            found.time("start to first delivery", first.opened - daemon.begun)
            run.step()
        await scene.tell(hold_ms=[0, 0])
        found.account = await scene.settle_accounts()
    return found


async def zombie(run: Run) -> Found:
    found = Found()
    dice = run.dice
    # slow answers: as many in flight at a fourth of the rate, so that the zombie may wake before they come
    async with Scene(seed=run.seed, program=run.program, hold_ms=(900, 1100)) as scene:
        owner = await scene.daemon()
        scene.producer.start(run.rate / 4)
        await scene.arrives(lambda _: True, "nothing arrives")
        standby = await scene.daemon()
        for n in range(run.trials):
            await scene.shared(2)
            await asyncio.sleep(dice.uniform(0.5, 1.5))
            session = await _session_of_busy(scene)
            owner.process.send_signal(signal.SIGSTOP)
            fault = scene.fault()
            await asyncio.sleep(dice.uniform(0.0, 0.1))
            async with scene.sql() as connection:
                await connection.execute("select pg_terminate_backend($1)", session)
                ended = time.monotonic()
                while await connection.fetchval("select exists (select from pg_stat_activity where pid = $1)", session):  # fmt: skip
                    await asyncio.sleep(0.005)
                before = {row[0] for row in await connection.fetch(BEFORE, fault.wall)}
            found.time(
                "session ended to the next owner's first delivery", await scene.next_owner(ended) - ended
            )
            # every other one wakes while the next owner has the same deliveries in flight
            await asyncio.sleep(dice.uniform(0.0, 0.3) if n % 2 else run.long(30, 1.5))
            fault.woken = time.monotonic()
            owner.process.send_signal(signal.SIGCONT)
            await scene.shared(2)
            await asyncio.sleep(run.long(2, 0.5))
            async with scene.sql() as connection:
                after = {row[0] for row in await connection.fetch(BEFORE, fault.wall)}
            found.count("rows settled by the zombie", len(after - before))
            owner, standby = standby, owner
            run.step()
        found.count("daemons that ended", sum(not d.alive for d in scene.daemons))
        found.account = await scene.settle_accounts()
    return found


async def _session_of_busy(scene: Scene) -> int:
    """Of the one that delivers: shards with nothing to do are the first to be given away."""
    owned = await scene.owners()
    async with scene.sql() as connection:
        busy = {row["shard"] for row in await connection.fetch("select distinct shard from hookd.endpoint")}
    return max(owned, key=lambda pid: len(owned[pid] & busy))


async def failpoints(run: Run) -> Found:
    from hookd.failpoints import MOMENTS  # noqa: PLC0415 - only here

    found = Found()
    dice = run.dice
    async with Scene(seed=run.seed, program=run.program, hold_ms=(20, 60)) as scene:
        scene.producer.start(run.rate / 2)
        for n in range(run.trials):
            moment = list(MOMENTS)[n % len(MOMENTS)]
            few = {"recovery-page": 3, "shard-released": 1}
            nth = dice.randint(1, few.get(moment, 40))
            daemon = await scene.daemon(ready=False, HOOKD_FAILPOINT=f"{moment}=crash@{nth}")
            if scene.faults and not any(d.alive for d in scene.daemons[:-1]):
                scene.faults[-1].until = daemon.begun + STARTS_S  # until then nobody else can have sent
            joins = None
            if moment == "shard-released":
                await daemon.ready()
                joins = asyncio.create_task(scene.daemon())
            until = time.monotonic() + 60
            while daemon.alive:
                if time.monotonic() > until:
                    raise Broken(f"{moment}@{nth} is never passed")
                await asyncio.sleep(0.002)
            scene.fault()
            found.count("did not die of it", daemon.process.returncode != -9)
            if joins is not None:
                await (await joins).stop()
            run.step()
        await scene.daemon()
        await asyncio.sleep(0.5)
        found.account = await scene.settle_accounts()
    return found


async def restart(run: Run) -> Found:
    found = Found()
    ways = ["immediate", "immediate", "immediate", "fast", "kill -9"]
    async with Scene(seed=run.seed, program=run.program) as scene:
        daemon = await scene.daemon()
        await under_load(scene, run)
        for n in range(run.trials):
            await asyncio.sleep(run.long(2.5, 1.2))
            rate = await _rate_now(scene, run)
            way = ways[n % len(ways)]
            fault = scene.fault(lives=True)
            if way == "kill -9":
                scene.primary.kill(alone=True)
            else:
                await asyncio.to_thread(scene.primary.stop, way)
            await asyncio.to_thread(scene.primary.start)
            up = time.monotonic()
            fault.until = up + 2
            found.time(
                f"up to {RECOVERED:g} of the rate",
                await scene.steady(RECOVERED, rate, since=up, deadline_s=run.long(30, 5)),
            )
            run.step()
        found.count("daemons that ended", not daemon.alive)
        found.account = await scene.settle_accounts()
    return found


async def _rate_now(scene: Scene, run: Run) -> float:
    await scene.look()
    now = time.monotonic() - 0.05
    return scene.rate_between(now - run.long(2, 1), now)


async def failover(run: Run) -> Found:
    found = Found()
    async with Scene(seed=run.seed, program=run.program, standby=True) as scene:
        daemon = await scene.daemon()
        await under_load(scene, run)
        primary, standby = scene.clusters
        for n in range(run.trials):
            await asyncio.sleep(run.long(2.5, 1.0))
            rate = await _rate_now(scene, run)
            fault = scene.fault(lives=True)
            await asyncio.to_thread(primary.kill)
            asked = time.monotonic()
            await asyncio.to_thread(standby.promote)
            promoted = time.monotonic()
            found.time("PostgreSQL's own promotion", promoted - asked)
            first = await scene.next_owner(asked, another=False)
            fault.until = first + 0.1
            found.time("promotion to the first delivery", max(0.0, first - promoted))
            found.time(f"promotion to {RECOVERED:g} of the rate", await scene.steady(RECOVERED, rate, since=promoted, deadline_s=run.long(30, 5)))  # fmt: skip
            run.step()
            if n + 1 < run.trials:
                primary, standby = standby, primary
                await asyncio.to_thread(standby.follow, primary)
                await asyncio.to_thread(primary.wait_for, "*")
                await _streams(primary)
        found.count("daemons that ended", not daemon.alive)
        found.account = await scene.settle_accounts()
    return found


async def _streams(primary: Cluster) -> None:
    connection = await asyncpg.connect(primary.dsn())
    until = time.monotonic() + 30
    while not await connection.fetchval("select exists (select from pg_stat_replication where sync_state = 'sync')"):  # fmt: skip
        if time.monotonic() > until:
            raise Broken("the new standby does not become synchronous")
        await asyncio.sleep(0.05)
    await connection.close()


async def storm(run: Run) -> Found:
    found = Found()
    async with Scene(seed=run.seed, program=run.program) as scene:
        await scene.daemon()
        await scene.daemon()
        await under_load(scene, run)
        for _ in range(run.trials):
            await asyncio.sleep(run.long(2.5, 1.2))
            rate = await _rate_now(scene, run)
            begun = time.monotonic()
            ended = 0
            async with scene.sql() as connection:
                while time.monotonic() - begun < run.long(60, 3):
                    scene.fault(lives=True)
                    ended += len(await connection.fetch(TERMINATE))
                    await asyncio.sleep(0.5)
            over = time.monotonic()
            await scene.look()
            found.shown["sessions ended"] = ended
            found.shown["of the rate meanwhile"] = round(scene.rate_between(begun, over) / rate, 3)
            found.time(
                f"end to {RECOVERED:g} of the rate",
                await scene.steady(RECOVERED, rate, since=over, deadline_s=run.long(30, 5)),
            )
            run.step()
        found.count("daemons that ended", sum(not d.alive for d in scene.daemons))
        found.account = await scene.settle_accounts()
    return found


CHURN_HOSTS = 20


async def churn(run: Run) -> Found:
    found = Found()
    dice = run.dice
    rate = run.long(800, 300)
    # four hosts have a rate, and four a concurrency, that is about what they could take
    limits: dict[int, tuple[float | None, int | None]] = dict.fromkeys(range(4), (0.9 * rate / CHURN_HOSTS, None))  # fmt: skip
    limits |= dict.fromkeys(range(4, 8), (None, int(run.long(3, 1))))
    async with Scene(
        seed=run.seed, program=run.program, hosts=CHURN_HOSTS, limits=limits, hold_ms=(60, 80)
    ) as scene:
        await scene.daemon()
        scene.producer.start(rate)
        await scene.arrives(lambda _: True, "nothing arrives")
        for _ in range(run.trials):
            for _ in range(3):
                here = [d for d in scene.daemons if d.alive]
                joins = len(here) == 1 or (len(here) < 4 and dice.random() < 0.5)
                if joins:
                    await scene.daemon(ready=False)
                    begun = await _joined(scene, len(here) + 1)
                    await scene.shared(len(here) + 1)
                    found.time("joined to even", time.monotonic() - begun)
                else:
                    leaver = dice.choice(here)
                    begun = time.monotonic()
                    leaving = asyncio.create_task(leaver.stop())
                    await scene.shared(len(here) - 1)
                    found.time("SIGTERM to even", time.monotonic() - begun)
                    found.count("ended with an error", await leaving != 0)
                await asyncio.sleep(dice.uniform(0.0, 1.0) * run.long(1, 0.3))
            run.step()
        await scene.drained()
        await scene.look()
        exchanges = [e for all_of_it in scene.log.exchanges.values() for e in all_of_it]
        over, jitter = _over(exchanges, limits)
        found.count("above a host's concurrency", over)
        found.count("above a host's rate", jitter > JITTER_S + scene.late_s)
        found.shown["most that a request was early, ms"] = round(jitter * 1000, 1)
        found.shown["most that the receiver was late, ms"] = round(scene.late_s * 1000, 1)
        found.account = await scene.settle_accounts()
    return found


async def _joined(scene: Scene, members: int) -> float:
    """When so many have their lock of being there."""
    async with scene.sql() as connection:
        until = time.monotonic() + 60
        while True:
            count = await connection.fetchval(
                """select count(*) from pg_locks where locktype = 'advisory' and classid = 1752133484 and granted
                   and database = (select oid from pg_database where datname = current_database())"""
            )
            if count >= members:
                return time.monotonic()
            if time.monotonic() > until:
                raise Broken("a daemon does not join")
            await asyncio.sleep(0.01)


def _over(exchanges: list[Exchange], limits: dict[int, tuple[float | None, int | None]]) -> tuple[int, float]:
    """How many requests were above their host's concurrency, and by how many seconds one was too early for its host's rate."""
    over, early = 0, 0.0
    for host, (rate, most) in limits.items():
        here = sorted((e for e in exchanges if e.host == host), key=lambda e: e.opened)
        if most is not None:
            moves = sorted([(e.opened, 1) for e in here] + [(e.ended, -1) for e in here if e.ended])
            under_way = 0
            for _, change in moves:
                under_way += change
                over += change > 0 and under_way > most
        if rate is not None:
            least = float("inf")
            for n, e in enumerate(here):
                ahead = n - rate * (e.opened - here[0].opened)
                least = min(least, ahead)
                early = max(early, (ahead - least) / rate)
    return over, early


async def drain(run: Run) -> Found:
    found = Found()
    dice = run.dice
    async with Scene(
        seed=run.seed, program=run.program, environment={"HOOKD_DELIVERY__DRAIN": "10s"}
    ) as scene:
        owner = await scene.daemon()
        await under_load(scene, run)
        for n in range(run.trials):
            # every other time somebody waits to go on, else the next one is started when it has ended
            following = await scene.daemon() if n % 2 else None
            await asyncio.sleep(dice.uniform(0.2, 1.0))
            begun = time.monotonic()
            status = await owner.stop()
            found.time("SIGTERM to exit", time.monotonic() - begun)
            found.count("ended with an error", status != 0)
            owner = following or await scene.daemon()
            run.step()
        found.account = await scene.settle_accounts()
    return found


async def forged(run: Run) -> Found:
    return await _forge(run)


async def forged_unguarded(run: Run) -> Found:
    found = await _forge(replace(run, bug="unguarded"))
    believed = found.account.dishonest + found.account.lost
    # here it is the other way round: a lie that nobody believes would mean that the row above proves nothing
    found.shown["forged answers believed"] = believed
    found.account = Account(events=found.account.events, received=found.account.received)
    found.count("no forged answer was believed", believed == 0)
    return found


async def _forge(run: Run) -> Found:
    """
    Each host is asked once a second, so that a push is there before the next request is written.

    One that crosses the next request on the wire cannot be told from its answer, by anybody: such a request gets the 200.
    """
    found = Found()
    copies = int(run.long(50, 16))
    places = [(variant, tls) for variant in FORGERIES for tls in ("", "-tls")]
    count = len(places) * copies
    limits: dict[int, tuple[float | None, int | None]] = dict.fromkeys(range(count), (1.0, 1))
    async with Scene(
        seed=run.seed, program=run.program, hosts=0, tls=True, hold_ms=(0, 0), limits=limits
    ) as scene:
        quick: list[int] = []
        slow: list[int] = []
        for n, (variant, tls) in enumerate(places):
            hosts = range(n * copies, (n + 1) * copies)
            first = variant == "first"
            await scene.add_endpoints(hosts, f"/forge/{variant}", ("first" if first else "hook") + tls)
            (slow if first else quick).extend(hosts)
        await scene.daemon(HOOKD_RETRY__SCHEDULE='["50ms", "50ms", "50ms"]')
        scene.producer.hosts = quick
        await scene.producer.backlog(run.trials)
        # those that speak before they are asked are never asked: each attempt fails, and all end as dead letters
        scene.producer.hosts = slow
        await scene.producer.backlog(len(slow))
        await scene.drained()
        found.shown["most that the receiver was late, ms"] = round(scene.late_s * 1000, 1)
        found.account = await scene.settle_accounts()
        for _ in range(run.trials):
            run.step()
    return found


async def disk_full(run: Run) -> Found:
    found = Found()
    for n in range(run.trials):
        kind = ("data", "wal")[(run.seed + n) % 2]
        scene = _Cramped(kind, seed=run.seed + n, program=run.program)
        async with scene:
            daemon = await scene.daemon()
            await under_load(scene, run)
            await asyncio.sleep(run.long(2, 1))
            rate = await _rate_now(scene, run)
            fault = scene.fault(lives=True)
            full = time.monotonic() + run.long(20, 3)
            while (now := time.monotonic()) < full or (
                not scene.ran_full(daemon) and now < full + FULL_MOST_S
            ):
                # again and again: PostgreSQL gives some of it back, and a table may have room for seconds
                await asyncio.to_thread(scene.disk.fill)
                if not scene.ran_full(daemon):
                    await scene.press()
                await asyncio.sleep(0.5)
            await asyncio.to_thread(scene.disk.empty)
            emptied = time.monotonic()
            if not await asyncio.to_thread(scene.primary.running):
                await asyncio.to_thread(scene.primary.start)
            fault.until = time.monotonic() + 5
            found.time(
                f"space to {RECOVERED:g} of the rate", await scene.steady(RECOVERED, rate, since=emptied)
            )
            found.count("daemons that ended", not daemon.alive)
            found.shown[f"refused inserts, {kind} full"] = scene.producer.errors
            found.count("it did not run full", not scene.ran_full(daemon))
            found.account.add(await scene.settle_accounts())
        run.step()
    return found


class _Cramped(Scene):
    """A scene whose database, or whose WAL, is on a small disk."""

    def __init__(self, kind: str, *, seed: int, program: tuple[str, ...]) -> None:
        super().__init__(seed=seed, program=program)
        self._kind = kind

    async def make_primary(self) -> None:
        place = self.folder / "small"
        self.disk = SmallDisk(self.programs, place, 96 if self._kind == "wal" else 192)
        if self._kind == "wal":
            self.primary = Cluster(self.programs, self.folder / "pg1", small=True)
            self.clusters.append(self.primary)
            await asyncio.to_thread(self.primary.make, wal=place / "wal")
        else:
            self.primary = Cluster(self.programs, place / "pg1", small=True)
            self.clusters.append(self.primary)
            wal = self.folder / "wal"
            wal.mkdir(mode=0o700)
            self.programs.give(wal)
            await asyncio.to_thread(self.primary.make, wal=wal / "wal")

    async def press(self) -> None:
        """Write more WAL than PostgreSQL keeps to write over again: of 400 events a second it needs no other room for ever."""
        if self._kind == "wal":
            with contextlib.suppress(*AWAY):
                async with self.sql() as connection:
                    for _ in range(PRESSED_MB):
                        await connection.execute(PRESS)

    def ran_full(self, daemon: Hookd) -> bool:
        """
        Whether somebody noticed.

        A producer that waits for a daemon that cannot write is refused nothing: then it was the daemon.
        """
        lost = daemon.said("database lost")
        return self.producer.errors > 0 or any("No space left on device" in str(line) for line in lost)

    async def close(self) -> None:
        if hasattr(self, "disk"):
            self.disk.empty()
        await super().close()

    def clean_up(self) -> None:
        if hasattr(self, "disk"):
            self.disk.close()
        super().clean_up()


async def soak(run: Run) -> Found:
    """
    Half of what it can do; one of two is killed each minute, and a third one lives through it all.

    The trials are minutes.  500 in flight, as throughput is measured with: what this bounds in memory is reached in the first
    minutes then, and what grows after them is a leak.  (With the 2,000 of the default memory follows the largest takeover so
    far, up to its bound, for hours: 4 MB in the first.)
    """
    found = Found()
    minute = run.long(60, 2)
    async with Scene(
        seed=run.seed,
        program=run.program,
        hold_ms=(40, 60),
        environment={"HOOKD_DELIVERY__MAX_IN_FLIGHT": "500"},
    ) as scene:
        survivor = await scene.daemon()
        victim = await scene.daemon()
        rate = run.rate / 4
        if not run.short:
            await scene.producer.backlog(40_000)
            begun = time.monotonic()
            await scene.drained()
            rate = 40_000 / (time.monotonic() - begun) / 2
            await scene.settle_accounts()
        found.shown["events a second"] = round(rate)
        await scene.tell(fail=0.05)
        scene.producer.start(rate)
        begun = time.monotonic()
        memory: list[tuple[float, float]] = []
        per_minute = []
        for _ in range(run.trials):
            until = time.monotonic() + minute
            while time.monotonic() < until:
                await asyncio.sleep(min(5.0, minute))
                memory.append((time.monotonic() - begun, survivor.resident_mb()))
                await scene.look()
            per_minute.append(scene.rate_between(until - minute, until))
            # a look at a long log holds up the producer: let the load flow again, or nothing is in flight at the kill
            await asyncio.sleep(run.long(1.0, 0.2))
            victim.process.kill()
            scene.fault()
            victim.kill()
            victim = await scene.daemon()
            # an hour of it would not fit into memory
            found.account.add(await scene.settle_older(run.long(30, 2)))
            run.step()
        found.count("daemons that ended", not survivor.alive)
        if not run.short:
            sixth = max(1, len(per_minute) // 6)
            first, last = sum(per_minute[:sixth]) / sixth, sum(per_minute[-sixth:]) / sixth
            found.shown["throughput, last to first sixth"] = round(last / first, 4)
            found.count("slower at the end", last / first < RECOVERED)
            slope = _slope(memory[len(memory) // 6 :]) * 3600
            found.shown["memory slope, MB/h"] = round(slope, 2)
            each = max(1, len(memory) // 6)
            for n in range(6):
                part = memory[n * each : (n + 1) * each]
                found.shown[f"memory in sixth {n + 1}, MB"] = round(
                    statistics.median([mb for _, mb in part]), 1
                )
            found.count("memory grows by 2 MB/h or more", slope >= 2)
        found.account.add(await scene.settle_accounts())
    return found


def _slope(points: list[tuple[float, float]]) -> float:
    """Least squares."""
    count = len(points)
    x, y = sum(p[0] for p in points) / count, sum(p[1] for p in points) / count
    spread = sum((p[0] - x) ** 2 for p in points)
    return sum((p[0] - x) * (p[1] - y) for p in points) / spread if spread else 0.0


ROWS = (
    Row("kill-standby", "kill -9 of the owner under load, another daemon waiting", kill_standby, 200, 10, 2,
        {"kill to the next owner's first delivery": (0.99, 250)}),
    Row("kill-lone", "kill -9 of a lone daemon, restarted with 100,000 pending", kill_lone, 100, 10, 1,
        {"start to first delivery": (0.99, 2000)}),
    Row("failpoints", "kill -9 at each of the ten worst moments", failpoints, 500, 20, 10),
    Row("zombie", "SIGSTOP of the owner for 30 s, or for an instant, its session ended, SIGCONT", zombie, 40, 4, 2),
    Row("restart", "PostgreSQL restarted under load: immediate, fast, postmaster killed", restart, 50, 10, 2,
        {f"up to {RECOVERED:g} of the rate": (1.0, 5000)}),
    Row("failover", "primary killed, its synchronous standby promoted, both in the DSN", failover, 20, 4, 1,
        {"promotion to the first delivery": (1.0, 5000)}),
    Row("storm", "pg_terminate_backend on all of hookd's sessions, twice a second for a minute", storm, 5, 1, 1),
    Row("churn", "1 to 4 daemons joining and leaving under load, three changes a trial", churn, 30, 5, 1,
        {"joined to even": (0.99, 1000)}),
    Row("forged", "answers pushed before, beside and after their request, plain and TLS", forged, 10_000, 10_000, 400, unit="requests"),
    Row("forged-unguarded", "the same without the protection: lies must be believed", forged_unguarded, 2000, 2000, 400, unit="requests"),
    Row("drain", "SIGTERM under load", drain, 100, 20, 2, {"SIGTERM to exit": (1.0, 10_000)}),
    Row("disk-full", "disk full for 20 s: the database's, the WAL's", disk_full, 6, 2, 1, missing=why_no_small_disk),
    Row("soak", "half of saturation, 5 % failures, a kill each minute", soak, 60, 60, 1, unit="minutes"),
)  # fmt: skip


LEGEND = (
    "Lost, phantom (received, never committed), dishonest (settled as delivered without the receiver's own 2xx), spoilt (wrong "
    "payload or signature), unexplained (doubled, and neither in flight nor unsettled at a fault) and pending must be 0. With 95 % "
    "confidence the true rate is below 3/N: the bounds beside a zero are for a trial, and for an event."
)


# What a row's batches come to.


def verdict(row: Row, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """All batches of a row, and what is wrong with them."""
    account, trials = Account(), 0
    times: dict[str, list[float]] = {}
    wrong: dict[str, float] = {}
    shown: dict[str, float] = {}
    for batch in batches:
        account.add(Account(**batch["account"]))
        trials += batch["trials"]
        for name, values in batch["times"].items():
            times.setdefault(name, []).extend(values)
        for name, number in batch["wrong"].items():
            wrong[name] = wrong.get(name, 0) + number
        shown |= batch["shown"]
    failures = [
        f"{getattr(account, name):,} {name}"
        for name in ("lost", "phantom", "dishonest", "spoilt", "unexplained", "pending")
        if getattr(account, name)
    ]
    if account.doubled > account.allowed:
        failures.append(f"{account.doubled:,} doubled, {account.allowed:,} allowed")
    failures += [f"{name}: {number:g}" for name, number in wrong.items() if number]
    missed = []
    series = {}
    for name, values in times.items():
        series[name] = {
            "p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "most": max(values),
        }  # fmt: skip
        if name in row.goals:
            share, most = row.goals[name]
            series[name]["goal"] = most
            if percentile(values, share) > most:
                missed.append(f"{name}: {percentile(values, share):,.0f} ms, goal {most:,.0f}")
    return {
        "row": row.name, "title": row.title, "unit": row.unit, "trials": trials, "wanted": row.trials, "account": asdict(account),
        "times": series, "wrong": wrong, "shown": shown, "failures": failures, "missed": missed,
        "bound": 3 / trials if trials else None, "bound_events": 3 / account.events if account.events else None,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]], skipped: dict[str, str], about: str) -> str:
    """The report."""
    lines = [
        "# Torture", "", about, "",
        "| fault | trials | events | lost | doubled / allowed | times, ms (p50 / p99 / most) | verdict |",
        "| --- | ---: | ---: | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        account = row["account"]
        times = "; ".join(
            f"{name}: {t['p50']:,.0f} / {t['p99']:,.0f} / {t['most']:,.0f}"
            + (f" (goal {t['goal']:,.0f})" if "goal" in t else "")
            for name, t in row["times"].items()
        )
        shown = "; ".join(f"{name}: {number:g}" for name, number in row["shown"].items())
        said = "; ".join(row["failures"] + [f"missed: {m}" for m in row["missed"]]) or "pass"
        lines.append(
            f"| {row['title']} | {row['trials']:,} of {row['wanted']:,} {row['unit']} | {account['events']:,}{at_rate(account)} "
            f"| {bounded(account['lost'], row)} | {account['doubled']:,} / {account['allowed']:,} "
            f"| {'; '.join(filter(None, (times, shown)))} | {said} |"
        )
    lines += [f"| {name} | 0 | | | | | skipped: {why} |" for name, why in skipped.items()]
    lines += ["", LEGEND, ""]
    return "\n".join(lines)


def at_rate(account: dict[str, Any]) -> str:
    """How many a second: fewer than asked for, where the machine could not keep up."""
    return f" ({account['events'] / account['seconds']:,.0f}/s)" if account["seconds"] else ""


def bounded(number: int, row: dict[str, Any]) -> str:
    """A zero with what it proves."""
    if number or not row["bound"]:
        return f"{number:,}"
    events = f", {row['bound_events']:.1e}" if row["bound_events"] else ""
    return f"0 (< {row['bound']:.2g}{events})"


# The whole.


class Progress:
    """A line on a terminal; nothing elsewhere."""

    def __init__(self, row: Row, done: int, wanted: int) -> None:
        self._row, self._done, self._wanted = row, done, wanted
        self._first, self._begun = done, time.monotonic()
        self._shown = sys.stderr.isatty()
        self.show()

    def step(self) -> None:
        self._done += 1
        self.show()

    def show(self) -> None:
        if not self._shown:
            return
        share = self._done / max(1, self._wanted)
        made = self._done - self._first
        left = (time.monotonic() - self._begun) / made * (self._wanted - self._done) if made else 0.0
        bar = "#" * int(share * 30)
        text = f"{self._row.name:<17} [{bar:<30}] {self._done:,}/{self._wanted:,} {self._row.unit}"
        print(f"\r{text}{f', {left / 60:.1f} min left' if made else '':<20}", end="", file=sys.stderr, flush=True)  # fmt: skip

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)


def source() -> str:
    """Tells hookd and these scripts as they are from any others: trials of another hookd prove nothing of this one."""
    digest = hashlib.sha256()
    for path in sorted(
        [*HERE.parent.glob("hookd/**/*.py"), *HERE.parent.glob("hookd/**/*.sql"), *HERE.glob("*.py")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Notes:
    """The batches that have been made, in a file that grows."""

    def __init__(self, out: Path, key: dict[str, Any], *, resume: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file = out / "torture.jsonl"
        self._out = out
        self._key = key
        self.batches: dict[str, list[dict[str, Any]]] = {}
        if resume and self._file.exists():
            for line in self._file.read_text().splitlines():
                batch = json.loads(line)
                if batch["key"] == key:
                    self.batches.setdefault(batch["row"], []).append(batch)
        elif not resume:
            self._file.unlink(missing_ok=True)

    def add(self, row: Row, found: Found) -> None:
        batch = {"row": row.name, "key": self._key} | asdict(found)
        self.batches.setdefault(row.name, []).append(batch)
        with self._file.open("a") as file:
            file.write(json.dumps(batch) + "\n")

    def done(self, row: Row) -> int:
        return sum(batch["trials"] for batch in self.batches.get(row.name, []))

    def report(self, skipped: dict[str, str]) -> list[dict[str, Any]]:
        rows = [verdict(row, self.batches[row.name]) for row in ROWS if row.name in self.batches]
        about = (
            f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {self._key['rate']:g} events a second"
            f"{', hookd spoilt on purpose' if self._key['spoilt'] else ''}{', the short form: its times mean nothing' if self._key['short'] else ''}; {os.cpu_count()} cores, "
            f"load of the machine {os.getloadavg()[0]:.1f}."
        )
        (self._out / "torture.md").write_text(markdown(rows, skipped, about))
        (self._out / "torture.json").write_text(
            json.dumps({"about": about, "rows": rows, "skipped": skipped})
        )
        return rows


def make(row: Row, notes: Notes, wanted: int, given: argparse.Namespace, skipped: dict[str, str]) -> None:
    """The trials of a row that are still missing."""
    progress = Progress(row, notes.done(row), wanted)
    try:
        while (done := notes.done(row)) < wanted:
            trials = min(row.batch, wanted - done)
            run = Run(trials, given.rate, given.short, given.seed + done, progress.step, given.spoilt)
            found = asyncio.run(_run(row, run))
            found.trials = trials
            notes.add(row, found)
            notes.report(skipped)
    finally:
        progress.end()


async def _run(row: Row, run: Run) -> Found:
    task = asyncio.ensure_future(row.run(run))
    # so that servers and daemons end with this
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="rows: " + ", ".join(r.name for r in ROWS)
    )
    parser.add_argument("--rows", default="", help="comma separated; all of them without")
    parser.add_argument("--trials", type=int, default=0, help="of each row, instead of the number of its own")
    parser.add_argument("--short", action="store_true", help="a few trials of each under a small load: what CI runs")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="keep the trials that were made, and make the missing ones")  # fmt: skip
    parser.add_argument("--rate", type=float, default=0.0, help="events a second (2000; 400 in short)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spoilt", default="", choices=["", *BUGS], metavar="BUG", help="torture a daemon with a bug that must be caught: " + ", ".join(BUGS))  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the rows, and how many trials they have")
    parser.add_argument("--keep", action="store_true", help="keep the logs of daemons, servers and receiver")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", type=Path, default=HERE.parent / ".bench")
    given = parser.parse_args()
    if given.list:
        for row in ROWS:
            print(f"{row.name:<17} {row.trials:>6,} {row.unit:<9} {row.title}")
        return
    names = [n for n in given.rows.split(",") if n]
    unknown = sorted(set(names) - {row.name for row in ROWS})
    if unknown:
        parser.error(f"--rows: {', '.join(unknown)} is none of {', '.join(row.name for row in ROWS)}")
    if given.trials < 0 or given.rate < 0:
        parser.error("--trials and --rate are numbers from 1 up")
    if sys.platform != "linux":
        parser.error("this needs Linux")
    Scene.kept = given.keep
    given.rate = given.rate or (400.0 if given.short else 2000.0)
    notes = Notes(
        given.out,
        {"short": given.short, "rate": given.rate, "spoilt": given.spoilt, "source": source()},
        resume=given.resume,
    )
    skipped: dict[str, str] = {}
    broken: dict[str, str] = {}
    for row in ROWS:
        wanted = given.trials or (row.short if given.short else row.trials)
        if names and row.name not in names:
            continue
        why = row.missing()
        if why:
            skipped[row.name] = why
            if not given.json:
                print(f"{row.name}: skipped: {why}")
            continue
        try:
            make(row, notes, wanted, given, skipped)
        except (Broken, *AWAY, AssertionError) as problem:
            broken[row.name] = f"{type(problem).__name__}: {problem}"
            if not given.json:
                print(f"{row.name}: broke down: {broken[row.name]}")
            continue
        if not given.json:
            _print(verdict(row, notes.batches[row.name]))
    rows = [r for r in notes.report(skipped) if not names or r["row"] in names]
    if given.json:
        print(json.dumps({"rows": rows, "skipped": skipped, "broken": broken}))
    else:
        print(f"{given.out / 'torture.md'}")
    failed = [r for r in rows if r["failures"] or (r["missed"] and not given.short)]
    sys.exit(2 if broken else 1 if failed else 0)


def _print(row: dict[str, Any]) -> None:
    account = row["account"]
    print(
        f"{row['row']}: {row['trials']:,} {row['unit']}, {account['events']:,} events{at_rate(account)}: lost {bounded(account['lost'], row)}, "
        f"doubled {account['doubled']:,} of {account['allowed']:,} allowed, dishonest {account['dishonest']}, phantom {account['phantom']}"
    )
    for name, t in row["times"].items():
        goal = f", goal {t['goal']:,.0f}" if "goal" in t else ""
        print(f"  {name}: p50 {t['p50']:,.0f} ms, p99 {t['p99']:,.0f} ms, most {t['most']:,.0f} ms{goal}")
    for name, number in row["shown"].items():
        print(f"  {name}: {number:g}")
    print(f"  {'; '.join(row['failures'] + ['missed: ' + m for m in row['missed']]) or 'pass'}", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        main()
