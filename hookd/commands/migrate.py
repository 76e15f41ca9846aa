"""``hookd migrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hookd.commands.session import Failed, options, print_json, with_connection

if TYPE_CHECKING:
    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what is pending, and change nothing.")
@click.option("--sql", is_flag=True, help="Print the SQL of what is pending, and change nothing.")
@options
@click.pass_obj
def migrate(invocation: Invocation, *, dry_run: bool, sql: bool) -> None:
    """Bring the database's schema up to date.  Twice does no harm."""
    from hookd.postgres.migrate import Migration, SchemaMismatch, pending  # noqa: PLC0415 - not for --help
    from hookd.postgres.migrate import migrate as apply  # noqa: PLC0415

    async def work(connection: asyncpg.Connection, _config: Config) -> list[Migration]:
        try:
            return await (pending(connection) if dry_run or sql else apply(connection))
        except SchemaMismatch as error:
            raise Failed(str(error)) from None

    done = with_connection(invocation, work, migrated=False)
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
