"""``hookd endpoint …``: register callback URLs and look after them."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

import click

from hookd.commands.send import header_map
from hookd.commands.session import (
    Failed,
    options,
    plain,
    print_fields,
    print_json,
    print_table,
    shown,
    uuid_of,
    with_connection,
)
from hookd.config import address_rules, duration, load

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import asyncpg

    from hookd.commands import Invocation
    from hookd.config import Config
    from hookd.core.model import Outcome
    from hookd.net.vetting import Vetted
    from hookd.postgres.registry import EndpointChange, EndpointRecord

FORMATS = click.Choice(["standard", "raw", "cloudevents", "thin"])

STATES = click.Choice(["active", "paused", "disabled", "removed"])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def endpoint() -> None:
    """Register callback URLs and look after them."""


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """What ``add`` and ``update`` can set."""
    for option in (
        click.option("--description", help="For people."),
        click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="Sent with every request; may be repeated."),
        click.option("--format", "format_", type=FORMATS, help="Of the body; the default is delivery.format."),
        click.option("--ordered/--unordered", default=None, help="One event at a time, in the order of their insertion."),
        click.option("--concurrency", type=click.IntRange(1), help="Exchanges at once."),
        click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests per second."),
        click.option("--filter", "filter_", metavar="JSONPATH", help="Only events whose payload matches: '$.amount ? (@ > 100)'."),
        click.option("--type", "types", multiple=True, metavar="PATTERN", help="user.created, user.* or *; may be repeated."),
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


async def _vetted(url: str, config: Config) -> Vetted:
    from hookd.net.resolver import Resolver, own_addresses  # noqa: PLC0415 - not for --help
    from hookd.net.vetting import vet  # noqa: PLC0415

    network = config.network
    rules = address_rules(network, own_addresses())
    resolver = Resolver(lambda: rules, nameservers=network.nameservers, mono=time.monotonic)
    try:
        return await vet(url, resolver, https_only=network.https_only)
    finally:
        await resolver.close()


async def _judged(url: str, config: Config) -> Any:
    found = await _vetted(url, config)
    if not found.allowed:
        detail = f" ({found.detail})" if found.detail else ""
        hint = "; network.allow in the configuration lets addresses through" if found.detail else ""
        raise Failed(f"{url} is refused: {found.reason}{detail}{hint}")
    if found.reason:
        click.echo(f"note: {found.reason}; it is registered all the same", err=True)
    return found.target


@endpoint.command()
@click.argument("url")
@click.option("--tenant", default="default", show_default=True)
@_settings
@options
@click.pass_obj
def add(invocation: Invocation, /, url: str, tenant: str, **given: Any) -> None:
    """
    Register URL, and print its id and its secret: this once.

    \b
    hookd endpoint add https://example.com/hooks --type 'user.*'
    """  # noqa: D301 - click's mark for lines that stay
    from hookd.core.signing import new_secret  # noqa: PLC0415 - not for --help
    from hookd.postgres import registry  # noqa: PLC0415

    secret = new_secret(secrets.token_bytes(32))

    async def work(connection: asyncpg.Connection, config: Config) -> EndpointRecord:
        target = await _judged(url, config)
        return await registry.add(connection, tenant, _change(given, target), secret)

    record = with_connection(invocation, work)
    if invocation.json:
        print_json(plain(record) | {"secret": secret.reveal()})
    else:
        print_fields({"id": record.id, "secret": secret.reveal(), "url": record.url, "types": record.types})


@endpoint.command(name="list")
@click.option("--tenant")
@click.option("--state", type=STATES)
@click.option("--limit", type=click.IntRange(1, 10000), default=100, show_default=True)
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


def _print(invocation: Invocation, record: EndpointRecord, note: str = "") -> None:
    if invocation.json:
        print_json(record)
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
    wanted = uuid_of(endpoint_id, "endpoint id")
    return with_connection(invocation, lambda c, _: work(c, wanted))


@endpoint.command()
@click.argument("endpoint_id", metavar="ID")
@options
@click.pass_obj
def show(invocation: Invocation, endpoint_id: str) -> None:
    """One endpoint; its secret is never shown again."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    _print(invocation, _simple(invocation, endpoint_id, registry.show))


