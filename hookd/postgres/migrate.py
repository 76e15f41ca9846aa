"""
Brings the schema of a database up to date.

The migrations are numbered SQL files, forward only, each applied in one transaction under an advisory lock and
recorded with its checksum.  A file that has been released is never edited: a recorded checksum that differs is
refused.  A database that is newer than this hookd is refused too, because an older daemon would not know what the
newer rows mean.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncpg

MIGRATION_LOCK = (1752133483, -1)
"""Advisory lock of whoever migrates; the first number is ``'hook'`` read as ASCII, as for the shards."""

CREATE_RECORD = """
create schema if not exists hookd;
create table if not exists hookd.migration (
  version integer primary key,
  name text not null,
  checksum text not null,
  applied_at timestamptz not null default now()
);
comment on table hookd.migration is 'The migrations that this schema has';
"""

RECORDED = "select version, name, checksum from hookd.migration order by version"

RECORD = "insert into hookd.migration (version, name, checksum) values ($1, $2, $3)"


class SchemaMismatch(Exception):
    """The schema does not fit this hookd; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered SQL file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, in hex."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations() -> list[Migration]:
    """All migrations that this hookd has, in order."""
    folder = resources.files("hookd.postgres") / "migrations"
    files = sorted(f.name for f in folder.iterdir() if f.name.endswith(".sql"))
    return [
        Migration(int(name[:4]), name[5:-4], (folder / name).read_text(encoding="utf-8")) for name in files
    ]


async def pending(connection: asyncpg.Connection) -> list[Migration]:
    """
    The migrations that this database lacks.

    Raises:
        SchemaMismatch: the database is newer than this hookd, or a migration differs from the one applied.
    """
    if not await connection.fetchval("select to_regclass('hookd.migration') is not null"):
        return migrations()
    known = {m.version: m for m in migrations()}
    recorded = await connection.fetch(RECORDED)
    for row in recorded:
        ours = known.get(row["version"])
        if ours is None:
            raise SchemaMismatch(
                f"the database has migration {row['version']} ({row['name']}), which is newer than this hookd "
                f"(its last is {max(known)}); upgrade hookd on this machine"
            )
        if ours.checksum != row["checksum"]:
            raise SchemaMismatch(
                f"migration {row['version']} ({row['name']}) in the database differs from the one in this hookd; "
                "it was applied by another build, and cannot be changed afterwards"
            )
    applied = {row["version"] for row in recorded}
    return [m for m in known.values() if m.version not in applied]


async def migrate(
    connection: asyncpg.Connection, begins: Callable[[Migration, int], None] = lambda _migration, _left: None
) -> list[Migration]:
    """
    Apply what is pending, each migration in its own transaction; returns what was applied.

    ``begins`` is told of each as it begins, and how many are left with it.  Several daemons may call it at once: the advisory lock lets one work, and the others find nothing left.

    Raises:
        SchemaMismatch: see ``pending``.
    """
    if not await pending(connection):
        return []
    await connection.execute("select pg_advisory_lock($1, $2)", *MIGRATION_LOCK)
    try:
        await connection.execute(CREATE_RECORD)
        applied = await pending(connection)
        for n, migration in enumerate(applied):
            begins(migration, len(applied) - n)
            async with connection.transaction():
                await connection.execute(RECORD, migration.version, migration.name, migration.checksum)
                await connection.execute(migration.sql)
        return applied
    finally:
        await connection.execute("select pg_advisory_unlock($1, $2)", *MIGRATION_LOCK)
