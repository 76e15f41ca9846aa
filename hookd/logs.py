"""
Logging: one line an occurrence, for people on a terminal and as JSON everywhere else.

Lines carry ids of deliveries, endpoints and attempts, never payloads, headers or secrets.

They are written by a thread: a pipe that nobody reads, a full disk or a terminal that is gone holds up no delivery.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO, cast

import orjson
import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookd.config import LogConfig

log = structlog.get_logger("hookd")

BURST = 20
"""Lines about failed attempts in a second; what is above is counted and said in one line."""


LINES_KEPT = 10_000
"""Lines that wait to be written, a few megabytes; what comes on top of them is lost and counted."""

LAST_LINES_S = 2.0
"""At the end of the process, for lines that are not written yet."""


TELL_AGAIN_S = 1.0
"""How often it is told that lines are lost."""


class Outlet:
    """A file descriptor that is written to by a thread of its own: whoever logs never waits for it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(LINES_KEPT)
        self._lost = self._failed = self._told = 0
        """Each is counted by one thread only: who writes, and twice the log's own."""
        self._told_mono = -TELL_AGAIN_S
        self._torn = False
        # not through sys.stderr: a thread that is stuck in there keeps the interpreter from ending
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Have a line written; it is lost if too many wait already."""
        if threading.current_thread() is self._thread:
            self._written(line)
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def flush(self) -> None:
        """Nothing: the thread writes at once."""

    def drain(self, longest_s: float = LAST_LINES_S) -> None:
        """Wait until all is written, but no longer than this."""
        until = time.monotonic() + longest_s
        while self._lines.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.005)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            lost = self._lost + self._failed - self._told
            if lost and time.monotonic() - self._told_mono >= TELL_AGAIN_S:
                self._tell(lost)
            self._written(line)
            self._lines.task_done()
            lost = self._lost + self._failed - self._told
            if lost and not self._torn and self._lines.empty():
                self._tell(lost)

    def _tell(self, lost: int) -> None:
        failed = self._failed
        log.warning("lines of the log were lost: nobody took them", count=lost)
        if self._failed == failed:
            self._told += lost
            self._told_mono = time.monotonic()
        else:
            self._failed = failed  # the notice is no line that is missed

    def _written(self, line: str) -> None:
        data = line.encode("utf-8", "backslashreplace")
        rest = memoryview(b"\n" + data if self._torn else data)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:
                    select.select((), (self._descriptor,), ())
        except (OSError, ValueError):
            self._failed += 1
            self._torn = True
        else:
            self._torn = False


class Foreign(logging.Handler):
    """What libraries log through Python's own ``logging``, in the form of the rest; it holds up nobody either."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record over."""
        try:
            said = record.getMessage()
        except (TypeError, ValueError):
            said = str(record.msg)
        log.warning("a library says", library=record.name, said=said, exc_info=record.exc_info or None)


def configure(config: LogConfig, outlet: Outlet) -> None:
    """Write as the configuration says; colours and the form for people are for a terminal on stderr."""
    console = config.format == "console" or (config.format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
        if console
        else structlog.processors.JSONRenderer(
            serializer=lambda line, **_: orjson.dumps(line, default=str).decode()
        )
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[config.level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", outlet)),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[Foreign(logging.WARNING)], force=True)


AGAIN_S = 60.0
"""How often an outage that goes on is spoken of."""


class Outage:
    """An outage of the database, from its first loss until a session lasts: said once, however often it is lost meanwhile."""

    def __init__(self, mono: Callable[[], float]) -> None:
        self._mono = mono
        self._since = self._said = 0.0
        self._times = 0
        self._refusal = ""
        self.problem = ""
        """The last one; empty outside an outage."""

    def began(self, problem: str, *, refused: bool = False) -> bool | None:
        """
        It was lost, or is still: None if that need not be said, else whether it was said before.

        That it is there and refuses us is said at once: it needs somebody who does something.
        """
        now = self._mono()
        again = bool(self.problem)
        news = refused and problem != self._refusal
        self.problem = problem or "unknown"
        self._refusal = problem if refused else self._refusal
        if not again:
            self._since, self._times = now, 0
        self._times += 1
        if again and not news and now - self._said < AGAIN_S:
            return None
        self._said = now
        return again

    def lasts(self) -> dict[str, float]:
        """For how long, and how often a session was lost or not to be had, as a log line has it."""
        return {"after_s": round(self._mono() - self._since, 1), "times": self._times}

    def over(self) -> dict[str, float]:
        """It is over; what ``lasts`` said last."""
        self.problem = self._refusal = ""
        return self.lasts()


class Throttle:
    """Lets ``BURST`` lines a second through and counts the others."""

    def __init__(self, mono: Callable[[], float]) -> None:
        self._mono = mono
        self._second = 0
        self._said = 0
        self.held_back = 0

    def allows(self) -> bool:
        """Whether one more line may be written now."""
        second = int(self._mono())
        if second != self._second:
            self._second, self._said = second, 0
        self._said += 1
        if self._said > BURST:
            self.held_back += 1
            return False
        return True

    def taken(self) -> int:
        """How many lines were held back since this was asked last."""
        held_back, self.held_back = self.held_back, 0
        return held_back
