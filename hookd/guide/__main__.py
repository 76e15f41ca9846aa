"""``python -m hookd.guide > docs/receiving.md``: the guide as it is for every sender, with the defaults."""

from __future__ import annotations

import sys

from hookd.config import Config
from hookd.guide.catalogue import Catalogue
from hookd.guide.writing import one_file, write

HEADING = "Receiving webhooks"

INTRODUCTION = """\
<!-- Written by `python -m hookd.guide`; change hookd/guide/text and run it again. -->

For whoever writes the receiving side. Figures are the defaults; `hookd docs` writes the same with yours, and with your events."""


def receiving() -> str:
    """``docs/receiving.md``."""
    return one_file(write(Config(), Catalogue(), for_everybody=True), HEADING, INTRODUCTION)


if __name__ == "__main__":
    sys.stdout.write(receiving())
