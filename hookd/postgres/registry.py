"""
Endpoints as their owners manage them: add, list, change, pause, resume, remove, rotate.

What somebody does with them is written into the audit trail in the same transaction, where an ``actor`` is named.  These
functions write ``hookd.endpoint`` and its secrets, and never ``hookd.delivery``: the daemon that owns the shard
applies what was changed to what is pending.  They are given a URL that has been judged already; that is the caller's
business, because it needs the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import asyncpg

from hookd.postgres import audit, vault
from hookd.postgres.audit import Subject

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from hookd.core.model import Secret
    from hookd.core.sealing import Keyring
    from hookd.postgres.audit import Actor

TYPE_PATTERN = re.compile(r"\*|[^\s*]{1,255}?(\.\*)?")

SELECT = """
select e.key, e.id, e.tenant, e.url, e.host, e.shard, e.types, e.filter::text as filter, e.format, e.ordered, e.rate,
       e.concurrency, e.description, e.state, e.state_reason, e.state_at, e.failing_since, e.failing_reason, e.parked_at,
       e.verified_at, e.created_at, e.updated_at,
       (select s.shown from hookd.endpoint_secret s
         where s.endpoint = e.key and s.purpose = 'headers' order by s.id desc limit 1) as header_names,
       coalesce((select array_agg(s.shown[1] order by s.id desc) from hookd.endpoint_secret s
                  where s.endpoint = e.key and s.purpose = 'signing' and s.shown is not null
                    and (s.expires_at is null or s.expires_at > now())), '{}') as public_keys,
       (select case when s.shown is null then 'hmac' else 'ed25519' end from hookd.endpoint_secret s
         where s.endpoint = e.key and s.purpose = 'signing' order by s.id desc limit 1) as key_type,
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
   and ($5::text is null or strpos(lower(e.url), lower($5)) > 0)
 order by e.id
 limit $4
"""
)

INSERT = """
insert into hookd.endpoint
       (tenant, url, host, types, filter, format, ordered, rate, concurrency, description, state, state_reason, shard)
values ($1, $2, $3, $4, $5::text::jsonpath, $6, $7, $8, $9, $10, $11, $12, 0)
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
       description = case when $14 then $15 else description end,
       verified_at = case when $2 <> url then null else verified_at end,
       state = case when $16 and $2 <> url and state = 'active' then 'unverified' else state end,
       state_reason = case when $16 and $2 <> url and state = 'active' then $17 else state_reason end
 where id = $1 and state <> 'removed'
returning key
"""

TOUCH = "update hookd.endpoint set updated_at = now() where key = $1"

NOT_VERIFIED = "it has not answered a challenge yet"

DOUBTED = """
select failing_since <= clock_timestamp() - make_interval(secs => $2) from hookd.endpoint where id = $1
"""

# A success ends the wait, and begins its health anew as resuming would; what was paused or disabled by hand stays so.
VERIFIED = """
update hookd.endpoint
   set verified_at = clock_timestamp(),
       state_reason = case when state = 'unverified' then null else state_reason end,
       failing_since = case when state = 'unverified' then null else failing_since end,
       failing_reason = case when state = 'unverified' then null else failing_reason end,
       parked_at = case when state = 'unverified' then null else parked_at end,
       state = case when state = 'unverified' then 'active' else state end
 where id = $1 and url = $2 and state <> 'removed'
returning key
"""

VERIFY_FAILED = """
update hookd.endpoint set state_reason = $3 where id = $1 and url = $2 and state = 'unverified'
"""

SET_STATE = """
update hookd.endpoint
   set state = $2, state_reason = $3,
       failing_since = case when $2 = 'active' then null else failing_since end,
       failing_reason = case when $2 = 'active' then null else failing_reason end,
       parked_at = case when $2 = 'active' then null else parked_at end
 where id = $1 and state = any($4::text[])
