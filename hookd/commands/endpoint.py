"""``hookd endpoint …``: register callback URLs and look after them."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import click

from hookd.commands import completing
from hookd.commands.calling import judged, tested, verification, vetted
from hookd.commands.drawing import printable
from hookd.commands.send import header_map
from hookd.commands.session import (
    Failed,
    endpoint_of,
    given_secret,
    keyring_of,
    moment,
    options,
    plain,
    print_fields,
    print_json,
    print_table,
    shown,
    whoami,
    with_connection,
)
from hookd.config import duration, load

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.core.challenge import Verification
    from hookd.core.model import Outcome, Secret
    from hookd.postgres.registry import EndpointChange, EndpointRecord

FORMATS = click.Choice(["standard", "raw", "cloudevents", "thin"])

STATES = click.Choice(["active", "unverified", "paused", "disabled", "removed"])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def endpoint() -> None:
    """Register callback URLs and look after them."""


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """What ``add`` and ``update`` can set."""
    for option in (
        click.option("--description", help="For people."),
        click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="Sent with every request; may be repeated. @FILE has one a line."),
        click.option("--format", "format_", type=FORMATS, help="Of the body; the default is delivery.format."),
        click.option("--ordered/--unordered", default=None, help="One event at a time, in the order of their insertion."),
        click.option("--concurrency", type=click.IntRange(1), help="Exchanges at once."),
        click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests per second."),
        click.option("--filter", "filter_", metavar="JSONPATH", help="Only events whose payload matches: '$.amount ? (@ > 100)'."),
        click.option("--type", "types", multiple=True, metavar="PATTERN", shell_complete=completing.types, help="user.created, user.* or *; may be repeated."),
    ):  # fmt: skip
        command = option(command)
    return command


def _change(given: dict[str, Any], target: Any = None, clear: tuple[str, ...] = ()) -> EndpointChange:
    from hookd.postgres.registry import EndpointChange  # noqa: PLC0415 - not for --help

    headers = header_map(given["headers"]) if given["headers"] else None
    return EndpointChange(
        url=target.url if target else None,
        host=target.lane if target else None,
        types=given["types"] or None,
        filter=given["filter_"],
        format=given["format_"],
        ordered=given["ordered"],
        rate=given["rate"],
        concurrency=given["concurrency"],
        description=given["description"],
        headers={} if "headers" in clear else headers,
        clear=frozenset(clear) - {"headers"},
    )


def _may_be(format_: str | None, config: Config) -> None:
    from hookd.core.bodies import format_problem  # noqa: PLC0415 - not for --help

    if problem := format_problem(format_, config.delivery.thin_url):
        raise Failed(problem)


def _secret_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How ``add`` and ``rotate`` come by a signing secret."""
    for option in (
        click.option("--secret", "given", metavar="S", help="One that you have: @FILE, - (stdin), or whsec_…, whsk_… itself, which process lists show."),
        click.option("--key-type", type=click.Choice(["hmac", "ed25519"]), help="Of a new secret: shared (whsec_…), or a key pair (whsk_…, whpk_…)."),
    ):  # fmt: skip
        command = option(command)
    return command


def _secret(key_type: Any, given: str | None) -> Secret:
    from hookd.core.signing import chosen_secret  # noqa: PLC0415 - not for --help

    if given and not given.startswith(("@", "-")):
        click.echo("note: a secret on the command line is seen by everybody on this machine, and kept by your shell's history; "
                   "write it to a file and give --secret @FILE, or - for stdin", err=True)  # fmt: skip
    try:
        return chosen_secret(key_type, given_secret(given), secrets.token_bytes(32))
    except ValueError as error:
        raise Failed(f"--secret: {error}", 2) from None


def _secret_shown(secret: Secret, given: str | None) -> dict[str, Any]:
    """What is printed of a secret this once: nothing of one that was given."""
    from hookd.core.signing import public_key  # noqa: PLC0415 - not for --help

    shown_once = {} if given else {"secret": secret.reveal()}
    public = public_key(secret)
    return shown_once | ({} if public is None else {"public_key": public})


def _said(answer: Verification, record: EndpointRecord) -> str:
    """What came of a challenge, for people."""
    if answer.verified:
        return "verified: it answered the challenge" + (
            "" if record.state == "active" else f"; it is {record.state}"
        )
    then = f"; it receives nothing until `hookd endpoint verify {record.id}` succeeds"
    return f"not verified: {answer.reason}" + (then if record.state == "unverified" else "")


