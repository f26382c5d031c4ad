"""What the processes of one server call out to each other: PostgreSQL's LISTEN and NOTIFY.

A signal says that something can be read now; it is never the thing itself. So one that is lost costs time only: whoever listens
reads everything again when its connection was away (`on_again`), and on its timers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from agent.contract.codec import decoder
from fleet_server.storage.database import Database

_log = logging.getLogger(__name__)
_SIGNALS = decoder(list[tuple[str, str]])

CHANNEL = "edge_fleet"
MAX_PAYLOAD_BYTES = 7000  # PostgreSQL takes 7999
MAX_WAITING = 10_000
TURN_S = 2.0
AGAIN_S = 1.0

AGAIN = "again"
"""The signal that tells everybody to read everything again."""

STOP = "stop"
"""A signal that means nothing to others."""

Handler = Callable[[str], None]


class Signals:
    """Two threads between `start` and `stop`: one calls out, one listens. What was said more than once at a time is said once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._handlers: dict[str, Handler] = {}
        self._on_again: dict[str, Callable[[], None]] = {}
        self._waiting: dict[tuple[str, str], None] = {}
        self._something = threading.Condition()
        self._stopping = False
        self._ended = threading.Event()
        self.heard_again = 0
        """How often the connection was made on which signals are heard."""
        self._threads = [
            threading.Thread(target=self._call_out, name="signals-out", daemon=True),
            threading.Thread(target=self._listen, name="signals-in", daemon=True),
        ]

    def on(self, kind: str, handler: Handler) -> None:
        """`handler` gets what a signal of this kind is about. It must not block."""
        self._handlers[kind] = handler

    def on_again(self, what: str, handler: Callable[[], None]) -> None:
        """`handler` is called when signals may have been missed. It must not block. There is one for each `what`: the last."""
        self._on_again[what] = handler

    def send(self, kind: str, about: str = "") -> None:
        """To everybody who listens, this process too. Returns at once."""
        with self._something:
            if len(self._waiting) >= MAX_WAITING:
                self._waiting = {(AGAIN, ""): None}
            self._waiting[kind, about] = None
            self._something.notify()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        with self._something:
            self._stopping = True
            self._waiting[STOP, ""] = None  # wakes the thread that listens
            self._something.notify()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout=2 * TURN_S)

    # -- the thread that calls out -----------------------------------------------------------------------------------------

    def _call_out(self) -> None:
        connection: Any = None
        last = False
        while not last:
            with self._something:
                while not self._waiting and not self._stopping:
                    self._something.wait()
                waiting, self._waiting, last = self._waiting, {}, self._stopping
            try:
                connection = connection or self._database.connection()
                for payload in payloads(waiting) if waiting else ():
                    connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, payload))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                _log.debug("signals wait: %s", error)
                _close(connection)
                connection = None
                with self._something:
                    self._waiting = {**waiting, **self._waiting}
                self._ended.wait(AGAIN_S)
        _close(connection)

    # -- the thread that listens -------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while not self._ended.is_set():
            connection = None
            try:
                connection = self._database.connection()
                connection.execute(f"LISTEN {CHANNEL}")
                self.heard_again += 1
                self._tell_again()
                while not self._ended.is_set():
                    for note in connection.notifies(timeout=TURN_S):
                        self._hear(note.payload)
                        if self._ended.is_set():
                            return
                    connection.execute("SELECT 1")  # finds out that nobody is there any more
            except Exception as error:  # noqa: BLE001 - the thread must live
                _log.debug("signals are not heard now: %s", error)
                self._ended.wait(AGAIN_S)
            finally:
                _close(connection)

    def _hear(self, payload: str) -> None:
        try:
            signals = _SIGNALS.decode(payload)
        except msgspec.MsgspecError:
            return  # not ours
        for kind, about in signals:
            if kind == AGAIN:
                self._tell_again()
            elif (handler := self._handlers.get(kind)) is not None:
                _guarded(lambda handler=handler, about=about: handler(about))  # type: ignore[misc]

    def _tell_again(self) -> None:
        for handler in list(self._on_again.values()):
            _guarded(handler)


def payloads(signals: dict[tuple[str, str], None]) -> list[str]:
    """The signals as payloads that PostgreSQL takes."""
    found: list[str] = []
    chosen: list[tuple[str, str]] = []
    size = 0
    for one in signals:
        length = len(msgspec.json.encode(one)) + 1
        if chosen and size + length > MAX_PAYLOAD_BYTES:
            found.append(msgspec.json.encode(chosen).decode())
            chosen, size = [], 0
        chosen.append(one)
        size += length
    return [*found, msgspec.json.encode(chosen).decode()]


def _guarded(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:  # noqa: BLE001 - the thread must live
        _log.exception("what follows a signal failed")


def _close(connection: Any) -> None:
    if connection is not None:
        connection.close()
