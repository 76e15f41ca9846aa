"""
The nouns of hookd, as values.

An *event* is owed to each subscribed *endpoint*: that is a *delivery*.  One HTTP exchange made for it
ends in an *outcome* (what the network said), from which a *verdict* (what follows) is derived; both
together are a *result*, which the recorder settles in PostgreSQL.

Times carry their clock in the name: ``_at`` is wall time (seconds since the epoch), ``_mono`` is the
monotonic clock of this process, ``_s`` and ``_ms`` are durations.

The values that exist once a delivery (``Delivery``, ``Outcome``, ``Result``) have slots but are not
frozen: a frozen dataclass assigns through ``object.__setattr__``, which costs 3 to 4 times the
construction time.  Nothing but the module named in their docstring writes to them.

Members of enums that are asked for with each delivery have names of their own here: Python 3.11 takes 0.08 µs to
look one up in its enum, and 0.02 for a name of a module (twenty times a delivery; 3.12 is quick at both).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NewType

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

EndpointKey = NewType("EndpointKey", int)
"""Narrow key of an endpoint inside the database and the process; its public name is a uuid."""

DeliveryId = NewType("DeliveryId", int)
"""Key of a delivery; ascending in the order in which events were inserted."""


class BodyFormat(enum.StrEnum):
    """How an event is written into the body of a request."""

    STANDARD = "standard"
    RAW = "raw"
    CLOUDEVENTS = "cloudevents"
    THIN = "thin"


STANDARD: Final = BodyFormat.STANDARD
RAW: Final = BodyFormat.RAW


class EndpointState(enum.StrEnum):
    """What an endpoint may receive."""

    ACTIVE = "active"
    PAUSED = "paused"
    """Its deliveries wait: it was paused, has not answered its challenge yet, or its secrets cannot be read."""
    DISABLED = "disabled"
    """It gets none; what was pending becomes dead letters."""
    REMOVED = "removed"
    """It is gone; what was pending is cancelled."""


ACTIVE: Final = EndpointState.ACTIVE
PAUSED: Final = EndpointState.PAUSED
DISABLED: Final = EndpointState.DISABLED
REMOVED: Final = EndpointState.REMOVED


class Secret:
    """A value that never shows itself in ``repr``, logs or error messages; ``reveal()`` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself, for the one place that needs it."""
        return self._value

    def __repr__(self) -> str:
        return "Secret('***')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclass(frozen=True, slots=True)
class Health:
    """How an endpoint has fared since its last success.  Kept in its row, over restarts."""

    failing_since: float | None = None
    """Wall time of the first failure."""
    reason: str | None = None
    """The failure that changed it last."""
    parked_at: float | None = None
    """Wall time since when it gets probes only."""


HEALTHY = Health()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A subscriber's URL and how to serve it, as the owner of its shard knows it."""

    key: EndpointKey
    id: UUID
    tenant: str
    url: str
    host: str
    """Lower-case A-label and port, ``example.com:443``: the name of its lane."""
    shard: int
    former_shards: tuple[int, ...] = ()
    """Where rows inserted before it moved to another host may still be."""
    state: EndpointState = EndpointState.ACTIVE
    state_reason: str | None = None
    format: BodyFormat | None = None
    """None: as the configuration says."""
    rate: float | None = None
    concurrency: int | None = None
    ordered: bool = False
    health: Health = HEALTHY
    secrets: tuple[Secret, ...] = ()
    """Signing secrets in the ``whsec_`` or ``whsk_`` form, newest first; several while one rotates."""
    rotates_until: float | None = None
    """Wall time when the next of ``secrets`` expires: the endpoint has to be read again then."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Headers that the subscriber asked for.  They may hold credentials, so they are not shown."""
    verified_at: float | None = None
    """Wall time when its URL answered a challenge last; None: it was not asked."""

    def takes_from(self, shard: int) -> bool:
        """Whether a row in this shard may be sent to it; of one that was removed nothing is sent, wherever it is."""
        return self.shard == shard or self.state is EndpointState.REMOVED


@dataclass(slots=True, eq=False)
class Event:
    """What happened.  Shared by all deliveries of it that are in memory."""

    id: UUID
    type: str
    tenant: str
    payload: bytes
    """JSON, the bytes as they were given."""
    created_at: float
    expires_at: float | None = None
    headers: Mapping[str, str] | None = None
    deliveries: int = 0
    """Of it in memory.  Counted by the feed, which keeps it as long as there are any."""
    bodies: tuple[tuple[BodyFormat, bytes], ...] = field(default=(), repr=False)
    """
    Bodies already written, so that one event to 1,000 endpoints is serialised once (``core.bodies``).

    Few, so no dict: there is one of these for each event that waits in memory, empty.
    """


@dataclass(slots=True, eq=False)
class Delivery:
    """One event owed to one endpoint: a row of the queue, while it is in memory.  Written by the feed."""

    id: DeliveryId
    endpoint: EndpointKey
    event: Event
    attempt: int
    """Exchanges made so far; the next one is number ``attempt + 1``."""
    shard: int
    order_key: str | None = None
    due_at: float | None = None
    """None for a fresh one."""
    replay: bool = False
    coalesce_key: str | None = None
    replaced_by: UUID | None = None
    """A newer event of its coalesce key: this one is not sent any more."""


