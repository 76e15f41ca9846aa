"""
Order keys: which delivery of each is in memory, and which one is to be read next.

A row with an order key goes into memory by one way only, as the oldest of its key, and one of a key at a time.  Whoever
meets such a row asks for the head of its key; the end of the one in memory asks for the next, and says up to where none is
left.  Transactions commit out of order, so a row can come below that.  So every one that arrives is shown (``came``), whether
there is room for it or not; and who has read on from a place (``following``) reads arrivals once more before it takes what
it found (``overtaken``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Container

    from hookd.core.model import DeliveryId, EndpointKey

Key: TypeAlias = "tuple[EndpointKey, str]"
"""An endpoint and an order key."""


class Heads:
    """The heads of all order keys that have rows."""

    def __init__(self) -> None:
        self._held: dict[Key, DeliveryId] = {}
        """Of each key in memory: its delivery."""
        self._asked: dict[Key, int] = {}
        """Keys whose oldest row is to be read, and the id up to which none is left; 0: read from the start."""
        self._late: dict[Key, int] = {}
        """Keys for which an older row came while a newer one is in memory: just below its id."""

    def __repr__(self) -> str:
        return f"<Heads held={len(self._held)} asked={len(self._asked)}>"

    def __bool__(self) -> bool:
        """Whether there is anything to be read."""
        return bool(self._asked)

    def demands(self) -> list[tuple[EndpointKey, str, int]]:
        """What is to be read from the start, once: ``(endpoint, order key, after this id)``."""
        return self._demanded([key for key, after in self._asked.items() if not after])

    def following(self) -> list[tuple[EndpointKey, str, int]]:
        """The same for what is to be read on from a place."""
        return self._demanded([key for key, after in self._asked.items() if after])

    def _demanded(self, keys: list[Key]) -> list[tuple[EndpointKey, str, int]]:
        return [(*key, self._asked.pop(key)) for key in keys]

    def overtaken(self, key: Key) -> bool:
        """Whether an older row has come since the head of this key was read."""
        return key in self._late

    def met(self, key: Key, row: DeliveryId) -> None:
        """A row of this key is pending: its head is to be read, unless one is in memory and asks when it ends."""
        head = self._held.get(key)
        if head is None:
            self._asked[key] = 0
        elif row < head:
            self._late[key] = min(self._late.get(key, row - 1), row - 1)

    def came(self, key: Key, row: DeliveryId) -> None:
        """A row of this key has arrived, perhaps below where its head is to be read from."""
        if key in self._asked:
            self._asked[key] = min(self._asked[key], row - 1)
        head = self._held.get(key)
        if head is not None and row < head:
            self._late[key] = min(self._late.get(key, row - 1), row - 1)

    def doubt(self, endpoints: Container[EndpointKey] | None = None) -> None:
        """Rows of these endpoints, or of any, may have come without being shown: their heads are read from the start."""
        for key in self._asked:
            if endpoints is None or key[0] in endpoints:
                self._asked[key] = 0
        for key in self._held:
            if endpoints is None or key[0] in endpoints:
                self._late[key] = 0

    def take(self, key: Key, row: DeliveryId) -> bool:
        """Whether this row may go into memory as the head of its key; another's end asks for the next one."""
        return self._held.setdefault(key, row) == row

    def give_back(self, key: Key, row: DeliveryId) -> None:
        """It does not go into memory after all."""
        if self._held.get(key) == row:
            del self._held[key]
            late = self._late.pop(key, None)
            if late is not None and key in self._asked:
                self._asked[key] = min(late, self._asked[key])

    def left(self, key: Key, row: DeliveryId, *, gone: bool, wanted: bool) -> None:
        """
        One is not in memory any more: ask for the next, unless the head is another.

        ``gone``: nor in the queue; ``wanted``: its endpoint is served.
        """
        head = self._held.get(key)
        if head is None:
            # it was replaced, and whoever asked meanwhile saw it standing in front
            if wanted:
                self._asked[key] = 0
        elif head == row:
            del self._held[key]
            after = row if gone else row - 1
            after = min(after, self._late.pop(key, after))
            self._asked[key] = min(after, self._asked.get(key, after))
