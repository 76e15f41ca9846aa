"""
What the API takes and gives, as types: requests are checked by them, answers are written by them, and the OpenAPI document is
made of them.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal
from uuid import UUID  # noqa: TC003 - types are read at run time

import msgspec
from msgspec import UNSET, Meta, UnsetType

LIST_MOST = 1000

Tenant = Annotated[str, Meta(min_length=1, max_length=255)]
Moment = Annotated[datetime.datetime, Meta(tz=True)]
Number = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Limit = Annotated[int, Meta(ge=1, le=LIST_MOST, description="Rows of a page, at most.")]
Cursor = Annotated[
    str,
    Meta(
        pattern="^[A-Za-z0-9_-]{1,300}$",
        description="`next` or `previous` of another page of the same search.",
    ),
]
TypePattern = Annotated[
    str, Meta(min_length=1, max_length=257, description="A type, or a pattern: `user.*`, `*`.")
]
Path = Annotated[
    str,
    Meta(min_length=1, max_length=1000, description="SQL/JSON path on the payload: `$.id ? (@ == 123)`."),
]
StatusPattern = Annotated[
    str, Meta(pattern="^[1-9]([0-9]{2}|xx)$", description="Of the answer: `503`, or `5xx` for all of them.")
]
Since = Annotated[datetime.datetime, Meta(tz=True, description="From then on.")]
Until = Annotated[datetime.datetime, Meta(tz=True, description="Before then.")]

DeliveryState = Literal["pending", "retrying", "delivered", "exhausted", "expired", "cancelled"]
Settled = Literal["delivered", "exhausted", "expired", "cancelled"]
Verdict = Literal["delivered", "retry", "exhausted", "expired", "cancelled"]
EndpointState = Literal["active", "unverified", "paused", "disabled", "removed"]
Format = Literal["standard", "raw", "cloudevents", "thin"]
KeyType = Literal["hmac", "ed25519"]


class Asked(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Something that comes in: what is not known is refused."""


class Given(msgspec.Struct, kw_only=True):
    """Something that goes out."""


# Queries ----------------------------------------------------------------------------------------------------------


class EndpointQuery(Asked):
    """Which endpoints."""

    tenant: Tenant | None = None
    state: (
        Annotated[EndpointState, Meta(description="Removed ones are shown only when asked for.")] | None
    ) = None
    cursor: Cursor | None = None
    limit: Limit = 100


class HealthQuery(Asked):
    """How far back."""

    hours: Annotated[int, Meta(ge=1, le=24 * 31)] = 24


class EventQuery(Asked):
    """Which events."""

    tenant: Tenant | None = None
    type: TypePattern | None = None
    path: Path | None = None
    since: Since | None = None
    until: Until | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class DeliveryQuery(Asked):
    """Which deliveries; times are those of their events."""

    event: UUID | None = None
    endpoint: UUID | None = None
    tenant: Tenant | None = None
    type: TypePattern | None = None
    state: list[DeliveryState] = []
    path: Path | None = None
    since: Since | None = None
    until: Until | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class AttemptQuery(Asked):
    """Which attempts."""

    event: UUID | None = None
    delivery: Number | None = None
    endpoint: UUID | None = None
    tenant: Tenant | None = None
    type: TypePattern | None = None
    verdict: list[Verdict] = []
    failed: Annotated[bool, Meta(description="Only those that were not delivered.")] = False
    outcome: Annotated[str, Meta(max_length=50, description="`answered`, `timeout`, `connect_refused`, …")] | None = None  # fmt: skip
    status: StatusPattern | None = None
    path: Path | None = None
    since: Since | None = None
    until: Until | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class DeadLetterQuery(Asked):
    """Which dead letters; times are those of their deaths."""

    event: UUID | None = None
    endpoint: UUID | None = None
    tenant: Tenant | None = None
    type: TypePattern | None = None
    path: Path | None = None
    replayed: Annotated[bool, Meta(description="Whether they were queued again.")] | None = None
    since: Since | None = None
    until: Until | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


class DeliveryPlace(Asked):
    """Where a delivery is found faster."""

    event: Annotated[UUID, Meta(description="Its event; without it the delivery is looked for.")] | None = (
        None
    )


class RatesQuery(Asked):
    """Which stretch of time."""

    seconds: Annotated[int, Meta(ge=60, le=31 * 86400)] = 3600
    intervals: Annotated[int, Meta(ge=1, le=500)] = 60
    until: Until | None = None


class FailuresQuery(Asked):
    """Which failures; from an hour ago, where nothing else is said."""

    since: Since | None = None
    until: Until | None = None
    endpoint: UUID | None = None
    tenant: Tenant | None = None


