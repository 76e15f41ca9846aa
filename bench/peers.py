"""
The same POST, signature and receiver from other queues on PostgreSQL, beside hookd.

    python bench/peers.py [--deliveries 30000] [--rounds 1] [--concurrency 500] [--only NAME,…] [--json]

PgQueuer, procrastinate and a textbook SKIP LOCKED loop send with aiohttp (``bench/peers/post.py``), graphile-worker with
undici; each with 500 at once and its batching on, in an environment of its own that is made for the run from the
package registries and thrown away.  What cannot be installed is skipped, and says why.

Each gets a backlog of its own in a fresh database; the rate is that of the requests from the first tenth to the last one
at the receiver.  One core is the worker's, the other has the receiver and PostgreSQL, as for hookd.  A queue that
is slow gets fewer: it is stopped after ``--seconds``, and its rate is that of what has come.

Peers keep no log of attempts, no limits and no fairness; hookd does all of that meanwhile.

Goal: hookd makes 4 times as many deliveries a second as the best of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg
from cores import SATURATED, disturbance, used
from stage import DEADLINE_S, HERE, INSERT, Arrivals, Stage

if TYPE_CHECKING:
    from pathlib import Path

HOSTS = 20
PAYLOAD = 400
GOAL = 4.0
PEERS = HERE / "peers"
INSTALL_S = 120

FIRST_S = 30
"""A worker that has not sent its first tenth by then is not measured."""


@dataclass(frozen=True)
class Peer:
    name: str
    packages: tuple[str, ...]
    worker: str
    deliveries_share: float = 1.0


COMMON = ("aiohttp==3.14.*", "uvloop==0.23.*", "asyncpg==0.32.*", "aiodns")
ALL = (
    Peer("SKIP LOCKED", COMMON, "queue_skip_locked.py"),
    Peer("PgQueuer", (*COMMON, "pgqueuer==1.6.*"), "queue_pgqueuer.py"),
    Peer("procrastinate", (*COMMON, "procrastinate==3.10.*", "psycopg[binary,pool]"), "queue_procrastinate.py", 0.1),
    Peer("graphile-worker", ("graphile-worker@0.17", "undici@7"), "queue_graphile.mjs"),
)  # fmt: skip


class Missing(Exception):
    """A peer cannot be had here; says why."""


class Peers:
    """The peers of one run, and hookd."""

    def __init__(self, stage: Stage, concurrency: int, seconds: float) -> None:
        self.stage = stage
        self.concurrency = concurrency
        self.seconds = seconds
        # by address: the system's resolver, which Node.js asks, may not know names below localhost
        self._hosts = [f"127.0.0.1:{port}" for port in stage.ports]
        self._commands: dict[str, list[str]] = {}

    def install(self, peer: Peer) -> None:
        """Make its environment; raises ``Missing``."""
        place = self.stage.folder / peer.name.replace(" ", "-")
        place.mkdir()
        for source in PEERS.iterdir():
            if source.is_file():
                shutil.copy(source, place)
        if peer.worker.endswith(".mjs"):
            if shutil.which("npm") is None or shutil.which("node") is None:
                raise Missing("Node.js is not installed")
            _call(place, "npm", "install", "--no-audit", "--no-fund", "--silent", *peer.packages)
            self._commands[peer.name] = ["node", str(place / peer.worker)]
        else:
            _call(place, sys.executable, "-m", "venv", str(place / "venv"))
            python = str(place / "venv" / "bin" / "python")
            _call(place, python, "-m", "pip", "install", "-q", "--disable-pip-version-check",
                  "--only-binary", ":all:", *peer.packages)  # fmt: skip
            self._commands[peer.name] = [python, str(place / peer.worker)]

    def peer(self, peer: Peer, deliveries: int) -> dict[str, Any]:
        stage = self.stage
        asyncio.run(_empty_database(stage))
        given = json.dumps({
            "count": deliveries, "payload": PAYLOAD, "concurrency": self.concurrency,
            "urls": [f"http://{host}/hook" for host in self._hosts],
        })  # fmt: skip
        command = self._commands[peer.name]
        filled = subprocess.run([*command, "fill", stage.dsn, given], capture_output=True, text=True, timeout=DEADLINE_S, check=False)  # fmt: skip
        if filled.returncode:
            raise Missing("it could not be filled: " + _last_line(filled.stderr))
        asyncio.run(_analyzed(stage))
        stage.stats()
        process = stage.program(*command, "run", stage.dsn, given)
        try:
            return asyncio.run(self._watch(process, deliveries))
        finally:
            process.kill()
            process.wait()
            asyncio.run(stage.leave_database())

    async def hookd(self, deliveries: int) -> dict[str, Any]:
        stage = self.stage
        await stage.fresh_database()
        await stage.add_endpoints(self._hosts, "/hook", [f"tenant-{n}" for n in range(HOSTS)])
        connection = await asyncpg.connect(stage.dsn)
        await connection.execute(INSERT, deliveries, HOSTS, PAYLOAD)
        await connection.close()
        await _analyzed(stage)
        stage.stats()
        daemon = stage.daemon(
            HOOKD_DELIVERY__MAX_IN_FLIGHT=str(self.concurrency),
            HOOKD_LIMITS__CONCURRENCY=str(max(2, 2 * self.concurrency // HOSTS)),
        )
        figures = await self._watch(daemon.process, deliveries)
        daemon.stop(at_once=True)
        await stage.leave_database()
        return figures

    async def _watch(self, process: subprocess.Popen[str], deliveries: int) -> dict[str, Any]:
        arrivals = Arrivals(self.stage)
        until = time.monotonic() + FIRST_S
        core = self.stage.own_core
        before = used(process.pid, core)
        start, tenth, receiver, postgres = 0, max(1, deliveries // 10), {}, 0.0
        while await arrivals.look() < deliveries:
            if process.poll() is not None:
                log = (self.stage.folder / "stderr.log").read_text()
                raise Missing(f"it ended with status {process.returncode}: {_last_line(log)}")
            if not start and arrivals.count >= tenth:
                start, before, receiver = arrivals.count, used(process.pid, core), arrivals.now
                postgres = self.stage.postgres_cpu_s()
                until = time.monotonic() + self.seconds
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.02)
        spent, postgres = used(process.pid, core) - before, self.stage.postgres_cpu_s() - postgres
        arrivals.close()
        count = arrivals.count - start
        if not start or not count:
            raise Missing(
                f"only {arrivals.count:,} requests came: {_last_line((self.stage.folder / 'stderr.log').read_text())}"
            )
        now = arrivals.now
        return {
            "per_s": arrivals.per_s(start, arrivals.count),
            "deliveries": count,
            "cpu_us": spent.cpu_s / count * 1e6,
            "core": spent.share,
            "displaced": spent.displaced,
            "postgres_us": postgres / count * 1e6,
            "receiver_wanted": (now["cpu_s"] - receiver["cpu_s"] + now["waited_s"] - receiver["waited_s"]) / spent.seconds,
        }  # fmt: skip


def _call(place: Path, *command: str) -> None:
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=INSTALL_S, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]}: {error}") from None
    if done.returncode:
        raise Missing(f"it cannot be installed: {_last_line(done.stderr or done.stdout)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:200]


async def _empty_database(stage: Stage) -> None:
    await stage.fresh_database(migrated=False)


async def _analyzed(stage: Stage) -> None:
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute("vacuum analyze")
    await connection.execute("checkpoint")
    await connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--deliveries", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=500, help="exchanges at once")
    parser.add_argument("--seconds", type=float, default=15.0, help="at most, of each measurement")
    parser.add_argument("--only", default="", help="names of peers, with commas between")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    names = [n for n in given.only.split(",") if n]
    unknown = [n for n in names if n not in [p.name for p in ALL]]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(p.name for p in ALL)}")
    stage = Stage(listeners=HOSTS)
    bench = Peers(stage, given.concurrency, given.seconds)
    rounds: dict[str, list[dict[str, Any]]] = {"hookd": []}
    skipped: dict[str, str] = {}
    try:
        peers = []
        for peer in ALL:
            if names and peer.name not in names:
                continue
            try:
                bench.install(peer)
                peers.append(peer)
            except Missing as problem:
                skipped[peer.name] = str(problem)
        for _ in range(given.rounds):
            for peer in peers:
                if peer.name in skipped:
                    continue
                try:
                    share = max(1, round(given.deliveries * peer.deliveries_share))
                    rounds.setdefault(peer.name, []).append(bench.peer(peer, share))
                except Missing as problem:
                    skipped[peer.name] = str(problem)
            rounds["hookd"].append(asyncio.run(bench.hookd(given.deliveries)))
    finally:
        stage.close()
    figures = _figures(rounds, skipped)
    if given.json:
        print(json.dumps(figures))
    else:
        _print(figures, given)
    if figures["ratio"] is None:
        sys.exit(2)
    sys.exit(0 if figures["ratio"] >= GOAL else 1)


def _figures(rounds: dict[str, list[dict[str, Any]]], skipped: dict[str, str]) -> dict[str, Any]:
    medians = {
        name: {key: statistics.median(r[key] for r in of) for key in of[0]}
        for name, of in rounds.items()
        if of
    }
    best = max((m["per_s"] for name, m in medians.items() if name != "hookd"), default=None)
    troubles = [
        f"the receiver had no time to spare beside {name} ({m['receiver_wanted']:.0%} of its core wanted)"
        for name, m in medians.items()
        if m["receiver_wanted"] > SATURATED
    ]
    troubles += [
        trouble
        for name, m in medians.items()
        if m["per_s"] == best
        for trouble in disturbance(name, m["displaced"], "hookd", medians["hookd"]["displaced"])
    ]
    return {
        "goal": GOAL, "queues": medians, "rounds": rounds, "skipped": skipped, "troubles": troubles,
        "ratio": medians["hookd"]["per_s"] / best if best and not troubles else None,
    }  # fmt: skip


def _print(figures: dict[str, Any], given: argparse.Namespace) -> None:
    print(f"{given.deliveries:,} deliveries, {HOSTS} hosts, {given.concurrency} at once, {PAYLOAD} B payload, {given.rounds} rounds")  # fmt: skip
    hookd = figures["queues"]["hookd"]["per_s"]
    for name, m in sorted(figures["queues"].items(), key=lambda item: -item[1]["per_s"]):
        print(f"  {name:16}{m['per_s']:8,.0f}/s   {m['cpu_us']:7.1f} µs CPU each, {m['core']:.2f} of its core   PostgreSQL {m['postgres_us']:6.1f} µs"
              f"   hookd makes {hookd / m['per_s']:.1f} times as many")  # fmt: skip
    for name, problem in figures["skipped"].items():
        print(f"  {name:16}skipped: {problem}")
    for trouble in figures["troubles"]:
        print(f"  {trouble}")
    if figures["ratio"] is None:
        print("  no ratio to the best")
    else:
        print(f"  {figures['ratio']:.1f} times the best, goal {GOAL:g}")


if __name__ == "__main__":
    main()
