"""
Which shards a daemon should own: the same number for everybody, decided by each alone from what the locks say.

Daemons that see different moments may disagree for a moment.  That costs nothing: a shard has one lock, so at worst one of
them gets fewer for a while, and the next look puts it right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence


@dataclass(frozen=True, slots=True)
class View:
    """What the locks say."""

    members: tuple[int, ...]
    """Daemons that are there, by the process ids of their sessions, ascending."""
    me: int
    shards: tuple[int, ...]
    """All there are, ascending."""
    taken: frozenset[int]
    """Those that others own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do about it."""

    leave: tuple[int, ...] = ()
    """Start nothing more of these, and give them up when nothing of theirs is under way."""
    stay: tuple[int, ...] = ()
    """Take these back that were to be left."""
    take: tuple[int, ...] = ()
    """Try to lock these."""


def share(view: View) -> int:
    """How many shards are mine: they differ by one at most, and the first ones have more."""
    rank = view.members.index(view.me) if view.me in view.members else len(view.members)
    count = max(1, len(view.members))
    return len(view.shards) // count + (rank < len(view.shards) % count)


def plan(
    view: View, owned: Collection[int], leaving: Collection[int], idlest: Callable[[], Sequence[int]]
) -> Plan:
    """
    What brings ``owned`` (``leaving`` among them) to its share.

    ``idlest`` ranks the owned ones, those with the least to do first: they are the first to be left.  It is asked only then.
    """
    kept = len(owned) - len(leaving)
    wanted = share(view) - kept
    if wanted < 0:
        return Plan(leave=tuple([s for s in idlest() if s not in leaving][:-wanted]))
    stay = tuple(sorted(leaving)[:wanted])
    free = [s for s in view.shards if s not in view.taken and s not in owned]
    # each begins elsewhere, so that daemons that start together do not try for the same ones
    first = (
        view.members.index(view.me) * len(free) // max(1, len(view.members)) if view.me in view.members else 0
    )
    return Plan(stay=stay, take=tuple((free[first:] + free[:first])[: wanted - len(stay)]))
