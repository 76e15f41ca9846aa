"""
Finding events, deliveries, attempts and dead letters: by id, type, tenant, endpoint, state, time and payload.

Each list is a ``pages.Listing``, so a search costs a bounded time whatever it asks for.  The log has no index by endpoint,
tenant or type, which every delivery would pay for: rows are looked through by time, and by endpoint inside the index that
the log has (``attempt_event``).  Failures have an index of their own, in which a success leaves nothing.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import asyncpg

from hookd.postgres.pages import (
    EPOCH,
    NARROWEST,
    Page,
    dictionaries,
    earliest,
    floor_of,
    ordered,
    page,
    time_of,
)

if TYPE_CHECKING:
    from uuid import UUID

    from hookd.postgres.pages import Key

PENDING_STATES = ("pending", "retrying")

STATES = (*PENDING_STATES, "delivered", "exhausted", "expired", "cancelled")
"""Of a delivery."""

VERDICTS = ("delivered", "retry", "exhausted", "expired", "cancelled")
"""Of an attempt."""

SKEW = datetime.timedelta(hours=1)
"""An attempt may look older than its event by so much, where clocks differ."""

FIRST = -1
"""Below all numbers of deliveries and attempts."""


class BadFilter(ValueError):
    """What is asked for does not exist, or cannot be asked of this list; the message says what can."""


@dataclass(frozen=True, slots=True)
class Filter:
    """What to look for; None and empty: whatever.  Not every list knows every one: see the functions."""

    event: UUID | None = None
    delivery: int | None = None
    endpoint: UUID | None = None
    tenant: str | None = None
    type: str | None = None
    """A type, or a pattern: ``user.*``."""
    states: tuple[str, ...] = ()
    """Of deliveries (``STATES``) or of attempts (``VERDICTS``)."""
    failed: bool = False
    """Attempts that were not delivered."""
    outcome: str | None = None
    """``answered``, ``timeout``, …"""
    status: int | None = None
    """503; or 5 for all from 500 to 599."""
    path: str | None = None
    """SQL/JSON path on the payload: ``$.id ? (@ == 123)``."""
    replayed: bool | None = None
    """Dead letters: whether they were queued again."""
    since: datetime.datetime | None = None
    until: datetime.datetime | None = None
    """Excluded.  Events and deliveries: when the event was made; attempts: when they began; dead letters: when they died."""

    def given(self) -> set[str]:
        """The names of those that say something."""
        return {f.name for f in fields(self) if getattr(self, f.name) not in (None, (), False)} | (
            {"replayed"} if self.replayed is not None else set()
        )


EVENT_FILTERS = frozenset({"tenant", "type", "path", "since", "until"})

DELIVERY_FILTERS = frozenset({"event", "endpoint", "tenant", "type", "states", "path", "since", "until"})

ATTEMPT_FILTERS = frozenset(
    {"event", "delivery", "endpoint", "tenant", "type", "states", "failed", "outcome", "status", "path", "since", "until"}
)  # fmt: skip

DEAD_LETTER_FILTERS = frozenset({"event", "endpoint", "tenant", "type", "path", "replayed", "since", "until"})

# Events -----------------------------------------------------------------------------------------------------------

EVENTS = ordered("""
select v.id, v.type, v.tenant, v.created_at, v.deliver_at, v.expires_at, v.idempotency_key, v.order_key, v.coalesce_key,
       octet_length(v.payload) as payload_bytes
  from hookd.event v
 where v.id {beyond} $1::uuid and v.id {within} $2::uuid
   and ($4::text is null or v.tenant = $4)
   and ($5::text is null or $5 = any(hookd.type_patterns(v.type)))
   and ($6::text is null or hookd.matches($6::text::jsonpath, v.payload))
 order by v.id {order}
 limit $3
""")

EVENT_EDGES = ordered("""
select (select v.id from hookd.event v where $1::uuid is null or v.id {from} $1 order by v.id {order} limit 1) as nearest,
       (select v.id from hookd.event v where $1::uuid is null or v.id {from} $1 order by v.id {order} offset $2 limit 1) as further,
       (select v.id from hookd.event v order by v.id {opposite} limit 1) as last
