"""The resolver against a DNS server that does what a test says."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
import time
from typing import TYPE_CHECKING, cast

import pytest

from hookd.core.addresses import AddressRules
from hookd.core.model import OutcomeKind
from hookd.net.exchange import ExchangeOptions, HttpExchange
from hookd.net.resolver import Resolution, Resolver, own_addresses
from tests.net.test_exchange import request

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

A, CNAME, AAAA = 1, 5, 28

ALLOW = AddressRules(allow=(ipaddress.ip_network("127.0.0.0/8"),))


class Dns(asyncio.DatagramProtocol):
    """A DNS server on loopback."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, int], list[str]] = {}
        self.then: dict[tuple[str, int], list[str]] = {}
        """Records from the second answer on."""
        self.ttl = 60
        self.alias_ttl: int | None = None
        """Where it is set, every name is a CNAME with this TTL, and what it stands for has the records."""
        self.delay_s = 0.0
        self.silent = False
        self.silent_for: set[str | tuple[str, int]] = set()
        """Names, or one family of a name."""
        self.asked: list[tuple[str, int]] = []
        self.withheld: dict[str, list[tuple[bytes, tuple[str, int]]]] | None = None
        """Where it is set, answers wait here for ``let_go``."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode().lower())
            at += 1 + data[at]
        (kind,) = struct.unpack(">H", data[at + 1 : at + 3])
        question = data[12 : at + 5]
        name = ".".join(labels)
        self.asked.append((name, kind))
        found = self.records.get((name, kind), [])
        if (name, kind) in self.then:
            self.records[name, kind] = self.then[name, kind]
        known = any(key[0] == name for key in self.records)
        owner, alias = b"\xc0\x0c", b""
        if found and self.alias_ttl is not None:
            owner = b"\x04real\xc0\x0c"
            alias = b"\xc0\x0c" + struct.pack(">HHIH", CNAME, 1, self.alias_ttl, len(owner)) + owner
        answers = alias + b"".join(
            owner
            + struct.pack(">HHIH", kind, 1, self.ttl, 4 if kind == A else 16)
            + ipaddress.ip_address(a).packed
            for a in found
        )
        flags = 0x8180 if known else 0x8183
        reply = (
            data[:2] + struct.pack(">HHHHH", flags, 1, len(found) + bool(alias), 0, 0) + question + answers
        )
        if self.withheld is not None:
            self.withheld.setdefault(name, []).append((reply, addr))
        elif not self.silent and self.silent_for.isdisjoint((name, (name, kind))):
            asyncio.get_running_loop().call_later(self.delay_s, self.transport.sendto, reply, addr)

    async def heard(self, count: int) -> None:
        """Wait until it was asked so many times in all."""
        async with asyncio.timeout(10):
            while len(self.asked) < count:
                await asyncio.sleep(0.005)

    async def let_go(self, name: str) -> None:
        """Give the answers for a name, after both of its families were asked for."""
        assert self.withheld is not None
        async with asyncio.timeout(10):
            while len(self.withheld.get(name, ())) < 2:
                await asyncio.sleep(0.005)
        for reply, addr in self.withheld.pop(name):
            self.transport.sendto(reply, addr)


def with_dns(
    test: Callable[[Dns, Callable[..., Resolver]], Coroutine[None, None, None]],
) -> Callable[[], None]:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        transport, dns = await loop.create_datagram_endpoint(Dns, local_addr=("127.0.0.1", 0))
        port = transport.get_extra_info("sockname")[1]
        resolvers: list[Resolver] = []

        def make(rules: AddressRules = ALLOW, mono: Callable[[], float] = time.monotonic) -> Resolver:
            resolvers.append(Resolver(lambda: rules, nameservers=[f"127.0.0.1:{port}"], mono=mono))
            return resolvers[-1]

        try:
            await test(dns, make)
        finally:
            for resolver in resolvers:
                await resolver.close()
            transport.close()

    def run() -> None:
        asyncio.run(go())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@with_dns
async def test_both_families_are_asked_and_vetted(dns: Dns, make: Callable[..., Resolver]) -> None:
    dns.records = {("a.example", A): ["127.0.0.2", "10.0.0.1"], ("a.example", AAAA): ["::1"]}
    found = await make().resolve("a.example")
    assert found.addresses == ("127.0.0.2",)
    assert not found.blocked
    assert sorted(dns.asked) == [("a.example", A), ("a.example", AAAA)]


@with_dns
async def test_a_name_with_forbidden_addresses_only_is_blocked(
    dns: Dns, make: Callable[..., Resolver]
) -> None:
    dns.records = {("a.example", A): ["10.0.0.1"], ("a.example", AAAA): ["fd00::1"]}
    found = await make().resolve("a.example")
    assert found.blocked
    assert "10.0.0.1" not in found.problem
    assert "10.0.0.1: private" in found.detail


@with_dns
async def test_names_that_do_not_exist(dns: Dns, make: Callable[..., Resolver]) -> None:
    resolver = make()
    found = await resolver.resolve("none.example")
    assert (found.addresses, found.blocked, found.problem) == ((), False, "the name does not exist")
    await resolver.resolve("none.example")
    assert len(dns.asked) == 2, "a failure is remembered for a moment"


@with_dns
async def test_the_cache_honours_the_ttl_within_bounds(dns: Dns, make: Callable[..., Resolver]) -> None:
    now = 0.0
    resolver = make(mono=lambda: now)
    dns.records = {("a.example", A): ["127.0.0.2"]}
    dns.ttl = 0
    await asyncio.gather(*(resolver.resolve("a.example") for _ in range(50)))
    assert sorted(dns.asked) == [("a.example", A), ("a.example", AAAA)], "asked once, however many wait"
    dns.asked.clear()

    def asked() -> int:
        return dns.asked.count(("a.example", A))

    now = 4.9
    await resolver.resolve("a.example")
    assert asked() == 0
    dns.ttl = 10**6
    now = 5.1
    await resolver.resolve("a.example")
    assert asked() == 1
    now = 5.1 + 299
    await resolver.resolve("a.example")
    assert asked() == 1
    now = 5.1 + 301
    await resolver.resolve("a.example")
    assert asked() == 2


@with_dns
async def test_the_shortest_ttl_of_the_way_counts(dns: Dns, make: Callable[..., Resolver]) -> None:
    """A name that is moved by its CNAME has an address behind it that lives long."""
    now = 0.0
    resolver = make(mono=lambda: now)
    dns.records = {("a.example", A): ["127.0.0.2"]}
    dns.ttl, dns.alias_ttl = 300, 20
    assert (await resolver.resolve("a.example")).addresses == ("127.0.0.2",)
    now = 19.0
    await resolver.resolve("a.example")
    assert resolver.lookups == 1
    now = 21.0
    await resolver.resolve("a.example")
    assert resolver.lookups == 2


@with_dns
async def test_rebinding_is_judged_again(dns: Dns, make: Callable[..., Resolver]) -> None:
    now = 0.0
    resolver = make(mono=lambda: now)
    dns.records = {("a.example", A): ["127.0.0.2"]}
    assert (await resolver.resolve("a.example")).addresses
    dns.records = {("a.example", A): ["169.254.169.254"]}
    now = 1000.0
    assert (await resolver.resolve("a.example")).blocked


@with_dns
async def test_rebinding_between_check_and_connection_is_called_what_it_is(
    dns: Dns, make: Callable[..., Resolver]
) -> None:
    """The cache asks again at once, as with a TTL of 0: allowed, and then not."""
    clock = iter(range(0, 10**9, 400))
    resolver = make(mono=lambda: float(next(clock)))
    dns.records = {("a.example", A): ["127.0.0.2"]}
    dns.then = {("a.example", A): ["10.0.0.1"]}
    http = HttpExchange(resolver, lambda: ALLOW, ExchangeOptions(), wall=time.time, mono=time.monotonic)
    try:
        outcome = await http.send(request("http://a.example/"))
    finally:
        await http.close()
    assert not outcome.sent
    assert (outcome.kind, outcome.reason) == (OutcomeKind.BLOCKED, "the address is not allowed")


@with_dns
async def test_a_channel_that_learned_impatience_is_replaced(dns: Dns, make: Callable[..., Resolver]) -> None:
    """c-ares gives up after 0.25 s once it has seen thousands of quick answers; a slow name must resolve all the same."""
    resolver = make()
    for n in range(1500):
        dns.records[f"h{n}.example", A] = ["127.0.0.2"]
    for start in range(0, 1500, 100):
        await asyncio.gather(*(resolver.resolve(f"h{n}.example") for n in range(start, start + 100)))
    dns.records["slow.example", A] = ["127.0.0.3"]
    dns.delay_s = 2.0
    found = await resolver.resolve("slow.example")
    assert found.addresses == ("127.0.0.3",), found.problem


@with_dns
async def test_channels_are_closed_though_some_look_up_is_always_under_way(
    dns: Dns, make: Callable[..., Resolver]
) -> None:
    """Each has a thread and descriptors: one that is retired is closed with the last of its own look-ups, and not before."""
    now = 0.0
    resolver = make(mono=lambda: now)
    dns.withheld = {}
    for n in range(12):
        dns.records[f"n{n}.example", A] = ["127.0.0.2"]
    earlier = asyncio.create_task(resolver.resolve("n0.example"))
    for n in range(1, 12):
        await dns.heard(2 * n)
        now += 400.0  # each look-up has a new channel
        later = asyncio.create_task(resolver.resolve(f"n{n}.example"))
        await dns.heard(2 * n + 2)
        assert len(resolver._retired) == 1
        await dns.let_go(f"n{n - 1}.example")
        assert (await earlier).addresses == ("127.0.0.2",), "it was not cut short"
        assert resolver._retired == []
        earlier = later
    await dns.let_go("n11.example")
    assert (await earlier).addresses == ("127.0.0.2",)


@with_dns
async def test_literals_and_localhost_ask_nobody(dns: Dns, make: Callable[..., Resolver]) -> None:
    resolver = make()
    assert (await resolver.resolve("127.0.0.1")).addresses == ("127.0.0.1",)
    assert (await resolver.resolve("10.0.0.1")).blocked
    assert (await resolver.resolve("localhost")).addresses == ("127.0.0.1",)
    assert (await resolver.resolve("x.localhost")).addresses == ("127.0.0.1",)
    assert dns.asked == []


def test_without_a_server_it_says_so() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]

    async def go() -> str:
        resolver = Resolver(lambda: ALLOW, nameservers=[f"127.0.0.1:{port}"], mono=time.monotonic)
        try:
            async with asyncio.timeout(60):
                return (await resolver.resolve("a.example")).problem
        finally:
            await resolver.close()

    assert asyncio.run(go()) in ("no DNS server answers", "the name's servers did not answer")


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..example", "-", "é.example"])
def test_odd_names_raise_nothing(host: str) -> None:
    async def go() -> None:
        resolver = Resolver(lambda: ALLOW, nameservers=["127.0.0.1:1"], mono=time.monotonic)
        try:
            assert (await resolver.resolve(host)).problem
        finally:
            await resolver.close()

    asyncio.run(go())


def test_own_addresses_are_all_that_the_kernel_knows() -> None:
    """As the kernel lets anybody find out: an address is this machine's own if a socket can be bound to it."""
    own = own_addresses()
    assert own
    for address in own:
        if address.is_link_local:
            continue  # needs a scope
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as bound:
            bound.bind((str(address), 0))


