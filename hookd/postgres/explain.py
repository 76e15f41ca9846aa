"""
Why a delivery is where it is: for each the one thing that it waits for, or how it ended, in words.

It reads PostgreSQL only.  What a lane waits for is what its daemon published within the last second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hookd.core.words import bounded, several, span
from hookd.postgres.history import deliveries
from hookd.postgres.status import PIN_PLANS, lanes_of, nodes

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    import asyncpg

    from hookd.postgres.status import Lane

AHEAD_MOST = 1000
"""Deliveries before one are counted up to here."""

_PENDING = f"""
select d.id, d.event_id, d.endpoint, d.attempt, d.due_at, d.shard, d.order_key,
       extract(epoch from d.due_at - clock_timestamp())::double precision as due_in_s,
       extract(epoch from clock_timestamp() - hookd.uuid7_time(d.event_id))::double precision as age_s,
       e.id as endpoint_id, e.url, e.host, e.state, e.state_reason, e.parked_at, e.failing_reason, e.rate, e.concurrency, e.shard as endpoint_shard,
       coalesce(v.expires_at <= clock_timestamp(), false) as expired,
       (select min(o.id) from hookd.delivery o
         where o.endpoint = d.endpoint and o.order_key = d.order_key and o.id < d.id) as behind,
       case when d.coalesce_key is not null then (
         select max(o.id) from hookd.delivery o
          where o.endpoint = d.endpoint and o.coalesce_key = d.coalesce_key and o.id < d.id) end as state_before,
       case when d.coalesce_key is not null and d.attempt = 0 then (
         select o.event_id from hookd.delivery o
          where o.endpoint = d.endpoint and o.coalesce_key = d.coalesce_key and o.id > d.id
          order by o.id desc limit 1) end as replaced_by,
       case when d.due_at is null
            then (select count(*) from (select from hookd.delivery o
                   where o.endpoint = d.endpoint and o.due_at is null and o.id < d.id limit {AHEAD_MOST + 1}) f)
            else (select count(*) from (select from hookd.delivery o
                   where o.endpoint = d.endpoint and o.due_at is not null and (o.due_at, o.id) < (d.due_at, d.id)
                   limit {AHEAD_MOST + 1}) r)
       end as ahead,
       (select a.reason from hookd.attempt a
         where a.event_id = d.event_id and a.endpoint = d.endpoint and a.delivery_id = d.id
         order by a.attempt desc limit 1) as last_reason
  from hookd.delivery d
  left join hookd.endpoint e on e.key = d.endpoint
  left join hookd.event v on v.id = d.event_id
"""

PENDING = _PENDING + " where d.event_id = $1 and ($2::bigint is null or d.id = $2) order by d.id"

# The heads of order keys, by the index that has them.
HEADS = (
    _PENDING
    + """
  join unnest($1::integer[], $2::text[], $3::bigint[]) as k (endpoint, order_key, id)
    on d.endpoint = k.endpoint and d.order_key = k.order_key and d.id = k.id
"""
)

OWNERS = """
select l.objid::bigint as shard, l.pid from pg_locks l
 where l.locktype = 'advisory' and l.classid = 1752133483 and l.granted
   and l.database = (select oid from pg_database where datname = current_database())
"""


@dataclass(frozen=True, slots=True)
class Pending:
    """A row of the queue, with what is known of its endpoint and of the rows before it."""

    id: int
    event_id: UUID
    endpoint: int
    attempt: int
    due_at: datetime.datetime | None
    due_in_s: float | None
    """Negative when it has come."""
    age_s: float
    """Since its event was made."""
    shard: int
    order_key: str | None
    endpoint_id: UUID | None
    url: str | None
    host: str | None
    state: str | None
    """Of the endpoint; None: there is none."""
    state_reason: str | None
    parked_at: datetime.datetime | None
    failing_reason: str | None
    rate: float | None
    concurrency: int | None
    endpoint_shard: int | None
    expired: bool
    behind: int | None
    """The oldest pending delivery of its order key, if that is another one."""
    state_before: int | None
    """The delivery before it of its coalesce key."""
    replaced_by: UUID | None
    """A newer event of its coalesce key."""
    ahead: int
    """Rows of its endpoint that are served before it, at most ``AHEAD_MOST`` and one."""
    last_reason: str | None
    """Of its last attempt."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The daemon that owns a shard, as far as it has said something."""

    lanes: Mapping[str, Lane]
    in_flight: frozenset[int] | None
    """Deliveries whose exchange is under way; None from a daemon that does not say."""
    silence_s: float
    stalled: str = ""
    """What everything waits for."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Ids of endpoints whose secrets it cannot read, and why."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Who owns which shard."""

    by_shard: Mapping[int, int]
    """A shard's backend in PostgreSQL."""
    by_backend: Mapping[int, Owner]


