"""
The baseline: a tuned loop around ``aiohttp.ClientSession.post``, with no database, no signing and no limits.

    python bench/bare.py URLS-AS-JSON REQUESTS CONCURRENCY PAYLOAD-BYTES

Tuned: uvloop, no connection limit, no DNS cache look-ups, constant headers, the garbage collector frozen and its
thresholds raised as hookd's are.  Prints requests, seconds and CPU seconds as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time

import aiohttp
import uvloop

from hookd.daemon import GC_THRESHOLDS

WARM_UP = 2000


async def main(urls: list[str], requests: int, concurrency: int, size: int) -> None:
    bodies = [
        b'{"type":"bench.made","timestamp":"2026-11-23T20:15:00.000Z","data":%b}'
        % (b'{"n": %06d, "fill": "%b"}' % (n, b"x" * size))
        for n in range(min(requests, 1000))
    ]
    headers = {
        "content-type": "application/json",
        "user-agent": "bare",
        "webhook-id": "0190d5f0-0000-7000-8000-000000000000",
        "webhook-timestamp": "1732392900",
        "webhook-signature": "v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4=",
    }
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

        async def work(numbers: list[int]) -> None:
            while numbers:
                n = numbers.pop()
                async with session.post(
                    urls[n % len(urls)], data=bodies[n % len(bodies)], headers=headers
                ) as answer:
                    await answer.read()

        async def batch(count: int) -> None:
            numbers = list(range(count))
            await asyncio.gather(*(work(numbers) for _ in range(concurrency)))

        await batch(WARM_UP)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        begun, cpu = time.perf_counter(), time.process_time()
        await batch(requests)
        print(json.dumps({
            "requests": requests, "seconds": time.perf_counter() - begun, "cpu_s": time.process_time() - cpu,
        }))  # fmt: skip


if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1]), *map(int, sys.argv[2:5])))
