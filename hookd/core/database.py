"""What is found of PostgreSQL's health, as values."""

from __future__ import annotations

from dataclasses import dataclass

HOLDERS = ("session", "prepared_transaction", "replication_slot", "standby")
"""What can hold vacuum back."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds vacuum back."""

    kind: str
    """One of ``HOLDERS``."""
    transactions: int
    """How many transactions ago its snapshot was taken."""
    seconds: float | None
    """For how long; a slot does not know."""
    who: str
    """For people: process, role, application, address.  Never a label of a metric."""


@dataclass(frozen=True, slots=True)
class DatabaseHealth:
    """What was found."""

    holders: tuple[Holder, ...]
    """The worst of each kind, the worst first."""
    visible: bool
    """Whether this role sees the sessions of others; if not, only its own are among the holders."""
    longest_transaction_s: float
    longest_who: str | None
    notify_usage: float
    """The part of the NOTIFY queue that is full, from 0 to 1."""
    dead_rows: int
    """Of the queue, as PostgreSQL's statistics have it."""
    live_rows: int
    queue_bytes: int
    """With its indexes."""
    vacuumed_s: float | None
    """How long ago the queue was vacuumed last; None: not since the statistics began."""
    ahead: dict[str, int]
    """Days made ahead, for ``event`` and ``attempt``."""
    behind_s: dict[str, float]
    """For how long something has been kept beyond its retention, for ``event``, ``attempt`` and ``dead_letter``."""

    def holding(self, kind: str) -> Holder | None:
        """The worst holder of a kind."""
        return next((h for h in self.holders if h.kind == kind), None)
