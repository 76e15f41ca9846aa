"""A receiver under a name that only this network has, as in docker compose: allowed by name, judged by address."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.daemon.test_api import Client
from tests.net.test_resolver import A, Dns
from tests.producing import fetch, send, wait_empty
from tests.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon_process import DaemonProcess

ADDRESS = "the URL is refused: the address is not allowed"
NAME = "the URL is refused: the host has a single label; write its full name"


@pytest.mark.parametrize("server_dsn", ["embedded"], indirect=True)
@pytest.mark.parametrize(
    ("names", "allow", "refused"),
    [
        ('["receiver"]', '["127.0.0.0/8"]', None),
        ('["receiver"]', "[]", ADDRESS),
        ('["*.receiver"]', '["127.0.0.0/8"]', NAME),
        ("[]", '["127.0.0.0/8"]', NAME),
    ],
)
def test_a_single_label(
    dsn: str, start_daemon: Callable[..., DaemonProcess], names: str, allow: str, refused: str | None
) -> None:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        transport, dns = await loop.create_datagram_endpoint(Dns, local_addr=("127.0.0.1", 0))
        dns.records = {("receiver", A): ["127.0.0.1"]}
        port = transport.get_extra_info("sockname")[1]
        try:
            async with Receiver() as receiver:
                daemon = await asyncio.to_thread(
                    start_daemon,
                    HOOKD_NETWORK__ALLOW=allow,
                    HOOKD_NETWORK__ALLOW_NAMES=names,
                    HOOKD_NETWORK__NAMESERVERS=f'["127.0.0.1:{port}"]',
                )
                url = receiver.url.replace("127.0.0.1", "receiver")
                status, said = await asyncio.to_thread(
                    Client(daemon.admin), "POST", "/endpoints", {"url": url}
                )
                assert (status, said.get("detail")) == ((422, refused) if refused else (201, None))
                if refused is None:
                    await send(dsn, "user.created")
                    await wait_empty(dsn)
                    (attempt,) = await fetch(dsn, "select verdict, outcome, reason from hookd.attempt")
                    assert attempt["verdict"] == "delivered", dict(attempt)
                    assert receiver.calls[0].headers["host"] == url.split("/")[2]
        finally:
            transport.close()

    asyncio.run(go())
