"""
``events.toml``: what receivers are told of the events, beside what the database knows.

Read like ``config.toml``: all mistakes at once, each with its line, its path and the nearest key that exists.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import jsonschema_rs
import msgspec

from hookd.config import ConfigInvalid, Mistake, converted, lines_of, nearest, plainly

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TYPE_MOST = 255

SCHEMA_MISTAKES_SHOWN = 5

SECRET = re.compile(r"whs(?:ec|k)_[A-Za-z0-9+/=_-]{20,}")
"""What must not be published."""


class EventText(msgspec.Struct, frozen=True):
    """``[events."order.paid"]``"""

    summary: str = ""
    description: str = ""
    example: Any = None
    """JSON as it is sent, byte for byte; or a table, which is written as JSON."""
    example_file: str = ""
    schema: Any = None
    """A JSON Schema of the payload: a table, or JSON."""
    schema_file: str = ""
    deprecated: str = ""
    tenants: list[str] = msgspec.field(default_factory=list)
    """Whose documentation tells of it; empty: everybody's."""


class ChangeText(msgspec.Struct, frozen=True):
    """``[[changes]]``"""

    date: datetime.date = datetime.date.min
    text: str = ""
    types: list[str] = msgspec.field(default_factory=list)
    """The events concerned: who sees none of them is not told."""


class Head(msgspec.Struct, frozen=True):
    """The keys above the sections."""

    title: str = "Webhooks"
    introduction: str = ""
    contact: str = ""
    addresses: list[str] = msgspec.field(default_factory=list)
    """Where requests come from."""


class Described(msgspec.Struct, frozen=True):
    """An event type, ready to be shown."""

    type: str
    text: EventText = EventText()
    example: str | None = None
    """The payload, as JSON."""
    schema: dict[str, Any] | None = None


class Catalogue(msgspec.Struct, frozen=True):
    """All of ``events.toml``."""

    head: Head = Head()
    events: dict[str, Described] = msgspec.field(default_factory=dict)
    changes: list[ChangeText] = msgspec.field(default_factory=list)

    def for_tenant(self, tenant: str | None) -> Catalogue:
        """What one tenant is told; None: everything."""
        if tenant is None:
            return self
        events = {t: e for t, e in self.events.items() if not e.text.tenants or tenant in e.text.tenants}
        changes = [c for c in self.changes if not c.types or any(t in events for t in c.types)]
        return Catalogue(self.head, events, changes)


TOP: dict[str, Any] = {**get_type_hints(Head), "events": dict, "changes": list}


def read_catalogue(path: Path) -> Catalogue:
    """
    Read the file.

    Raises:
        ConfigInvalid: with every mistake that it has.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigInvalid([Mistake("", f"cannot be read: {reason}", str(path))]) from None
    return parse_catalogue(text, str(path), path.parent)


def parse_catalogue(text: str, file: str = "events.toml", folder: Path = Path()) -> Catalogue:
    """The same for a text; ``folder`` is where the files that it names are."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        where = f"{file}:{line[1]}" if line else file
        raise ConfigInvalid([Mistake("", f"this is not TOML: {error}", where)]) from None
    reader = _Reader(file, text, folder)
    catalogue = reader.read(document)
    reader.find_secrets(text)
    if reader.mistakes:
        raise ConfigInvalid(reader.mistakes)
    return catalogue


