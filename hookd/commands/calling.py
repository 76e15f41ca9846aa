"""Requests that a command makes itself, past the queue: the test event, the challenge, the guard's judgement."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import click

from hookd.commands.session import Failed, keyring_of, whoami
from hookd.config import address_rules, allowed_names
from hookd.core.urls import NO_FULL_NAME, PRIVATE_NAME

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    import asyncpg

    from hookd.config import Config
    from hookd.core.challenge import Verification
    from hookd.core.composer import Wire
    from hookd.core.model import Endpoint, Outcome
    from hookd.net.exchange import HttpExchange
    from hookd.net.resolver import Resolver
    from hookd.net.tunnel import ByProxy
    from hookd.net.vetting import Vetted
    from hookd.postgres.registry import EndpointRecord


async def vetted(url: str, config: Config) -> Vetted:
    """What the address guard says of a URL."""
    from hookd.net.vetting import vet  # noqa: PLC0415 - not for --help

    resolver = _resolver(config)
    try:
        return await vet(
            url, resolver, https_only=config.network.https_only, names=allowed_names(config.network)
        )
    finally:
        await resolver.close()


async def judged(url: str, config: Config) -> Any:
    """
    The target of a URL that may be registered.

    Raises:
        Failed: the guard refuses it; says why.
    """
    found = await vetted(url, config)
    if not found.allowed:
        detail = f" ({found.detail})" if found.detail else ""
        hint = "; network.allow in the configuration lets addresses through" if found.detail else ""
        if found.reason in (NO_FULL_NAME, PRIVATE_NAME):
            hint = "; network.allow_names in the configuration lets names through"
        raise Failed(f"{url} is refused: {found.reason}{detail}{hint}")
    if found.reason:
        click.echo(f"note: {found.reason}; it is registered all the same", err=True)
    return found.target


async def verification(
    connection: asyncpg.Connection, config: Config, endpoint_id: UUID
) -> tuple[EndpointRecord, Verification]:
    """Ask an endpoint whether it wants to be called, and write down what it said."""
    from hookd.postgres import registry  # noqa: PLC0415 - not for --help
    from hookd.verification import ask  # noqa: PLC0415

    record = await registry.show(connection, endpoint_id)
    if record.state == "removed":
        raise Failed(f"endpoint {endpoint_id} was removed")
    found = await _endpoint(connection, config, record)
    async with _exchange(config) as exchange:
        answer = await ask(found, exchange, _wire(config), time.time())
    problem = None if answer.verified else answer.reason
    record = await registry.note_verification(connection, endpoint_id, found.url, problem, actor=whoami())
    return record, answer


async def tested(
    connection: asyncpg.Connection, config: Config, endpoint_id: Any, type_: str, data: str
) -> tuple[str, Outcome]:
    """Send an endpoint a test event: the request, with the endpoint's own headers hidden, and what came of it."""
    from hookd.core.request import InvalidRequest  # noqa: PLC0415 - not for --help
    from hookd.postgres import audit, registry  # noqa: PLC0415
    from hookd.trial import try_out  # noqa: PLC0415

    record = await registry.show(connection, endpoint_id)
    if record.owes_an_answer(required=config.security.require_verification):
        raise Failed(f"it receives nothing before it is verified; run: hookd endpoint verify {endpoint_id}")
    found = await _endpoint(connection, config, record)
    event_id = await connection.fetchval("select hookd.uuid7()")
    await audit.record(
        connection, whoami(), "endpoint.test", audit.Subject(endpoint=endpoint_id), {"type": type_}
    )
    async with _exchange(config) as exchange:
        try:
            sent, outcome = await try_out(
                found, exchange, _wire(config), event_id=event_id, type_=type_, data=data, now=time.time()
            )
        except InvalidRequest as problem:
            raise Failed(f"the request cannot be made: {problem}") from None
    head = "\n".join(f"{name}: {value}" for name, value in sent["headers"])
    return f"{sent['line']}\n{head}\n\n{sent['body']}", outcome


async def _endpoint(connection: asyncpg.Connection, config: Config, record: EndpointRecord) -> Endpoint:
    """An endpoint with its secrets."""
    from hookd.core.model import EndpointKey  # noqa: PLC0415 - not for --help
    from hookd.postgres.queue import Queue  # noqa: PLC0415

    keyring = keyring_of(config)
    queue = Queue(connection, lambda: keyring)
    found = (await queue.endpoints([EndpointKey(record.key)]))[0]
    problem = queue.unreadable.get(record.id)
    if problem is not None:
        raise Failed(f"the secrets of endpoint {record.id} cannot be read: {problem}")
    return found


def _wire(config: Config) -> Wire:
    from hookd import __version__  # noqa: PLC0415 - not for --help
    from hookd.core.bodies import ThinLink  # noqa: PLC0415
    from hookd.core.composer import Wire as Common  # noqa: PLC0415
    from hookd.core.model import BodyFormat  # noqa: PLC0415

    delivery = config.delivery
    thin = ThinLink(delivery.thin_url, os.urandom(32), 60.0) if delivery.thin_url else None
    return Common(f"hookd/{__version__}", BodyFormat(delivery.format), delivery.timeout, delivery.connect_timeout,
                  config.network.https_only, allowed_names(config.network), thin=thin)  # fmt: skip


def _resolver(config: Config) -> Resolver | ByProxy:
    from hookd.net.resolver import Resolver as Names  # noqa: PLC0415 - not for --help
    from hookd.net.resolver import own_addresses  # noqa: PLC0415
    from hookd.net.tunnel import ByProxy as NoNames  # noqa: PLC0415

    network = config.network
    if network.proxy_resolves:
        return NoNames()
    rules = address_rules(network, own_addresses())
    return Names(lambda: rules, nameservers=network.nameservers, hosts_file=network.hosts_file,
                 search_domains=network.search_domains, mono=time.monotonic)  # fmt: skip


@contextlib.asynccontextmanager
async def _exchange(config: Config) -> AsyncIterator[HttpExchange]:
    from hookd import __version__  # noqa: PLC0415 - not for --help
    from hookd.net.exchange import ExchangeOptions, tls_context  # noqa: PLC0415
    from hookd.net.exchange import HttpExchange as Exchange  # noqa: PLC0415
    from hookd.net.resolver import own_addresses  # noqa: PLC0415

    network, delivery = config.network, config.delivery
    rules = address_rules(network, own_addresses())
    exchange = Exchange(
        _resolver(config), lambda: rules,
        ExchangeOptions(delivery.max_response, delivery.redirects, network.https_only, f"hookd/{__version__}",
                        allowed_names(network)),
        wall=time.time, mono=time.monotonic, context=tls_context(network.ca_file),
        proxy=config.egress_proxy(),
    )  # fmt: skip
    try:
        yield exchange
    finally:
        await exchange.close()