returning key, state_at
"""

# What a disabled endpoint missed: what died with it or was never fanned out, by type and filter as they are now; of what was to
# be delivered later, not before then.
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
  insert into hookd.delivery (shard, endpoint, event_id, due_at, replay)
  select e.shard, e.key, c.id, greatest(now(), (select v.deliver_at from hookd.event v where v.id = c.id)), true
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

    def facts(self) -> dict[str, Any]:
        """What is changed, for the audit trail: of headers the names."""
        said = {
            name: getattr(self, name)
            for name in ("url", "types", "filter", "format", "ordered", "rate", "concurrency", "description")
            if getattr(self, name) is not None
        }
        if self.headers is not None:
            said["header_names"] = sorted(self.headers)
        return said | dict.fromkeys(sorted(self.clear))


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
    verified_at: datetime.datetime | None
    """When its URL answered the challenge."""
    created_at: datetime.datetime
    updated_at: datetime.datetime
    header_names: list[str] | None
    public_keys: list[str]
    """Of its ed25519 secrets, newest first: what its receiver checks with."""
    key_type: str | None
    """Of its newest secret: hmac or ed25519."""
    secrets: int
    """How many secrets sign: two while one rotates."""

    def owes_an_answer(self, *, required: bool) -> bool:
        """Whether nothing is sent to it, not even a test, before it has answered a challenge; ``required``: by the configuration."""
        waits = self.state in ("paused", "disabled") and self.verified_at is None
        return self.state == "unverified" or (required and waits)


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
    connection: asyncpg.Connection,
    tenant: str,
    change: EndpointChange,
    secret: Secret,
    *,
    keyring: Keyring,
    verified: bool = True,
    actor: Actor | None = None,
) -> EndpointRecord:
    """
    Register an endpoint; one that is not ``verified`` receives nothing before it has answered a challenge.

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
                "active" if verified else "unverified",
                None if verified else NOT_VERIFIED,
            )
            await vault.add_signing(connection, keyring, row["key"], row["id"], secret)
            if change.headers:
                await vault.set_headers(connection, keyring, row["key"], row["id"], change.headers)
            await _note(connection, actor, "endpoint.add", row["id"], change.facts())
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
    url: str | None = None,
) -> list[EndpointRecord]:
    """Endpoints in order of creation, the removed ones only when asked for; ``url``: a part of it."""
    return [EndpointRecord(**row) for row in await connection.fetch(LIST, tenant, state, after, limit, url)]


