"""
Coalesce keys: which delivery stands for each in memory, and what newer rows replace.

Each read says of a row that was not attempted whether a newer one of its key is pending, and if so it ends there and then.
A row that is the newest makes those end that wait in memory, and, by a read of their own, those that wait in the queue.  Of
a key one delivery at a time is under way, and retries, which nothing replaces; when it ends the newest is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    from hookd.core.model import DeliveryId, EndpointKey
    from hookd.core.reads import Row

Key: TypeAlias = "tuple[EndpointKey, str]"
"""An endpoint and a coalesce key."""


class States:
    """What stands for each coalesce key that has rows."""

    def __init__(self) -> None:
        self._held: dict[Key, DeliveryId] = {}
        """Of each key in memory: the delivery that stands for it."""
        self._newest: dict[Key, tuple[DeliveryId, UUID]] = {}
        """Of those that a read has brought: what older ones are replaced by."""
        self._awaited: set[Key] = set()
        """A newer one waits in the queue until the one under way has ended."""
        self._ended: dict[Key, None] = {}

    def __repr__(self) -> str:
        return f"<States held={len(self._held)} awaited={len(self._awaited)}>"

    def __bool__(self) -> bool:
        """Whether there is a newest row to be read."""
        return bool(self._ended)

    def demands(self) -> list[Key]:
        """Keys whose newest row is to be read, once."""
        ended, self._ended = self._ended, {}
        return list(ended)

    def replacing(self) -> list[tuple[EndpointKey, str, DeliveryId, UUID]]:
        """What older rows are to be read for, once: ``(endpoint, coalesce key, id, its event)``."""
        newest, self._newest = self._newest, {}
        return [(*key, row, event) for key, (row, event) in newest.items()]

    def again(self, newer: Iterable[tuple[EndpointKey, str, DeliveryId, UUID]]) -> None:
        """These have more older rows than one read brings."""
        for endpoint, coalesce_key, row, event in newer:
            self._newest.setdefault((endpoint, coalesce_key), (row, event))

    def note(self, row: Row) -> None:
        """A row was read; if none is newer, older ones of its key are to end."""
        assert row.coalesce_key is not None
        if row.replaced_by is None:
            key = row.endpoint, row.coalesce_key
            self._newest[key] = max(self._newest.get(key, (row.id, row.event_id)), (row.id, row.event_id))

    def stands(self, row: Row, give_way: Callable[[EndpointKey, DeliveryId, UUID], bool]) -> bool:
        """
        Whether a row may go into memory as far as its coalesce key is concerned.

        An older one that waits there gives way (``give_way``: whether it does); while one is under way it waits in the queue,
        and is read when that ends.
        """
        if row.coalesce_key is None:
            return True
        key = row.endpoint, row.coalesce_key
        held = self._held.get(key)
        if held is not None:
            if held > row.id:
                return True  # a retry of an older one: it was attempted, so it is not replaced
            if not give_way(row.endpoint, held, row.event_id):
                if row.attempt:
                    return True  # a retry: what is read when the one under way has ended is the newest, perhaps another
                self._awaited.add(key)
                return False
        self._held[key] = row.id
        return True

    def left(self, key: Key, row: DeliveryId) -> None:
        """One is not in memory any more."""
        if self._held.get(key) == row:
            del self._held[key]
            if key in self._awaited:
                self._awaited.discard(key)
                self._ended[key] = None
