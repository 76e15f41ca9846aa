"""What tests do to a database: register endpoints, send events, wait."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import asyncpg

from hookd.core.sealing import PLAIN, Keyring
from hookd.core.signing import new_secret
from hookd.core.urls import Target, parse_url
from hookd.postgres import registry
from hookd.postgres.registry import EndpointChange
from tests.daemon_process import PLANTED


async def add_endpoint(dsn: str, url: str, *, tenant: str = "default", **change: Any) -> str:
    """Register one past the guard; returns its secret."""
    secret, _ = await add_endpoint_with_id(dsn, url, tenant=tenant, **change)
    return secret


async def add_endpoint_with_id(
    dsn: str, url: str, *, tenant: str = "default", keyring: Keyring = PLAIN, **change: Any
) -> tuple[str, Any]:
    target = parse_url(url)
    assert isinstance(target, Target), target
    secret = new_secret(os.urandom(32))
    PLANTED.add(secret.reveal().removeprefix("whsec_"))
    PLANTED.update(value for value in change.get("headers", {}).values() if len(value) > 12)
    connection = await asyncpg.connect(dsn)
    try:
        record = await registry.add(
            connection,
            tenant,
            EndpointChange(url=target.url, host=target.lane, **change),
            secret,
            keyring=keyring,
        )
    finally:
        await connection.close()
    return secret.reveal(), record.id


async def send(dsn: str, type_: str = "thing.made", payload: str = "{}", **named: Any) -> str:
    """One event; returns its id."""
    connection = await asyncpg.connect(dsn)
    try:
        extra = "".join(f", {name} => ${n}" for n, name in enumerate(named, 3))
        return str(
            await connection.fetchval(
                f"select hookd.send($1::text, $2::text{extra})", type_, payload, *named.values()
            )
        )
    finally:
        await connection.close()


async def fetch(dsn: str, sql: str, *args: Any) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(sql, *args)
    finally:
        await connection.close()


async def wait_empty(dsn: str, deadline_s: float = 60.0) -> None:
    """Wait until nothing is pending."""
    await wait_for_row(dsn, "select 1 where not exists (select from hookd.delivery)", deadline_s=deadline_s)


async def wait_for_row(dsn: str, sql: str, *args: Any, deadline_s: float = 60.0) -> asyncpg.Record:
    """Wait until a query has a row."""
    connection = await asyncpg.connect(dsn)
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                row = await connection.fetchrow(sql, *args)
                if row is not None:
                    return row
                await asyncio.sleep(0.02)
    finally:
        await connection.close()
