"""``hookd doctor``: look at everything that hookd depends on."""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import shutil
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from hookd.commands.session import Failed, database_of, options, print_json
from hookd.config import load
from hookd.core.words import span

if TYPE_CHECKING:
    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.core.database import DatabaseHealth
    from hookd.postgres.connect import Database

ROLES = ("hookd_producer", "hookd_daemon", "hookd_reader")

CLOCK_MOST_S = 2.0
"""Receivers tolerate 300 s; more than this between two machines is a clock that nobody sets."""

HELD_BACK_S = 900
HELD_BACK_TRANSACTIONS = 5_000_000
"""A snapshot older than this is warned about."""

LONG_TRANSACTION_S = 3600
DEAD_ROWS_MOST = 1_000_000
NOTIFY_MOST = 0.5
RETENTION_BEHIND_S = 3600

UP_TO_DATE = "up to date"

SERVER = """
select current_setting('server_version') as version, current_user as role, pg_is_in_recovery() as standby,
       extract(epoch from clock_timestamp())::double precision as now, current_setting('max_connections')::integer as most,
       (select count(*) from pg_stat_activity where datname is not null)::integer as used,
       current_setting('synchronous_commit') as synchronous_commit
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    what: str
    level: str
    """``ok``, ``warn`` or ``fail``."""
    said: str


@click.command()
@options
@click.pass_obj
def doctor(invocation: Invocation) -> None:
    """Look at libraries, configuration, database, schema, roles, DNS, file descriptors and clock; exit status 0 or 1."""
    loaded = load(invocation.config_file)
    config = loaded.config
    findings = [Finding("configuration", "ok", loaded.file or "no file, so all defaults"), *_here(config)]
    try:
        with database_of(config) as database:
            findings += asyncio.run(_database(database, config))
    except Failed as error:
        findings.append(Finding("database", "fail", str(error)))
    findings += asyncio.run(_names(config))
    if invocation.json:
        print_json(findings)
    else:
        width = max(len(f.what) for f in findings)
        for finding in findings:
            click.echo(f"{finding.level:4}  {finding.what.ljust(width)}  {finding.said}")
    if any(f.level == "fail" for f in findings):
        raise click.exceptions.Exit(1)


def _here(config: Config) -> list[Finding]:
    from hookd.net.exchange import check_parts  # noqa: PLC0415

    findings = [Finding("libraries", "fail", problem) for problem in check_parts()]
    if not findings:
        findings.append(
            Finding("libraries", "ok", "versions above the security floors, aiohttp's C parser is there")
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.delivery.max_in_flight + 64
    enough = hard == resource.RLIM_INFINITY or hard >= needed
    findings.append(
        Finding(
            "file descriptors",
            "ok" if enough else "fail",
            f"{soft}, may be raised to {hard}; {needed} are needed",
        )
    )
    if config.network.allow:
        findings.append(
            Finding("network.allow", "warn", f"{', '.join(config.network.allow)}: may be called, private or not; remove it in production")
        )  # fmt: skip
    if config.network.allow_names:
        findings.append(
            Finding("network.allow_names", "ok", f"{', '.join(config.network.allow_names)}: may be called by name; their addresses need network.allow where they are private")
        )  # fmt: skip
    if config.security.core_dumps:
        findings.append(
            Finding("security.core_dumps", "warn", "on: a core dump of the daemon has secrets in it, and its user's debuggers see them")
        )  # fmt: skip
    if not config.network.https_only:
        findings.append(Finding("network.https_only", "warn", "http:// endpoints may be registered"))
    return findings


async def _database(database: Database, config: Config) -> list[Finding]:
    from hookd.postgres.connect import DatabaseRefused, DatabaseUnavailable  # noqa: PLC0415 - not for --help
    from hookd.postgres.pooler import check_sessions  # noqa: PLC0415

    begun = time.perf_counter()
    try:
        await check_sessions(lambda: database.connect("doctor"))
        connection = await database.connect("doctor")
    except (DatabaseRefused, DatabaseUnavailable) as error:
        return [Finding("database", "fail", str(error))]
    took = (time.perf_counter() - begun) * 1000
    try:
        schema = await _schema(connection)
        findings = [*await _server(connection, database, config, took), *schema]
        if Finding("schema", "ok", UP_TO_DATE) in schema:
            findings += await _secrets(connection, config)
            findings += await _health(connection, config)
        return findings
    finally:
        connection.terminate()


async def _health(connection: asyncpg.Connection, config: Config) -> list[Finding]:
    """Vacuum, transactions, the NOTIFY queue, days and retention."""
    import asyncpg as driver  # noqa: PLC0415 - not for --help

    from hookd.postgres.health import examine  # noqa: PLC0415

    kept = config.retention
    try:
        found = await examine(
            connection.fetch, events_s=kept.events, attempts_s=kept.attempts, dead_letters_s=kept.dead_letters
        )
    except driver.InsufficientPrivilegeError as error:
        return [Finding("health", "warn", f"{error.args[0]}; run doctor as the daemon's role")]
    return health_findings(found)


def health_findings(found: DatabaseHealth) -> list[Finding]:
    """What there is to say about PostgreSQL's health."""
    findings = []
    bad = [
        h for h in found.holders if (h.seconds or 0) > HELD_BACK_S or h.transactions > HELD_BACK_TRANSACTIONS
    ]
    findings += [
        Finding(
            "vacuum",
            "warn",
            f"held back for {h.transactions:,} transactions"
            + (f" and {span(h.seconds)}" if h.seconds is not None else "")
            + f" by {h.who}",
        )
        for h in bad
    ]
    if not bad:
        findings.append(Finding("vacuum", "ok", "nothing holds it back for long"))
    if not found.visible:
        findings.append(
            Finding("sessions", "warn", "this role sees only its own: who holds vacuum back may be another; grant pg_read_all_stats to it")
        )  # fmt: skip
    findings.append(
        Finding(
            "transactions",
            "ok" if found.longest_transaction_s < LONG_TRANSACTION_S else "warn",
            f"the longest open one: {span(found.longest_transaction_s)}"
            + (f", {found.longest_who}" if found.longest_transaction_s >= LONG_TRANSACTION_S else ""),
        )
    )
    vacuumed = "never vacuumed" if found.vacuumed_s is None else f"vacuumed {span(found.vacuumed_s)} ago"
    findings.append(
        Finding(
            "queue",
            "ok" if found.dead_rows < DEAD_ROWS_MOST else "warn",
            f"{found.live_rows:,} rows and {found.dead_rows:,} dead ones in {found.queue_bytes / 2**20:,.1f} MiB, {vacuumed}",
        )
    )
    findings.append(
        Finding(
            "notifications",
            "ok" if found.notify_usage < NOTIFY_MOST else "fail",
            f"the queue is {found.notify_usage:.0%} full"
            + ("; when it is full every commit that notifies fails (those that insert events do not): end the session that listens in an open transaction" if found.notify_usage >= NOTIFY_MOST else ""),
        )
    )  # fmt: skip
    few = [f"{table} {days}" for table, days in sorted(found.ahead.items()) if days < 1]
    findings.append(
        Finding("days", "warn", f"made ahead too few: {', '.join(few)}; does a daemon run?")
        if few
        else Finding("days", "ok", f"{min(found.ahead.values())} made ahead")
    )
    behind = [
        f"{table} by {span(s)}" for table, s in sorted(found.behind_s.items()) if s > RETENTION_BEHIND_S
    ]
    findings.append(
        Finding(
            "retention", "warn", f"behind: {', '.join(behind)}; does a daemon run, or a reader hold a day?"
        )
        if behind
        else Finding("retention", "ok", "nothing is kept longer than configured")
    )
    return findings


