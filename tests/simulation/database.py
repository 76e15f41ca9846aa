"""
PostgreSQL as far as hookd can tell: the statements of its sessions, on tables in memory.

What matters is modelled: transactions that write late and commit in another order, snapshots (``xmin:xmax:xip``, with
``xmax`` one above the latest transaction that has ended), row locks that others wait for, advisory locks that end with their session,
sequences that are no part of any transaction, NOTIFY at commit to who listens then, and a server that stops, or comes back with
transaction ids handed out a second time.  A statement is run in one moment; what it sees is what is committed then.

The statements are recognised by the constants of ``hookd.postgres``; ``test_conformance`` runs the same scripts here and on
the real server.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import asyncpg

from hookd.postgres import connect, health, maintenance, owner, queue, registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from uuid import UUID

SLEEPS, WAKES = 2, 1
"""Of a sleeper."""

PID_FIRST = 100

LISTEN = "listen hookd"

QUIET = {"visible": True, "notify_usage": 0.0, "longest_who": None, "longest_s": 0.0}
"""What ``health.SESSIONS`` finds here: nobody else."""
"""asyncpg's own statement."""


ENDS = {
    "-infinity": datetime.datetime.min.replace(tzinfo=datetime.UTC),
    "infinity": datetime.datetime.max.replace(tzinfo=datetime.UTC),
}


class Blocked(Exception):
    """A statement has to wait for a transaction that holds a row."""

    def __init__(self, holder: Transaction) -> None:
        super().__init__()
        self.holder = holder


@dataclass(slots=True, eq=False)
class Delivery:
    """A row of hookd.delivery."""

    id: int
    event_id: UUID
    xid: int
    due_at: datetime.datetime | None
    endpoint: int
    shard: int
    attempt: int = 0
    replay: bool = False
    order_key: str | None = None
    coalesce_key: str | None = None
    lock: Transaction | None = None
    moved: bool = False
    """Its shard was changed."""


@dataclass(slots=True, eq=False)
class Event:
    """A row of hookd.event."""

    id: UUID
    key: int
    created_at: datetime.datetime
    type: str
    tenant: str
    payload: str
    deliver_at: datetime.datetime | None = None
    expires_at: datetime.datetime | None = None
    order_key: str | None = None
    coalesce_key: str | None = None


@dataclass(slots=True, eq=False)
class Endpoint:
    """A row of hookd.endpoint.  A version of it is never changed, a new one takes its place."""

    key: int
    id: UUID
    tenant: str
    url: str
    host: str
    shard: int
    xid: int
    types: tuple[str, ...] = ("*",)
    state: str = "active"
    state_reason: str | None = None
    ordered: bool = False
    rate: float | None = None
    concurrency: int | None = None
    failing_since: datetime.datetime | None = None
    failing_reason: str | None = None
    parked_at: datetime.datetime | None = None
    former_shards: tuple[int, ...] = ()
    secret: str = ""


@dataclass(slots=True, eq=False)
class Transaction:
    """One that is open.  What it has done is carried out at its commit; what it has locked waits until its end."""

    session: Session | None
    xid: int = 0
    changes: list[Callable[[], object]] = field(default_factory=list)
    locked: list[Any] = field(default_factory=list)
    waiters: list[Callable[[], object]] = field(default_factory=list)
    notifications: dict[str, None] = field(default_factory=dict)
    failed: bool = False
    settled: list[tuple[Delivery, bool]] = field(default_factory=list)
    """Rows that it deletes (True) or reschedules."""
    attempts: list[Attempt] = field(default_factory=list)
    inserted: list[Delivery] = field(default_factory=list)
    sees: dict[int, Endpoint] | None = None
    """The endpoints as of its first statement (REPEATABLE READ)."""
    disabled: set[int] = field(default_factory=set)
    """Endpoints that it has disabled itself, which it sees and others do not yet."""


@dataclass(slots=True, eq=False)
class Attempt:
    """A row of hookd.attempt, as far as it is looked at."""

    at: float
    delivery_id: int
    event_id: UUID
    endpoint: int
    attempt: int
    status: int | None
    verdict: str
    outcome: str | None
    reason: str | None
    retry_at: float | None


@dataclass(slots=True, eq=False)
class DeadLetter:
    """A row of hookd.dead_letter."""

    delivery_id: int
    event: Event
    endpoint: int
    attempts: int
    reason: str
    replayed: bool = False


@dataclass(slots=True, eq=False)
class Session:
    """A backend."""

    pid: int
    purpose: str
    alive: bool = True
    ended_at: float | None = None
    silently: bool = False
    """The server ended it because its client was not heard of."""
    tx: Transaction | None = None
    listening: bool = False
    lost: Callable[[Exception], None] = lambda _: None
    """Tells the client that it is over."""
    notify: Callable[[str], None] = lambda _: None