class StatusQuery(Asked):
    """How much of it."""

    lanes: Annotated[int, Meta(ge=0, le=1000, description="So many, those in trouble first.")] = 30


class AuditQuery(Asked):
    """Which entries."""

    endpoint: UUID | None = None
    event: UUID | None = None
    tenant: Tenant | None = None
    action: Annotated[str, Meta(max_length=100)] | None = None
    who: Annotated[str, Meta(max_length=200)] | None = None
    via: Literal["console", "api", "cli"] | None = None
    since: Since | None = None
    until: Until | None = None
    cursor: Cursor | None = None
    limit: Limit = 50


# Bodies -----------------------------------------------------------------------------------------------------------

Text = Annotated[str, Meta(max_length=2000)]
Url = Annotated[str, Meta(description="`https://host/path`")]
Types = Annotated[list[TypePattern], Meta(min_length=1, max_length=1000)]
Rate = Annotated[float, Meta(gt=0, description="Requests a second.")]
Concurrency = Annotated[int, Meta(ge=1, le=2**31 - 1, description="Exchanges at once.")]
Filter = Annotated[
    str, Meta(max_length=10_000, description="SQL/JSON path on the payload: `$.amount ? (@ > 100)`.")
]
Headers = Annotated[
    dict[str, str], Meta(description="Sent with every request; may hold credentials, never shown.")
]
SecretText = Annotated[str, Meta(max_length=1000, description="One that you have: `whsec_…` or `whsk_…`.")]


class NewEndpoint(Asked):
    """An endpoint to register."""

    url: Url
    tenant: Tenant = "default"
    types: Types | None = None
    filter: Filter | None = None
    format: Format | None = None
    ordered: bool = False
    rate: Rate | None = None
    concurrency: Concurrency | None = None
    description: Text | None = None
    headers: Headers | None = None
    key_type: KeyType | None = None
    secret: SecretText | None = None


class EndpointPatch(Asked):
    """What to change of an endpoint: what is absent stays, null clears."""

    url: Url | UnsetType = UNSET
    types: Types | UnsetType = UNSET
    filter: Filter | UnsetType | None = UNSET
    format: Format | UnsetType | None = UNSET
    ordered: bool | UnsetType = UNSET
    rate: Rate | UnsetType | None = UNSET
    concurrency: Concurrency | UnsetType | None = UNSET
    description: Text | UnsetType | None = UNSET
    headers: Headers | UnsetType | None = UNSET


class Pause(Asked):
    """Why."""

    reason: Text | None = None


class Resume(Asked):
    """What a disabled endpoint is to get of what it missed."""

    missed: Literal["all", "latest", "none"] = "none"


class Rotate(Asked):
    """How to change secrets."""

    overlap: Annotated[
        str, Meta(max_length=20, description="How long the old one signs too: `1h`, `1d`.")
    ] = "1d"
    key_type: KeyType | None = None
    secret: SecretText | None = None


class TrialEvent(Asked):
    """What to send."""

    type: Annotated[str, Meta(pattern=r"^[^\s*]{1,255}$")] = "hookd.test"
    data: Any = msgspec.field(default_factory=lambda: {"test": True})


class Replay(Asked):
    """Which settled deliveries to queue again: with an event all of it, else what was given up."""

    event: UUID | None = None
    endpoint: UUID | None = None
    tenant: Tenant | None = None
    types: Annotated[
        list[TypePattern], Meta(max_length=1000, description="Patterns, as endpoints have them.")
    ] = []
    states: list[Settled] = []
    since: Moment | None = None
    until: Moment | None = None
    missing: Annotated[
        bool, Meta(description="What the endpoint subscribes to and was never owed, because it came later.")
    ] = False
    rate: (
        Annotated[float, Meta(gt=0, le=100_000, description="So many a second at each endpoint.")] | None
    ) = None
    dry_run: Annotated[bool, Meta(description="Only say how many.")] = False


# Answers ----------------------------------------------------------------------------------------------------------


class Problem(Given):
    """Why something was not done (RFC 9457)."""

    title: str
    status: int
    code: Annotated[str, Meta(description="For programs: stays the same when the words change.")]
    detail: Annotated[str, Meta(description="For people.")]


class Endpoint(Given):
    """A subscriber."""

    id: UUID
    tenant: str
    url: str
    host: str
    types: list[str]
    filter: str | None
    format: Format | None
    ordered: bool
    rate: float | None
    concurrency: int | None
    description: str | None
    state: EndpointState
    state_reason: str | None
    state_at: Moment
    failing_since: Moment | None
    failing_reason: str | None
    parked_at: Moment | None
    verified_at: Moment | None
    created_at: Moment
    updated_at: Moment
    header_names: list[str] | None
    public_keys: list[str]
    key_type: KeyType | None
    secrets: Annotated[int, Meta(description="How many sign: two while one rotates.")]


