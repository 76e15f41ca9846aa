"""
The hosts file, where the configuration names one: addresses of names without DNS.

It is read again when it has changed, so what is written there acts at the next connection.  What it says of a name is
judged by the address guard like an answer of DNS.
"""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path


class HostsFile:
    """A file as ``/etc/hosts`` is; without a path it has no names."""

    def __init__(self, path: str = "") -> None:
        self._path = Path(path) if path else None
        self._state: tuple[int, int, int] | None = None
        self._names: dict[str, tuple[str, ...]] = {}

    def addresses(self, host: str) -> tuple[str, ...]:
        """What the file says of a name, which is lower-case; nothing if it does not have it."""
        if self._path is None:
            return ()
        try:
            found = self._path.stat()
            state = (found.st_mtime_ns, found.st_size, found.st_ino)
            if state != self._state:
                self._names = _read(self._path.read_text(encoding="utf-8", errors="replace"))
                self._state = state
        except OSError:
            # it is being replaced, or gone: what it said holds until it says something else
            pass
        return self._names.get(host, ())


def _read(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        with contextlib.suppress(ValueError):
            written = str(ipaddress.ip_address(address))
            for name in names:
                known = found.get(key := name.lower().removesuffix("."), ())
                if written not in known:
                    found[key] = (*known, written)
    return found