@endpoint.command()
@click.argument("endpoint_id", metavar="ID")
@click.option("--url", help="Another URL; what is pending goes there too.")
@click.option("--clear", multiple=True, type=click.Choice(["filter", "format", "rate", "concurrency", "description", "headers"]), help="Back to none; may be repeated.")  # fmt: skip
@_settings
@options
@click.pass_obj
def update(
    invocation: Invocation, /, endpoint_id: str, url: str | None, clear: tuple[str, ...], **given: Any
) -> None:
    """Change what is given, and leave the rest.  --type and --header replace all that were there."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    wanted = uuid_of(endpoint_id, "endpoint id")

    async def work(connection: asyncpg.Connection, config: Config) -> EndpointRecord:
        target = await _judged(url, config) if url else None
        return await registry.update(connection, wanted, _change(given, target, clear))

    _print(invocation, with_connection(invocation, work))


@endpoint.command()
@click.argument("endpoint_id", metavar="ID")
@click.option("--reason", help="For people.")
@options
@click.pass_obj
def pause(invocation: Invocation, endpoint_id: str, reason: str | None) -> None:
    """Let its deliveries wait."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    _print(invocation, _simple(invocation, endpoint_id, lambda c, i: registry.pause(c, i, reason)))


@endpoint.command()
@click.argument("endpoint_id", metavar="ID")
@click.option("--missed", type=click.Choice(["all", "latest", "none"]), default="none", show_default=True, help="What a disabled endpoint gets of what it missed.")  # fmt: skip
@options
@click.pass_obj
def resume(invocation: Invocation, endpoint_id: str, missed: str) -> None:
    """Let it receive again, after pause or after it was disabled."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    wanted = uuid_of(endpoint_id, "endpoint id")
    record, queued = with_connection(invocation, lambda c, _: registry.resume(c, wanted, missed))
    _print(invocation, record, f"{queued} missed deliveries queued" if queued else "")


@endpoint.command()
@click.argument("endpoint_id", metavar="ID")
@options
@click.pass_obj
def remove(invocation: Invocation, endpoint_id: str) -> None:
    """Send it nothing more; what is pending is cancelled, its history stays."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help

    _print(invocation, _simple(invocation, endpoint_id, registry.remove))


@endpoint.command()
@click.argument("endpoint_id", metavar="ID")
@click.option("--overlap", default="1d", show_default=True, help="How long the old secret signs too.")
@options
@click.pass_obj
def rotate(invocation: Invocation, endpoint_id: str, overlap: str) -> None:
    """Make a new secret and print it, this once; the old one signs too for a while."""
    from hookd.core.signing import new_secret  # noqa: PLC0415 - not for --help
    from hookd.postgres import registry  # noqa: PLC0415

    try:
        overlap_s = duration(overlap)
    except ValueError as error:
        raise Failed(f"--overlap: {error}", 2) from None
    secret = new_secret(secrets.token_bytes(32))
    record = _simple(invocation, endpoint_id, lambda c, i: registry.rotate(c, i, secret, overlap_s))
    if invocation.json:
        print_json(plain(record) | {"secret": secret.reveal()})
    else:
        print_fields({"id": record.id, "secret": secret.reveal(), "both_sign_for": overlap})


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
    found = asyncio.run(_vetted(url, config))
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
@click.argument("endpoint_id", metavar="ID")
@click.option("--type", "type_", default="hookd.test", show_default=True)
@click.option("--data", default='{"test": true}', show_default=True, help="The payload, JSON.")
@options
@click.pass_obj
def test(invocation: Invocation, endpoint_id: str, type_: str, data: str) -> None:
    """Send it a test event now, past the queue, and print the exchange; exit status 0 if it was accepted."""
    wanted = uuid_of(endpoint_id, "endpoint id")
    sent, outcome = with_connection(invocation, lambda c, config: _try(c, config, wanted, type_, data))
    accepted = 200 <= outcome.status < 300
    if invocation.json:
        print_json({
            "request": sent, "accepted": accepted, "outcome": outcome.kind.value, "status": outcome.status or None,
            "reason": outcome.reason or None, "headers": dict(outcome.headers), "body": outcome.body,
            "total_ms": round(outcome.total_ms, 1), "connect_ms": outcome.connect_ms,
        })  # fmt: skip
    else:
        click.echo("\n".join(f"> {line}" for line in sent.splitlines()))
        if outcome.status:
            click.echo(f"< {outcome.status}")
            click.echo("\n".join(f"< {name}: {value}" for name, value in outcome.headers))
            if outcome.body:
                click.echo("<\n" + "\n".join(f"< {line}" for line in outcome.body.splitlines()))
        verdict = (
            "accepted" if accepted else f"not accepted: {outcome.reason or f'answered {outcome.status}'}"
        )
        click.echo(f"{verdict}, {shown(outcome.total_ms)} ms")
    if not accepted:
        raise click.exceptions.Exit(1)


