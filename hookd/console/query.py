"""What the fields and the search line of a list ask for: text from a URL to a ``Filter``."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from uuid import UUID

from hookd.config import duration
from hookd.postgres.search import STATES, BadFilter, Filter

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

FIELDS = (
    "event",
    "delivery",
    "endpoint",
    "tenant",
    "type",
    "state",
    "outcome",
    "status",
    "path",
    "replayed",
    "since",
    "until",
)
"""Names in the URL."""

WORD = re.compile(r"""([A-Za-z_][\w.\-]*):("(?:[^"\\]|\\.)*"|\S*)|(\S+)""")

TIME_HINT = "write 30m, 2h or 7d for so long ago, or 2026-11-25 14:00 (UTC)"


@dataclass(frozen=True, slots=True)
class Query:
    """What a list was asked for: its fields as they were typed, what they mean, and the place in the list."""

    path: str
    filter: Filter = field(default_factory=Filter)
    typed: Mapping[str, str] = field(default_factory=dict)
    cursor: str | None = None

    def url(self, cursor: str | None) -> str:
        """The same search at another place."""
        return self.at(self.path, cursor)

    def at(self, path: str, cursor: str | None = None) -> str:
        """The same fields on another page."""
        fields = dict(self.typed) | ({"cursor": cursor} if cursor else {})
        return f"{path}?{urlencode(fields)}" if fields else path


def read(path: str, given: Mapping[str, str], known: Collection[str], now: datetime.datetime) -> Query:
    """
    The fields of a URL; those that a list does not know are left out.

    Raises:
        BadFilter: one cannot be read.
    """
    typed = typed_of(given, known)
    for name, text in typed.items():
        if not text.isprintable():
            raise BadFilter(f"{name}: there is a character in it that does not print")
    values: dict[str, Any] = {}
    for name, text in typed.items():
        if name in ("event", "endpoint"):
            values[name] = uuid(text, name)
        elif name in ("delivery", "status"):
            values[name] = _number(text, name)
        elif name == "state":
            values["states"] = tuple(filter(None, re.split(r"[,\s]+", text)))
        elif name in ("since", "until"):
            values[name] = _time(text, name, now)
        elif name == "replayed":
            values[name] = {"yes": True, "no": False}.get(text)
        else:
            values[name] = text
    return Query(path, Filter(**values), typed, given.get("cursor") or None)


def typed_of(given: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
    """The fields that say something."""
    names = {"state" if name == "states" else name for name in known}
    return {n: given[n].strip() for n in FIELDS if n in names and given.get(n, "").strip()}


def words(line: str) -> dict[str, str]:
    """
    A line of ``name:value`` as fields: ``state:exhausted tenant:acme data.id:123``.

    Raises:
        BadFilter: a word is none of them.
    """
    found: dict[str, str] = {}
    for match in WORD.finditer(line):
        name, value, bare = match.groups()
        if bare is not None:
            found |= _bare(bare)
            continue
        if value.startswith('"'):
            value = _unquoted(value)
        if name in FIELDS:
            found[name] = value
        elif name.startswith(("data.", "payload.")):
            found["path"] = path_to(name.partition(".")[2], value)
        else:
            raise BadFilter(
                f"{name!r} is nothing to search by: {', '.join(FIELDS)}, or data.KEY for a value in the payload"
            )
    return found


def _unquoted(text: str) -> str:
    """
    What is between quotes, as JSON has it.

    Raises:
        BadFilter: they do not end, or what is between them cannot be written in UTF-8.
    """
    try:
        said = str(json.loads(text))
        said.encode()
    except ValueError:
        raise BadFilter(f"{text[:50]} is no text between quotes") from None
    return said


def _bare(word: str) -> dict[str, str]:
    if word in STATES:
        return {"state": word}
    return {"type": word}


def path_to(keys: str, value: str) -> str:
    """The SQL/JSON path for ``id.of`` being equal to a value, which is a text unless it reads as something else."""
    steps = "".join(f".{json.dumps(key)}" for key in keys.split(".") if key)
    try:
        literal = (
            value.strip() if isinstance(json.loads(value), int | float | bool | None) else json.dumps(value)
        )
    except (ValueError, RecursionError):
        literal = json.dumps(value)
    return f"${steps} ? (@ == {literal})"


def uuid(text: str, name: str) -> UUID:
    """
    An id.

    Raises:
        BadFilter: it is none.
    """
    try:
        return UUID(text)
    except ValueError:
        raise BadFilter(f"{name}: {text[:50]!r} is no id") from None


def _number(text: str, name: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    raise BadFilter(f"{name}: {text[:50]!r} is no number")


def _time(text: str, name: str, now: datetime.datetime) -> datetime.datetime:
    try:
        return now - datetime.timedelta(seconds=duration(text))
    except (ValueError, OverflowError):
        pass
    try:
        at = datetime.datetime.fromisoformat(text.removesuffix("UTC").strip())
    except ValueError:
        raise BadFilter(f"{name}: {text[:50]!r} is no time; {TIME_HINT}") from None
    return at if at.tzinfo is not None else at.replace(tzinfo=datetime.UTC)
