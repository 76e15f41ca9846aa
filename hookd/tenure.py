"""
A tenure: the time for which one session to PostgreSQL owns shards, and what is done as long as it lasts.

Shares are kept with the other daemons, the locks are vouched for, and the listener is tested.  Whatever of it raises
``DatabaseUnavailable`` ends the tenure; the daemon begins the next one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from hookd.core.shares import Plan, plan
from hookd.postgres.connect import DatabaseUnavailable
from hookd.postgres.queue import ECHO

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookd.clock import Clock, Dice
    from hookd.dispatcher import Dispatcher
    from hookd.feed import Feed
    from hookd.postgres.maintenance import Maintenance
    from hookd.postgres.owner import OwnerSession
    from hookd.postgres.queue import Queue
    from hookd.reports import Reports

log = structlog.get_logger("hookd")

LOOK_S = 0.15
"""How often the locks are looked at while there are other daemons: so soon a dead one's shards are found free."""

LOOK_ALONE_S = 0.5
"""The same for a daemon without others: so soon a new one is noticed."""

STUCK_READ_S = 5.0
"""From when a read of the queue is called stuck: the longest, recovering a million rows, takes less than a second."""

ECHO_EVERY_S = 5.0

ECHO_LOOKS = 20
"""How often it is looked for, three seconds: not by the clock, which goes on while the process is stopped."""


@dataclass(slots=True)
class Tenure:
    """The parts that live as long as one session, and the tasks that live with them."""

    owner: OwnerSession
    queue: Queue
    feed: Feed
    maintenance: Maintenance
    dispatcher: Dispatcher
    clock: Clock
    dice: Dice

    async def keep_share(self, stopping: Callable[[], bool]) -> None:
        """Divide the shards with the other daemons: leave what is too much, take what is missing; all, when stopping."""
        owner, feed = self.owner, self.feed
        leaving: set[int] = set()
        alone = resigned = False
        while True:
            pause = LOOK_ALONE_S if alone and not leaving else LOOK_S
            await asyncio.sleep(self._about(pause))
            if stopping():
                if not resigned:
                    resigned = True
                    await owner.resign()
                todo = Plan(leave=tuple(owner.shards - leaving))
            else:
                view = await owner.look()
                alone = len(view.members) == 1
                todo = plan(view, owner.shards, leaving, self._idlest)
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
                gained = await owner.acquire(todo.take, self.dispatcher.begun())
                if gained:
                    log.info("shards acquired", gained=len(gained), owned=len(owner.shards))
                    feed.own(gained)

    def _idlest(self) -> list[int]:
        busy = self.dispatcher.busy_shards()
        return sorted(self.owner.shards, key=lambda shard: (busy[shard], shard))

    async def vouch(self, vouched: Callable[[], None]) -> None:
        """Ask the session again and again whether it is there: ``vouched`` is called after each answer."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.owner.probe()
            vouched()

    async def watch(self) -> None:
        """
        Wait until a connection is lost.

        Raises:
            DatabaseUnavailable: then.
        """
        waits = [asyncio.create_task(lost.wait()) for lost in (self.owner.lost, self.queue.lost)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        raise DatabaseUnavailable("the connection was closed by the server")

    async def listen_to_itself(self, node: str, reports: Reports) -> None:
        """
        Notify itself now and then: a session that listens and hears nothing looks as one that has nothing to hear.

        What such a session costs is the second until the next read.  A new one is tried, once.

        Raises:
            DatabaseUnavailable: it is deaf, and the one before it was not.
        """
        number = 0
        while True:
            number += 1
            arrive = await self._hears(f"{node} {number}")
            if reports.notifications(arrive=arrive) and not arrive:
                raise DatabaseUnavailable("notifications do not arrive")
            await asyncio.sleep(self._about(ECHO_EVERY_S))

    async def _hears(self, text: str) -> bool:
        self.queue.listen_for(text)
        await self.maintenance.echo(ECHO + text)
        for _ in range(ECHO_LOOKS):
            # while a read takes long it cannot hear: not now
            if self.queue.heard or self.queue.waited_s() > 1.0:
                return True
            await asyncio.sleep(LOOK_S)
        return self.queue.heard

    def stalled(self) -> str:
        """Why PostgreSQL keeps deliveries from starting; empty if it does not."""
        if self.owner.silent_s(self.clock.mono()):
            return "PostgreSQL does not answer: it hangs, or somebody has locked a table of hookd's"
        if self.queue.waited_s() > STUCK_READ_S:
            return "the queue cannot be read: PostgreSQL is slow, or somebody has locked a table of hookd's"
        return ""

    def _about(self, seconds: float) -> float:
        """A tenth more or less, so that daemons do not keep step."""
        return seconds * (0.9 + 0.2 * self.dice.draw())
