"""What the feed reads from the queue, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import datetime
    from uuid import UUID

    from hookd.core.model import DeliveryId, EndpointKey


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a statement saw: transactions below ``xmax`` but not in ``xip``."""

    xmin: int
    xmax: int
    xip: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Read PostgreSQL's ``xmin:xmax:xip,xip``."""
        xmin, xmax, xip = text.split(":")
        return cls(int(xmin), int(xmax), tuple(xip.split(",")) if xip else ())


class Row(NamedTuple):
    """A delivery as the queue has it."""

    id: DeliveryId
    event_id: UUID
    endpoint: EndpointKey
    shard: int
    attempt: int
    due_at: datetime.datetime | None
    order_key: str | None
    replay: bool
    coalesce_key: str | None = None
    replaced_by: UUID | None = None
    """The event of the newest pending row of its coalesce key, if no attempt was made for this one."""
    later: bool = False
    """It is not due yet."""


class Place(NamedTuple):
    """Where an endpoint's new rows start, in an arrival that is too large to be read whole."""

    endpoint: EndpointKey
    first_id: int | None
    first_due: float | None


class Reach(NamedTuple):
    """
    How far back from the newest an endpoint's rows have been looked through for what is to be forwarded.

    Those below ``id`` are left, and of those with a due time the ones before ``due_at`` (as PostgreSQL writes it) and ``due_id``.
    """

    endpoint: EndpointKey
    id: int = 2**63 - 1
    due_at: str = "infinity"
    due_id: int = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What became visible between two snapshots."""

    snapshot: Snapshot
    db_now: float
    rows: list[Row]
    places: list[Place]
    """In place of rows, when there were more of them than the window holds."""
