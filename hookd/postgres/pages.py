"""
Pages of long lists, newest first: by key, never by offset, never counted, and never longer than a moment.

A list is looked through in windows of time, from the newest backwards (or forwards, for the page before).  How wide a
window is follows from how long the last one took, so it does not matter how much lies between two rows that match, nor
whether an index knows the filter.  When the time for one page is up, the page is what was found by then: it may be short,
or empty, and says how far it looked; its ``older`` goes on from there.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

import asyncpg
import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOK_S = 0.06
"""For so long one page looks."""

STEP_S = 0.02
"""What one window should take."""

WINDOW_MOST_S = 0.1
"""When one takes longer it is broken off and tried again, narrower: where few rows lay, many may follow."""

PROBE_ROWS = 2000
"""The first window is as wide as so many rows."""

NARROWEST = datetime.timedelta(milliseconds=1)

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

LATEST = datetime.datetime(9000, 1, 1, tzinfo=datetime.UTC)
"""Times that are asked for lie between ``EPOCH`` and here: beyond, adding to them would overflow."""

LAST_MS = (LATEST - EPOCH) // datetime.timedelta(milliseconds=1)
"""An id that somebody chose may say more."""

Key = tuple[Any, ...]
"""What a list is sorted by; the first is a time, or an event's id, which begins with one."""


class BadCursor(ValueError):
    """This is no place in this list."""


class TooMuch(Exception):
    """Even the narrowest window took too long."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows of a list, newest first."""

    rows: list[dict[str, Any]]
    older: str | None
    """The cursor of the next page; None: there is nothing older."""
    newer: str | None
    """The cursor of the page before, which on the newest page brings what came since."""
    looked_back_to: datetime.datetime | None
    """How far was looked; None: to the end of the list."""


class Listing(Protocol):
    """A list that can be looked through in windows; its keys fall from row to row."""

    name: str

    async def edges(
        self, at: datetime.datetime | None, rows: int, *, newer: bool
    ) -> tuple[datetime.datetime | None, datetime.datetime | None, datetime.datetime | None]:
        """Times of the first row beyond a time, of the one so many rows further on, and of the last of all."""
        ...

    async def window(
        self, place: Key, bound: datetime.datetime, limit: int, *, newer: bool
    ) -> list[dict[str, Any]]:
        """Matching rows beyond ``place`` and not beyond ``bound``, nearest first."""
        ...

    def place_at(self, at: datetime.datetime) -> Key:
        """The key just before all rows of that time."""
        ...

    def key_of(self, row: dict[str, Any]) -> Key:
        """The key of a row."""
        ...


@dataclass(slots=True)
class _Look:
    """How far one page has got."""

    rows: list[dict[str, Any]]
    place: Key
    ended: bool = False


async def page(
    listing: Listing,
    cursor: str | None = None,
    limit: int = 50,
    *,
    since: datetime.datetime | None = None,
    until: datetime.datetime | None = None,
    look_s: float = LOOK_S,
) -> Page:
    """
    One page of a list.

    ``since`` and ``until`` bound its time (the second is excluded).

    Raises:
        BadCursor: ``cursor`` is none of this list.
        TooMuch: PostgreSQL takes too long.
    """
    since, until = within_reason(since), within_reason(until)
    newer, place = (False, None) if cursor is None else _decoded(listing, cursor)
    if newer and place is not None:
        look = await _forwards(listing, place, limit, until, look_s)
        return _page(listing, look, limit, newer=True, started=place)
    if place is None and until is not None:
        place = listing.place_at(until)
    look = await _backwards(listing, place, limit, since, look_s)
    return _page(listing, look, limit, newer=False, started=place)


def _page(listing: Listing, look: _Look, limit: int, *, newer: bool, started: Key | None) -> Page:
    rows = look.rows[:limit]
    more = len(look.rows) > limit
    if newer:
        rows.reverse()
        first = listing.key_of(rows[0]) if rows else (started if look.ended else look.place)
        last = listing.key_of(rows[-1]) if rows else started
        assert first is not None
        assert last is not None
        # what is older than this page is known to be there: it came from there
        inclusive = None if rows else _encoded(listing, "o", _just_after(last))
        return Page(
            rows,
            _encoded(listing, "o", last) if rows else inclusive,
            _encoded(listing, "n", look.place if not more and not look.ended else first),
            None,
        )
    first = listing.key_of(rows[0]) if rows else started
    if more:
        older, back_to = _encoded(listing, "o", listing.key_of(rows[-1])), None
        back_to = _time(listing.key_of(rows[-1]))
    elif look.ended:
        older, back_to = None, None
    else:
        older, back_to = _encoded(listing, "o", look.place), _time(look.place)
    return Page(rows, older, None if first is None else _encoded(listing, "n", first), back_to)


async def _backwards(
    listing: Listing, place: Key | None, limit: int, since: datetime.datetime | None, look_s: float
) -> _Look:
    # rows of the place's own time may lie on either side of it
    below = None if place is None else _time(place) + NARROWEST * 2
    newest, further, oldest = await listing.edges(below, PROBE_ROWS, newer=False)
    if newest is None or oldest is None:
        return _Look([], place or listing.place_at(EPOCH), ended=True)
    if place is None:
        place = listing.place_at(newest + NARROWEST * 2)
    floor = oldest if since is None else max(oldest, since)
    look = _Look([], place)
    upper = min(_time(place), newest + NARROWEST * 2)
    width = _Width(upper - further if further is not None else upper - floor)
    until_s = time.monotonic() + look_s
    while len(look.rows) <= limit:
        lower = max(floor, upper - width.width)
        found = await width.timed(listing.window(look.place, lower, limit + 1 - len(look.rows), newer=False))
        if found is None:
            continue
        look.rows += found
        if len(look.rows) > limit:
            break
        upper, look.place = lower, listing.place_at(lower)
        if lower <= floor:
            look.ended = True
            break
        if time.monotonic() >= until_s:
            break
    return look


