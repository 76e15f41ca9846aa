"""An address that this machine gets while the daemon runs is its own from then on."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING, cast

import hookd.daemon
from hookd.config import Config
from hookd.core.addresses import classify
from hookd.daemon import Daemon

if TYPE_CHECKING:
    import pytest

    from hookd.postgres.connect import Database

ADDRESS = ipaddress.ip_address("93.184.216.34")


def test_own_addresses_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own: set[ipaddress.IPv4Address | ipaddress.IPv6Address] = set()
    monkeypatch.setattr(hookd.daemon, "own_addresses", lambda: frozenset(own))
    monkeypatch.setattr(hookd.daemon, "OWN_ADDRESSES_EVERY_S", 0.01)

    async def go() -> None:
        daemon = Daemon(Config(), cast("Database", None), lambda: None)
        keeping = asyncio.create_task(daemon._keep_rules())
        try:
            assert classify(ADDRESS, daemon.rules).allowed
            own.add(ADDRESS)
            async with asyncio.timeout(10):
                while classify(ADDRESS, daemon.rules).allowed:
                    await asyncio.sleep(0.005)
            assert (await daemon.resolver.resolve(str(ADDRESS))).blocked
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await daemon.exchange.close()

    asyncio.run(go())
