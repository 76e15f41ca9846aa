"""
The PostgreSQL in memory and the real one: the same operations, the same rows and answers.

The real ``OwnerSession`` and ``Queue`` run on both, side by side; what is done next is drawn from a seed.  Transaction ids
differ, and the ids of events; everything else has to be equal after every step.
"""

from __future__ import annotations

import asyncio
import datetime
import random
import time
from typing import TYPE_CHECKING, Any
from unittest import mock
from uuid import UUID

import asyncpg
import pytest

from hookd.clock import SystemClock
from hookd.core.model import (
    Delivery,
    DeliveryId,
    EndpointKey,
    Event,
    Health,
    Outcome,
    OutcomeKind,
    Result,
    Verdict,
    VerdictKind,
)
from hookd.core.reads import Reach
from hookd.core.sealing import PLAIN
from hookd.postgres import queue
from hookd.postgres.history import REPLAY
from hookd.postgres.owner import OwnerSession
from hookd.postgres.queue import Queue
from tests.simulation.database import LISTEN, Database
from tests.simulation.world import SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hookd.core.model import Endpoint
    from hookd.core.reads import Arrivals, Row, Snapshot
    from tests.simulation.database import Event as EventRow
    from tests.simulation.database import Session, Transaction

SHARDS = 4
STEPS = 60

DIFFERED = (129, 210)
"""Of the first 500: two dead letters of one event and endpoint; an endpoint of tenant hookd that is told of its own end."""

RESTORED = 1_000_000_000
"""How much higher the transaction ids were of the server that a dump is from."""

LONG_AGO = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)
SOON = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)

CLEAN = """
truncate hookd.delivery, hookd.attempt, hookd.dead_letter, hookd.event, hookd.endpoint, hookd.endpoint_secret;
alter sequence hookd.delivery_id restart; alter sequence hookd.endpoint_key restart; alter sequence hookd.event_key restart;
delete from hookd.shard where id >= 4; update hookd.setting set value = '4' where name = 'shards';
select setval(sleeper, 1) from hookd.shard;
drop index hookd.endpoint_tenant; create index endpoint_tenant on hookd.endpoint (tenant, key)
"""

BY_KEY = "set enable_seqscan = off; set enable_bitmapscan = off"
"""
The deliveries of an event are numbered in the order in which its endpoints are found, and nobody minds which that is.  For the
numbers to be equal here, it is the order of their keys: that of the index above.
"""

NAME = "case when e.tenant = 'hookd' then e.type || e.key else e.payload end"
"""What an event is called on both sides."""

TABLES = {
    "deliveries": "select d.id, NAME, d.due_at, d.endpoint, d.shard, d.attempt, d.replay, d.order_key, d.coalesce_key from hookd.delivery d join hookd.event e on e.id = d.event_id order by d.id",
    "attempts": "select a.delivery_id, NAME, a.endpoint, a.attempt, a.status, a.verdict, a.outcome, a.reason, a.retry_at is null as final from hookd.attempt a join hookd.event e on e.id = a.event_id order by a.delivery_id, a.attempt, a.verdict",
    "dead letters": "select l.delivery_id, NAME, l.endpoint, l.attempts, l.reason, l.replayed_at is not null as replayed from hookd.dead_letter l join hookd.event e on e.id = l.event_id order by l.delivery_id",
    "endpoints": "select key, tenant, url, host, shard, state, state_reason, former_shards, failing_reason, failing_since is null as well, parked_at is null as served from hookd.endpoint order by key",
    "events": "select NAME, tenant, e.order_key, e.coalesce_key from hookd.event e order by key",
}  # fmt: skip


def due(at: datetime.datetime | None) -> str:
    """A due time, as far as both can agree on it."""
    if at is None:
        return "fresh"
    return "later" if at.timestamp() > time.time() else "due"