@with_dns
async def test_a_name_without_an_answer_is_its_own_fault(dns: Dns, make: Callable[..., Resolver]) -> None:
    """The name server answers, if only about something else."""
    dns.silent_for = {"hangs.example"}
    resolver = make()
    http = HttpExchange(resolver, lambda: ALLOW, ExchangeOptions(), wall=time.time, mono=time.monotonic)
    try:
        outcome = await http.send(request("http://hangs.example/", connect_timeout_s=0.5))
    finally:
        await http.close()
    assert (outcome.kind, outcome.reason) == (
        OutcomeKind.DNS_FAILED, "the name's servers did not answer in time",
    )  # fmt: skip
    assert ("", 2) in dns.asked, "the root was asked for"


@with_dns
async def test_name_servers_that_say_nothing_are_nobodys_fault(
    dns: Dns, make: Callable[..., Resolver]
) -> None:
    """Once that is known no name is waited for; one that is in the cache is still known; and any answer ends it."""
    dns.records = {("a.example", A): ["127.0.0.2"], ("b.example", A): ["127.0.0.3"]}
    clock = time.monotonic
    jump = 0.0
    resolver = make(mono=lambda: clock() + jump)
    await resolver.resolve("b.example")
    dns.silent = True
    assert not await resolver.silent(), "something was heard of late"
    jump = 6.0
    assert await resolver.silent()
    found = await resolver.resolve("a.example")
    assert (found.problem, found.ours) == ("no DNS server answers", True)
    assert (await resolver.resolve("b.example")).addresses == ("127.0.0.3",)
    # a server that never answers for the root: the name that is wanted will do
    dns.silent, dns.silent_for = False, {""}
    async with asyncio.timeout(30):
        while (found := await resolver.resolve("a.example")).ours:
            await asyncio.sleep(0.05)
    assert found.addresses == ("127.0.0.2",)
    assert not await resolver.silent()


