"""A queue for each sender, from which batches are made in turn, so that a sender who floods waits behind itself."""

from __future__ import annotations

import collections
import math
import threading
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T")


class Room(Enum):
    """What became of an item that was put."""

    WAITS = "waits"
    CROWDED = "crowded"  # it waits, but its sender has more than its share waiting
    FULL = "full"  # there was no room for it


class FairQueue(Generic[T]):
    """Bounded for each sender in number and bytes. Safe between threads; one thread calls `take`."""

    def __init__(self, *, share: int, limit: int, limit_bytes: int, crowd_bytes: float = math.inf) -> None:
        """`share`: beyond as many a sender counts as crowding; beyond `limit` items or `limit_bytes` it gets no more in, and while
        all together have `crowd_bytes` waiting nobody gets more in than its share.
        """
        self._share, self._limit, self._limit_bytes, self._crowd_bytes = share, limit, limit_bytes, crowd_bytes
        self._all_bytes = self._count = 0
        self._senders: collections.OrderedDict[str, collections.deque[tuple[T, int]]] = collections.OrderedDict()
        self._bytes: collections.Counter[str] = collections.Counter()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, sender: str, item: T, size_bytes: int) -> Room:
        with self._changed:
            mine = self._senders.setdefault(sender, collections.deque())
            if len(mine) >= self._limit or (mine and self._bytes[sender] + size_bytes > self._limit_bytes):
                return Room.FULL
            if len(mine) >= self._share and self._all_bytes + size_bytes > self._crowd_bytes:
                return Room.FULL
            mine.append((item, size_bytes))
            self._bytes[sender] += size_bytes
            self._all_bytes += size_bytes
            self._count += 1
            self._changed.notify()
            return Room.CROWDED if len(mine) > self._share else Room.WAITS

    def __len__(self) -> int:
        """How many items wait."""
        return self._count

    def take(self, limit: int) -> list[T]:
        """Up to `limit` items, one of each sender in turn, as soon as there is any; none when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._senders or self._closed)
            taken: list[T] = []
            while self._senders and len(taken) < limit:
                sender, mine = self._senders.popitem(last=False)
                item, size_bytes = mine.popleft()
                taken.append(item)
                self._bytes[sender] -= size_bytes
                self._all_bytes -= size_bytes
                self._count -= 1
                if mine:
                    self._senders[sender] = mine  # at the end: everybody else comes first
                else:
                    del self._bytes[sender]
            return taken

    def close(self) -> None:
        """What waits is still taken; after that `take` gives nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
