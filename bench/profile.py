"""
Where the daemon's CPU goes: a table by part that adds up to what a delivery costs.

    python bench/profile.py [--deliveries 100000] [--concurrency 500] [--hosts 20] [--payload 1024] [--rate 200]
                            [--stacks FILE] [--json]

A backlog is delivered.  Over its second fifth the CPU of a delivery is measured, with nobody looking; then py-spy
samples the process, C and C++ frames included, until four fifths are through.  Each sample belongs to one part: the
garbage collector or a system call where it is in one, else the part of the innermost frame that belongs to one; what a
part calls in Python's own library, the interpreter or OpenSSL is its own.  The shares, times the CPU of a delivery, are the
table.  py-spy halts the process for each sample, so a sample costs the daemon time, but none of its parts more than
another.

Collections of garbage are seen by their C functions' names; a Python without symbols counts them where they were set off.
A share of p has a standard error of sqrt(p (1 - p) / samples), which is printed.

py-spy comes with the extra ``bench``.  This daemon lets any process of the same user trace it (``security.core_dumps``), so
this needs no root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
from stage import INSERT, Arrivals, Stage

REST = "the rest"

SYSTEM_CALLS = frozenset({
    "accept4", "close", "connect", "epoll_ctl", "epoll_pwait", "epoll_wait", "getpeername", "getsockname", "getsockopt",
    "poll", "ppoll", "read", "readv", "recv", "recvfrom", "recvmsg", "select", "send", "sendmsg", "sendto",
    "setsockopt", "socket", "syscall", "write", "writev", "__libc_send", "__libc_recv", "__libc_read", "__libc_write",
})  # fmt: skip

COLLECTOR = re.compile(
    r"^(gc_collect|collect_|deduce_unreachable|update_refs|subtract_refs|visit_(decref|reachable))"
)

# The first that a frame matches, by its file; frames that match none belong to whoever called them.
PARTS = (
    ("feed", re.compile(r"hookd/(feed|core/(reads|backlogs|heads|states))\.py")),
    ("lanes, limits, breaker", re.compile(r"hookd/(core/(lanes|limits|breaker)|pacing)\.py")),
    ("signing", re.compile(r"hookd/core/signing\.py")),
    ("compose", re.compile(r"hookd/core/(composer|bodies|request|headers)\.py")),
    ("guard and resolver", re.compile(r"hookd/(core/(addresses|urls)|net/(resolver|vetting))\.py|aiodns|pycares")),
    ("exchange, ours", re.compile(r"hookd/net/")),
    ("exchange, aiohttp's parser", re.compile(r"_http_parser|llhttp|\b(api|http)\.c\b|aiohttp/(http_parser|http_exceptions)\.py")),
    ("exchange, aiohttp's protocol and streams", re.compile(r"aiohttp/|_http_writer|reader_c|multidict|yarl|frozenlist|propcache")),
    ("dispatcher and verdict", re.compile(r"hookd/(dispatcher|core/(verdict|histogram|model)|clock)\.py")),
    ("recorder", re.compile(r"hookd/recorder\.py")),
    ("PostgreSQL client", re.compile(r"hookd/postgres/|asyncpg|\b(protocol|pgproto|record|recordobj)\.c\b")),
    ("event loop", re.compile(r"uvloop|asyncio/|_asynciomodule|\b(loop|core|linux|epoll|stream|loop-watcher|uv-common|handle-inl|timer)\.c\b|libuv")),
    (REST, re.compile(r"hookd/|structlog|prometheus_client")),
)  # fmt: skip

IDLE = re.compile(r"_queue_SimpleQueue_get|Outlet\._run .*lock_PyThread_acquire_lock")
"""What a thread of the default executor and that of the log do while they have nothing to do; py-spy takes that for work when it
reads native frames."""

ORDER = (*(name for name, _ in PARTS[:-1]), "system calls", "garbage collector", REST)


def part(stack: list[str]) -> tuple[str, str]:
    """Whose a sample is, and which system call or file it was in; ``stack`` begins with the outermost frame."""
    names = [frame.partition(" (")[0] for frame in stack]
    if any(COLLECTOR.match(name) for name in names[-8:]):
        return "garbage collector", "collect"
    if names[-1] in SYSTEM_CALLS:
        return "system calls", f"{names[-1]} ({_owner(stack[:-1])[0]})"
    return _owner(stack)


def _owner(stack: list[str]) -> tuple[str, str]:
    for frame in reversed(stack):
        for name, files in PARTS:
            if files.search(frame):
                function, _, place = frame.partition(" (")
                return name, f"{function} ({place.partition(':')[0].rstrip(')')})"
    return REST, stack[-1]


def shares(raw: str) -> tuple[int, Counter[str], dict[str, Counter[str]]]:
    """Samples in all, by part, and in each part by function."""
    parts: Counter[str] = Counter()
    functions: dict[str, Counter[str]] = {}
    for line in raw.splitlines():
        frames, _, count = line.rpartition(" ")
        if IDLE.search(frames):
            continue
        name, function = part(frames.split(";"))
        parts[name] += int(count)
        functions.setdefault(name, Counter())[function] += int(count)
    return parts.total(), parts, functions


def sample(program: str, pid: int, seconds: float, rate: int, out: Path) -> str:
    done = subprocess.run(
        [program, "record", "--native", "--pid", str(pid), "--rate", str(rate), "--duration", str(max(1, round(seconds))),
         "--format", "raw", "--output", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not out.exists():
        raise SystemExit(
            "py-spy could not look into the daemon: " + (done.stderr or done.stdout).strip()[-500:]
        )
    return out.read_text()


async def backlog(stage: Stage, deliveries: int, hosts: int, payload: int) -> None:
    await stage.fresh_database()
    await stage.add_endpoints(
        [stage.host(n) for n in range(hosts)], "/hook", [f"tenant-{n}" for n in range(hosts)]
    )
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute(INSERT, deliveries, hosts, payload)
    await connection.execute("vacuum analyze hookd.delivery")
    await connection.execute("checkpoint")
    await connection.close()


async def reached(arrivals: Arrivals, count: int) -> None:
    until = time.monotonic() + 120
    while await arrivals.look() < count:
        assert time.monotonic() < until, f"only {arrivals.count:,} have arrived"
        await asyncio.sleep(0.02)


async def measured(stage: Stage, given: argparse.Namespace, program: str) -> dict[str, Any]:
    await backlog(stage, given.deliveries, given.hosts, given.payload)
    stage.stats()
    daemon = stage.daemon(
        HOOKD_DELIVERY__MAX_IN_FLIGHT=str(given.concurrency),
        HOOKD_LIMITS__CONCURRENCY=str(max(2, 2 * given.concurrency // given.hosts)),
        HOOKD_SECURITY__CORE_DUMPS="true",
    )
    arrivals = Arrivals(stage)
    fifth = given.deliveries // 5
    await reached(arrivals, fifth)
    before, start = daemon.used(), arrivals.count
    await reached(arrivals, 2 * fifth)
    spent, count = daemon.used() - before, arrivals.count - start
    per_s = count / spent.seconds
    out = given.stacks or stage.folder / "stacks.txt"
    before, start = daemon.used(), arrivals.count
    raw = await asyncio.to_thread(
        sample, program, daemon.process.pid, 2 * fifth / per_s, given.rate, Path(out)
    )
    await arrivals.look()
    sampled = daemon.used() - before
    if arrivals.count >= given.deliveries:
        raise SystemExit("the backlog came to its end while the daemon was sampled; give more --deliveries")
    while_sampled = (arrivals.count - start) / sampled.seconds
    daemon.stop(at_once=True)
    arrivals.close()
    samples, parts, functions = shares(raw)
    cpu_us = spent.cpu_s / count * 1e6
    return {
        "cpu_us": cpu_us, "system_us": spent.system_s / count * 1e6, "per_s": per_s, "per_s_while_sampled": while_sampled,
        "samples": samples,
        "parts": {
            name: {
                "us": parts[name] / samples * cpu_us,
                "share": parts[name] / samples,
                "error_us": (parts[name] / samples * (1 - parts[name] / samples) / samples) ** 0.5 * cpu_us,
                "most": [[f, n / samples * cpu_us] for f, n in functions.get(name, Counter()).most_common(3)],
            }
            for name in ORDER
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--deliveries", type=int, default=100_000)
    parser.add_argument("--concurrency", type=int, default=500)
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--payload", type=int, default=1024, help="bytes")
    parser.add_argument("--rate", type=int, default=200, help="samples a second")
    parser.add_argument(
        "--stacks", type=Path, help="keep py-spy's stacks there: flamegraph.pl and speedscope read them"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if os.access(beside, os.X_OK) else shutil.which("py-spy")
    if program is None:
        print("py-spy is not installed: pip install -e '.[bench]', or make bench", file=sys.stderr)
        sys.exit(2)
    stage = Stage()
    try:
        figures = asyncio.run(measured(stage, given, program))
    finally:
        stage.close()
    if given.json:
        print(json.dumps(figures))
    else:
        _print(figures, given)


def _print(figures: dict[str, Any], given: argparse.Namespace) -> None:
    print(f"{given.concurrency} in flight, {given.hosts} hosts, {given.payload} B; {figures['per_s']:,.0f}/s"
          f" ({figures['per_s_while_sampled']:,.0f}/s while sampled, {figures['samples']:,} samples); µs of CPU a delivery:")  # fmt: skip
    for name, p in figures["parts"].items():
        most = ", ".join(f"{function} {us:.1f}" for function, us in p["most"])
        print(f"  {name:42}{p['us']:6.1f} ± {p['error_us']:3.1f}  {p['share']:5.1%}   {most}")
    print(
        f"  {'together':42}{figures['cpu_us']:6.1f}        of which {figures['system_us']:.1f} in the kernel, by its own count"
    )


if __name__ == "__main__":
    main()
