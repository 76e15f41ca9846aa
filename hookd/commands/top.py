"""``hookd top``: what ``hookd status`` shows, live."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import termios
import tty
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from hookd.commands import drawing
from hookd.commands.drawing import Line, fact
from hookd.commands.session import (
    Failed,
    bring_up_to_date,
    database_of,
    options,
    plain_failures,
    print_json,
)
from hookd.config import DURATION, duration, load
from hookd.core.words import per_second, several

if TYPE_CHECKING:
    import datetime
    from collections.abc import Callable, Coroutine, Mapping

    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.postgres.connect import Database
    from hookd.postgres.status import Status

T = TypeVar("T")

EVERY_LEAST_S = 0.1

SHARE = 0.2
"""Of the time that may be spent on reading: a reading that is slow is not asked for again at once."""

RATES_OVER_S = 2.0
"""A daemon publishes once a second, so two readings that are closer may show the same summary."""

FIRST_DEADLINE_S = 3.0
FIRST_PAUSE_S = 0.2
"""For plain frames: the first one waits until there are two summaries to compare."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second, over all daemons."""

    attempts: float
    delivered: float
    failed: float


@dataclass(frozen=True, slots=True)
class Frame:
    """What is shown at one moment."""

    now: Status
    rates: Rates | None
    """None until two summaries can be compared."""

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return self.now.facts() | {
            "rates": self.rates,
            "in_flight": self.now.total("in_flight"),
            "waiting": self.now.total("waiting"),
        }


def frame(before: Status | None, now: Status) -> Frame:
    """What two readings show together."""
    if before is None:
        return Frame(now, None)
    earlier = {node["id"]: node for node in before.nodes}
    rates = [r for node in now.nodes if (r := rates_of(earlier.get(node["id"]), node, before.at)) is not None]
    if not rates:
        return Frame(now, None)
    return Frame(
        now,
        Rates(sum(r.attempts for r in rates), sum(r.delivered for r in rates), sum(r.failed for r in rates)),
    )


def rates_of(
    earlier: Mapping[str, Any] | None, node: Mapping[str, Any], read_at: datetime.datetime
) -> Rates | None:
    """
    One daemon's rates, by the difference of its counters; None where it has said nothing new.

    Counters that went back, or that began after the earlier reading, count from zero.
    """
    since = earlier["summary"]["at"] if earlier is not None else read_at.timestamp()
    before: Mapping[str, int] = earlier["summary"]["verdicts"] if earlier is not None else {}
    counted: Mapping[str, int] = node["summary"]["verdicts"]
    started = node["started_at"].timestamp()
    if earlier is None and started < since:
        # it was silent until now: nobody knows since when it has counted
        return None
    if any(counted.get(kind, 0) < count for kind, count in before.items()):
        before = {}
    if not before:
        since = max(since, started)
    seconds: float = node["summary"]["at"] - since
    if seconds <= 0:
        return None

    grown = {kind: (count - before.get(kind, 0)) / seconds for kind, count in counted.items()}
    delivered, failed = grown.get("delivered", 0.0), grown.get("retry", 0.0) + grown.get("exhausted", 0.0)
    return Rates(delivered + failed, delivered, failed)


class Readings:
    """The last readings, so that each is compared with one that is old enough."""

    def __init__(self) -> None:
        self._kept: deque[Status] = deque()

    def frame(self, now: Status) -> Frame:
        """A new reading, with what came before it."""
        while len(self._kept) > 1 and (now.at - self._kept[1].at).total_seconds() >= RATES_OVER_S:
            self._kept.popleft()
        made = frame(self._kept[0] if self._kept else None, now)
        self._kept.append(now)
        return made


# Drawing.


def head(shown: Frame, width: int | None, hint: str = "", problem: str = "") -> list[Line]:
    """The lines above the lanes."""
    from hookd.postgres.status import COUNT_MOST  # noqa: PLC0415 - not for --help

    now, rates = shown.now, shown.rates
    rate = ["not known yet"]
    if rates is not None:
        rate = [
            f"{per_second(rates.attempts)} attempts",
            f"{per_second(rates.delivered)} delivered",
            f"{per_second(rates.failed)} failed",
        ]
    title = f"hookd top  {now.at:%H:%M:%S} UTC{hint}"
    return [
        Line(problem, "bad") if problem else Line(title, "head"),
        *(drawing.daemons(now.silent, now.at, width) if now.silent or not now.nodes else []),
        *drawing.unowned(now.nodes, now.queue["shards"]),
        *fact(
            "now",
            [
                f"{now.total('in_flight'):,} in flight",
                f"{now.total('waiting'):,} in memory",
                several(len(now.nodes), "daemon"),
            ],
            width,
        ),
        *fact("rates", rate, width),
        *drawing.queue(now.queue, now.at, COUNT_MOST, width),
    ]