async def explain(
    connection: asyncpg.Connection, event_id: UUID, delivery_id: int | None = None
) -> list[dict[str, Any]]:
    """Why each delivery of an event is where it is: a dictionary each, with a sentence under ``because``."""
    async with connection.transaction():
        await connection.execute(PIN_PLANS)
        pending = [Pending(**r) for r in await connection.fetch(PENDING, event_id, delivery_id)]
        heads = await _heads(connection, [p for p in pending if p.behind is not None])
        owners = await _owners(connection)
    explained = [
        _about(
            {"delivery_id": p.id, "event_id": p.event_id, "endpoint_id": p.endpoint_id, "url": p.url},
            "retrying" if p.attempt else "pending",
            p.attempt,
            why_pending(p, owners, None if p.behind is None else heads.get(p.behind)),
        )
        for p in pending
    ]
    shown = {p.id for p in pending}
    for row in await deliveries(connection, event_id):
        if row["delivery_id"] in shown or row["state"] in ("pending", "retrying"):
            continue
        if delivery_id is None or row["delivery_id"] == delivery_id:
            explained.append(_about(row, row["state"], row["attempts"], why_settled(row)))
    return explained


async def _heads(connection: asyncpg.Connection, blocked: Sequence[Pending]) -> dict[int, Pending]:
    if not blocked:
        return {}
    rows = await connection.fetch(
        HEADS, [p.endpoint for p in blocked], [p.order_key for p in blocked], [p.behind for p in blocked]
    )
    return {r["id"]: Pending(**r) for r in rows}


async def _owners(connection: asyncpg.Connection) -> Owners:
    by_backend = {}
    for node in await nodes(connection):
        in_flight = node["summary"].get("in_flight_ids")
        by_backend[node["backend"]] = Owner(
            {lane.host: lane for lane in lanes_of([node])},
            None if in_flight is None else frozenset(in_flight),
            node["silence"].total_seconds(),
            node["summary"].get("stalled", ""),
            node["summary"].get("unreadable", {}),
        )
    return Owners({r["shard"]: r["pid"] for r in await connection.fetch(OWNERS)}, by_backend)


def _about(row: Mapping[str, Any], state: str, attempts_made: int, because: str) -> dict[str, Any]:
    return {
        "delivery_id": row["delivery_id"],
        "event_id": row["event_id"],
        "endpoint_id": row["endpoint_id"],
        "url": row["url"],
        "state": state,
        "attempts": attempts_made,
        "because": because,
    }


def why_settled(row: Mapping[str, Any]) -> str:
    """The end of a delivery, in words."""
    at = f"{row['last_attempt_at']:%Y-%m-%d %H:%M:%S} UTC"
    match row["state"]:
        case "delivered":
            return f"delivered at {at}, answered {row['last_status']}, attempt {row['attempts']}"
        case "exhausted":
            return (
                f"given up at {at}: {row['reason']}; `hookd replay --event {row['event_id']}` queues it again"
            )
        case state:
            return f"{state} at {at}: {row['reason']}"


def why_pending(row: Pending, owners: Owners, head: Pending | None = None) -> str:
    """
    The one thing that a pending delivery waits for, in words: the first of these that holds, else what its lane says.

    ``head`` is the delivery that it is ``behind``.
    """
    backend = owners.by_shard.get(row.shard)
    for waits, because in (
        (row.state is None, "its endpoint is gone; it ends as cancelled when its owner reaches it"),
        (
            row.state == "unverified",
            f"its endpoint is not verified ({row.state_reason}); `hookd endpoint verify {row.endpoint_id}` asks it",
        ),
        (row.state == "paused", f"its endpoint is paused; `hookd endpoint resume {row.endpoint_id}`"),
        (
            row.state in ("disabled", "removed"),
            f"its endpoint is {row.state} ({row.state_reason or 'by hand'}); it ends when its owner reaches it",
        ),
        (backend is None, f"no daemon owns shard {row.shard}: is `hookd run` running?"),
        (row.shard != row.endpoint_shard, "its endpoint moved to another host; it is being handed over"),
        (
            row.replaced_by is not None,
            f"event {row.replaced_by} of the same coalesce key is newer; it ends as cancelled when its owner reaches it",
        ),
        (row.behind is not None, _why_behind(row, owners, head)),
        (row.due_in_s is not None and row.due_in_s > 0, _when_due(row)),
        (row.expired, "its event has expired; it ends as expired when its turn comes"),
    ):
        if waits:
            return because
    owner = owners.by_backend.get(backend or 0)
    if owner is None:
        return f"the daemon that owns shard {row.shard} has not said anything lately; see `hookd status`"
    unreadable = owner.unreadable.get(str(row.endpoint_id))
    if unreadable is not None:
        return f"the daemon cannot read the secrets of its endpoint: {unreadable}"
    return why_in_lane(row, owner)


