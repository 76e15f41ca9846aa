"""
What people and programs do through the daemon: to endpoints, and to deliveries that are over.

The API and the console both go through here, so both get the same checks, the same errors and the same audit trail.  No
session of PostgreSQL is held while a receiver is asked something.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec

from hookd.admin.problems import Refused
from hookd.config import allowed_names
from hookd.core.bodies import format_problem
from hookd.core.headers import check_headers
from hookd.core.model import EndpointKey
from hookd.core.request import InvalidRequest
from hookd.core.signing import chosen_secret
from hookd.net.vetting import vet
from hookd.postgres import audit, history, registry, timeline
from hookd.postgres.audit import Subject
from hookd.postgres.queue import Queue
from hookd.postgres.registry import EndpointChange, EndpointRecord, NotPossible
from hookd.trial import try_out

if TYPE_CHECKING:
    import datetime
    from collections.abc import AsyncIterator, Mapping, Sequence
    from uuid import UUID

    import asyncpg

    from hookd.admin.schema import EndpointPatch, NewEndpoint
    from hookd.core.challenge import Verification
    from hookd.core.model import Endpoint, Secret
    from hookd.core.signing import KeyType
    from hookd.core.urls import Target
    from hookd.daemon import Daemon
    from hookd.postgres.audit import Actor

OVERLAP_S = 86400.0

OVERLAP_MOST_S = 366 * 86400.0

CLEARABLE = ("filter", "format", "rate", "concurrency", "description")

MISSED = ("all", "latest", "none")


@dataclass(frozen=True, slots=True)
class Checked:
    """An endpoint, after it was asked whether it wants to be called, if it had to be."""

    record: EndpointRecord
    verification: Verification | None


@dataclass(frozen=True, slots=True)
class Resumed:
    """An endpoint that receives again."""

    record: EndpointRecord
    queued: int
    """Of what it missed."""
    verification: Verification | None


@dataclass(frozen=True, slots=True)
class Added:
    """An endpoint with a new secret."""

    record: EndpointRecord
    secret: str | None
    """Shown this once; None: it was given, and so is known."""
    verification: Verification | None


@dataclass(frozen=True, slots=True)
class Selection:
    """Settled deliveries; None and empty: whatever."""

    event: UUID | None = None
    endpoint: UUID | None = None
    tenant: str | None = None
    states: tuple[str, ...] = ()
    """None given: all with an event, else those that were given up."""
    since: datetime.datetime | None = None
    until: datetime.datetime | None = None
    types: tuple[str, ...] = ()
    missing: bool = False
    """What the endpoint subscribes to and was never owed, instead of what was settled."""

    def facts(self) -> dict[str, Any]:
        """As ``history.replayable`` takes it, and as the audit trail has it."""
        if self.missing and (not self.endpoint or self.event or self.tenant or self.states):
            raise Refused(
                422, "missing", "missing goes with endpoint, types, since and until, and nothing else"
            )
        given = {
            "event": self.event,
            "endpoint": self.endpoint,
            "tenant": self.tenant,
            "since": self.since,
            "until": self.until,
            "types": self.types or None,
            "missing": self.missing or None,
        }
        if not (any(given.values()) or self.states):
            raise Refused(
                422, "selection", "say what to replay: event, endpoint, tenant, types, states, since or until"
            )
        wrong = sorted(set(self.states) - set(history.SETTLED_STATES))
        if wrong:
            raise Refused(
                422, "states", f"{wrong[0][:50]!r} is none; states are {', '.join(history.SETTLED_STATES)}"
            )
        facts = {name: value for name, value in given.items() if value is not None}
        if self.missing:
            return facts
        return facts | {"states": self.states or (history.SETTLED_STATES if self.event else ("exhausted",))}


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a replay."""

    matching: int
    queued: int
    of_disabled_endpoints: int
    """Left out: they would end as soon as they were read."""


