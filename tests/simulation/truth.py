"""
What has to be true, looked at with everything that happens.

The witnesses are the receivers' logs, the rows of the database and its locks; what a daemon believes counts for nothing.
The first thing that is wrong ends the world.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hookd.core.model import OutcomeKind
from hookd.core.verdict import RETRY_AFTER_MOST_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookd.core.model import HostLimits

    from .database import Attempt, Database, Delivery, Session, Transaction
    from .network import Flight, Receipt
    from .timeline import Timeline

TRUST_S = 2.0
"""``owner.TRUST_S``, written down a second time on purpose."""

NOT_YET_S = 0.002
"""So much earlier than its time a delivery may start: due times are rounded to a millisecond (``feed.ROUNDING``)."""

ROUNDING_S = 1e-6


@dataclass(slots=True, eq=False)
class Owed:
    """A delivery that was committed, or is about to be."""

    row: Delivery
    inserted_at: float
    xid: int
    committed_at: float | None = None
    settled_at: float | None = None
    verdict: str = ""
    flights: list[Flight] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """What happened in a world, for its report."""

    events: int = 0
    deliveries: int = 0
    exchanges: int = 0
    acknowledged: int = 0
    duplicates: int = 0
    settles: int = 0
    crashes: int = 0
    sessions_lost: int = 0
    handovers: int = 0


class Truth:
    """Is told everything, and says what is wrong."""

    def __init__(self, database: Database, timeline: Timeline, trace: Callable[[str], None]) -> None:
        self._db = database
        self._timeline = timeline
        self._trace = trace
        self.violations: list[str] = []
        self.deaf = False
        self.owed: dict[int, Owed] = {}
        self.tally = Tally()
        self.clock_went_back = False
        """The server's: what it called due may not be any more."""
        self.schedule_most_s = 0.0
        self.attempts_most = 0
        self._open: dict[str, list[Flight]] = defaultdict(list)
        """By host."""
        self._next_write: dict[tuple[Any, ...], float] = {}
        database.on_insert = self._inserted
        database.on_commit = self._committed
        database.on_settle = self._settled

    def wrong(self, what: str) -> None:
        """Something is not as it has to be."""
        if self.deaf:
            return
        self.violations.append(f"at {self._timeline.now:.6f}: {what}")
        self._trace(f"!!! {what}")

    # The database.

    def _inserted(self, row: Delivery) -> None:
        self.owed[row.id] = Owed(row, self._timeline.now, row.xid)

    def _committed(self, tx: Transaction) -> None:
        for row in tx.inserted:
            self.owed[row.id].committed_at = self._timeline.now
            self.tally.deliveries += 1

    def _settled(self, session: Session, tx: Transaction) -> None:
        """I3, and who may settle."""
        now = self._timeline.now
        self.tally.settles += 1
        logged = {a.delivery_id: a for a in tx.attempts}
        if len(logged) != len(tx.attempts) or logged.keys() != {row.id for row, _ in tx.settled}:
            self.wrong(f"a settle of session {session.pid} logged attempts of {sorted(logged)} for rows {sorted(r.id for r, _ in tx.settled)}")  # fmt: skip
        for row, final in tx.settled:
            holder = self._db.locks.get(row.shard)
            if holder is not session:
                by = f"session {holder.pid}" if holder else "nobody"
                self.wrong(f"session {session.pid} settled delivery {row.id} of shard {row.shard}, which is owned by {by}")  # fmt: skip
            attempt = logged.get(row.id)
            owed = self.owed[row.id]
            if owed.settled_at is not None:
                self.wrong(f"delivery {row.id} was settled twice")
            if attempt is None:
                continue
            self._trace(
                f"settled {row.id} {attempt.verdict} ({attempt.reason or ''}) by session {session.pid}"
            )
            problem = self._unfounded(owed, attempt, final=final)
            if problem:
                self.wrong(
                    f"delivery {row.id} was settled as {attempt.verdict} ({attempt.reason}): {problem}"
                )
            if final:
                owed.settled_at, owed.verdict = now, attempt.verdict

    def _unfounded(self, owed: Owed, attempt: Attempt, *, final: bool) -> str:
        """Why a verdict is not what the witnesses say; empty if it is."""
        row = owed.row
        flights = [f for f in owed.flights if f.attempt == attempt.attempt - 1]
        event = self._db.events[row.event_id]
        endpoint = self._db.endpoints.get(row.endpoint)
        match attempt.verdict:
            case "delivered":
                if not any(
                    200 <= r.status < 300 and r.webhook_id == str(row.event_id)
                    for f in flights
                    for r in f.receipts
                ):
                    return f"its receiver has not acknowledged attempt {attempt.attempt}"
            case "retry":
                if final or not any(f.outcome and f.outcome.kind is not OutcomeKind.OURS for f in flights):
                    return "no such attempt was made, or its fault was ours"
            case "exhausted":
                if row.id not in self._db.dead:
                    return "there is no dead letter"
                tried_all = attempt.attempt >= self.attempts_most
                if not (
                    tried_all
                    or attempt.status == 410
                    or (attempt.reason or "").startswith("endpoint disabled")
                ):
                    return f"it was attempt {attempt.attempt} of {self.attempts_most}"
            case "expired":
                if event.expires_at is None:
                    return "it does not expire"
                walls = [self._db.clock(), *(f.process.wall() for f in owed.flights)]
                longest = max(self.schedule_most_s, RETRY_AFTER_MOST_S if attempt.attempt else 0.0)
                if event.expires_at.timestamp() > max(walls) + longest + self.wall_slack_s:
                    return "it has not expired"
            case "cancelled":
                removed = endpoint is None or endpoint.state == "removed"
                if not removed and not self._replaced(owed):
                    return "neither was its endpoint removed nor did a newer event take its place"
            case _:
                return "there is no such verdict"
        return ""

    wall_slack_s = 0.0
    """How much the daemons' wall clocks are ahead, at most."""

    def _replaced(self, owed: Owed) -> bool:
        row = owed.row
        return row.coalesce_key is not None and any(
            o.committed_at is not None and o.row.id > row.id and o.row.endpoint == row.endpoint and o.row.coalesce_key == row.coalesce_key
            for o in self.owed.values()
        )  # fmt: skip

    # Exchanges.

    def begun(self, flight: Flight, delivery: Any) -> None:
        """I1's other half and I2, I4, I5, I11: what may begin."""
        now = self._timeline.now
        self.tally.exchanges += 1
        owed = self.owed.get(flight.delivery_id)
        name = flight.process.name
        self._trace(f"{name} begins {flight.delivery_id} attempt {flight.attempt + 1} to {flight.host}")
        if owed is None or owed.committed_at is None:
            self.wrong(f"{name} sends delivery {flight.delivery_id}, which was never committed")
            return
        self._may_own(flight, now)
        self._may_send_again(flight, owed)
        self._in_time(flight, owed)
        self._in_order(flight, owed)
        owed.flights.append(flight)
        hosts = self._open[flight.host]
        hosts.append(flight)
        self._not_too_many(flight, hosts)

    def _may_own(self, flight: Flight, now: float) -> None:
        session, shard, name = flight.session, flight.shard, flight.process.name
        if session is None:
            self.wrong(f"{name} sends delivery {flight.delivery_id} without a session")
        elif session.alive:
            # an endpoint that has moved has rows in its former shard: who owns both may send them
            for needed in {shard, self._db.shard_of(flight.host)}:
                if self._db.locks.get(needed) is not session:
                    self.wrong(f"{name} sends delivery {flight.delivery_id} of shard {shard} to {flight.host}, but has not locked shard {needed}")  # fmt: skip
        else:
            assert session.ended_at is not None
            longest = 0.0 if session.silently else TRUST_S
            if now > session.ended_at + longest + ROUNDING_S:
                self.wrong(f"{name} sends delivery {flight.delivery_id} {now - session.ended_at:.3f} s after the server ended its session")  # fmt: skip

    def _may_send_again(self, flight: Flight, owed: Owed) -> None:
        """A duplicate has to come from a lost session or process, or from an answer that was lost."""
        name, number = flight.process.name, flight.delivery_id
        mine_is_over = flight.session is None or not flight.session.alive
        if owed.settled_at is not None and not mine_is_over:
            self.wrong(f"{name} sends delivery {number}, which was settled as {owed.verdict}")
        for before in owed.flights:
            over = (
                before.process.dead or before.session is None or not before.session.alive or before.given_up
            )
            if before.ended_at is None and not before.process.dead and before.process is flight.process:
                self.wrong(f"{name} sends delivery {number}, which it is sending already")
            elif before.ended_at is None and not over and not mine_is_over:
                self.wrong(f"{name} sends delivery {number}, which {before.process.name} is sending already")
            acknowledged = any(200 <= r.status < 300 for r in before.receipts)
            if acknowledged:
                self.tally.duplicates += 1
            outcome = before.outcome
            if outcome is not None and 200 <= outcome.status < 300 and not over and not mine_is_over:
                self.wrong(
                    f"{name} sends delivery {number} again, which {before.process.name} knows to be delivered"
                )

    def _in_time(self, flight: Flight, owed: Owed) -> None:
        row, name = owed.row, flight.process.name
        if flight.session is None or not flight.session.alive:
            return
        if flight.attempt != row.attempt:
            self.wrong(
                f"{name} makes attempt {flight.attempt + 1} of delivery {row.id}, which has had {row.attempt}"
            )
        early_s = row.due_at.timestamp() - self._db.clock() if row.due_at is not None else 0.0
        if early_s > NOT_YET_S and not self.clock_went_back:
            self.wrong(f"{name} sends delivery {row.id} {early_s:.3f} s before it is due")
        expires_at = self._db.events[row.event_id].expires_at
        if expires_at is not None and expires_at.timestamp() <= flight.process.wall() - ROUNDING_S:
            self.wrong(f"{name} sends delivery {row.id}, which has expired")

    def _in_order(self, flight: Flight, owed: Owed) -> None:
        row = owed.row
        if row.order_key is None:
            return
        for older in self._db.deliveries.values():
            if older.id >= row.id or older.endpoint != row.endpoint or older.order_key != row.order_key:
                continue
            first = self.owed[older.id]
            assert first.committed_at is not None
            if first.xid == owed.xid or first.committed_at <= owed.inserted_at:
                self.wrong(
                    f"{flight.process.name} sends delivery {row.id} before {older.id} of the same order key"
                )

    def _not_too_many(self, flight: Flight, hosts: list[Flight]) -> None:
        process: Any = flight.process
        limits: HostLimits = process.limits(flight.host)
        mine = [f for f in hosts if f.process is process]
        if limits.concurrency and len(mine) > limits.concurrency:
            self.wrong(
                f"{process.name} has {len(mine)} exchanges with {flight.host}, {limits.concurrency} are allowed"
            )
        others = [f for f in hosts if f.process is not process and f.session is not None and f.session.alive]
        if others and flight.session is not None and flight.session.alive:
            self.wrong(
                f"{process.name} begins an exchange with {flight.host} while {others[0].process.name} has one"
            )
        most = process.endpoint_concurrency(flight.endpoint)
        if most is not None:
            count = sum(f.endpoint == flight.endpoint for f in mine)
            if count > most:
                self.wrong(
                    f"{process.name} has {count} exchanges for endpoint {flight.endpoint}, {most} are allowed"
                )
        if (
            len([f for flights in self._open.values() for f in flights if f.process is process])
            > process.max_in_flight
        ):
            self.wrong(f"{process.name} has more than {process.max_in_flight} exchanges in flight")

    def written(self, flight: Flight) -> None:
        """I5: the rate, by what is written."""
        process: Any = flight.process
        limits = process.limits(flight.host)
        if limits.rate and flight.limits == process.reloads:
            # a bucket for each configuration: what was sent before a reload may be in it or not, and an exchange that began
            # while its host had no rate does not wait for a turn
            key = (process.name, flight.host, process.reloads)
            self._paced(flight, key, limits.rate, limits.burst)

    def _paced(self, flight: Flight, key: tuple[Any, ...], rate: float, burst: int) -> None:
        now, interval = self._timeline.now, 1 / rate
        full_at = max(self._next_write.get(key, 0.0), now)
        if full_at - (max(1, burst) - 1) * interval > now + ROUNDING_S:
            self.wrong(
                f"{flight.process.name} writes to {flight.host} faster than {rate:g} a second, burst {burst}"
            )
        self._next_write[key] = full_at + interval

    def received(self, receipt: Receipt) -> None:
        """I2."""
        owed = self.owed[receipt.flight.delivery_id]
        if str(owed.row.event_id) != receipt.webhook_id:
            self.wrong(
                f"{receipt.path} was sent event {receipt.webhook_id}, which is not that of delivery {owed.row.id}"
            )

    def replied(self, receipt: Receipt) -> None:
        """A receiver has answered, whoever hears it."""
        flight = receipt.flight
        self.tally.acknowledged += 200 <= receipt.status < 300
        self._trace(
            f"{flight.host} answers {receipt.status} to {flight.delivery_id} attempt {receipt.attempt}"
        )

    def ended(self, flight: Flight) -> None:
        """An exchange is over for its sender."""
        outcome = flight.outcome
        assert outcome is not None
        self._trace(
            f"{flight.process.name} ends {flight.delivery_id}: {outcome.kind.value} {outcome.status or ''}"
        )
        self._open[flight.host].remove(flight)

    def abandoned(self, flight: Flight) -> None:
        """Its sender lets go of it."""
        if flight in self._open[flight.host]:
            self._open[flight.host].remove(flight)

    def let_go(self, process: Any) -> None:
        """A process is no more, or has given up its exchanges."""
        for flights in self._open.values():
            for flight in [f for f in flights if f.process is process]:
                flight.given_up = True
                flights.remove(flight)

    # The end.

    def pending(self) -> list[Owed]:
        """What is owed and not settled."""
        return [o for o in self.owed.values() if o.committed_at is not None and o.settled_at is None]
