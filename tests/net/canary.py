"""
A network in which every address is a canary's: over ten thousand attempts to reach one through the real exchange.

Run in a network namespace of its own (``unshare -n python -m tests.net.canary MODE``): AnyIP routes make every address
local, so a connection that the guard lets through is accepted here, wherever it was meant to go, and is counted.  Two
public addresses belong to a receiver that answers, and redirects; a DNS server says what each attempt wants it to say.

Modes: ``whole``; ``socket``, without the resolver's check, so that the guard at the socket stands alone; ``is_private``,
with ``ipaddress``' opinion in place of the guard, and ``none``, with no guard: then the canary must be touched, or this
proves nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import json
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast
from uuid import UUID

from tests.spelling import as_host, as_ipv6

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hookd.core.proxies import Proxy

PORTS = (80, 443, 3000, 4000, 5000, 8000, 8080, 8440, 8443, 9090, 9200, 10000, 22, 5432, 6379)

PUBLIC_4, PUBLIC_6 = "93.184.216.34", "2606:4700::1111"
OWN = "5.6.7.8"
"""A public address that is this machine's own."""

DNS_ADDRESS = ("127.0.0.53", 5353)

TARGETS_4 = (
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.254", "192.168.1.1",
    "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.0.9", "192.0.2.1", "192.31.196.1",
    "192.52.193.1", "192.88.99.1", "192.175.48.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "168.63.129.16", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", OWN,
)  # fmt: skip
TARGETS_6 = (
    "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "2001::1", "2001:2::1", "2001:10::1",
    "2001:20::1", "3fff::1", "5f00::1", "100::1", "100:0:0:1::1", "64:ff9b:1::1", "2620:4f:8000::1", "200::1", "4000::1", "e000::1",
)  # fmt: skip

A, CNAME, AAAA = 1, 5, 28
SERVFAIL, NXDOMAIN = 2, 3


def set_up_network() -> None:
    """Make every address local."""
    for command in (
        "link set lo up",
        "route add local 0.0.0.0/0 dev lo",
        "-6 route add local ::/0 dev lo",
    ):
        subprocess.run(["ip", *command.split()], check=True)


class Canary(asyncio.Protocol):
    """Accepts on every address.  On the public ones it is an honest receiver, elsewhere it sings."""

    touched: ClassVar[Counter[str]] = Counter()
    served: ClassVar[int] = 0
    locations: ClassVar[dict[str, tuple[int, str]]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.buffer = b""
        address = ipaddress.ip_address(transport.get_extra_info("sockname")[0].partition("%")[0])
        mapped = address.ipv4_mapped if address.version == 6 else None
        local = str(mapped or address)
        if local not in (PUBLIC_4, PUBLIC_6):
            Canary.touched[f"{local}:{transport.get_extra_info('sockname')[1]}"] += 1
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end or len(body) < 2:
            return
        Canary.served += 1
        path = head.split(b" ")[1].decode("ascii")
        status, location = Canary.locations.get(path, (200, ""))
        to = f"location: {location}\r\n" if location else ""
        answer = f"HTTP/1.1 {status} X\r\n{to}content-length: 0\r\nconnection: close\r\n\r\n"
        self.transport.write(answer.encode())
        self.transport.close()


async def listen() -> list[asyncio.Server]:
    """A canary on every address and port."""
    loop = asyncio.get_running_loop()
    servers = []
    for port, family in itertools.product(PORTS, (socket.AF_INET, socket.AF_INET6)):
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
        servers.append(await loop.create_server(Canary, sock=sock, backlog=1000))
    return servers


# DNS.

Answer = list[tuple[int, str]] | int | None
"""Records (kind, value); a code; silence."""


class Dns(asyncio.DatagramProtocol):
    """An authoritative server that says what the attempts want, one answer after another."""

    zone: ClassVar[dict[str, list[Answer]]] = {}
    asked: ClassVar[Counter[tuple[str, int]]] = Counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode("latin-1").lower())
            at += 1 + data[at]
        (kind,) = struct.unpack(">H", data[at + 1 : at + 3])
        name = ".".join(labels)
        # whoever asks for something else is an odd spelling on its way out: it gets what it hopes for
        answers = Dns.zone.get(name, [[(A, "127.0.0.1"), (AAAA, "::1")]])
        answer = answers[min(Dns.asked[name, kind], len(answers) - 1)]
        Dns.asked[name, kind] += 1
        if answer is None:
            return
        code = answer if isinstance(answer, int) else 0
        records = [] if isinstance(answer, int) else [r for r in answer if r[0] in (kind, CNAME)]
        owner = b"\xc0\x0c"
        body = b""
        for record, value in records:
            packed = _name(value) if record == CNAME else ipaddress.ip_address(value).packed
            body += owner + struct.pack(">HHIH", record, 1, 0, len(packed)) + packed
            owner = packed if record == CNAME else owner
        head = data[:2] + struct.pack(">HHHHH", 0x8580 | code, 1, len(records), 0, 0)
        self.transport.sendto(head + data[12 : at + 5] + body, addr)


