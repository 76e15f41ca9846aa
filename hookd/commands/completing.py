"""
Ids, types and tenants on the command line, and what the shell is offered for them: the newest ones in the database.

Asked at a press of TAB: it is quick or silent, starts no server and changes nothing.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

WAIT_S = 1.5
"""Nobody waits longer for a completion."""


class Id(click.ParamType[str]):
    """An id, or its beginning: refused before anybody is asked where it can be none, completed from the database."""

    name = "id"

    def __init__(self, kind: str, *, numbers: bool = False) -> None:
        """``kind`` is ``endpoint`` or ``event``; with ``numbers`` a delivery's number does as well."""
        self._kind = kind
        self._numbers = numbers

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None) -> str:
        """
        What was typed, as it was typed.

        Raises:
            Failed: it can be no id.
        """
        from hookd.commands.session import Failed  # noqa: PLC0415 - not for --help
        from hookd.postgres.lookup import letters_of  # noqa: PLC0415

        text = str(value)
        if not (self._numbers and text.isdigit()):
            try:
                letters_of(text, self._kind)
            except ValueError as problem:
                raise Failed(str(problem), 2) from None
        return text

    def shell_complete(
        self, ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The newest ones, with what they are."""
        return _offered(ctx, f"{self._kind}s", incomplete)


ENDPOINT_ID = Id("endpoint")
EVENT_ID = Id("event")
EVENT_OR_DELIVERY = Id("event", numbers=True)


def types(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Types of the newest events."""
    return _offered(ctx, "types", incomplete)


def tenants(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Tenants that have endpoints."""
    return _offered(ctx, "tenants", incomplete)


def _offered(ctx: click.Context, kind: str, incomplete: str) -> list[CompletionItem]:
    try:
        rows = _asked(ctx.find_root().params.get("config_file"), kind, incomplete)
    except BaseException:  # noqa: BLE001 - a shell that completes is no place for errors of any kind
        return []
    # a value with a line break would be two for the shell
    return [
        CompletionItem(row["value"], help=_plain(row["help"])) for row in rows if row["value"].isprintable()
    ]


def _plain(text: str | None) -> str | None:
    return "".join(c if c.isprintable() else "?" for c in text) if text else None


def _asked(config_file: str | None, kind: str, incomplete: str) -> list[Any]:
    from hookd.commands.session import database_of  # noqa: PLC0415 - not for --help
    from hookd.config import load  # noqa: PLC0415
    from hookd.postgres.lookup import offered  # noqa: PLC0415

    config = load(config_file).config
    wanted = config.database
    if wanted.dsn == "embedded" and not (Path(wanted.data_dir) / "data" / "postmaster.pid").exists():
        return []
    with database_of(config) as database:

        async def ask() -> list[Any]:
            async with asyncio.timeout(WAIT_S):
                connection = await database.connect("completion")
                try:
                    return await offered(connection, kind, incomplete)
                finally:
                    connection.terminate()

        return asyncio.run(ask())
