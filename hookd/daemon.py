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
import signal
import socket
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
import structlog

from hookd import __version__
from hookd.clock import SystemClock, SystemDice
from hookd.config import address_rules
from hookd.core.bodies import ThinLink
from hookd.core.composer import Composer, Wire
from hookd.core.lanes import Lanes
from hookd.core.model import BodyFormat, VerdictKind
from hookd.core.shares import Plan, plan
from hookd.dispatcher import Dispatcher
from hookd.feed import Feed
from hookd.keyfile import KeyFileProblem, read_keyring
from hookd.logs import Throttle
from hookd.net.exchange import ExchangeOptions, HttpExchange, tls_context
from hookd.net.resolver import Resolver, own_addresses
from hookd.net.tunnel import ByProxy
from hookd.postgres.connect import Database, DatabaseRefused, DatabaseUnavailable
from hookd.postgres.maintenance import Maintenance
from hookd.postgres.owner import BadBatch, OwnerSession
from hookd.postgres.queue import Queue
from hookd.recorder import Recorder
from hookd.upkeep import Retention, keep_up, measure, publish
from hookd.verification import ask

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from hookd.clock import Clock, Dice
    from hookd.config import Config
    from hookd.core.addresses import AddressRules
    from hookd.core.challenge import Verification
    from hookd.core.model import Delivery, Endpoint, Result

log = structlog.get_logger("hookd")

LOOK_S = 0.15
"""How often the locks are looked at while there are other daemons: so soon a dead one's shards are found free."""

LOOK_ALONE_S = 0.5
"""The same for a daemon without others: so soon a new one is noticed."""

OWN_ADDRESSES_EVERY_S = 60.0

RECONNECT_FIRST_S = 0.1
RECONNECT_MOST_S = 5.0

READ_AHEAD = 4
"""Deliveries in memory for each that may be in flight."""

LANES_SHOWN = 100
"""In the summary that ``status`` and ``explain`` read: the lanes in trouble, and those with most waiting."""

UNREADABLE_SHOWN = 100
"""In the same summary: endpoints whose secrets cannot be read."""

IDS_SHOWN = 500
"""Of deliveries in flight, for ``explain``; with more of them it concludes from the lane."""

GC_THRESHOLDS = (50_000, 20, 50)
"""With 500 exchanges in flight the default thresholds cost a third of all CPU; everything that lives long is frozen."""


SAY_AGAIN_S = 60.0
"""How often a fault that goes on is logged."""


@dataclass(slots=True)
class Tenure:
    """The parts that live as long as one session."""

    owner: OwnerSession
    queue: Queue
    feed: Feed
    maintenance: Maintenance


