"""
One event, and one delivery from its first attempt to its end: what was sent, what was answered, how long what took, what followed.

The request is not stored: it is written again from the event and the endpoint, as it was signed then, as far as what it
was made of is still there.  An endpoint's own headers are named, and their values hidden.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from hookd.core.composer import Composer
from hookd.core.model import BodyFormat, Delivery, DeliveryId, Endpoint, EndpointKey, Event, Secret
from hookd.core.request import InvalidRequest
from hookd.core.sealing import CannotOpen
from hookd.core.sent import HIDDEN, shown
from hookd.postgres import search
from hookd.postgres.explain import explain
from hookd.postgres.pages import EPOCH, TooMuch, dictionaries, floor_of, time_of
from hookd.postgres.vault import SIGNING, unseal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import asyncpg

    from hookd.core.composer import Wire
    from hookd.core.sealing import Keyring

DELIVERIES_SHOWN = 100

ATTEMPTS_SHOWN = 200
"""Of one delivery, the newest."""

NOT_KEPT = "v1,(not kept)"

EVENT = """
select v.id, v.type, v.tenant, v.created_at, v.deliver_at, v.expires_at, v.idempotency_key, v.order_key,
       v.coalesce_key, v.headers::text as headers, v.payload
  from hookd.event v
 where v.id = $1
"""

BURIED_EVENT = """
select l.event_id as id, l.type, l.tenant, l.created_at, null::timestamptz as deliver_at, l.expires_at,
       null::text as idempotency_key, null::text as order_key, null::text as coalesce_key, l.headers::text as headers, l.payload
  from hookd.dead_letter l
 where l.event_id = $1
 limit 1
"""

PENDING = """
select d.id as delivery_id, d.endpoint, d.attempt, d.due_at, d.replay
  from hookd.delivery d
 where d.event_id = $1 and d.id = $2
"""

ATTEMPTS = """
select a.at, a.endpoint, a.attempt, a.status, a.verdict, a.outcome, a.reason, a.retry_at, a.sent, a.resent, a.reused, a.replay,
       a.total_ms, a.dns_ms, a.connect_ms, a.tls_ms, a.first_byte_ms, a.url, a.answer_headers, a.answer_body, a.answer_truncated
  from hookd.attempt a
 where a.event_id = $1 and a.delivery_id = $2 and a.at >= $3
 order by a.at desc, a.attempt desc
 limit $4
"""

DEAD = """
select l.endpoint, l.attempts, l.died_at, l.replayed_at, l.reason from hookd.dead_letter l where l.delivery_id = $1
"""

ENDPOINT = """
select e.key, e.id, e.tenant, e.url, e.host, e.shard, e.format, e.state, e.state_reason, e.updated_at,
       (select s.shown from hookd.endpoint_secret s
         where s.endpoint = e.key and s.purpose = 'headers' order by s.id desc limit 1) as header_names
  from hookd.endpoint e
 where e.key = $1
"""

ENDPOINT_OF = """
select e.id, e.tenant, e.url, e.state
  from (select d.endpoint from hookd.delivery d where d.event_id = $1 and d.id = $2
        union all
        (select a.endpoint from hookd.attempt a where a.event_id = $1 and a.delivery_id = $2 limit 1)
        union all
        select l.endpoint from hookd.dead_letter l where l.event_id = $1 and l.delivery_id = $2) k
  join hookd.endpoint e on e.key = k.endpoint
 limit 1
"""

# Those that signed then, newest first.
SECRETS = """
select s.value, s.created_at, s.expires_at from hookd.endpoint_secret s
 where s.endpoint = $1 and s.purpose = 'signing'
 order by s.id desc
"""

# Between which times a delivery of this number was inserted, by what the daemons wrote down.
INSERTED = """
select max(t.at) filter (where t.delivery_id < $1) as after,
       min(t.at + t.seconds * interval '1 second') filter (where t.delivery_id >= $1) as before
  from hookd.tally t
"""

FIND_DEAD = "select event_id from hookd.dead_letter where delivery_id = $1"

FIND_FRESH = """
select d.event_id
  from hookd.endpoint e
 cross join lateral (
   select f.event_id from hookd.delivery f where f.endpoint = e.key and f.due_at is null and f.id = $1) d
 limit 1
"""

FIND_PENDING = """
select d.event_id from hookd.delivery d
 where d.id = $1 and d.event_id >= $2::uuid and ($3::uuid is null or d.event_id < $3)
 limit 1
