"""A worker's share of many seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .mutants import faults_of, mutated
from .world import World

if TYPE_CHECKING:
    from .world import Report


def some(work: tuple[list[int], str]) -> list[Report]:
    """Run some seeds; a worker's share."""
    seeds, mutant = work
    with mutated(mutant):
        return [World(seed, also=faults_of(mutant)).run() for seed in seeds]
