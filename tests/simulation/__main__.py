# ruff: noqa: T201 - this is a command
"""
Run seeds by hand.

``python -m tests.simulation --seed 7 --verbose`` shows one world as it went, ``--seeds 1-2000`` runs many on all cores and
names those that failed; ``--mutant NAME`` puts a known bug in.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from .mutants import MUTANTS, faults_of, mutated
from .share import some
from .world import World

if TYPE_CHECKING:
    from .world import Report

AT_ONCE = 5
YEAR_S = 365.25 * 86400
COUNTED = ("events", "deliveries", "exchanges", "duplicates", "settles")


def one(seed: int, mutant: str, *, verbose: bool) -> int:
    """Show one seed; 1 if it failed."""
    with mutated(mutant):
        report = World(seed, print if verbose else None, also=faults_of(mutant)).run()
    print(report)
    return int(bool(report.violations))


def many(first: int, last: int, mutant: str, processes: int) -> int:
    """Run many seeds, with a line that tells how far it is; 1 if any failed."""
    starts = range(first, last + 1, AT_ONCE)
    shares = [(list(range(start, min(start + AT_ONCE, last + 1))), mutant) for start in starts]
    begun = time.monotonic()
    reports: list[Report] = []
    failed = 0
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for share in pool.imap_unordered(some, shares):
            reports += share
            for report in share:
                if report.violations:
                    failed += 1
                    print(f"\rseed {report.seed}: {report.violations[0]}")
            pace = len(reports) / (time.monotonic() - begun)
            print(f"\r{len(reports):,} seeds, {failed} failed, {pace:.1f}/s ", end="", flush=True)
    sums = {name: sum(getattr(r, name) for r in reports) for name in COUNTED}
    faults: Counter[str] = sum((r.faults for r in reports), Counter())
    virtual_s = sum(r.virtual_s for r in reports)
    print("\n" + ", ".join(f"{count:,} {name}" for name, count in sums.items()))
    print(", ".join(f"{name} {count:,}" for name, count in sorted(faults.items())))
    print(f"{virtual_s / 86400:.1f} days of virtual time ({virtual_s / YEAR_S:.3f} years)")
    if not failed:
        print(f"0 of {len(reports):,} failed: at 95 % fewer than {3 / len(reports):.4%} of all seeds do")
    return int(failed > 0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="this one")
    parser.add_argument("--seeds", metavar="A-B", help="these, on all cores")
    parser.add_argument("--verbose", action="store_true", help="print all that happens (with --seed)")
    parser.add_argument("--mutant", default="", choices=["", *MUTANTS], help="with this bug put in")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.seed is not None:
        sys.exit(one(options.seed, options.mutant, verbose=options.verbose))
    if not options.seeds:
        parser.error("--seed N or --seeds A-B is needed")
    first, _, last = options.seeds.partition("-")
    sys.exit(many(int(first), int(last or first), options.mutant, options.processes))


if __name__ == "__main__":
    main()
