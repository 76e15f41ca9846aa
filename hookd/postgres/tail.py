"""
The attempt log as it grows: each row once, none left out.

An attempt is dated by when it began and committed when its batch is, so a cursor over ``at`` would step past every slow
one.  What is new since the last look is what the snapshot of then did not show and the snapshot of now does: rows carry
the transaction that inserted them (``xmin``, 32 bits, widened here by the snapshot's own 64; the owner writes attempts outside
of savepoints, whose ids snapshots do not tell of).  No column and no index is
needed for it, only a bound on how far back to look.  That bound is exact too: every daemon says each second since when it
has attempts that are not committed (``unsettled_since`` in its summary).  What was uncommitted at the last look began
after that, so the rows looked through are those of the slowest exchange under way, whatever the log holds.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hookd.postgres.status import PIN_PLANS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    import asyncpg

PAGE = 1000

LOOKED_THROUGH = 100_000
"""Attempts that are looked through for the last ones that match."""

SILENT_DAEMON_S = 60.0
"""A daemon's claim is believed for so long after it was last heard of; afterwards its row is purged too."""

NO_DAEMON_S = 60.0
"""How far back to look where no daemon says anything, and before the claim of one that makes none."""

CLOCKS_S = 2.0
"""By how much clocks may differ for a daemon that started and ended between two looks."""

NEW_DAEMON_MOST_S = 3600.0
"""A daemon that was not heard of before may have kept attempts for so long, while PostgreSQL was away."""

LOOK = """
select pg_current_snapshot()::text as snapshot, clock_timestamp() as at,
       coalesce((select json_agg(json_build_object(
                          'id', n.id, 'started_at', extract(epoch from n.started_at), 'seen_at', extract(epoch from n.seen_at),
                          'since', n.summary -> 'unsettled_since'))
                   from hookd.node n), '[]')::text as daemons
"""

ROWS = """
select a.at, a.delivery_id, a.event_id, e.id as endpoint_id, coalesce(v.tenant, e.tenant) as tenant, v.type,
       coalesce(a.url, e.url) as url, a.attempt, a.status, a.verdict, a.outcome, a.reason, a.retry_at, a.sent, a.resent,
       a.reused, a.replay, a.total_ms, a.dns_ms, a.connect_ms, a.tls_ms, a.first_byte_ms, a.answer_headers, a.answer_body,
       a.answer_truncated
"""

MATCHING = """
  left join hookd.endpoint e on e.key = a.endpoint
  left join hookd.event v on v.id = a.event_id
 where ($1::uuid is null or e.id = $1)
   and ($2::uuid is null or a.event_id = $2)
   and ($3::text is null or coalesce(v.tenant, e.tenant) = $3)
   and ($4::text is null or $4 = any(hookd.type_patterns(v.type)))
   and ($5::text[] is null or a.verdict = any($5) or a.outcome = any($5)
        or a.status::text = any($5) or (a.status / 100) || 'xx' = any($5))
"""

# The transaction of a row, in 64 bits: the one that is nearest to the snapshot's end ($7).  Then: not shown by the earlier
# snapshot (its end $6, and what was under way then), and shown by the present one.
XID = "$7::bigint + 2147483648 - (($7::bigint + 2147483648 - a.xmin::text::bigint) & 4294967295) as xid"

BETWEEN = """
   and (a.xid >= $6::bigint or a.xid = any($8::bigint[]))
   and a.xid < $7::bigint and a.xid <> all($9::bigint[])
"""

# The same where the transactions between the two are few enough to be named: a million rows are looked through in 0.5 s, where
# the arithmetic of BETWEEN took 2 to 3 s.
NAMED = "and a.xmin = any($6::xid[])"

NAMED_MOST = 100_000


def _after(source: str, condition: str, first: int) -> str:
    """A page of what came after a place, whose parameters begin at ``first``."""
    at, delivery, attempt = (f"${first + n}" for n in range(3))
    return f"""
{ROWS}
  from ({source} where a.at >= {at}::timestamptz {condition}) a
{MATCHING}{BETWEEN if condition == "" else ""}
   and (a.at, a.delivery_id, a.attempt) > ({at}::timestamptz, {delivery}::bigint, {attempt}::smallint)
 order by a.at, a.delivery_id, a.attempt
 limit {PAGE}
"""


AFTER = _after(f"select a.*, {XID} from hookd.attempt a", "", 10)
AFTER_NAMED = _after("select a.* from hookd.attempt a", NAMED, 7)