def page(
    shown: Frame, width: int | None, height: int | None, hint: str = "", problem: str = ""
) -> list[Line]:
    """A whole frame: as many lanes as fit, and how many do not."""
    lines = head(shown, width, hint, problem)
    if not shown.now.lanes:
        return lines
    heading, *blocks = drawing.lanes(shown.now.lanes, width)
    lines += [Line(""), *heading]
    left_out = shown.now.lanes_left_out
    for n, block in enumerate(blocks):
        remain = len(blocks) - n - 1 + left_out
        if height is not None and len(lines) + len(block) + (remain > 0) > height:
            left_out += len(blocks) - n
            break
        lines += block
    return [*lines, Line(f"{left_out} more", "dim")] if left_out else lines


# The terminal.

ENTER = "\x1b[?1049h\x1b[?25l"
LEAVE = "\x1b[?25h\x1b[?1049l"
"""The alternate screen, without a cursor."""

ESCAPE = b"\x1b"
"""The key alone; others begin with it."""


class Screen:
    """The whole terminal, as long as it is entered; keys come one by one and are not echoed."""

    def __init__(self) -> None:
        self._keys = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._saved: list[Any] | None = None

    def __enter__(self) -> Self:
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def _take(self) -> None:
        if self._keys is not None:
            self._saved = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys, termios.TCSANOW)
        self._write(ENTER)

    def _give_back(self) -> None:
        self._write(LEAVE)
        if self._keys is not None and self._saved is not None:
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._saved)

    def listen(self, events: Events) -> None:
        """Tell of keys, and of signals that have to do with a terminal."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGWINCH, events.changed.set)
        loop.add_signal_handler(signal.SIGTSTP, self._suspend, events)
        if self._keys is not None:
            loop.add_reader(self._keys, self._pressed, self._keys, events)

    def draw(self, lines: list[Line], width: int, height: int) -> None:
        """Show these; each line is cleared before it is written, so nothing flickers or wraps."""
        colour = drawing.coloured()
        rows = [
            f"\x1b[{n};1H\x1b[2K{drawing.painted(line, width, colour=colour)}"
            for n, line in enumerate(lines[:height], 1)
        ]
        rest = f"\x1b[{len(rows) + 1};1H\x1b[J" if len(rows) < height else ""
        self._write("".join(rows) + rest)

    def _pressed(self, keys: int, events: Events) -> None:
        try:
            typed = os.read(keys, 64)
        except OSError:
            typed = b""
        if not typed or b"q" in typed.lower() or typed == ESCAPE:
            events.leave()

    def _suspend(self, events: Events) -> None:
        """Ctrl-Z: give the terminal back, and take it again afterwards."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()
        events.changed.set()

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class Events:
    """What happens while ``top`` waits."""

    def __init__(self) -> None:
        self.left = False
        self.changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.leave)

    def leave(self) -> None:
        """End."""
        self.left = True
        self.changed.set()

    async def unless_left(
        self, work: Coroutine[Any, Any, T], changed: Callable[[], None] | None = None
    ) -> T | None:
        """What comes of some work; None if it was left meanwhile.  ``changed`` is called at other events."""
        task = asyncio.create_task(work)
        while not task.done():
            event = asyncio.create_task(self.changed.wait())
            await asyncio.wait({task, event}, return_when=asyncio.FIRST_COMPLETED)
            event.cancel()
            if self.left:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return None
            if self.changed.is_set():
                self.changed.clear()
                if changed is not None:
                    changed()
        return task.result()

    async def within(self, seconds: float) -> bool:
        """Whether something happens within so many seconds."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self.changed.wait()
        except TimeoutError:
            return False
        self.changed.clear()
        return True


# Reading.


class Reader:
    """A session that looks at the status again and again, and connects again when it is lost."""

    def __init__(self, database: Database, config: Config) -> None:
        self._database = database
        self._config = config
        self._connection: asyncpg.Connection | None = None

    async def read(self, lanes: int) -> Status:
        """
        One reading.

        Raises:
            DatabaseUnavailable: trying again may help.
        """
        from hookd.postgres.connect import unavailable  # noqa: PLC0415 - not for --help
        from hookd.postgres.status import status  # noqa: PLC0415

        if self._connection is None:
            connection = await self._database.connect("top")
            try:
                await bring_up_to_date(connection, self._config)
            except BaseException:
                connection.terminate()
                raise
            self._connection = connection
        try:
            return await status(self._connection, lanes)
        except Exception as error:
            lost = unavailable(error)
            if lost is None:
                raise
            self.close()
            raise lost from error

    def close(self) -> None:
        """End the session."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