async def _forwards(
    listing: Listing, place: Key, limit: int, until: datetime.datetime | None, look_s: float
) -> _Look:
    lower = _time(place)
    # where there is nothing for a while the first window reaches beyond it
    nearest, further, newest = await listing.edges(lower + NARROWEST * 2, PROBE_ROWS, newer=True)
    if newest is None:
        return _Look([], place, ended=True)
    ceiling = newest + NARROWEST * 2
    if until is not None:
        ceiling = min(ceiling, until)
    if nearest is None:
        nearest = lower
    look = _Look([], place)
    width = _Width(further - nearest if further is not None else ceiling - lower)
    until_s = time.monotonic() + look_s
    while len(look.rows) <= limit and lower < ceiling:
        upper = min(ceiling, max(lower, nearest) + width.width)
        found = await width.timed(listing.window(look.place, upper, limit + 1 - len(look.rows), newer=True))
        if found is None:
            continue
        look.rows += found
        if len(look.rows) > limit:
            return look
        lower, look.place = upper, listing.place_at(upper)
        if time.monotonic() >= until_s:
            break
    look.ended = lower >= ceiling
    return look


async def earliest(
    listing: Listing, since: datetime.datetime, look_s: float = LOOK_S
) -> dict[str, Any] | None:
    """
    The first matching row from then on; None: there is none.

    Raises:
        TooMuch: it was not found in that time.
    """
    look = await _forwards(listing, listing.place_at(since), 0, None, look_s)
    if not look.rows and not look.ended:
        raise TooMuch("it was not found in a moment")
    return look.rows[0] if look.rows else None


class _Width:
    """How wide the next window is."""

    def __init__(self, width: datetime.timedelta) -> None:
        self.width = max(width, NARROWEST)

    async def timed(self, window: Any) -> list[dict[str, Any]] | None:
        """What a window brings, and a better width for the next; None: it was too wide."""
        begun = time.monotonic()
        try:
            # the narrowest has to succeed, as long as PostgreSQL lets it
            async with asyncio.timeout(WINDOW_MOST_S if self.width > NARROWEST else None):
                found: list[dict[str, Any]] = await window
        except (asyncpg.QueryCanceledError, TimeoutError):
            if self.width <= NARROWEST:
                raise TooMuch("a search took too long; name an event, an endpoint or a time") from None
            self.width = max(self.width / 32, NARROWEST)
            return None
        factor = STEP_S / max(time.monotonic() - begun, STEP_S / 8)
        self.width = max(self.width * max(factor, 0.25), NARROWEST)
        return found


# Cursors.


def _encoded(listing: Listing, direction: str, key: Key) -> str:
    said = orjson.dumps([listing.name, direction, *key], default=_plain)
    return base64.urlsafe_b64encode(said).rstrip(b"=").decode()


def _plain(value: Any) -> Any:
    return str(value)


def _decoded(listing: Listing, cursor: str) -> tuple[bool, Key]:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars="-_", validate=True)
        name, direction, first, *rest = orjson.loads(raw)
        like = listing.place_at(EPOCH)
        if name != listing.name or direction not in ("n", "o") or len(rest) != len(like) - 1:
            raise BadCursor
        if not isinstance(first, str) or not all(type(n) is int and abs(n) < 1 << 62 for n in rest):
            raise BadCursor
        key = UUID(first) if isinstance(like[0], UUID) else datetime.datetime.fromisoformat(first)
        _time((key,)).astimezone(datetime.UTC)
    except (ValueError, binascii.Error, TypeError, OverflowError):
        raise BadCursor("this is no cursor of this list; take it from the page before, as it is") from None
    return direction == "n", (key, *rest)


def _just_after(key: Key) -> Key:
    """The key behind a row, so that what is older begins with the row itself."""
    last = key[-1]
    return (*key[:-1], UUID(int=last.int + 1) if isinstance(last, UUID) else last + 1)


# Keys.


def _time(key: Key) -> datetime.datetime:
    """The time of a key."""
    first = key[0]
    return time_of(first) if isinstance(first, UUID) else first


def time_of(event_id: UUID) -> datetime.datetime:
    """When an event's id was made, to the millisecond."""
    return EPOCH + datetime.timedelta(milliseconds=min(event_id.int >> 80, LAST_MS))


def within_reason(at: datetime.datetime | None) -> datetime.datetime | None:
    """A time that can be reckoned with."""
    return None if at is None else min(max(at, EPOCH), LATEST)


def floor_of(at: datetime.datetime) -> UUID:
    """The smallest event id of that millisecond."""
    since = max(at, EPOCH) - EPOCH
    return UUID(int=(since // datetime.timedelta(milliseconds=1)) << 80)


def ordered(statement: str) -> tuple[str, str]:
    """
    A statement for older rows and one for newer rows.

    Places in it: ``{beyond}`` a key, ``{within}`` a bound, ``{order}`` and its ``{opposite}``, ``{from}`` a time on.
    """
    return (
        statement.format(**{"beyond": "<", "within": ">=", "order": "desc", "opposite": "asc", "from": "<"}),
        statement.format(**{"beyond": ">", "within": "<", "order": "asc", "opposite": "desc", "from": ">="}),
    )


def dictionaries(rows: Sequence[asyncpg.Record]) -> list[dict[str, Any]]:
    """Records as dictionaries."""
    return [dict(row) for row in rows]