async def update(
    connection: asyncpg.Connection,
    endpoint_id: UUID,
    change: EndpointChange,
    *,
    keyring: Keyring,
    verified: bool = True,
    actor: Actor | None = None,
) -> EndpointRecord:
    """
    Change an endpoint; unless a new URL is taken for ``verified``, it receives nothing before it has answered.

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
                not verified,
                NOT_VERIFIED,
            )
            if key is None:
                raise _removed(await show(connection, endpoint_id))
            if change.headers is not None:
                await vault.set_headers(connection, keyring, key, endpoint_id, change.headers)
                await connection.execute(TOUCH, key)
            await _note(connection, actor, "endpoint.update", endpoint_id, change.facts())
    return await show(connection, endpoint_id)


STAYING = ["active", "unverified", "paused", "disabled"]
"""All states but removed."""

CLEARABLE = ("filter", "format", "rate", "concurrency", "description")


async def pause(
    connection: asyncpg.Connection,
    endpoint_id: UUID,
    reason: str | None = None,
    *,
    actor: Actor | None = None,
) -> EndpointRecord:
    """Let its deliveries wait."""
    async with connection.transaction():
        await _note(connection, actor, "endpoint.pause", endpoint_id, {"reason": reason} if reason else {})
        return await _set_state(connection, endpoint_id, "paused", reason, ["active", "unverified", "paused"])


async def remove(
    connection: asyncpg.Connection, endpoint_id: UUID, *, actor: Actor | None = None
) -> EndpointRecord:
    """Mark it; its owner cancels what is pending."""
    async with connection.transaction():
        await _note(connection, actor, "endpoint.remove", endpoint_id)
        return await _set_state(connection, endpoint_id, "removed", None, STAYING)


async def resume(
    connection: asyncpg.Connection,
    endpoint_id: UUID,
    missed: str = "none",
    *,
    ask_again_after_s: float | None = None,
    actor: Actor | None = None,
) -> tuple[EndpointRecord, int]:
    """
    Let it receive again; returns how many missed deliveries were queued.

    ``missed`` says what a disabled endpoint gets of what it missed: ``all``, ``latest`` (one) or ``none``.  Where
    verification is required (``ask_again_after_s`` is not None), one that was never verified, was disabled, or has failed
    for so long, has to answer a challenge first.
    """
    async with connection.transaction():
        before = await show(connection, endpoint_id)
        required = ask_again_after_s is not None
        if required and (
            before.verified_at is None
            or before.state == "disabled"
            or await connection.fetchval(DOUBTED, endpoint_id, ask_again_after_s)
        ):
            record = await _set_state(connection, endpoint_id, "unverified", NOT_VERIFIED, STAYING)
        else:
            record = await _set_state(connection, endpoint_id, "active", None, STAYING)
        queued = 0
        if before.state == "disabled" and missed != "none":
            row = await _one(
                connection, MISSED, endpoint_id, before.state_at, 1 if missed == "latest" else 2_000_000_000
            )
            queued = row["queued"]
            if row["shards"]:
                await connection.execute("select hookd.wake($1)", row["shards"])
        details = {"was": before.state, "missed": missed, "queued": queued}
        await _note(connection, actor, "endpoint.resume", endpoint_id, details)
    return record, queued


async def note_verification(
    connection: asyncpg.Connection,
    endpoint_id: UUID,
    url: str,
    problem: str | None,
    *,
    actor: Actor | None = None,
) -> EndpointRecord:
    """
    Write down what came of a challenge; ``problem``: why it was not answered.

    Raises:
        NotPossible: the endpoint was removed or given another URL meanwhile.
    """
    async with connection.transaction():
        details = {"verified": problem is None} | ({} if problem is None else {"reason": problem})
        await _note(connection, actor, "endpoint.verify", endpoint_id, details)
        if problem is not None:
            await connection.execute(VERIFY_FAILED, endpoint_id, url, problem)
        elif await connection.fetchval(VERIFIED, endpoint_id, url) is None:
            raise NotPossible(f"endpoint {endpoint_id} was removed or given another URL meanwhile; ask again")
    return await show(connection, endpoint_id)


async def rotate(
    connection: asyncpg.Connection,
    endpoint_id: UUID,
    secret: Secret,
    overlap_s: float,
    *,
    keyring: Keyring,
    actor: Actor | None = None,
) -> EndpointRecord:
    """Sign with a new secret; the old ones sign too for ``overlap_s`` more seconds."""
    record = await show(connection, endpoint_id)
    if record.state == "removed":
        raise _removed(record)
    async with connection.transaction():
        await vault.replace_signing(connection, keyring, record.key, endpoint_id, secret, overlap_s)
        await connection.execute(TOUCH, record.key)
        await _note(connection, actor, "endpoint.rotate", endpoint_id, {"overlap_s": overlap_s})
    return await show(connection, endpoint_id)


def _removed(record: EndpointRecord) -> NotPossible:
    return NotPossible(f"endpoint {record.id} was removed; add another one")


async def _note(
    connection: asyncpg.Connection,
    actor: Actor | None,
    action: str,
    endpoint_id: UUID,
    details: Mapping[str, Any] | None = None,
) -> None:
    if actor is not None:
        await audit.record(connection, actor, action, Subject(endpoint=endpoint_id), details)


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