@click.command()
@click.option(
    "--every", default="1s", show_default=True, metavar="DURATION", help="Look again after so long."
)
@click.option("--once", is_flag=True, help="One plain frame.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="So many plain frames.")
@click.option(
    "--lanes",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="In plain frames and JSON; on a terminal as many as fit.",
)
@options
@click.pass_obj
def top(invocation: Invocation, every: str, count: int | None, lanes: int, *, once: bool) -> None:
    """
    How everything is doing, live.  q leaves.

    It asks PostgreSQL only, so it works from anywhere.  Where the output is no terminal, or with --once or --count, frames
    are printed one after another; with --json one object each.
    """
    every_s = duration(every) if DURATION.fullmatch(every) else 0.0
    if every_s < EVERY_LEAST_S:
        raise Failed(f'--every {every}: write a duration of 100ms or more, for example "500ms" or "2s"', 2)
    frames = 1 if once else count
    live = frames is None and not invocation.json and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    config = load(invocation.config_file).config
    with database_of(config) as database, plain_failures():
        reader = Reader(database, config)
        if live:
            asyncio.run(_full_screen(reader, every_s))
        else:
            asyncio.run(_print_frames(reader, every_s, frames, lanes, as_json=invocation.json))


async def _print_frames(
    reader: Reader, every_s: float, frames: int | None, lanes: int, *, as_json: bool
) -> None:
    events, readings, printed = Events(), Readings(), 0
    clock = asyncio.get_running_loop().time
    until = clock() + FIRST_DEADLINE_S
    try:
        while (now := await events.unless_left(reader.read(lanes))) is not None:
            shown = readings.frame(now)
            if not printed and shown.rates is None and now.nodes and clock() < until:
                await events.within(FIRST_PAUSE_S)
                continue
            if as_json:
                print_json(shown.facts())
            else:
                drawing.show(
                    [*([Line("")] if printed else []), *page(shown, drawing.width_of_terminal(), None)]
                )
            printed += 1
            if printed == frames:
                return
            await events.within(every_s)
    finally:
        reader.close()


async def _full_screen(reader: Reader, every_s: float) -> None:
    from hookd.postgres.connect import DatabaseUnavailable  # noqa: PLC0415 - not for --help

    events, readings = Events(), Readings()
    clock = asyncio.get_running_loop().time
    hint = f"  every {every_s:g} s, q leaves"
    shown: Frame | None = None
    problem = ""

    def draw() -> None:
        if shown is not None:
            width, height = shutil.get_terminal_size()
            screen.draw(page(shown, width, height, hint, problem), width, height)

    with Screen() as screen:
        screen.listen(events)
        try:
            while not events.left:
                begun = clock()
                try:
                    lanes = shutil.get_terminal_size().lines
                    now = await events.unless_left(reader.read(lanes), changed=draw)
                except DatabaseUnavailable as error:
                    if shown is None:
                        raise
                    problem, pause_s = f"PostgreSQL is away, trying again: {error}", every_s
                else:
                    if now is None:
                        return
                    shown, problem = readings.frame(now), ""
                    # however slow PostgreSQL is, looking at it must not be what keeps it busy
                    pause_s = max(every_s - (clock() - begun), (clock() - begun) * (1 / SHARE - 1))
                draw()
                until = clock() + pause_s
                while not events.left and await events.within(until - clock()):
                    draw()
        finally:
            reader.close()
