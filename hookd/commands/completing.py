"""
What the shell is offered for ids, types and tenants: the newest ones in the database.

Asked at a press of TAB: it is quick or silent, starts no server and changes nothing.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    import click

WAIT_S = 1.5
"""Nobody waits longer for a completion."""


def endpoints(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of endpoints, with their URLs."""
    return _offered(ctx, "endpoints", incomplete)


def events(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of the newest events, with their types."""
    return _offered(ctx, "events", incomplete)


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
