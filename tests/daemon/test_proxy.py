"""The daemon behind an egress proxy."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from tests.net.test_tunnel import ProxyServer
from tests.producing import add_endpoint, fetch, send, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

pytestmark = pytest.mark.usefixtures("one_server")


def test_deliveries_go_through_and_a_dead_proxy_uses_up_no_attempt(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    async def go() -> None:
        async with Receiver() as receiver:
            await add_endpoint(dsn, receiver.url)
            async with ProxyServer() as proxy:
                port = proxy.port
                daemon = start_daemon(HOOKD_NETWORK__PROXY=f"http://user:hunter2@127.0.0.1:{port}")
                await send(dsn, "thing.made")
                await receiver.wait_for_calls(1)
                assert proxy.asked == [f"127.0.0.1:{receiver.port}"]
                await wait_empty(dsn)
            # the proxy is gone, with the tunnels through it
            await send(dsn, "thing.made")
            async with asyncio.timeout(30):
                while "the egress proxy cannot be reached" not in json.dumps(daemon.log()):
                    await asyncio.sleep(0.05)
            (row,) = await fetch(dsn, "select attempt from hookd.delivery")
            assert row["attempt"] == 0
            assert "hunter2" not in json.dumps(daemon.log())

    asyncio.run(go())


def test_a_proxy_that_resolves_is_asked_for_the_name(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    """``proxy_resolves``: hookd asks no name server and judges no address, which both are the proxy's to do."""

    async def go() -> None:
        async with Receiver() as receiver, ProxyServer() as proxy:
            await add_endpoint(dsn, f"http://localhost:{receiver.port}/hook")
            start_daemon(
                HOOKD_NETWORK__PROXY=f"http://127.0.0.1:{proxy.port}",
                HOOKD_NETWORK__PROXY_RESOLVES="true",
                HOOKD_NETWORK__ALLOW="[]",
            )
            await send(dsn, "thing.made")
            await receiver.wait_for_calls(1)
            assert proxy.asked == [f"localhost:{receiver.port}"]
            await wait_empty(dsn)

    asyncio.run(go())


def test_proxy_variables_of_the_environment_are_ignored(
    dsn: str, start_daemon: Callable[..., DaemonProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        async with Receiver() as receiver, ProxyServer() as proxy:
            for name in ("http_proxy", "https_proxy", "all_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
                monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{proxy.port}")
            monkeypatch.delenv("NO_PROXY", raising=False)
            monkeypatch.delenv("no_proxy", raising=False)
            await add_endpoint(dsn, receiver.url)
            start_daemon()
            await send(dsn, "thing.made")
            await receiver.wait_for_calls(1)
            await wait_empty(dsn)
            assert proxy.asked == []

    asyncio.run(go())