"""

FIND_WAITING = "select d.event_id from hookd.delivery d where d.id = $1 and d.due_at is not null limit 1"

FIND_EVENT = "select 1 from hookd.event where id = $1"

FIND_ENDPOINT = "select 1 from hookd.endpoint where id = $1"


@dataclass(frozen=True, slots=True)
class Found:
    """What an id belongs to."""

    kind: str
    """``event``, ``delivery`` or ``endpoint``."""
    event: UUID | None = None
    delivery: int | None = None
    endpoint: UUID | None = None


async def event(connection: asyncpg.Connection, event_id: UUID) -> dict[str, Any] | None:
    """
    One event: id, type, tenant, created_at, deliver_at, expires_at, idempotency_key, order_key, coalesce_key, headers (a
    dictionary or None), payload (text, as it was given), payload_bytes, buried (retention took it; a dead letter has a copy),
    deliveries (rows of ``search.deliveries``, at most ``DELIVERIES_SHOWN``) and more_deliveries (their cursor).
    """
    row = await _event_row(connection, event_id)
    if row is None:
        return None
    wanted = search.Filter(event=event_id)
    page = await search.deliveries(connection, wanted, limit=DELIVERIES_SHOWN)
    return row | {"deliveries": page.rows, "more_deliveries": page.older}


async def delivery(
    connection: asyncpg.Connection,
    delivery_id: int,
    event_id: UUID | None = None,
    *,
    wire: Wire | None = None,
    keyring: Keyring | None = None,
) -> dict[str, Any] | None:
    """
    One delivery and its attempts, oldest first.

    Keys: delivery_id, event_id, type, tenant, created_at, endpoint_id, url, endpoint_state, state, attempts_made, replay,
    reason, next_attempt_at, because (what it waits for or how it ended, in words), died_at and replayed_at of its dead
    letter, attempts, attempts_left_out.

    An attempt: at, attempt, status, verdict, outcome, reason, retry_at, sent, resent, reused, total_ms, phases (name and ms
    each: dns, connect, first_byte, rest), words, request and answer; the last two are None for an ending without an
    exchange (numbered 0).  request: method, url, headers (pairs), body, body_bytes, signed, changed (the endpoint was changed
    since, so the request may have been another); or problem, where it cannot be written again.  answer: status, headers
    (pairs), body, truncated: untrusted text of the receiver.

    ``wire`` is what the daemon's requests have in common; without it there are no requests.  With a ``keyring`` signatures
    are made again too.  Without ``event_id`` the delivery is looked for, which may take longer.
    """
    if event_id is None:
        event_id = await find_delivery(connection, delivery_id)
        if event_id is None:
            return None
    since = time_of(event_id) - search.SKEW
    # the queue first: what settles meanwhile is in the log then, and not in neither
    pending = await _row(connection, PENDING, event_id, delivery_id)
    rows = dictionaries(await connection.fetch(ATTEMPTS, event_id, delivery_id, since, ATTEMPTS_SHOWN))
    # by its own clock it may not be the last one, where the daemons' clocks differ
    final = next((row for row in rows if row["verdict"] != "retry"), None)
    if final is not None:
        pending = None
    dead = await _row(connection, DEAD, delivery_id)
    known = pending or (rows[0] if rows else None) or dead
    if known is None:
        return None
    endpoint = await _row(connection, ENDPOINT, known["endpoint"])
    happened = await _event_row(connection, event_id)
    told = list(reversed(rows))
    maker = None
    if wire is not None and endpoint is not None and happened is not None:
        secrets = await _secrets(connection, endpoint, keyring) if keyring is not None else []
        maker = _Maker(endpoint, happened, wire, secrets)
    state, made = _state(pending, final, rows, dead)
    because = await explain(connection, event_id, delivery_id) if pending is not None else []
    last = rows[0] if rows else None
    return {
        "delivery_id": delivery_id,
        "event_id": event_id,
        "type": happened["type"] if happened else None,
        "tenant": endpoint["tenant"] if endpoint else happened["tenant"] if happened else None,
        "created_at": happened["created_at"] if happened else None,
        "endpoint_id": endpoint["id"] if endpoint else None,
        "url": endpoint["url"] if endpoint else None,
        "endpoint_state": endpoint["state"] if endpoint else None,
        "state": state,
        "attempts_made": made,
        "replay": known.get("replay", False),
        "reason": dead["reason"] if dead else last["reason"] if last and pending is None else None,
        "next_attempt_at": pending["due_at"] if pending else None,
        "because": because[0]["because"]
        if because
        else in_words(last)
        if last
        else dead["reason"]
        if dead
        else "",
        "died_at": dead["died_at"] if dead else None,
        "replayed_at": dead["replayed_at"] if dead else None,
        "attempts": [_told(row, maker) for row in told],
        "attempts_left_out": max(0, made - len(told)) if len(rows) == ATTEMPTS_SHOWN else 0,
    }


async def find(connection: asyncpg.Connection, text: str) -> Found | None:
    """What somebody typed or pasted: an event's id, an endpoint's, or a delivery's number."""
    text = text.strip().removeprefix("#")
    if text.isascii() and text.isdigit():
        number = int(text) if len(text) < 20 else 1 << 63
        event_id = await find_delivery(connection, number) if number < 1 << 63 else None
        return None if event_id is None else Found("delivery", event=event_id, delivery=number)
    try:
        wanted = UUID(text)
    except ValueError:
        return None
    if await connection.fetchval(FIND_EVENT, wanted) or await connection.fetchval(FIND_DEAD_EVENT, wanted):
        return Found("event", event=wanted)
    if await connection.fetchval(FIND_ENDPOINT, wanted):
        return Found("endpoint", endpoint=wanted)
    return None