class Actions:
    """All of them; each is told who acts, and raises ``Refused``."""

    def __init__(self, pool: asyncpg.Pool, daemon: Daemon) -> None:
        self._pool = pool
        self._daemon = daemon

    # Endpoints.

    async def add(self, actor: Actor, wanted: NewEndpoint) -> Added:
        """Register one; where verification is required it is asked first."""
        self._may_be(wanted.format)
        target = await self._judged(wanted.url)
        secret = _secret(wanted.key_type, wanted.secret)
        change = EndpointChange(
            url=target.url,
            host=target.lane,
            types=wanted.types or None,
            filter=wanted.filter,
            format=wanted.format,
            ordered=wanted.ordered,
            rate=wanted.rate,
            concurrency=wanted.concurrency,
            description=wanted.description,
            headers=_headers(wanted.headers),
        )
        async with self._session() as connection:
            record = await registry.add(
                connection, wanted.tenant, change, secret,
                keyring=self._daemon.keyring, verified=not self._required, actor=actor,
            )  # fmt: skip
        checked = await self._asked(actor, record)
        return Added(checked.record, None if wanted.secret else secret.reveal(), checked.verification)

    async def update(self, actor: Actor, endpoint_id: UUID, patch: EndpointPatch) -> Checked:
        """Change what is given; null clears."""
        target = None if patch.url is msgspec.UNSET else await self._judged(patch.url)
        headers = None
        if patch.headers is not msgspec.UNSET:
            headers = _headers(patch.headers) or {}
        change = EndpointChange(
            url=target.url if target else None,
            host=target.lane if target else None,
            headers=headers,
            clear=frozenset(n for n in CLEARABLE if getattr(patch, n) is None),
            **{
                n: getattr(patch, n)
                for n in ("types", "ordered", *CLEARABLE)
                if getattr(patch, n) not in (msgspec.UNSET, None)
            },
        )
        async with self._session() as connection:
            record = await self._found(connection, endpoint_id)
            if patch.format is not msgspec.UNSET and patch.format != record.format:
                self._may_be(patch.format)
            record = await registry.update(
                connection, record.id, change,
                keyring=self._daemon.keyring, verified=not self._required, actor=actor,
            )  # fmt: skip
        return await self._asked(actor, record) if target else Checked(record, None)

    async def pause(self, actor: Actor, endpoint_id: UUID, reason: str | None = None) -> EndpointRecord:
        """Let its deliveries wait."""
        async with self._session() as connection:
            record = await self._found(connection, endpoint_id)
            return await registry.pause(connection, record.id, reason, actor=actor)

    async def resume(self, actor: Actor, endpoint_id: UUID, missed: str = "none") -> Resumed:
        """Let it receive again; ``missed``: what a disabled one gets of what it missed."""
        if missed not in MISSED:
            raise Refused(422, "missed", f"missed is {', '.join(MISSED)}")
        async with self._session() as connection:
            record = await self._found(connection, endpoint_id)
            record, queued = await registry.resume(
                connection,
                record.id,
                missed,
                ask_again_after_s=self._daemon.config.ask_again_after_s(),
                actor=actor,
            )
        checked = await self._asked(actor, record)
        return Resumed(checked.record, queued, checked.verification)

    async def rotate(
        self,
        actor: Actor,
        endpoint_id: UUID,
        overlap_s: float = OVERLAP_S,
        key_type: KeyType | None = None,
        given: str | None = None,
    ) -> Added:
        """Sign with a new secret, of the type of the one before unless told otherwise; the old one signs too for a while."""
        if not 0 <= overlap_s <= OVERLAP_MOST_S:
            raise Refused(422, "overlap", "an overlap is at most 366d")
        async with self._session() as connection:
            record = await self._found(connection, endpoint_id)
            same = cast("KeyType | None", record.key_type)
            secret = _secret(key_type or (None if given else same), given)
            record = await registry.rotate(
                connection, record.id, secret, overlap_s, keyring=self._daemon.keyring, actor=actor
            )
        return Added(record, None if given else secret.reveal(), None)

    async def verify(self, actor: Actor, endpoint_id: UUID) -> Checked:
        """Ask it whether it wants to be called."""
        async with self._session() as connection:
            record = await self._found(connection, endpoint_id)
        return await self._verified(actor, self._there(record))

    async def test(
        self,
        actor: Actor,
        endpoint_id: UUID,
        type_: str = "hookd.test",
        data: str = '{"test": true}',
    ) -> dict[str, Any]:
        """
        Send it a test event now, past the queue.

        Keys: request, accepted, outcome, status, reason, answer (headers and body; None: there was none), dns_ms,
        connect_ms, tls_ms, first_byte_ms, total_ms.
        """
        async with self._session() as connection:
            record = self._there(await self._found(connection, endpoint_id))
            event_id = await connection.fetchval("select hookd.uuid7()")
            if record.owes_an_answer(required=self._required):
                raise Refused(409, "unverified", "it receives nothing before it is verified: verify it first")
            await audit.record(
                connection, actor, "endpoint.test", Subject(endpoint=record.id), {"type": type_}
            )
        try:
            request, outcome = await try_out(
                await self._served(record), self._daemon.exchange, self._daemon.wire(),
                event_id=event_id, type_=type_, data=data, now=self._daemon.wall(),
            )  # fmt: skip
        except InvalidRequest as problem:
            raise Refused(422, "request", f"the request cannot be made: {problem}") from None
        answered = bool(outcome.status)
        return {
            "request": request,
            "accepted": 200 <= outcome.status < 300,
            "outcome": outcome.kind.value,
            "status": outcome.status or None,
            "reason": outcome.reason or None,
            "answer": timeline.answer(outcome.status, outcome.headers, outcome.body, truncated=outcome.body_truncated)
            if answered
            else None,
            "dns_ms": outcome.dns_ms,
            "connect_ms": outcome.connect_ms,
            "tls_ms": outcome.tls_ms,
            "first_byte_ms": outcome.first_byte_ms,
            "total_ms": outcome.total_ms,
        }  # fmt: skip

    async def remove(self, actor: Actor, endpoint_id: UUID) -> EndpointRecord:
        """Send it nothing more; what is pending is cancelled."""
        async with self._session() as connection:
            record = await self._found(connection, endpoint_id)
            return await registry.remove(connection, record.id, actor=actor)

    # Deliveries.

    async def resend(self, actor: Actor, event_id: UUID, delivery_id: int | None = None) -> int:
        """
        One event to all its endpoints again that are not disabled, or one delivery to its own; returns how many were queued.

        Each is a new delivery with the same webhook-id, whose attempts count from 1; what is pending is left alone.
        """
        selection: dict[str, Any] = {"event": event_id}
        async with self._session() as connection:
            if delivery_id is not None:
                endpoint = await timeline.endpoint_of(connection, event_id, delivery_id)
                if endpoint is None:
                    raise Refused(404, "not_found", f"there is no delivery {delivery_id} of event {event_id}")
                if endpoint["state"] in ("disabled", "removed"):
                    raise Refused(
                        409, "endpoint", f"its endpoint is {endpoint['state']}: it would get nothing; resume it first"
                    )  # fmt: skip
                selection["endpoint"] = endpoint["id"]
            elif await timeline.event_tenant(connection, event_id) is None:
                raise Refused(404, "not_found", f"there is no event {event_id}")
            found = await history.replayable(connection, selection)
            pairs = [one.pair for one in found if not one.would_end]
            if found and not pairs:
                raise Refused(
                    409, "endpoint", "its endpoints are disabled: they would get nothing; resume one first"
                )
            queued = await self._queued(
                connection, actor, "resend", selection, pairs, delivery_id=delivery_id
            )
        if not queued:
            raise Refused(
                409, "nothing", "nothing to send again: it is pending still, or no endpoint was subscribed"
            )
        return queued

    async def replay(
        self, actor: Actor, selection: Selection, *, rate: float | None = None, dry_run: bool = False
    ) -> Replayed:
        """Queue settled deliveries again, at each endpoint so many a second; or only say how many."""
        facts = selection.facts()
        queued = 0
        async with self._session() as connection:
            if selection.endpoint is not None:
                await self._found(connection, selection.endpoint)
            found = await history.replayable(connection, facts)
            pairs = [one.pair for one in found if not one.would_end]
            if pairs and not dry_run:
                queued = await self._queued(connection, actor, "replay", facts, pairs, rate=rate)
        return Replayed(len(pairs), queued, len(found) - len(pairs))

    async def resend_these(
        self, actor: Actor, pairs: Sequence[tuple[UUID, UUID]], asked: Mapping[str, Any]
    ) -> int:
        """Events to endpoints once more, as ``resending.matching`` found them; ``asked`` is what for, for the audit trail."""
        async with self._session() as connection:
            return await self._queued(connection, actor, "replay", asked, pairs, matching=len(pairs))

    async def _queued(
        self,
        connection: asyncpg.Connection,
        actor: Actor,
        action: str,
        asked: Mapping[str, Any],
        pairs: Sequence[tuple[UUID, UUID]],
        *,
        delivery_id: int | None = None,
        matching: int | None = None,
        rate: float | None = None,
    ) -> int:
        subject, details = audit.of_selection(asked, delivery_id)
        if matching is not None:
            details["matching"] = matching
        # before the first is queued: one that is broken off has still been asked for
        await audit.record(connection, actor, f"delivery.{action}", subject, details)
        queued = 0
        async for total in history.queue(connection, pairs, rate=rate, urgent=action == "resend"):
            queued = total
        return queued

    # Help.

    def _may_be(self, format_: str | None) -> None:
        if problem := format_problem(format_, self._daemon.config.delivery.thin_url):
            raise Refused(422, "format", problem)

    @property
    def _required(self) -> bool:
        return self._daemon.config.security.require_verification

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[asyncpg.Connection]:
        try:
            async with self._pool.acquire() as connection:
                yield cast("asyncpg.Connection", connection)
        except NotPossible as error:
            raise Refused(422, "refused", str(error)) from None

    @staticmethod
    async def _found(connection: asyncpg.Connection, endpoint_id: UUID) -> EndpointRecord:
        try:
            return await registry.show(connection, endpoint_id)
        except NotPossible:
            raise Refused(404, "not_found", f"there is no endpoint {endpoint_id}") from None

    @staticmethod
    def _there(record: EndpointRecord) -> EndpointRecord:
        if record.state == "removed":
            raise Refused(422, "refused", f"endpoint {record.id} was removed")
        return record

    async def _served(self, record: EndpointRecord) -> Endpoint:
        """An endpoint with its secrets."""
        async with self._session() as connection:
            queue = Queue(connection, lambda: self._daemon.keyring)
            found = await queue.endpoints([EndpointKey(record.key)])
        if record.id in queue.unreadable or not found:
            raise Refused(
                503, "secrets", "the secrets of this endpoint cannot be read; the daemon's log says more"
            )
        return found[0]

    async def _asked(self, actor: Actor, record: EndpointRecord) -> Checked:
        """An endpoint, after it was asked if it has to be."""
        return await self._verified(actor, record) if record.state == "unverified" else Checked(record, None)

    async def _verified(self, actor: Actor, record: EndpointRecord) -> Checked:
        """Ask it; no session is held meanwhile."""
        asked = await self._served(record)
        said = await self._daemon.ask(asked)
        async with self._session() as connection:
            # the URL that was asked: it may have been changed since the record was read
            record = await registry.note_verification(
                connection, record.id, asked.url, None if said.verified else said.reason, actor=actor
            )
        return Checked(record, said)

    async def _judged(self, url: str) -> Target:
        # what the guard found out about addresses stays here: whoever typed the URL may read this
        network = self._daemon.config.network
        found = await vet(
            url, self._daemon.resolver, https_only=network.https_only, names=allowed_names(network)
        )
        if not found.allowed or found.target is None:
            raise Refused(422, "url", f"the URL is refused: {found.reason}")
        return found.target


def _headers(headers: dict[str, str] | None) -> dict[str, str] | None:
    wrong = check_headers(headers or {})
    if wrong is not None:
        raise Refused(422, "headers", wrong)
    return headers


def _secret(kind: KeyType | None, given: str | None) -> Secret:
    try:
        return chosen_secret(kind, given, secrets.token_bytes(32))
    except ValueError as error:
        raise Refused(422, "secret", str(error)) from None