async def _server(
    connection: asyncpg.Connection, database: Database, config: Config, took_ms: float
) -> list[Finding]:
    asked = time.time()
    row = await connection.fetchrow(SERVER)
    assert row is not None
    answered = time.time()
    findings = [
        Finding("database", "ok", f"PostgreSQL {row['version']} as {row['role']}, {database.described}, connected in {took_ms:.0f} ms")
    ]  # fmt: skip
    if config.database.dsn == "embedded":
        findings.append(Finding("database", "warn", "embedded: for trying out, not for production"))
    if row["standby"]:
        findings.append(
            Finding("database", "fail", "this is a read-only standby; name the primary in database.dsn")
        )
    left = row["most"] - row["used"]
    findings.append(
        Finding(
            "connections",
            "ok" if left >= 6 else "warn",
            f"{row['used']} of {row['most']} in use; hookd takes up to 6",
        )
    )
    off = row["now"] - (asked + answered) / 2
    findings.append(
        Finding(
            "clock",
            "ok" if abs(off) < CLOCK_MOST_S else "warn",
            f"the database's is {off:+.3f} s off this machine's",
        )
    )
    if row["synchronous_commit"] == "off":
        findings.append(
            Finding(
                "durability",
                "warn",
                "synchronous_commit is off: a crash of the server may lose the last events",
            )
        )
    return findings


