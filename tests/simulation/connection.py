"""
Connections of a process to the database: what ``asyncpg`` is to hookd, with everything on the way that can go wrong.

A ``Link`` is the network between one process and the server.  While it is cut nothing passes either way; what was written waits,
as TCP would let it, and is delivered when the link is whole again, unless the server has given the session up meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg

from hookd.postgres.connect import CONNECT_TIMEOUT_S, DatabaseUnavailable

from .database import LISTEN, Blocked, Database, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from random import Random
    from types import TracebackType

    from .timeline import ProcessLoop, Timeline

SILENCE_LEAST_S, SILENCE_MOST_S = 3.0, 6.0
"""For how long the server keeps the session of a client that it does not hear of (``connect.KEEPALIVE``)."""

RESENT_S = (1.0, 2.0, 4.0, 8.0)
"""After so long TCP asks for a connection once more."""

COPY = "copy hookd.attempt"
BEGIN, COMMIT, ROLLBACK = "begin", "commit", "rollback"


class Statement:
    """One that is on its way, or being run."""

    __slots__ = ("answered", "args", "called_off", "future", "query", "timeout")

    def __init__(
        self, query: str, args: Sequence[Any], future: asyncio.Future[Any], timeout: float | None
    ) -> None:
        self.query = query
        self.args = args
        self.future = future
        self.timeout = timeout
        self.called_off = False
        self.answered = False


class Link:
    """The network between a process and the server."""

    def __init__(self, database: Database, timeline: Timeline, loop: ProcessLoop, dice: Random) -> None:
        self.database = database
        self.timeline = timeline
        self.loop = loop
        self.dice = dice
        self.cut = False
        self._cuts = 0
        self.lag_s = 0.0002
        """One way, on the average."""
        self.server_s: Callable[[str], float] = lambda _: 0.0
        """How long the server takes for a statement."""
        self.answer_s: Callable[[str], float] = lambda _: 0.0
        """How much later than it was run its answer comes."""
        self.fails: Callable[[Connection, str], Exception | None] = lambda _c, _q: None
        """What the server says in place of running a statement."""
        self.breaks: Callable[[str], str | None] = lambda _: None
        """Whether the connection breaks at a statement: ``before`` or ``after`` it was run."""
        self.connections: dict[Connection, None] = {}
        self._waiting: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def lag(self) -> float:
        """How long something takes from one end to the other."""
        return self.lag_s * (0.5 + self.dice.random())

    def send(self, after: float, callback: Callable[..., object], *args: Any) -> float:
        """Bring something to the other end, behind what arrives at ``after``; returns when it arrives."""
        at = max(after, self.timeline.now + self.lag())
        self.timeline.at(at, self.arrive, callback, args)
        return at

    def arrive(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        if self.cut:
            self._waiting.append((callback, args))
        else:
            callback(*args)

    def sever(self) -> None:
        """Nothing passes any more."""
        self.cut = True
        self._cuts += 1
        for connection in list(self.connections):
            connection.watch()
            patience = self.dice.uniform(SILENCE_LEAST_S, SILENCE_MOST_S)
            self.timeline.after(patience, self._give_up, connection.session, self._cuts)

    def mend(self) -> None:
        """It is whole again: what was written in between arrives."""
        self.cut = False
        waiting, self._waiting = self._waiting, []
        for callback, args in waiting:
            self.timeline.after(0.0, self.arrive, callback, args)

    def _give_up(self, session: Session, cut: int) -> None:
        if self.cut and cut == self._cuts:  # it has not been heard of in between
            self.database.end(session, self.timeline.now, silently=True)


class Connections:
    """A process's way to the database (``hookd.postgres.connect.Database``)."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.described = "postgresql://model"

    async def connect(self, purpose: str, *, lasting: bool = False) -> Connection:
        """
        Open a session.

        Raises:
            DatabaseUnavailable: the server is down, or cannot be reached.
        """
        link = self._link
        left_s = CONNECT_TIMEOUT_S
        for again_s in RESENT_S:
            if not link.cut:
                break
            await asyncio.sleep(min(again_s, left_s))
            left_s -= again_s
            if left_s <= 0:
                raise DatabaseUnavailable("the connection timed out")
        await asyncio.sleep(link.lag() * 6)
        if link.cut or not link.database.up:
            raise DatabaseUnavailable("connection refused")
        return Connection(link, link.database.connect(purpose))