""")

# What has become of each: of one with many deliveries so many are looked at.
FAN_OUT_MOST = 100

FATES = f"""
select k.id, s.state, count(*)::integer as deliveries
  from (select i as id, hookd.uuid7_time(i) - interval '1 hour' as since from unnest($1::uuid[]) i) k
 cross join lateral (
   (select case when d.attempt = 0 then 'pending' else 'retrying' end as state
      from hookd.delivery d where d.event_id = k.id limit {FAN_OUT_MOST})
   union all
   (select a.verdict from hookd.attempt a
     where a.event_id = k.id and a.at >= k.since and a.verdict in ('delivered', 'exhausted', 'expired', 'cancelled') limit {FAN_OUT_MOST})) s
 group by k.id, s.state
"""

# Deliveries -------------------------------------------------------------------------------------------------------

# Those that are pending, and those that ended, which the log knows: both in the order of their events.
DELIVERIES = ordered("""
select s.*
  from (
   (select d.event_id, d.id as delivery_id, d.endpoint as endpoint_key,
           case when d.attempt = 0 then 'pending' else 'retrying' end as state, d.attempt as attempts,
           null::text as reason, null::timestamptz as last_attempt_at, null::text as last_outcome,
           null::smallint as last_status, null::real as last_ms, d.due_at as next_attempt_at, d.replay
      from hookd.delivery d
     where (d.event_id, d.id) {beyond} ($1::uuid, $2::bigint) and d.event_id {within} $3::uuid
       and ($5::text[] is null or case when d.attempt = 0 then 'pending' else 'retrying' end = any($5))
       and ($5::text[] is null or $5 && array['pending', 'retrying'])
       and ($6::integer is null or d.endpoint = $6)
       and ($7::text is null or d.endpoint in (select e.key from hookd.endpoint e where e.tenant = $7))
       and ($8::uuid is null or d.event_id = $8)
       and ($9::text is null and $10::text is null or exists (
             select from hookd.event v
              where v.id = d.event_id and ($9::text is null or $9 = any(hookd.type_patterns(v.type)))
                and ($10::text is null or hookd.matches($10::text::jsonpath, v.payload))))
     order by d.event_id {order}, d.id {order}
     limit $4)
   union all
   (select a.event_id, a.delivery_id, a.endpoint, a.verdict, a.attempt,
           a.reason, a.at, a.outcome, a.status, a.total_ms, null, a.replay
      from hookd.attempt a
     where (a.event_id, a.delivery_id) {beyond} ($1::uuid, $2::bigint) and a.event_id {within} $3::uuid
       and a.at >= $11::timestamptz
       and a.verdict in ('delivered', 'exhausted', 'expired', 'cancelled')
       and ($5::text[] is null or a.verdict = any($5))
       and ($5::text[] is null or $5 && array['delivered', 'exhausted', 'expired', 'cancelled'])
       and ($6::integer is null or a.endpoint = $6)
       and ($7::text is null or a.endpoint in (select e.key from hookd.endpoint e where e.tenant = $7))
       and ($8::uuid is null or a.event_id = $8)
       and ($9::text is null and $10::text is null or exists (
             select from hookd.event v
              where v.id = a.event_id and ($9::text is null or $9 = any(hookd.type_patterns(v.type)))
                and ($10::text is null or hookd.matches($10::text::jsonpath, v.payload))))
     order by a.event_id {order}, a.delivery_id {order}
     limit $4)) s
 order by s.event_id {order}, s.delivery_id {order}
 limit $4
""")

# Of both lists: what is nearer in either, and what is last in either.
DELIVERY_EDGES = ordered("""
select (select d.event_id from hookd.delivery d where $1::uuid is null or d.event_id {from} $1 order by d.event_id {order} limit 1) as pending,
       (select a.event_id from hookd.attempt a where $1::uuid is null or a.event_id {from} $1 order by a.event_id {order} limit 1) as settled,
       (select d.event_id from hookd.delivery d where $1::uuid is null or d.event_id {from} $1 order by d.event_id {order} offset $2 limit 1) as pending_further,
       (select a.event_id from hookd.attempt a where $1::uuid is null or a.event_id {from} $1 order by a.event_id {order} offset $2 limit 1) as settled_further,
       (select d.event_id from hookd.delivery d order by d.event_id {opposite} limit 1) as pending_last,
       (select a.event_id from hookd.attempt a order by a.event_id {opposite} limit 1) as settled_last
