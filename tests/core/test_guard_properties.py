"""The guard's promises, for any input: what is internal is refused in every form, what is public is not."""

from __future__ import annotations

import ipaddress
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hookd.core.addresses import (
    NAT64_LENGTHS,
    OWN,
    AddressRules,
    classify,
    embedded,
    nat64_inside,
    nat64_prefix,
    table_verdict,
)
from hookd.core.headers import RESERVED, as_read, check_header, check_headers
from hookd.core.request import InvalidRequest, prepare_head
from hookd.core.urls import URL_MOST, Target, UrlProblem, parse_url
from tests.fuzzing import examples
from tests.registries import ALLOCATED_6, OTHER_4, OTHER_6, SPECIAL_4, SPECIAL_6
from tests.spelling import as_host, as_ipv4, as_ipv6

RULES = AddressRules()


def net(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text)


INTERNAL_4 = [net(text) for text, _ in SPECIAL_4 + OTHER_4]
INTERNAL_6 = [net(text) for text, _ in SPECIAL_6 + OTHER_6]

internal_4 = st.sampled_from(INTERNAL_4).flatmap(lambda n: st.ip_addresses(v=4, network=str(n)))
internal_6 = st.sampled_from(INTERNAL_6).flatmap(lambda n: st.ip_addresses(v=6, network=str(n)))