class Verification(Given):
    """Whether it answered the challenge."""

    verified: bool
    reason: str | None


class CheckedEndpoint(Endpoint):
    """An endpoint; and whether it answered its challenge, where it was asked."""

    verification: Verification | UnsetType = UNSET


class EndpointWithSecret(CheckedEndpoint):
    """An endpoint and its new secret, this once; without it where it was given."""

    secret: str | UnsetType = UNSET


class ResumedEndpoint(CheckedEndpoint, kw_only=True):
    """An endpoint, and how much of what it missed was queued."""

    queued: int


class EndpointList(Given):
    """Endpoints in order of creation."""

    data: list[Endpoint]
    next: str | None


class Hour(Given):
    """How an endpoint fared in an hour in which it was called."""

    at: Moment
    delivered: int
    failed: int
    average_ms: float | None
    slowest_ms: float


class EndpointHealth(Given):
    """How an endpoint fared."""

    id: UUID
    state: EndpointState
    state_reason: str | None
    failing_since: Moment | None
    failing_reason: str | None
    parked_at: Moment | None
    delivered: int
    failed: int
    hours: list[Hour]


class Request(Given):
    """A request as it was sent; values of the endpoint's own headers are hidden."""

    method: str
    url: str
    line: str
    headers: list[tuple[str, str]]
    body: str
    body_bytes: int
    signed: Annotated[
        bool | UnsetType, Meta(description="False: the secret that signed it is gone, so the signature is left out.")
    ] = UNSET  # fmt: skip
    changed: Annotated[
        bool | UnsetType, Meta(description="The endpoint was changed since: it may have been another request.")
    ] = UNSET  # fmt: skip


class Answer(Given):
    """What a receiver answered: untrusted text."""

    status: int
    headers: list[tuple[str, str]]
    body: str
    truncated: bool


class Exchange(Given):
    """A test event's."""

    request: Request
    accepted: bool
    outcome: str
    status: int | None
    reason: str | None
    answer: Answer | None
    dns_ms: float | None
    connect_ms: float | None
    tls_ms: float | None
    first_byte_ms: float | None
    total_ms: float


class EventSummary(Given):
    """An event in a list."""

    id: UUID
    type: str
    tenant: str
    created_at: Moment
    deliver_at: Moment | None
    expires_at: Moment | None
    idempotency_key: str | None
    order_key: str | None
    coalesce_key: str | None
    payload_bytes: int
    deliveries: Annotated[
        dict[str, int], Meta(description="How many are in which state; of at most 100 pending and 100 ended ones.")
    ]  # fmt: skip


class Listing(Given):
    """A page of a list, newest first.  It may be short, or empty, and still have a `next`: a search looks for a moment."""

    next: Annotated[str, Meta(description="The cursor of what is older; null: there is nothing.")] | None
    previous: Annotated[
        str | None,
        Meta(description="The cursor of what is newer; of the newest page: of what came since."),
    ]
    looked_back_to: Annotated[Moment, Meta(description="How far; null: to the end.")] | None


class EventList(Listing):
    """Events, newest first."""

    data: list[EventSummary]


class Delivery(Given):
    """An event owed to an endpoint, or what became of it."""

    event_id: UUID
    delivery_id: int
    endpoint_id: UUID | None
    url: str | None
    tenant: str | None
    type: str | None
    created_at: Annotated[Moment, Meta(description="Of its event.")] | None
    state: DeliveryState
    attempts: int
    reason: str | None
    last_attempt_at: Moment | None
    last_outcome: str | None
    last_status: int | None
    last_ms: float | None
    next_attempt_at: Moment | None
    replay: bool


class DeliveryList(Listing):
    """Deliveries, those of the newest events first."""

    data: list[Delivery]


class Event(Given):
    """An event with its payload and deliveries."""

    id: UUID
    type: str
    tenant: str
    created_at: Moment
    deliver_at: Moment | None
    expires_at: Moment | None
    idempotency_key: str | None
    order_key: str | None
    coalesce_key: str | None
    headers: dict[str, Any] | None
    payload: Annotated[msgspec.Raw, Meta(description="Byte for byte as it was given.")]
    payload_bytes: int
    buried: Annotated[bool, Meta(description="Retention took it; a dead letter has this copy.")]
    deliveries: list[Delivery]
    more_deliveries: (
        Annotated[str, Meta(description="A cursor for `/deliveries?event=…`, where there are more.")] | None
    )


class Phase(Given):
    """Where time went."""

    name: Literal["dns", "connect", "tls", "first_byte", "rest"]
    ms: float


