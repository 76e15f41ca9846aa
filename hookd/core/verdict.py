"""
What an outcome means, and when to try again.

``judge`` is a pure, total function: every outcome has one consequence, and the two tables below are all of it.

Retry times follow the schedule, each multiplied by a draw from ``1 - jitter`` to ``1 + jitter``, so that what failed
together does not come back together.  ``Retry-After`` can only put a retry off, never bring it forward, and not by
more than ``RETRY_AFTER_MOST_S``.
"""

from __future__ import annotations

import datetime
import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hookd.core.model import ANSWERED, DISABLED, REMOVED, HostSign, OutcomeKind, Verdict, VerdictKind

if TYPE_CHECKING:
    from hookd.core.model import Delivery, Endpoint, Outcome, RetryPolicy

RETRY_AFTER_MOST_S = 86400.0
HOLD_LANE_MOST_S = 3600.0
"""One receiver's Retry-After stops its whole host, neighbours included, for so long at most."""

OURS_DELAY_S = 2.0
"""Before a fault of this machine is tried again, give or take a half; no attempt is used up."""


class Consequence(enum.Enum):
    """What kind of thing an outcome is."""

    DELIVERED = enum.auto()
    RETRY = enum.auto()
    """The schedule decides; the endpoint has failed."""
    RETRY_SLOWER = enum.auto()
    """The same, and the host asks for less."""
    GONE = enum.auto()
    """The endpoint wants no more."""
    HOPELESS = enum.auto()
    """No retry can help."""
    HOLD = enum.auto()
    """Not the endpoint's fault."""


_ACCEPTED: Final = Consequence.DELIVERED


BY_KIND = {
    OutcomeKind.CONNECT_REFUSED: Consequence.RETRY_SLOWER,
    OutcomeKind.CONNECT_TIMEOUT: Consequence.RETRY_SLOWER,
    OutcomeKind.CONNECT_FAILED: Consequence.RETRY_SLOWER,
    OutcomeKind.DNS_FAILED: Consequence.RETRY,
    OutcomeKind.BLOCKED: Consequence.RETRY,  # names move, rules change
    OutcomeKind.TLS_FAILED: Consequence.RETRY,
    OutcomeKind.TIMEOUT: Consequence.RETRY_SLOWER,
    OutcomeKind.CONNECTION_LOST: Consequence.RETRY_SLOWER,
    OutcomeKind.MALFORMED: Consequence.RETRY,
    OutcomeKind.UNVERIFIED: Consequence.RETRY,
    OutcomeKind.INVALID: Consequence.HOPELESS,
    OutcomeKind.OURS: Consequence.HOLD,
}
"""All but ``answered``, which the status decides."""

BY_STATUS = {
    410: Consequence.GONE,
    429: Consequence.RETRY_SLOWER,
    502: Consequence.RETRY_SLOWER,
    503: Consequence.RETRY_SLOWER,
    504: Consequence.RETRY_SLOWER,
}
"""Any 2xx is delivered, whatever the body says; any other status is retried."""

HOLDING = frozenset({429, 503})
"""Whose Retry-After speaks for the whole host, and which count as no answer for its circuit breaker."""

UNANSWERED = frozenset(
    {
        OutcomeKind.CONNECT_REFUSED,
        OutcomeKind.CONNECT_TIMEOUT,
        OutcomeKind.CONNECT_FAILED,
        OutcomeKind.DNS_FAILED,
        OutcomeKind.TLS_FAILED,
        OutcomeKind.TIMEOUT,
        OutcomeKind.CONNECTION_LOST,
    }
)


def consequence(outcome: Outcome) -> Consequence:
    """The two tables."""
    if outcome.kind is not ANSWERED:
        return BY_KIND[outcome.kind]
    if 200 <= outcome.status < 300:
        return _ACCEPTED
    return BY_STATUS.get(outcome.status, Consequence.RETRY)


def judge(
    outcome: Outcome, delivery: Delivery, endpoint: Endpoint, policy: RetryPolicy, now: float, draw: float
) -> Verdict:
    """
    What follows from an attempt.

    ``now`` is wall time and ``draw`` is from [0, 1).
    """
    kind = consequence(outcome)
    if kind is _ACCEPTED:
        return _DELIVERED
    match kind:
        case Consequence.HOLD:
            delay = OURS_DELAY_S * (0.5 + draw)
            if outcome.fault is not None:
                return Verdict(VerdictKind.HOLD, describe(outcome), delay_s=delay)
            # the next one would meet the same: the lane waits with it, and tries fewer at once
            return Verdict(
                VerdictKind.HOLD, describe(outcome), delay_s=delay, hold_lane_s=delay, slow_lane=True
            )
        case Consequence.GONE:
            return Verdict(
                VerdictKind.EXHAUSTED,
                "answered 410 Gone",
                disable="answered 410 Gone",
                endpoint_failed=True,
                host=HostSign.ALIVE,
            )
        case Consequence.HOPELESS:
            return Verdict(VerdictKind.EXHAUSTED, describe(outcome))
        case Consequence.RETRY | Consequence.RETRY_SLOWER:
            return _retry(
                _Failure(describe(outcome), slow=kind is Consequence.RETRY_SLOWER, asked_s=_asked(outcome, now), holds=outcome.status in HOLDING, host=host_sign(outcome)),
                delivery, endpoint, policy, now, draw,
            )  # fmt: skip


_DELIVERED = Verdict(VerdictKind.DELIVERED, host=HostSign.ALIVE)