@endpoint.command()
@click.argument("url")
@click.option(
    "--tenant",
    shell_complete=completing.tenants,
    default="default",
    show_default=True,
    help="Whose events it gets.",
)
@click.option("--since", metavar="TIME", help="Give it the events since then too: 7d (ago), or a time.")
@_secret_options
@_settings
@options
@click.pass_obj
def add(
    invocation: Invocation, /, url: str, tenant: str, since: str | None, key_type: str | None, given: str | None,
    **settings: Any,
) -> None:  # fmt: skip
    """
    Register URL, and print its id and its secret: this once.

    With security.require_verification it is asked right away whether it wants to be called; exit status 1 if it does not
    answer, and it stays registered.
    """
    from hookd.postgres import history, registry  # noqa: PLC0415 - not for --help

    secret = _secret(key_type, given)
    start = moment(since)

    async def work(
        connection: asyncpg.Connection, config: Config
    ) -> tuple[EndpointRecord, Verification | None, int | None]:
        keyring = keyring_of(config)
        _may_be(settings["format_"], config)
        target = await judged(url, config)
        required = config.security.require_verification
        record = await registry.add(
            connection, tenant, _change(settings, target), secret,
            keyring=keyring, verified=not required, actor=whoami(),
        )  # fmt: skip
        queued = None
        if start is not None:
            queued = 0
            rows = await history.missing(connection, record.id, start)
            async for total in history.queue(connection, [row.pair for row in rows]):
                queued = total
        if required:
            return *await verification(connection, config, record.id), queued
        return record, None, queued

    record, answer, queued = with_connection(invocation, work)
    shown_once = _secret_shown(secret, given)
    if invocation.json:
        queued_too = {} if queued is None else {"queued": queued}
        print_json(plain(record) | shown_once | queued_too | _reported(answer))
    else:
        past = {} if queued is None else {"past_events": f"{queued:,} queued"}
        print_fields({"id": record.id, **shown_once, "url": record.url, "types": record.types, **past})
    _conclude(invocation, record, answer)


def _reported(answer: Verification | None) -> dict[str, Any]:
    return {} if answer is None else {"verified": answer.verified, "reason": answer.reason or None}


def _conclude(invocation: Invocation, record: EndpointRecord, answer: Verification | None) -> None:
    """Say what came of a challenge, if there was one; exit status 1 where it was not answered."""
    if answer is None:
        return
    if not invocation.json:
        click.echo(_said(answer, record))
    if not answer.verified:
        raise click.exceptions.Exit(1)


@endpoint.command(name="list")
@click.option("--tenant", shell_complete=completing.tenants, help="Of this tenant only.")
@click.option("--state", type=STATES, help="In this state only.")
@click.option(
    "--limit", type=click.IntRange(1, 10000), default=100, show_default=True, help="No more than so many."
)
@options
@click.pass_obj
def list_(invocation: Invocation, tenant: str | None, state: str | None, limit: int) -> None:
    """All endpoints, oldest first; removed ones only with --state removed."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    records = with_connection(
        invocation, lambda c, _: registry.listing(c, tenant=tenant, state=state, limit=limit)
    )
    if invocation.json:
        print_json(records)
        return
    print_table(
        [(r.id, r.tenant, r.state, r.types, r.url) for r in records],
        ("id", "tenant", "state", "types", "url"),
        "no endpoints; `hookd endpoint add URL` registers one",
    )


def _print(
    invocation: Invocation, record: EndpointRecord, note: str = "", extra: dict[str, Any] | None = None
) -> None:
    if invocation.json:
        print_json(plain(record) | (extra or {}))
        return
    fields = plain(record)
    for name in ("key", "host", "shard"):
        fields.pop(name)
    print_fields(fields | {"header_names": record.header_names, "types": record.types})
    if note:
        click.echo(note)


def _simple(
    invocation: Invocation,
    endpoint_id: str,
    work: Callable[[asyncpg.Connection, Any], Awaitable[EndpointRecord]],
) -> EndpointRecord:

    async def found(connection: asyncpg.Connection, _config: Config) -> EndpointRecord:
        return await work(connection, await endpoint_of(connection, endpoint_id))

    return with_connection(invocation, found)


@endpoint.command()
@click.argument("endpoint_id", metavar="ID", type=completing.ENDPOINT_ID)
@options
@click.pass_obj
def show(invocation: Invocation, endpoint_id: str) -> None:
    """One endpoint, with its public keys; its secrets are never shown again."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    _print(invocation, _simple(invocation, endpoint_id, registry.show))