class Direct:
    """A connection to the model that nothing stands in the way of."""

    def __init__(self, database: Database, purpose: str) -> None:
        self.database = database
        self.session = database.connect(purpose)
        self.listeners: list[Callable[..., None]] = []
        self.session.notify = lambda payload: [call(self, 0, "hookd", payload) for call in self.listeners]  # type: ignore[assignment]

    def add_termination_listener(self, _: object) -> None:
        pass

    async def add_listener(self, _: str, callback: Callable[..., None]) -> None:
        self.listeners.append(callback)
        self.database.run(self.session, LISTEN, ())

    async def set_type_codec(self, *_: object, **__: object) -> None:
        pass

    def get_server_pid(self) -> int:
        return self.session.pid

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]:
        return self.database.run(self.session, query, args)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        self.database.run(self.session, query, args)
        return ""

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        return self.database.run(self.session, query, args)[0]

    async def fetchval(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        return self.database.run(self.session, query, args)[0][0]

    async def copy_records_to_table(self, *_: object, records: Iterable[Any], **__: object) -> None:
        self.database.copy_attempts(self.session, records)

    def transaction(self) -> Direct:
        return self

    async def __aenter__(self) -> None:
        self.database.begin(self.session)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self.session.tx is not None
        (self.database.commit if kind is None else self.database.rollback)(self.session.tx)

    async def close(self, timeout: float | None = None) -> None:
        self.database.end(self.session, 0.0)

    def terminate(self) -> None:
        self.database.end(self.session, 0.0)


class Side:
    """One of the two: two owners, a feed's connection, applications with transactions of their own."""

    def __init__(self) -> None:
        self.owners: dict[str, OwnerSession] = {}
        self.queue: Queue
        self.heard: list[str] = []
        self.since: Snapshot
        self.names: dict[UUID, str] = {}
        """Payloads by the ids of events."""

    async def open(self) -> None:
        for name in "ab":
            await self.own(name)
        self.queue = Queue(await self.connection("feed"), lambda: PLAIN)
        await self.queue.prepare(self.heard.append)
        self.since, _ = await self.queue.snapshot()

    async def own(self, name: str) -> None:
        owner = self.owners[name] = OwnerSession(await self.connection("owner"), SystemClock())
        await owner.prepare()
        await owner.join()

    async def close(self) -> None:
        for owner in self.owners.values():
            await owner.close()
        await self.queue.close()

    async def connection(self, purpose: str) -> Any:
        raise NotImplementedError

    async def event_names(self) -> None:
        """Learn the ids of new events."""
        raise NotImplementedError

    async def tables(self) -> dict[str, list[Any]]:
        raise NotImplementedError

    async def restore(self) -> None:
        """Give all rows transaction ids of another server."""
        raise NotImplementedError

    async def news(self) -> tuple[int, int]:
        """How many deliveries and endpoints seem to be new or changed."""
        rows, _ = await self.arrivals(range(SHARDS), 100, keep=True)
        return len(rows), len(await self.queue.endpoint_changes(self.since))

    async def listened(self) -> list[str]:
        """What the feed has heard since it was asked last."""
        heard, self.heard[:] = sorted(set(self.heard)), []
        return heard

    async def view(self, name: str) -> Any:
        view = await self.owners[name].look()
        return len(view.members), view.shards, view.taken

    # Reads, made comparable.

    def row(self, row: Row) -> tuple[Any, ...]:
        replaced = self.names[row.replaced_by] if row.replaced_by is not None else None
        return (row.id, self.names[row.event_id], row.endpoint, row.shard, row.attempt, due(row.due_at), row.order_key, row.replay, row.coalesce_key, replaced, row.later)  # fmt: skip

    def rows(self, rows: Iterable[Row]) -> list[tuple[Any, ...]]:
        return [self.row(r) for r in rows]

    async def arrivals(self, shards: Sequence[int], window: int, *, keep: bool) -> Any:
        found: Arrivals = await self.queue.arrivals(self.since, shards, window)
        if keep:
            self.since = found.snapshot
        places = sorted((p.endpoint, p.first_id, p.first_due is None) for p in found.places)
        return sorted(self.rows(found.rows)), places

    @staticmethod
    def endpoints(found: Iterable[Endpoint]) -> list[Any]:
        return sorted(
            (e.key, e.tenant, e.url, e.host, e.shard, e.state, e.state_reason or "", e.rate or 0, e.concurrency or 0, e.ordered, e.former_shards, e.health.reason or "", e.health.parked_at is None, [s.reveal() for s in e.secrets])
            for e in found
        )  # fmt: skip


class Model(Side):
    """In memory."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        uuids = random.Random(seed)
        self.db = Database(SHARDS, time.time, lambda: UUID(int=uuids.getrandbits(128)))
        self.open_ones: dict[int, Transaction] = {}

    async def connection(self, purpose: str) -> Any:
        return Direct(self.db, purpose)

    async def event_names(self) -> None:
        self.names = {e.id: self.called(e) for e in self.db.events.values()}

    @staticmethod
    def called(event: EventRow) -> str:
        return f"{event.type}{event.key}" if event.tenant == "hookd" else event.payload

    async def tables(self) -> dict[str, list[Any]]:
        db, names = self.db, self.names
        return {
            "deliveries": [(d.id, names[d.event_id], due(d.due_at), d.endpoint, d.shard, d.attempt, d.replay, d.order_key, d.coalesce_key) for d in db._sorted()],
            "attempts": sorted(((a.delivery_id, names[a.event_id], a.endpoint, a.attempt, a.status, a.verdict, a.outcome, a.reason, a.retry_at is None) for a in db.attempts), key=lambda r: (r[0], r[3], r[5])),
            "dead letters": [(g.delivery_id, self.called(g.event), g.endpoint, g.attempts, g.reason, g.replayed) for _, g in sorted(db.dead.items())],
            "endpoints": [(e.key, e.tenant, e.url, e.host, e.shard, e.state, e.state_reason, list(e.former_shards), e.failing_reason, e.failing_since is None, e.parked_at is None) for _, e in sorted(db.endpoints.items())],
            "events": [(self.called(e), e.tenant, e.order_key, e.coalesce_key) for e in sorted(db.events.values(), key=lambda e: e.key)],
        }  # fmt: skip

    async def add_endpoint(self, tenant: str, url: str, host: str, **more: Any) -> None:
        tx = self.db.begin()
        self.db.add_endpoint(tx, url, host, SECRET, tenant=tenant, **more)
        self.db.commit(tx)

    async def change_endpoint(self, key: int, **change: Any) -> None:
        tx = self.db.begin()
        self.db.change_endpoint(tx, key, **change)
        self.db.commit(tx)

    async def begin(self, number: int, *, repeatable: bool) -> None:
        self.open_ones[number] = self.db.begin()
        if repeatable:
            self.open_ones[number].sees = dict(self.db.endpoints)

    async def insert(self, number: int, type_: str, tenant: str, payload: str, **more: Any) -> None:
        self.db.insert_event(self.open_ones[number], type_, tenant, payload, **more)

    async def end(self, number: int, *, commit: bool) -> None:
        (self.db.commit if commit else self.db.rollback)(self.open_ones.pop(number))

    async def replay(self, ids: Sequence[int]) -> None:
        tx = self.db.begin()
        self.db.replay(tx, [self.db.dead[i] for i in ids])
        self.db.commit(tx)

    async def restore(self) -> None:
        self.db.restore(RESTORED)

    async def kill(self, name: str) -> None:
        session: Session = self.owners[name]._connection.session  # type: ignore[attr-defined]
        self.db.end(session, 0.0)


class Real(Side):
    """On a server."""

    def __init__(self, dsn: str) -> None:
        super().__init__()
        self.dsn = dsn
        self.sql: asyncpg.Connection
        self.open_ones: dict[int, Any] = {}
        self.applications: list[asyncpg.Connection] = []

    async def open(self) -> None:
        self.sql = await self.connection("test")
        await self.sql.execute(CLEAN)
        self.applications = [await self.connection("application") for _ in range(3)]
        for application in self.applications:
            await application.execute(BY_KEY)
        await super().open()

    async def close(self) -> None:
        await super().close()
        for connection in (self.sql, *self.applications):
            await connection.close()

    async def connection(self, purpose: str) -> Any:
        return await asyncpg.connect(self.dsn)

    async def event_names(self) -> None:
        found = await self.sql.fetch(f"select e.id, {NAME} as name from hookd.event e")
        self.names = {r["id"]: r["name"] for r in found}

    async def tables(self) -> dict[str, list[Any]]:
        found = {
            name: [tuple(r) for r in await self.sql.fetch(query.replace("NAME", NAME))]
            for name, query in TABLES.items()
        }
        found["deliveries"] = [(*r[:2], due(r[2]), *r[3:]) for r in found["deliveries"]]
        return found

    async def listened(self) -> list[str]:
        # what was committed before a statement of the listener is there when it is answered
        for _ in range(3):
            await self.queue.snapshot()
            await asyncio.sleep(0)
        return await super().listened()

    async def add_endpoint(self, tenant: str, url: str, host: str, **more: Any) -> None:
        key = await self.sql.fetchval(
            "insert into hookd.endpoint (tenant, url, host, types, ordered, rate, concurrency) values ($1, $2, $3, $4, $5, $6, $7) returning key",
            tenant, url, host, list(more["types"]), more["ordered"], more["rate"], more["concurrency"],
        )  # fmt: skip
        await self.sql.execute(
            "insert into hookd.endpoint_secret (endpoint, purpose, value) values ($1, 'signing', $2)",
            key,
            SECRET,
        )

    async def change_endpoint(self, key: int, **change: Any) -> None:
        columns = ", ".join(f"{name} = ${n}" for n, name in enumerate(change, 2))
        await self.sql.execute(f"update hookd.endpoint set {columns} where key = $1", key, *change.values())

    async def begin(self, number: int, *, repeatable: bool) -> None:
        connection = self.applications[number]
        tx = connection.transaction(isolation="repeatable_read" if repeatable else "read_committed")
        await tx.start()
        await connection.execute(
            "select 1 from hookd.endpoint"
        )  # the snapshot is taken by the first statement
        self.open_ones[number] = tx

    async def insert(self, number: int, type_: str, tenant: str, payload: str, **more: Any) -> None:
        named = {"type": type_, "tenant": tenant, "payload": payload, **more}
        values = ", ".join(f"${n}" for n in range(1, len(named) + 1))
        await self.applications[number].execute(
            f"insert into hookd.event ({', '.join(named)}) values ({values})", *named.values()
        )

    async def end(self, number: int, *, commit: bool) -> None:
        tx = self.open_ones.pop(number)
        await (tx.commit() if commit else tx.rollback())

    async def replay(self, ids: Sequence[int]) -> None:
        rows = await self.sql.fetch(
            "select l.event_id, e.id from unnest($1::bigint[]) with ordinality as k (id, n) join hookd.dead_letter l on l.delivery_id = k.id join hookd.endpoint e on e.key = l.endpoint order by k.n",
            list(ids),
        )  # fmt: skip
        async with self.sql.transaction():
            pairs = [r[0] for r in rows], [r[1] for r in rows]
            queued = await self.sql.fetchrow(REPLAY, *pairs, [0.0] * len(rows), None)
            assert queued is not None
            if queued["shards"]:
                await self.sql.execute("select hookd.wake($1)", queued["shards"])

    async def restore(self) -> None:
        for table in ("delivery", "endpoint"):
            await self.sql.execute(
                f"update hookd.{table} set xid = (xid::text::bigint + {RESTORED})::text::xid8"
            )

    async def kill(self, name: str) -> None:
        pid = self.owners[name].backend
        await self.sql.execute("select pg_terminate_backend($1)", pid)
        while await self.sql.fetchval("select count(*) from pg_stat_activity where pid = $1", pid):
            await asyncio.sleep(0.002)
        # the server forgets a session before it closes its socket, and this loop may end in between
        self.owners[name].terminate()


VERDICTS = (
    Verdict(VerdictKind.DELIVERED),
    Verdict(VerdictKind.RETRY, "answered 500", delay_s=0.0, endpoint_failed=True),
    Verdict(VerdictKind.RETRY, "answered 503", delay_s=3600.0, endpoint_failed=True),
    Verdict(VerdictKind.EXHAUSTED, "answered 500", endpoint_failed=True),
    Verdict(VerdictKind.EXHAUSTED, "answered 410 Gone", disable="answered 410 Gone", endpoint_failed=True),
    Verdict(VerdictKind.CANCELLED, "endpoint removed"),
    Verdict(VerdictKind.EXPIRED, "expired before it could be sent"),
)


class History:
    """One seed's operations, on both sides."""

    def __init__(self, seed: int, dsn: str) -> None:
        self.dice = random.Random(seed)
        self.model = Model(seed)
        self.real = Real(dsn)
        self.sides: tuple[Model, Real] = (self.model, self.real)
        self.events = 0
        self.done: list[str] = []

    async def run(self) -> None:
        for side in self.sides:
            await side.open()
        try:
            for _ in range(self.dice.randint(1, 4)):
                await self.add_endpoint()
            steps = [
                self.insert, self.insert, self.insert, self.begin, self.end, self.end, self.arrivals, self.arrivals, self.read, self.read,
                self.settle, self.settle, self.acquire, self.look, self.kill, self.change, self.move, self.forward, self.replay,
                self.add_endpoint, self.sleep,
            ]  # fmt: skip
            for _ in range(STEPS):
                step = self.dice.choice(steps)
                self.done.append(step.__name__)
                await step()
            await self.compare("tables", *[await side.tables() for side in self.sides])
        finally:
            for side in self.sides:
                await side.close()

    async def compare(self, what: str, model: object, real: object) -> None:
        assert model == real, f"{what} after {self.done}"

    async def both(self, what: str, call: Callable[[Any], Any]) -> None:
        """The same on both sides, and the same answer."""
        for side in self.sides:
            await side.event_names()
        await self.compare(what, *[await call(side) for side in self.sides])

    async def add_endpoint(self) -> None:
        dice = self.dice
        host = f"h{dice.randint(0, 5)}.test:80"
        more = {
            "types": dice.choice((("*",), ("a.*",), ("a.x", "b"))),
            "ordered": dice.random() < 0.3,
            "rate": dice.choice((None, 2.5)),
            "concurrency": dice.choice((None, 3)),
        }
        tenant = dice.choice(("t", "t", "u", "hookd"))
        await self.both("add", lambda s: s.add_endpoint(tenant, f"http://{host}/", host, **more))

    async def begin(self) -> None:
        free = [n for n in range(3) if n not in self.model.open_ones]
        if free:
            repeatable = self.dice.random() < 0.3
            await self.both("begin", lambda s: s.begin(free[0], repeatable=repeatable))

    async def insert(self) -> None:
        dice = self.dice
        alone = not self.model.open_ones
        if alone:
            await self.both("begin", lambda s: s.begin(0, repeatable=False))
        number = dice.choice(list(self.model.open_ones))
        for _ in range(dice.randint(1, 3)):
            self.events += 1
            more: dict[str, Any] = {}
            if dice.random() < 0.4:
                more["order_key"] = dice.choice("kl")
            if dice.random() < 0.4:
                more["coalesce_key"] = dice.choice("st")
            if dice.random() < 0.3:
                hours = dice.choice((-1, 1))
                more["deliver_at"] = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=hours)
            type_, tenant, payload = (
                dice.choice(("a.x", "a.y", "b")),
                dice.choice("tu"),
                f'{{"n": {self.events}}}',
            )
            await self.both("insert", lambda s, a=(number, type_, tenant, payload), m=more: s.insert(*a, **m))  # type: ignore[misc]
        if alone:
            await self.end()

    async def end(self) -> None:
        if self.model.open_ones:
            number = self.dice.choice(list(self.model.open_ones))
            commit = self.dice.random() < 0.8
            await self.both("end", lambda s: s.end(number, commit=commit))
            await self.both("notifications", lambda s: s.listened())

    async def arrivals(self) -> None:
        shards = sorted(self.dice.sample(range(SHARDS), self.dice.randint(1, SHARDS)))
        window = self.dice.choice((0, 2, 100))
        keep = self.dice.random() < 0.6
        if keep:
            shards = list(range(SHARDS))
        await self.both("arrivals", lambda s: s.arrivals(shards, window, keep=keep) if window == 100 else self.few(s, shards, window, keep=keep))  # fmt: skip

    @staticmethod
    async def few(side: Side, shards: Sequence[int], window: int, *, keep: bool) -> Any:
        """Of a window that is too small nobody says which rows come first, only whether there are more."""
        rows, places = await side.arrivals(shards, window, keep=keep)
        return rows, places

    async def read(self) -> None:
        dice, db = self.dice, self.model.db
        keys = [EndpointKey(k) for k in db.endpoints]
        some = dice.sample(keys, dice.randint(1, len(keys)))
        place = dice.randint(0, db.delivery_ids)
        want = dice.randint(1, 4)
        reads: list[tuple[str, Callable[[Any], Any]]] = [
            ("fresh", lambda s: _rows(s, s.queue.refill_fresh([(k, place, want) for k in some]))),
            (
                "due",
                lambda s: _rows(s, s.queue.refill_due([(k, LONG_AGO, 0, want, k % 2 == 0) for k in some])),
            ),
            (
                "heads",
                lambda s: _rows(s, s.queue.heads([(k, o, place) for k in some for o in ("", "k", "l")])),
            ),
            ("latest", lambda s: _rows(s, s.queue.latest([(k, c) for k in some for c in "st"]))),
            ("older", lambda s: self.older(s, some, place, want)),
            ("recover", self.recovered),
            ("endpoints of shards", lambda s: self.endpoints(s, s.queue.endpoints_of(range(2)))),
            ("endpoints", lambda s: self.endpoints(s, s.queue.endpoints(some))),
            ("endpoint changes", lambda s: self.endpoints(s, s.queue.endpoint_changes(s.since))),
            ("events", self.read_events),
        ]
        name, call = dice.choice(reads)
        await self.both(name, call)

    async def older(self, side: Side, keys: Sequence[EndpointKey], place: int, most: int) -> Any:
        if not side.names:
            return []
        newest = max(side.names, key=lambda i: side.names[i])
        return await _rows(side, side.queue.older([(k, c, DeliveryId(place), newest) for k in keys for c in "st"], most))  # fmt: skip

    @staticmethod
    async def recovered(side: Side) -> Any:
        fresh, due_ones = await side.queue.recover()
        return sorted(fresh), sorted(
            (key, due(datetime.datetime.fromtimestamp(at, datetime.UTC))) for key, at in due_ones
        )

    @staticmethod
    async def endpoints(side: Side, read: Any) -> Any:
        return side.endpoints(await read)

    @staticmethod
    async def read_events(side: Side) -> Any:
        ids = sorted(side.names, key=lambda i: side.names[i])
        found = await side.queue.events(ids)
        return [(side.names[i], e.type, e.tenant) for i, e in found.items() if e.tenant != "hookd"]

    # Owners.

    async def acquire(self) -> None:
        name = self.dice.choice("ab")
        held = self.model.owners[name].shards
        shards = [s for s in range(SHARDS) if s not in held and self.dice.random() < 0.6]
        if self.dice.random() < 0.3 and held:
            leave = set(self.dice.sample(sorted(held), 1))
            await self.both("release", lambda s: s.owners[name].release(set(leave)))
        elif shards:
            await self.both("acquire", lambda s: s.owners[name].acquire(shards))

    async def look(self) -> None:
        name = self.dice.choice("ab")
        await self.both("look", lambda s: s.view(name))

    async def kill(self) -> None:
        name = self.dice.choice("ab")
        await self.both("kill", lambda s: s.kill(name))
        await self.both("own", lambda s: s.own(name))
        await self.look()

    async def settle(self) -> None:
        dice = self.dice
        name = dice.choice("ab")
        rows = self.model.db._sorted()
        chosen = [
            (r.id, r.attempt - (dice.random() < 0.1), dice.choice(VERDICTS))
            for r in rows
            if dice.random() < 0.5
        ][:4]
        failed = dice.choice((None, Health(), Health(1.0, "answered 500"), Health(1.0, "answered 500", 2.0)))
        if chosen:
            for _ in range(dice.choice((1, 1, 2))):
                await self.both("settled", lambda s: self.settled(s, name, chosen, failed))
            await self.both("tables", lambda s: s.tables())
            await self.both("notifications", lambda s: s.listened())

    async def settled(
        self, side: Side, name: str, chosen: Sequence[tuple[int, int, Verdict]], health: Health | None
    ) -> Any:
        ids = {n: i for i, n in side.names.items()}
        results = []
        for id_, attempt, verdict in chosen:
            row = self.copies[id_] if (found := self.model.db.deliveries.get(id_)) is None else found
            self.copies[id_] = row
            event = Event(
                ids[self.payloads.setdefault(id_, self.model.names[row.event_id])], "a", "t", b"", 0.0
            )
            exchange = verdict.kind not in (VerdictKind.CANCELLED, VerdictKind.EXPIRED)
            results.append(
                Result(
                    Delivery(DeliveryId(id_), EndpointKey(row.endpoint), event, attempt, row.shard),
                    EndpointKey(row.endpoint),
                    Outcome(OutcomeKind.ANSWERED, status=200, started_at=1.0) if exchange else None,
                    verdict,
                    health,
                    written_wall=1.0,
                )
            )
        done = await side.owners[name].settle(results)
        return sorted(done.ids), sorted(done.due_at), sorted(done.disabled)

    copies: dict[int, Any]
    payloads: dict[int, str]

    # Operators.

    async def change(self) -> None:
        key = self.dice.choice(list(self.model.db.endpoints))
        state = self.dice.choice(("active", "paused", "disabled", "removed"))
        await self.both("change", lambda s: s.change_endpoint(key, state=state, state_reason="by hand"))
        await self.both("notifications", lambda s: s.listened())

    async def move(self) -> None:
        key = self.dice.choice(list(self.model.db.endpoints))
        host = f"h{self.dice.randint(0, 5)}.test:80"
        await self.both("move", lambda s: s.change_endpoint(key, host=host, url=f"http://{host}/moved"))

    async def forward(self) -> None:
        name = self.dice.choice("ab")
        keys = [EndpointKey(k) for k in self.model.db.endpoints]
        under_way = [DeliveryId(i) for i in self.model.db.deliveries if self.dice.random() < 0.2]
        most = self.dice.choice((1, 2, 5, 1000))

        async def slices(side: Any) -> int:
            reaches, count = [Reach(key) for key in keys], 0
            while reaches:
                reaches, count = await side.owners[name].forward(reaches, under_way), count + 1
            return count

        if keys:
            with mock.patch("hookd.postgres.owner.FORWARD_MOST", most):
                await self.both("forward", slices)
        await self.both("tables", lambda s: s.tables())

    async def replay(self) -> None:
        letters = [i for i in sorted(self.model.db.dead) if self.dice.random() < 0.5 and self.model.db.events[self.model.db.dead[i].event.id].tenant != "hookd"]  # fmt: skip
        if letters:
            await self.both("replay", lambda s: s.replay(letters))
            await self.both("tables", lambda s: s.tables())

    async def sleep(self) -> None:
        asleep = self.dice.random() < 0.5
        await self.both("sleep", lambda s: s.queue.flag_sleep(range(SHARDS), asleep=asleep))


