"""URLs and addresses that people have tried, and ordinary ones: plain text, one a line, with what is to be said of each."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent

ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|(\\))")


def read(name: str) -> list[tuple[str, ...]]:
    """The lines of a file, each as its fields; the first is freed from its escapes."""
    found = []
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("#"):
            first, *rest = line.split(" | ")
            found.append((ESCAPE.sub(_character, first), *rest))
    return found


def _character(match: re.Match[str]) -> str:
    return "\\" if match[3] else chr(int(match[1] or match[2], 16))
