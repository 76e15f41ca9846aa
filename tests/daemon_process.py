"""The daemon as a real subprocess."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

START_DEADLINE_S = 60.0

DEFAULTS = {
    "HOOKD_NETWORK__ALLOW": '["127.0.0.0/8", "::1/128"]',
    "HOOKD_ADMIN__LISTEN": "127.0.0.1:0",
    "HOOKD_LOG__FORMAT": "json",
}


PLANTED: set[str] = set()
"""What no daemon of this run may ever print: secrets that tests have made.  Every daemon's log is searched when it has ended."""

A_SECRET = re.compile(r"wh(?:sec|sk)_[A-Za-z0-9+/]{16}")


class DaemonProcess:
    """``hookd run``, and what it said."""

    def __init__(self, folder: Path, environment: dict[str, str], prefix: Sequence[str] = ()) -> None:
        """``prefix`` is a command that runs the daemon: in a network of its own, or with other limits."""
        # appended to: the daemon shares the offset that log() moves, and would write over what it has said
        self._said = (folder / f"daemon-{time.monotonic_ns()}.log").open("a+", encoding="utf-8")
        self._passwords = {p for p in [urlsplit(environment.get("HOOKD_DATABASE__DSN", "")).password] if p}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HOOKD_")}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "hookd", "run"],
            env=inherited | DEFAULTS | environment,
            cwd=folder,
            stdout=self._said,
            stderr=self._said,
        )

    def log(self) -> list[dict[str, Any]]:
        """All lines so far."""
        self._said.seek(0)
        lines = []
        for line in self._said.read().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                lines.append({"event": line})
        return lines

    def said(self, event: str) -> list[dict[str, Any]]:
        """The lines about one thing."""
        return [line for line in self.log() if line["event"].startswith(event)]

    def wait_for(self, event: str, deadline_s: float = START_DEADLINE_S) -> dict[str, Any]:
        """Wait until it has said something."""
        until = time.monotonic() + deadline_s
        while not (found := self.said(event)):
            assert self.process.poll() is None, f"the daemon ended: {self.log()}"
            assert time.monotonic() < until, f"never said {event!r}: {self.log()}"
            time.sleep(0.02)
        return found[0]

    def wait_ready(self) -> None:
        """Wait until it delivers."""
        self.wait_for("ready")

    @property
    def admin(self) -> str:
        """The URL of its admin server."""
        return str(self.wait_for("ready")["admin"])

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def stop(self, deadline_s: float = 60.0) -> int:
        """Drain and stop; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline_s)

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        if not self._said.closed:
            try:
                self._said.seek(0)
                self._search(self._said.read())
            finally:
                self._said.close()

    def _search(self, text: str) -> None:
        found = [secret for secret in PLANTED | self._passwords if secret in text]
        found += A_SECRET.findall(text)
        assert not found, f"the daemon has printed {found}"


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 60.0) -> None:
    """Wait for a condition, with a deadline."""
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.02)
