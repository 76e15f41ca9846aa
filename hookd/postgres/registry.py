"""
Endpoints as their owners manage them: add, list, change, pause, resume, remove, rotate.

These functions write ``hookd.endpoint`` and its secrets, and never ``hookd.delivery``: the daemon that owns the shard
applies what was changed to what is pending.  They are given a URL that has been judged already; that is the caller's
business, because it needs the network.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from hookd.core.model import Secret

TYPE_PATTERN = re.compile(r"\*|[^\s*]{1,255}?(\.\*)?")

SELECT = """
select e.key, e.id, e.tenant, e.url, e.host, e.shard, e.types, e.filter::text as filter, e.format, e.ordered, e.rate,
       e.concurrency, e.description, e.state, e.state_reason, e.state_at, e.failing_since, e.failing_reason, e.parked_at,
       e.created_at, e.updated_at,
       (select array_agg(k order by k) from json_object_keys((
          select s.value::json from hookd.endpoint_secret s
           where s.endpoint = e.key and s.purpose = 'headers' order by s.id desc limit 1)) as k) as header_names,
       (select count(*) from hookd.endpoint_secret s
         where s.endpoint = e.key and s.purpose = 'signing'
           and (s.expires_at is null or s.expires_at > now()))::integer as secrets
  from hookd.endpoint e
"""

LIST = (
    SELECT
    + """
 where ($1::text is null or e.tenant = $1) and ($2::text is null or e.state = $2)
   and (e.state <> 'removed' or $2 = 'removed') and ($3::uuid is null or e.id > $3)
 order by e.id
 limit $4
"""
)

INSERT = """
insert into hookd.endpoint
       (tenant, url, host, types, filter, format, ordered, rate, concurrency, description, shard)
values ($1, $2, $3, $4, $5::text::jsonpath, $6, $7, $8, $9, $10, 0)
returning key, id
"""

UPDATE = """
update hookd.endpoint
   set url = coalesce($2, url), host = coalesce($3, host), types = coalesce($4, types),
       filter = case when $5 then $6::text::jsonpath else filter end,
       format = case when $7 then $8 else format end,
       ordered = coalesce($9, ordered),
       rate = case when $10 then $11::double precision else rate end,
       concurrency = case when $12 then $13::integer else concurrency end,
       description = case when $14 then $15 else description end
 where id = $1 and state <> 'removed'
returning key
"""

ADD_SECRET = """
insert into hookd.endpoint_secret (endpoint, purpose, value) values ($1, $2, $3)
"""  # noqa: S105 - SQL

DELETE_HEADERS = "delete from hookd.endpoint_secret where endpoint = $1 and purpose = 'headers'"

EXPIRE_SECRETS = """
update hookd.endpoint_secret
   set expires_at = clock_timestamp() + make_interval(secs => $2)
 where endpoint = $1 and purpose = 'signing' and (expires_at is null or expires_at > clock_timestamp() + make_interval(secs => $2))
"""

PURGE_SECRETS = "delete from hookd.endpoint_secret where endpoint = $1 and expires_at < now()"

TOUCH = "update hookd.endpoint set updated_at = now() where key = $1"

SET_STATE = """
update hookd.endpoint
   set state = $2, state_reason = $3,
       failing_since = case when $2 = 'active' then null else failing_since end,
       failing_reason = case when $2 = 'active' then null else failing_reason end,
       parked_at = case when $2 = 'active' then null else parked_at end
 where id = $1 and state = any($4::text[])
