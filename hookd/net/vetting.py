"""What is said of a URL before anybody registers it: its form, its addresses, the guard's judgement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hookd.core.urls import UrlProblem, parse_url
from hookd.net.tunnel import ByProxy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookd.core.urls import Target
    from hookd.net.resolver import Resolver


@dataclass(frozen=True, slots=True)
class Vetted:
    """The judgement."""

    allowed: bool
    target: Target | None = None
    addresses: tuple[str, ...] = ()
    reason: str = ""
    """Why it is refused, or what should be known although it is not; fit for a tenant."""
    detail: str = ""
    """For the operator only: the addresses that are never dialled, and why."""


async def vet(
    url: str, resolver: Resolver | ByProxy, *, https_only: bool, names: Sequence[str] = ()
) -> Vetted:
    """
    Judge a URL.

    A name that does not resolve now is allowed, with a reason: an endpoint may be registered before its DNS record is
    there, and every attempt asks the guard again.
    """
    target = parse_url(url, https_only=https_only, names=names)
    if isinstance(target, UrlProblem):
        return Vetted(allowed=False, reason=target.reason)
    if isinstance(resolver, ByProxy):
        return Vetted(
            allowed=True, target=target, reason="the egress proxy resolves it, and judges its addresses"
        )
    found = await resolver.resolve(target.host)
    if found.blocked:
        return Vetted(allowed=False, target=target, reason=found.problem, detail=found.detail)
    return Vetted(
        allowed=True, target=target, addresses=found.addresses, reason=found.problem, detail=found.detail
    )
