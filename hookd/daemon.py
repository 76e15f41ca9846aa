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
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
import structlog

from hookd import __version__
from hookd.clock import SystemClock, SystemDice
from hookd.config import address_rules, allowed_names
from hookd.core.bodies import ThinLink
from hookd.core.composer import Composer, Wire
from hookd.core.lanes import Lanes
from hookd.core.model import DELIVERED, BodyFormat
from hookd.core.shares import plan
from hookd.dispatcher import Dispatcher
from hookd.feed import Feed
from hookd.keyfile import KeyFileProblem, read_keyring
from hookd.net.exchange import ExchangeOptions, HttpExchange, tls_context
from hookd.net.resolver import Resolver, own_addresses
from hookd.net.tunnel import ByProxy
from hookd.postgres.connect import Database, DatabaseRefused, DatabaseUnavailable
from hookd.postgres.maintenance import Maintenance, Refusals
from hookd.postgres.owner import BadBatch, OwnerSession
from hookd.postgres.queue import Queue
from hookd.recorder import Recorder
from hookd.reports import Reports
from hookd.systemd import notify
from hookd.tally import Counted, Tally
from hookd.tenure import Tenure
from hookd.upkeep import Retention, keep_up, look_after, measure, publish
from hookd.verification import ask, question

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from uuid import UUID

    from hookd.clock import Clock, Dice
    from hookd.config import Config
    from hookd.core.addresses import AddressRules
    from hookd.core.challenge import Verification
    from hookd.core.database import DatabaseHealth
    from hookd.core.model import Delivery, Endpoint, Result

log = structlog.get_logger("hookd")

OWN_ADDRESSES_EVERY_S = 60.0

RECONNECT_FIRST_S = 0.1
RECONNECT_MOST_S = 2.0

STEADY_S = 3.0
"""A session that lasts for so long ends an outage; what is lost again before that is the same one."""

WRITE_S = 5.0
"""On SIGTERM, for writing the last results, where the grace is over."""

WRITE_AT_ONCE_S = 0.5
"""The same after a second signal."""

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