async def _rows(side: Side, read: Any) -> Any:
    return side.rows(await read)


@pytest.mark.parametrize("seeds", [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12), DIFFERED])
def test_the_model_is_like_the_real_one(dsn: str, seeds: Sequence[int]) -> None:
    async def go() -> None:
        for seed in seeds:
            history = History(seed, dsn)
            history.copies, history.payloads = {}, {}
            await history.run()

    asyncio.run(go())


def test_what_a_restore_leaves_is_like_the_real_one(dsn: str) -> None:
    """Rows of a server whose transaction ids were higher seem to be new at every look, until a feed has recovered."""

    async def go() -> None:
        sides: list[Any] = [Model(1), Real(dsn)]
        for side in sides:
            await side.open()
        try:
            found = []
            for side in sides:
                await side.add_endpoint("t", "http://h.test/", "h.test:80", types=("*",), ordered=False, rate=None, concurrency=None)  # fmt: skip
                await side.begin(0, repeatable=False)
                for n in range(5):
                    await side.insert(0, "a.x", "t", f'{{"n": {n}}}')
                await side.end(0, commit=True)
                await side.event_names()
                assert await side.news() == (5, 0)
                await side.restore()
                assert [await side.news() for _ in range(2)] == [(5, 1), (5, 1)]
                with mock.patch.object(queue, "RESET_SLICE", 2):
                    await side.queue.recover()
                assert await side.news() == (0, 0)
                found.append((await side.tables(), await side.listened()))
            assert found[0] == found[1]
        finally:
            for side in sides:
                await side.close()

    asyncio.run(go())