FIND_DEAD_EVENT = "select 1 from hookd.dead_letter where event_id = $1 limit 1"


async def event_tenant(connection: asyncpg.Connection, event_id: UUID) -> str | None:
    """Whose event it is; None: there is no such event."""
    row = await _event_row(connection, event_id)
    return None if row is None else str(row["tenant"])


async def endpoint_of(
    connection: asyncpg.Connection, event_id: UUID, delivery_id: int
) -> dict[str, Any] | None:
    """The id, tenant, url and state of a delivery's endpoint; None: there is no such delivery, or it is gone."""
    return await _row(connection, ENDPOINT_OF, event_id, delivery_id)


async def find_delivery(connection: asyncpg.Connection, delivery_id: int) -> UUID | None:
    """
    The event of a delivery, pending or past.

    No index knows deliveries by number: a row of the queue lives for milliseconds.  When it was inserted is known to
    the minute, or to a quarter of an hour, and from there the log is looked through.
    """
    for statement in (FIND_DEAD, FIND_FRESH):
        event_id: UUID | None = await connection.fetchval(statement, delivery_id)
        if event_id is not None:
            return event_id
    row = await connection.fetchrow(INSERTED, delivery_id)
    assert row is not None
    minute = datetime.timedelta(minutes=1)
    after = row["after"] - minute if row["after"] else EPOCH
    before = None if row["before"] is None else floor_of(row["before"] + minute)
    for statement, arguments in ((FIND_PENDING, (floor_of(after), before)), (FIND_WAITING, ())):
        event_id = await connection.fetchval(statement, delivery_id, *arguments)
        if event_id is not None:
            return event_id
    try:
        return await search.first_attempt(connection, delivery_id, after)
    except TooMuch:
        raise TooMuch(f"delivery {delivery_id} was not found in a moment; name its event too") from None


def in_words(attempt: Mapping[str, Any]) -> str:
    """What came of an attempt and what followed, as a sentence."""
    said = (
        f"answered {attempt['status']}"
        if attempt["status"]
        else attempt["reason"] or attempt["outcome"] or ""
    )
    took = f" after {_ms(attempt['total_ms'])}" if attempt["total_ms"] is not None else ""
    number = attempt["attempt"]
    match attempt["verdict"]:
        case "delivered":
            return f"delivered: {said}{took}"
        case "retry":
            reason = attempt["reason"] or said
            at = f" at {attempt['retry_at']:%Y-%m-%d %H:%M:%S} UTC" if attempt["retry_at"] else " later"
            return f"failed: {reason}{took}; tried again{at}"
        case "exhausted" if number:
            return f"given up: {attempt['reason'] or said}{took}, attempt {number} was the last"
        case "exhausted":
            return f"given up without another attempt: {attempt['reason']}"
        case "expired" | "cancelled" as ended:
            return f"{ended}: {attempt['reason'] or said}"
        case other:
            return f"{other}: {attempt['reason'] or said}"


