"""
The daemon: the composition root.  It builds the parts, starts them in order, and stops them in order.

A *tenure* is the time for which one session to PostgreSQL owns shards.  The dispatcher and the recorder live as long as
the process; the feed, and all that it remembers, lives as long as a tenure.  When any of the tenure's connections is
lost the whole tenure ends, and the next one begins by locking again, settling what is still unwritten, and recovering.

Stopping goes with the stream: the feed reads no more, the dispatcher starts no more, exchanges in flight get their
grace, the recorder writes what came of them, the locks are given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson
import structlog

from hookd import __version__
from hookd.clock import SystemClock, SystemDice
from hookd.core.composer import Composer, Wire
from hookd.core.lanes import Lanes
from hookd.core.model import BodyFormat, VerdictKind
from hookd.dispatcher import Dispatcher
from hookd.feed import Feed
from hookd.net.exchange import HttpExchange, check_parts
from hookd.postgres.connect import Database, DatabaseRefused, DatabaseUnavailable
from hookd.postgres.maintenance import Maintenance
from hookd.postgres.migrate import SchemaMismatch, migrate, pending
from hookd.postgres.owner import BadBatch, OwnerSession
from hookd.postgres.queue import Queue
from hookd.recorder import Recorder
from hookd.upkeep import Retention, keep_up, publish

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookd.config import Config
    from hookd.core.model import Result

log = structlog.get_logger("hookd")

LOCK_EVERY_S = 0.2
"""How often free shards are looked for, and the session is asked for a sign of life."""

RECONNECT_FIRST_S = 0.1
RECONNECT_MOST_S = 5.0

READ_AHEAD = 4
"""Deliveries in memory for each that may be in flight."""

GC_THRESHOLDS = (50_000, 20, 50)
"""With 500 exchanges in flight the default thresholds cost a third of all CPU; everything that lives long is frozen."""


class StartFailed(Exception):
    """The daemon cannot start; the message says what to do."""


@dataclass(slots=True)
class Tenure:
    """The parts that live as long as one session."""

    owner: OwnerSession
    feed: Feed
    maintenance: Maintenance


class Daemon:
    """All parts of one process."""

    def __init__(self, config: Config, database: Database) -> None:
        self.config = config
        self._database = database
        self._clock = SystemClock()
        self._dice = SystemDice()
        self.node = f"{socket.gethostname()}-{os.getpid()}"
        self.started_at = self._clock.wall()
        self.tenure: Tenure | None = None
        self.ready = asyncio.Event()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._database_lost = False
        self.lanes = Lanes(
            config.default_limits(), config.host_limits(), max_in_flight=config.delivery.max_in_flight
        )
        self.exchange = HttpExchange.configured(config, wall=self._clock.wall, mono=self._clock.mono)
        self.recorder = Recorder(self._clock, refused=BadBatch, report=self._unstorable)
        self.dispatcher = Dispatcher(
            self.lanes,
            self.exchange,
            self.recorder,
            lambda endpoint: Composer(endpoint, self._wire()),
            config.retry_policy(),
            self._clock,
            self._dice,
            max_in_flight=config.delivery.max_in_flight,
            vouched=self._vouched,
            room=self._room,
            report=self._attempted,
        )

    # Life.

    async def run(self) -> int:
        """Deliver until told to stop; returns the exit status."""
        self._handle_signals()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        tenures = asyncio.create_task(self._tenures())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({tenures, stop}, return_when=asyncio.FIRST_COMPLETED)
            if tenures.done():
                tenures.result()
            return await self._wind_down()
        finally:
            for task in (tenures, stop):
                task.cancel()
            await asyncio.gather(tenures, stop, return_exceptions=True)
            await self.exchange.close()

    def stop(self) -> None:
        """Drain and stop; a second call stops at once."""
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stop.is_set():
            log.warning("stopping at once", signal=name, in_flight=len(self.dispatcher.in_flight()))
        else:
            log.info(
                "draining",
                signal=name,
                in_flight=len(self.dispatcher.in_flight()),
                grace_s=self.config.delivery.drain,
            )
        self.stop()

    async def _wind_down(self) -> int:
        if self.tenure is not None:
            self.tenure.feed.stop()
        drain = asyncio.create_task(self.dispatcher.drain(self.config.delivery.drain))
        at_once = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait({drain, at_once}, return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()
        cut_off = await self.dispatcher.drain(0) if not drain.done() else drain.result()
        unwritten = await self._write_the_rest()
        log.info("stopped", cut_off=cut_off, unwritten=unwritten)
        return 0 if unwritten == 0 else 1

    async def _write_the_rest(self) -> int:
        """Wait for the recorder, for as long as the grace; returns how many results could not be written."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.delivery.drain):
                await self.recorder.empty()
        return len(self.recorder.unwritten())

    # Tenures.

    async def _tenures(self) -> None:
        delay = RECONNECT_FIRST_S
        while True:
            try:
                await self._tenure()
            except* DatabaseUnavailable as group:
                delay = RECONNECT_FIRST_S if self.ready.is_set() else min(RECONNECT_MOST_S, delay * 2)
                self.ready.clear()
                if not self._database_lost:
                    self._database_lost = True
                    log.error(
                        "database lost; trying again until it is back", problem=str(group.exceptions[0])
                    )
            self.dispatcher.forget_all()
            await asyncio.sleep(delay * (0.8 + 0.4 * self._dice.draw()))

    async def _tenure(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            owner = OwnerSession(await self._database.connect("owner"), self._clock)
            stack.push_async_callback(owner.close)
            queue = Queue(await self._database.connect("feed"))
            stack.push_async_callback(queue.close)
            maintenance = Maintenance(await self._database.connect("upkeep"))
            stack.push_async_callback(maintenance.close)
            await owner.acquire()
            await self.recorder.run(owner, None, until_empty=True)
            feed = Feed(
                queue,
                owner,
                self.dispatcher,
                self._clock,
                window=READ_AHEAD * self.config.delivery.max_in_flight,
                known=[d.id for d in self.dispatcher.in_flight()],
            )
            await queue.prepare(feed.notified)
            await maintenance.set(self._settings())
            self.tenure = Tenure(owner, feed, maintenance)
            if self._database_lost:
                self._database_lost = False
                log.info("database is back")
            feed.own(owner.shards)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(feed.run())
                    group.create_task(self.recorder.run(owner, feed))
                    group.create_task(self._keep_locks(owner, feed))
                    group.create_task(self._watch(owner.lost, queue.lost))
                    group.create_task(self._announce(feed))
                    group.create_task(keep_up(maintenance, self._retention, self._dice, self._partitioned))
                    group.create_task(
                        publish(maintenance, self.node, self.started_at, lambda: owner.backend, self._summary)
                    )
            finally:
                self.tenure = None

    async def _keep_locks(self, owner: OwnerSession, feed: Feed) -> None:
        while True:
            await asyncio.sleep(LOCK_EVERY_S * (0.9 + 0.2 * self._dice.draw()))
            if self._stop.is_set():
                await owner.probe()
                continue
            gained = await owner.acquire() if len(owner.shards) < self._database.shards else set()
            if gained:
                log.info("shards acquired", gained=len(gained), owned=len(owner.shards))
                feed.own(gained)
            await owner.probe()

    @staticmethod
    async def _watch(*lost: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in lost]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        raise DatabaseUnavailable("the connection was closed by the server")

    async def _announce(self, feed: Feed) -> None:
        await feed.recovered.wait()
        self.ready.set()

    # What the parts ask for.

    def _wire(self) -> Wire:
        delivery = self.config.delivery
        return Wire(
            user_agent=f"hookd/{__version__}",
            format=BodyFormat(delivery.format),
            timeout_s=delivery.timeout,
            connect_timeout_s=delivery.connect_timeout,
            https_only=self.config.network.https_only,
        )

    def _vouched(self) -> bool:
        return self.tenure is not None and self.tenure.owner.trusted(self._clock.mono())

    def _room(self) -> None:
        if self.tenure is not None:
            self.tenure.feed.room()

    def _retention(self) -> Retention:
        kept = self.config.retention
        return Retention(kept.attempts, kept.events, kept.dead_letters)

    def _settings(self) -> dict[str, str]:
        return {
            "retention.events": str(self.config.retention.events),
            "delivery.format": self.config.delivery.format,
        }

    def _summary(self) -> str:
        return orjson.dumps({}).decode()

    # What the parts report.

    def _attempted(self, result: Result) -> None:
        if result.verdict.kind is VerdictKind.DELIVERED:
            return

    def _unstorable(self, problem: str, result: Result) -> None:
        log.error(
            "not stored",
            problem=problem,
            delivery_id=result.delivery.id,
            event_id=str(result.delivery.event.id),
        )

    @staticmethod
    def _partitioned(what: str, name: str) -> None:
        log.info(f"partition {what}", partition=name)
