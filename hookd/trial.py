"""A test event: sent to one endpoint now, past the queue and outside of its limits, for people to look at the exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookd.core.composer import Composer
from hookd.core.model import Delivery, DeliveryId, Event
from hookd.core.sent import shown

if TYPE_CHECKING:
    from uuid import UUID

    from hookd.core.composer import Wire
    from hookd.core.model import Endpoint, Outcome
    from hookd.verification import Exchange


async def try_out(
    endpoint: Endpoint, exchange: Exchange, wire: Wire, *, event_id: UUID, type_: str, data: str, now: float
) -> tuple[dict[str, Any], Outcome]:
    """
    Send an endpoint a test event; returns the request, with the endpoint's own headers hidden, and what came of it.

    Raises:
        InvalidRequest: the request cannot be made; says why.
    """
    event = Event(event_id, type_, endpoint.tenant, data.encode(), now)
    delivery = Delivery(DeliveryId(0), endpoint.key, event, 0, endpoint.shard)
    request = Composer(endpoint, wire).compose(delivery, int(now))
    return shown(request, endpoint.headers), await exchange.send(request)
