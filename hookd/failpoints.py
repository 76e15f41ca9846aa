"""
Failpoints: where a daemon can be told to die, at the moments where that is worst.

Only for tests of a crash: ``HOOKD_FAILPOINT="commit-sent=crash@37"`` kills the process when it passes that moment for the
37th time.  ``crash`` is SIGKILL; ``pause`` is SIGSTOP, so that whoever tests may look around before SIGCONT.

A kill at a random time hardly ever hits a window of microseconds; these are hit each time.  A moment is the beginning or
the end of a method, and only those that are named are wrapped: without the variable nothing is different.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import re
import signal
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import structlog

from hookd.feed import Feed
from hookd.net.exchange import Attempt
from hookd.net.line import Line
from hookd.postgres.owner import OwnerSession
from hookd.postgres.queue import Queue
from hookd.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger("hookd")

ACTIONS = {"crash": signal.SIGKILL, "pause": signal.SIGSTOP}

SPELLING = re.compile(r"([a-z-]+)=([a-z]+)(?:@([1-9][0-9]*))?")


class FailpointUnknown(ValueError):
    """``HOOKD_FAILPOINT`` cannot be understood; the message says what would be."""


class When(Enum):
    """Where in a method the moment is."""

    BEFORE = "before"
    AFTER = "after"
    SOON = "soon"
    """After it, when the event loop has written what it wrote."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A method, and where in it."""

    owner: type
    method: str
    when: When


MOMENTS: dict[str, tuple[Moment, ...]] = {
    "before-send": (Moment(Line, "ask", When.BEFORE),),
    "after-send": (Moment(Line, "ask", When.SOON),),
    "answer-read": (Moment(Attempt, "answered", When.BEFORE),),
    "verdict-queued": (Moment(Recorder, "add", When.AFTER),),
    "batch-built": (Moment(OwnerSession, "settle", When.BEFORE),),
    # The last step inside the transaction: COMMIT is written in the same turn of the event loop.
    "commit-sent": (Moment(OwnerSession, "_settle_consequences", When.SOON),),
    "commit-answered": (Moment(OwnerSession, "settle", When.AFTER),),
    "memory-cleaned": (Moment(Feed, "settled", When.SOON),),
    "shard-released": (Moment(OwnerSession, "release", When.AFTER),),
    "recovery-page": (
        Moment(Queue, "recover", When.AFTER),
        Moment(Queue, "refill_fresh", When.AFTER),
        Moment(Queue, "refill_due", When.AFTER),
    ),
}
"""In the order in which a delivery passes them; a page of a refill counts as one of recovery, which reads by these."""


class Failpoint:
    """One armed moment: it counts, and acts once."""

    def __init__(self, number: signal.Signals, nth: int) -> None:
        self._number = number
        self._left = nth

    def passed(self) -> None:
        """It has come this far once more."""
        if self._comes():
            self._act()

    def passed_soon(self) -> None:
        """The same, to act when the event loop has written what waits to be written."""
        if self._comes():
            asyncio.get_running_loop().call_soon(self._act)

    def _comes(self) -> bool:
        self._left -= 1
        return self._left == 0

    def _act(self) -> None:
        os.kill(os.getpid(), self._number)


def arm(wanted: str) -> None:
    """
    Wrap what ``wanted`` names: ``NAME=ACTION[@N]``, several of them with commas; nothing if it is empty.

    Raises:
        FailpointUnknown: it names no moment, or no action, or no number.
    """
    chosen = [_parsed(part.strip()) for part in wanted.split(",") if part.strip()]
    for name, failpoint in chosen:
        for moment in MOMENTS[name]:
            original = getattr(moment.owner, moment.method)
            setattr(moment.owner, moment.method, _wrapped(original, moment.when, failpoint))
        log.warning("this daemon is told to fail: for tests only", failpoint=wanted)


def _parsed(part: str) -> tuple[str, Failpoint]:
    match = SPELLING.fullmatch(part)
    if match is None:
        raise FailpointUnknown(
            f"HOOKD_FAILPOINT: {part!r} is not of the form NAME=crash@N or NAME=pause@N, N from 1"
        )
    name, action, nth = match.groups()
    if name not in MOMENTS:
        raise FailpointUnknown(f"HOOKD_FAILPOINT: {name} is none of {', '.join(MOMENTS)}")
    if action not in ACTIONS:
        raise FailpointUnknown(f"HOOKD_FAILPOINT: {action} is none of {', '.join(ACTIONS)}")
    return name, Failpoint(ACTIONS[action], int(nth or 1))


def _wrapped(original: Callable[..., Any], when: When, failpoint: Failpoint) -> Callable[..., Any]:
    passed = failpoint.passed_soon if when is When.SOON else failpoint.passed
    if when is When.BEFORE:

        @functools.wraps(original)
        def before(*args: Any, **named: Any) -> Any:
            passed()
            return original(*args, **named)

        return before
    if inspect.iscoroutinefunction(inspect.unwrap(original)):

        @functools.wraps(original)
        async def after_waiting(*args: Any, **named: Any) -> Any:
            result = await original(*args, **named)
            passed()
            return result

        return after_waiting

    @functools.wraps(original)
    def after(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        passed()
        return result

    return after
