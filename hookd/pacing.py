"""
Pacing: who has to wait for the moment of a write is woken at that moment, not a millisecond later.

Event loops count in milliseconds: uvloop's timers are up to one late, and a host with 100 requests a second that are each
a millisecond late gets 91.  Where the kernel has timers with a file descriptor (Linux), one of them wakes the loop within
some 50 µs; elsewhere it is the loop's own.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookd.clock import Clock

WAIT_MOST_S = 1.0
"""Nobody waits for longer: only a limit that was lowered meanwhile can ask for that, and it is tried again later."""


class Pacer:
    """Where exchanges wait for their moment."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiters: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = 0
        self._loop = asyncio.get_running_loop()
        self._alarm = _kernel_alarm(self._loop, self._ring) or _LoopAlarm(self._loop, self._ring)

    def __repr__(self) -> str:
        return f"<Pacer waiting={len(self._waiters)} {type(self._alarm).__name__}>"

    async def until(self, at_mono: float) -> None:
        """Wait until then."""
        future = self._loop.create_future()
        self._numbers += 1
        heapq.heappush(self._waiters, (at_mono, self._numbers, future))
        if self._waiters[0][2] is future:
            self._alarm.set(at_mono)
        await future

    def close(self) -> None:
        """Wake nobody any more."""
        self._alarm.close()

    def _ring(self) -> None:
        now = self._clock.mono()
        waiters = self._waiters
        while waiters and (waiters[0][0] <= now or waiters[0][2].done()):
            future = heapq.heappop(waiters)[2]
            if not future.done():
                future.set_result(None)
        if waiters:
            self._alarm.set(waiters[0][0])


class _LoopAlarm:
    """The loop's own timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at_mono: float) -> None:
        """Ring then, and not at the time that was set before."""
        self.close()
        self._timer = self._loop.call_at(at_mono, self._ring)

    def close(self) -> None:
        """Do not ring."""
        if self._timer is not None:
            self._timer.cancel()


class _KernelAlarm:
    """A timerfd on CLOCK_MONOTONIC (Linux), which the loop watches as it watches sockets."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ring: Callable[[], None],
        fd: int,
        settime: Callable[[int, int], None],
    ) -> None:
        self._loop = loop
        self._ring = ring
        self._fd = fd
        self._settime = settime
        loop.add_reader(fd, self._readable)

    def set(self, at_mono: float) -> None:
        """Ring then, and not at the time that was set before."""
        # 0 would disarm it
        self._settime(self._fd, max(1, int(at_mono * 1e9)))

    def close(self) -> None:
        """Do not ring."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _readable(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # it was set anew meanwhile
        self._ring()


TFD_NONBLOCK, TFD_CLOEXEC, TFD_TIMER_ABSTIME = 0o4000, 0o2000000, 1


def _kernel_alarm(loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> _KernelAlarm | None:
    if sys.platform != "linux":
        return None
    try:
        # os.timerfd_create is there from Python 3.13 on; the C library has had it since 2008
        libc = ctypes.CDLL(None)
        fd = libc.timerfd_create(time.CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
    except (OSError, AttributeError):
        return None
    if fd < 0:
        return None
    spec = (ctypes.c_long * 4)()
    set_fd = libc.timerfd_settime

    def settime(fd: int, at_ns: int) -> None:
        # struct itimerspec: interval (none), then the time, each as seconds and nanoseconds
        spec[2], spec[3] = divmod(at_ns, 1_000_000_000)
        set_fd(fd, TFD_TIMER_ABSTIME, spec, None)

    try:
        return _KernelAlarm(loop, ring, fd, settime)
    except (OSError, NotImplementedError):
        os.close(fd)
        return None
