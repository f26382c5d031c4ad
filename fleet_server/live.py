"""Tells everybody who reads along that something changed: the dashboard and `events --follow`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import msgspec

PER_ACCOUNT = 16  # readers: a stream is never ended to make room, so they must not take all there is; a page open needs one
MAX_WAITING = 1000  # a reader that is slower is dropped; it connects again and asks for what it missed


class Change(msgspec.Struct, frozen=True):
    """Something (devices, rollouts, releases, keys) is not as it was: whoever shows it reads it again."""

    what: str


class Reader:
    """One reader's queue of messages: events and changes. `lost` says that it fell behind and must start over."""

    def __init__(self, loop: asyncio.AbstractEventLoop, account: str | None) -> None:
        self._loop, self.account = loop, account
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self.lost = False

    async def get(self) -> Any:
        """The next message; None when the server stops."""
        return await self._queue.get()

    def offer(self, message: Any) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: the reader is gone already
            self._loop.call_soon_threadsafe(self._put, message)

    def _put(self, message: Any) -> None:
        if self._queue.qsize() >= MAX_WAITING:
            self.lost = True
            message = None
        self._queue.put_nowait(message)


class Hub:
    """Messages from any thread to every reader."""

    def __init__(self) -> None:
        self._readers: set[Reader] = set()
        self._lock = threading.Lock()
        self.closed = False

    @contextlib.contextmanager
    def reader(self, account: str | None = None) -> Iterator[Reader]:
        """A reader for as long as the block lasts; called inside the event loop that reads."""
        reader = Reader(asyncio.get_running_loop(), account)
        with self._lock:
            self._readers.add(reader)
        if self.closed:
            reader.offer(None)
        try:
            yield reader
        finally:
            with self._lock:
                self._readers.discard(reader)

    def crowded(self, account: str | None) -> bool:
        """Whether the account reads along as often as it may."""
        with self._lock:
            return sum(reader.account == account for reader in self._readers) >= PER_ACCOUNT

    def tell(self, message: Any) -> None:
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.offer(message)

    def close(self) -> None:
        """Ends every stream, so that stopping does not wait for readers."""
        self.closed = True
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.offer(None)
