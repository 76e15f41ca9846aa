"""
The request that every queue in Python makes: the same bytes and signature, by a ``ClientSession`` as good as it gets.

A job is ``URL\\nID\\nBODY``, made ready beforehand: composing the body costs a peer nothing.  Connections are kept and not
limited, the garbage collector is tuned as hookd's is.  Anything but 200 ends the run: nothing is retried here.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import hmac
import json
import sys
import time
import uuid
from typing import Any

import aiohttp

SECRET = b"0123456789abcdef0123456789abcdef"
GC_THRESHOLDS = (50_000, 20, 50)


def wanted() -> tuple[str, str, dict[str, Any]]:
    """What to do (``fill`` or ``run``), the database, and the rest."""
    return sys.argv[1], sys.argv[2], json.loads(sys.argv[3])


def jobs(given: dict[str, Any]) -> list[str]:
    """So many jobs, the hosts in turn."""
    fill = "x" * max(0, given["payload"] - 32)
    return [
        "{}\n{}\n{}".format(
            given["urls"][n % len(given["urls"])],
            uuid.uuid4(),
            f'{{"type":"bench.made","timestamp":"2026-11-23T20:15:00.000Z","data":{{"n": "{n:07d}", "fill": "{fill}"}}}}',
        )
        for n in range(given["count"])
    ]


def session() -> aiohttp.ClientSession:
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    return aiohttp.ClientSession(connector=connector, auto_decompress=False)


async def post(client: aiohttp.ClientSession, job: bytes) -> None:
    url, event_id, body = job.split(b"\n", 2)
    timestamp = str(int(time.time()))
    signed = hmac.digest(SECRET, b"%b.%b.%b" % (event_id, timestamp.encode(), body), hashlib.sha256)
    headers = {
        "content-type": "application/json",
        "user-agent": "peer",
        "webhook-id": event_id.decode(),
        "webhook-timestamp": timestamp,
        "webhook-signature": "v1," + base64.b64encode(signed).decode(),
    }
    async with client.post(url.decode(), data=body, headers=headers) as answer:
        await answer.read()
        if answer.status != 200:
            raise SystemExit(f"the receiver answered {answer.status}")
