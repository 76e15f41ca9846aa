"""
The recorder: verdicts into PostgreSQL, in batches.

Results gather while one batch is being written; the next one takes all that came, up to ``BATCH_MOST``, or waits up to
``LINGER_S`` for more when there are few.  There is one writer, so batches are written in order.

A result leaves the recorder only when its batch was committed.  When the session is lost the batch stays, and is
settled again on the next session, before that one recovers; the results of shards that are not ours any more are
dropped there, and their new owner sends again.  Above ``HIGH_WATER`` unwritten results ``backed_up`` says so, and the
dispatcher starts nothing until it has sunk: PostgreSQL being slow slows the sending, it does not fill memory.

A batch that PostgreSQL refuses for its data is halved until the culprit stands alone; that one is written without what
its receiver answered.  One hostile answer must not undo 499 good verdicts again and again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from hookd.core.histogram import Histogram
from hookd.core.model import RETRY, DeliveryId, EndpointKey, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hookd.clock import Clock
    from hookd.core.model import Delivery

BATCH_MOST = 1000
BATCH_ENOUGH = 250
LINGER_S = 0.02
"""From when the first result of a batch came.  Nobody waits for it: the receiver has had its event."""

LINGER_ORDERED_S = 0.002
"""The same when one of them has an order key: the next of its key waits for it.  With 20 ms a key made 37 deliveries a
second on an idle machine, with 2 ms it makes three times as many."""

HIGH_WATER = 5000

BATCH_BOUNDS = (1, 5, 10, 25, 50, 100, 250, 500, 1000)
SETTLE_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Settlement(Protocol):
    """What a settle wrote."""

    ids: set[DeliveryId]
    due_at: dict[DeliveryId, float]
    disabled: list[EndpointKey]
    statements: int


class Ledger(Protocol):
    """Where results are settled (``postgres.owner``)."""

    shards: set[int]

    async def settle(self, results: Sequence[Result]) -> Settlement: ...


class Followers(Protocol):
    """Who wants to know what was committed (the feed)."""

    def settled(
        self,
        final: Sequence[Delivery],
        rescheduled: Sequence[tuple[Delivery, float]],
        *,
        dropped: Sequence[Delivery],
    ) -> None: ...


class Recorder:
    """Gathers results and settles them."""

    def __init__(
        self, clock: Clock, *, refused: type[Exception], report: Callable[[str, Result], None]
    ) -> None:
        """``refused`` is what the ledger raises for data; ``report`` is told of results that could not be written."""
        self._clock = clock
        self._refused = refused
        self._report = report
        self._results: deque[Result] = deque()
        self._oldest_mono = 0.0
        self._linger_s = LINGER_S
        self._came = asyncio.Event()
        self._written = asyncio.Event()
        self.batches = 0
        self.statements = 0
        self.settled = 0
        self.dropped = 0
        """Results that were not written because their shard has another owner now: it may send them again."""
        self.batch_rows = Histogram(BATCH_BOUNDS)
        self.settle_s = Histogram(SETTLE_BOUNDS_S)

    def __repr__(self) -> str:
        return f"<Recorder unwritten={len(self._results)} batches={self.batches}>"

    def add(self, result: Result) -> None:
        """Take charge of a result."""
        if not self._results:
            self._oldest_mono = self._clock.mono()
        self._results.append(result)
        hurry = result.delivery.order_key is not None and self._linger_s != LINGER_ORDERED_S
        if hurry:
            self._linger_s = LINGER_ORDERED_S
        if hurry or len(self._results) == 1 or len(self._results) == BATCH_ENOUGH:
            self._came.set()

    def backed_up(self) -> bool:
        """Whether so much is unwritten that nothing more should be started."""
        return len(self._results) >= HIGH_WATER

    def unwritten(self) -> list[Delivery]:
        """The deliveries whose results are not committed yet."""
        return [r.delivery for r in self._results]

    def unwritten_since(self, wall: float) -> float:
        """When the oldest attempt began whose result is not committed; ``wall`` where there is none."""
        return min(
            (r.outcome.started_at if r.outcome else r.written_wall for r in self._results), default=wall
        )

    async def empty(self) -> None:
        """Wait until all is written."""
        while self._results:
            self._written.clear()
            await self._written.wait()

    async def run(self, ledger: Ledger, followers: Followers | None, *, until_empty: bool = False) -> None:
        """
        Settle on this session until cancelled, or until nothing is left.

        Raises what the ledger raises for a lost session; what was not committed stays.
        """
        while True:
            while not self._results:
                if until_empty:
                    return
                self._came.clear()
                await self._came.wait()
            await self._linger(until_empty=until_empty)
            self._linger_s = LINGER_S
            batch = list(islice(self._results, BATCH_MOST))
            await self._settle(batch, ledger, followers)
            self._oldest_mono = self._clock.mono()

    async def _linger(self, *, until_empty: bool) -> None:
        while not until_empty and len(self._results) < BATCH_ENOUGH:
            left = self._oldest_mono + self._linger_s - self._clock.mono()
            if left <= 0:
                return
            self._came.clear()
            try:
                async with asyncio.timeout(left):
                    await self._came.wait()
            except TimeoutError:
                return

    async def _settle(self, batch: Sequence[Result], ledger: Ledger, followers: Followers | None) -> None:
        """Settle the oldest results, and let go of them: in halves where PostgreSQL refuses one."""
        ours = [r for r in batch if r.delivery.shard in ledger.shards]
        begun = self._clock.mono()
        try:
            done = await ledger.settle(ours) if ours else None
        except self._refused as error:
            if len(batch) == 1:
                await self._settle_alone(batch[0], str(error), ledger, followers)
                return
            half = len(batch) // 2
            await self._settle(batch[:half], ledger, followers)
            await self._settle(batch[half:], ledger, followers)
            return
        self.dropped += len(batch) - len(ours)
        # each half by itself: what was settled and still passed for unwritten would not be forwarded to a shard that its
        # endpoint had moved to (simulation, seed 35248)
        self._let_go(batch)
        if done is not None:
            self.batch_rows.observe(len(ours))
            self.settle_s.observe(self._clock.mono() - begun)
            self.batches += 1
            self.statements += done.statements
            self.settled += len(done.ids)
        if followers is None:
            return
        if done is not None and not done.due_at and len(done.ids) == len(batch):
            # all of it was settled for good, which is the rule
            followers.settled([r.delivery for r in batch], (), dropped=())
            return
        ids = done.ids if done else set()
        due_at = done.due_at if done else {}
        followers.settled(
            [r.delivery for r in ours if r.delivery.id in ids and r.verdict.kind is not RETRY],
            [(r.delivery, due_at[r.delivery.id]) for r in ours if r.delivery.id in due_at],
            dropped=[r.delivery for r in batch if r.delivery.id not in ids],
        )

    def _let_go(self, batch: Sequence[Result]) -> None:
        for _ in batch:
            self._results.popleft()
        self._written.set()

    async def _settle_alone(
        self, result: Result, problem: str, ledger: Ledger, followers: Followers | None
    ) -> None:
        outcome = result.outcome
        if outcome is not None and (outcome.headers or outcome.body or outcome.url):
            outcome.headers = outcome.body = outcome.url = ""
            self._report(f"an answer could not be stored and was left out: {problem}", result)
            await self._settle([result], ledger, followers)
            return
        # Its row stays in the queue, and its id stays known to the feed, so that it is not sent again and again.
        self._let_go([result])
        self._report(
            f"a result could not be stored; its delivery waits for the next start: {problem}", result
        )
