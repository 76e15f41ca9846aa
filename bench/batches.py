"""
What the size of a settling batch is worth: deliveries a second and CPU by the most and the least that one transaction
writes, and by how long it waits for more.

    python bench/batches.py [--deliveries 20000] [--json]

The recorder's constants are set before the daemon starts; everything else is as it is.  Each point drains the same
backlog; the first and the last are the constants as they are, so that a machine that has changed meanwhile is seen.
There is no goal: the curve is why the constants are what they are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import asyncpg
from stage import INSERT, Stage

from hookd import recorder

HOSTS = 20
PAYLOAD = 1024
SIZES = (1, 10, 50, 100, 250, 500, 1000, 2000)
LINGERS_S = (0.0, 0.002, 0.01, 0.02, 0.05, 0.1)
AS_IT_IS = {
    "BATCH_MOST": recorder.BATCH_MOST, "BATCH_ENOUGH": recorder.BATCH_ENOUGH, "LINGER_S": recorder.LINGER_S,
}  # fmt: skip


async def drained(stage: Stage, deliveries: int, constants: dict[str, float]) -> dict[str, Any]:
    connection = await asyncpg.connect(stage.dsn)
    await connection.execute(INSERT, deliveries, HOSTS, PAYLOAD)
    await connection.execute("checkpoint")
    stage.stats()
    postgres = stage.postgres_cpu_s()
    settings = "; ".join(f"r.{name} = {value!r}" for name, value in constants.items())
    program = f"import hookd.recorder as r; {settings}; from hookd.commands import main; main()"
    daemon = stage.daemon(("-c", program))
    started = daemon.cpu_s()
    settled = await stage.drained(connection)
    stats = stage.stats()
    found = {
        "per_s": deliveries / (settled - stats["first"]),
        "cpu_us": (daemon.cpu_s() - started) / deliveries * 1e6,
        "postgres_us": (stage.postgres_cpu_s() - postgres) / deliveries * 1e6,
    }
    daemon.stop()
    await connection.close()
    return {"constants": constants} | found


async def curve(stage: Stage, deliveries: int) -> list[dict[str, Any]]:
    await stage.fresh_database()
    for n in range(HOSTS):
        await stage.add_endpoints([stage.host(n)], "/hook", [f"tenant-{n}"])
    points: list[dict[str, float]] = [AS_IT_IS]
    points += [AS_IT_IS | {"BATCH_MOST": size, "BATCH_ENOUGH": size} for size in SIZES]
    points += [AS_IT_IS | {"LINGER_S": linger} for linger in LINGERS_S]
    return [await drained(stage, deliveries, point) for point in [*points, AS_IT_IS]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--deliveries", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    stage = Stage()
    try:
        found = asyncio.run(curve(stage, given.deliveries))
    finally:
        stage.close()
    if given.json:
        print(json.dumps(found))
        return
    print(
        f"{given.deliveries:,} deliveries, {HOSTS} hosts, {PAYLOAD} B; the first and last line are the constants as they are"
    )
    print("  at most  enough  waits ms  deliveries/s  µs CPU  PostgreSQL µs")
    for row in found:
        constants = row["constants"]
        print(
            f"  {constants['BATCH_MOST']:7,}  {constants['BATCH_ENOUGH']:6,}  {constants['LINGER_S'] * 1000:8g}"
            f"  {row['per_s']:12,.0f}  {row['cpu_us']:6.1f}  {row['postgres_us']:13.1f}"
        )


if __name__ == "__main__":
    main()