class TimelineAttempt(Given):
    """An attempt of a delivery; one numbered 0 is an ending without an exchange."""

    at: Moment
    attempt: int
    status: int | None
    verdict: Verdict
    outcome: str | None
    reason: str | None
    retry_at: Moment | None
    sent: bool
    resent: bool
    reused: bool
    total_ms: float | None
    url: str | None
    phases: list[Phase]
    words: str
    request: Request | None
    request_problem: Annotated[str, Meta(description="Why the request cannot be shown.")] | None
    answer: Answer | None


class DeliveryTimeline(Given):
    """A delivery from its first attempt to its end."""

    delivery_id: int
    event_id: UUID
    type: str | None
    tenant: str | None
    created_at: Annotated[Moment, Meta(description="Of its event.")] | None
    endpoint_id: UUID | None
    url: str | None
    endpoint_state: EndpointState | None
    state: DeliveryState
    attempts_made: int
    replay: bool
    reason: str | None
    next_attempt_at: Moment | None
    because: Annotated[str, Meta(description="What it waits for, or how it ended, in words.")]
    died_at: Moment | None
    replayed_at: Moment | None
    attempts: list[TimelineAttempt]
    attempts_left_out: int


class Attempt(Given):
    """An HTTP exchange, and what followed; one numbered 0 is an ending without an exchange."""

    at: Moment
    delivery_id: int
    event_id: UUID
    endpoint_id: UUID | None
    url: str | None
    tenant: str | None
    type: str | None
    created_at: Annotated[Moment, Meta(description="Of its event.")] | None
    attempt: int
    status: int | None
    verdict: Verdict
    outcome: str | None
    reason: str | None
    retry_at: Moment | None
    sent: bool
    resent: bool
    reused: bool
    replay: bool
    total_ms: float | None
    dns_ms: float | None
    connect_ms: float | None
    tls_ms: float | None
    first_byte_ms: float | None


class AttemptList(Listing):
    """Attempts, newest first."""

    data: list[Attempt]


class DeadLetter(Given):
    """A delivery that was given up."""

    died_at: Moment
    delivery_id: int
    event_id: UUID
    endpoint_id: UUID | None
    url: str | None
    tenant: str
    type: str
    created_at: Annotated[Moment, Meta(description="Of its event.")]
    attempts: int
    reason: str
    replayed_at: Moment | None
    payload_bytes: int


class DeadLetterList(Listing):
    """Dead letters, those that died last first."""

    data: list[DeadLetter]


class Queued(Given):
    """How many deliveries were queued."""

    queued: int


class ReplayAnswer(Given):
    """How many match, and how many of them were queued."""

    matching: int
    queued: int
    of_disabled_endpoints: Annotated[int, Meta(description="More that match, and are left out.")]


class StatusAnswer(Given):
    """How everything is doing: what `hookd status --json` prints."""

    at: Moment
    daemons: list[dict[str, Any]]
    queue: dict[str, Any]
    lanes: list[dict[str, Any]]
    lanes_left_out: int


class Percentiles(Given):
    """Milliseconds; null: nothing was counted."""

    p50: float | None
    p95: float | None
    p99: float | None


class Interval(Given):
    """What was counted in a stretch of time."""

    at: Moment
    seconds: float
    attempts: int
    delivered: int
    failed: int
    outcomes: dict[str, int]
    latency_ms: Percentiles
    lag_ms: Annotated[Percentiles, Meta(description="From the event's insert to the first byte sent.")]
    pending: Annotated[int, Meta(description="In the queue, at most at one time; counted up to 200,000.")]
    oldest_s: float
    in_flight: int


class Rates(Given):
    """A stretch of time in intervals, and the whole of it."""

    since: Moment
    until: Moment
    whole: Interval
    intervals: list[Interval]


class Cause(Given):
    """Failures of one kind, with the newest of them."""

    outcome: str | None
    status: int | None
    reason: str | None
    failures: int
    endpoints: int
    deliveries: int
    first_at: Moment
    last_at: Moment
    event_id: UUID
    delivery_id: int
    endpoint_id: UUID | None
    host: str | None


class FailuresAnswer(Given):
    """Failures by cause, the most frequent first."""

    data: list[Cause]
    looked_back_to: Annotated[Moment, Meta(description="There were more than 5,000: only those since then were looked at.")] | None  # fmt: skip


class AuditEntry(Given):
    """Who did what, when."""

    id: int
    at: Moment
    via: Literal["console", "api", "cli"]
    who: str
    action: str
    tenant: str | None
    endpoint_id: UUID | None
    event_id: UUID | None
    delivery_id: int | None
    details: dict[str, Any]


class AuditList(Listing):
    """The audit trail, newest first."""

    data: list[AuditEntry]