@with_dns
async def test_who_waits_when_name_servers_fall_silent_is_told(
    dns: Dns, make: Callable[..., Resolver]
) -> None:
    """And does not wait on for a look-up of then, when they have long come back."""
    dns.records = {("a.example", A): ["127.0.0.2"]}
    dns.silent = True
    resolver = make()
    waiting = [asyncio.create_task(resolver.resolve("a.example")) for _ in range(3)]
    while not dns.asked:
        await asyncio.sleep(0.01)
    assert await resolver.silent()
    async with asyncio.timeout(8):
        # their look-up by itself would take 20 s and more
        assert [r.ours for r in await asyncio.gather(*waiting)] == [True] * 3
    dns.silent = False
    async with asyncio.timeout(30):
        while (await resolver.resolve("a.example")).ours:
            await asyncio.sleep(0.05)
    assert (await resolver.resolve("a.example")).addresses == ("127.0.0.2",)


@with_dns
async def test_a_look_up_that_falls_silent_before_it_began_ends_like_the_others(
    dns: Dns, make: Callable[..., Resolver]
) -> None:
    """Its task is cancelled before its first step; whoever waits for it must not be, for nobody would be told."""
    dns.silent = True
    for turns in range(8):
        resolver = make()
        heard: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        listening = asyncio.Event()

        async def root_is_known(
            heard: asyncio.Future[bool] = heard, listening: asyncio.Event = listening
        ) -> bool:
            listening.set()
            return await heard

        resolver._root_is_known = root_is_known  # type: ignore[method-assign]
        falling = asyncio.create_task(resolver.silent())
        async with asyncio.timeout(8):
            await listening.wait()
        heard.set_result(False)
        for _ in range(turns):
            await asyncio.sleep(0)
        asked = asyncio.create_task(resolver.resolve("a.example"))
        assert await falling
        async with asyncio.timeout(8):
            (found,) = await asyncio.gather(asked, return_exceptions=True)
        assert isinstance(found, Resolution), (turns, found)
        assert found.ours, turns


@pytest.mark.parametrize("silent", [A, AAAA])
def test_a_family_that_is_never_answered_for_is_not_waited_for(silent: int) -> None:
    """Some name servers do not answer for AAAA at all: it took longer than a connection may take, each time."""

    @with_dns
    async def check(dns: Dns, make: Callable[..., Resolver]) -> None:
        dns.records = {("a.example", A): ["127.0.0.2"], ("a.example", AAAA): ["::1"]}
        dns.silent_for = {("a.example", silent)}
        async with asyncio.timeout(4):
            found = await make(AddressRules(allow=(*ALLOW.allow, ipaddress.ip_network("::1/128")))).resolve(
                "a.example"
            )
        assert found.addresses == (("::1",) if silent == A else ("127.0.0.2",))

    check()
