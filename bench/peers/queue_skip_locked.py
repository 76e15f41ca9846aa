"""
The textbook queue: select for update skip locked, work, delete, commit; in batches, so that it has a chance.

Five sessions hold a batch each in an open transaction while its requests are made, so a crash gives the rows back.
"""

from __future__ import annotations

import asyncio

import asyncpg
import uvloop
from post import jobs, post, session, wanted

SESSIONS = 5

CLAIM = "select id, job from queue order by id for update skip locked limit $1"
DONE = "delete from queue where id = any($1::bigint[])"


async def main() -> None:
    doing, dsn, given = wanted()
    if doing == "fill":
        connection = await asyncpg.connect(dsn)
        await connection.execute(
            "create table queue (id bigint generated always as identity primary key, job text not null)"
        )
        await connection.copy_records_to_table("queue", records=[(j,) for j in jobs(given)], columns=["job"])
        await connection.close()
        return
    async with session() as client, asyncio.TaskGroup() as group:
        for _ in range(SESSIONS):
            connection = await asyncpg.connect(dsn)

            async def work(connection: asyncpg.Connection = connection) -> None:
                while True:
                    async with connection.transaction():
                        rows = await connection.fetch(CLAIM, max(1, given["concurrency"] // SESSIONS))
                        await asyncio.gather(*(post(client, r["job"].encode()) for r in rows))
                        await connection.execute(DONE, [r["id"] for r in rows])
                    if not rows:
                        await asyncio.sleep(0.1)

            group.create_task(work())


uvloop.run(main())