def phases(attempt: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    Where the time of an attempt went, in order: dns, connect, tls (none of these on a connection that was open already),
    first_byte (from the written request to the answer's headers), rest (waiting for its turn, reading the body).
    """
    total = attempt["total_ms"]
    if total is None:
        return []
    known = [
        {"name": name, "ms": round(attempt[f"{name}_ms"], 3)}
        for name in ("dns", "connect", "tls", "first_byte")
        if attempt[f"{name}_ms"] is not None
    ]
    rest = total - sum(p["ms"] for p in known)
    return [*known, {"name": "rest", "ms": round(max(0.0, rest), 3)}]


def _ms(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"


async def _row(connection: asyncpg.Connection, statement: str, *args: Any) -> dict[str, Any] | None:
    row = await connection.fetchrow(statement, *args)
    return None if row is None else dict(row)


async def _event_row(connection: asyncpg.Connection, event_id: UUID) -> dict[str, Any] | None:
    row = await connection.fetchrow(EVENT, event_id)
    buried = row is None
    if row is None:
        row = await connection.fetchrow(BURIED_EVENT, event_id)
    if row is None:
        return None
    said = dict(row)
    said["headers"] = json.loads(said["headers"]) if said["headers"] else None
    return said | {"payload_bytes": len(said["payload"].encode()), "buried": buried}


def _state(
    pending: Mapping[str, Any] | None,
    final: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    dead: Mapping[str, Any] | None,
) -> tuple[str, int]:
    made = max((r["attempt"] for r in rows), default=0)
    if pending is not None:
        return ("retrying" if pending["attempt"] else "pending"), pending["attempt"]
    if final is not None:
        return final["verdict"], made
    if dead is not None:
        return "exhausted", dead["attempts"]
    # its row was deleted by hand, between two attempts
    return "cancelled", made


@dataclass(frozen=True, slots=True)
class _Signing:
    """A secret, and when it signed."""

    secret: Secret
    since: datetime.datetime
    until: datetime.datetime | None


async def _secrets(
    connection: asyncpg.Connection, endpoint: Mapping[str, Any], keyring: Keyring
) -> list[_Signing]:
    found = []
    for row in await connection.fetch(SECRETS, endpoint["key"]):
        try:
            value = unseal(keyring, endpoint["id"], SIGNING, row["value"])
        except CannotOpen:
            return []
        found.append(_Signing(Secret(value), row["created_at"], row["expires_at"]))
    return found


@dataclass(frozen=True, slots=True)
class _Maker:
    """Writes the requests of one delivery again."""

    endpoint: Mapping[str, Any]
    event: Mapping[str, Any]
    wire: Wire
    secrets: Sequence[_Signing]

    def request(self, attempt: Mapping[str, Any]) -> dict[str, Any]:
        at = attempt["at"]
        url = attempt["url"] or self.endpoint["url"]
        # the newest one may not be older than the attempt: then others signed, which are gone
        signing = [s.secret for s in self.secrets if s.since <= at and (s.until is None or s.until > at)]
        served = Endpoint(
            key=EndpointKey(self.endpoint["key"]),
            id=self.endpoint["id"],
            tenant=self.endpoint["tenant"],
            url=url,
            host=self.endpoint["host"],
            shard=self.endpoint["shard"],
            format=BodyFormat(self.endpoint["format"]) if self.endpoint["format"] else None,
            secrets=tuple(signing),
            headers=dict.fromkeys(self.endpoint["header_names"] or (), HIDDEN),
        )
        e = self.event
        happened = Event(
            e["id"],
            e["type"],
            e["tenant"],
            e["payload"].encode(),
            e["created_at"].timestamp(),
            None,
            e["headers"],
        )
        owed = Delivery(DeliveryId(0), served.key, happened, attempt["attempt"] - 1, served.shard)
        try:
            made = Composer(served, self.wire).compose(owed, int(at.timestamp()))
        except (InvalidRequest, ValueError) as problem:
            return {"problem": str(problem)}
        said = shown(made, served.headers)
        if not signing:
            said["headers"] = [(n, NOT_KEPT if n == "webhook-signature" else v) for n, v in said["headers"]]
        return said | {
            "url": url,
            "signed": bool(signing),
            "changed": self.endpoint["updated_at"] > at,
        }


def _told(row: Mapping[str, Any], maker: _Maker | None) -> dict[str, Any]:
    """An attempt as it is shown."""
    said = dict(row)
    for name in (
        "endpoint",
        "dns_ms",
        "connect_ms",
        "tls_ms",
        "first_byte_ms",
        "replay",
        "answer_headers",
        "answer_body",
        "answer_truncated",
    ):
        said.pop(name)
    made = row["attempt"] > 0
    answered = made and row["status"] is not None
    return said | {
        "phases": phases(row),
        "words": in_words(row),
        "request": maker.request(row) if maker is not None and made else None,
        "answer": answer(
            row["status"],
            row["answer_headers"] or "",
            row["answer_body"] or "",
            truncated=row["answer_truncated"],
        )
        if answered
        else None,
    }


def answer(status: int, headers: str, body: str, *, truncated: bool) -> dict[str, Any]:
    """What a receiver answered, as it is shown; untrusted text.  ``headers`` are lines."""
    pairs = [tuple(text.split(": ", 1)) for text in headers.splitlines() if ": " in text]
    return {"status": status, "headers": pairs, "body": body, "truncated": truncated}