@endpoint.command()
@click.argument("endpoint_id", metavar="ID", type=completing.ENDPOINT_ID)
@click.option("--url", help="Another URL; what is pending goes there too.")
@click.option("--clear", multiple=True, type=click.Choice(["filter", "format", "rate", "concurrency", "description", "headers"]), help="Back to none; may be repeated.")  # fmt: skip
@_settings
@options
@click.pass_obj
def update(
    invocation: Invocation, /, endpoint_id: str, url: str | None, clear: tuple[str, ...], **given: Any
) -> None:
    """
    Change what is given, and leave the rest.  --type and --header replace all that were there.

    With security.require_verification a new URL is asked whether it wants to be called before it receives anything.
    """
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    async def work(
        connection: asyncpg.Connection, config: Config
    ) -> tuple[EndpointRecord, Verification | None]:
        keyring = keyring_of(config)
        _may_be(given["format_"], config)
        wanted = await endpoint_of(connection, endpoint_id)
        target = await judged(url, config) if url else None
        required = config.security.require_verification
        record = await registry.update(
            connection, wanted, _change(given, target, clear),
            keyring=keyring, verified=not required, actor=whoami(),
        )  # fmt: skip
        if url and record.state == "unverified":
            return await verification(connection, config, wanted)
        return record, None

    record, answer = with_connection(invocation, work)
    _print(invocation, record, extra=_reported(answer))
    _conclude(invocation, record, answer)


@endpoint.command()
@click.argument("endpoint_id", metavar="ID", type=completing.ENDPOINT_ID)
@click.option("--reason", help="For people.")
@options
@click.pass_obj
def pause(invocation: Invocation, endpoint_id: str, reason: str | None) -> None:
    """Let its deliveries wait."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    _print(
        invocation,
        _simple(invocation, endpoint_id, lambda c, i: registry.pause(c, i, reason, actor=whoami())),
    )


@endpoint.command()
@click.argument("endpoint_id", metavar="ID", type=completing.ENDPOINT_ID)
@click.option("--missed", type=click.Choice(["all", "latest", "none"]), default="none", show_default=True, help="What a disabled endpoint gets of what it missed.")  # fmt: skip
@options
@click.pass_obj
def resume(invocation: Invocation, endpoint_id: str, missed: str) -> None:
    """
    Let it receive again, after pause or after it was disabled.

    With security.require_verification one that was never verified, was disabled, or has failed for long, is asked first.
    """
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    async def work(
        connection: asyncpg.Connection, config: Config
    ) -> tuple[int, EndpointRecord, Verification | None]:
        wanted = await endpoint_of(connection, endpoint_id)
        record, queued = await registry.resume(
            connection, wanted, missed,
            ask_again_after_s=config.ask_again_after_s(), actor=whoami(),
        )  # fmt: skip
        if record.state == "unverified":
            return queued, *await verification(connection, config, wanted)
        return queued, record, None

    queued, record, answer = with_connection(invocation, work)
    _print(invocation, record, f"{queued} missed deliveries queued" if queued else "", _reported(answer))
    _conclude(invocation, record, answer)


@endpoint.command()
@click.argument("endpoint_id", metavar="ID", type=completing.ENDPOINT_ID)
@options
@click.pass_obj
def remove(invocation: Invocation, endpoint_id: str) -> None:
    """Send it nothing more; what is pending is cancelled, its history stays."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    _print(invocation, _simple(invocation, endpoint_id, lambda c, i: registry.remove(c, i, actor=whoami())))


@endpoint.command()
@click.argument("endpoint_id", metavar="ID", type=completing.ENDPOINT_ID)
@click.option("--overlap", default="1d", show_default=True, help="How long the old secret signs too.")
@_secret_options
@options
@click.pass_obj
def rotate(
    invocation: Invocation, endpoint_id: str, overlap: str, key_type: str | None, given: str | None
) -> None:
    """
    Make a new secret and print it, this once; the old one signs too for a while.

    It is of the same type as the one before, unless --key-type says otherwise.
    """
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    try:
        overlap_s = duration(overlap)
    except ValueError as error:
        raise Failed(f"--overlap: {error}", 2) from None

    async def work(connection: asyncpg.Connection, config: Config) -> tuple[EndpointRecord, Secret]:
        wanted = await endpoint_of(connection, endpoint_id)
        before = await registry.show(connection, wanted)
        secret = _secret(key_type or (None if given else before.key_type), given)
        keyring = keyring_of(config)
        record = await registry.rotate(connection, wanted, secret, overlap_s, keyring=keyring, actor=whoami())
        return record, secret

    record, secret = with_connection(invocation, work)
    shown_once = _secret_shown(secret, given)
    if invocation.json:
        print_json(plain(record) | shown_once)
    else:
        print_fields({"id": record.id, **shown_once, "both_sign_for": overlap})


