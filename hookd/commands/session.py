"""What commands share: the configuration, a session to PostgreSQL, and how things are printed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import functools
import getpass
import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hookd.config import DURATION, duration, load

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
    from uuid import UUID

    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.core.sealing import Keyring
    from hookd.postgres.audit import Actor
    from hookd.postgres.connect import Database

T = TypeVar("T")
Command = TypeVar("Command", bound="Callable[..., Any]")


class Failed(Exception):
    """A command could not do what it was asked to; the message says what to do."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def options(command: Command) -> Command:
    """``--config`` and ``--json`` after the command too, where people write them."""

    def remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            setattr(ctx.obj, str(param.name), value)

    for name, help_text, keywords in (
        ("--json", "Print JSON.", {"is_flag": True}),
        ("--config", "Default: $HOOKD_CONFIG, ./config.toml, /etc/hookd/config.toml.", {"metavar": "FILE"}),
    ):
        attribute = "json" if name == "--json" else "config_file"
        command = click.option(
            name,
            attribute,
            help=help_text,
            expose_value=False,
            callback=remember,
            **keywords,
        )(command)
    return command


@contextlib.contextmanager
def database_of(config: Config) -> Iterator[Database]:
    """Where PostgreSQL is; the embedded server is kept running for as long."""
    from hookd.postgres.connect import Database, DatabaseRefused  # noqa: PLC0415 - not for --help
    from hookd.postgres.embedded import EmbeddedProblem, open_server  # noqa: PLC0415

    wanted = config.database
    if wanted.dsn != "embedded":
        try:
            yield Database.named(wanted.dsn, wanted.password_file)
        except DatabaseRefused as error:
            raise Failed(str(error)) from None
        return
    try:
        server = open_server(wanted.data_dir, wanted.bin_dir)
    except EmbeddedProblem as error:
        raise Failed(str(error)) from None
    try:
        yield Database(
            server.connection_arguments(),
            f"embedded PostgreSQL {server.binaries.version} in {server.home}",
            revive=server.revive,
        )
    finally:
        server.leave()


class MayNotLook(Failed):
    """This role may not see which migrations were applied."""


async def bring_up_to_date(connection: asyncpg.Connection, config: Config) -> list[str]:
    """
    Migrate where the configuration says so; returns the names of what was applied.

    Raises:
        MayNotLook: this role has no right to see which migrations were applied.
        Failed: the schema is not what this hookd needs.
    """
    import asyncpg as driver  # noqa: PLC0415 - not for --help

    from hookd.postgres.migrate import SchemaMismatch, migrate, pending  # noqa: PLC0415

    try:
        missing = await pending(connection)
    except SchemaMismatch as error:
        raise Failed(str(error)) from None
    except driver.InsufficientPrivilegeError as error:
        raise MayNotLook(
            f"this role may not look at hookd's schema ({error}); grant it hookd_reader or hookd_daemon"
        ) from None
    if not missing:
        return []
    if not config.database.migrate:
        raise Failed(
            f"the database lacks {len(missing)} migrations, and database.migrate is false; run hookd migrate"
        )
    try:
        return [m.name for m in await migrate(connection)]
    except SchemaMismatch as error:
        raise Failed(str(error)) from None
    except driver.InsufficientPrivilegeError as error:
        raise Failed(
            f"the schema is not up to date and this role may not change it ({error}); "
            "run hookd migrate as the role that owns the schema"
        ) from None


def keyring_of(config: Config) -> Keyring:
    """
    The master keys that the configuration names.

    Raises:
        Failed: their file cannot be used.
    """
    from hookd.keyfile import KeyFileProblem, read_keyring  # noqa: PLC0415 - not for --help

    try:
        return read_keyring(config.security.master_key_file)
    except KeyFileProblem as problem:
        raise Failed(f"security.master_key_file: {problem}", 2) from None


STDIN = "-"


def given_secret(text: str | None) -> str | None:
    """
    A secret as it was typed: itself, or ``@FILE`` or ``-`` (stdin), which keep it out of process lists and shell histories.

    Raises:
        Failed: the file cannot be read.
    """
    if text is None or (text != STDIN and not text.startswith("@")):
        return text
    name = "stdin" if text == STDIN else text[1:]
    try:
        return (sys.stdin.read() if text == STDIN else Path(name).read_text(encoding="utf-8")).strip()
    except OSError as error:
        raise Failed(f"{name} cannot be read: {error.strerror}", 2) from None
    except UnicodeError:
        raise Failed(f"{name} is no text", 2) from None


def with_connection(
    invocation: Invocation,
    work: Callable[[asyncpg.Connection, Config], Awaitable[T]],
    *,
    migrated: bool = True,
) -> T:
    """Run something that needs a session."""
    config = load(invocation.config_file).config
    with database_of(config) as database:
        return asyncio.run(_with_connection(database, config, work, migrated=migrated))


