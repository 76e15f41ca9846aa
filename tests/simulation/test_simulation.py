"""Worlds from seeds: nothing lost, nothing doubled without a cause, limits and order kept, and everything settles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.mutants import MUTANTS, mutated
from tests.simulation.regressions import FOUND
from tests.simulation.world import World

SEEDS = 2000
"""In CI; ``python -m tests.simulation --seeds A-B`` runs as many as there is time for."""

AT_ONCE = 50

MUTANT_SEEDS = 100
"""Within so many each mutant has to be found."""


def failures(seeds: range | list[int]) -> dict[int, str]:
    reports = [World(seed).run() for seed in seeds]
    return {r.seed: r.violations[0] for r in reports if r.violations}


@pytest.mark.parametrize("first", range(1, SEEDS + 1, AT_ONCE))
def test_seeds(first: int) -> None:
    """What failed is shown whole by ``python -m tests.simulation --seed N --verbose``."""
    assert failures(range(first, first + AT_ONCE)) == {}


def test_seeds_that_failed_once() -> None:
    assert failures(sorted(FOUND)) == {}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_known_bug_is_found(name: str) -> None:
    bug, faults, first = MUTANTS[name]

    def fails(seed: int) -> bool:
        return bool(World(seed, also=faults).run().violations)

    with mutated(name):
        found = next((seed for seed in range(first, first + MUTANT_SEEDS) if fails(seed)), None)
    assert found is not None, f"{bug.__doc__} Nobody noticed."
    assert not fails(found), "and not another one"


REPLAYED = 20

TRACES = f"""
from tests.simulation.world import World
for seed in range(1, {REPLAYED + 1}):
    World(seed, lambda line: print(seed, line)).run()
"""


def test_a_seed_replays_exactly() -> None:
    """In another process, where strings hash in another way and objects lie elsewhere."""

    def traces(hash_seed: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", TRACES],
            cwd=Path(__file__).parent.parent.parent,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    first, second = traces("1"), traces("2")
    assert len(first) > 100 * REPLAYED
    assert next((pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]), None) is None
    assert len(first) == len(second)
