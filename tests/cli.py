"""The command line as a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class Cli:
    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder

    def __call__(
        self, *arguments: str, stdin: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hookd", *arguments],
            env={
                "PATH": "/usr/bin:/bin", "HOOKD_DATABASE__DSN": self.dsn, "HOOKD_NETWORK__ALLOW": '["127.0.0.0/8"]',
                "HOOKD_RETRY__SCHEDULE": "[]", **environment,
            },
            input=stdin, capture_output=True, text=True, cwd=self.folder, check=False, timeout=60,
        )  # fmt: skip

    def ok(self, *arguments: str, **more: Any) -> str:
        done = self(*arguments, **more)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    def json(self, *arguments: str, **more: Any) -> list[Any]:
        return [json.loads(line) for line in self.ok(*arguments, "--json", **more).splitlines()]

    def fails(self, status: int, *arguments: str, **more: Any) -> str:
        done = self(*arguments, **more)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stderr
