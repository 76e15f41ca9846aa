"""``hookd secrets …``: the master keys that endpoint secrets are encrypted with."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookd.commands.session import (
    Failed,
    keyring_of,
    options,
    print_fields,
    print_json,
    whoami,
    with_connection,
)
from hookd.core.words import several

if TYPE_CHECKING:
    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.core.sealing import Keyring
    from hookd.postgres.vault import Census

BATCH = 500
"""Secrets of one statement."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def secrets() -> None:
    """Encrypt endpoint secrets at rest, and change the key that they are encrypted with."""


@secrets.command(name="new-key")
@click.argument("file", type=click.Path(dir_okay=False))
@options
@click.pass_obj
def new_key(invocation: Invocation, file: str) -> None:
    """
    Make a master key from the system's randomness and put it in front of those of FILE, or into a new FILE of mode 0600.

    \b
    hookd secrets new-key /etc/hookd/master.key      # then name it in security.master_key_file
    """  # noqa: D301 - click's mark for lines that stay
    from hookd.core.sealing import KEY_BYTES  # noqa: PLC0415 - not for --help
    from hookd.keyfile import KeyFileProblem, add_key  # noqa: PLC0415

    try:
        keyring = add_key(file, os.urandom(KEY_BYTES))
    except KeyFileProblem as problem:
        raise Failed(str(problem)) from None
    file = str(Path(file).absolute())
    older = [key.id for key in keyring.keys[1:]]
    if invocation.json:
        print_json({"file": file, "key": keyring.newest, "older": older})
        return
    print_fields({"file": file, "key": keyring.newest, "older": older})
    click.echo(
        "next: reload the daemons (SIGHUP), then run `hookd secrets rotate`; keep a copy of the file apart from the database"
        if older
        else f'next: set security.master_key_file = "{file}", restart or reload the daemons, then run `hookd secrets rotate`; '
        "keep a copy of the file apart from the database",
        err=True,
    )


@secrets.command()
@click.option("--dry-run", is_flag=True, help="Say what is encrypted under which key, and change nothing.")
@options
@click.pass_obj
def rotate(invocation: Invocation, *, dry_run: bool) -> None:
    """
    Encrypt all endpoint secrets and headers under the newest key of security.master_key_file.

    What is plain text is encrypted, what is under an older key is encrypted anew.  It can be broken off and run again, and
    runs beside daemons that know the newest key.
    """
    from hookd.postgres import audit, vault  # noqa: PLC0415 - not for --help

    async def work(connection: asyncpg.Connection, config: Config) -> tuple[Keyring, Census, vault.Resealed]:
        keyring = keyring_of(config)
        if not keyring.keys:
            raise Failed("security.master_key_file is not set; `hookd secrets new-key FILE` makes one", 2)
        before = await vault.census(connection)
        progress = vault.Resealed()
        if dry_run:
            return keyring, before, progress
        await audit.record(connection, whoami(), "secrets.rotate", audit.Subject(), {"key": keyring.newest})
        stale = before.total - before.by_key.get(keyring.newest or "", 0)
        with click.progressbar(
            length=stale, label="encrypting", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as bar:
            seen = 0
            async for progress in vault.reseal(connection, keyring, BATCH):
                bar.update(progress.looked_at - seen)
                seen = progress.looked_at
        return keyring, await vault.census(connection), progress

    keyring, counted, progress = with_connection(invocation, work)
    known = {key.id for key in keyring.keys}
    if invocation.json:
        print_json({
            "newest": keyring.newest, "encrypted": progress.done, "plain": counted.plain, "keys": counted.by_key,
            "unknown_keys": sorted(set(counted.by_key) - known), "unreadable": progress.unreadable,
        })  # fmt: skip
    else:
        _print(keyring, counted, progress, dry_run=dry_run)
    if progress.unreadable:
        raise Failed(
            f"the secrets of {several(len(progress.unreadable), 'endpoint')} cannot be read: "
            f"{next(iter(progress.unreadable.values()))}"
        )


def _print(keyring: Keyring, counted: Census, progress: Any, *, dry_run: bool) -> None:
    if not dry_run:
        click.echo(f"{several(progress.done, 'secret')} encrypted under key {keyring.newest}")
    fields: dict[str, Any] = {"plain text": counted.plain}
    for key, count in sorted(counted.by_key.items()):
        known = next((n for n, k in enumerate(keyring.keys) if k.id == key), None)
        what = {None: "not in the file!", 0: "the newest"}.get(known, "older")
        fields[f"key {key}"] = f"{count} ({what})"
    print_fields(fields)
    unused = [key.id for key in keyring.keys[1:] if key.id not in counted.by_key]
    if unused and not dry_run:
        click.echo(
            f"no longer needed by this database: {', '.join(unused)}; backups made before now still need them",
            err=True,
        )
