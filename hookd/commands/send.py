"""``hookd send``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hookd.commands import completing
from hookd.commands.session import Failed, given_secret, moment, options, print_json, with_connection
from hookd.config import DURATION, duration

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterator

    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config

SEND = """
select hookd.send($1::text, $2::text, tenant => $3::text, idempotency_key => $4::text,
                  deliver_at => $5::timestamptz, expires_at => $6::timestamptz, order_key => $7::text,
                  coalesce_key => $8::text, headers => $9::text::jsonb)
"""


@click.command()
@click.argument("type_", metavar="TYPE", shell_complete=completing.types)
@click.option("--data", default="null", help="The payload: JSON, @FILE, or - for stdin.")
@click.option(
    "--tenant",
    shell_complete=completing.tenants,
    default="default",
    show_default=True,
    help="Whose endpoints get it.",
)
@click.option("--key", help="Idempotency key: the same key again sends nothing and prints the first id.")
@click.option("--order-key", help="Events of one key reach an endpoint in order.")
@click.option("--coalesce-key", help="A newer event replaces older ones that no attempt has been made for.")
@click.option("--deliver-at", metavar="TIME", help="Not before: in 2h, or a time.")
@click.option("--expires-at", metavar="TIME", help="Not after: in 2h, or a time.")
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="NAME:VALUE",
    help="Sent along as an HTTP header, or @FILE, one a line; may be repeated.",
)
@options
@click.pass_obj
def send(
    invocation: Invocation, type_: str, data: str, tenant: str, key: str | None, order_key: str | None,
    coalesce_key: str | None, deliver_at: str | None, expires_at: str | None, headers: tuple[str, ...],
) -> None:  # fmt: skip
    """Send an event, and print its id."""
    payload = _payload(data)
    given = header_map(headers)

    async def work(connection: asyncpg.Connection, _config: Config) -> str:
        return str(
            await connection.fetchval(
                SEND, type_, payload, tenant, key, _coming(deliver_at), _coming(expires_at), order_key,
                coalesce_key, json.dumps(given) if given else None,
            )
        )  # fmt: skip

    event_id = with_connection(invocation, work)
    if invocation.json:
        print_json({"id": event_id, "type": type_, "tenant": tenant})
    else:
        click.echo(event_id)


def _payload(data: str) -> str:
    if data == "-":
        return sys.stdin.read()
    if data.startswith("@"):
        try:
            return Path(data[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Failed(
                f"{data[1:]} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
            ) from None
    return data


def _coming(text: str | None) -> datetime.datetime | None:
    """As ``moment``, but a duration lies ahead."""
    at = moment(text)
    if at is not None and text is not None and DURATION.fullmatch(text):
        import datetime as clock  # noqa: PLC0415 - rarely needed

        return at + clock.timedelta(seconds=2 * duration(text))
    return at


def _lines(headers: tuple[str, ...]) -> Iterator[str]:
    for text in headers:
        if text.startswith("@"):
            # no header's name begins so
            yield from filter(str.strip, (given_secret(text) or "").split("\n"))
        else:
            yield text


def header_map(headers: tuple[str, ...]) -> dict[str, str]:
    """
    Headers as they were typed, or as they stand in ``@FILE``, one a line.

    Raises:
        Failed: one is no header, or one that hookd sets itself.
    """
    from hookd.core.headers import check_headers  # noqa: PLC0415 - not for --help

    given: dict[str, str] = {}
    for number, text in enumerate(_lines(headers), 1):
        name, colon, value = text.partition(":")
        if not colon:
            # not repeated: it may be a credential without its name
            raise Failed(f"--header number {number} has no colon; write --header 'name: value'", 2)
        given[name.strip()] = value.strip()
    problem = check_headers(given)
    if problem is not None:
        raise Failed(problem, 2)
    return given
