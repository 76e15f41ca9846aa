"""
Virtual time, and event loops that live in it.

There is one ``Timeline`` in a world.  Nothing waits for real: when nobody is ready the clock jumps to the next timer.  Each
simulated process has an event loop of its own on it, so that a process can be stopped (SIGSTOP), go on, or be killed
between any two of its callbacks, and nothing of it runs afterwards.

Everything runs in one thread and in an order that depends on nothing but what was asked for and when: two things of one
moment run in the order in which they were asked for, and tasks hash by their number, not by where they are in memory.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable, Coroutine

GHOST_ROUNDS = 50
"""Of a killed process: how often its tasks are cancelled until they are gone."""


class Stuck(Exception):
    """A world that goes round in circles at one moment."""


class Alarm:
    """Something that happens at a time, unless it is called off."""

    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args

    def call_off(self) -> None:
        """It does not happen."""
        self.callback = None
        self.args = ()


class Timeline:
    """The time of a world, and what happens in it."""

    SAME_MOMENT_MOST = 20_000

    def __init__(self) -> None:
        self.now = 1000.0
        self._heap: list[tuple[float, int, Alarm | ProcessLoop, asyncio.TimerHandle | None]] = []
        self._numbers = itertools.count()
        self._runnable: deque[ProcessLoop] = deque()
        self.steps = 0

    def at(self, when: float, callback: Callable[..., object], *args: Any) -> Alarm:
        """Let something happen then."""
        alarm = Alarm(callback, args)
        heapq.heappush(self._heap, (max(when, self.now), next(self._numbers), alarm, None))
        return alarm

    def after(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Alarm:
        """Let something happen after so long."""
        return self.at(self.now + delay_s, callback, *args)

    def timer(self, loop: ProcessLoop, handle: asyncio.TimerHandle) -> None:
        """A timer of a process."""
        heapq.heappush(self._heap, (handle.when(), next(self._numbers), loop, handle))

    def runnable(self, loop: ProcessLoop) -> None:
        """A process has something to do."""
        self._runnable.append(loop)

    def run(self, until: float, enough: Callable[[], bool]) -> None:
        """Go on until this time, or until it is enough, which is asked each time the clock moves."""
        runnable, heap = self._runnable, self._heap
        here = 0
        while True:
            while runnable:
                runnable.popleft().run_ready()
                here += 1
                if here > self.SAME_MOMENT_MOST:
                    raise Stuck(f"{here} turns of event loops at {self.now}")
            if not heap or heap[0][0] > until:
                self.now = max(self.now, until)
                return
            when, _, what, handle = heapq.heappop(heap)
            self.steps += 1
            if when > self.now:
                self.now = when
                here = 0
                if enough():
                    heapq.heappush(heap, (when, -1, what, handle))
                    return
            if handle is None:
                assert isinstance(what, Alarm)
                if what.callback is not None:
                    what.callback(*what.args)
            elif not handle.cancelled():
                assert isinstance(what, ProcessLoop)
                what.due(handle)


class NumberedTask(asyncio.Task[Any]):
    """A task whose hash is its number: sets of tasks are then walked in the same order in every run."""

    number: int

    def __new__(cls, _coro: Any, *, number: int, **_: Any) -> Self:
        # before __init__, in which asyncio puts it into a set
        self = super().__new__(cls)
        self.number = number
        return self

    def __init__(self, coro: Coroutine[Any, Any, Any], *, number: int, **named: Any) -> None:
        super().__init__(coro, **named)

    def __hash__(self) -> int:
        return self.number


class ProcessLoop(asyncio.AbstractEventLoop):
    """The event loop of one simulated process.  What it does not have (sockets, files, threads) nothing may ask for."""

    def __init__(self, timeline: Timeline, complain: Callable[[dict[str, Any]], None]) -> None:
        """``complain`` is told what asyncio would log: an exception that nobody caught."""
        self._timeline = timeline
        self._complain = complain
        self._ready: deque[asyncio.Handle] = deque()
        self._listed = False
        self._stopped = False
        self._tasks = 0
        self.dead = False

    # What asyncio asks of a loop.

    def time(self) -> float:
        return self._timeline.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        if not self._listed and not self.dead:
            self._listed = True
            self._timeline.runnable(self)
        return handle

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if not self.dead:
            self._timeline.timer(self, handle)
        return handle

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._timeline.now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **named: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        self._tasks += 1
        return NumberedTask(coro, number=self._tasks, loop=self, **named)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.dead:
            self._complain(context)

    # What the world does with it.

    def due(self, handle: asyncio.Handle) -> None:
        """A timer has come."""
        if self.dead:
            return
        self._ready.append(handle)
        if not self._listed:
            self._listed = True
            self._timeline.runnable(self)

    def run_ready(self) -> None:
        """One turn: what is ready now."""
        self._listed = False
        if self._stopped or self.dead:
            return
        self._turn()
        if self._ready and not self._listed:
            self._listed = True
            self._timeline.runnable(self)

    def stop_running(self) -> None:
        """SIGSTOP."""
        self._stopped = True

    def go_on(self) -> None:
        """SIGCONT: what has become due meanwhile runs now."""
        self._stopped = False
        if self._ready and not self._listed:
            self._listed = True
            self._timeline.runnable(self)

    def kill(self) -> None:
        """
        SIGKILL: nothing of it runs any more, as far as the world can tell.

        What is left is taken down out of sight, because coroutines that are merely forgotten would run their ``finally`` at a
        moment that the garbage collector chooses.
        """
        self.dead = True
        for _ in range(GHOST_ROUNDS):
            tasks = sorted((t for t in asyncio.all_tasks(self)), key=lambda t: t.number)  # type: ignore[attr-defined]
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            while self._ready:
                self._turn()
        self._ready.clear()

    def _turn(self) -> None:
        ready = self._ready
        asyncio._set_running_loop(self)
        try:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)
