"""The hosts file and search domains: neither is looked at unless it is configured."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import time
from typing import TYPE_CHECKING

from hookd.core.addresses import AddressRules
from hookd.net.hosts import HostsFile
from hookd.net.resolver import Resolver
from tests.cli import Cli
from tests.net.test_resolver import AAAA, A, Dns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    import pytest

RULES = AddressRules(allow=(ipaddress.ip_network("10.0.0.0/8"),))

HOSTS = """
127.0.0.1\tlocalhost
10.0.0.7   Receiver receiver.corp. # 10.0.0.8 commented
fd00::7 receiver
10.0.0.7 receiver
nonsense receiver
fe80::1%lo0 zoned
"""


def with_resolver(
    act: Callable[[Dns, Resolver], Awaitable[None]], *, hosts_file: str = "", search: tuple[str, ...] = ()
) -> None:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        transport, dns = await loop.create_datagram_endpoint(Dns, local_addr=("127.0.0.1", 0))
        port = transport.get_extra_info("sockname")[1]
        resolver = Resolver(
            lambda: RULES, nameservers=[f"127.0.0.1:{port}"], hosts_file=hosts_file, search_domains=search,
            mono=time.monotonic,
        )  # fmt: skip
        try:
            await act(dns, resolver)
        finally:
            await resolver.close()
            transport.close()

    asyncio.run(go())


def test_neither_unless_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    # what resolv.conf would have as "search corp.example"
    monkeypatch.setenv("LOCALDOMAIN", "corp.example")

    async def act(dns: Dns, resolver: Resolver) -> None:
        dns.records = {("receiver.corp.example", A): ["10.0.0.1"]}
        assert (await resolver.resolve("receiver")).problem == "the name does not exist"
        for name in ("ip6-allnodes", os.uname().nodename.lower()):
            assert not (await resolver.resolve(name)).addresses, "the machine's own hosts file"
        assert {name for name, _ in dns.asked} == {"receiver", "ip6-allnodes", os.uname().nodename.lower()}

    with_resolver(act)


def test_names_of_the_hosts_file_are_not_asked_for_and_are_judged(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(HOSTS)

    async def act(dns: Dns, resolver: Resolver) -> None:
        found = await resolver.resolve("receiver")
        assert found.addresses == ("10.0.0.7",)
        assert found.detail == "fd00::7: unique local (RFC 4193)"
        assert (await resolver.resolve("receiver.corp")).addresses == ("10.0.0.7",)
        assert (await resolver.resolve("zoned")).blocked
        assert not dns.asked
        dns.records = {("other", A): ["10.0.0.9"]}
        assert (await resolver.resolve("other")).addresses == ("10.0.0.9",)
        (tmp_path / "new").write_text("10.0.0.10 other\n")
        (tmp_path / "new").replace(tmp_path / "hosts")
        assert (await resolver.resolve("other")).addresses == ("10.0.0.10",), "it is read again"
        (tmp_path / "hosts").unlink()
        assert (await resolver.resolve("other")).addresses == ("10.0.0.10",), "while it is replaced"

    with_resolver(act, hosts_file=str(tmp_path / "hosts"))


def test_single_labels_are_looked_for_below_search_domains() -> None:
    async def act(dns: Dns, resolver: Resolver) -> None:
        dns.records = {
            ("receiver.two.example", A): ["10.0.0.2"], ("receiver", A): ["10.0.0.1"], ("bare", AAAA): [], ("bare", A): ["10.0.0.3"],
            ("a.example.one.example", A): ["10.0.0.4"],
        }  # fmt: skip
        for _ in range(2):
            assert (await resolver.resolve("receiver")).addresses == ("10.0.0.2",)
            assert (await resolver.resolve("bare")).addresses == ("10.0.0.3",)
            assert (await resolver.resolve("a.example")).problem == "the name does not exist"
        asked = [name for name, kind in dns.asked if kind == A]
        assert sorted(asked) == sorted(set(asked)), "each once"
        assert "a.example.one.example" not in asked
        assert "receiver" not in asked

    with_resolver(act, search=("One.example", "two.example"))


def test_a_file_without_a_path_has_no_names() -> None:
    assert HostsFile().addresses("localhost") == ()


def test_the_commands_use_them(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("10.0.0.7 receiver\n")
    cli = Cli("postgresql://nobody@127.0.0.1:1/none", tmp_path)
    network = {
        "HOOKD_NETWORK__ALLOW": '["10.0.0.0/8"]', "HOOKD_NETWORK__ALLOW_NAMES": '["receiver"]',
        "HOOKD_NETWORK__NAMESERVERS": '["127.0.0.1"]',
    }  # fmt: skip
    with_file = network | {"HOOKD_NETWORK__HOSTS_FILE": str(tmp_path / "hosts")}
    assert "(10.0.0.7)" in cli.ok("endpoint", "check", "http://receiver/", **with_file)
    assert "no DNS server" in cli.ok("endpoint", "check", "http://receiver/", **network)
    for key, value in (
        ("HOSTS_FILE", str(tmp_path / "none")),
        ("SEARCH_DOMAINS", '["*.corp"]'),
        ("SEARCH_DOMAINS", '[""]'),
    ):
        said = cli.fails(
            2, "endpoint", "check", "http://receiver/", **network, **{f"HOOKD_NETWORK__{key}": value}
        )
        assert f"network.{key.lower()}" in said
