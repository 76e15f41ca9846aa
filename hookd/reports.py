"""
What a running daemon says of itself in the log: each trouble when it begins, now and then while it lasts, and when it is over.

The same states are what ``/readyz``, ``hookd status`` and the metrics show of it.  Ids, hosts and reasons are said; URLs,
payloads, headers and secrets never are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from hookd.core.model import VerdictKind
from hookd.logs import Outage, Throttle
from hookd.systemd import notify

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from hookd.clock import Clock
    from hookd.core.database import DatabaseHealth
    from hookd.core.model import Delivery, Endpoint, Result

log = structlog.get_logger("hookd")

STALLED_S = 2.0
"""From when nothing starting is worth a line, and the daemon is not ready."""

CLOCK_STEP_S = 1.0
"""From when a step of the wall clock is worth a line; one that is slewed moves less between two looks."""

SAY_AGAIN_S = 60.0
"""How often a fault that goes on is logged."""

HELD_BACK_S = 900.0
"""A snapshot that has kept vacuum from its work for so long is logged."""

REFUSED_S = 3600.0
"""How often the same refusal of the same upkeep is logged: it lasts until somebody acts, and holds up no delivery."""

FAULT_S = 5.0
"""For so long after it was met a fault of ours is shown: what it holds is tried again every second or two."""


class Reports:
    """What one daemon has said, and what it still has to say."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._throttle = Throttle(clock.mono)
        self._outage = Outage(clock.mono)
        self._stall = ""
        self._stalled_mono = 0.0
        self._stall_said = False
        self._wall_offset = clock.wall() - clock.mono()
        self._deaf = False
        self._faults: dict[str, float] = {}
        """Those of ours, and when they were met last."""
        self._said_mono: dict[str, float] = {}
        """When a fault of ours was last spoken of; the faults are few."""
        self._unreadable_said: set[str] = set()

    # The database.

    def lost(self, problem: str, fault: BaseException | None, *, refused: bool, unwritten: int) -> None:
        """A session ended, or could not begin.  ``fault``: an error of ours that ended it; ``refused``: until somebody acts."""
        self._stall = ""
        self._stall_said = False
        again = self._outage.began(problem, refused=refused)
        if again is None:
            return
        notify(f"STATUS=database lost: {problem}")
        about: dict[str, Any] = {"problem": problem, "unwritten": unwritten}
        if fault is not None:
            log.error("internal error; the session starts over", exc_info=fault, **about)
        elif refused:
            log.error("database cannot be used like this; trying again until it can", **about)
        elif again:
            log.error("database is still away", **self._outage.lasts(), **about)
        else:
            log.error("database lost; trying again until it is back", **about)

    @property
    def away(self) -> bool:
        """Whether the database was lost and no session has lasted since."""
        return bool(self._outage.problem)

    def back(self, shards: int) -> None:
        """A session lasts."""
        log.info("database is back", shards=shards, **self._outage.over())

    def notifications(self, *, arrive: bool) -> bool:
        """Whether a notification to oneself arrived; returns whether that is news."""
        news = arrive is self._deaf
        self._deaf = not arrive
        if news and arrive:
            log.info("notifications arrive again")
        elif news:
            log.warning("notifications do not arrive: the queue is read once a second, and a new session is tried")  # fmt: skip
        return news

    def stalled(self, why: str) -> None:
        """Why nothing starts, as of now; empty if it does."""
        now = self._clock.mono()
        if why and not self._stall:
            self._stalled_mono = now
        lasted_s = now - self._stalled_mono
        self._stall = why
        if why and lasted_s >= STALLED_S and not self._stall_said:
            self._stall_said = True
            log.warning("nothing starts until it is over", problem=why)
        elif not why and self._stall_said:
            self._stall_said = False
            log.info("deliveries go on", after_s=round(lasted_s, 1))

    @property
    def stall(self) -> str:
        """Why nothing has started for some seconds; empty if it has."""
        lasts_s = self._clock.mono() - self._stalled_mono
        return self._stall if self._stall and lasts_s >= STALLED_S else ""

    def health(self, found: DatabaseHealth | str) -> None:
        """What holds PostgreSQL's vacuum back, or why nobody can tell."""
        if isinstance(found, str):
            if self._due_to_say(found, REFUSED_S):
                log.warning("the health of PostgreSQL cannot be seen", problem=found)
            return
        for holder in found.holders:
            if (
                holder.seconds is not None
                and holder.seconds > HELD_BACK_S
                and self._due_to_say(holder.kind, HELD_BACK_S)
            ):
                log.warning(
                    "vacuum is held back",
                    holder=holder.kind,
                    who=holder.who,
                    seconds=round(holder.seconds),
                    transactions=holder.transactions,
                )

    def upkeep_refused(self, work: str, problem: str) -> None:
        """PostgreSQL did not do what can wait; ``work`` says what."""
        if self._due_to_say(f"{work}: {problem}", REFUSED_S):
            log.warning("upkeep was refused; it is tried again", work=work, problem=problem)

    # This machine and its configuration.

    def clock_looked_at(self) -> None:
        """Nothing here depends on the wall clock but what others read: the times of signatures and attempts."""
        offset = self._clock.wall() - self._clock.mono()
        moved = offset - self._wall_offset
        self._wall_offset = offset
        if abs(moved) > CLOCK_STEP_S:
            log.warning("the clock of this machine was set", by_s=round(moved, 1))

    def held(self, problem: str) -> None:
        """A fault of ours keeps a delivery from being sent: no receiver is to blame."""
        self._faults[problem] = self._clock.mono()
        if self._due_to_say(problem, SAY_AGAIN_S):
            log.warning("deliveries are held, and use up no attempt", problem=problem)

    def faults(self) -> list[str]:
        """Why deliveries are held that no receiver is to blame for, as of the last seconds."""
        since = self._clock.mono() - FAULT_S
        return [problem for problem, at in self._faults.items() if at > since]

    def unreadable(self, endpoints: Mapping[UUID, str]) -> None:
        """Endpoints whose secrets cannot be read, and why: one line a reason, with one key gone it is the same for all."""
        for reason in {*endpoints.values()} - self._unreadable_said:
            self._unreadable_said.add(reason)
            concerned = [str(i) for i, why in endpoints.items() if why == reason]
            log.error(
                "secrets of endpoints cannot be read: their deliveries wait",
                reason=reason,
                endpoints=len(concerned),
                endpoint_ids=concerned[:10],
            )

    def keys_changed(self, ids: list[str]) -> None:
        """Other master keys: what they cannot read is news again."""
        self._unreadable_said.clear()
        log.info("master keys changed", keys=ids)

    # Deliveries.

    def attempt(self, result: Result, endpoint: Endpoint | None) -> None:
        """What came of a delivery; ``endpoint`` as it is served, None if it is not any more."""
        kind, verdict = result.verdict.kind, result.verdict
        about: dict[str, Any] = {
            "delivery_id": result.delivery.id,
            "event_id": str(result.delivery.event.id),
            "endpoint_id": str(endpoint.id) if endpoint is not None else None,
            "host": endpoint.host if endpoint is not None else None,
            "attempt": result.delivery.attempt + (result.outcome is not None),
        }
        if result.health is not None and result.health.parked_at is not None:
            log.warning(
                "endpoint parked: one probe now and then until it answers", reason=verdict.reason, **about
            )
        elif result.health is not None and kind is VerdictKind.DELIVERED:
            log.info("endpoint recovered", **about)
        if kind is VerdictKind.DELIVERED:
            log.debug("delivered", **about)
        elif result.delivery.replaced_by is not None:
            log.debug("replaced", reason=verdict.reason, **about)
        elif verdict.disable is not None:
            log.warning("endpoint disabled", reason=verdict.disable, **about)
        elif self._throttle.allows():
            if kind is VerdictKind.RETRY:
                about["retry_in_s"] = round(verdict.delay_s, 1)
            log.info("attempt failed", verdict=kind.value, reason=verdict.reason, **about)

    def not_listed(self) -> None:
        """How many lines on failed attempts were held back since the last time, if any were."""
        held_back = self._throttle.taken()
        if held_back:
            log.info("more failed attempts, not listed", count=held_back)

    def verified(self, endpoint: Endpoint) -> None:
        """An endpoint that had failed for long answered the question whether it wants to be called."""
        log.info("endpoint answered its challenge after failing for long", endpoint_id=str(endpoint.id), host=endpoint.host)  # fmt: skip

    def faulty(self, delivery: Delivery, error: Exception) -> None:
        """An error of ours in an exchange."""
        log.error("internal error in an exchange; it is tried again", delivery_id=delivery.id, exc_info=error)

    def unstorable(self, problem: str, result: Result) -> None:
        """A result that PostgreSQL does not take."""
        log.error(
            "not stored",
            problem=problem,
            delivery_id=result.delivery.id,
            event_id=str(result.delivery.event.id),
        )

    def partitioned(self, what: str, name: str) -> None:
        """A partition was made or dropped."""
        log.info("partition", did=what, name=name)

    def _due_to_say(self, what: str, again_s: float) -> bool:
        """Whether a fault that goes on is to be logged now."""
        now = self._clock.mono()
        if now - self._said_mono.get(what, -again_s) < again_s:
            return False
        self._said_mono[what] = now
        return True
