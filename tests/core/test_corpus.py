"""The corpus at both doors: when an endpoint is written, and when it is called."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from hookd.core.addresses import TABLE_4, TABLE_6, TENANT_REASON, AddressRules, classify
from hookd.core.composer import Composer, Wire
from hookd.core.model import BodyFormat, Delivery, DeliveryId, Endpoint, EndpointKey, Event
from hookd.core.request import InvalidRequest
from hookd.core.urls import Target, parse_url
from hookd.net.resolver import ADDRESSES_MOST, Resolver, Said
from hookd.net.vetting import Vetted, vet
from tests.corpus import read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookd.core.request import Request

RULES = AddressRules()

BLOCKED = f"{TENANT_REASON}: "

HOSTILE = read("hostile_urls")
ADDRESSES = read("hostile_addresses")
NAMES = read("hostile_names")
LEGITIMATE = read("legitimate_urls")


class Answers(Resolver):
    """A resolver that is told what DNS says; what it makes of that is the real one's."""

    def __init__(self, answers: Sequence[str] = ()) -> None:
        super().__init__(lambda: RULES, mono=lambda: 0.0)
        self.answers = list(answers)
        self.asked: list[str] = []

    async def _query(self, host: str, kind: str) -> Said:
        self.asked.append(host)
        wanted = 4 if kind == "A" else 6
        return Said(tuple(a for a in self.answers if ipaddress.ip_address(a).version == wanted), 60)


def vetted(url: str, answers: Sequence[str] = ()) -> Vetted:
    """The first door."""

    async def go() -> Vetted:
        return await vet(url, Answers(answers), https_only=False)

    return asyncio.run(go())


def composed(url: str) -> Request:
    """The second door, its first half; what an exchange does with the target is ``guarded``."""
    endpoint = Endpoint(EndpointKey(1), UUID(int=1), "t", url, "", 0)
    event = Event(UUID(int=2), "a.b", "t", b"{}", 0.0)
    composer = Composer(endpoint, Wire("hookd/test", BodyFormat.RAW, 5.0, 2.0))
    return composer.compose(Delivery(DeliveryId(1), EndpointKey(1), event, 0, 0), 0)


def guarded(target: Target, answers: Sequence[str] = ()) -> str:
    """What the resolver hands to the exchange: nothing but what may be dialled."""
    found = asyncio.run(Answers(answers).resolve(target.host))
    assert found.blocked == (not found.addresses)
    return found.detail


def test_the_corpus_is_as_large_as_it_should_be() -> None:
    assert len({url for url, *_ in HOSTILE + NAMES} | {a for a, _ in ADDRESSES}) >= 1000
    assert len({url for url, _ in LEGITIMATE}) >= 150


@pytest.mark.parametrize(("url", "reason"), HOSTILE)
def test_a_hostile_url_is_refused_at_both_doors(url: str, reason: str) -> None:
    first = vetted(url)
    assert not first.allowed
    assert first.addresses == ()
    if not reason.startswith(BLOCKED):
        assert first.reason == reason
        with pytest.raises(InvalidRequest) as second:
            composed(url)
        assert str(second.value) == reason
        return
    assert first.reason == TENANT_REASON
    target = composed(url).target
    assert guarded(target).partition(": ")[2] or not target.ip
    assert reason.removeprefix(BLOCKED) in guarded(target)


@pytest.mark.parametrize(("url", "answers", "why"), NAMES)
def test_a_name_that_leads_inside_is_refused_at_both_doors(url: str, answers: str, why: str) -> None:
    first = vetted(url, answers.split(","))
    assert not first.allowed
    assert first.addresses == ()
    assert first.reason == TENANT_REASON, why
    assert all(f"{a}: " in first.detail for a in answers.split(","))
    assert guarded(composed(url).target, answers.split(","))


@pytest.mark.parametrize(("address", "why"), ADDRESSES)
def test_a_hostile_address_is_never_dialled(address: str, why: str) -> None:
    verdict = classify(address, RULES)
    assert not verdict.allowed, why
    assert verdict.reason == TENANT_REASON
    assert verdict.detail


@pytest.mark.parametrize(("url", "canonical"), LEGITIMATE)
def test_a_legitimate_url_is_accepted_at_both_doors(url: str, canonical: str) -> None:
    first = vetted(url, ["93.184.216.34", "2606:4700::1111"])
    assert first.allowed, first.reason
    assert first.addresses
    assert first.target is not None
    assert first.target.url == canonical
    second = composed(canonical)
    assert second.target == first.target, "what is stored means the same when it is called"
    assert not guarded(second.target, ["93.184.216.34"])


@pytest.mark.parametrize(("network", "why"), TABLE_4 + TABLE_6)
def test_the_corpus_has_every_row_of_the_table(network: str, why: str) -> None:
    row = ipaddress.ip_network(network)
    known = {ipaddress.ip_address(a) for a, _ in ADDRESSES if _is_address(a)}
    ends = {row[0], row[-1]}
    assert ends <= known, why
    assert row.num_addresses <= 2 or any(a in row for a in known - ends)


def _is_address(text: str) -> bool:
    try:
        return "%" not in str(ipaddress.ip_address(text))
    except ValueError:
        return False


@pytest.mark.parametrize("url", ["http://93.184.216.34/", "http://[2606:4700::1111]/"])
def test_addresses_of_this_machine_are_refused_although_public(url: str) -> None:
    target = parse_url(url)
    assert isinstance(target, Target)
    assert target.ip is not None
    assert classify(target.ip, RULES).allowed
    assert not classify(target.ip, AddressRules(own=frozenset({target.ip}))).allowed


def test_an_answer_of_thousands_of_addresses_is_not_kept_whole() -> None:
    answers = [str(ipaddress.IPv4Address("93.0.0.0") + n) for n in range(4000)]
    answers += [str(ipaddress.IPv6Address("2606:4700::") + n) for n in range(4000)]
    found = asyncio.run(Answers(answers).resolve("many.example.com"))
    assert len(found.addresses) == 2 * ADDRESSES_MOST
    assert {ipaddress.ip_address(a).version for a in found.addresses} == {4, 6}
