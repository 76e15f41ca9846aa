"""Asks a receiver whether it wants to be called: makes the challenge, and sends it past the queue and its host's limits."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

from hookd.core import challenge as challenges
from hookd.core.challenge import Question, Verification
from hookd.core.request import InvalidRequest

if TYPE_CHECKING:
    from hookd.core.composer import Wire
    from hookd.core.model import Endpoint, Outcome
    from hookd.core.request import Request


class Exchange(Protocol):
    """One signed POST (``net.exchange``)."""

    async def send(self, request: Request) -> Outcome:
        """Make it."""
        ...


def question(endpoint: Endpoint, wire: Wire, now: float) -> Question:
    """
    A challenge that nobody can know beforehand; ``now`` is wall time.

    Raises:
        InvalidRequest: the endpoint cannot be called; says why.
    """
    challenge = secrets.token_urlsafe(32)
    return Question(challenges.request(endpoint, wire, challenge, uuid4(), int(now)), challenge)


async def ask(endpoint: Endpoint, exchange: Exchange, wire: Wire, now: float) -> Verification:
    """Send an endpoint a challenge; ``now`` is wall time."""
    try:
        asked = question(endpoint, wire, now)
    except InvalidRequest as problem:
        return Verification(verified=False, reason=f"the challenge cannot be sent: {problem}")
    return asked.judge(await exchange.send(asked.request))