class Daemon:
    """All parts of one process."""

    def __init__(
        self,
        config: Config,
        database: Database,
        reload: Callable[[], Config | None],
        connections_most: int | None = None,
        clock: Clock | None = None,
        dice: Dice | None = None,
    ) -> None:
        """
        ``reload`` reads the configuration again; None when it is bad, which it has said already.  Without ``clock`` and
        ``dice`` they are the system's.

        ``connections_most`` to receivers are open at once, idle ones too; None: as many as there are.

        Raises:
            KeyFileProblem: security.master_key_file cannot be used.
        """
        self.config = self._config_at_start = config
        self.keyring = read_keyring(config.security.master_key_file)
        self._database = database
        self._reload = reload
        self._clock = clock or SystemClock()
        self._dice = dice or SystemDice()
        self._reports = Reports(self._clock)
        self._refusals = Refusals(self._clock.mono, self._reports.upkeep_refused)
        self.node = f"{socket.gethostname()}-{uuid4().hex[:8]}"
        self.started_at = self._clock.wall()
        self.tenure: Tenure | None = None
        self._tenure_mono: float | None = None
        """When the last tenure began; None while there was none since the one before."""
        self.prepared = False
        self.ready = asyncio.Event()
        self.reload_ok = True
        self.depth: dict[str, float] = {}
        """What is pending, as it was measured last; empty while PostgreSQL is away."""
        self.database_health: DatabaseHealth | None = None
        self.shards_in_all = 0
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._over = False
        self._thin_key = b""
        self._telling: asyncio.Task[None] | None = None
        self._noting: set[asyncio.Task[None]] = set()
        self.rules = self._address_rules()
        self._connections_most = connections_most
        self.lanes = Lanes(config.default_limits(), config.host_limits(), max_in_flight=self._at_once())
        self.resolver, self.exchange = self._network()
        self.recorder = Recorder(self._clock, refused=BadBatch, report=self._reports.unstorable)
        self.tally = Tally(self.node)
        self.dispatcher = Dispatcher(
            self.lanes,
            self.exchange,
            self.recorder,
            lambda endpoint: Composer(endpoint, self.wire()),
            lambda endpoint, now: question(endpoint, self.wire(), now),
            config.retry_policy(),
            self._clock,
            self._dice,
            max_in_flight=self._at_once(),
            vouched=self._vouched,
            room=self._room,
            report=self._reported,
            fault=self._reports.faulty,
            ours=self._reports.held,
            dropped=self._dropped,
            verified=self._verified,
        )

    def _network(self) -> tuple[Resolver | ByProxy, HttpExchange]:
        config = self.config
        resolver = (
            ByProxy()
            if config.network.proxy_resolves
            else Resolver(
                lambda: self.rules,
                nameservers=config.network.nameservers,
                hosts_file=config.network.hosts_file,
                search_domains=config.network.search_domains,
                mono=self._clock.mono,
            )
        )
        exchange = HttpExchange(
            resolver,
            lambda: self.rules,
            self._options(),
            wall=self._clock.wall,
            mono=self._clock.mono,
            context=tls_context(config.network.ca_file),
            proxy=config.egress_proxy(),
            connections_most=self._connections_most,
        )
        return resolver, exchange

    # Life.

    async def run(self, prepare: Callable[[], Coroutine[Any, Any, None]]) -> int:
        """
        Deliver until told to stop; returns the exit status.

        ``prepare`` is waited for first: it reaches the database and sees to its schema.  What it raises is raised.
        """
        self._take_process()
        stop = asyncio.create_task(self._stop.wait())
        tasks: list[asyncio.Task[Any]] = [stop]
        try:
            preparing = asyncio.create_task(prepare())
            tasks.append(preparing)
            await asyncio.wait({preparing, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done():
                return 0
            preparing.result()
            self.prepared = True
            self._settle_heap()
            tenures = asyncio.create_task(self._tenures())
            tasks += [tenures, asyncio.create_task(self._keep_rules())]
            await asyncio.wait({tenures, stop}, return_when=asyncio.FIRST_COMPLETED)
            if tenures.done():
                tenures.result()
            return await self._wind_down()
        finally:
            self._over = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.exchange.close()

    def stop(self) -> None:
        """Drain and stop; a second call stops at once."""
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether it drains: what waits for more to come should end."""
        return self._stop.is_set()

    @staticmethod
    def _settle_heap() -> None:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)

    def _take_process(self) -> None:
        """Signals come to the process, and here."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGHUP, self.apply)

    def _signalled(self, number: int) -> None:
        name = signal.Signals(number).name
        in_flight = len(self.dispatcher.in_flight())
        if self._stop.is_set():
            log.warning("stopping at once", signal=name, in_flight=in_flight)
        else:
            log.info("draining", signal=name, in_flight=in_flight, grace_s=self.config.delivery.drain)
            notify("STOPPING=1\nSTATUS=draining")
        self.stop()

    async def _wind_down(self) -> int:
        if self.tenure is not None:
            self.tenure.feed.stop()
        until = self._clock.mono() + self.config.delivery.drain
        at_once = asyncio.create_task(self._stop_now.wait())
        drain = asyncio.create_task(self.dispatcher.drain(self.config.delivery.drain))
        await asyncio.wait({drain, at_once}, return_when=asyncio.FIRST_COMPLETED)
        if not drain.done():
            drain.cancel()
        cut_off = drain.result() if drain.done() else await self.dispatcher.drain(0)
        rest = asyncio.create_task(self._write_the_rest())
        if not at_once.done():
            left = max(WRITE_S, until - self._clock.mono())
            await asyncio.wait({rest, at_once}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if at_once.done():
            # what the database takes at once is written even so: it would be sent again
            await asyncio.wait({rest}, timeout=WRITE_AT_ONCE_S)
        for task in (rest, at_once):
            task.cancel()
        unwritten = len(self.recorder.unwritten())
        say = log.warning if unwritten or cut_off else log.info
        say("stopped", cut_off=cut_off, unwritten=unwritten, may_be_sent_again=cut_off + unwritten)
        return 0 if unwritten == 0 else 1

    async def _write_the_rest(self) -> None:
        await self.recorder.empty()
        if self.tenure is not None:
            with contextlib.suppress(DatabaseUnavailable):
                await self.tally.write(
                    self.tenure.maintenance, self._clock.wall(), self._tallied(), last=True
                )
                await self.tenure.maintenance.withdraw(self.node)

    # Tenures.

    async def _tenures(self) -> None:
        delay = RECONNECT_FIRST_S
        while True:
            self._tenure_mono = None
            problem, fault, refused = "", None, False
            try:
                await self._tenure()
            except* DatabaseUnavailable as group:
                problem = _first(group)
            except* DatabaseRefused as group:
                problem, refused = _first(group), True
            except* Exception as group:  # noqa: BLE001 - it is said, and the next session begins anew
                problem, fault = _first(group), group
            self.ready.clear()
            self._reports.lost(problem, fault, refused=refused, unwritten=len(self.recorder.unwritten()))
            self.dispatcher.forget_all()
            if self._over:
                return  # a task group that fails in the moment in which it is cancelled raises the failure alone
            lasted = 0.0 if self._tenure_mono is None else self._clock.mono() - self._tenure_mono
            delay = RECONNECT_FIRST_S if lasted > STEADY_S else min(RECONNECT_MOST_S, delay * 2)
            await asyncio.sleep(delay * (0.8 + 0.4 * self._dice.draw()))

    async def _tenure(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            owner = OwnerSession(await self._database.connect("owner", lasting=True), self._clock)
            stack.push_async_callback(owner.close)
            await owner.check_schema()
            await owner.prepare()
            queue = Queue(
                await self._database.connect("feed", lasting=True), lambda: self.keyring, self._clock.mono
            )
            stack.push_async_callback(queue.close)
            maintenance = Maintenance(await self._database.connect("upkeep", lasting=True), self._refusals)
            stack.push_async_callback(maintenance.close)
            await maintenance.prepare()
            await owner.join()
            await owner.acquire(plan(await owner.look(), (), (), tuple).take, self.dispatcher.begun())
            await self._write_kept(owner)
            feed = Feed(
                queue,
                owner,
                self.dispatcher,
                self._clock,
                window=READ_AHEAD * self.config.delivery.max_in_flight,
                known=self.dispatcher.taken(),
            )
            await queue.prepare(feed.notified)
            await maintenance.set(self._settings())
            self._thin_key = await maintenance.thin_key()
            self.shards_in_all = owner.shards_in_all
            tenure = Tenure(owner, queue, feed, maintenance, self.dispatcher, self._clock, self._dice)
            self.tenure = tenure
            # one that ended meanwhile without a result was nobody's to forget
            feed.known &= {delivery.id for delivery in self.dispatcher.begun()}
            self._tenure_mono = self._clock.mono()
            feed.own(owner.shards)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(feed.run())
                    group.create_task(self.recorder.run(owner, feed))
                    group.create_task(tenure.keep_share(self._stop.is_set))
                    group.create_task(tenure.vouch(self._look_around))
                    group.create_task(tenure.watch())
                    group.create_task(self._announce(owner, feed))
                    group.create_task(tenure.listen_to_itself(self.node, self._reports))
                    group.create_task(
                        keep_up(maintenance, self._retention, self._dice, self._reports.partitioned)
                    )
                    group.create_task(measure(maintenance, self._clock, self._measured))
                    group.create_task(look_after(maintenance, self._retention, self._examined))
                    group.create_task(self.tally.keep(maintenance, self._clock.wall, self._tallied))
                    group.create_task(
                        publish(maintenance, self.node, self.started_at, lambda: owner.backend, self._summary)
                    )
            finally:
                self.tenure = None
                self.depth, self.database_health = {}, None

    async def _write_kept(self, owner: OwnerSession) -> None:
        """Write what came while there was no session, before anything is read."""
        before = self.recorder.dropped
        await self.recorder.run(owner, None, until_empty=True)
        dropped = self.recorder.dropped - before
        if dropped:
            log.warning(
                "results not written: another daemon owns their shards now, and may send them again",
                count=dropped,
            )

    async def _announce(self, owner: OwnerSession, feed: Feed) -> None:
        if not owner.shards:
            log.info("standing by: others own all shards")
        else:
            await feed.recovered.wait()
        self.ready.set()
        notify("STATUS=delivering")
        if self._reports.away:
            await asyncio.sleep(STEADY_S)
            self._reports.back(len(owner.shards))

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
            self._reports.keys_changed([key.id for key in keyring.keys])
            if self.tenure is not None:
                self.tenure.feed.reread_endpoints()
        if self.tenure is not None:
            self.tenure.feed.backlogs.window = READ_AHEAD * config.delivery.max_in_flight
            self._telling = asyncio.create_task(self._tell_settings(self.tenure.maintenance))
        self._renew_rules()
        self.exchange.options = self._options()
        self.lanes.reconfigure(
            config.default_limits(),
            config.host_limits(),
            max_in_flight=self._at_once(),
            now=self._clock.mono(),
        )
        self.dispatcher.renew(config.retry_policy(), self._at_once())
        log.info("configuration applied")
        rest = self._config_at_start.needs_restart(config)
        if self._at_once() < config.delivery.max_in_flight:
            rest.append("delivery.max_in_flight")  # connections were counted at the start
        if rest:
            log.warning("these keys have changed and need a restart", keys=rest)

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
            names=allowed_names(self.config.network),
            thin=thin,
        )

    def _address_rules(self) -> AddressRules:
        return address_rules(self.config.network, own_addresses())

    def _renew_rules(self) -> None:
        rules = self._address_rules()
        if rules != self.rules:
            self.rules = rules
            self.exchange.connections.rules_changed()

    async def _keep_rules(self) -> None:
        """Interfaces come and go, and with them the addresses that are this machine's own."""
        while True:
            await asyncio.sleep(OWN_ADDRESSES_EVERY_S * (0.9 + 0.2 * self._dice.draw()))
            self._renew_rules()

    def _at_once(self) -> int:
        """Exchanges at once: as configured, or as many as there may be connections."""
        wanted = self.config.delivery.max_in_flight
        return wanted if self._connections_most is None else min(wanted, self._connections_most)

    def _options(self) -> ExchangeOptions:
        delivery = self.config.delivery
        return ExchangeOptions(
            max_response=delivery.max_response,
            redirects=delivery.redirects,
            https_only=self.config.network.https_only,
            user_agent=f"hookd/{__version__}",
            names=allowed_names(self.config.network),
        )

    # What the parts ask for.

    def database_answers(self) -> bool:
        """Whether PostgreSQL answered lately enough for the locks to be sure."""
        return self._vouched()

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

    def wall(self) -> float:
        """Seconds since the epoch."""
        return self._clock.wall()

    async def ask(self, endpoint: Endpoint) -> Verification:
        """Ask an endpoint whether it wants to be called."""
        return await ask(endpoint, self.exchange, self.wire(), self._clock.wall())

    def unreadable(self) -> dict[UUID, str]:
        """Endpoints whose secrets cannot be read, and why: their deliveries wait."""
        return self.tenure.queue.unreadable if self.tenure is not None else {}

    def faults(self) -> list[str]:
        """Why deliveries are held that no receiver is to blame for, as of the last seconds."""
        return self._reports.faults()

    def lane_states(self) -> dict[str, int]:
        """How many lanes wait for what."""
        known = ("ready", "rate", "concurrency", "hold", "machine", "breaker", "endpoint", "share", "idle")
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
                "unsettled_since": self.dispatcher.unsettled_since(self._clock.wall()),
                "stalled": self.dispatcher.stalled(),
                "faults": self.faults(),
                "unreadable": {str(i): why for i, why in islice(self.unreadable().items(), UNREADABLE_SHOWN)},
                "verdicts": {str(kind): n for kind, n in self.dispatcher.counts.verdicts.items()},
                "at": self._clock.wall(),
            }
        ).decode()

    def _tallied(self) -> Counted:
        counts, depth = self.dispatcher.counts, self.depth
        return Counted(
            counts.verdicts,
            counts.outcomes,
            counts.attempt_s,
            counts.lag_s,
            pending=int(depth.get("fresh", 0) + depth.get("scheduled", 0)),
            oldest_s=depth.get("oldest_s", 0.0),
            in_flight=len(self.dispatcher.in_flight()),
        )

    # What the parts report.

    def trouble(self) -> str:
        """Why nothing is delivered, in words that tell nobody anything about the database; empty if nothing is wrong."""
        if self._stop.is_set():
            return "it is draining"
        if not self.prepared:
            return "it waits for the database, or for its schema"
        if self.tenure is None:
            return "the database is away"
        if not self.ready.is_set():
            return "shards are being recovered"
        return self._reports.stall

    def _look_around(self) -> None:
        """After each answer of the session: what is to be said that nobody reports."""
        stall = self.tenure.stalled() if self.tenure is not None else ""
        if not stall and self.recorder.backed_up():
            stall = "results come faster than PostgreSQL takes them"
        self._reports.stalled(stall)
        self._reports.clock_looked_at()
        self._reports.unreadable(self.unreadable())
        self._reports.not_listed()

    def _measured(self, depth: dict[str, float]) -> None:
        self.depth = depth

    def _examined(self, found: DatabaseHealth | str) -> None:
        self.database_health = None if isinstance(found, str) else found
        self._reports.health(found)

    def _reported(self, result: Result) -> None:
        self.tally.count(result)
        ordinary = result.verdict.kind is DELIVERED or result.delivery.replaced_by is not None
        if ordinary and self.config.log.level != "debug" and result.health is None:
            return
        self._reports.attempt(result, self.dispatcher.served(result.endpoint_key))

    def _verified(self, endpoint: Endpoint) -> None:
        self._reports.verified(endpoint)
        if self.tenure is not None:
            noting = asyncio.create_task(self._note_verified(self.tenure.maintenance, endpoint))
            self._noting.add(noting)
            noting.add_done_callback(self._noting.discard)

    @staticmethod
    async def _note_verified(maintenance: Maintenance, endpoint: Endpoint) -> None:
        with contextlib.suppress(DatabaseUnavailable):  # then it is asked once more
            await maintenance.note_verified(endpoint.id, endpoint.url)


def _first(group: BaseExceptionGroup) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)