class Daemon:
    """All parts of one process."""

    def __init__(
        self,
        config: Config,
        database: Database,
        reload: Callable[[], Config | None],
        clock: Clock | None = None,
        dice: Dice | None = None,
    ) -> None:
        """
        ``reload`` reads the configuration again; None when it is bad, which it has said already.  Without ``clock`` and
        ``dice`` they are the system's.

        Raises:
            KeyFileProblem: security.master_key_file cannot be used.
        """
        self.config = config
        self.keyring = read_keyring(config.security.master_key_file)
        self._database = database
        self._reload = reload
        self._clock = clock or SystemClock()
        self._dice = dice or SystemDice()
        self._throttle = Throttle(self._clock.mono)
        self.node = f"{socket.gethostname()}-{uuid4().hex[:8]}"
        self.started_at = self._clock.wall()
        self.tenure: Tenure | None = None
        self.ready = asyncio.Event()
        self.reload_ok = True
        self.depth: dict[str, float] = {}
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._over = False
        self._database_lost = False
        self._thin_key = b""
        self._said_mono: dict[str, float] = {}
        """When a fault of ours was last spoken of; the faults are few."""
        self._unreadable_said: set[str] = set()
        self._telling: asyncio.Task[None] | None = None
        self.rules = self._address_rules()
        self.lanes = Lanes(
            config.default_limits(), config.host_limits(), max_in_flight=config.delivery.max_in_flight
        )
        self.resolver, self.exchange = self._network()
        self.recorder = Recorder(self._clock, refused=BadBatch, report=self._unstorable)
        self.dispatcher = Dispatcher(
            self.lanes,
            self.exchange,
            self.recorder,
            lambda endpoint: Composer(endpoint, self.wire()),
            config.retry_policy(),
            self._clock,
            self._dice,
            max_in_flight=config.delivery.max_in_flight,
            vouched=self._vouched,
            room=self._room,
            report=self._reported,
            fault=self._faulty,
            ours=self._held_back,
            dropped=self._dropped,
        )

    def _network(self) -> tuple[Resolver | ByProxy, HttpExchange]:
        config = self.config
        resolver = (
            ByProxy()
            if config.network.proxy_resolves
            else Resolver(lambda: self.rules, nameservers=config.network.nameservers, mono=self._clock.mono)
        )
        exchange = HttpExchange(
            resolver,
            lambda: self.rules,
            self._options(),
            wall=self._clock.wall,
            mono=self._clock.mono,
            context=tls_context(config.network.ca_file),
            proxy=config.egress_proxy(),
        )
        return resolver, exchange

    # Life.

    async def run(self) -> int:
        """Deliver until told to stop; returns the exit status."""
        self._take_process()
        tenures = asyncio.create_task(self._tenures())
        stop = asyncio.create_task(self._stop.wait())
        rules = asyncio.create_task(self._keep_rules())
        try:
            await asyncio.wait({tenures, stop}, return_when=asyncio.FIRST_COMPLETED)
            if tenures.done():
                tenures.result()
            return await self._wind_down()
        finally:
            self._over = True
            for task in (tenures, stop, rules):
                task.cancel()
            await asyncio.gather(tenures, stop, rules, return_exceptions=True)
            await self.exchange.close()

    def stop(self) -> None:
        """Drain and stop; a second call stops at once."""
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    def _take_process(self) -> None:
        """What there is one of in a process: its signals and its garbage collector."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGHUP, self.apply)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)

    def _signalled(self, number: int) -> None:
        name = signal.Signals(number).name
        in_flight = len(self.dispatcher.in_flight())
        if self._stop.is_set():
            log.warning("stopping at once", signal=name, in_flight=in_flight)
        else:
            log.info("draining", signal=name, in_flight=in_flight, grace_s=self.config.delivery.drain)
        self.stop()

    async def _wind_down(self) -> int:
        if self.tenure is not None:
            self.tenure.feed.stop()
        drain = asyncio.create_task(self.dispatcher.drain(self.config.delivery.drain))
        at_once = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait({drain, at_once}, return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()
        if not drain.done():
            drain.cancel()
        cut_off = drain.result() if drain.done() else await self.dispatcher.drain(0)
        unwritten = await self._write_the_rest()
        log.info("stopped", cut_off=cut_off, unwritten=unwritten)
        return 0 if unwritten == 0 else 1

    async def _write_the_rest(self) -> int:
        """Wait for the recorder, for as long as the grace; returns how many results could not be written."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.delivery.drain):
                await self.recorder.empty()
        if self.tenure is not None:
            with contextlib.suppress(DatabaseUnavailable):
                await self.tenure.maintenance.withdraw(self.node)
        return len(self.recorder.unwritten())

    # Tenures.

    async def _tenures(self) -> None:
        delay = RECONNECT_FIRST_S
        while True:
            try:
                await self._tenure()
            except* (DatabaseUnavailable, DatabaseRefused) as group:
                delay = RECONNECT_FIRST_S if self.ready.is_set() else min(RECONNECT_MOST_S, delay * 2)
                self.ready.clear()
                if not self._database_lost:
                    self._database_lost = True
                    log.error("database lost; trying again until it is back", problem=_first(group))
            except* Exception as group:
                delay = RECONNECT_MOST_S
                self.ready.clear()
                log.error("internal error; the session starts over", exc_info=group)
            self.dispatcher.forget_all()
            if self._over:
                return  # a task group that fails in the moment in which it is cancelled raises the failure alone
            await asyncio.sleep(delay * (0.8 + 0.4 * self._dice.draw()))

    async def _tenure(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            owner = OwnerSession(await self._database.connect("owner"), self._clock)
            stack.push_async_callback(owner.close)
            await owner.prepare()
            queue = Queue(await self._database.connect("feed"), lambda: self.keyring)
            stack.push_async_callback(queue.close)
            maintenance = Maintenance(await self._database.connect("upkeep"))
            stack.push_async_callback(maintenance.close)
            await owner.join()
            await owner.acquire(plan(await owner.look(), (), (), tuple).take)
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
            self._thin_key = await maintenance.thin_key()
            self.tenure = Tenure(owner, queue, feed, maintenance)
            if self._database_lost:
                self._database_lost = False
                log.info("database is back", shards=len(owner.shards))
            feed.own(owner.shards)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(feed.run())
                    group.create_task(self.recorder.run(owner, feed))
                    group.create_task(self._keep_share(owner, feed))
                    group.create_task(self._vouch(owner))
                    group.create_task(self._watch(owner.lost, queue.lost))
                    group.create_task(self._announce(owner, feed))
                    group.create_task(keep_up(maintenance, self._retention, self._dice, self._partitioned))
                    group.create_task(measure(maintenance, self._measured))
                    group.create_task(
                        publish(maintenance, self.node, self.started_at, lambda: owner.backend, self._summary)
                    )
            finally:
                self.tenure = None

    async def _keep_share(self, owner: OwnerSession, feed: Feed) -> None:
        """Divide the shards with the other daemons: leave what is too much, take what is missing."""
        leaving: set[int] = set()
        alone = resigned = False
        while True:
            pause = LOOK_ALONE_S if alone and not leaving else LOOK_S
            await asyncio.sleep(pause * (0.9 + 0.2 * self._dice.draw()))
            if self._stop.is_set():
                if not resigned:
                    resigned = True
                    await owner.resign()
                todo = Plan(leave=tuple(owner.shards - leaving))
            else:
                view = await owner.look()
                alone = len(view.members) == 1
                todo = plan(view, owner.shards, leaving, lambda: self._idlest(owner.shards))
            if todo.leave:
                feed.leave(todo.leave)
                leaving.update(todo.leave)
            if todo.stay:
                leaving.difference_update(todo.stay)
                feed.own(todo.stay)
            idle = {s for s in leaving if feed.has_left(s)}
            if idle:
                idle -= self.dispatcher.busy_shards().keys()
            if idle:
                leaving -= idle
                await owner.release(idle)
                log.info("shards handed over", count=len(idle), owned=len(owner.shards))
            if todo.take:
                gained = await owner.acquire(todo.take)
                if gained:
                    log.info("shards acquired", gained=len(gained), owned=len(owner.shards))
                    feed.own(gained)

    def _idlest(self, shards: set[int]) -> list[int]:
        busy = self.dispatcher.busy_shards()
        return sorted(shards, key=lambda shard: (busy[shard], shard))

    async def _vouch(self, owner: OwnerSession) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await owner.probe()
            self._say_unreadable()
            held_back = self._throttle.taken()
            if held_back:
                log.info("more failed attempts, not listed", count=held_back)

    @staticmethod
    async def _watch(*lost: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in lost]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        raise DatabaseUnavailable("the connection was closed by the server")

    async def _announce(self, owner: OwnerSession, feed: Feed) -> None:
        if not owner.shards:
            log.info("standing by: others own all shards")
        else:
            await feed.recovered.wait()
        self.ready.set()

    # Configuration.

    def apply(self) -> None:
        """Read the configuration again and apply what can be; a bad one changes nothing."""
        config = self._reload()
        self.reload_ok = config is not None
        if config is None:
            return
        try:
            keyring = read_keyring(config.security.master_key_file)
        except KeyFileProblem as problem:
            self.reload_ok = False
            log.error("configuration not applied: the old one stays", mistakes=[f"security.master_key_file: {problem}"])  # fmt: skip
            return
        self.config = config
        if keyring != self.keyring:
            self.keyring = keyring
            self._unreadable_said.clear()
            log.info("master keys changed", keys=[key.id for key in keyring.keys])
            if self.tenure is not None:
                self.tenure.feed.reread_endpoints()
        if self.tenure is not None:
            self._telling = asyncio.create_task(self._tell_settings(self.tenure.maintenance))
        self._renew_rules()
        self.exchange.options = self._options()
        self.lanes.reconfigure(
            config.default_limits(),
            config.host_limits(),
            max_in_flight=config.delivery.max_in_flight,
            now=self._clock.mono(),
        )
        self.dispatcher.renew(config.retry_policy(), config.delivery.max_in_flight)
        log.info("configuration applied")

    async def _tell_settings(self, maintenance: Maintenance) -> None:
        with contextlib.suppress(DatabaseUnavailable):  # the next tenure tells them
            await maintenance.set(self._settings())

    def wire(self) -> Wire:
        """What all requests have in common."""
        delivery = self.config.delivery
        thin = None
        if delivery.thin_url:
            thin = ThinLink(delivery.thin_url, self._thin_key, self.config.retention.events)
        return Wire(
            user_agent=f"hookd/{__version__}",
            format=BodyFormat(delivery.format),
            timeout_s=delivery.timeout,
            connect_timeout_s=delivery.connect_timeout,
            https_only=self.config.network.https_only,
            thin=thin,
        )

    def _address_rules(self) -> AddressRules:
        return address_rules(self.config.network, own_addresses())

    def _renew_rules(self) -> None:
        rules = self._address_rules()
        if rules != self.rules:
            self.rules = rules
            self.exchange.connections.drop_idle()

    async def _keep_rules(self) -> None:
        """Interfaces come and go, and with them the addresses that are this machine's own."""
        while True:
            await asyncio.sleep(OWN_ADDRESSES_EVERY_S * (0.9 + 0.2 * self._dice.draw()))
            self._renew_rules()

    def _options(self) -> ExchangeOptions:
        delivery = self.config.delivery
        return ExchangeOptions(
            max_response=delivery.max_response,
            redirects=delivery.redirects,
            https_only=self.config.network.https_only,
            user_agent=f"hookd/{__version__}",
        )

    # What the parts ask for.

    def _vouched(self) -> bool:
        return self.tenure is not None and self.tenure.owner.trusted(self._clock.mono())

    def _room(self, started: list[Delivery]) -> None:
        if self.tenure is not None:
            self.tenure.feed.room(started)

    def _dropped(self, delivery: Delivery) -> None:
        if self.tenure is not None:
            self.tenure.feed.settled((), (), dropped=(delivery,))

    def _retention(self) -> Retention:
        kept = self.config.retention
        return Retention(kept.attempts, kept.events, kept.dead_letters)

    def _settings(self) -> dict[str, str]:
        return {
            "retention.events": str(self.config.retention.events),
            "delivery.format": self.config.delivery.format,
            "security.unverified": self.config.security.unverified,
        }

    async def ask(self, endpoint: Endpoint) -> Verification:
        """Ask an endpoint whether it wants to be called."""
        return await ask(endpoint, self.exchange, self.wire(), self._clock.wall())

    def unreadable(self) -> dict[UUID, str]:
        """Endpoints whose secrets cannot be read, and why: their deliveries wait."""
        return self.tenure.queue.unreadable if self.tenure is not None else {}

    def lane_states(self) -> dict[str, int]:
        """How many lanes wait for what."""
        known = ("ready", "rate", "concurrency", "hold", "breaker", "endpoint", "share", "idle")
        return dict.fromkeys(known, 0) | self.lanes.states(self._clock.mono())

    def statements(self) -> dict[str, int]:
        """SQL statements of settling and reading so far; of this tenure as far as the feed goes."""
        feed = self.tenure.queue.statements if self.tenure is not None else 0
        return {"owner": self.recorder.statements, "feed": feed}

    def _summary(self) -> str:
        lanes = self.lanes.snapshot(self._clock.mono(), LANES_SHOWN)
        in_flight = self.dispatcher.in_flight()
        return orjson.dumps(
            {
                "version": __version__,
                "lanes": lanes,
                "lanes_total": len(self.lanes),
                "in_flight": len(in_flight),
                "in_flight_ids": [d.id for d in in_flight] if len(in_flight) <= IDS_SHOWN else None,
                "waiting": self.lanes.total_waiting,
                "unwritten": len(self.recorder.unwritten()),
                "stalled": self.dispatcher.stalled(),
                "unreadable": {str(i): why for i, why in islice(self.unreadable().items(), UNREADABLE_SHOWN)},
                "verdicts": self.dispatcher.counts.verdicts,
                "at": self._clock.wall(),
            }
        ).decode()

    # What the parts report.

    def _say_unreadable(self) -> None:
        """One line a reason: with one key gone it is the same for all endpoints."""
        for reason in {*self.unreadable().values()} - self._unreadable_said:
            self._unreadable_said.add(reason)
            concerned = [str(i) for i, why in self.unreadable().items() if why == reason]
            log.error(
                "secrets of endpoints cannot be read: their deliveries wait",
                reason=reason,
                endpoints=len(concerned),
                endpoint_ids=concerned[:10],
            )

    def _measured(self, depth: dict[str, float]) -> None:
        self.depth = depth

    def _reported(self, result: Result) -> None:
        kind, verdict = result.verdict.kind, result.verdict
        ordinary = kind is VerdictKind.DELIVERED or result.delivery.replaced_by is not None
        if ordinary and self.config.log.level != "debug" and result.health is None:
            return
        endpoint = self.dispatcher.served(result.endpoint_key)
        about: dict[str, Any] = {
            "delivery_id": result.delivery.id,
            "event_id": str(result.delivery.event.id),
            "endpoint_id": str(endpoint.id) if endpoint is not None else None,
            "host": endpoint.host if endpoint is not None else None,
            "attempt": result.delivery.attempt + (result.outcome is not None),
        }
        if result.health is not None and result.health.parked_at is not None:
            log.warning(
                "endpoint parked: one probe now and then until it answers", reason=verdict.reason, **about
            )
        elif result.health is not None and kind is VerdictKind.DELIVERED:
            log.info("endpoint recovered", **about)
        if kind is VerdictKind.DELIVERED:
            log.debug("delivered", **about)
        elif result.delivery.replaced_by is not None:
            log.debug("replaced", reason=verdict.reason, **about)
        elif verdict.disable is not None:
            log.warning("endpoint disabled", reason=verdict.disable, **about)
        elif self._throttle.allows():
            if kind is VerdictKind.RETRY:
                about["retry_in_s"] = round(verdict.delay_s, 1)
            log.info("attempt failed", verdict=kind.value, reason=verdict.reason, **about)

    @staticmethod
    def _faulty(delivery: Delivery, error: Exception) -> None:
        log.error("internal error in an exchange; it is tried again", delivery_id=delivery.id, exc_info=error)

    def _held_back(self, problem: str) -> None:
        now = self._clock.mono()
        if now - self._said_mono.get(problem, -SAY_AGAIN_S) >= SAY_AGAIN_S:
            self._said_mono[problem] = now
            log.warning("deliveries are held, and use up no attempt", problem=problem)

    def _unstorable(self, problem: str, result: Result) -> None:
        log.error(
            "not stored",
            problem=problem,
            delivery_id=result.delivery.id,
            event_id=str(result.delivery.event.id),
        )

    @staticmethod
    def _partitioned(what: str, name: str) -> None:
        log.info("partition", did=what, name=name)


def _first(group: BaseExceptionGroup) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)
