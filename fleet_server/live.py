"""Tells everybody who reads along that something changed: the dashboard and `events --follow`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from fleet_server.storage.signals import Signals

_log = logging.getLogger(__name__)

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


class SharedHub(Hub):
    """Messages to the readers of every process: what is told here is called out, and told where it is heard, here too.

    Events are read from the database when somebody says that there are new ones, in their order and once.
    """

    def __init__(self, signals: Signals) -> None:
        super().__init__()
        self._signals = signals
        self.read: Callable[[int | None], list[Any]] = lambda _: []
        """The events after that number, a bounded number of them; without a number the newest ones. In their order."""
        self._last: int | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._relay, name="live", daemon=True)
        signals.on("change", lambda about: self._to_readers(Change(about)))
        signals.on("events", lambda _: self._wake.set())
        signals.on_again("events", self._wake.set)

    def start(self) -> None:
        """From now on what happens is told to readers here."""
        self._thread.start()

    def tell(self, message: Any) -> None:
        self._signals.send(*(("change", message.what) if isinstance(message, Change) else ("events", "")))

    def close(self) -> None:
        super().close()
        self._wake.set()

    def _to_readers(self, message: Any) -> None:
        super().tell(message)

    def _relay(self) -> None:
        while not self.closed:
            try:
                new = self.read(self._last)
            except SQLAlchemyError as error:
                _log.debug("events cannot be read now: %s", error)
                self._wake.wait(1.0)
                continue
            if self._last is not None:
                for event in new:
                    self._to_readers(event)
            self._last = new[-1].seq if new else self._last or 0
            if not new:
                self._wake.wait()
                self._wake.clear()