class _Reader:
    """Collects what is written, and mistakes."""

    def __init__(self, file: str, text: str, folder: Path) -> None:
        self.mistakes: list[Mistake] = []
        self._file = file
        self._folder = folder
        self._lines = {_spelled(path): line for path, line in lines_of(text)}

    def refuse(self, path: str, message: str) -> None:
        line = self._lines.get(_spelled(path)) or self._lines.get(_spelled(path.rpartition(".")[0]))
        self.mistakes.append(Mistake(path, message, f"{self._file}:{line}" if line else self._file))

    def find_secrets(self, text: str) -> None:
        for number, line in enumerate(text.splitlines(), 1):
            if SECRET.search(line):
                # not repeated
                self.mistakes.append(
                    Mistake("", "holds a signing secret; it must not be published", f"{self._file}:{number}")
                )

    def read(self, document: dict[str, Any]) -> Catalogue:
        for key in document:
            if key not in TOP:
                self.refuse(key, "there is no such key" + nearest(key, TOP))
        head = self._struct(
            Head, {k: v for k, v in document.items() if k not in ("events", "changes")}, "", TOP
        )
        for address in head.addresses:
            try:
                ipaddress.ip_network(address, strict=False)
            except ValueError:
                self.refuse("addresses", f"{address!r} is no IP address or network")
        events = self._events(document.get("events", {}))
        return Catalogue(head, events, self._changes(document.get("changes", []), events))

    def _events(self, given: Any) -> dict[str, Described]:
        if not isinstance(given, dict):
            self.refuse("events", 'write [events."order.paid"]')
            return {}
        events = {}
        for type_, values in given.items():
            path = f'events."{type_}"'
            if not isinstance(values, dict):
                self.refuse(path, f"is a section; write [{path}] above its keys")
                continue
            if (
                set(values)
                and all(isinstance(v, dict) for v in values.values())
                and not set(values) & set(EVENT)
            ):
                self.refuse(
                    path, f'a type with a dot is written in quotes: [events."{type_}.{next(iter(values))}"]'
                )
                continue
            if not type_ or len(type_) > TYPE_MOST or "*" in type_ or re.search(r"\s", type_):
                self.refuse(path, "a type has 1 to 255 characters, none of them a blank or *")
                continue
            text = self._struct(EventText, values, path, EVENT)
            example = self._example(text, path)
            schema = self._schema(text, path)
            if schema is not None and example is not None:
                self._fits(example, schema, path)
            events[type_] = Described(type_, text, example, schema)
        return events

    def _changes(self, given: Any, events: Mapping[str, Described]) -> list[ChangeText]:
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            self.refuse("changes", "write [[changes]] above each change")
            return []
        changes = []
        for n, values in enumerate(given):
            path = f"changes[{n}]"
            if isinstance(values.get("date"), datetime.datetime):
                values["date"] = values["date"].date()
            change = self._struct(ChangeText, values, path, CHANGE)
            for key in ("date", "text"):
                if not values.get(key):
                    self.refuse(path, f"lacks {key}")
            for type_ in change.types:
                if type_ not in events:
                    self.refuse(f"{path}.types", f"there is no event {type_!r}" + _meant(type_, events))
            changes.append(change)
        return sorted(changes, key=lambda c: c.date, reverse=True)

    def _struct(self, kind: Any, values: Mapping[str, Any], path: str, known: Mapping[str, Any]) -> Any:
        kinds = get_type_hints(kind)
        taken = {}
        for key, value in values.items():
            at = f"{path}.{key}" if path else key
            if key not in kinds:
                if path:
                    self.refuse(at, "there is no such key" + nearest(key, known))
                continue
            try:
                taken[key] = converted(value, kinds[key])
            except (msgspec.ValidationError, ValueError) as error:
                self.refuse(at, plainly(str(error)))
        return kind(**taken)

    def _example(self, text: EventText, path: str) -> str | None:
        given = self._given(text.example, text.example_file, path, "example")
        if given is None:
            return None
        if not isinstance(given, str):
            try:
                return json.dumps(given, ensure_ascii=False)
            except TypeError:
                self.refuse(f"{path}.example", "has a date or time, which JSON has not; write it as text")
                return None
        try:
            json.loads(given)
        except (ValueError, RecursionError) as error:
            self.refuse(f"{path}.example", f"is no JSON: {error}")
            return None
        return given.strip()

    def _schema(self, text: EventText, path: str) -> dict[str, Any] | None:
        given = self._given(text.schema, text.schema_file, path, "schema")
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError) as error:
                self.refuse(f"{path}.schema", f"is no JSON: {error}")
                return None
        if given is None:
            return None
        if not isinstance(given, dict):
            self.refuse(f"{path}.schema", "must be a table, or a JSON object")
            return None
        try:
            json.dumps(given)
            _validator(given)
        except TypeError:
            self.refuse(f"{path}.schema", "has a date or time, which JSON has not; write it as text")
            return None
        except (ValueError, jsonschema_rs.ReferencingError) as error:
            self.refuse(f"{path}.schema", f"is no JSON Schema: {_first_line(error)}")
            return None
        return given

    def _given(self, inline: Any, file: str, path: str, key: str) -> Any:
        if not file:
            return inline
        at = f"{path}.{key}_file"
        if inline is not None:
            self.refuse(at, f"say either {key} or {key}_file")
        try:
            found = (self._folder / file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            self.refuse(at, f"{file} cannot be read: {reason}")
            return None
        if SECRET.search(found):
            self.refuse(at, f"{file} holds a signing secret; it must not be published")
        return found

    def _fits(self, example: str, schema: dict[str, Any], path: str) -> None:
        wrong = list(_validator(schema).iter_errors(json.loads(example)))
        for error in wrong[:SCHEMA_MISTAKES_SHOWN]:
            where = ".".join(map(str, error.instance_path))
            self.refuse(
                f"{path}.example",
                f"does not fit its schema: {f'{where}: ' if where else ''}{_first_line(error.message)}",
            )


EVENT = get_type_hints(EventText)
CHANGE = get_type_hints(ChangeText)


def _validator(schema: dict[str, Any]) -> Any:
    def nothing_from_elsewhere(uri: str) -> Any:
        raise ValueError(f"{uri} is elsewhere: put it under $defs")

    return jsonschema_rs.validator_for(schema, retriever=nothing_from_elsewhere)


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [""])[0]


def _meant(type_: str, events: Mapping[str, Described]) -> str:
    return nearest(type_, events) if events else ""


def _spelled(path: str) -> str:
    """A path without the quotes and blanks that TOML leaves to taste."""
    return re.sub(r"[\"'\s]", "", path)


def types_of(catalogue: Catalogue) -> Iterator[Described]:
    """Its events by name."""
    yield from (catalogue.events[name] for name in sorted(catalogue.events))
