"""``hookd migrate``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from hookd.commands.session import Failed, options, print_json, with_connection

if TYPE_CHECKING:
    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.postgres.migrate import Migration


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what is pending, and change nothing.")
@click.option("--sql", is_flag=True, help="Print the SQL of what is pending, and change nothing.")
@options
@click.pass_obj
def migrate(invocation: Invocation, *, dry_run: bool, sql: bool) -> None:
    """Bring the database's schema up to date.  Twice does no harm."""
    from hookd.postgres.migrate import SchemaMismatch, pending  # noqa: PLC0415 - not for --help
    from hookd.postgres.migrate import migrate as apply  # noqa: PLC0415

    bar = _Bar()

    async def work(connection: asyncpg.Connection, _config: Config) -> list[Migration]:
        try:
            return await (pending(connection) if dry_run or sql else apply(connection, bar.begins))
        except SchemaMismatch as error:
            raise Failed(str(error)) from None

    done = with_connection(invocation, work, migrated=False)
    bar.end()
    if sql:
        for migration in done:
            click.echo(migration.sql)
    elif invocation.json:
        print_json({"applied" if not dry_run else "pending": [f"{m.version:04} {m.name}" for m in done]})
    elif not done:
        click.echo("the schema is up to date")
    else:
        for migration in done:
            click.echo(f"{'pending' if dry_run else 'applied'}  {migration.version:04} {migration.name}")


class _Bar:
    """On a terminal: which migration is under way.  An index on a large table takes its time."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begins(self, migration: Migration, left: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = click.progressbar(
                length=left,
                label="migrating",
                file=sys.stderr,
                show_eta=False,
                item_show_func=lambda name: name,
            )
        else:
            self._bar.update(1)
        self._bar.current_item = f"{migration.version:04} {migration.name}"
        self._bar.render_progress()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.update(1)
            self._bar.render_finish()
