"""
Composes the request of an attempt: body, signature, headers.

One composer serves one endpoint as it is now; what does not change from one delivery to the next is prepared when it
is made.  A URL, a header or a secret that cannot be used is not the dispatcher's error but this endpoint's: ``compose``
raises ``InvalidRequest``, which ends the delivery with that reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hookd.core.bodies import ThinLink, body, content_type
from hookd.core.request import InvalidRequest, Request, attempt_lines, prepare_head
from hookd.core.signing import parse_secret, sign
from hookd.core.urls import UrlProblem, parse_url

if TYPE_CHECKING:
    from hookd.core.model import BodyFormat, Delivery, Endpoint


@dataclass(frozen=True, slots=True)
class Wire:
    """What all requests of this daemon have in common."""

    user_agent: str
    format: BodyFormat
    timeout_s: float
    connect_timeout_s: float
    https_only: bool = False
    names: tuple[str, ...] = ()
    """Private ones that may be called."""
    source: str = "hookd"
    """The source of CloudEvents."""
    thin: ThinLink | None = None


class Composer:
    """Makes the requests of one endpoint."""

    __slots__ = ("_format", "_head", "_keys", "_problem", "_target", "_wire")

    def __init__(self, endpoint: Endpoint, wire: Wire) -> None:
        self._wire = wire
        self._format = endpoint.format or wire.format
        self._problem: str | None = None
        target = parse_url(endpoint.url, https_only=wire.https_only, names=wire.names)
        if isinstance(target, UrlProblem):
            self._problem = target.reason
            return
        self._target = target
        try:
            self._keys = [parse_secret(secret.reveal()) for secret in endpoint.secrets]
            self._head = prepare_head(
                target,
                endpoint.headers,
                user_agent=wire.user_agent,
                content_type=content_type(self._format),
            )
        except ValueError as problem:
            self._problem = str(problem)

    def compose(self, delivery: Delivery, timestamp: int) -> Request:
        """
        The request of a delivery's next attempt, signed as of ``timestamp`` (seconds since the epoch).

        Raises:
            InvalidRequest: the endpoint or the event cannot be sent; says why.
        """
        if self._problem is not None:
            raise InvalidRequest(self._problem)
        event = delivery.event
        try:
            content = body(event, self._format, thin=self._wire.thin, source=self._wire.source)
        except ValueError as problem:
            raise InvalidRequest(str(problem)) from None
        event_id = str(event.id)
        lines = attempt_lines(
            event_id=event_id,
            timestamp=timestamp,
            signature=sign(self._keys, event_id, timestamp, content),
            attempt=delivery.attempt + 1,
            length=len(content),
            headers=event.headers,
        )
        return Request(
            self._target, self._head, lines, content, self._wire.timeout_s, self._wire.connect_timeout_s
        )
