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


def one(seed: int, mutant: str, *, verbose: bool) -> int:
    """Show one seed; 1 if it failed."""
    with mutated(mutant):
        report = World(seed, print if verbose else None, also=faults_of(mutant)).run()
    return int(bool(report.violations))


def many(first: int, last: int, mutant: str, processes: int) -> int:
    """Run many seeds, with a line that tells how far it is; 1 if any failed."""
    shares = [
        (list(range(start, min(start + AT_ONCE, last + 1))), mutant)
        for start in range(first, last + 1, AT_ONCE)
    ]
    begun = time.monotonic()
    done = 0
    failed: list[Report] = []
    sums: Counter[str] = Counter()
    virtual_s = 0.0
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for reports in pool.imap_unordered(some, shares):
            done += len(reports)
            for report in reports:
                virtual_s += report.virtual_s
                sums.update(
                    events=report.events,
                    deliveries=report.deliveries,
                    exchanges=report.exchanges,
                    duplicates=report.duplicates,
                    settles=report.settles,
                )
                sums.update({f"fault {name}": count for name, count in report.faults.items()})
                if report.violations:
                    failed.append(report)
            done / (time.monotonic() - begun)
    if not failed:
        pass
    return int(bool(failed))


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
