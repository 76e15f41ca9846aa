"""What systemd is told, where it asks: ready, reloading, stopping, alive (sd_notify(3))."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send a state to ``$NOTIFY_SOCKET``; nothing happens where there is none."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


async def feed_watchdog() -> None:
    """Say that the event loop turns, twice in each ``$WATCHDOG_USEC``; for as long as this runs."""
    interval = os.environ.get("WATCHDOG_USEC", "")
    if not interval.isdigit() or int(interval) == 0:
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(interval) / 2e6)
