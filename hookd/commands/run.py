"""``hookd run``."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import os
import resource
import sys
import time
from typing import TYPE_CHECKING

import asyncpg
import click
import structlog
import uvloop

from hookd import __version__
from hookd.admin.server import AdminServer
from hookd.commands.session import Failed, bring_up_to_date, database_of, options
from hookd.config import ConfigInvalid, load
from hookd.daemon import Daemon
from hookd.failpoints import FailpointUnknown, arm
from hookd.keyfile import KeyFileProblem
from hookd.logs import Outage, Outlet, configure
from hookd.net.exchange import check_parts
from hookd.postgres.connect import DatabaseRefused, DatabaseUnavailable, unavailable
from hookd.postgres.pooler import SHARED, check_sessions
from hookd.systemd import feed_watchdog, notify

if TYPE_CHECKING:
    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.postgres.connect import Database

log = structlog.get_logger("hookd")

START_RETRY_S = 2.0

START_EXTENDED_US = 60_000_000

DESCRIPTORS_LEAST = 1024

DESCRIPTORS_KEPT = 64
"""Not for receivers: PostgreSQL, name servers, the console and the probes must not starve for them."""

PR_SET_DUMPABLE = 4
"""Of ``prctl(2)``."""


@click.command()
@options
@click.pass_obj
def run(invocation: Invocation) -> None:
    """
    The daemon: deliver until told to stop.

    SIGTERM and SIGINT stop it: no new exchange starts, those in flight get delivery.drain, everything is written; a second
    signal stops at once.  SIGHUP reads the configuration again.
    """
    loaded = load(invocation.config_file)
    config = loaded.config
    outlet = Outlet(sys.stderr.fileno())
    configure(config.log, outlet)
    atexit.register(outlet.drain)
    try:
        arm(os.environ.get("HOOKD_FAILPOINT", ""))
    except FailpointUnknown as problem:
        raise Failed(str(problem), 2) from None
    problems = check_parts()
    if problems:
        raise Failed("; ".join(problems))
    descriptors = _raise_descriptors(config)
    if not config.security.core_dumps:
        keep_memory_private()
    with database_of(config) as database:
        if config.database.dsn == "embedded":
            log.warning(
                "embedded PostgreSQL is for trying out, not for production", server=database.described
            )
        status = uvloop.run(_serve(invocation, config, database, descriptors, outlet))
    sys.exit(status)


async def _serve(
    invocation: Invocation, config: Config, database: Database, descriptors: int | None, outlet: Outlet
) -> int:
    def reload() -> Config | None:
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        # it is applied before the event loop goes on
        asyncio.get_running_loop().call_soon(notify, "READY=1")
        try:
            fresh = load(invocation.config_file).config
        except ConfigInvalid as error:
            log.exception(
                "configuration not applied: it is wrong, the old one stays",
                mistakes=[str(m) for m in error.mistakes],
            )
            return None
        configure(fresh.log, outlet)
        return fresh

    try:
        most = None if descriptors is None else max(1, descriptors - DESCRIPTORS_KEPT)
        daemon = Daemon(config, database, reload, most)
    except KeyFileProblem as problem:
        raise Failed(f"security.master_key_file: {problem}", 2) from None
    if not daemon.keyring.keys:
        log.warning("endpoint secrets are stored as plain text: security.master_key_file is not set")
    async with contextlib.AsyncExitStack() as stack:
        admin = AdminServer(daemon, database)
        listening = await admin.start()
        stack.push_async_callback(admin.stop)
        ready = asyncio.create_task(_say_ready(daemon, listening))
        stack.callback(ready.cancel)
        dog = asyncio.create_task(feed_watchdog())
        stack.callback(dog.cancel)
        return await daemon.run(lambda: _prepare(database, config))


async def _prepare(database: Database, config: Config) -> None:
    """Reach the database and bring its schema up to date; waits for a server that is away."""
    outage = Outage(time.monotonic)
    while (problem := await _prepared(database, config)) is not None:
        again = outage.began(problem)
        if again is not None:
            log.error("database cannot be reached; trying again until it can", problem=problem)
        # it is not hung: systemd must not start it again for this
        notify(f"EXTEND_TIMEOUT_USEC={START_EXTENDED_US}\nSTATUS=waiting for the database: {problem}")
        await asyncio.sleep(START_RETRY_S)


async def _prepared(database: Database, config: Config) -> str | None:
    """None if the database is ready for us, else what keeps it from that for now."""
    try:
        await check_sessions(lambda: database.connect("start"))
        connection = await database.connect("start", lasting=True)
        try:
            applied = await bring_up_to_date(connection, config)
        finally:
            connection.terminate()
    except DatabaseUnavailable as error:
        return str(error)
    except DatabaseRefused as error:
        raise Failed(str(error), 2 if str(error) == SHARED else 1) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        passing = unavailable(error)
        if passing is None:
            raise Failed(f"the database cannot be used: {error}") from None
        return str(passing)
    if applied:
        log.info("schema migrated", applied=applied)
    return None


async def _say_ready(daemon: Daemon, listening: str | None) -> None:
    await daemon.ready.wait()
    shards = len(daemon.tenure.owner.shards) if daemon.tenure is not None else 0
    log.info("ready", version=__version__, shards=shards, admin=listening or "off", pid=os.getpid())
    notify("READY=1")


def keep_memory_private() -> None:
    """
    Leave no core dump, and let no process of the same user look into this one.

    The limit alone does not hold where dumps are piped into a program (``core(5)``); the flag alone is known to Linux only.
    It also takes ``/proc/PID/environ`` and ``mem`` from everybody but root.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def _raise_descriptors(config: Config) -> int | None:
    """Use all descriptors that the system allows: one a connection, idle ones too.  Returns how many; None: no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * config.delivery.max_in_flight + DESCRIPTORS_LEAST
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            soft = limit
    if soft == resource.RLIM_INFINITY:
        return None
    if soft < config.delivery.max_in_flight + DESCRIPTORS_KEPT:
        log.warning(
            "fewer file descriptors than delivery.max_in_flight needs: fewer exchanges are made at once",
            descriptors=soft,
            needed=config.delivery.max_in_flight + DESCRIPTORS_KEPT,
        )
    return soft
