"""
A simulated process: the real daemon, whose clock, dice, network and PostgreSQL are the world's.
"""

from __future__ import annotations

import random
import traceback
from typing import TYPE_CHECKING, Any, cast

import hookd.daemon
import hookd.reports
import hookd.tenure
from hookd.core.addresses import AddressRules
from hookd.core.lanes import Lanes
from hookd.daemon import Daemon
from hookd.postgres.owner import OwnerSession

from .connection import Connections, Link
from .network import ScriptedExchange
from .timeline import ProcessLoop

if TYPE_CHECKING:
    from hookd.config import Config
    from hookd.core.model import HostLimits
    from hookd.net.exchange import HttpExchange
    from hookd.net.resolver import Resolver

    from .connection import Connection
    from .database import Session
    from .world import World

RULES = AddressRules()


class SimulatedDaemon(Daemon):
    """All of it but the sockets, the signals and the garbage collector."""

    def __init__(self, process: Process) -> None:
        self._process = process
        super().__init__(
            process.config,
            cast("Any", Connections(process.link)),
            lambda: process.config,
            clock=process,
            dice=process,
        )
        self.node = process.name

    def _network(self) -> tuple[Resolver, HttpExchange]:
        return cast("Any", None), cast("Any", self._process.exchange)

    def _take_process(self) -> None:
        pass

    @staticmethod
    def _settle_heap() -> None:
        pass

    def _address_rules(self) -> AddressRules:
        return RULES


async def prepared() -> None:
    """There is a schema."""


class SimulatedOwner(OwnerSession):
    """The model has no migrations."""

    async def check_schema(self) -> None:
        pass


class Process:
    """One start of a daemon, until it ends or is killed."""

    def __init__(self, world: World, name: str, config: Config, seed: int) -> None:
        self.world = world
        self.name = name
        self.config = config
        self._random = random.Random(seed)
        self.draw = self._random.random
        self.loop = ProcessLoop(world.timeline, self._complained)  # type: ignore[abstract]
        self.link = Link(world.database, world.timeline, self.loop, self._random)
        self.exchange = ScriptedExchange(world.network, self)
        self.wall_step_s = 0.0
        self.ours_until = 0.0
        self.reloads = 0
        self.daemon: SimulatedDaemon | None = None
        self.exit_status: int | None = None
        self.stopping = False
        self.stopped = False
        self._lanes = Lanes(config.default_limits(), config.host_limits())
        world.link_faults(self)
        self.loop.call_soon(lambda: self.loop.create_task(self._main()))

    def __repr__(self) -> str:
        return f"<{self.name}>"

    # The clock that it is given.

    def mono(self) -> float:
        """Seconds that only go forwards."""
        return self.world.timeline.now

    def wall(self) -> float:
        """The wall clock of its machine."""
        return self.world.wall() + self.wall_step_s

    # Its life.

    async def _main(self) -> None:
        self.daemon = SimulatedDaemon(self)
        self.exit_status = await self.daemon.run(prepared)
        self.world.ended(self)

    def _complained(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.world.truth.wrong(f"{self.name}: {context.get('message')}: {error!r}")

    @property
    def dead(self) -> bool:
        """It was killed, or has ended."""
        return self.loop.dead

    def kill(self) -> None:
        """SIGKILL; its sockets are closed by its system."""
        for connection in list(self.link.connections):
            connection.hang_up()
            connection.closed = True
        self.loop.kill()
        self.world.truth.let_go(self)

    def stop(self) -> None:
        """SIGTERM."""
        self.stopping = True
        if self.daemon is not None:
            self.loop.call_soon(self.daemon.stop)

    def reload(self, config: Config) -> None:
        """SIGHUP."""
        if self.daemon is not None:
            self.loop.call_soon(self._apply, config)

    def _apply(self, config: Config) -> None:
        assert self.daemon is not None
        self.config = config
        self.reloads += 1
        self._lanes = Lanes(config.default_limits(), config.host_limits())
        self.daemon.apply()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.stopped = True
        self.loop.stop_running()

    def thaw(self) -> None:
        """SIGCONT."""
        self.stopped = False
        self.loop.go_on()

    # What others ask.

    def session(self) -> Session | None:
        """The session that owns its shards now, as far as it knows."""
        if self.daemon is None or self.daemon.tenure is None:
            return None
        connection = cast("Connection", self.daemon.tenure.owner._connection)
        return connection.session

    def limits(self, host: str) -> HostLimits:
        """What its configuration allows a host."""
        return self._lanes.limits_of(host)

    @property
    def max_in_flight(self) -> int:
        """What its configuration allows in all."""
        return self.config.delivery.max_in_flight

    def endpoint_concurrency(self, key: int) -> int | None:
        """The limit of an endpoint as it knows it."""
        if self.daemon is None:
            return None
        endpoint = self.daemon.dispatcher.served(cast("Any", key))
        return None if endpoint is None else endpoint.concurrency


DEAFENING = {"deaf", "partition"}
"""Faults that keep notifications from a daemon."""


class DaemonLog:
    """What the daemon says, in the trace of the world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _say(self, level: str, message: str, **about: Any) -> None:
        if about.get("exc_info"):
            if self._world.tracing:
                self._world.trace("".join(traceback.format_exception(about["exc_info"])))
            self._world.truth.wrong(f"a daemon says: {message}: {about['exc_info']!r}")
        if message.startswith("notifications do not arrive") and self._world.faults.isdisjoint(DEAFENING):
            self._world.truth.wrong(
                "a daemon does not hear its own notifications, and nothing is in their way"
            )
        if self._world.tracing:
            self._world.trace(f"log {level}: {message} " + " ".join(f"{k}={v}" for k, v in about.items()))

    def debug(self, message: str, **about: Any) -> None:
        self._say("debug", message, **about)

    def info(self, message: str, **about: Any) -> None:
        self._say("info", message, **about)

    def warning(self, message: str, **about: Any) -> None:
        self._say("warning", message, **about)

    def error(self, message: str, **about: Any) -> None:
        self._say("error", message, **about)


SAYING = (hookd.daemon, hookd.reports, hookd.tenure)


def log_to(world: World | None, before: Any = None) -> Any:
    """Let the daemon's log be the world's; returns what it was."""
    vars(hookd.daemon)["OwnerSession"] = SimulatedOwner if world is not None else OwnerSession
    was = hookd.daemon.log
    for module in SAYING:
        vars(module)["log"] = DaemonLog(world) if world is not None else before
    return was
