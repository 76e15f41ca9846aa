"""
The one place that writes and opens ``hookd.endpoint_secret``: signing secrets and headers of endpoints.

With a master key every value is sealed (``core.sealing``) before it leaves this process, bound to its endpoint and
purpose.  ``reseal`` brings what is stored under the newest key; it goes by id and looks at each value again when it
writes, so it can be broken off and run again, beside daemons and other commands.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hookd.core.model import Secret
from hookd.core.sealing import NONCE_BYTES, CannotOpen, Keyring
from hookd.core.signing import public_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from uuid import UUID

    import asyncpg

SIGNING, HEADERS = "signing", "headers"

INSERT = """
insert into hookd.endpoint_secret (endpoint, purpose, value, shown) values ($1, $2, $3, $4)
"""

DELETE_HEADERS = "delete from hookd.endpoint_secret where endpoint = $1 and purpose = 'headers'"

EXPIRE_SIGNING = """
update hookd.endpoint_secret
   set expires_at = clock_timestamp() + make_interval(secs => $2)
 where endpoint = $1 and purpose = 'signing' and (expires_at is null or expires_at > clock_timestamp() + make_interval(secs => $2))
"""

PURGE = "delete from hookd.endpoint_secret where endpoint = $1 and expires_at < now()"

CENSUS = """
select case when value like 'enc:v1:%' then split_part(value, ':', 3) end as key, count(*)::integer as count
  from hookd.endpoint_secret
 group by 1
"""

STALE = """
select s.id, s.purpose, s.value, e.id as endpoint_id
  from hookd.endpoint_secret s
  join hookd.endpoint e on e.key = s.endpoint
 where s.id > $1 and s.value not like 'enc:v1:' || $2 || ':%'
 order by s.id
 limit $3
"""

# Only where nobody has written another value meanwhile.
RESEAL = """
update hookd.endpoint_secret s
   set value = v.fresh
  from unnest($1::bigint[], $2::text[], $3::text[]) as v (id, stale, fresh)
 where s.id = v.id and s.value = v.stale
"""


@dataclass(frozen=True, slots=True)
class Census:
    """How many secrets are stored under which key."""

    by_key: Mapping[str, int]
    plain: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.plain + sum(self.by_key.values())


@dataclass(slots=True)
class Resealed:
    """How far ``reseal`` has come."""

    done: int = 0
    looked_at: int = 0
    unreadable: dict[UUID, str] = field(default_factory=dict)
    """Endpoints with a secret that could not be opened, and why."""


def seal(keyring: Keyring, endpoint_id: UUID, purpose: str, value: str) -> str:
    """A value as it is to be stored."""
    return keyring.seal(value, f"{endpoint_id}/{purpose}", os.urandom(NONCE_BYTES))


def unseal(keyring: Keyring, endpoint_id: UUID, purpose: str, stored: str) -> str:
    """
    A value as it was given.

    Raises:
        CannotOpen: its key is not there, or it was changed; says which.
    """
    return keyring.open(stored, f"{endpoint_id}/{purpose}")


async def add_signing(
    connection: asyncpg.Connection, keyring: Keyring, key: int, endpoint_id: UUID, secret: Secret
) -> None:
    """Sign with this secret too, from now on."""
    public = public_key(secret)
    sealed = seal(keyring, endpoint_id, SIGNING, secret.reveal())
    await connection.execute(INSERT, key, SIGNING, sealed, None if public is None else [public])


async def replace_signing(
    connection: asyncpg.Connection,
    keyring: Keyring,
    key: int,
    endpoint_id: UUID,
    secret: Secret,
    overlap_s: float,
) -> None:
    """Sign with this secret, and with those before it for ``overlap_s`` more seconds."""
    await connection.execute(PURGE, key)
    await connection.execute(EXPIRE_SIGNING, key, overlap_s)
    await add_signing(connection, keyring, key, endpoint_id, secret)


async def set_headers(
    connection: asyncpg.Connection, keyring: Keyring, key: int, endpoint_id: UUID, headers: Mapping[str, str]
) -> None:
    """Send these headers and no others."""
    await connection.execute(DELETE_HEADERS, key)
    if headers:
        sealed = seal(keyring, endpoint_id, HEADERS, json.dumps(dict(headers)))
        await connection.execute(INSERT, key, HEADERS, sealed, sorted(headers))


async def census(connection: asyncpg.Connection) -> Census:
    """Count what is stored, by key."""
    counts = {row["key"]: row["count"] for row in await connection.fetch(CENSUS)}
    plain = counts.pop(None, 0)
    return Census(counts, plain)


async def reseal(connection: asyncpg.Connection, keyring: Keyring, batch: int) -> AsyncIterator[Resealed]:
    """Bring everything under the newest key, a batch a transaction; yields after each how far it has come."""
    progress = Resealed()
    after = 0
    while rows := await connection.fetch(STALE, after, keyring.newest, batch):
        ids, stale, fresh = [], [], []
        for row in rows:
            try:
                opened = unseal(keyring, row["endpoint_id"], row["purpose"], row["value"])
            except CannotOpen as problem:
                progress.unreadable[row["endpoint_id"]] = str(problem)
                continue
            ids.append(row["id"])
            stale.append(row["value"])
            fresh.append(seal(keyring, row["endpoint_id"], row["purpose"], opened))
        written = await connection.execute(RESEAL, ids, stale, fresh)
        progress.done += int(written.rpartition(" ")[2])
        progress.looked_at += len(rows)
        after = rows[-1]["id"]
        yield progress


@dataclass(frozen=True, slots=True)
class Opened:
    """The secrets of an endpoint, or why they cannot be had."""

    signing: tuple[Secret, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    problem: str | None = None


def opened(keyring: Keyring, row: asyncpg.Record) -> Opened:
    """Open what a row of endpoints brought: its ``id``, ``secrets`` and ``headers``."""
    try:
        return Opened(
            tuple(Secret(unseal(keyring, row["id"], SIGNING, stored)) for stored in row["secrets"]),
            _headers(unseal(keyring, row["id"], HEADERS, row["headers"])) if row["headers"] else {},
        )
    except CannotOpen as problem:
        return Opened(problem=str(problem))


def _headers(text: str) -> Mapping[str, str]:
    try:
        headers = json.loads(text)
    except ValueError:
        headers = None
    if not isinstance(headers, dict):
        raise CannotOpen("its headers are no JSON object")
    return headers