async def _try(
    connection: asyncpg.Connection, config: Config, endpoint_id: Any, type_: str, data: str
) -> tuple[str, Outcome]:
    from hookd import __version__  # noqa: PLC0415 - not for --help
    from hookd.core.bodies import ThinLink  # noqa: PLC0415
    from hookd.core.composer import Composer, Wire  # noqa: PLC0415
    from hookd.core.model import BodyFormat, Delivery, DeliveryId, Event  # noqa: PLC0415
    from hookd.core.request import InvalidRequest  # noqa: PLC0415
    from hookd.net.exchange import ExchangeOptions, HttpExchange, tls_context  # noqa: PLC0415
    from hookd.net.resolver import Resolver, own_addresses  # noqa: PLC0415
    from hookd.postgres import registry  # noqa: PLC0415
    from hookd.postgres.queue import Queue  # noqa: PLC0415

    record = await registry.show(connection, endpoint_id)
    found = (await Queue(connection).endpoints([record.key]))[0]  # type: ignore[list-item]
    delivery_config = config.delivery
    thin = None
    if delivery_config.thin_url:
        thin = ThinLink(delivery_config.thin_url, os.urandom(32), 60.0)
    wire = Wire(f"hookd/{__version__}", BodyFormat(delivery_config.format), delivery_config.timeout,
                delivery_config.connect_timeout, config.network.https_only, thin=thin)  # fmt: skip
    event_id = await connection.fetchval("select hookd.uuid7()")
    event = Event(event_id, type_, record.tenant, data.encode(), time.time())
    delivery = Delivery(DeliveryId(0), found.key, event, 0, found.shard)
    try:
        request = Composer(found, wire).compose(delivery, int(time.time()))
    except InvalidRequest as problem:
        raise Failed(f"the request cannot be made: {problem}") from None
    network = config.network
    rules = address_rules(network, own_addresses())
    resolver = Resolver(lambda: rules, nameservers=network.nameservers, mono=time.monotonic)
    exchange = HttpExchange(
        resolver, lambda: rules,
        ExchangeOptions(delivery_config.max_response, delivery_config.redirects, network.https_only, wire.user_agent),
        wall=time.time, mono=time.monotonic, context=tls_context(network.ca_file),
    )  # fmt: skip
    try:
        outcome = await exchange.send(request)
    finally:
        await exchange.close()
    own = {name.lower() for name in found.headers}
    head = (request.head + request.lines).decode("latin-1").replace("\r\n", "\n").rstrip("\n")
    shown_head = "\n".join(
        f"{line.partition(':')[0]}: ***" if line.partition(":")[0].lower() in own else line
        for line in head.split("\n")
    )
    return f"{shown_head}\n\n{request.body.decode('utf-8', 'replace')}", outcome
