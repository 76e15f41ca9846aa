"""
The challenge by which a receiver shows that it wants to be called: what is sent, and which answers count.

    POST  {"type": "hookd.endpoint.verification", "timestamp": "…", "challenge": "…"}
    200   {"challenge": "…"}

The challenge is random and new for each attempt, stands in the body only, and the request is signed as every other.  An
answer counts if its status is 2xx and it repeats the challenge: as text, in quotes or not, or as a value anywhere in a JSON
document.

Servers that send back whatever they are sent (echo services, error pages that quote the request) must not pass for a receiver
that understood: an answer that repeats the request's type along with the challenge is refused.  Nor does an answer from
elsewhere count, after a redirect: deliveries would go to the URL that redirects.

A verified endpoint that has done nothing but fail for long is asked again before anything else goes there (``doubted``): the
server, or the whole domain, may be somebody else's by now, and what waits for it is much.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hookd.core.bodies import rfc3339
from hookd.core.model import OutcomeKind
from hookd.core.request import InvalidRequest, Request, attempt_lines, prepare_head
from hookd.core.signing import parse_secret, sign
from hookd.core.urls import UrlProblem, parse_url
from hookd.core.verdict import describe

if TYPE_CHECKING:
    from uuid import UUID

    from hookd.core.composer import Wire
    from hookd.core.model import Endpoint, Outcome, RetryPolicy

TYPE = "hookd.endpoint.verification"

AGAIN = "asked again after failing for long"

ANSWER_MOST = 16 * 1024
"""Characters of an answer that are looked through."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether a receiver answered its challenge, or why not."""

    verified: bool
    reason: str = ""
    """Fit for a tenant."""


@dataclass(frozen=True, slots=True)
class Question:
    """A challenge to be sent, and how to read what comes back."""

    request: Request
    challenge: str

    def judge(self, outcome: Outcome) -> Verification:
        """What an answer shows."""
        return judge(outcome, self.request, self.challenge)


def doubted(endpoint: Endpoint, policy: RetryPolicy, now: float) -> bool:
    """Whether a verified endpoint has only failed for so long that it has to be asked again; ``now`` is wall time."""
    failing_since, verified_at = endpoint.health.failing_since, endpoint.verified_at
    if failing_since is None or verified_at is None:
        return False
    return now - max(failing_since, verified_at) >= policy.ask_again_after_s


def unanswered(outcome: Outcome, said: Verification) -> Outcome:
    """The outcome of an attempt that was a challenge and was not answered: never a success."""
    if outcome.kind is not OutcomeKind.ANSWERED:
        return outcome
    if 200 <= outcome.status < 300:
        return replace(outcome, kind=OutcomeKind.UNVERIFIED, reason=f"{AGAIN}: {said.reason}")
    return replace(outcome, reason=AGAIN)


def request(endpoint: Endpoint, wire: Wire, challenge: str, message_id: UUID, timestamp: int) -> Request:
    """
    The request that carries a challenge; it is JSON whatever the endpoint's format.

    Raises:
        InvalidRequest: the endpoint cannot be called; says why.
    """
    target = parse_url(endpoint.url, https_only=wire.https_only, names=wire.names)
    if isinstance(target, UrlProblem):
        raise InvalidRequest(target.reason)
    # the type comes first: an echo that is cut off has it
    content = json.dumps({"type": TYPE, "timestamp": rfc3339(timestamp), "challenge": challenge}).encode()
    try:
        keys = [parse_secret(secret.reveal()) for secret in endpoint.secrets]
    except ValueError as problem:
        raise InvalidRequest(str(problem)) from None
    head = prepare_head(target, endpoint.headers, user_agent=wire.user_agent, content_type="application/json")
    lines = attempt_lines(
        event_id=str(message_id),
        timestamp=timestamp,
        signature=sign(keys, str(message_id), timestamp, content),
        attempt=1,
        length=len(content),
        headers=None,
    )
    return Request(target, head, lines, content, wire.timeout_s, wire.connect_timeout_s)


def judge(outcome: Outcome, sent: Request, challenge: str) -> Verification:
    """What an answer shows."""
    if outcome.kind is not OutcomeKind.ANSWERED or not 200 <= outcome.status < 300:
        return Verification(verified=False, reason=f"the challenge was not answered: {describe(outcome)}")
    if outcome.url != sent.target.url:
        return Verification(
            verified=False, reason="the challenge was redirected: register the URL that answers it"
        )
    text = outcome.body[:ANSWER_MOST]
    if challenge not in text:
        cut = " in the part of the answer that is read" if outcome.body_truncated else ""
        return Verification(
            verified=False,
            reason=f"answered {outcome.status} without repeating the challenge{cut}: "
            'answer {"challenge": "…"} to type ' + TYPE,
        )
    if TYPE in text:
        return Verification(
            verified=False,
            reason="the answer repeats the whole request, which shows nothing: "
            'answer {"challenge": "…"} and nothing else',
        )
    if not _repeats(text, challenge):
        return Verification(
            verified=False,
            reason='the challenge stands somewhere in the answer: answer {"challenge": "…"}, or the challenge alone',
        )
    return Verification(verified=True)


def challenge_in(body: bytes) -> str | None:
    """The challenge that a request carries, for whoever receives it; None: it carries none."""
    if TYPE.encode() not in body:
        return None
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("type") != TYPE:
        return None
    challenge = document.get("challenge")
    return challenge if isinstance(challenge, str) else None


def _repeats(text: str, challenge: str) -> bool:
    if text.strip().strip("\"'`").strip() == challenge:
        return True
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return _holds(document, challenge)


def _holds(document: Any, challenge: str) -> bool:
    """Whether a value of a document, however deep, is the challenge."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and value.strip() == challenge:
            return True
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return False
