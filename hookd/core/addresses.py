"""
The address guard: which IP addresses may be dialled.

The table is ours, from the IANA special-purpose registries (both as of 2025-10-09) and the extra rows that peers miss,
with the RFC beside each.  It does not lean on ``ipaddress.is_global``, whose answers differ between patch releases of
Python (CPython gh-113171, gh-124217, gh-151749).

IPv4: everything but the rows.  IPv6: only 2000::/3, minus the rows.  Forms that embed an IPv4 address (mapped,
compatible, SIIT, NAT64, 6to4, Teredo, ISATAP) are refused whatever they embed: no receiver is reached that way.  The
exception is a NAT64 prefix that the operator names: what comes through it is judged by the IPv4 address inside.

Order of judgement: ``deny``, then ``allow``, then the table, then this machine's own addresses.  An ``allow`` that covers
an embedding form says yes to the form, not to what is inside: ``64:ff9b::/96`` opens no way to 64:ff9b::7f00:1.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

TENANT_REASON = "the address is not allowed"
"""All that a tenant is told: which address it was, and why, would map the network for them."""

TABLE_4 = (
    ("0.0.0.0/8", "this network (RFC 791, 1122)"),
    ("10.0.0.0/8", "private (RFC 1918)"),
    ("100.64.0.0/10", "shared by carriers (RFC 6598)"),
    ("127.0.0.0/8", "loopback (RFC 1122)"),
    ("168.63.129.16/32", "Azure's host agent, internal in spite of its public range"),
    ("169.254.0.0/16", "link-local and cloud metadata (RFC 3927)"),
    ("172.16.0.0/12", "private (RFC 1918)"),
    ("192.0.0.0/24", "protocol assignments (RFC 6890)"),
    ("192.0.2.0/24", "documentation (RFC 5737)"),
    ("192.31.196.0/24", "AS112 (RFC 7535)"),
    ("192.52.193.0/24", "multicast tunnelling (RFC 7450)"),
    ("192.88.99.0/24", "6to4 relay, deprecated (RFC 7526)"),
    ("192.168.0.0/16", "private (RFC 1918)"),
    ("192.175.48.0/24", "AS112 (RFC 7534)"),
    ("198.18.0.0/15", "benchmarking (RFC 2544)"),
    ("198.51.100.0/24", "documentation (RFC 5737)"),
    ("203.0.113.0/24", "documentation (RFC 5737)"),
    ("224.0.0.0/4", "multicast (RFC 5771)"),
    ("240.0.0.0/4", "reserved and broadcast (RFC 1112, 8190)"),
)

TABLE_6 = (
    ("::/128", "unspecified (RFC 4291)"),
    ("::1/128", "loopback (RFC 4291)"),
    ("::ffff:0:0/96", "IPv4-mapped (RFC 4291)"),
    ("::ffff:0:0:0/96", "IPv4-translated (RFC 7915)"),
    ("::/96", "IPv4-compatible, deprecated (RFC 4291)"),
    ("64:ff9b::/32", "NAT64 (RFC 6052, 8215)"),
    ("100::/64", "discard only (RFC 6666)"),
    ("100:0:0:1::/64", "dummy prefix (RFC 9780)"),
    ("2001::/23", "protocol assignments, Teredo, ORCHID (RFC 2928, 4380, 7343, 9374)"),
    ("2001:db8::/32", "documentation (RFC 3849)"),
    ("2002::/16", "6to4 (RFC 3056, 7526)"),
    ("2620:4f:8000::/48", "AS112 (RFC 7534)"),
    ("3fff::/20", "documentation (RFC 9637)"),
    ("5f00::/16", "segment routing (RFC 9602)"),
    ("fc00::/7", "unique local (RFC 4193)"),
    ("fe80::/10", "link-local (RFC 4291)"),
    ("fec0::/10", "site-local, deprecated (RFC 3879)"),
    ("ff00::/8", "multicast (RFC 4291)"),
)

GLOBAL_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
NOT_ALLOCATED_6 = "outside of global unicast (RFC 4291)"

ISATAP = frozenset({0x0000_5EFE, 0x0200_5EFE})
"""The upper half of an interface id that embeds IPv4 (RFC 5214, 6.1)."""

ISATAP_DETAIL = "ISATAP, which embeds IPv4 (RFC 5214)"


@dataclass(frozen=True, slots=True)
class AddressRules:
    """What the operator says about addresses."""

    allow: tuple[Network, ...] = ()
    deny: tuple[Network, ...] = ()
    own: frozenset[Address] = frozenset()
    """Of this machine's interfaces: never a receiver, public or not."""
    nat64: tuple[ipaddress.IPv6Network, ...] = ()
    """Prefixes by which IPv4 is reached from here (RFC 6052); any, so no table can know them."""


