"""PgQueuer, with batches as large as its limit on concurrency lets them be."""

from __future__ import annotations

from typing import Any

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries
from post import jobs, post, session, wanted

AT_ONCE = 5000


async def main() -> None:
    doing, dsn, given = wanted()
    if doing == "fill":
        connection = await asyncpg.connect(dsn)
        queries = Queries(AsyncpgDriver(connection))
        await queries.install()
        ready = [job.encode() for job in jobs(given)]
        for start in range(0, len(ready), AT_ONCE):
            part = ready[start : start + AT_ONCE]
            await queries.enqueue(["post"] * len(part), list(part), [0] * len(part))
        await connection.close()
        return
    async with asyncpg.create_pool(dsn, min_size=4, max_size=8) as pool, session() as client:
        queuer = PgQueuer.from_asyncpg_pool(pool)

        async def send(job: Any) -> None:
            await post(client, job.payload)

        queuer.entrypoint("post")(send)
        await queuer.run(batch_size=given["concurrency"] // 2, max_concurrent_tasks=given["concurrency"])


uvloop.run(main())