WANTED = Verdict(VerdictKind.HOLD, host=HostSign.ALIVE)
"""A challenge was answered: the delivery that it went ahead of goes at once."""


def host_sign(outcome: Outcome) -> HostSign:
    """What an outcome says of the host."""
    if outcome.kind is ANSWERED:
        return HostSign.DOWN if outcome.status in HOLDING else HostSign.ALIVE
    if outcome.kind in (OutcomeKind.MALFORMED, OutcomeKind.UNVERIFIED):
        return HostSign.ALIVE
    return HostSign.DOWN if outcome.kind in UNANSWERED else HostSign.NOTHING


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    slow: bool
    asked_s: float
    holds: bool
    host: HostSign


def _retry(
    failure: _Failure, delivery: Delivery, endpoint: Endpoint, policy: RetryPolicy, now: float, draw: float
) -> Verdict:
    def verdict(kind: VerdictKind, reason: str, delay_s: float = 0.0) -> Verdict:
        return Verdict(
            kind,
            reason,
            delay_s=delay_s,
            disable=_disable(endpoint, policy, now),
            endpoint_failed=True,
            slow_lane=failure.slow,
            hold_lane_s=min(failure.asked_s, HOLD_LANE_MOST_S) if failure.holds else 0.0,
            host=failure.host,
        )

    if delivery.attempt >= len(policy.schedule_s):
        return verdict(VerdictKind.EXHAUSTED, failure.reason)
    delay = policy.schedule_s[delivery.attempt] * (1 - policy.jitter + 2 * policy.jitter * draw)
    delay = max(delay, min(failure.asked_s, RETRY_AFTER_MOST_S))
    expires_at = delivery.event.expires_at
    if expires_at is not None and now + delay >= expires_at:
        return verdict(VerdictKind.EXPIRED, f"expires before its next attempt; last: {failure.reason}")
    return verdict(VerdictKind.RETRY, failure.reason, delay)


def _disable(endpoint: Endpoint, policy: RetryPolicy, now: float) -> str | None:
    since = endpoint.health.failing_since
    if since is None or now - since < policy.disable_after_s:
        return None
    return f"nothing but failures for {policy.disable_after_s / 86400:.3g} days"


def ending(delivery: Delivery, endpoint: Endpoint, now: float) -> Verdict | None:
    """The end of a delivery that needs no exchange: replaced, expired, removed or disabled endpoint.  None: send it."""
    if delivery.replaced_by is not None and not delivery.attempt:
        return Verdict(VerdictKind.CANCELLED, f"replaced by event {delivery.replaced_by}")
    expires_at = delivery.event.expires_at
    if expires_at is not None and now >= expires_at:
        reason = (
            "expired before it could be sent"
            if expires_at
            else "its event is no longer kept (retention.events)"
        )
        return Verdict(VerdictKind.EXPIRED, reason)
    if endpoint.state is REMOVED:
        return Verdict(VerdictKind.CANCELLED, "endpoint removed")
    if endpoint.state is DISABLED:
        return Verdict(VerdictKind.EXHAUSTED, f"endpoint disabled: {endpoint.state_reason or 'by hand'}")
    return None


def describe(outcome: Outcome) -> str:
    """An outcome in words fit for a tenant."""
    if outcome.kind is ANSWERED:
        return f"answered {outcome.status}" + (f" ({outcome.reason})" if outcome.reason else "")
    return outcome.reason or outcome.kind.value.replace("_", " ")


def _asked(outcome: Outcome, now: float) -> float:
    return retry_after(outcome.retry_after, now) if outcome.retry_after else 0.0


DATE = re.compile(
    r"(?:\w{3}, )(?P<day>\d{2}) (?P<month>\w{3}) (?P<year>\d{4}) (?P<h>\d{2}):(?P<m>\d{2}):(?P<s>\d{2}) GMT"
    r"|(?:\w+day, )(?P<day2>\d{2})-(?P<month2>\w{3})-(?P<year2>\d{2}) (?P<h2>\d{2}):(?P<m2>\d{2}):(?P<s2>\d{2}) GMT"
    r"|(?:\w{3} )(?P<month3>\w{3}) (?P<day3>[ \d]\d) (?P<h3>\d{2}):(?P<m3>\d{2}):(?P<s3>\d{2}) (?P<year3>\d{4})",
    re.ASCII,
)
"""The three date formats of RFC 9110, 5.6.7: IMF-fixdate, RFC 850, asctime."""

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def retry_after(text: str, now: float) -> float:
    """Seconds that a ``Retry-After`` asks for (RFC 9110, 10.2.3); 0 for the past and for what is no such value."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    match = DATE.fullmatch(text)
    if match is None:
        return 0.0
    day, month, year, hour, minute, second = _fields(match)
    try:
        at = datetime.datetime(
            year, MONTHS.index(month) + 1, day, hour, minute, min(second, 59), tzinfo=datetime.UTC
        )
    except ValueError:
        return 0.0
    return max(0.0, at.timestamp() - now)


def _fields(match: re.Match[str]) -> tuple[int, str, int, int, int, int]:
    suffix = next(s for s in ("", "2", "3") if match["day" + s] is not None)
    year = int(match["year" + suffix])
    if suffix == "2":
        year += 2000 if year < 70 else 1900
    time = (int(match[name + suffix]) for name in ("h", "m", "s"))
    return (int(match["day" + suffix]), match["month" + suffix], year, *time)  # type: ignore[return-value]
