"""
Operations of the API: a handler's signature says what comes in and what goes out, and this module makes it so.

Parameters of a handler, by name: ``id`` and ``number`` come from the path, ``query`` is a type whose fields are the query's, ``body`` is
a type that the JSON body has to be, ``caller`` is who asks.  What it returns is written as JSON.  The same signatures are
the OpenAPI document: there is no other description that could differ.
"""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import asyncpg
import msgspec
from aiohttp import web

from hookd.admin.access import ACTOR_HEADER
from hookd.admin.problems import Refused, problem
from hookd.postgres.audit import Actor
from hookd.postgres.pages import BadCursor, TooMuch
from hookd.postgres.reading import Busy
from hookd.postgres.search import BadFilter

if TYPE_CHECKING:
    from collections.abc import Callable

Caller = Actor
"""Who asks."""

Value = TypeVar("Value")
Handler = TypeVar("Handler", bound="Callable[..., Any]")

PREFIX = "/api/v1"

ENCODER = msgspec.json.Encoder()

MARK = "_operation"


@dataclass(frozen=True, slots=True)
class Reply(Generic[Value]):
    """An answer whose status depends."""

    value: Value
    status: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path."""

    method: str
    path: str
    statuses: tuple[int, ...]
    """Of what went well."""
    name: str
    said: str
    """What it does: a sentence, and maybe more."""
    places: dict[str, Any]
    """Parameters in the path, and their types."""
    query: type[msgspec.Struct] | None
    body: type[msgspec.Struct] | None
    with_caller: bool
    answer: Any
    """None: there is no content."""


def operation(method: str, path: str, *statuses: int) -> Callable[[Handler], Handler]:
    """Mark a handler as the operation of a method on a path; ``statuses`` are 200 where they are not given."""

    def mark(handler: Handler) -> Handler:
        setattr(handler, MARK, (method, path, statuses or (200,)))
        return handler

    return mark


def operations(handlers: type) -> list[Operation]:
    """The operations of a class, in the order they stand there."""
    return [_read(f, *getattr(f, MARK)) for f in vars(handlers).values() if hasattr(f, MARK)]


def _read(handler: Callable[..., Any], method: str, path: str, statuses: tuple[int, ...]) -> Operation:
    hints = typing.get_type_hints(handler, include_extras=True)
    answer = hints.pop("return")
    if typing.get_origin(answer) is Reply:
        (answer,) = typing.get_args(answer)
    return Operation(
        method,
        path,
        statuses,
        handler.__name__,
        inspect.getdoc(handler) or "",
        {name: hint for name, hint in hints.items() if f"{{{name}}}" in path},
        hints.get("query"),
        hints.get("body"),
        "caller" in hints,
        None if answer is type(None) else answer,
    )


def route(api: object, described: Operation) -> tuple[str, str, Any]:
    """An operation as aiohttp's router takes it."""
    handler = getattr(api, described.name)

    async def answered(request: web.Request) -> web.StreamResponse:
        try:
            result = await handler(**await _arguments(described, request))
        except EXPECTED as error:
            return _refusal(error)
        status = described.statuses[0]
        if isinstance(result, Reply):
            result, status = result.value, result.status
        if result is None:
            return web.Response(status=status)
        return web.Response(body=ENCODER.encode(result), status=status, content_type="application/json")

    return described.method, PREFIX + described.path, answered


EXPECTED = (Refused, BadFilter, BadCursor, TooMuch, Busy, asyncpg.DataError, asyncpg.InterfaceError)


def _refusal(error: Exception) -> web.StreamResponse:
    """What went wrong, for whoever asked; the rest is raised on."""
    match error:
        case Refused():
            return problem(error.status, error.code, str(error))
        case BadFilter():
            return problem(422, "filter", str(error))
        case BadCursor():
            return problem(422, "cursor", str(error))
        case TooMuch():
            return problem(503, "too_much", str(error))
        case Busy():
            return problem(503, "busy", str(error))
        case asyncpg.DataError():
            return problem(422, "value", f"a value cannot be used: {error}")
        case ValueError():
            return problem(422, "value", "a value cannot be used: it is out of range, or no text")
    raise error


async def _arguments(described: Operation, request: web.Request) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        name: _converted(request.match_info[name], kind, name) for name, kind in described.places.items()
    }
    if described.query is not None:
        arguments["query"] = _query(request, described.query)
    elif request.query:
        raise Refused(422, "query", f"unknown parameter {next(iter(request.query))[:50]!r}; there are none")
    if described.body is not None:
        arguments["body"] = await _body(request, described.body)
    if described.with_caller:
        arguments["caller"] = caller(request)
    return arguments


def caller(request: web.Request) -> Actor:
    """Who asks: by token or from this machine, and for whom."""
    who = "token" if "Authorization" in request.headers else "loopback"
    named = "".join(c for c in request.headers.get(ACTOR_HEADER, "") if c.isprintable())[:100].strip()
    return Actor("api", f"{who}, for {named}" if named else who)


def _query(request: web.Request, kind: type[msgspec.Struct]) -> msgspec.Struct:
    given: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for name in dict.fromkeys(request.query):
        if name not in hints:
            raise Refused(
                422,
                "query",
                f"unknown parameter {name[:50]!r}; there are {', '.join(kind.__struct_fields__)}",
            )
        values = request.query.getall(name)
        if typing.get_origin(hints[name]) is list:
            given[name] = values
        elif len(values) > 1:
            raise Refused(422, "query", f"{name} is given {len(values)} times; once is enough")
        else:
            given[name] = values[0]
    made: msgspec.Struct = _converted(given, kind, "query")
    return made


def _converted(value: Any, kind: Any, name: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        code = "id" if isinstance(value, str) else "query"
        raise Refused(422, code, _said(error, name)) from None


async def _body(request: web.Request, kind: type[msgspec.Struct]) -> msgspec.Struct:
    raw = await request.read()
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise Refused(422, "body", _said(error, "the body")) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, "json", f"the body is not JSON: {error}") from None


def _said(error: msgspec.ValidationError, whole: str) -> str:
    """What msgspec says, the place first: ``limit: expected `int` <= 1000``."""
    what, _, where = str(error).partition(" - at `$")
    what = what.replace("`", "'").replace("Object", whole)
    place = where.rstrip("`").lstrip(".")
    if place:
        return f"{place}: {what[0].lower()}{what[1:]}"
    return what if what.startswith(whole) else f"{whole}: {what[0].lower()}{what[1:]}"