def _next_to(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> list[str]:
    """The neighbours of a range, where they are in no range themselves."""
    edges = []
    for number in (int(network[0]) - 1, int(network[-1]) + 1):
        if 0 <= number < 2**network.max_prefixlen:
            kind = ipaddress.IPv4Address if network.version == 4 else ipaddress.IPv6Address
            edges.append(str(kind(number)))
    return edges


def _is_internal(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return any(address in n for n in (INTERNAL_4 if address.version == 4 else INTERNAL_6))


public_4 = st.ip_addresses(v=4).filter(lambda a: not _is_internal(a))
public_6 = st.ip_addresses(v=6, network=ALLOCATED_6).filter(
    lambda a: not _is_internal(a) and int(a) >> 32 & 0xFDFF_FFFF != 0x5EFE
)


@pytest.mark.parametrize(("network", "why"), SPECIAL_4 + OTHER_4)
def test_every_block_of_ipv4_is_refused_in_every_form(network: str, why: str) -> None:
    block = net(network)
    for address in {str(block[0]), str(block[block.num_addresses // 2]), str(block[-1])}:
        assert not classify(address, RULES).allowed, why
        for name, text in as_ipv6(address).items():
            assert not classify(text, RULES).allowed, (name, why)


@pytest.mark.parametrize(("network", "why"), SPECIAL_6 + OTHER_6)
def test_every_block_of_ipv6_is_refused(network: str, why: str) -> None:
    block = net(network)
    for address in {block[0], block[block.num_addresses // 2], block[-1]}:
        assert not classify(address, RULES).allowed, why


@examples(300)
@given(internal_4)
def test_an_internal_ipv4_address_is_refused_in_every_spelling(address: ipaddress.IPv4Address) -> None:
    assert not classify(address, RULES).allowed
    for name, host in as_host(str(address)).items():
        for url in (f"http://{host}/", f"HTTPS://{host}:8443/a?b", f"http://{host}"):
            target = parse_url(url)
            if isinstance(target, Target):
                assert target.ip is not None, f"{name}: {url} is a name to the parser"
                assert not classify(target.host, RULES).allowed, f"{name}: {url} is let through"


@examples(300)
@given(internal_6)
def test_an_internal_ipv6_address_is_refused_in_every_spelling(address: ipaddress.IPv6Address) -> None:
    assert not classify(address, RULES).allowed
    for text in (str(address), address.exploded, address.exploded.upper(), address.compressed):
        target = parse_url(f"http://[{text}]/")
        assert isinstance(target, Target)
        assert not classify(target.host, RULES).allowed
        for zone in ("%1", "%25lo", "%00"):
            assert isinstance(parse_url(f"http://[{text}{zone}]/"), UrlProblem)
            assert not classify(text + zone, RULES).allowed


@examples(500)
@given(public_4)
def test_a_public_ipv4_address_is_accepted_as_itself_only(address: ipaddress.IPv4Address) -> None:
    assert classify(address, RULES).allowed
    target = parse_url(f"https://{address}/")
    assert isinstance(target, Target)
    assert target.ip == address
    for name, host in as_ipv4(str(address)).items():
        if name != "dotted" and host != str(address):
            assert isinstance(parse_url(f"http://{host}/"), UrlProblem), name
    for name, text in as_ipv6(str(address)).items():
        assert not classify(text, RULES).allowed, name


@examples(500)
@given(public_6)
def test_a_public_ipv6_address_is_accepted(address: ipaddress.IPv6Address) -> None:
    for text in (str(address), address.exploded, address.exploded.upper()):
        target = parse_url(f"https://[{text}]:8443/")
        assert isinstance(target, Target)
        assert target.ip == address
        assert classify(target.host, RULES).allowed


@pytest.mark.parametrize(
    "address", sorted({a for n in INTERNAL_4 + INTERNAL_6 for a in _next_to(n)}), ids=str
)
def test_a_range_ends_where_it_ends(address: str) -> None:
    parsed = ipaddress.ip_address(address)
    assert classify(address, RULES).allowed is not _is_internal(parsed)


# What the operator says.


@examples(500)
@given(st.ip_addresses(v=4), st.sampled_from(NAT64_LENGTHS), st.ip_addresses(v=6, network="2600::/12"))
def test_what_comes_through_nat64_is_judged_by_what_is_inside(
    inside: ipaddress.IPv4Address, length: int, prefix: ipaddress.IPv6Address
) -> None:
    network = ipaddress.ip_network((int(prefix) >> 128 - length << 128 - length, length))
    assert isinstance(network, ipaddress.IPv6Network)
    address = _through(network, inside)
    assert nat64_inside(address, length) == inside
    rules = AddressRules(nat64=(network,))
    assert classify(address, rules).allowed == classify(inside, rules).allowed
    denied = AddressRules(nat64=(network,), deny=(ipaddress.ip_network(inside),))
    assert not classify(address, denied).allowed


def _through(prefix: ipaddress.IPv6Network, inside: ipaddress.IPv4Address) -> ipaddress.IPv6Address:
    """RFC 6052, 2.2, written down a second time: bit by bit."""
    number = int(prefix.network_address)
    at = prefix.prefixlen
    for bit in f"{int(inside):032b}":
        if at == 64:
            at = 72
        number |= int(bit) << 127 - at
        at += 1
    return ipaddress.IPv6Address(number)


def test_the_examples_of_rfc_6052() -> None:
    inside = ipaddress.IPv4Address("192.0.2.33")
    for prefix, address in (
        ("2001:db8::/32", "2001:db8:c000:221::"),
        ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
        ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
        ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
        ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
        ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
    ):
        network = ipaddress.IPv6Network(prefix)
        assert _through(network, inside) == ipaddress.IPv6Address(address)
        assert nat64_inside(ipaddress.IPv6Address(address), network.prefixlen) == inside
        well_known = _through(network, ipaddress.IPv4Address("192.0.0.171"))
        assert nat64_prefix(well_known) == network
    assert nat64_prefix(ipaddress.IPv6Address("2606:4700::1111")) is None


@examples(300)
@given(internal_4)
def test_an_allowed_form_does_not_open_what_is_inside(address: ipaddress.IPv4Address) -> None:
    everything_6 = AddressRules(allow=(net("::/0"),))
    for name, text in as_ipv6(str(address)).items():
        assume(ipaddress.IPv6Address(text) not in (ipaddress.IPv6Address("::"), ipaddress.IPv6Address("::1")))
        if name != "reserved /8":  # a form of our own making: nothing translates it
            assert not classify(text, everything_6).allowed, name
    both = AddressRules(allow=(net("::/0"), net("0.0.0.0/0")))
    for text in as_ipv6(str(address)).values():
        assert classify(text, both).allowed


@examples(300)
@given(public_4, st.sampled_from(NAT64_LENGTHS))
def test_an_address_of_this_machine_is_refused_in_every_form(own: ipaddress.IPv4Address, length: int) -> None:
    everything_6 = net("::/0")
    rules = AddressRules(own=frozenset({own}))
    assert not classify(own, rules).allowed
    for name, text in as_ipv6(str(own)).items():
        assert not classify(text, rules).allowed, name
        if name != "reserved /8":
            assert not classify(text, AddressRules(own=frozenset({own}), allow=(everything_6,))).allowed, name
        if len(embedded(ipaddress.IPv6Address(text))) == 1:
            assert classify(text, AddressRules(allow=(everything_6,))).allowed, "it is that alone"
    prefix = ipaddress.IPv6Network(
        (int(ipaddress.IPv6Address("2606:4700:6464::")) >> 128 - length << 128 - length, length)
    )
    through = _through(prefix, own)
    assert classify(through, AddressRules(nat64=(prefix,))).allowed
    assert "this machine" in classify(through, AddressRules(nat64=(prefix,), own=frozenset({own}))).detail
    # the prefix may be cut from the network of this machine, whose own address there embeds what is public
    assert classify(through, AddressRules(nat64=(prefix,), own=frozenset({through}))).detail == OWN


@examples(300)
@given(st.ip_addresses(), st.data())
def test_deny_wins_over_allow_and_allow_over_the_table(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, data: st.DataObject
) -> None:
    length = data.draw(st.integers(0, address.max_prefixlen))
    around = ipaddress.ip_network((address, length), strict=False)
    exactly = ipaddress.ip_network(address)
    assert not classify(address, AddressRules(deny=(around,))).allowed
    assert not classify(address, AddressRules(allow=(exactly,), deny=(around,))).allowed
    opened = classify(address, AddressRules(allow=(around,), own=frozenset({address})))
    carries = address.version == 6 and bool(embedded(address))
    assert opened.allowed or carries
    if not carries:
        assert classify(address, RULES) == table_verdict(address)


# URLs.

HOSTISH = st.text(
    st.one_of(
        st.sampled_from("abcxyz019.-_:[]@%\\/#? \t\r\n\x00。．｡①１ßü\u00ad\u200b\u202e☕א"),  # noqa: RUF001
        st.characters(codec="utf-8"),
    ),
    max_size=40,
)


@examples(2000)
@given(st.sampled_from(["http://", "https://", "HTTP://", "http:", "//", ""]), HOSTISH, HOSTISH)
def test_a_canonical_url_is_a_fixed_point(scheme: str, host: str, rest: str) -> None:
    target = parse_url(f"{scheme}{host}/{rest}")
    if isinstance(target, UrlProblem):
        assert target.reason
        assert "\n" not in target.reason
        return
    assert parse_url(target.url) == target
    assert len(target.url) <= URL_MOST
    assert target.url.isascii()
    assert not any(c <= " " or c == "\x7f" for c in target.url)
    assert target.host == target.host.lower()
    assert not target.host.endswith(".")
    head = prepare_head(target, {}, user_agent="u", content_type="c")
    assert head.count(b"\r\n") == 6
    assert head.startswith(b"POST /")
    assert head.split(b"\r\n")[0].count(b" ") == 2


ALIKE = {
    character: [chr(n) for n in range(0x20, 0x20000) if unicodedata.normalize("NFKC", chr(n)) == character]
    + (["\u3002"] if character == "." else [])
    for character in "0123456789."
}
"""What is a digit or a dot to whoever normalises."""


@examples(300)
@given(st.one_of(internal_4, st.ip_addresses(v=4)), st.data())
def test_digits_and_dots_of_any_script_are_refused(
    address: ipaddress.IPv4Address, data: st.DataObject
) -> None:
    host = "".join(data.draw(st.sampled_from(ALIKE[c])) for c in str(address))
    target = parse_url(f"http://{host}/")
    assert isinstance(target, Target) is (host == str(address))


@given(st.integers(1900, 2048), st.sampled_from("aä☃😀"))
def test_what_percent_encoding_makes_too_long_is_refused_at_once(length: int, character: str) -> None:
    target = parse_url("https://example.com/" + character * (length - 20))
    assert isinstance(target, Target) is (character == "a")


def test_a_long_host_costs_nothing() -> None:
    for host in ("ü" * 2000, "xn--" + "a" * 2000, "a." * 1000, "①." * 500, "\u0300" * 2000):
        assert isinstance(parse_url(f"http://{host}/"), UrlProblem)


# Headers.


@examples(2000)
@given(st.text(max_size=20), st.text(max_size=40))
def test_no_header_can_split_or_reframe_a_request(name: str, value: str) -> None:
    target = parse_url("https://example.com/hook")
    assert isinstance(target, Target)
    try:
        head = prepare_head(target, {name: value}, user_agent="u", content_type="c")
    except InvalidRequest as problem:
        assert check_header(name, value) == str(problem)
        return
    own = name.lower() in ("user-agent", "accept")
    assert head.count(b"\r\n") == (6 if own else 7)
    assert head.replace(b"\r\n", b"").isascii()
    assert not any(c in head.replace(b"\r\n", b"") for c in b"\r\n\x00\x7f")
    names = [line.split(b":")[0].lower().decode() for line in head.split(b"\r\n")[1:-1]]
    assert sorted(set(names)) == sorted(names), "none twice"
    assert as_read(name) not in RESERVED


@given(st.sampled_from(sorted(RESERVED)), st.data())
def test_reserved_names_are_refused_in_any_case(name: str, data: st.DataObject) -> None:
    written = data.draw(st.sampled_from([name, name.replace("-", "_")]))
    mixed = "".join(c.upper() if data.draw(st.booleans()) else c for c in written)
    assert check_header(mixed, "x")


@pytest.mark.parametrize(
    "name",
    [
        "webhook_signature",
        "Webhook-Id",
        "WEBHOOK_TIMESTAMP",
        "svix_id",
        "hookd_attempt",
        "Proxy_Authorization",
    ],
)
def test_names_that_a_receiver_could_take_for_ours_are_refused(name: str) -> None:
    assert check_header(name, "x")


@given(st.dictionaries(st.text("aB-_", min_size=1, max_size=3), st.just("x"), max_size=5))
def test_no_name_is_sent_twice(headers: dict[str, str]) -> None:
    problem = check_headers(headers)
    assert (problem is None) == (len({as_read(name) for name in headers}) == len(headers))