async def _with_connection(
    database: Database,
    config: Config,
    work: Callable[[asyncpg.Connection, Config], Awaitable[T]],
    *,
    migrated: bool,
) -> T:
    with plain_failures():
        connection = await database.connect("command")
        try:
            if migrated:
                # hookd_producer may not look, and may send: what else it may not do PostgreSQL says
                with contextlib.suppress(MayNotLook):
                    await bring_up_to_date(connection, config)
            return await work(connection, config)
        finally:
            connection.terminate()


@contextlib.contextmanager
def plain_failures() -> Iterator[None]:
    """What PostgreSQL cannot do or refuses is one line."""
    import asyncpg as driver  # noqa: PLC0415 - not for --help

    from hookd.postgres.connect import DatabaseRefused, DatabaseUnavailable, unavailable  # noqa: PLC0415
    from hookd.postgres.registry import NotPossible  # noqa: PLC0415

    try:
        yield
    except (DatabaseRefused, DatabaseUnavailable, NotPossible) as error:
        raise Failed(str(error)) from None
    except driver.PostgresError as error:
        lost = unavailable(error)
        said = (getattr(error, "message", None) or str(error)).removeprefix("hookd: ").partition("\n")[0]
        hint = getattr(error, "hint", None)
        raise Failed(str(lost) if lost else f"{said}; {hint}" if hint else said) from None


def whoami() -> Actor:
    """Who types: for the audit trail."""
    from hookd.postgres.audit import Actor  # noqa: PLC0415 - not for --help

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may have a number and no name
        user = str(os.getuid()) if hasattr(os, "getuid") else "somebody"
    return Actor("cli", f"{user}@{socket.gethostname()}")


async def endpoint_of(connection: asyncpg.Connection, text: str) -> UUID:
    """
    The endpoint whose id, or its beginning, was typed.

    Raises:
        Failed: it can be no id.
        NotPossible: there is none, or more than one.
    """
    from hookd.postgres.lookup import endpoint_named  # noqa: PLC0415 - not for --help

    try:
        return await endpoint_named(connection, text)
    except ValueError as problem:
        raise Failed(str(problem), 2) from None


async def event_of(connection: asyncpg.Connection, text: str) -> UUID:
    """The same for an event."""
    from hookd.postgres.lookup import event_named  # noqa: PLC0415 - not for --help

    try:
        return await event_named(connection, text)
    except ValueError as problem:
        raise Failed(str(problem), 2) from None


def moment(text: str | None) -> datetime.datetime | None:
    """
    A point in time as it was typed: ``2h`` (ago), or a date with or without a time (UTC where no zone is given).

    Raises:
        Failed: it is neither.
    """
    if text is None:
        return None
    if DURATION.fullmatch(text):
        return datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=duration(text))
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise Failed(f"{text!r} is no time; write 2h (ago), 2026-11-23 or 2026-11-23T14:00:00Z", 2) from None
    return at if at.tzinfo is not None else at.replace(tzinfo=datetime.UTC)


# Printing.


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def print_json(value: Any) -> None:
    """Print a value as JSON on one line; of a list, each item on a line of its own, for ``jq`` and ``while read``."""
    for item in value if isinstance(value, list) else [value]:
        text = json.dumps(plain(item), ensure_ascii=False)
        # bytes of an argument that are no UTF-8 came in as surrogates; JSON cannot hold them
        click.echo(text.encode("utf-8", "replace").decode("utf-8"))


def print_table(rows: Iterable[Sequence[Any]], header: Sequence[str], empty: str) -> None:
    """Print rows under a header, or a sentence when there are none."""
    from hookd.commands import drawing  # noqa: PLC0415 - not for --help

    cells = [[shown(value) for value in row] for row in rows]
    if not cells:
        click.echo(empty)
        return
    drawing.show(drawing.table(cells, header, drawing.width_of_terminal()))


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print names and values, one a line; what is None is left out."""
    from hookd.commands.drawing import printable  # noqa: PLC0415 - not for --help

    said = {k: v for k, v in fields.items() if v is not None and v != []}
    width = max(map(len, said), default=0)
    for name, value in said.items():
        click.echo(f"{name.replace('_', ' ').ljust(width)}  {printable(shown(value))}")


def shown(value: Any) -> str:
    """A value for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, datetime.datetime):
        return f"{value.astimezone(datetime.UTC):%Y-%m-%d %H:%M:%S}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def in_loop(work: Callable[..., Awaitable[T]]) -> Callable[..., T]:
    """A coroutine function as a plain one."""

    @functools.wraps(work)
    def run(*args: Any, **keywords: Any) -> T:
        return asyncio.run(work(*args, **keywords))  # type: ignore[arg-type]

    return run