class OutcomeKind(enum.StrEnum):
    """How an exchange ended.  The value is what ``hookd.attempt.outcome`` and the metrics say."""

    ANSWERED = "answered"
    """A status line and headers came; ``status`` tells which."""
    CONNECT_REFUSED = "connect_refused"
    CONNECT_TIMEOUT = "connect_timeout"
    CONNECT_FAILED = "connect_failed"
    """Reset or unreachable before the request was written."""
    DNS_FAILED = "dns_failed"
    BLOCKED = "blocked"
    """The address guard refused the target."""
    TLS_FAILED = "tls_failed"
    TIMEOUT = "timeout"
    """The request was sent (at least in part) and no answer came within the attempt's deadline."""
    CONNECTION_LOST = "connection_lost"
    """The connection ended after the request was sent and before the answer's headers were complete."""
    MALFORMED = "malformed"
    """What came is not an HTTP answer."""
    UNVERIFIED = "unverified"
    """It was asked again whether it wants to be called, and answered 2xx without repeating the challenge."""
    INVALID = "invalid"
    """The request cannot be built: a URL that does not parse, a header that could split a request."""
    OURS = "ours"
    """A fault of this machine (descriptors, ports, no route, proxy down): nobody is blamed, it is tried again."""


ANSWERED: Final = OutcomeKind.ANSWERED
BLOCKED: Final = OutcomeKind.BLOCKED


@dataclass(frozen=True, slots=True)
class ConnectFailure:
    """Why there is no connection."""

    kind: OutcomeKind
    reason: str
    """Fit for a tenant."""


@dataclass(slots=True, eq=False)
class Outcome:
    """
    What came of one exchange.  Written by the exchange.

    Nothing the network did is an exception: it is one of these.
    """

    kind: OutcomeKind
    sent: bool = False
    """Bytes of the request were handed to the connection: the receiver may have acted on it."""
    status: int = 0
    reason: str = ""
    """A short, fixed sentence fit for a tenant: no addresses, no timing."""
    retry_after: str | None = None
    """The header as it came; ``core.verdict`` reads it."""
    headers: str = ""
    """Of the answer, a line each; sanitised and bounded."""
    body: str = ""
    """Excerpt of the answer, sanitised, at most ``delivery.max_response`` long."""
    body_truncated: bool = False
    url: str = ""
    """The URL that was called last, without its query and fragment where those were not the endpoint's own."""
    started_at: float = 0.0
    """Wall time when the exchange began; also the ``webhook-timestamp``."""
    written_at: float = 0.0
    """Wall time when the first byte was written; 0 if none was."""
    dns_ms: float | None = None
    connect_ms: float | None = None
    """TCP, and the tunnel of an egress proxy; None on a connection that was reused."""
    tls_ms: float | None = None
    """The handshake; None without TLS, and on a connection that was reused."""
    first_byte_ms: float | None = None
    """From the written request to the answer's headers."""
    total_ms: float = 0.0
    reused: bool = False
    redirects: int = 0
    resent: bool = False
    """The request went out twice, because a reused connection closed before any byte of an answer."""
    fault: Exception | None = None
    """The bug of ours behind OURS, for the log."""


class VerdictKind(enum.StrEnum):
    """What follows from an outcome.  The value is what ``hookd.attempt.verdict`` says."""

    DELIVERED = "delivered"
    RETRY = "retry"
    HOLD = "hold"
    """Nobody's attempt was used up: wait and try the same attempt again."""
    EXHAUSTED = "exhausted"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


DELIVERED: Final = VerdictKind.DELIVERED
RETRY: Final = VerdictKind.RETRY
HOLD: Final = VerdictKind.HOLD


class HostSign(enum.Enum):
    """What an exchange says of the host."""

    NOTHING = enum.auto()
    ALIVE = enum.auto()
    """It answered, whatever it answered."""
    DOWN = enum.auto()
    """No answer, 429 or 503."""


ALIVE: Final = HostSign.ALIVE
DOWN: Final = HostSign.DOWN


@dataclass(frozen=True, slots=True)
class Verdict:
    """The consequence of an outcome for its delivery, its endpoint and its lane."""

    kind: VerdictKind
    reason: str = ""
    delay_s: float = 0.0
    """For RETRY and HOLD: how long to wait before it is due again."""
    disable: str | None = None
    """Reason for which the endpoint is to be disabled."""
    endpoint_failed: bool = False
    """Counts against the endpoint's health (``failing_since``)."""
    slow_lane: bool = False
    """The host asks for less: 429, 502, 503, 504, time-outs, connection errors."""
    hold_lane_s: float = 0.0
    """Nothing goes to the host for so long (``Retry-After``)."""
    host: HostSign = HostSign.NOTHING
    """What it says of the host, for its circuit breaker."""


@dataclass(slots=True, eq=False)
class Result:
    """What the recorder settles: one delivery, what came of it, what follows."""

    delivery: Delivery
    endpoint_key: EndpointKey
    outcome: Outcome | None
    """None for an ending without an exchange (expired, cancelled, endpoint disabled)."""
    verdict: Verdict
    health: Health | None = None
    """Where it has changed, and is to be written: the endpoint began to fail, was parked, or recovered."""
    written_wall: float = 0.0
    """Wall time when the verdict was given."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.  The defaults are those of ``config.toml``."""

    schedule_s: tuple[float, ...] = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
    jitter: float = 0.2
    """Each delay is multiplied by a factor from ``1 - jitter`` to ``1 + jitter``."""
    disable_after_s: float = 5 * 86400
    ask_again_after_s: float = float("inf")
    """A verified endpoint that has only failed for so long has to answer a challenge before its next delivery."""


@dataclass(frozen=True, slots=True)
class HostLimits:
    """What a host may be sent; 0 means no limit."""

    rate: float = 0.0
    """Requests per second."""
    burst: int = 0
    concurrency: int = 50