LAST = f"""
{ROWS}
  from (select a.*, {XID}
          from hookd.attempt a
         where $2::uuid is null or a.event_id = $2
         order by a.at desc
         limit {LOOKED_THROUGH}) a
{MATCHING}{BETWEEN}
 order by a.at desc, a.delivery_id desc, a.attempt desc
 limit $10
"""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which attempts; None: all."""

    endpoint: UUID | None = None
    event: UUID | None = None
    tenant: str | None = None
    type_pattern: str | None = None
    outcomes: list[str] | None = None
    """Verdicts (``delivered``), outcomes (``timeout``), statuses (``503``) or their classes (``5xx``): any of them."""

    def arguments(self) -> tuple[Any, ...]:
        """In the order of ``MATCHING``."""
        return (self.endpoint, self.event, self.tenant, self.type_pattern, self.outcomes)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Which transactions were committed at a moment (``pg_snapshot``)."""

    end: int
    """The first one that had not begun."""
    under_way: list[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """As PostgreSQL prints it: ``xmin:xmax:xip,xip``."""
        _, end, under_way = text.split(":")
        return cls(int(end), [int(xid) for xid in under_way.split(",") if xid])

    def until(self, later: Snapshot) -> list[int] | None:
        """Which transactions ended between the two, as ``xmin`` has them; None where they are too many to be named."""
        if not 0 <= self.end >= later.end - NAMED_MOST:
            return None
        still = set(later.under_way)
        ended = {*range(self.end, later.end), *self.under_way} - still
        return [xid & 0xFFFFFFFF for xid in ended]


EVERYTHING = Snapshot(-1, [])
"""As an earlier snapshot: what it did not show is all."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a daemon said of itself."""

    since: float
    """It has no attempt uncommitted that began before then."""
    heard: float


class Tail:
    """Reads what is new, from one look to the next; ``connection`` may be replaced between them."""

    def __init__(self, connection: asyncpg.Connection, choice: Choice) -> None:
        self.connection = connection
        self._choice = choice
        self._seen = EVERYTHING
        self._claims: dict[str, Claim] = {}
        self._at = 0.0
        """Of the last look, by the database's clock."""

    async def last(self, count: int) -> list[dict[str, Any]]:
        """Begin now, with the last ones that match, oldest first."""
        now, _ = await self._look()
        found: list[dict[str, Any]] = []
        if count:
            found = await self._fetch(LAST, *_bounds(EVERYTHING, now), count)
        self._seen = now
        return found[::-1]

    async def since(self, at: datetime.datetime) -> AsyncIterator[list[dict[str, Any]]]:
        """Begin at a moment: what was committed and began since then, in pages."""
        now, _ = await self._look()
        async for page in self._between(EVERYTHING, now, at):
            yield page
        self._seen = now

    async def news(self) -> AsyncIterator[list[dict[str, Any]]]:
        """What was committed since the last look, in pages, in the order in which it began."""
        began = self._began()
        now, newcomers = await self._look()
        began = min([began, *newcomers])
        seen = self._seen
        if now.end < seen.end:
            # a standby was promoted that had not heard of all: transaction ids begin again, some lines come twice
            seen, began = EVERYTHING, began - NO_DAEMON_S
        async for page in self._between(seen, now, datetime.datetime.fromtimestamp(began, datetime.UTC)):
            yield page
        self._seen = now

    def _began(self) -> float:
        """Before this nothing began that was uncommitted at the last look."""
        if not self._claims:
            return self._at - NO_DAEMON_S
        return min([self._at - CLOCKS_S, *(claim.since for claim in self._claims.values())])

    async def _look(self) -> tuple[Snapshot, list[float]]:
        """The snapshot of now, and since when the daemons run that were not heard of before; takes in all claims."""
        row = await self.connection.fetchrow(LOOK)
        assert row is not None
        self._at = row["at"].timestamp()
        newcomers = []
        for said in json.loads(row["daemons"]):
            if said["id"] not in self._claims:
                newcomers.append(max(said["started_at"], self._at - NEW_DAEMON_MOST_S))
            since = said["since"] if said["since"] is not None else said["seen_at"] - NO_DAEMON_S
            self._claims[said["id"]] = Claim(since, self._at)
        self._claims = {
            name: claim for name, claim in self._claims.items() if claim.heard > self._at - SILENT_DAEMON_S
        }
        return Snapshot.parse(row["snapshot"]), newcomers

    async def _between(
        self, seen: Snapshot, now: Snapshot, began: datetime.datetime
    ) -> AsyncIterator[list[dict[str, Any]]]:
        place: tuple[Any, ...] = (began, -1, -1)
        ended = seen.until(now)
        while ended is None or ended:
            if ended is None:
                page = await self._fetch(AFTER, *_bounds(seen, now), *place)
            else:
                page = await self._fetch(AFTER_NAMED, ended, *place)
            if page:
                yield page
            if len(page) < PAGE:
                return
            place = (page[-1]["at"], page[-1]["delivery_id"], page[-1]["attempt"])

    async def _fetch(self, sql: str, *arguments: Any) -> list[dict[str, Any]]:
        async with self.connection.transaction():
            await self.connection.execute(PIN_PLANS)
            rows = await self.connection.fetch(sql, *self._choice.arguments(), *arguments)
        return [dict(row) for row in rows]


def _bounds(seen: Snapshot, now: Snapshot) -> tuple[Any, ...]:
    """What ``BETWEEN`` takes."""
    return (seen.end, now.end, seen.under_way, now.under_way)
