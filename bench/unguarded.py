"""hookd without what keeps a receiver from answering a request that it was never asked: for torture.py to catch.

A connection that speaks while nobody asked is used all the same, and what it said is taken for the next answer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hookd.commands import main
from hookd.net.line import Line

if TYPE_CHECKING:
    from hookd.net.line import Asker

SAID: dict[int, bytes] = {}


def silent(self: Line) -> bool:
    return not self._transport.is_closing()


def ask(self: Line, asker: Asker) -> None:
    guarded_ask(self, asker)
    said = SAID.pop(id(self), b"")
    if said:
        asyncio.get_running_loop().call_soon(self.data_received, said)


def data_received(self: Line, data: bytes) -> None:
    if self._asker is None:
        SAID[id(self)] = SAID.get(id(self), b"") + data
    else:
        guarded_data_received(self, data)


guarded_ask, guarded_data_received = Line.ask, Line.data_received
for name, unguarded in (("silent", silent), ("ask", ask), ("data_received", data_received)):
    setattr(Line, name, unguarded)

if __name__ == "__main__":
    main()
