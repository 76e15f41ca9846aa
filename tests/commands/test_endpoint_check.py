"""``hookd endpoint check``: what the guard says of what people type."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from typing import TYPE_CHECKING

import pytest

from hookd.core.addresses import AddressRules
from hookd.net.resolver import Resolver
from hookd.net.vetting import Vetted, vet
from tests.cli import Cli
from tests.net.test_resolver import AAAA, A, Dns

if TYPE_CHECKING:
    from pathlib import Path

GUARDED = {"HOOKD_NETWORK__ALLOW": "[]", "HOOKD_NETWORK__NAMESERVERS": '["127.0.0.1"]'}
"""As in production; and a name server that is not there, which says so at once."""


@pytest.fixture
def check(tmp_path: Path) -> Cli:
    return Cli("postgresql://nobody@127.0.0.1:1/none", tmp_path)


@pytest.mark.parametrize(
    ("url", "host", "addresses", "reason"),
    [
        ("https://93.184.216.34/hook", "93.184.216.34:443", ["93.184.216.34"], None),
        ("HTTP://[2606:4700::1111]:8080", "[2606:4700::1111]:8080", ["2606:4700::1111"], None),
        ("https://Example.COM./a?b#c", "example.com:443", [], "no DNS server answers"),
        ("https://bücher.example.com", "xn--bcher-kva.example.com:443", [], "no DNS server answers"),
    ],
)
def test_allowed(check: Cli, url: str, host: str, addresses: list[str], reason: str | None) -> None:
    (said,) = check.json("endpoint", "check", url, **GUARDED)
    assert said == {
        "url": url, "allowed": True, "host": host, "addresses": addresses, "reason": reason, "detail": None,
    }  # fmt: skip
    text = check.ok("endpoint", "check", url, **GUARDED)
    assert text.startswith("allowed: http")
    assert (addresses[0] if addresses else str(reason)) in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "reason", "detail"),
    [
        ("http://10.0.0.1/", "the address is not allowed", "10.0.0.1: private (RFC 1918)"),
        ("http://localhost:9000/", "the address is not allowed", "127.0.0.1: loopback (RFC 1122); ::1: loopback (RFC 4291)"),
        ("http://169.254.169.254/latest", "the address is not allowed", "169.254.169.254: link-local and cloud metadata (RFC 3927)"),
        ("http://[::ffff:10.0.0.1]/", "the address is not allowed", None),
        ("http://127.1/", "the host looks like an IPv4 address but is not written as four decimal numbers", None),
        ("example.com/hook", "this is no URL; write https://host/path", None),
        ("example.com:8080", "this is no URL; write https://host/path", None),
        ("localhost:9000", "this is no URL; write https://host/path", None),
        ("", "this is no URL; write https://host/path", None),
        ("https://", "the URL has no host", None),
        (" https://example.com/", "the URL has a space or a control character in it", None),
        ("https://example.com/a b", "the URL has a space or a control character in it", None),
        ("https://example.com/\x1b[2J", "the URL has a space or a control character in it", None),
        ("https://me:secret@example.com/", "a user name or password in the URL is not allowed; set a header instead", None),
        ("https://intranet/", "the host has a single label; write its full name", None),
        ("https://nas.local/", "the host is a private name, which the public DNS does not have", None),
        ("https://example.com:22/", "port 22 belongs to another protocol and is never called", None),
        ("ftp://example.com/", "the scheme is 'ftp'; only https and http are called", None),
        ("http://\udcff/", "the host is not a valid international name", None),
    ],
)  # fmt: skip
def test_refused(check: Cli, url: str, reason: str, detail: str | None) -> None:
    done = check("endpoint", "check", url, "--json", **GUARDED)
    assert (done.returncode, done.stderr) == (1, "")
    said = json.loads(done.stdout)
    assert (said["allowed"], said["addresses"], said["reason"]) == (False, [], reason)
    assert detail is None or said["detail"] == detail
    done = check("endpoint", "check", url, **GUARDED)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"refused: {reason}")
    assert "\x1b" not in done.stdout


def test_what_the_configuration_says_counts(check: Cli) -> None:
    network = {
        "HOOKD_NETWORK__ALLOW": '["10.0.0.0/8"]',
        "HOOKD_NETWORK__DENY": '["10.1.0.0/16", "93.184.216.0/24"]',
    }
    assert (
        check.ok("endpoint", "check", "http://10.0.0.1/", **network)
        == "allowed: http://10.0.0.1/ (10.0.0.1)\n"
    )
    for url in ("http://10.1.0.1/", "http://93.184.216.34/"):
        assert "denied by network.deny" in check("endpoint", "check", url, **network).stdout
    done = check("endpoint", "check", "http://93.184.216.34/", HOOKD_NETWORK__HTTPS_ONLY="true")
    assert (done.returncode, done.stdout) == (1, "refused: only https is allowed here (network.https_only)\n")
    nat64 = {"HOOKD_NETWORK__ALLOW": "[]", "HOOKD_NETWORK__NAT64_PREFIXES": '["64:ff9b::/96"]'}
    assert check.ok("endpoint", "check", "http://[64:ff9b::808:808]/", **nat64).startswith("allowed: ")
    inside = check("endpoint", "check", "http://[64:ff9b::a00:1]/", **nat64)
    assert (inside.returncode, "it embeds 10.0.0.1: private" in inside.stdout) == (1, True)


def test_a_private_name_is_allowed_by_name_and_judged_by_address(check: Cli) -> None:
    names = GUARDED | {"HOOKD_NETWORK__ALLOW_NAMES": '["Receiver", "*.internal"]'}
    for url in ("http://receiver:9000/", "http://a.b.internal/"):
        assert "no DNS server answers" in check.ok("endpoint", "check", url, **names)
        assert "refused: the host" in check("endpoint", "check", url, **GUARDED).stdout
    assert "refused: the host" in check("endpoint", "check", "http://nas.local/", **names).stdout
    for wrong in (
        "*",
        "10.0.0.1",
        "10.0.0.0/8",
        "http://receiver",
        "receiver:9000",
        "a..b",
        "",
        "*.*.internal",
        "ä.internal",
    ):
        said = check.fails(
            2, "endpoint", "check", "http://receiver/", HOOKD_NETWORK__ALLOW_NAMES=json.dumps([wrong])
        )
        assert "network.allow_names" in said


def test_wrong_usage_and_wrong_configuration_are_2(check: Cli) -> None:
    check.fails(2, "endpoint", "check")
    check.fails(2, "endpoint", "check", "https://a.example/", "https://b.example/")
    assert "nat64_prefixes" in check.fails(
        2, "endpoint", "check", "https://a.example/", HOOKD_NETWORK__NAT64_PREFIXES='["64:ff9b::/95"]'
    )


def test_some_addresses_of_a_name_are_refused_and_others_not() -> None:
    async def go() -> Vetted:
        loop = asyncio.get_running_loop()
        transport, dns = await loop.create_datagram_endpoint(Dns, local_addr=("127.0.0.1", 0))
        dns.records = {("a.example", A): ["10.0.0.1", "93.184.216.34"], ("a.example", AAAA): ["fd00::1"]}
        rules = AddressRules(own=frozenset({ipaddress.ip_address("5.6.7.8")}))
        port = transport.get_extra_info("sockname")[1]
        resolver = Resolver(lambda: rules, nameservers=[f"127.0.0.1:{port}"], mono=time.monotonic)
        try:
            return await vet("https://a.example/", resolver, https_only=False)
        finally:
            await resolver.close()
            transport.close()

    found = asyncio.run(go())
    assert (found.allowed, found.addresses, found.reason) == (True, ("93.184.216.34",), "")
    assert found.detail == "10.0.0.1: private (RFC 1918); fd00::1: unique local (RFC 4193)"


@pytest.mark.parametrize(
    ("configured", "level", "said"),
    [
        ([], "warn", 'network.nat64_prefixes = ["64:ff9b::/96"]'),
        (["64:ff9b::/96"], "ok", "64:ff9b::/96 is judged by"),
    ],
)
def test_doctor_notices_nat64(configured: list[str], level: str, said: str) -> None:
    import msgspec

    from hookd.commands.doctor import _nat64
    from hookd.config import Config

    config = msgspec.structs.replace(
        Config(), network=msgspec.structs.replace(Config().network, nat64_prefixes=configured)
    )

    async def go() -> list[object]:
        async def synthesised(*_: object, **__: object) -> list[object]:
            return [(None, None, None, "", (a, 443, 0, 0)) for a in ("64:ff9b::c000:aa", "64:ff9b::c000:ab")]

        loop = asyncio.get_running_loop()
        loop.getaddrinfo = synthesised  # type: ignore[method-assign, assignment]
        return list(await _nat64(config))

    (finding,) = asyncio.run(go())
    assert finding.level == level  # type: ignore[attr-defined]
    assert said in finding.said  # type: ignore[attr-defined]