def matched(types: Sequence[str], type_: str) -> bool:
    """Whether an event type is matched by one of these patterns."""
    return any(p in ("*", type_) or (p.endswith(".*") and type_.startswith(p[:-1])) for p in types)


class Database:
    """The server and the one database on it."""

    def __init__(self, shards: int, clock: Callable[[], float], new_uuid: Callable[[], UUID]) -> None:
        """``clock`` is the server's wall time."""
        self.shards = shards
        self.clock = clock
        self.new_uuid = new_uuid
        self.deliveries: dict[int, Delivery] = {}
        self.events: dict[UUID, Event] = {}
        self.endpoints: dict[int, Endpoint] = {}
        self.endpoint_locks: dict[int, Transaction] = {}
        self.attempts: list[Attempt] = []
        self.dead: dict[int, DeadLetter] = {}
        self.sleepers = dict.fromkeys(range(shards), 0)
        self._newest_xid = 0
        """Of any row of hookd.delivery, or above."""
        self.next_xid = 800
        self.latest_ended = 799
        self.open: dict[int, Transaction] = {}
        """By xid: those that have one and have not ended."""
        self.delivery_ids = 0
        self.event_keys = 0
        self.endpoint_keys = 0
        self.locks: dict[int, Session] = {}
        """Who holds each shard's lock."""
        self.lock_counts: Counter[int] = Counter()
        self.members: dict[int, Session] = {}
        self.sessions: dict[int, Session] = {}
        self.pids = PID_FIRST
        self.up = True
        self.on_insert: Callable[[Delivery], None] = lambda _: None
        self.on_commit: Callable[[Transaction], None] = lambda _: None
        self.on_settle: Callable[[Session, Transaction], None] = lambda _s, _t: None
        self.on_locks: Callable[[Session], None] = lambda _: None
        self._statements: dict[str, Callable[[Session, Sequence[Any]], list[Any]]] = {
            connect.KEEPALIVE: lambda *_: [],
            connect.CHECK_CLIENT: lambda *_: [],
            connect.PIN_PLANS: lambda *_: [],
            "select 1": lambda *_: [(1,)],
            owner.BACKEND: lambda s, _: [(s.pid,)],
            owner.JOIN: self._join,
            owner.RESIGN: self._resign,
            owner.SHARDS: lambda *_: [{"id": n} for n in range(self.shards)],
            owner.LOOK: self._look,
            owner.LOCK_SHARDS: self._lock_shards,
            owner.UNLOCK_SHARDS: self._unlock_shards,
            owner.SETTLE_FINAL: self._settle_final,
            owner.SETTLE_RETRY: self._settle_retry,
            owner.MOVED: lambda _s, a: [
                (i, self.deliveries[i].shard)
                for i, shard in zip(a[1], a[2], strict=True)
                if i in self.deliveries and self.deliveries[i].shard != shard
            ],
            owner.BURY: self._bury,
            owner.REPORT_EXHAUSTED: self._report_exhausted,
            owner.NOTE_HEALTH: self._note_health,
            owner.DISABLE: self._disable,
            owner.REPORT_DISABLED: self._report_disabled,
            owner.FORWARD: self._forward,
            LISTEN: self._listen,
            queue.ARRIVALS: self._arrivals,
            queue.ARRIVAL_PLACES: self._arrival_places,
            queue.REFILL_FRESH: self._refill_fresh,
            queue.REFILL_DUE: self._refill_due,
            queue.HEADS: self._heads,
            queue.LATEST: self._latest,
            queue.OLDER: self._older,
            queue.RECOVER: self._recover,
            queue.RESET_FOREIGN_XIDS: self._reset_foreign_xids,
            queue.RESET_FOREIGN_ENDPOINTS: self._reset_foreign_endpoints,
            queue.SNAPSHOT: lambda *_: [{"snapshot": self.snapshot(), "now": self.now()}],
            queue.ENDPOINTS_OF_SHARDS: lambda _s, a: self._endpoints(
                e for e in self.endpoints.values() if e.shard in a[0]
            ),
            queue.ENDPOINTS_BY_KEY: lambda _s, a: self._endpoints(
                self.endpoints[k] for k in a[0] if k in self.endpoints
            ),
            queue.ENDPOINT_CHANGES: self._endpoint_changes,
            queue.EVENTS: self._read_events,
            queue.BURIED_EVENTS: self._buried_events,
            queue.FLAG_SLEEP: self._flag_sleep,
            maintenance.IMPATIENT: lambda *_: [],
            maintenance.ECHO: self._echo,
            registry.VERIFIED: lambda *_: [],
            maintenance.SET: lambda *_: [],
            maintenance.PUBLISH: lambda *_: [],
            maintenance.WITHDRAW: lambda *_: [],
            maintenance.THIN_KEY: lambda *_: [(b"k" * 32,)],
            maintenance.DEPTH: lambda *_: [{"fresh": 0, "scheduled": 0, "dead_letter": 0, "oldest_s": 0}],
            maintenance.ADD_PARTITION: lambda *_: [(None,)],
            maintenance.DROP_PARTITION: lambda *_: [(None,)],
            maintenance.NOTE_TALLY: lambda *_: [],
            maintenance.NOTE_HOURS: lambda *_: [],
            maintenance.PURGE_TALLY: lambda *_: [],
            maintenance.PURGE_HOURS: lambda *_: [],
            maintenance.PURGE_AUDIT: lambda *_: [],
            maintenance.PURGE_DEAD_LETTERS: lambda *_: [],
            maintenance.PURGE_IDEMPOTENCY: lambda *_: [],
            maintenance.PURGE_ENDPOINTS: lambda *_: [],
            maintenance.PURGE_NODES: lambda *_: [],
            health.HOLDING: lambda *_: [],
            health.SESSIONS: lambda *_: [QUIET],
            health.TABLE: lambda *_: [{"live": 0, "dead": 0, "bytes": 8192, "vacuumed_s": None}],
            health.DAYS: lambda *_: [],
        }

    # Time and transactions.

    def now(self) -> datetime.datetime:
        """clock_timestamp()"""
        return datetime.datetime.fromtimestamp(self.clock(), datetime.UTC)

    def snapshot(self) -> str:
        """pg_current_snapshot()"""
        xmax = self.latest_ended + 1
        if not self.open:
            return f"{xmax}:{xmax}:"
        running = sorted(x for x in self.open if x < xmax)
        return f"{running[0] if running else xmax}:{xmax}:{','.join(map(str, running))}"

    def begin(self, session: Session | None = None) -> Transaction:
        """BEGIN"""
        tx = Transaction(session)
        if session is not None:
            session.tx = tx
        return tx

    def xid(self, tx: Transaction) -> int:
        """pg_current_xact_id()"""
        if not tx.xid:
            tx.xid = self.next_xid
            self.next_xid += 1
            self.open[tx.xid] = tx
        return tx.xid

    def commit(self, tx: Transaction) -> None:
        """COMMIT: everything of it is there at once, then whoever waited for it goes on."""
        for change in tx.changes:
            change()
        self._end(tx)
        if tx.settled or tx.attempts:
            assert tx.session is not None
            self.on_settle(tx.session, tx)
        self.on_commit(tx)
        for payload in tx.notifications:
            for session in list(self.sessions.values()):
                if session.listening:
                    session.notify(payload)

    def rollback(self, tx: Transaction) -> None:
        """ROLLBACK"""
        self._end(tx)

    def _end(self, tx: Transaction) -> None:
        if tx.xid:
            del self.open[tx.xid]
            self.latest_ended = max(self.latest_ended, tx.xid)
        for row in tx.locked:
            if isinstance(row, int):
                del self.endpoint_locks[row]
            else:
                row.lock = None
        if tx.session is not None:
            tx.session.tx = None
        for waiter in tx.waiters:
            waiter()

    def _lock(self, tx: Transaction, row: Delivery) -> None:
        if row.lock is None:
            row.lock = tx
            tx.locked.append(row)

    # Sessions.

    def connect(self, purpose: str) -> Session:
        """A new backend."""
        self.pids += 1
        session = Session(self.pids, purpose)
        self.sessions[session.pid] = session
        return session

    def end(
        self, session: Session, at: float, error: Exception | None = None, *, silently: bool = False
    ) -> None:
        """A session ends: what it had begun is undone, what it had locked is free; its client is told ``error``."""
        if not session.alive:
            return
        session.alive = False
        session.ended_at = at
        session.silently = silently
        del self.sessions[session.pid]
        self.members.pop(session.pid, None)
        for shard in [s for s, holder in self.locks.items() if holder is session]:
            del self.locks[shard]
            del self.lock_counts[shard]
        self.on_locks(session)
        if session.tx is not None:
            self.rollback(session.tx)
        if error is not None:
            session.lost(error)

    def stop(self, at: float) -> None:
        """The server goes down, at once: every session is gone, and what was not committed."""
        self.up = False
        for session in list(self.sessions.values()):
            self.end(
                session,
                at,
                asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
            )
        for tx in list(self.open.values()):
            self.rollback(tx)

    def start(self) -> None:
        """It is there again.  Ids of transactions that never committed may be handed out a second time, as after a failover."""
        self.up = True
        used = [d.xid for d in self.deliveries.values()] + [e.xid for e in self.endpoints.values()]
        self.next_xid = max([*used, 799]) + 1
        self.latest_ended = self.next_xid - 1

    # Statements.

    def run(self, session: Session, query: str, args: Sequence[Any]) -> list[Any]:
        """
        One statement of a session; outside of a transaction it is one of its own.

        Raises:
            Blocked: it has to wait for another transaction; nothing was done.
        """
        if session.tx is not None:
            if session.tx.failed:
                raise asyncpg.InFailedSQLTransactionError("current transaction is aborted")
            return self._statements[query](session, args)
        if query not in WRITING:
            return self._statements[query](session, args)
        tx = self.begin(session)
        try:
            answer = self._statements[query](session, args)
        except BaseException:
            self.rollback(tx)
            raise
        self.commit(tx)
        return answer

    def copy_attempts(self, session: Session, records: Iterable[Sequence[Any]]) -> None:
        """COPY hookd.attempt"""
        assert session.tx is not None
        attempts = []
        for record in records:
            for value in record:
                if isinstance(value, str):
                    value.encode()
                    if "\0" in value:
                        raise asyncpg.CharacterNotInRepertoireError(
                            'invalid byte sequence for encoding "UTF8": 0x00'
                        )
            at, delivery_id, event_id, endpoint, attempt, status = record[:6]
            verdict, outcome, reason, retry_at = record[10:14]
            attempts.append(
                Attempt(
                    at, delivery_id, event_id, endpoint, attempt, status, verdict, outcome, reason, retry_at
                )
            )
        self.xid(session.tx)
        session.tx.attempts += attempts
        session.tx.changes.append(lambda: self.attempts.extend(attempts))

    # Ownership.

    def _join(self, session: Session, _: Sequence[Any]) -> list[Any]:
        self.members[session.pid] = session
        return []

    def _resign(self, session: Session, _: Sequence[Any]) -> list[Any]:
        self.members.pop(session.pid, None)
        return []

    def _look(self, _: Session, __: Sequence[Any]) -> list[Any]:
        found: list[Any] = [{"pid": pid, "member": True, "shard": 0} for pid in self.members]
        found += [{"pid": s.pid, "member": False, "shard": shard} for shard, s in self.locks.items()]
        return found

    def _lock_shards(self, session: Session, args: Sequence[Any]) -> list[Any]:
        answer = []
        for shard in args[0]:
            holder = self.locks.setdefault(shard, session)
            self.lock_counts[shard] += holder is session
            answer.append({"id": shard, "locked": holder is session})
        self.on_locks(session)
        return answer

    def _unlock_shards(self, session: Session, args: Sequence[Any]) -> list[Any]:
        for shard in args[0]:
            if self.locks.get(shard) is session:
                self.lock_counts[shard] -= 1
                if not self.lock_counts[shard]:
                    del self.locks[shard]
        self.on_locks(session)
        return []

    # Settling.

    def _settled_rows(self, session: Session, args: Sequence[Any]) -> list[tuple[int, Delivery]]:
        found: list[tuple[int, Delivery]] = []
        assert session.tx is not None
        seen = {row.id for row, _ in session.tx.settled}
        for n, (event_id, id_, attempt) in enumerate(zip(args[0], args[1], args[2], strict=True)):
            row = self.deliveries.get(id_)
            # a row that a transaction has changed is not changed again by what names it as it was
            if row is None or row.event_id != event_id or row.attempt != attempt or id_ in seen:
                continue
            if row.lock is not None and row.lock is not session.tx:
                raise Blocked(row.lock)
            seen.add(id_)
            found.append((n, row))
        return found

    def _settle_final(self, session: Session, args: Sequence[Any]) -> list[Any]:
        tx = session.tx
        assert tx is not None
        rows = self._settled_rows(session, args)
        for _, row in rows:
            self.xid(tx)
            self._lock(tx, row)
            tx.settled.append((row, True))
            tx.changes.append(lambda id_=row.id: self.deliveries.pop(id_))  # type: ignore[misc]
        return [(row.id,) for _, row in rows]

    def _settle_retry(self, session: Session, args: Sequence[Any]) -> list[Any]:
        tx = session.tx
        assert tx is not None
        answer = []
        for n, row in self._settled_rows(session, args):
            self.xid(tx)
            self._lock(tx, row)
            due_at = self.now() + datetime.timedelta(seconds=args[3][n])
            tx.settled.append((row, False))
            tx.changes.append(lambda row=row, due_at=due_at: self._reschedule(row, due_at))  # type: ignore[misc]
            answer.append((row.id, due_at.timestamp()))
        return answer

    @staticmethod
    def _reschedule(row: Delivery, due_at: datetime.datetime) -> None:
        row.attempt += 1
        row.due_at = due_at

    def _graves(self, args: Sequence[Any]) -> list[tuple[int, Event, int, int, str]]:
        return [
            (id_, self.events[event_id], endpoint, attempts, reason)
            for id_, event_id, endpoint, attempts, reason in zip(*args, strict=True)
            if event_id in self.events
        ]

    def _bury(self, session: Session, args: Sequence[Any]) -> list[Any]:
        tx = session.tx
        assert tx is not None
        for id_, event, endpoint, attempts, reason in self._graves(args):
            letter = DeadLetter(id_, event, endpoint, attempts, reason)
            tx.changes.append(lambda letter=letter: self.dead.setdefault(letter.delivery_id, letter))  # type: ignore[misc]
        return []

    def _report_exhausted(self, session: Session, args: Sequence[Any]) -> list[Any]:
        assert session.tx is not None
        if any(e.tenant == "hookd" and e.state in ("active", "paused") for e in self.endpoints.values()):
            for _, event, endpoint, attempts, reason in self._graves(args):
                if event.tenant != "hookd" and attempts > 0 and endpoint in self.endpoints:
                    payload = {"event_id": str(event.id), "attempts": attempts, "reason": reason}
                    self.insert_event(session.tx, "hookd.delivery.exhausted", "hookd", json.dumps(payload))
        return []

    def _note_health(self, session: Session, args: Sequence[Any]) -> list[Any]:
        tx = session.tx
        assert tx is not None
        rows = [k for k in args[0] if k in self.endpoints]
        self._lock_endpoints(tx, rows)
        for key, since, reason, parked_at in zip(*args, strict=True):
            if key in self.endpoints:
                tx.changes.append(
                    lambda key=key, since=since, reason=reason, parked_at=parked_at: self._put(  # type: ignore[misc]
                        replace(
                            self.endpoints[key],
                            failing_since=_datetime(since),
                            failing_reason=reason,
                            parked_at=_datetime(parked_at),
                        )
                    )
                )
        return []

    def _put(self, endpoint: Endpoint) -> None:
        self.endpoints[endpoint.key] = endpoint

    def _lock_endpoints(self, tx: Transaction, keys: Iterable[int]) -> None:
        keys = list(keys)
        for key in keys:
            holder = self.endpoint_locks.get(key)
            if holder is not None and holder is not tx:
                raise Blocked(holder)
        for key in keys:
            if key not in self.endpoint_locks:
                self.xid(tx)
                self.endpoint_locks[key] = tx
                tx.locked.append(key)

    def _disable(self, session: Session, args: Sequence[Any]) -> list[Any]:
        tx = session.tx
        assert tx is not None
        found = [
            (self.endpoints[k], reason)
            for k, reason in zip(*args, strict=True)
            if k in self.endpoints and self.endpoints[k].state in ("active", "paused")
        ]
        self._lock_endpoints(tx, [e.key for e, _ in found])
        answer = []
        for endpoint, reason in found:
            self._change(tx, endpoint.key, {"state": "disabled", "state_reason": reason})
            tx.disabled.add(endpoint.key)
            answer.append(
                {"key": endpoint.key, "id": endpoint.id, "tenant": endpoint.tenant, "url": endpoint.url, "state_reason": reason}
            )  # fmt: skip
        tx.notifications["endpoint"] = None
        return answer

    def _report_disabled(self, session: Session, args: Sequence[Any]) -> list[Any]:
        assert session.tx is not None
        self.insert_event(session.tx, "hookd.endpoint.disabled", "hookd", args[0])
        return []

    def _forward(self, session: Session, args: Sequence[Any]) -> list[Any]:
        tx = session.tx
        assert tx is not None
        *columns, shards, under_way, most = args
        answer, moved = [], []
        for key, id_, due_text, due_id in zip(*columns, strict=True):
            due_at = ENDS.get(due_text) or datetime.datetime.fromisoformat(due_text)
            of_it = [d for d in self.deliveries.values() if d.endpoint == key]
            fresh = sorted((d for d in of_it if d.due_at is None and d.id < id_), key=lambda d: -d.id)[:most]
            timed = sorted(
                (d for d in of_it if d.due_at is not None and (d.due_at, d.id) < (due_at, due_id)),
                key=lambda d: (d.due_at, d.id),
                reverse=True,
            )[:most]
            if fresh or timed:
                last = timed[-1] if timed else None
                answer.append(
                    {
                        "endpoint": key, "fresh": len(fresh), "id": fresh[-1].id if fresh else None, "timed": len(timed),
                        "due_at": last.due_at.isoformat() if last and last.due_at else None, "due_id": last.id if last else None,
                    }
                )  # fmt: skip
            moved += [
                d
                for d in fresh + timed
                if d.shard in shards
                and d.id not in under_way
                and key in self.endpoints
                and d.shard != self.endpoints[key].shard
            ]
        for row in moved:
            if row.lock is not None and row.lock is not tx:
                raise Blocked(row.lock)
        for row in moved:
            xid = self.xid(tx)
            self._lock(tx, row)
            tx.changes.append(lambda row=row, xid=xid: self._move(row, xid))  # type: ignore[misc]
        return answer

    def _move(self, row: Delivery, xid: int) -> None:
        row.shard, row.xid, row.moved = self.endpoints[row.endpoint].shard, xid, True
        self._newest_xid = max(self._newest_xid, xid)

    # What the feed reads.

    def _listen(self, session: Session, _: Sequence[Any]) -> list[Any]:
        session.listening = True
        return []

    def _echo(self, _: Session, args: Sequence[Any]) -> list[Any]:
        for session in list(self.sessions.values()):
            if session.listening:
                session.notify(args[0])
        return []

    def _sorted(self) -> list[Delivery]:
        return sorted(self.deliveries.values(), key=_by_id)

    def _row(self, d: Delivery, replaced_by: UUID | None, *, later: bool = False) -> tuple[Any, ...]:
        return (
            d.id, d.event_id, d.endpoint, d.shard, d.attempt, d.due_at, d.order_key, d.replay, d.coalesce_key, replaced_by, later,
        )  # fmt: skip

    def _replaced(self, d: Delivery) -> UUID | None:
        if d.coalesce_key is None or d.attempt:
            return None
        newer = [
            n
            for n in self.deliveries.values()
            if n.coalesce_key == d.coalesce_key and n.endpoint == d.endpoint and n.id > d.id
        ]
        return max(newer, key=_by_id).event_id if newer else None

    def _arrived(self, args: Sequence[Any]) -> list[Delivery]:
        xmax, xip, shards = int(args[0]), args[1], args[2]
        if not xip and self._newest_xid < xmax:
            return []
        late = {int(x) for x in xip}
        found = [
            d for d in self.deliveries.values() if (d.xid >= xmax or d.xid in late) and d.shard in shards
        ]
        found.sort(key=_by_id)
        return found

    def _arrivals(self, _: Session, args: Sequence[Any]) -> list[Any]:
        head = (self.snapshot(), self.now(), *[None] * 11)
        found = self._arrived(args)
        if not found:
            return [head]
        xmax, most = int(args[0]), args[3]
        # each of the two parts has its own limit
        late = [d for d in found if d.xid < xmax]
        new = [d for d in found if d.xid >= xmax]
        return [head, *[(None, None, *self._row(d, self._replaced(d))) for d in new[:most] + late[:most]]]

    def _arrival_places(self, _: Session, args: Sequence[Any]) -> list[Any]:
        places: dict[int, dict[str, Any]] = {}
        for d in self._arrived(args):
            place = places.setdefault(
                d.endpoint, {"endpoint": d.endpoint, "first_id": None, "first_due": None}
            )
            if d.due_at is None:
                place["first_id"] = d.id if place["first_id"] is None else min(place["first_id"], d.id)
            else:
                place["first_due"] = (
                    d.due_at if place["first_due"] is None else min(place["first_due"], d.due_at)
                )
        return [(self.snapshot(), self.now(), None, None, None), *places.values()]

    def _refill_fresh(self, _: Session, args: Sequence[Any]) -> list[Any]:
        rows = self.deliveries.values()
        answer = []
        for endpoint, place, want in zip(*args, strict=True):
            found = [d for d in rows if d.endpoint == endpoint and d.due_at is None and d.id > place]
            found.sort(key=_by_id)
            answer += [self._row(d, self._replaced(d)) for d in found[:want]]
        return answer

    def _refill_due(self, _: Session, args: Sequence[Any]) -> list[Any]:
        now = self.now()
        answer = []
        for endpoint, due_at, id_, want, ended in zip(*args, strict=True):
            found = sorted(
                (d.due_at, d.id, d)
                for d in self.deliveries.values()
                if d.endpoint == endpoint and d.due_at is not None and (d.due_at, d.id) > (due_at, id_)
            )
            due = [d for at, _, d in found if ended or at <= now]
            later = [d for at, _, d in found if not ended and at > now]
            answer += [self._row(d, self._replaced(d)) for d in due[:want]]
            answer += [self._row(d, self._replaced(d), later=True) for d in later[:1]]
        return answer

    def _heads(self, _: Session, args: Sequence[Any]) -> list[Any]:
        rows = self._sorted()
        answer = []
        for endpoint, key, after in zip(*args, strict=True):
            for d in rows:
                if d.endpoint == endpoint and d.order_key == key and d.id > after:
                    answer.append(self._row(d, self._replaced(d)))
                    break
        return answer

    def _latest(self, _: Session, args: Sequence[Any]) -> list[Any]:
        rows = self._sorted()[::-1]
        answer = []
        for endpoint, key in zip(*args, strict=True):
            for d in rows:
                if d.endpoint == endpoint and d.coalesce_key == key:
                    answer.append(self._row(d, None))
                    break
        return answer

    def _older(self, _: Session, args: Sequence[Any]) -> list[Any]:
        rows = self._sorted()
        answer = []
        for endpoint, key, id_, event_id in zip(*args[:4], strict=True):
            found = [
                d
                for d in rows
                if d.endpoint == endpoint and d.coalesce_key == key and d.id < id_ and not d.attempt
            ]
            answer += [self._row(d, event_id) for d in found[: args[4]]]
        return answer

    def _recover(self, _: Session, __: Sequence[Any]) -> list[Any]:
        fresh = sorted({d.endpoint for d in self.deliveries.values() if d.due_at is None})
        due: dict[int, datetime.datetime] = {}
        for d in self.deliveries.values():
            if d.due_at is not None:
                due[d.endpoint] = min(due.get(d.endpoint, d.due_at), d.due_at)
        answer: list[Any] = [{"endpoint": k, "fresh": True, "due_at": None} for k in fresh]
        return answer + [{"endpoint": k, "fresh": False, "due_at": due[k]} for k in sorted(due)]

    def _reset_foreign_xids(self, session: Session, args: Sequence[Any]) -> list[Any]:
        tx = session.tx
        assert tx is not None
        xmax = self.latest_ended + 1
        rows = [d for d in self.deliveries.values() if d.xid >= xmax and d.lock in (None, tx)]
        rows = sorted(rows, key=lambda d: d.xid)[: args[0]]
        for row in rows:
            self.xid(tx)
            self._lock(tx, row)
            tx.changes.append(lambda row=row: setattr(row, "xid", 0))  # type: ignore[misc]
        return [(len(rows),)]

    def _reset_foreign_endpoints(self, session: Session, args: Sequence[Any]) -> list[Any]:
        tx = session.tx
        assert tx is not None
        xmax = self.latest_ended + 1
        found = [
            e
            for e in self.endpoints.values()
            if e.xid >= xmax and self.endpoint_locks.get(e.key) in (None, tx)
        ]
        keys = [e.key for e in sorted(found, key=lambda e: e.xid)[: args[0]]]
        self._lock_endpoints(tx, keys)
        for key in keys:
            tx.changes.append(lambda key=key: self._put(replace(self.endpoints[key], xid=0)))  # type: ignore[misc]
        return [(len(keys),)]

    def _endpoints(self, found: Iterable[Endpoint]) -> list[Any]:
        return [
            {
                "key": e.key, "id": e.id, "tenant": e.tenant, "url": e.url, "host": e.host, "shard": e.shard, "state": e.state,
                "state_reason": e.state_reason, "format": None, "rate": e.rate, "concurrency": e.concurrency, "ordered": e.ordered,
                "failing_since": e.failing_since, "failing_reason": e.failing_reason, "parked_at": e.parked_at, "verified_at": None,
                "former_shards": list(e.former_shards), "secrets": [e.secret], "rotates_until": None, "headers": None,
            }
            for e in found
        ]  # fmt: skip

    def _endpoint_changes(self, _: Session, args: Sequence[Any]) -> list[Any]:
        xmax, xip = int(args[0]), {int(x) for x in args[1]}
        return self._endpoints(e for e in self.endpoints.values() if e.xid >= xmax or e.xid in xip)

    @staticmethod
    def _event_row(known_by: UUID | int, e: Event) -> tuple[Any, ...]:
        expires_at = e.expires_at.timestamp() if e.expires_at else None
        return (known_by, e.type, e.tenant, e.payload.encode(), e.created_at.timestamp(), expires_at, None)

    def _read_events(self, _: Session, args: Sequence[Any]) -> list[Any]:
        return [self._event_row(n, self.events[i]) for n, i in enumerate(args[0], 1) if i in self.events]

    def _buried_events(self, _: Session, args: Sequence[Any]) -> list[Any]:
        dead = {d.event.id: d.event for d in reversed(self.dead.values())}
        return [self._event_row(i, dead[i]) for i in args[0] if i in dead]

    def _flag_sleep(self, _: Session, args: Sequence[Any]) -> list[Any]:
        for shard in args[0]:
            self.sleepers[shard] = SLEEPS if args[1] else WAKES
        return []

    # What applications and operators do.

    def shard_of(self, host: str) -> int:
        """hookd.shard_of"""
        digest = sha256(host.encode()).digest()
        return (digest[0] * 256 + digest[1]) % self.shards

    def add_endpoint(self, tx: Transaction, url: str, host: str, secret: str, **more: Any) -> Endpoint:
        """INSERT INTO hookd.endpoint"""
        self.endpoint_keys += 1
        endpoint = Endpoint(
            key=self.endpoint_keys,
            id=self.new_uuid(),
            url=url,
            host=host,
            shard=self.shard_of(host),
            xid=self.xid(tx),
            secret=secret,
            **more,
        )
        tx.changes.append(lambda: self._put(endpoint))
        tx.notifications["endpoint"] = None
        return endpoint

    def change_endpoint(self, tx: Transaction, key: int, **change: Any) -> None:
        """
        UPDATE hookd.endpoint

        Raises:
            Blocked: another transaction has changed it and is still open.
        """
        self._lock_endpoints(tx, [key])
        self._change(tx, key, change)
        tx.notifications["endpoint"] = None

    def _change(self, tx: Transaction, key: int, change: dict[str, Any]) -> None:
        xid = self.xid(tx)

        def apply() -> None:
            old = self.endpoints[key]
            new = replace(old, **change, xid=xid)
            new.shard = self.shard_of(new.host)
            if new.shard != old.shard and old.shard not in new.former_shards:
                new.former_shards = (*old.former_shards, old.shard)
            self._put(new)

        tx.changes.append(apply)

    def insert_event(self, tx: Transaction, type_: str, tenant: str, payload: str, **more: Any) -> Event:
        """INSERT INTO hookd.event, with its fan-out."""
        xid = self.xid(tx)
        self.event_keys += 1
        event = Event(self.new_uuid(), self.event_keys, self.now(), type_, tenant, payload, **more)
        tx.changes.append(lambda: self.events.__setitem__(event.id, event))
        seen = self.endpoints if tx.sees is None else tx.sees
        for endpoint in sorted(seen.values(), key=lambda e: e.key):
            if endpoint.tenant != tenant or endpoint.state not in ("active", "paused"):
                continue
            if endpoint.key in tx.disabled:
                continue
            if matched(endpoint.types, type_):
                due_at = event.deliver_at if event.deliver_at and event.deliver_at > self.now() else None
                self._owe(tx, xid, event.id, endpoint, due_at, "" if endpoint.ordered else event.order_key, event.coalesce_key)  # fmt: skip
        return event

    def restore(self, above: int) -> None:
        """Dump and restore: the rows are as a server has written them whose transaction ids were so much higher."""
        for row in self.deliveries.values():
            row.xid += above
        self._newest_xid += above
        for endpoint in list(self.endpoints.values()):
            self._put(replace(endpoint, xid=endpoint.xid + above))

    def _put_delivery(self, row: Delivery) -> None:
        self.deliveries[row.id] = row
        self._newest_xid = max(self._newest_xid, row.xid)

    def _owe(
        self,
        tx: Transaction,
        xid: int,
        event_id: UUID,
        endpoint: Endpoint,
        due_at: datetime.datetime | None = None,
        order_key: str | None = None,
        coalesce_key: str | None = None,
        *,
        replay: bool = False,
    ) -> Delivery:
        self.delivery_ids += 1
        row = Delivery(
            self.delivery_ids, event_id, xid, due_at, endpoint.key, endpoint.shard,
            replay=replay, order_key=order_key, coalesce_key=coalesce_key,
        )  # fmt: skip
        tx.changes.append(lambda: self._put_delivery(row))
        tx.inserted.append(row)
        self.on_insert(row)
        if self.sleepers[endpoint.shard] == SLEEPS:
            tx.notifications[""] = None
        return row

    def replay(self, tx: Transaction, letters: Iterable[DeadLetter]) -> list[Delivery]:
        """Queue dead letters again."""
        xid = self.xid(tx)
        queued = []
        for letter in letters:
            endpoint = self.endpoints.get(letter.endpoint)
            if endpoint is None or endpoint.state == "removed":
                continue
            queued.append(self._owe(tx, xid, letter.event.id, endpoint, replay=True))
            tx.changes.append(lambda letter=letter: self._replayed(letter))  # type: ignore[misc]
        return queued

    def _replayed(self, letter: DeadLetter) -> None:
        for other in self.dead.values():
            if (other.event.id, other.endpoint) == (letter.event.id, letter.endpoint):
                other.replayed = True


WRITING = frozenset(
    {
        owner.SETTLE_FINAL,
        owner.SETTLE_RETRY,
        owner.FORWARD,
        queue.RESET_FOREIGN_XIDS,
        queue.RESET_FOREIGN_ENDPOINTS,
    }
)
"""Statements that need a transaction when they are run outside of one."""


def _by_id(row: Delivery) -> int:
    return row.id


def _datetime(at: float | None) -> datetime.datetime | None:
    return None if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)