""")

# Attempts ---------------------------------------------------------------------------------------------------------

ATTEMPTS = ordered("""
select a.at, a.delivery_id, a.event_id, a.endpoint as endpoint_key, a.attempt, a.status, a.verdict, a.outcome, a.reason,
       a.retry_at, a.sent, a.resent, a.reused, a.replay, a.total_ms, a.dns_ms, a.connect_ms, a.tls_ms, a.first_byte_ms, a.url
  from hookd.attempt a
 where (a.at, a.delivery_id, a.attempt) {beyond} ($1::timestamptz, $2::bigint, $3::integer)
   and a.at {within} $4::timestamptz
   and ($6::integer is null or a.endpoint = $6)
   and ($7::text is null or a.endpoint in (select e.key from hookd.endpoint e where e.tenant = $7))
   and ($8::text[] is null or a.verdict = any($8))
   and (not $9::boolean or a.verdict <> 'delivered')
   and ($10::text is null or a.outcome = $10)
   and ($11::integer is null or a.status between $11 and $12::integer)
   and ($13::uuid is null or a.event_id = $13)
   and ($14::bigint is null or a.delivery_id = $14)
   and ($15::text is null and $16::text is null or exists (
         select from hookd.event v
          where v.id = a.event_id and ($15::text is null or $15 = any(hookd.type_patterns(v.type)))
            and ($16::text is null or hookd.matches($16::text::jsonpath, v.payload))))
 order by a.at {order}, a.delivery_id {order}, a.attempt {order}
 limit $5
""")

ATTEMPT_EDGES = ordered("""
select (select a.at from hookd.attempt a
         where ($1::timestamptz is null or a.at {from} $1) and (not $3::boolean or a.verdict <> 'delivered')
         order by a.at {order} limit 1) as nearest,
       (select a.at from hookd.attempt a
         where ($1::timestamptz is null or a.at {from} $1) and (not $3::boolean or a.verdict <> 'delivered')
         order by a.at {order} offset $2 limit 1) as further,
       (select a.at from hookd.attempt a where not $3::boolean or a.verdict <> 'delivered' order by a.at {opposite} limit 1) as last
""")

# Dead letters -----------------------------------------------------------------------------------------------------

DEAD_LETTERS = ordered("""
select l.died_at, l.delivery_id, l.event_id, l.endpoint as endpoint_key, l.attempts, l.reason, l.replayed_at, l.tenant,
       l.type, l.created_at, octet_length(l.payload) as payload_bytes
  from hookd.dead_letter l
 where (l.died_at, l.delivery_id) {beyond} ($1::timestamptz, $2::bigint) and l.died_at {within} $3::timestamptz
   and ($5::integer is null or l.endpoint = $5)
   and ($6::text is null or l.tenant = $6)
   and ($7::text is null or $7 = any(hookd.type_patterns(l.type)))
   and ($8::text is null or hookd.matches($8::text::jsonpath, l.payload))
   and ($9::boolean is null or (l.replayed_at is not null) = $9)
   and ($10::uuid is null or l.event_id = $10)
 order by l.died_at {order}, l.delivery_id {order}
 limit $4
""")

DEAD_LETTER_EDGES = ordered("""
select (select l.died_at from hookd.dead_letter l where $1::timestamptz is null or l.died_at {from} $1
         order by l.died_at {order} limit 1) as nearest,
       (select l.died_at from hookd.dead_letter l where $1::timestamptz is null or l.died_at {from} $1
         order by l.died_at {order} offset $2 limit 1) as further,
       (select l.died_at from hookd.dead_letter l order by l.died_at {opposite} limit 1) as last