returning key, state_at
"""

# What a disabled endpoint missed: what died with it or was never fanned out, by type and filter as they are now.
MISSED = """
with missed as (
  select v.id, v.key
    from hookd.event v
    join hookd.endpoint e on e.id = $1
   where v.id >= hookd.uuid7_floor($2) and v.tenant = e.tenant
     and e.types && hookd.type_patterns(v.type)
     and (e.filter is null or hookd.matches(e.filter, v.payload))
     and not exists (select from hookd.delivery d where d.event_id = v.id and d.endpoint = e.key)
     and not exists (select from hookd.attempt a
                      where a.event_id = v.id and a.endpoint = e.key and a.verdict = 'delivered')
  union
  select l.event_id, 0
    from hookd.dead_letter l
    join hookd.endpoint e on e.key = l.endpoint and e.id = $1
   where l.died_at >= $2 and l.replayed_at is null and l.reason like 'endpoint disabled%'
     and not exists (select from hookd.delivery d where d.event_id = l.event_id and d.endpoint = e.key)
),
chosen as (
  select id from missed group by id order by id desc limit $3
),
queued as (
  insert into hookd.delivery (shard, endpoint, event_id, replay)
  select e.shard, e.key, c.id, true
    from (select id from chosen order by id) c
   cross join hookd.endpoint e
   where e.id = $1
  returning shard
),
marked as (
  update hookd.dead_letter l set replayed_at = now()
    from chosen c, hookd.endpoint e
   where e.id = $1 and l.endpoint = e.key and l.event_id = c.id and l.replayed_at is null
)
select count(*)::integer as queued, array_agg(distinct shard) as shards from queued
"""


class NotPossible(Exception):
    """What was asked for cannot be done; the message says why and what would be right."""


@dataclass(frozen=True, slots=True)
class EndpointChange:
    """What to change; None leaves it, except where ``clear`` names it."""

    url: str | None = None
    host: str | None = None
    types: Sequence[str] | None = None
    filter: str | None = None
    format: str | None = None
    ordered: bool | None = None
    rate: float | None = None
    concurrency: int | None = None
    description: str | None = None
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    clear: frozenset[str] = frozenset()
    """Of filter, format, rate, concurrency, description: back to none."""


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """An endpoint as it is shown; it holds no secret."""

    key: int
    id: UUID
    tenant: str
    url: str
    host: str
    shard: int
    types: list[str]
    filter: str | None
    format: str | None
    ordered: bool
    rate: float | None
    concurrency: int | None
    description: str | None
    state: str
    state_reason: str | None
    state_at: datetime.datetime
    failing_since: datetime.datetime | None
    failing_reason: str | None
    parked_at: datetime.datetime | None
    created_at: datetime.datetime
    updated_at: datetime.datetime
    header_names: list[str] | None
    secrets: int
    """How many secrets sign: two while one rotates."""


def check_types(types: Sequence[str]) -> None:
    """
    Refuse patterns that could never match.

    Raises:
        NotPossible: one is not ``*``, ``user.created`` or ``user.*``.
    """
    for pattern in types:
        if not TYPE_PATTERN.fullmatch(pattern):
            raise NotPossible(f"{pattern!r} is no event type pattern; write user.created, user.* or *")


async def _one(connection: asyncpg.Connection, statement: str, *args: Any) -> asyncpg.Record:
    """The row of a statement that always has one."""
    row = await connection.fetchrow(statement, *args)
    assert row is not None
    return row


async def add(
    connection: asyncpg.Connection, tenant: str, change: EndpointChange, secret: Secret
) -> EndpointRecord:
    """
    Register an endpoint.

    Raises:
        NotPossible: a value was refused.
    """
    check_types(change.types or ["*"])
    with refusals():
        async with connection.transaction():
            row = await _one(
                connection,
                INSERT,
                tenant,
                change.url,
                change.host,
                list(change.types or ["*"]),
                change.filter,
                change.format,
                bool(change.ordered),
                change.rate,
                change.concurrency,
                change.description,
            )
            await connection.execute(ADD_SECRET, row["key"], "signing", secret.reveal())
            if change.headers:
                await connection.execute(ADD_SECRET, row["key"], "headers", json.dumps(dict(change.headers)))
    return await show(connection, row["id"])


async def show(connection: asyncpg.Connection, endpoint_id: UUID) -> EndpointRecord:
    """
    One endpoint.

    Raises:
        NotPossible: there is none of that id.
    """
    row = await connection.fetchrow(SELECT + " where e.id = $1", endpoint_id)
    if row is None:
        raise NotPossible(f"there is no endpoint {endpoint_id}; `hookd endpoint list` shows all")
    return EndpointRecord(**row)


async def listing(
    connection: asyncpg.Connection,
    *,
    tenant: str | None = None,
    state: str | None = None,
    after: UUID | None = None,
    limit: int = 100,
) -> list[EndpointRecord]:
    """Endpoints in order of creation, the removed ones only when asked for."""
    return [EndpointRecord(**row) for row in await connection.fetch(LIST, tenant, state, after, limit)]


async def update(connection: asyncpg.Connection, endpoint_id: UUID, change: EndpointChange) -> EndpointRecord:
    """
    Change an endpoint.

    Raises:
        NotPossible: there is none of that id, or a value was refused.
    """
    if change.types is not None:
        check_types(change.types)
    sets = {n: getattr(change, n) is not None or n in change.clear for n in CLEARABLE}
    with refusals():
        async with connection.transaction():
            key = await connection.fetchval(
                UPDATE,
                endpoint_id,
                change.url,
                change.host,
                None if change.types is None else list(change.types),
                sets["filter"],
                change.filter,
                sets["format"],
                change.format,
                change.ordered,
                sets["rate"],
                change.rate,
                sets["concurrency"],
                change.concurrency,
                sets["description"],
                change.description,
            )
            if key is not None and change.headers is not None:
                await connection.execute(DELETE_HEADERS, key)
                if change.headers:
                    await connection.execute(ADD_SECRET, key, "headers", json.dumps(dict(change.headers)))
                await connection.execute(TOUCH, key)
    return await show(connection, endpoint_id)


CLEARABLE = ("filter", "format", "rate", "concurrency", "description")


async def pause(
    connection: asyncpg.Connection, endpoint_id: UUID, reason: str | None = None
) -> EndpointRecord:
    """Let its deliveries wait."""
    return await _set_state(connection, endpoint_id, "paused", reason, ["active", "paused"])


async def remove(connection: asyncpg.Connection, endpoint_id: UUID) -> EndpointRecord:
    """Mark it; its owner cancels what is pending."""
    return await _set_state(connection, endpoint_id, "removed", None, ["active", "paused", "disabled"])


async def resume(
    connection: asyncpg.Connection, endpoint_id: UUID, missed: str = "none"
) -> tuple[EndpointRecord, int]:
    """
    Let it receive again; returns how many missed deliveries were queued.

    ``missed`` says what a disabled endpoint gets of what it missed: ``all``, ``latest`` (one) or ``none``.
    """
    async with connection.transaction():
        before = await show(connection, endpoint_id)
        record = await _set_state(connection, endpoint_id, "active", None, ["active", "paused", "disabled"])
        queued = 0
        if before.state == "disabled" and missed != "none":
            row = await _one(
                connection, MISSED, endpoint_id, before.state_at, 1 if missed == "latest" else 2_000_000_000
            )
            queued = row["queued"]
            if row["shards"]:
                await connection.execute("select hookd.wake($1)", row["shards"])
    return record, queued


async def rotate(
    connection: asyncpg.Connection, endpoint_id: UUID, secret: Secret, overlap_s: float
) -> EndpointRecord:
    """Sign with a new secret; the old ones sign too for ``overlap_s`` more seconds."""
    record = await show(connection, endpoint_id)
    async with connection.transaction():
        await connection.execute(PURGE_SECRETS, record.key)
        await connection.execute(EXPIRE_SECRETS, record.key, overlap_s)
        await connection.execute(ADD_SECRET, record.key, "signing", secret.reveal())
        await connection.execute(TOUCH, record.key)
    return await show(connection, endpoint_id)


async def _set_state(
    connection: asyncpg.Connection, endpoint_id: UUID, state: str, reason: str | None, allowed: list[str]
) -> EndpointRecord:
    row = await connection.fetchrow(SET_STATE, endpoint_id, state, reason, allowed)
    record = await show(connection, endpoint_id)
    if row is None:
        raise NotPossible(f"endpoint {endpoint_id} is {record.state} and cannot become {state}")
    return record


class refusals:  # noqa: N801 - reads as a context
    """Turns PostgreSQL's refusal of a value into ``NotPossible`` with the constraint's sense."""

    MESSAGES = {  # noqa: RUF012 - never written
        "endpoint_tenant_check": "a tenant is 1 to 255 characters long",
        "endpoint_rate_check": "a rate is a number of requests per second above 0",
        "endpoint_concurrency_check": "a concurrency is a whole number above 0",
        "endpoint_format_check": "a format is standard, raw, cloudevents or thin",
    }

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, asyncpg.CheckViolationError):
            raise NotPossible(self.MESSAGES.get(error.constraint_name or "", str(error))) from error
        if isinstance(
            error, asyncpg.PostgresSyntaxError | asyncpg.InvalidTextRepresentationError | asyncpg.DataError
        ):
            raise NotPossible(
                f"the filter is no SQL/JSON path: {error}; write for instance $.amount ? (@ > 100)"
            ) from error