@dataclass(frozen=True, slots=True)
class AddressVerdict:
    """Whether an address may be dialled."""

    allowed: bool
    reason: str = ""
    """For a tenant."""
    detail: str = ""
    """For the operator."""


ALLOWED = AddressVerdict(allowed=True)


def _blocked(detail: str) -> AddressVerdict:
    return AddressVerdict(allowed=False, reason=TENANT_REASON, detail=detail)


def _ranges(table: tuple[tuple[str, str], ...]) -> tuple[tuple[int, int, str], ...]:
    networks = ((ipaddress.ip_network(text), why) for text, why in table)
    return tuple((int(n.network_address), int(n.broadcast_address), why) for n, why in networks)


_RANGES = {4: _ranges(TABLE_4), 6: _ranges(TABLE_6)}


def table_verdict(address: Address) -> AddressVerdict:
    """What the table says of an address, apart from all configuration."""
    number = int(address)
    for first, last, why in _RANGES[address.version]:
        if first <= number <= last:
            return _blocked(why)
    if address.version == 6:
        if address not in GLOBAL_UNICAST_6:
            return _blocked(NOT_ALLOCATED_6)
        if (number >> 32) & 0xFFFF_FFFF in ISATAP:
            return _blocked(ISATAP_DETAIL)
    return ALLOWED


OWN = "an address of this machine"

NAT64_LENGTHS = (32, 40, 48, 56, 64, 96)
"""Of prefixes (RFC 6052, 2.2)."""


IPV4ONLY = (ipaddress.IPv4Address("192.0.0.170"), ipaddress.IPv4Address("192.0.0.171"))
"""What ipv4only.arpa is (RFC 7050, 8880)."""


def nat64_inside(address: ipaddress.IPv6Address, length: int) -> ipaddress.IPv4Address:
    """The IPv4 address that follows a NAT64 prefix; the octet after the first 64 bits is skipped (RFC 6052, 2.2)."""
    octets = address.packed
    if length != 96:
        octets = octets[:8] + octets[9:]
    return ipaddress.IPv4Address(octets[length // 8 : length // 8 + 4])


def nat64_prefix(answer: ipaddress.IPv6Address) -> ipaddress.IPv6Network | None:
    """The prefix by which a network reaches IPv4, from its answer to the AAAA of ipv4only.arpa (RFC 7050)."""
    for length in NAT64_LENGTHS:
        if nat64_inside(answer, length) in IPV4ONLY:
            return ipaddress.IPv6Network((answer, length), strict=False)
    return None


def embedded(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 one carries by its well-known forms; a Teredo address has two."""
    number = int(address)
    low = number & 0xFFFF_FFFF
    found = []
    if number >> 32 in (0, 0xFFFF, 0xFFFF_0000) and number > 1:  # compatible, mapped, SIIT
        found.append(low)
    elif number >> 96 == 0x0064_FF9B:  # NAT64, well-known and local-use (where the prefix may be shorter)
        if number >> 80 == 0x0064_FF9B_0001:
            found += [int(nat64_inside(address, length)) for length in (48, 56, 64)]
        found.append(low)
    elif number >> 112 == 0x2002:  # 6to4
        found.append(number >> 80 & 0xFFFF_FFFF)
    elif number >> 96 == 0x2001_0000:  # Teredo: the server, and the client with its bits inverted
        found += [number >> 64 & 0xFFFF_FFFF, low ^ 0xFFFF_FFFF]
    if number >> 32 & 0xFFFF_FFFF in ISATAP:
        found.append(low)
    return [ipaddress.IPv4Address(n) for n in found]


def classify(address: str | Address, rules: AddressRules) -> AddressVerdict:
    """
    Whether an address may be dialled; about 3 µs for a literal, once for each new connection.

    What does not parse, or has a zone, is blocked.
    """
    if isinstance(address, str):
        if "%" in address:
            return _blocked("an address with a zone")
        try:
            address = ipaddress.ip_address(address)
        except ValueError:
            return _blocked("not an IP address")
    if _within(address, rules.deny):
        return _blocked("denied by network.deny")
    if _within(address, rules.allow):
        return _inside(embedded(address), rules) if address.version == 6 else ALLOWED
    own = address in rules.own
    # what is cut from the network of this machine may embed a public address and be this machine all the same
    if address.version == 6 and not own:
        for network in rules.nat64:
            if address in network:
                return _inside([nat64_inside(address, network.prefixlen)], rules)
    verdict = table_verdict(address)
    if verdict.allowed and own:
        return _blocked(OWN)
    return verdict


def _within(address: Address, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks if network.version == address.version)


def _inside(carried: list[ipaddress.IPv4Address], rules: AddressRules) -> AddressVerdict:
    for address in carried:
        verdict = classify(address, rules)
        if not verdict.allowed:
            return _blocked(f"it embeds {address}: {verdict.detail}")
    return ALLOWED
