"""procrastinate, with as many jobs at once as are in flight elsewhere."""

from __future__ import annotations

import uvloop
from post import jobs, post, session, wanted
from procrastinate import App, PsycopgConnector

AT_ONCE = 1000


async def main() -> None:
    doing, dsn, given = wanted()
    app = App(connector=PsycopgConnector(conninfo=dsn, min_size=4, max_size=20))
    async with app.open_async():
        client = session()

        async def send(job: str) -> None:
            await post(client, job.encode())

        task = app.task(name="post")(send)
        if doing == "fill":
            await app.schema_manager.apply_schema_async()
            ready = [{"job": job} for job in jobs(given)]
            for start in range(0, len(ready), AT_ONCE):
                await task.batch_defer_async(*ready[start : start + AT_ONCE])
        else:
            await app.run_worker_async(
                concurrency=given["concurrency"],
                delete_jobs="successful",
                fetch_job_polling_interval=0.1,
                install_signal_handlers=False,
            )
        await client.close()


uvloop.run(main())
