"""
``/api/v1``: everything that can be seen and done, for programs.

A handler's signature is its documentation: ``hookd.admin.operations`` reads from it what comes in and what goes out, checks the
one, writes the other, and makes the OpenAPI document of both.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import msgspec

from hookd.admin import schema
from hookd.admin.actions import Selection
from hookd.admin.operations import Caller, Reply, operation
from hookd.admin.problems import Refused
from hookd.config import duration
from hookd.postgres import audit, overview, registry, search, timeline
from hookd.postgres.registry import NotPossible
from hookd.postgres.status import status

if TYPE_CHECKING:
    from hookd.admin.actions import Actions, Checked
    from hookd.daemon import Daemon
    from hookd.postgres.pages import Page
    from hookd.postgres.reading import Reading
    from hookd.postgres.registry import EndpointRecord

HIDDEN = ("key", "shard")

RECENTLY = datetime.timedelta(hours=1)


class Api:
    """The handlers."""

    def __init__(self, reading: Reading, actions: Actions, daemon: Daemon) -> None:
        self._reading = reading
        self._actions = actions
        self._daemon = daemon

    # Endpoints.

    @operation("GET", "/endpoints")
    async def list_endpoints(self, query: schema.EndpointQuery) -> schema.EndpointList:
        """Endpoints, in order of creation."""
        after = None
        if query.cursor is not None:
            try:
                after = msgspec.convert(query.cursor, UUID)
            except msgspec.ValidationError:
                raise Refused(422, "cursor", "this is no cursor of this list") from None
        async with self._reading.session() as connection:
            records = await registry.listing(
                connection, tenant=query.tenant, state=query.state, after=after, limit=query.limit
            )
        more = str(records[-1].id) if len(records) == query.limit else None
        return schema.EndpointList(data=[_endpoint(r) for r in records], next=more)

    @operation("POST", "/endpoints", 201)
    async def add_endpoint(self, body: schema.NewEndpoint, caller: Caller) -> schema.EndpointWithSecret:
        """
        Register an endpoint.

        The answer has its secret, this once.  With `security.require_verification` it is asked first whether it wants to be
        called, and `verification` says what came of that.
        """
        added = await self._actions.add(caller, body)
        return schema.EndpointWithSecret(
            **_facts(added.record),
            secret=_or_unset(added.secret),
            verification=_verification(added.verification),
        )

    @operation("GET", "/endpoints/{id}")
    async def show_endpoint(self, id: UUID) -> schema.Endpoint:  # noqa: A002 - the path's name for it
        """One endpoint."""
        return _endpoint(await self._found(id))

    @operation("PATCH", "/endpoints/{id}")
    async def change_endpoint(
        self,
        id: UUID,  # noqa: A002
        body: schema.EndpointPatch,
        caller: Caller,
    ) -> schema.CheckedEndpoint:
        """Change an endpoint: what is absent stays, null clears."""
        return _checked(await self._actions.update(caller, id, body))

    @operation("DELETE", "/endpoints/{id}", 204)
    async def remove_endpoint(self, id: UUID, caller: Caller) -> None:  # noqa: A002
        """Send it nothing more; what is pending is cancelled, its history stays."""
        await self._actions.remove(caller, id)

    @operation("POST", "/endpoints/{id}/pause")
    async def pause_endpoint(self, id: UUID, body: schema.Pause, caller: Caller) -> schema.Endpoint:  # noqa: A002
        """Let its deliveries wait."""
        return _endpoint(await self._actions.pause(caller, id, body.reason))

    @operation("POST", "/endpoints/{id}/resume")
    async def resume_endpoint(
        self,
        id: UUID,  # noqa: A002
        body: schema.Resume,
        caller: Caller,
    ) -> schema.ResumedEndpoint:
        """Let it receive again; one that was disabled can be given what it missed."""
        done = await self._actions.resume(caller, id, body.missed)
        return schema.ResumedEndpoint(
            **_facts(done.record), queued=done.queued, verification=_verification(done.verification)
        )

    @operation("POST", "/endpoints/{id}/rotate")
    async def rotate_endpoint(
        self,
        id: UUID,  # noqa: A002
        body: schema.Rotate,
        caller: Caller,
    ) -> schema.EndpointWithSecret:
        """Make a new secret, shown this once; the old one signs too for a while."""
        try:
            overlap_s = duration(body.overlap)
        except ValueError as error:
            raise Refused(422, "overlap", str(error)) from None
        added = await self._actions.rotate(caller, id, overlap_s, body.key_type, body.secret)
        return schema.EndpointWithSecret(**_facts(added.record), secret=_or_unset(added.secret))

    @operation("POST", "/endpoints/{id}/verify")
    async def verify_endpoint(self, id: UUID, caller: Caller) -> schema.CheckedEndpoint:  # noqa: A002
        """Ask it whether it wants to be called: it has to repeat a challenge."""
        return _checked(await self._actions.verify(caller, id))

    @operation("POST", "/endpoints/{id}/test")
    async def test_endpoint(self, id: UUID, body: schema.TrialEvent, caller: Caller) -> schema.Exchange:  # noqa: A002
        """Send it a test event now, past the queue, and show the exchange."""
        data = msgspec.json.encode(body.data).decode()
        return msgspec.convert(await self._actions.test(caller, id, body.type, data), schema.Exchange)

    @operation("GET", "/endpoints/{id}/health")
    async def endpoint_health(self, id: UUID, query: schema.HealthQuery) -> schema.EndpointHealth:  # noqa: A002
        """How an endpoint fared, by the hour."""
        record = await self._found(id)
        async with self._reading.session() as connection:
            hours = (await overview.endpoint_hours(connection, [id], hours=query.hours))[id]
        return schema.EndpointHealth(
            id=record.id,
            state=cast("schema.EndpointState", record.state),
            state_reason=record.state_reason,
            failing_since=record.failing_since,
            failing_reason=record.failing_reason,
            parked_at=record.parked_at,
            delivered=sum(h["delivered"] for h in hours),
            failed=sum(h["failed"] for h in hours),
            hours=[schema.Hour(**h) for h in hours],
        )

    # What happened.

    @operation("GET", "/events")
    async def list_events(self, query: schema.EventQuery) -> schema.EventList:
        """Events, newest first."""
        async with self._reading.session() as connection:
            page = await search.events(connection, _filter(query), query.cursor, query.limit)
        return schema.EventList(data=[schema.EventSummary(**r) for r in page.rows], **_around(page))

    @operation("GET", "/events/{id}")
    async def show_event(self, id: UUID) -> schema.Event:  # noqa: A002
        """One event with its payload and its deliveries."""
        async with self._reading.session() as connection:
            found = await timeline.event(connection, id)
        if found is None:
            raise Refused(404, "not_found", f"there is no event {id}")
        found["payload"] = msgspec.Raw(found["payload"].encode())
        found["deliveries"] = [schema.Delivery(**r) for r in found["deliveries"]]
        return schema.Event(**found)

    @operation("POST", "/events/{id}/resend", 202)
    async def resend_event(self, id: UUID, caller: Caller) -> schema.Queued:  # noqa: A002
        """Send an event to all its endpoints again, with the same webhook-id; what is pending is left alone."""
        return schema.Queued(queued=await self._actions.resend(caller, id))

    @operation("GET", "/deliveries")
    async def list_deliveries(self, query: schema.DeliveryQuery) -> schema.DeliveryList:
        """Deliveries, those of the newest events first."""
        async with self._reading.session() as connection:
            page = await search.deliveries(connection, _filter(query), query.cursor, query.limit)
        return schema.DeliveryList(data=[schema.Delivery(**r) for r in page.rows], **_around(page))

    @operation("GET", "/deliveries/{number}")
    async def show_delivery(
        self, number: schema.Number, query: schema.DeliveryPlace
    ) -> schema.DeliveryTimeline:
        """One delivery and its attempts: what was sent, what was answered, and why it is where it is."""
        async with self._reading.session() as connection:
            found = await timeline.delivery(
                connection, number, query.event, wire=self._daemon.wire(), keyring=self._daemon.keyring
            )
        if found is None:
            raise Refused(404, "not_found", f"there is no delivery {number}")
        for attempt in found["attempts"]:
            request = attempt["request"]
            attempt["request_problem"] = request.get("problem") if request else None
            if attempt["request_problem"]:
                attempt["request"] = None
        return msgspec.convert(found, schema.DeliveryTimeline)

    @operation("POST", "/deliveries/{number}/resend", 202)
    async def resend_delivery(
        self, number: schema.Number, query: schema.DeliveryPlace, caller: Caller
    ) -> schema.Queued:
        """Send the event of one delivery to its endpoint again, with the same webhook-id."""
        event_id = query.event
        if event_id is None:
            async with self._reading.session() as connection:
                event_id = await timeline.find_delivery(connection, number)
        if event_id is None:
            raise Refused(404, "not_found", f"there is no delivery {number}")
        return schema.Queued(queued=await self._actions.resend(caller, event_id, number))

    @operation("GET", "/attempts")
    async def list_attempts(self, query: schema.AttemptQuery) -> schema.AttemptList:
        """Attempts, newest first."""
        async with self._reading.session() as connection:
            page = await search.attempts(connection, _filter(query), query.cursor, query.limit)
        return schema.AttemptList(data=[schema.Attempt(**r) for r in page.rows], **_around(page))

    @operation("GET", "/dead-letters")
    async def list_dead_letters(self, query: schema.DeadLetterQuery) -> schema.DeadLetterList:
        """Deliveries that were given up, those that died last first."""
        async with self._reading.session() as connection:
            page = await search.dead_letters(connection, _filter(query), query.cursor, query.limit)
        return schema.DeadLetterList(data=[schema.DeadLetter(**r) for r in page.rows], **_around(page))

    @operation("POST", "/replay", 202, 200)
    async def replay(self, body: schema.Replay, caller: Caller) -> Reply[schema.ReplayAnswer]:
        """
        Queue settled deliveries again: 202.  With `dry_run` they are only counted: 200.

        Each is a new delivery with the same webhook-id, whose attempts count from 1.  Fresh events go before replayed ones.
        """
        selection = Selection(
            body.event,
            body.endpoint,
            body.tenant,
            tuple(body.states),
            body.since,
            body.until,
            tuple(body.types),
            body.missing,
        )
        done = await self._actions.replay(caller, selection, rate=body.rate, dry_run=body.dry_run)
        return Reply(
            schema.ReplayAnswer(
                matching=done.matching, queued=done.queued, of_disabled_endpoints=done.of_disabled_endpoints
            ),
            200 if body.dry_run else 202,
        )

    # How it goes.

    @operation("GET", "/status")
    async def status(self, query: schema.StatusQuery) -> schema.StatusAnswer:
        """How the daemons, the queue and the lanes are doing."""
        async with self._reading.session() as connection:
            now = await status(connection, query.lanes)
        return schema.StatusAnswer(**now.facts())

    @operation("GET", "/rates")
    async def rates(self, query: schema.RatesQuery) -> schema.Rates:
        """Rates, success, latency and lag over time, as the daemons counted them."""
        async with self._reading.session() as connection:
            found = await overview.rates(
                connection, seconds=query.seconds, intervals=query.intervals, until=query.until
            )
        return msgspec.convert(found, schema.Rates, from_attributes=True)

    @operation("GET", "/failures")
    async def failures(self, query: schema.FailuresQuery) -> schema.FailuresAnswer:
        """Failures by cause; of the last hour, where nothing else is asked for."""
        since = query.since or (query.until or datetime.datetime.now(datetime.UTC)) - RECENTLY
        async with self._reading.session() as connection:
            found = await overview.failures(
                connection, since=since, until=query.until, endpoint=query.endpoint, tenant=query.tenant
            )
        return schema.FailuresAnswer(
            data=[schema.Cause(**c) for c in found.causes], looked_back_to=found.looked_back_to
        )

    @operation("GET", "/audit")
    async def audit(self, query: schema.AuditQuery) -> schema.AuditList:
        """Who did what, newest first."""
        sought = audit.Sought(
            query.endpoint,
            query.event,
            query.tenant,
            query.action,
            query.who,
            query.via,
            query.since,
            query.until,
        )
        async with self._reading.session() as connection:
            page = await audit.entries(connection, sought, query.cursor, query.limit)
        return schema.AuditList(data=[schema.AuditEntry(**r) for r in page.rows], **_around(page))

    async def _found(self, endpoint_id: UUID) -> EndpointRecord:
        async with self._reading.session() as connection:
            try:
                return await registry.show(connection, endpoint_id)
            except NotPossible:
                raise Refused(404, "not_found", f"there is no endpoint {endpoint_id}") from None


def _filter(query: Any) -> search.Filter:
    """What a query asks for, as a search takes it."""
    asked = {
        name: getattr(query, name)
        for name in query.__struct_fields__
        if name not in ("cursor", "limit", "state", "verdict", "status")
    }
    states = getattr(query, "state", None) or getattr(query, "verdict", None) or ()
    code = getattr(query, "status", None)
    return search.Filter(
        **asked, states=tuple(states), status=int(code.removesuffix("xx")) if code is not None else None
    )


def _around(page: Page) -> dict[str, Any]:
    return {"next": page.older, "previous": page.newer, "looked_back_to": page.looked_back_to}


def _facts(record: EndpointRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__ if name not in HIDDEN}


def _endpoint(record: EndpointRecord) -> schema.Endpoint:
    return schema.Endpoint(**_facts(record))


def _checked(checked: Checked) -> schema.CheckedEndpoint:
    return schema.CheckedEndpoint(**_facts(checked.record), verification=_verification(checked.verification))


def _verification(said: Any) -> schema.Verification | msgspec.UnsetType:
    if said is None:
        return msgspec.UNSET
    return schema.Verification(verified=said.verified, reason=said.reason or None)


def _or_unset(secret: str | None) -> str | msgspec.UnsetType:
    return msgspec.UNSET if secret is None else secret
