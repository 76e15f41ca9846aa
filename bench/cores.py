"""
What a process had of its core, and what kept it from having more: others, or the machine's host.

A figure of this folder is that of the daemon (or of the client beside it) only if that was what had no time left.  So
two shares are looked at: how long it ran, waited for its core or had it taken away, which has to be nearly all of the
time; and the same of the receiver, which must not be.  Needs Linux: elsewhere nothing is known, and nothing refused.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

BUSY = 0.85
"""A client that had its core, or wanted it, for less than this share of the time was kept waiting by something else."""

SATURATED = 0.9
"""A receiver (or producer) that ran, or waited for its core, for more than this has no time left: its queue is measured."""

UNEVEN = 0.1
"""Others had so much more of the core in one run than in the other beside it: what is compared is who was disturbed."""

DISTURBED = 0.5
"""Others had so much of the core that no rate says anything."""

HERTZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Used:
    """Over a stretch of time, in seconds."""

    seconds: float
    cpu_s: float
    """Of all its threads."""
    system_s: float
    """The part of it that was spent in system calls."""
    waited_s: float
    """Its main thread was ready and somebody else had the core."""
    taken_s: float
    """The host of a virtual machine gave the core to somebody else; 0 where the process has no core of its own."""

    @property
    def share(self) -> float:
        """Of a core."""
        return self.cpu_s / self.seconds

    @property
    def wanted(self) -> float:
        """Of a core, with what it did not get."""
        return (self.cpu_s + self.waited_s + self.taken_s) / self.seconds

    @property
    def displaced(self) -> float:
        """Of a core, that others had while it was ready to run."""
        return (self.waited_s + self.taken_s) / self.seconds

    def __sub__(self, earlier: Used) -> Used:
        return Used(
            self.seconds - earlier.seconds,
            self.cpu_s - earlier.cpu_s,
            self.system_s - earlier.system_s,
            self.waited_s - earlier.waited_s,
            self.taken_s - earlier.taken_s,
        )


def used(pid: int | str = "self", core: int | None = None) -> Used:
    """So far; two of them make a stretch."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ran, waited = Path(f"/proc/{pid}/schedstat").read_text().split()[:2]
    except OSError:
        return Used(time.monotonic(), 0.0, 0.0, 0.0, 0.0)
    user, system = int(stat[11]) / HERTZ, int(stat[12]) / HERTZ
    # schedstat has nanoseconds, but of the main thread only
    cpu = max(int(ran) / 1e9, user + system) if int(stat[17]) > 1 else int(ran) / 1e9
    return Used(time.monotonic(), cpu, system, int(waited) / 1e9, taken_s(core))


def taken_s(core: int | None) -> float:
    """How long the host of this virtual machine has kept the core to itself so far."""
    if core is None:
        return 0.0
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[8]) / HERTZ for line in lines if line.startswith(f"cpu{core} ")), 0.0)


def disturbance(one: str, displaced: float, other: str, displaced_there: float) -> list[str]:
    """Why two rates may not be compared, for what others had of the core meanwhile; empty if they may."""
    if max(displaced, displaced_there) <= DISTURBED and abs(displaced - displaced_there) <= UNEVEN:
        return []
    return [f"others had {displaced:.0%} of the core of {one}, and {displaced_there:.0%} of that of {other}"]
