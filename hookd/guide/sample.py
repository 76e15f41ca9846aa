"""
Example requests, byte for byte: written and signed by the code that writes and signs the real ones.

Nothing in them changes from one run to the next: the secret is published, the time is fixed, an id follows from its type.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from hookd import __version__
from hookd.core.bodies import ThinLink
from hookd.core.composer import Composer, Wire
from hookd.core.model import BodyFormat, Delivery, DeliveryId, Endpoint, EndpointKey, Event, Secret

if TYPE_CHECKING:
    from hookd.config import Config

EXAMPLE_SECRET = "whsec_" + base64.b64encode(b"hookd documentation, not secret!").decode()
EXAMPLE_URL = "https://example.com/hooks"

MADE_AT = 1_767_225_599.308
"""2025-12-31T23:59:59.308Z"""

SENT_AT = 1_767_225_600


@dataclass(frozen=True, slots=True)
class Sample:
    """A request as it arrives."""

    id: UUID
    timestamp: int
    signature: str
    head: str
    """Request line and headers, without the empty line."""
    body: bytes

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.head}\n\n{self.body.decode('utf-8', 'replace')}"


def example_id(type_: str) -> UUID:
    """An id of version 7 (RFC 9562, 5.7) whose random part is the type's hash."""
    bits = int.from_bytes(hashlib.sha256(type_.encode()).digest()[:10], "big")
    milliseconds = int(MADE_AT * 1000)
    return UUID(
        int=milliseconds << 80 | 7 << 76 | (bits >> 68 & 0xFFF) << 64 | 2 << 62 | bits & (1 << 62) - 1
    )


def sample(type_: str, payload: str, config: Config) -> Sample:
    """The request of an event, to an endpoint that has no format of its own."""
    delivery = config.delivery
    form = BodyFormat(delivery.format)
    thin = ThinLink(delivery.thin_url, b"example", 30 * 86400.0) if delivery.thin_url else None
    endpoint = Endpoint(
        EndpointKey(0),
        UUID(int=0),
        "default",
        EXAMPLE_URL,
        "example.com:443",
        0,
        secrets=(Secret(EXAMPLE_SECRET),),
    )
    event = Event(example_id(type_), type_, "default", payload.encode(), MADE_AT)
    wire = Wire(f"hookd/{__version__}", form, delivery.timeout, delivery.connect_timeout, thin=thin)
    request = Composer(endpoint, wire).compose(Delivery(DeliveryId(0), endpoint.key, event, 0, 0), SENT_AT)
    head = (request.head + request.lines).decode("ascii").replace("\r\n", "\n").rstrip("\n")
    signature = next(
        line.partition(": ")[2] for line in head.split("\n") if line.startswith("webhook-signature: ")
    )
    return Sample(event.id, SENT_AT, signature, head, request.body)