def _name(text: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + b"\x00"


# Attempts.


@dataclass(slots=True)
class Attempt:
    """One try: where it is hidden, and what is called."""

    position: str
    url: str
    forced: tuple[str, int] | None = None
    """Host and port as they are, past the grammar."""
    expected: tuple[str, ...] = ("refused",)
    """Kinds of outcome that are right."""


REFUSED = ("refused", "blocked", "dns_failed")
HOP_REFUSED = ("answered", "blocked", "dns_failed")
"""The public receiver's own answer, where the redirect is not followed; or what became of the hop."""


class Attempts:
    """Generates them: target x spelling x position."""

    def __init__(self) -> None:
        self._number = itertools.count()

    def _port(self) -> int:
        return PORTS[next(self._number) % len(PORTS)]

    def _redirect(self, status: int, location: str) -> str:
        path = f"/r{next(self._number)}"
        Canary.locations[path] = (status, location)
        return f"http://{PUBLIC_4}{path}"

    def _named(self, *answers: Answer) -> str:
        name = f"n{next(self._number)}.attacker.example"
        Dns.zone[name] = list(answers)
        return name

    def hosts(self) -> Iterator[str]:
        for target in TARGETS_4:
            yield from as_host(target).values()
        for target in TARGETS_6:
            address = ipaddress.IPv6Address(target)
            for text in {target, address.exploded, address.exploded.upper()}:
                yield f"[{text}]"
                yield f"[{text}%251]"

    def addresses(self) -> Iterator[str]:
        yield from TARGETS_4
        yield from TARGETS_6
        for target in TARGETS_4:
            yield from as_ipv6(target).values()

    def generate(self) -> Iterator[Attempt]:
        for host in self.hosts():
            yield from self._spelled(host)
        for address in self.addresses():
            yield from self._resolved(address)
        answers: tuple[Answer, ...] = (NXDOMAIN, SERVFAIL, [], None)
        for answer in answers:
            for _ in range(3):
                name = self._named(answer)
                yield Attempt(f"DNS says {answer}", f"http://{name}/", expected=("dns_failed",))

    def _spelled(self, host: str) -> Iterator[Attempt]:
        port = self._port()
        scheme = "https" if port in (443, 8443) else "http"
        yield Attempt("host", f"{scheme}://{host}:{port}/x", expected=REFUSED)
        yield Attempt("past the grammar", f"{scheme}://{host}:{port}/x", (host.strip("[]"), port), REFUSED)
        for decoy in (
            f"http://{PUBLIC_4}@{host}/",
            f"http://{host}#@{PUBLIC_4}/",
            f"http://{PUBLIC_4}\\@{host}/",
        ):
            yield Attempt("decoy", decoy, expected=REFUSED)
        yield Attempt("redirect 307", self._redirect(307, f"http://{host}:{port}/"), expected=HOP_REFUSED)
        yield Attempt(
            "redirect 308, scheme-relative", self._redirect(308, f"//{host}/"), expected=HOP_REFUSED
        )
        again = self._redirect(307, f"http://{host}/")
        yield Attempt("redirect to a redirect", self._redirect(308, again), expected=HOP_REFUSED)

    def _resolved(self, address: str) -> Iterator[Attempt]:
        kind, public = (AAAA, (AAAA, PUBLIC_6)) if ":" in address else (A, (A, PUBLIC_4))
        inside: Answer = [(kind, address)]
        blocked, answered = ("blocked",), ("answered",)
        yield Attempt("DNS answer", f"http://{self._named(inside)}/", expected=blocked)
        chain: Answer = [(CNAME, "a.cdn.example"), (CNAME, "b.cdn.example"), (kind, address)]
        yield Attempt("CNAME chain", f"http://{self._named(chain)}:{self._port()}/", expected=REFUSED)
        mixed: Answer = [(kind, address), public, (kind, address)]
        yield Attempt("mixed answers", f"http://{self._named(mixed)}/", expected=answered)
        to_name = self._redirect(307, f"http://{self._named(inside)}/")
        yield Attempt("redirect to a name", to_name, expected=blocked)
        literal = f"[{address}]" if ":" in address else address
        for status in (300, 301, 302, 303, 304, 305):
            yield Attempt("other redirects", self._redirect(status, f"http://{literal}/"), expected=answered)
        rebound = f"http://{self._named([public], inside)}/"
        yield Attempt("rebinding inside an attempt", rebound, expected=("blocked", "dns_failed", "answered"))

    def rebinding(self) -> list[tuple[Attempt, Attempt]]:
        """Two attempts each: public at first, inside when the name is looked up again."""
        pairs = []
        for address in self.addresses():
            kind, public = (AAAA, (AAAA, PUBLIC_6)) if ":" in address else (A, (A, PUBLIC_4))
            url = f"http://{self._named([public], [(kind, address)])}/"
            pairs.append(
                (
                    Attempt("rebinding, first", url, expected=("answered",)),
                    Attempt("rebinding, then", url, expected=("blocked",)),
                )
            )
        return pairs


@dataclass(slots=True)
class Report:
    """What came of all."""

    attempts: int = 0
    by_position: dict[str, Counter[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)
    written: int = 0
    """Requests that went out, followed redirects included."""

    def note(self, attempt: Attempt, kind: str, reason: str) -> None:
        self.attempts += 1
        self.by_position.setdefault(attempt.position, Counter())[kind] += 1
        if reason:
            self.reasons.add(reason)
        if kind not in attempt.expected:
            self.unexpected.append(f"{attempt.position}: {attempt.url}: {kind} {reason}")


async def try_all(every: int) -> Report:
    """Make the attempts, or every so many-th."""
    from hookd.core.addresses import AddressRules
    from hookd.core.composer import Composer, Wire
    from hookd.core.model import BodyFormat, Delivery, DeliveryId, Endpoint, EndpointKey, Event
    from hookd.core.proxies import parse_proxy
    from hookd.core.request import InvalidRequest, Request, prepare_head
    from hookd.core.urls import Target
    from hookd.net import resolver as resolver_module
    from hookd.net.exchange import ExchangeOptions, HttpExchange
    from tests.net.test_tunnel import ProxyServer

    rules = AddressRules(own=frozenset({ipaddress.ip_address(OWN)}))
    wire = Wire("hookd/test", BodyFormat.RAW, 4.0, 1.0)
    event = Event(UUID(int=2), "a.b", "t", b"{}", 0.0)
    report = Report()

    def compose(attempt: Attempt) -> Request:
        if attempt.forced is None:
            composer = Composer(Endpoint(EndpointKey(1), UUID(int=1), "t", attempt.url, "", 0), wire)
            return composer.compose(Delivery(DeliveryId(1), EndpointKey(1), event, 0, 0), 0)
        host, port = attempt.forced
        target = Target(attempt.url, attempt.url.partition(":")[0], host, port, "/x")
        ascii_target = Target(attempt.url, target.scheme, "x", port, "/x")
        head = prepare_head(ascii_target, {}, user_agent="u", content_type="c")
        return Request(target, head, b"content-length: 2\r\n\r\n", b"{}", 4.0, 1.0)

    async def one(http: Any, attempt: Attempt) -> None:
        try:
            outcome = await http.send(compose(attempt))
        except InvalidRequest as problem:
            report.note(attempt, "refused", str(problem))
        except ValueError:
            # only past the grammar: yarl has its own
            report.note(attempt, "refused" if attempt.forced else "raised", "")
        else:
            refused_hop = outcome.redirects and outcome.kind.value in ("blocked", "dns_failed")
            report.written += outcome.sent + outcome.redirects - bool(refused_hop)
            report.note(attempt, outcome.kind.value, outcome.reason)

    async def all_of(attempts: list[Attempt], mono: Callable[[], float], proxy: Proxy | None = None) -> None:
        resolver = resolver_module.Resolver(
            lambda: rules, nameservers=[":".join(map(str, DNS_ADDRESS))], mono=mono
        )
        http = HttpExchange(
            resolver,
            lambda: rules,
            ExchangeOptions(redirects="any"),
            wall=time.time,
            mono=time.monotonic,
            proxy=proxy,
        )
        try:
            for start in range(0, len(attempts), 100):
                await asyncio.gather(*(one(http, attempt) for attempt in attempts[start : start + 100]))
        finally:
            await http.close()

    generator = Attempts()
    everything = list(generator.generate())[::every]
    within = [a for a in everything if a.position.startswith("rebinding inside")]
    await all_of([a for a in everything if a not in within], time.monotonic)

    # TTL 0, taken at its word: the name is looked up again between the check and the connection
    least, resolver_module.TTL_LEAST_S = resolver_module.TTL_LEAST_S, 0.0
    await all_of(within, time.monotonic)
    resolver_module.TTL_LEAST_S = least

    # once more through a proxy that connects to whatever it is asked for
    async with ProxyServer() as proxy:
        through = list(generator.generate())[:: 3 * every]
        for attempt in through:
            attempt.position = f"by proxy, {attempt.position}"
        await all_of(through, time.monotonic, parse_proxy(proxy.url()))

    pairs = generator.rebinding()[::every]
    jump = 0.0
    resolver = resolver_module.Resolver(
        lambda: rules, nameservers=[":".join(map(str, DNS_ADDRESS))], mono=lambda: time.monotonic() + jump
    )
    http = HttpExchange(resolver, lambda: rules, ExchangeOptions(), wall=time.time, mono=time.monotonic)
    for number in (0, 1):
        for start in range(0, len(pairs), 100):
            await asyncio.gather(*(one(http, pair[number]) for pair in pairs[start : start + 100]))
        jump = 1000.0
    await http.close()
    return report


def hollow_out(mode: str) -> None:
    """Take a layer away, before the modules that use it are imported."""
    from hookd.core import addresses

    core: Any = addresses
    real = core.classify

    def no_opinion(_address: Any, _rules: Any) -> addresses.AddressVerdict:
        return addresses.ALLOWED

    def is_private(address: Any, _rules: Any) -> addresses.AddressVerdict:
        private = ipaddress.ip_address(str(address).partition("%")[0]).is_private
        return addresses.AddressVerdict(not private, addresses.TENANT_REASON if private else "")

    if mode == "is_private":
        core.classify = is_private
    elif mode == "none":
        core.classify = no_opinion
    elif mode == "socket":
        core.classify = no_opinion
        import hookd.net.resolver  # noqa: F401 - it keeps what it has imported

        core.classify = real


def main(mode: str, every: int) -> None:
    hollow_out(mode)
    set_up_network()

    async def go() -> Report:
        loop = asyncio.get_running_loop()
        dns, _ = await loop.create_datagram_endpoint(Dns, local_addr=DNS_ADDRESS)
        servers = await listen()
        try:
            return await try_all(every)
        finally:
            for server in servers:
                server.close()
            dns.close()

    begun = time.monotonic()
    report = asyncio.run(go())
    json.dump(
        {
            "attempts": report.attempts,
            "touched": Canary.touched,
            "by_position": report.by_position,
            "unexpected": report.unexpected,
            "reasons": sorted(report.reasons),
            "written": report.written,
            "served": Canary.served,
            "seconds": round(time.monotonic() - begun, 1),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