async def _schema(connection: asyncpg.Connection) -> list[Finding]:
    from hookd.postgres.migrate import SchemaMismatch, pending  # noqa: PLC0415 - not for --help

    try:
        missing = await pending(connection)
    except SchemaMismatch as error:
        return [Finding("schema", "fail", str(error))]
    if missing:
        return [
            Finding(
                "schema",
                "warn",
                f"{len(missing)} migrations are pending; hookd migrate (or run) applies them",
            )
        ]
    findings = [Finding("schema", "ok", UP_TO_DATE)]
    missing_roles = [
        r for r in ROLES if not await connection.fetchval("select to_regrole($1) is not null", r)
    ]
    if missing_roles:
        findings.append(
            Finding("roles", "warn", f"there is no {', '.join(missing_roles)}; a role that may create roles makes them with hookd migrate")
        )  # fmt: skip
    else:
        findings.append(Finding("roles", "ok", ", ".join(ROLES)))
    alive = await connection.fetchval(
        "select count(*) from hookd.node where seen_at > clock_timestamp() - interval '15 seconds'"
    )
    findings.append(Finding("daemons", "ok" if alive else "warn", f"{alive} running"))
    return findings


async def _secrets(connection: asyncpg.Connection, config: Config) -> list[Finding]:
    import asyncpg as driver  # noqa: PLC0415 - not for --help

    from hookd.keyfile import KeyFileProblem, read_keyring  # noqa: PLC0415
    from hookd.postgres.vault import census  # noqa: PLC0415

    try:
        keyring = read_keyring(config.security.master_key_file)
    except KeyFileProblem as problem:
        return [Finding("secrets", "fail", f"security.master_key_file: {problem}")]
    try:
        counted = await census(connection)
    except driver.InsufficientPrivilegeError:
        return [Finding("secrets", "warn", "this role may not look at them; run doctor as the daemon's")]
    lost = {key: n for key, n in counted.by_key.items() if key not in {k.id for k in keyring.keys}}
    if lost:
        said = ", ".join(f"{n} under key {key}" for key, n in lost.items())
        where = (
            "which security.master_key_file lacks"
            if keyring.keys
            else "and security.master_key_file is not set"
        )
        return [Finding("secrets", "fail", f"{said}, {where}: those endpoints' deliveries wait")]
    if not keyring.keys:
        return [
            Finding("secrets", "warn", f"{counted.plain} are stored as plain text; `hookd secrets new-key FILE` makes a key for security.master_key_file")
        ]  # fmt: skip
    stale = counted.total - counted.by_key.get(keyring.newest or "", 0)
    if stale:
        return [
            Finding(
                "secrets", "warn", f"{stale} are plain text or under an older key; run hookd secrets rotate"
            )
        ]
    return [Finding("secrets", "ok", f"all {counted.total} are encrypted under key {keyring.newest}")]


async def _names(config: Config) -> list[Finding]:
    from hookd.net.resolver import own_addresses  # noqa: PLC0415 - not for --help

    findings = [
        Finding("own addresses", "ok", ", ".join(map(str, sorted(own_addresses(), key=str))) or "none found")
    ]
    try:
        begun = time.perf_counter()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(5):
            await loop.getaddrinfo("example.com", 443, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError):
        findings.append(
            Finding("DNS", "warn", "example.com does not resolve: only endpoints by address will work")
        )
    else:
        findings.append(
            Finding("DNS", "ok", f"example.com resolved in {(time.perf_counter() - begun) * 1000:.0f} ms")
        )
    findings += await _nat64(config)
    free = shutil.disk_usage(".").free
    if config.database.dsn == "embedded" and free < 2**30:
        findings.append(Finding("disk", "warn", f"{free // 2**20} MiB are free"))
    return findings


async def _nat64(config: Config) -> list[Finding]:
    """Whether this network makes IPv6 addresses of IPv4 ones, and whether the guard knows."""
    from hookd.core.addresses import nat64_prefix  # noqa: PLC0415 - not for --help

    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(5):
            found = await loop.getaddrinfo(
                "ipv4only.arpa", 443, family=socket.AF_INET6, type=socket.SOCK_STREAM
            )
    except (OSError, TimeoutError):
        return []  # no such answer where there is no NAT64
    prefixes = {nat64_prefix(ipaddress.IPv6Address(str(entry[4][0]))) for entry in found} - {None}
    known = {ipaddress.IPv6Network(text) for text in config.network.nat64_prefixes}
    return [
        Finding("NAT64", "ok", f"{prefix} is judged by the IPv4 address inside")
        if prefix in known
        else Finding(
            "NAT64",
            "warn",
            f'this network reaches IPv4 through {prefix}: set network.nat64_prefixes = ["{prefix}"]',
        )
        for prefix in sorted(prefixes, key=str)
    ]
