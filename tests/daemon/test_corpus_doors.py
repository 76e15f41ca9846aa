"""The whole corpus at the doors by which an endpoint is written: POST and PATCH of the API, and the command line."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from hookd.commands.calling import judged
from hookd.commands.session import Failed
from hookd.config import parse
from hookd.core.addresses import TENANT_REASON
from hookd.core.urls import Target, UrlProblem, parse_url
from tests.corpus import read
from tests.net.test_resolver import AAAA, A, Dns
from tests.producing import fetch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.daemon_process import DaemonProcess

AT_ONCE = 16

FOUND_OUT = f"{TENANT_REASON}: "
"""What the guard found out follows; a tenant is not told."""


def expected() -> dict[str, str]:
    """Each URL of the corpus, and the reason that whoever registers it reads."""
    said = {}
    for url, reason in read("hostile_urls"):
        said[url] = TENANT_REASON if reason.startswith(FOUND_OUT) else reason
    for url, _, _ in read("hostile_names"):
        said[url] = TENANT_REASON
    for address, why in read("hostile_addresses"):
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            assert why
            url = f"http://[{address}]/hook"
            refused = parse_url(url)
            assert isinstance(refused, UrlProblem), address
            said[url] = refused.reason
            continue
        if "%" in address:
            said[f"http://[{address}]/hook"] = (
                "the host must not be percent-encoded or hold a backslash or zone"
            )
        else:
            said[f"http://[{address}]/hook" if parsed.version == 6 else f"http://{address}/hook"] = (
                TENANT_REASON
            )
    return said


@contextlib.asynccontextmanager
async def name_server() -> AsyncIterator[str]:
    """One that says of the corpus' names what the corpus says."""
    loop = asyncio.get_running_loop()
    transport, dns = await loop.create_datagram_endpoint(Dns, local_addr=("127.0.0.1", 0))
    for url, answers, _ in read("hostile_names"):
        named = parse_url(url)
        assert isinstance(named, Target)
        host = named.host
        dns.records |= {(host, A): [], (host, AAAA): []}
        for answer in answers.split(","):
            dns.records[host, A if ipaddress.ip_address(answer).version == 4 else AAAA].append(answer)
    yield f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    transport.close()


async def all_at_once(act: Callable[[str, str], Any], said: dict[str, str]) -> None:
    left = iter(said.items())

    async def one_after_another() -> None:
        for url, reason in left:
            await act(url, reason)

    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))


@pytest.mark.parametrize("server_dsn", ["embedded"], indirect=True)
def test_the_api_refuses_the_corpus_and_says_why(
    dsn: str, start_daemon: Callable[..., DaemonProcess]
) -> None:
    async def go() -> None:
        async with name_server() as dns, aiohttp.ClientSession() as client:
            network = {"HOOKD_NETWORK__ALLOW": "[]", "HOOKD_NETWORK__NAMESERVERS": f'["{dns}"]'}
            api = f"{(await asyncio.to_thread(start_daemon, **network)).admin}/api/v1/endpoints"

            async def ask(method: str, path: str, url: str) -> tuple[int, Any]:
                async with client.request(method, api + path, json={"url": url}) as answer:
                    return answer.status, await answer.json(content_type=None)

            status, made = await ask("POST", "", "http://93.184.216.34/")
            assert status == 201

            async def refused(url: str, reason: str) -> None:
                for method, path in (("POST", ""), ("PATCH", f"/{made['id']}")):
                    status, said = await ask(method, path, url)
                    got = (status, said.get("code"), said.get("detail"))
                    if any("\ud800" <= c <= "\udfff" for c in url):
                        assert got[:2] == (400, "json"), (method, url, said)
                    else:
                        assert got == (422, "url", f"the URL is refused: {reason}"), (method, url)

            said = expected()
            assert len(said) > 1000
            await all_at_once(refused, said)
            assert (await ask("PATCH", f"/{made['id']}", "http://93.184.216.35/"))[0] == 200
        assert [r["url"] for r in await fetch(dsn, "select url from hookd.endpoint")] == [
            "http://93.184.216.35/"
        ]

    asyncio.run(go())


def test_the_command_line_refuses_the_corpus_and_says_why() -> None:
    async def go() -> None:
        async with name_server() as dns:
            config = parse(f'[network]\nnameservers = ["{dns}"]', environment={}).config

            async def refused(url: str, reason: str) -> None:
                with pytest.raises(Failed) as problem:
                    await judged(url, config)
                assert str(problem.value).startswith(f"{url} is refused: {reason}"), url

            await all_at_once(refused, expected())

    asyncio.run(go())
