"""
The baseline: a tuned loop around ``aiohttp.ClientSession.post``, with no database, no signing and no limits.

    python bench/bare.py '{"urls": […], "requests": 40000, "concurrency": 500, "payload": 1024, "ca_file": ""}'

Tuned: uvloop, no connection limit, connections warm, constant headers, the garbage collector frozen and its thresholds
raised as hookd's are.  Prints a line when it is warm, then requests, seconds, CPU seconds and how much of its core it
wanted, and did not get, as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import ssl
import sys
import time
from typing import Any

import aiohttp
import uvloop
from cores import used

from hookd.daemon import GC_THRESHOLDS

WARM_UP = 2000


async def main(wanted: dict[str, Any]) -> None:
    urls: list[str] = wanted["urls"]
    concurrency: int = wanted["concurrency"]
    fill = b"x" * max(0, wanted["payload"] - 32)
    bodies = [
        b'{"type":"bench.made","timestamp":"2026-11-23T20:15:00.000Z","data":{"n": "%07d", "fill": "%b"}}'
        % (n, fill)
        for n in range(min(wanted["requests"], 1000 if wanted["payload"] < 10_000 else 50))
    ]
    headers = {
        "content-type": "application/json",
        "user-agent": "bare",
        "webhook-id": "0190d5f0-0000-7000-8000-000000000000",
        "webhook-timestamp": "1732392900",
        "webhook-signature": "v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4=",
    }
    context = ssl.create_default_context(cafile=wanted["ca_file"]) if wanted["ca_file"] else True
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60, ssl=context)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

        async def work(numbers: list[int]) -> None:
            while numbers:
                n = numbers.pop()
                async with session.post(
                    urls[n % len(urls)], data=bodies[n % len(bodies)], headers=headers
                ) as answer:
                    await answer.read()
                    if answer.status != 200:
                        raise SystemExit(f"the receiver answered {answer.status}")

        async def batch(count: int) -> None:
            numbers = list(range(count))
            await asyncio.gather(*(work(numbers) for _ in range(concurrency)))

        await batch(max(WARM_UP, 2 * concurrency, 2 * len(urls)))
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        print("warm", flush=True)
        core = wanted.get("core")
        before, cpu = used(core=core), time.process_time()
        await batch(wanted["requests"])
        spent, cpu = used(core=core) - before, time.process_time() - cpu
        print(json.dumps({
            "requests": wanted["requests"], "seconds": spent.seconds, "cpu_s": cpu, "wanted": spent.wanted, "displaced": spent.displaced,
        }))  # fmt: skip


if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1])))