""")

# What a page shows beside its rows --------------------------------------------------------------------------------

ENDPOINTS = """
select e.key, e.id, e.tenant, e.url, e.state from hookd.endpoint e where e.key = any($1::integer[])
"""

EVENT_HEADS = """
select v.id, v.type, v.created_at
  from unnest($1::uuid[]) as k (id)
  join hookd.event v on v.id = k.id
"""

ENDPOINT_KEY = "select key from hookd.endpoint where id = $1"

CHECK_PATH = "select $1::text::jsonpath"


async def events(
    connection: asyncpg.Connection, wanted: Filter, cursor: str | None = None, limit: int = 50
) -> Page:
    """
    Events, newest first, by tenant, type, path and time.

    Rows: id, type, tenant, created_at, deliver_at, expires_at, idempotency_key, order_key, coalesce_key, payload_bytes, and
    ``deliveries``: how many are in which state, of at most ``FAN_OUT_MOST`` pending and as many ended ones.

    Raises:
        BadFilter, BadCursor, TooMuch: as they say.
    """
    await _check(connection, wanted, EVENT_FILTERS)
    found = await page(_Events(connection, wanted), cursor, limit, since=wanted.since, until=wanted.until)
    fates: dict[UUID, dict[str, int]] = {}
    for fate in await connection.fetch(FATES, [r["id"] for r in found.rows]) if found.rows else ():
        fates.setdefault(fate["id"], {})[fate["state"]] = fate["deliveries"]
    for row in found.rows:
        row["deliveries"] = fates.get(row["id"], {})
    return found


async def deliveries(
    connection: asyncpg.Connection, wanted: Filter, cursor: str | None = None, limit: int = 50
) -> Page:
    """
    Deliveries, those of the newest events first, by event, endpoint, tenant, type, states, path and time.

    Rows: event_id, delivery_id, endpoint_id, url, tenant, type, created_at (of the event), state, attempts, reason,
    last_attempt_at, last_outcome, last_status, last_ms, next_attempt_at, replay.

    Raises:
        BadFilter, BadCursor, TooMuch: as they say.
    """
    await _check(connection, wanted, DELIVERY_FILTERS, STATES)
    key = await _endpoint_key(connection, wanted)
    listing = _Deliveries(connection, wanted, key)
    since, until = wanted.since, wanted.until
    if wanted.event is not None:
        # they lie where their event does
        made = time_of(wanted.event)
        since = made if since is None else max(since, made)
        until = made + NARROWEST if until is None else min(until, made + NARROWEST)
    found = await page(listing, cursor, limit, since=since, until=until)
    return await _named(connection, found)


async def attempts(
    connection: asyncpg.Connection, wanted: Filter, cursor: str | None = None, limit: int = 50
) -> Page:
    """
    Attempts, newest first, by all of ``Filter`` but replayed; ``states`` are ``VERDICTS``.

    Rows: at, delivery_id, event_id, endpoint_id, url, tenant, type, attempt, status, verdict, outcome, reason, retry_at, sent,
    resent, reused, replay, total_ms, dns_ms, connect_ms, tls_ms, first_byte_ms.  One numbered 0 is an ending without an exchange.

    Raises:
        BadFilter, BadCursor, TooMuch: as they say.
    """
    await _check(connection, wanted, ATTEMPT_FILTERS, VERDICTS)
    key = await _endpoint_key(connection, wanted)
    listing = _Attempts(connection, wanted, key)
    found = await page(listing, cursor, limit, since=wanted.since, until=wanted.until)
    return await _named(connection, found)


async def dead_letters(
    connection: asyncpg.Connection, wanted: Filter, cursor: str | None = None, limit: int = 50
) -> Page:
    """
    Dead letters, those that died last first, by event, endpoint, tenant, type, path, replayed and time.

    Rows: died_at, delivery_id, event_id, endpoint_id, url, tenant, type, created_at, attempts, reason, replayed_at, payload_bytes.

    Raises:
        BadFilter, BadCursor, TooMuch: as they say.
    """
    await _check(connection, wanted, DEAD_LETTER_FILTERS)
    key = await _endpoint_key(connection, wanted)
    listing = _DeadLetters(connection, wanted, key)
    found = await page(listing, cursor, limit, since=wanted.since, until=wanted.until)
    return await _named(connection, found, events_too=False)


async def first_attempt(
    connection: asyncpg.Connection, delivery_id: int, since: datetime.datetime
) -> UUID | None:
    """
    The event of a delivery, by its first attempt from then on; None: it has none.

    Raises:
        TooMuch: it was not found in a second.
    """
    row = await earliest(_Attempts(connection, Filter(delivery=delivery_id), None), since, look_s=1.0)
    return None if row is None else row["event_id"]


async def _check(
    connection: asyncpg.Connection, wanted: Filter, known: frozenset[str], states: tuple[str, ...] = ()
) -> None:
    unknown = wanted.given() - known
    if unknown:
        raise BadFilter(
            f"this list cannot be searched by {', '.join(sorted(unknown))}; it can by {', '.join(sorted(known))}"
        )
    wrong = [s for s in wanted.states if s not in states]
    if wrong:
        raise BadFilter(f"{wrong[0][:50]!r} is no state; there are {', '.join(states)}")
    if wanted.status is not None and not (1 <= wanted.status <= 9 or 100 <= wanted.status <= 999):
        raise BadFilter("a status is a number such as 503, or 5 for all of 5xx")
    if wanted.path is not None:
        try:
            await connection.fetchval(CHECK_PATH, wanted.path)
        except (asyncpg.PostgresSyntaxError, asyncpg.DataError) as error:
            raise BadFilter(
                f"the path is no SQL/JSON path: {error}; write for instance $.amount ? (@ > 100)"
            ) from None


async def _endpoint_key(connection: asyncpg.Connection, wanted: Filter) -> int | None:
    if wanted.endpoint is None:
        return None
    key: int | None = await connection.fetchval(ENDPOINT_KEY, wanted.endpoint)
    if key is None:
        raise BadFilter(f"there is no endpoint {wanted.endpoint}")
    return key


async def _named(connection: asyncpg.Connection, found: Page, *, events_too: bool = True) -> Page:
    """Rows with what their endpoints and events are called."""
    endpoints: dict[int, asyncpg.Record] = {}
    heads: dict[UUID, asyncpg.Record] = {}
    if found.rows:
        keys = sorted({r["endpoint_key"] for r in found.rows})
        endpoints = {r["key"]: r for r in await connection.fetch(ENDPOINTS, keys)}
    if found.rows and events_too:
        ids = sorted({r["event_id"] for r in found.rows})
        heads = {r["id"]: r for r in await connection.fetch(EVENT_HEADS, ids)}
    for row in found.rows:
        endpoint = endpoints.get(row.pop("endpoint_key"))
        row["endpoint_id"] = endpoint["id"] if endpoint else None
        row["url"] = row.get("url") or (endpoint["url"] if endpoint else None)
        if events_too:
            head = heads.get(row["event_id"])
            row["tenant"] = endpoint["tenant"] if endpoint else None
            row["type"] = head["type"] if head else None
            row["created_at"] = head["created_at"] if head else None
    return found


class _Events:
    """``hookd.event`` by id."""

    name = "events"

    def __init__(self, connection: asyncpg.Connection, wanted: Filter) -> None:
        self._connection = connection
        self._arguments = (wanted.tenant, wanted.type, wanted.path)

    async def edges(self, at: datetime.datetime | None, rows: int, *, newer: bool) -> Any:
        bound = None if at is None else floor_of(at)
        found = await self._connection.fetchrow(EVENT_EDGES[newer], bound, rows)
        return tuple(None if i is None else time_of(i) for i in found or ())

    async def window(
        self, place: Key, bound: datetime.datetime, limit: int, *, newer: bool
    ) -> list[dict[str, Any]]:
        rows = await self._connection.fetch(EVENTS[newer], place[0], floor_of(bound), limit, *self._arguments)
        return dictionaries(rows)

    def place_at(self, at: datetime.datetime) -> Key:
        return (floor_of(at),)

    def key_of(self, row: dict[str, Any]) -> Key:
        return (row["id"],)


class _Deliveries:
    """``hookd.delivery`` and the endings in ``hookd.attempt``, by event."""

    name = "deliveries"

    def __init__(self, connection: asyncpg.Connection, wanted: Filter, key: int | None) -> None:
        self._connection = connection
        states = list(wanted.states) or None
        self._arguments = (states, key, wanted.tenant, wanted.event, wanted.type, wanted.path)

    async def edges(self, at: datetime.datetime | None, rows: int, *, newer: bool) -> Any:
        bound = None if at is None else floor_of(at)
        found = await self._connection.fetchrow(DELIVERY_EDGES[newer], bound, rows)
        times = [None if i is None else time_of(i) for i in found or ()]
        first, last = (min, max) if newer else (max, min)
        return tuple(
            chosen((t for t in pair if t is not None), default=None)
            for chosen, pair in ((first, times[:2]), (first, times[2:4]), (last, times[4:]))
        )

    async def window(
        self, place: Key, bound: datetime.datetime, limit: int, *, newer: bool
    ) -> list[dict[str, Any]]:
        since = min(bound, time_of(place[0])) - SKEW if bound > EPOCH + SKEW else EPOCH
        rows = await self._connection.fetch(
            DELIVERIES[newer], place[0], place[1], floor_of(bound), limit, *self._arguments, max(since, EPOCH)
        )
        return dictionaries(rows)

    def place_at(self, at: datetime.datetime) -> Key:
        return floor_of(at), FIRST

    def key_of(self, row: dict[str, Any]) -> Key:
        return row["event_id"], row["delivery_id"]


class _Attempts:
    """``hookd.attempt`` by time."""

    name = "attempts"

    def __init__(self, connection: asyncpg.Connection, wanted: Filter, key: int | None) -> None:
        self._connection = connection
        verdicts = list(wanted.states) or None
        self._failed = wanted.failed or (verdicts is not None and "delivered" not in verdicts)
        low, high = wanted.status, wanted.status
        if wanted.status is not None and wanted.status < 10:
            low, high = wanted.status * 100, wanted.status * 100 + 99
        self._arguments = (
            key, wanted.tenant, verdicts, self._failed, wanted.outcome, low, high, wanted.event, wanted.delivery,
            wanted.type, wanted.path,
        )  # fmt: skip

    async def edges(self, at: datetime.datetime | None, rows: int, *, newer: bool) -> Any:
        row = await self._connection.fetchrow(ATTEMPT_EDGES[newer], at, rows, self._failed)
        return tuple(row or ())

    async def window(
        self, place: Key, bound: datetime.datetime, limit: int, *, newer: bool
    ) -> list[dict[str, Any]]:
        rows = await self._connection.fetch(ATTEMPTS[newer], *place, bound, limit, *self._arguments)
        return dictionaries(rows)

    def place_at(self, at: datetime.datetime) -> Key:
        return at, FIRST, FIRST

    def key_of(self, row: dict[str, Any]) -> Key:
        return row["at"], row["delivery_id"], row["attempt"]


class _DeadLetters:
    """``hookd.dead_letter`` by time."""

    name = "dead-letters"

    def __init__(self, connection: asyncpg.Connection, wanted: Filter, key: int | None) -> None:
        self._connection = connection
        self._arguments = (key, wanted.tenant, wanted.type, wanted.path, wanted.replayed, wanted.event)

    async def edges(self, at: datetime.datetime | None, rows: int, *, newer: bool) -> Any:
        row = await self._connection.fetchrow(DEAD_LETTER_EDGES[newer], at, rows)
        return tuple(row or ())

    async def window(
        self, place: Key, bound: datetime.datetime, limit: int, *, newer: bool
    ) -> list[dict[str, Any]]:
        rows = await self._connection.fetch(DEAD_LETTERS[newer], *place, bound, limit, *self._arguments)
        return dictionaries(rows)

    def place_at(self, at: datetime.datetime) -> Key:
        return at, FIRST

    def key_of(self, row: dict[str, Any]) -> Key:
        return row["died_at"], row["delivery_id"]
