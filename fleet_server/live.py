"""Tells everybody who watches that something changed: the dashboard and `events --follow`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

MAX_WAITING = 1000  # a watcher that does not read is dropped; it reconnects and asks for what it missed


class Watcher:
    """One reader's queue. `lost` says that it fell behind and must start over."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.lost = False

    async def get(self) -> dict[str, Any] | None:
        """The next message; None when the server stops."""
        return await self._queue.get()

    def offer(self, message: dict[str, Any] | None) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: the watcher is gone already
            self._loop.call_soon_threadsafe(self._put, message)

    def _put(self, message: dict[str, Any] | None) -> None:
        if self._queue.qsize() >= MAX_WAITING:
            self.lost = True
            message = None
        self._queue.put_nowait(message)


class Hub:
    """Messages from any thread to every watcher."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._lock = threading.Lock()
        self.closed = False

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watcher]:
        """To be used inside the event loop that reads."""
        watcher = Watcher(asyncio.get_running_loop())
        with self._lock:
            self._watchers.add(watcher)
        if self.closed:
            watcher.offer(None)
        try:
            yield watcher
        finally:
            with self._lock:
                self._watchers.discard(watcher)

    def tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.offer(message)

    def close(self) -> None:
        """Ends every stream, so that stopping does not wait for readers."""
        self.closed = True
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.offer(None)
