"""``python -m tests.simulation --seed N --verbose``: one seed, as it went; ``--seeds A-B``: many."""

from __future__ import annotations

import argparse
import sys
import time

from .world import World


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.seed is not None:
        report = World(options.seed, print if options.verbose else None).run()
        print(report)
        sys.exit(bool(report.violations))
    first, last = map(int, options.seeds.split("-"))
    begun = time.time()
    bad = 0
    for seed in range(first, last + 1):
        report = World(seed).run()
        if report.violations:
            bad += 1
            print(seed, report.violations[0])
    print((time.time() - begun) / (last - first + 1), "s a seed,", bad, "bad")


main()