@endpoint.command()
@click.argument("endpoint_id", metavar="ID", type=completing.ENDPOINT_ID)
@click.option("--trust", is_flag=True, help="Take it for verified without asking it.")
@options
@click.pass_obj
def verify(invocation: Invocation, endpoint_id: str, *, trust: bool) -> None:
    """
    Ask it whether it wants to be called: it has to repeat a challenge; exit status 0 if it does.

    An unverified endpoint that answers becomes active, and what waited for it goes out.  For one that is active, paused
    or disabled already the answer is only written down.
    """
    from hookd.core.challenge import Verification  # noqa: PLC0415 - not for --help
    from hookd.postgres import registry  # noqa: PLC0415

    async def work(connection: asyncpg.Connection, config: Config) -> tuple[EndpointRecord, Verification]:
        wanted = await endpoint_of(connection, endpoint_id)
        if not trust:
            return await verification(connection, config, wanted)
        record = await registry.show(connection, wanted)
        record = await registry.note_verification(connection, wanted, record.url, None, actor=whoami())
        return record, Verification(verified=True)

    record, answer = with_connection(invocation, work)
    if invocation.json:
        print_json(plain(record) | _reported(answer))
    _conclude(invocation, record, answer)


@endpoint.command()
@click.argument("url")
@options
@click.pass_obj
def check(invocation: Invocation, url: str) -> None:
    """
    Say what the address guard says of URL; exit status 0 or 1.  Nothing is registered and nothing is sent.

    A name that does not resolve is allowed, as it is when an endpoint is added: it is asked for again at every attempt.
    """
    config = load(invocation.config_file).config
    found = asyncio.run(vetted(url, config))
    if invocation.json:
        print_json({
            "url": url, "allowed": found.allowed, "host": found.target.lane if found.target else None,
            "addresses": found.addresses, "reason": found.reason or None, "detail": found.detail or None,
        })  # fmt: skip
    elif found.allowed:
        assert found.target is not None
        where = f" ({', '.join(found.addresses)})" if found.addresses else f", but {found.reason}"
        never = f"; never called: {found.detail}" if found.detail else ""
        click.echo(f"allowed: {found.target.url}{where}{never}")
    else:
        click.echo(f"refused: {found.reason}{f' ({found.detail})' if found.detail else ''}")
    if not found.allowed:
        raise click.exceptions.Exit(1)


@endpoint.command()
@click.argument("endpoint_id", metavar="ID", type=completing.ENDPOINT_ID)
@click.option("--type", "type_", default="hookd.test", show_default=True, help="The event's type.")
@click.option("--data", default='{"test": true}', show_default=True, help="The payload, JSON.")
@options
@click.pass_obj
def test(invocation: Invocation, endpoint_id: str, type_: str, data: str) -> None:
    """Send it a test event now, past the queue, and print the exchange; exit status 0 if it was accepted."""

    async def work(connection: asyncpg.Connection, config: Config) -> tuple[str, Outcome]:
        return await tested(connection, config, await endpoint_of(connection, endpoint_id), type_, data)

    sent, outcome = with_connection(invocation, work)
    accepted = 200 <= outcome.status < 300
    if invocation.json:
        print_json({
            "request": sent, "accepted": accepted, "outcome": outcome.kind.value, "status": outcome.status or None,
            "reason": outcome.reason or None, "headers": _headers(outcome.headers), "body": outcome.body,
            "total_ms": round(outcome.total_ms, 1), "connect_ms": outcome.connect_ms,
        })  # fmt: skip
    else:
        click.echo("\n".join(f"> {line}" for line in sent.splitlines()))
        if outcome.status:
            click.echo(f"< {outcome.status}")
            click.echo("\n".join(f"< {printable(line)}" for line in outcome.headers.splitlines()))
            if outcome.body:
                click.echo("<\n" + "\n".join(f"< {printable(line)}" for line in outcome.body.splitlines()))
        verdict = (
            "accepted" if accepted else f"not accepted: {outcome.reason or f'answered {outcome.status}'}"
        )
        click.echo(f"{verdict}, {shown(outcome.total_ms)} ms")
    if not accepted:
        raise click.exceptions.Exit(1)


def _headers(lines: str) -> dict[str, str]:
    return {name: value for name, _, value in (line.partition(": ") for line in lines.splitlines())}