def _why_behind(row: Pending, owners: Owners, head: Pending | None) -> str:
    said = f"it waits behind delivery {row.behind} of the same order key"
    if head is None:
        return f"{said}, which has just been settled"
    return f"{said}; that one: {why_pending(head, owners)}"


def _when_due(row: Pending) -> str:
    if row.due_at is None or row.due_in_s is None:
        return ""
    at = f"{row.due_at:%Y-%m-%d %H:%M:%S} UTC (in {span(row.due_in_s)})"
    if not row.attempt:
        return f"not before {at}"
    last = f"; the last: {row.last_reason}" if row.last_reason else ""
    return f"retry at {at}, after {several(row.attempt, 'attempt')}{last}"


def why_in_lane(row: Pending, owner: Owner) -> str:
    """What a delivery waits for that may be sent as far as the queue is concerned."""
    lane = owner.lanes.get(row.host or "")
    if _is_sent(row, owner, lane):
        return "it is being sent now"
    if row.state_before is not None and row.state_before in (owner.in_flight or ()):
        return f"it waits until delivery {row.state_before} of the same coalesce key has ended, which is being sent"
    if lane is not None and lane.why == "breaker":
        when = f"in {span(lane.held_s)}" if lane.held_s >= 1 else "in a moment"
        return f"its host does not answer; the next probe goes {when}{_last_error(lane)}"
    if lane is not None and lane.why == "hold":
        return f"its host asked to be left alone for {span(lane.held_s)} more (Retry-After)"
    if lane is not None and lane.why == "machine":
        return f"{lane.problem}: nothing goes to its host until that is over; it is tried again every 1 to 3 s, and uses up no attempt"
    if row.parked_at is not None:
        return (
            f"its endpoint has been parked since {row.parked_at:%Y-%m-%d %H:%M:%S} UTC ({row.failing_reason}): one delivery"
            f" goes now and then as a probe; `hookd endpoint resume {row.endpoint_id}` lets them all go"
        )
    limit = _limit(row, lane) if lane is not None else ""
    if owner.stalled and limit in ("", "its turn"):
        return f"it waits for {owner.stalled}"
    if not limit:
        return "it is about to be sent"
    ahead = f"; {bounded(row.ahead, AHEAD_MOST)} ahead of it in its endpoint's queue" if row.ahead else ""
    return f"it waits for {limit}{ahead}"


def _is_sent(row: Pending, owner: Owner, lane: Lane | None) -> bool:
    """Whether its exchange is under way."""
    if owner.in_flight is not None:
        return row.id in owner.in_flight
    # nothing waits in memory, and it was there before the daemon said so
    return lane is not None and lane.why == "idle" and lane.in_flight > 0 and row.age_s > owner.silence_s + 1


def _limit(row: Pending, lane: Lane) -> str:
    """The limit that a delivery waits for; empty where there is none."""
    own = _own_limits(row, lane)
    if own and lane.why in ("rate", "concurrency", "ready", "endpoint"):
        return f"its endpoint's own {own}"
    match lane.why:
        case "rate" if lane.rate:
            return f"its host's rate limit ({lane.rate:g}/s)"
        case "concurrency":
            return f"its host's concurrency: {_concurrency(lane)}"
        case "share":
            return "a free slot (delivery.max_in_flight): its host holds as many exchanges as are left to all others"
        case "ready" | "endpoint" if row.ahead:
            return "its turn"
    return ""


def _own_limits(row: Pending, lane: Lane) -> str:
    """The endpoint's own limits that are stricter than its host's, and may be what holds it."""
    own = {}
    if row.rate is not None and not 0 < lane.rate <= row.rate and lane.why != "concurrency":
        own["rate limit"] = f"{row.rate:g}/s"
    if (
        row.concurrency is not None
        and row.concurrency < lane.concurrency
        and row.concurrency <= lane.in_flight
    ):
        own["concurrency"] = f"{row.concurrency} at once"
    name = next(iter(own)) if len(own) == 1 else "limits"
    return f"{name} ({', '.join(own.values())})" if own else ""


def _concurrency(lane: Lane) -> str:
    said = f"{lane.in_flight} in flight, {lane.concurrency} allowed now"
    return said + (f", {lane.cap} at most" if lane.cap and lane.concurrency < lane.cap else "")


def _last_error(lane: Lane) -> str:
    if lane.problem_s is None:
        return ""
    return f" (last error: {lane.problem}, {span(lane.problem_s)} ago)"