class Connection:
    """One session, from its client's side."""

    def __init__(self, link: Link, session: Session) -> None:
        self._link = link
        self._loop = link.loop
        self.session = session
        self.closed = False
        self._statement: Statement | None = None
        self._terminated: list[Callable[[Any], None]] = []
        self._listeners: list[Callable[[Any, int, str, str], None]] = []
        self._there_at = self._here_at = 0.0
        """When what was written last arrives at the other end: nothing overtakes."""
        session.lost = lambda error: self._tell(self._lost, error)
        session.notify = lambda payload: self._tell(self._notified, payload)
        link.connections[self] = None

    # What hookd calls.

    def get_server_pid(self) -> int:
        return self.session.pid

    def is_closed(self) -> bool:
        return self.closed

    def add_termination_listener(self, callback: Callable[[Any], None]) -> None:
        self._terminated.append(callback)

    async def add_listener(self, channel: str, callback: Callable[[Any, int, str, str], None]) -> None:
        self._listeners.append(callback)
        await self._ask(LISTEN, (), None)

    async def set_type_codec(self, *_: Any, **__: Any) -> None:
        await self._ask("select 1", (), None)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        rows = await self._ask(query, args, timeout)
        return f"DONE {len(rows)}"

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]:
        rows: list[Any] = await self._ask(query, args, timeout)
        return rows

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        rows = await self._ask(query, args, timeout)
        return rows[0] if rows else None

    async def fetchval(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        rows = await self._ask(query, args, timeout)
        return rows[0][0] if rows else None

    async def copy_records_to_table(
        self, table: str, *, schema_name: str, columns: Sequence[str], records: Iterable[Any]
    ) -> None:
        await self._ask(COPY, (list(records),), None)

    def transaction(self) -> OneTransaction:
        return OneTransaction(self)

    async def close(self, timeout: float | None = None) -> None:
        if not self.closed:
            self.terminate()

    def terminate(self) -> None:
        """Close it without a word; the server learns of it if it can."""
        if not self.closed:
            self.hang_up()
            self._close(
                asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
            )

    # A statement's way.

    def _tell(self, callback: Callable[..., object], *args: Any) -> None:
        """From the server to the client."""
        self._here_at = self._link.send(self._here_at, callback, *args)

    def hang_up(self) -> None:
        """From the client to the server: it is over."""
        link = self._link
        link.send(self._there_at, lambda: link.database.end(self.session, link.timeline.now))

    async def _ask(self, query: str, args: Sequence[Any], timeout: float | None) -> Any:
        if self.closed:
            raise asyncpg.InterfaceError("cannot perform operation: connection is closed")
        if self._statement is not None:
            raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
        statement = self._statement = Statement(query, args, self._loop.create_future(), timeout)
        link = self._link
        if link.cut:
            self.watch()
        self._there_at = link.send(
            max(self._there_at, link.timeline.now) + link.server_s(query), self._run, statement
        )
        try:
            return await statement.future
        except asyncio.CancelledError:
            # a request to cancel goes out: what was not run yet is not run
            statement.called_off = True
            raise
        finally:
            if self._statement is statement:
                self._statement = None

    def _run(self, statement: Statement) -> None:
        """At the server."""
        link, session, database = self._link, self.session, self._link.database
        if not session.alive:
            # nobody is there any more: the answer is a reset
            self._tell(
                self._lost,
                asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
            )
            return
        if statement.called_off:
            if session.tx is not None:
                session.tx.failed = True
            return
        breaks = link.breaks(statement.query)
        if breaks == "before":
            database.end(
                session,
                link.timeline.now,
                asyncpg.AdminShutdownError("terminating connection due to administrator command"),
            )
            return
        answer: Any = None
        error = link.fails(self, statement.query)
        if error is None:
            try:
                answer = self._executed(statement)
            except Blocked as blocked:
                blocked.holder.waiters.append(lambda: link.timeline.after(0, self._run, statement))
                self.watch()
                return
            except (asyncpg.PostgresError, ValueError) as refused:
                error = refused
        if error is not None and session.tx is not None:
            session.tx.failed = True
        if breaks == "after":
            # before the answer is on its way
            database.end(
                session,
                link.timeline.now,
                asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
            )
            return
        self._here_at = max(self._here_at, link.timeline.now) + link.answer_s(statement.query)
        self._tell(self._answer, statement, answer, error)

    def _executed(self, statement: Statement) -> Any:
        session, database, query = self.session, self._link.database, statement.query
        if query == BEGIN:
            database.begin(session)
        elif query == COMMIT:
            assert session.tx is not None
            if session.tx.failed:
                database.rollback(session.tx)
            else:
                database.commit(session.tx)
        elif query == ROLLBACK:
            if session.tx is not None:
                database.rollback(session.tx)
        elif query == COPY:
            database.copy_attempts(session, statement.args[0])
        else:
            return database.run(session, query, statement.args)
        return None

    def _answer(self, statement: Statement, answer: Any, error: Exception | None) -> None:
        """At the client."""
        statement.answered = True
        if self._loop.dead or statement.future.done():
            return
        if error is not None:
            statement.future.set_exception(error)
        else:
            statement.future.set_result(answer)

    def watch(self) -> None:
        """The statement under way may take long: its deadline counts from here on."""
        statement = self._statement
        if statement is not None and statement.timeout is not None:
            self._link.timeline.after(statement.timeout, self._timed_out, statement)

    def _timed_out(self, statement: Statement) -> None:
        if not statement.future.done() and not self._loop.dead:
            statement.called_off = True
            statement.future.set_exception(TimeoutError())

    # Its end.

    def _lost(self, error: Exception) -> None:
        if not self.closed:
            self._close(error)

    def _close(self, error: Exception) -> None:
        self.closed = True
        self._link.connections.pop(self, None)
        if self._statement is not None and not self._statement.future.done() and not self._loop.dead:
            self._statement.future.set_exception(error)
        if not self._loop.dead:
            for callback in self._terminated:
                self._loop.call_soon(callback, self)

    def _notified(self, payload: str) -> None:
        if not self.closed and not self._loop.dead:
            for callback in self._listeners:
                self._loop.call_soon(callback, self, self.session.pid, "hookd", payload)


class OneTransaction:
    """``async with connection.transaction()``"""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def __aenter__(self) -> None:
        await self._connection._ask(BEGIN, (), None)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection.closed:
            raise asyncpg.InterfaceError(
                "cannot call Transaction.__aexit__(): the underlying connection is closed"
            )
        await self._connection._ask(COMMIT if kind is None else ROLLBACK, (), None)
