"""
All load scripts, one after another, and a report of what they found: what ``make bench`` runs.

    python bench/all.py [--only throughput,latency,…] [--size full|small] [--minutes 15] [--out .bench]

Writes ``report.md``, ``report.json`` and the plots (SVG) into ``.bench``, with what the scripts said on stderr in
``NAME.log``.  The report is written anew after each script, so a run that is interrupted has one too; ``--only`` keeps
what a report of the same size, by the same scripts, holds of the others.

The scripts run in the order of what they say about hookd.  Each has a time that it may take, and what does not fit into
``--minutes`` any more is left out, which the report says.  ``--size small`` is for trying the scripts, in two minutes or so:
its figures mean nothing.

Exit status: 0 all goals met, 1 a goal missed, 2 a script failed, or could not be measured, or was left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import write

from hookd import __version__

HERE = Path(__file__).parent
PLOTS_S = 15


@dataclass(frozen=True)
class Script:
    name: str
    full: str
    small: str
    most_s: int
    """What it may take at full size."""
    file: str = ""

    @property
    def path(self) -> Path:
        return HERE / (self.file or f"{self.name}.py")


SCRIPTS = (
    Script("throughput", "--rounds 3", "--deliveries 3000 --rounds 1", 120),
    Script("matrix", "--matrix --rounds 1 --deliveries 12000", "--matrix --rounds 1 --deliveries 1000", 220, "throughput.py"),
    Script("latency", "--idle 200 --seconds 6", "--idle 20 --seconds 1 --loads 25,75", 150),
    Script("cost", "--deliveries 30000", "--deliveries 1000", 120),
    Script("profile", "--deliveries 100000", "--deliveries 30000", 90),
    Script("guard", "--rounds 7", "--rounds 2 --deliveries 1000", 60),
    Script("producer", "--seconds 2", "--seconds 1 --committers 1,16", 180),
    Script("peers", "--deliveries 15000 --seconds 6", "--deliveries 2000 --seconds 3 --only PgQueuer", 180),
    Script("horizon", "--deliveries 500000", "--deliveries 10000", 200),
    Script("backlog", "--rounds 1 --deliveries 40000 --between 30000", "--rounds 1 --deliveries 4000 --pending 20000 --between 5000", 180),
    Script("isolation", "--rounds 1 --seconds 10", "--rounds 1 --seconds 2 --only dead", 180),
    Script("failover", "--times 15", "--times 3", 90),
    Script("inflight", "--seconds 15", "--seconds 3 --hosts 20", 90),
    Script("limits", "--seconds 20", "--seconds 5", 90),
    Script("limits-2", "--seconds 20 --daemons 2", "--seconds 5 --daemons 2", 90, "limits.py"),
    Script("throttled", "--rounds 1 --deliveries 40000", "--rounds 1 --deliveries 4000 --hosts 200", 120),
)  # fmt: skip

STATES = {0: "met", 1: "missed", 2: "not measured"}


def run(script: Script, arguments: list[str], log: Path, most_s: float) -> dict[str, Any]:
    """What it found and how it ended; it is ended where it takes too long."""
    begun = time.monotonic()
    command = [sys.executable, str(script.path), *arguments, "--json"]
    with log.open("w") as errors:
        # a group of its own: what it started ends with it
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            out, _ = process.communicate(timeout=most_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as end:
            os.killpg(process.pid, signal.SIGINT)
            try:
                out, _ = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, _ = process.communicate()
            if isinstance(end, KeyboardInterrupt):
                raise
            return _ended(script, arguments, begun, "failed", f"ended after {most_s:.0f} s")
    try:
        figures = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        state = "not measured" if process.returncode == 2 else "failed"
        return _ended(script, arguments, begun, state, last[:300])
    state = (
        "skipped" if "skipped" in figures and len(figures) == 1 else STATES.get(process.returncode, "failed")
    )
    return _ended(script, arguments, begun, state, "") | {"figures": figures}


def _ended(script: Script, arguments: list[str], begun: float, state: str, problem: str) -> dict[str, Any]:
    return {
        "command": " ".join([f"bench/{script.path.name}", *arguments]),
        "state": state,
        "problem": problem,
        "seconds": time.monotonic() - begun,
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "").splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "hookd": __version__,
        "load_before": os.getloadavg()[0],
    }


def stolen() -> float:
    """The share of all cores that the host of a virtual machine has taken since it was started, as a running sum."""
    try:
        fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0.0
    return fields[7] / os.sysconf("SC_CLK_TCK")


def source() -> str:
    """Tells the scripts as they are from any others."""
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def kept(out: Path, size: str) -> dict[str, Any]:
    """What the last report of this size and these scripts holds."""
    try:
        before = json.loads((out / "report.json").read_text())
    except (OSError, ValueError):
        return {}
    return dict(before["scripts"]) if (before.get("size"), before.get("source")) == (size, source()) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help=f"of {', '.join(s.name for s in SCRIPTS)}")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--minutes", type=float, default=15.0, help="for all of them")
    parser.add_argument("--out", type=Path, default=HERE.parent / ".bench")
    given = parser.parse_args()
    names = [n for n in given.only.split(",") if n]
    unknown = sorted(set(names) - {s.name for s in SCRIPTS})
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(s.name for s in SCRIPTS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    report = {
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "size": given.size, "source": source(), "machine": machine(),
        "scripts": kept(given.out, given.size) if names else {},
    }  # fmt: skip
    until = time.monotonic() + given.minutes * 60 - PLOTS_S
    begun, taken = time.monotonic(), stolen()
    ended = []
    for script in SCRIPTS:
        if names and script.name not in names:
            continue
        arguments = (script.full if given.size == "full" else script.small).split()
        print(f"== bench/{script.path.name} {' '.join(arguments)}", flush=True)
        left = until - time.monotonic()
        if left < min(30, script.most_s):
            found = _ended(
                script, arguments, time.monotonic(), "left out", f"the {given.minutes:g} minutes were up"
            )
        else:
            found = run(script, arguments, given.out / f"{script.name}.log", min(script.most_s, left))
        ended.append(found["state"])
        report["scripts"][script.name] = found
        report["taken_by_host"] = (stolen() - taken) / (time.monotonic() - begun) / (os.cpu_count() or 1)
        summary = write(report, given.out)
        for line in summary.get(script.name, []):
            print(f"   {line}")
        print(
            f"   {found['state']}{': ' * bool(found['problem'])}{found['problem']} ({found['seconds']:.0f} s)",
            flush=True,
        )
    print(f"{given.out / 'report.md'}, after {(time.monotonic() - begun) / 60:.1f} minutes")
    if set(ended) <= {"met", "skipped"}:
        sys.exit(0)
    sys.exit(1 if set(ended) <= {"met", "skipped", "missed"} else 2)


if __name__ == "__main__":
    main()
