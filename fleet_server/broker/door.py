"""Who is let into the running broker: shuts single devices out, for good or for a while, and leaves everybody else's connection
alone.

mosquitto's dynamic-security plug-in throws a device off and refuses whatever it publishes or subscribes to from then on. It cannot
keep it from connecting, because the certificate says who it is and the plug-in is not asked: a device that was revoked meets the
revocation list, which the broker reads again. Without the plug-in the broker is restarted to shut a device out, and a flood is only
dropped here.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from fleet_server.broker.settings import SHUT_OUT

_log = logging.getLogger(__name__)

ANSWERS_WITHIN_S = 2.0
FINE = ("Client already exists", "Client not found")
"""What the plug-in says when there was nothing to do."""


class Control(Protocol):
    """How the broker is spoken to."""

    def command(self, payload: bytes) -> None: ...

    def clear(self, device: str) -> None: ...


class Process(Protocol):
    """The broker's process; for any thread."""

    def reload(self) -> None: ...

    def restart(self) -> None: ...


class Door:
    """For any thread. Between `start` and `stop` a thread of its own pauses devices, and lets them in again."""

    def __init__(
        self, control: Control, process: Process, forget: Callable[[str], None], on_pause: Callable[[str, float], None], *, plugin: bool
    ) -> None:  # fmt: skip
        """`forget` ends what the broker keeps of a device, or raises OSError; `on_pause` is told of each pause and its seconds;
        `plugin`: whether the broker has the plug-in.
        """
        self._control, self._process, self._forget, self._on_pause = control, process, forget, on_pause
        self._plugin = plugin
        self._numbers = itertools.count(1)
        self._asked: dict[str, _Asked] = {}
        self._shut: set[str] = set()
        self._pauses: queue.Queue[tuple[str, float] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="door", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._pauses.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout=2 * ANSWERS_WITHIN_S)

    def shut_out(self, device: str) -> None:
        """Throws the device off for good and clears what the broker keeps of it. Its certificates are on the revocation list."""
        self._shut.add(device)
        live = self._plugin and self._ask(*_shut(device))
        if live:
            self._process.reload()
        try:
            self._forget(device)
        except OSError as error:
            _log.warning("what the broker keeps for %s cannot be cleared now: %s", device, error)
        self._control.clear(device)
        if not live:
            _log.warning(
                "the broker is restarted to shut %s out%s", device, "" if self._plugin else ": it has no plug-in for that"
            )
            self._process.restart()

    def admit(self, device: str) -> None:
        """Lets a device in that has the id of one that was shut out."""
        if device in self._shut and self._plugin and not self._ask(*_open(device)):
            _log.error(
                "the broker may still shut %s out, which was enrolled anew; it will not after a restart of the server", device
            )
        self._shut.discard(device)

    def pause(self, device: str, seconds: float) -> None:
        """Shuts the device out for a while. Returns at once."""
        self._pauses.put((device, seconds))

    def answered(self, payload: bytes) -> None:
        """Takes an answer of the plug-in."""
        try:
            answers = msgspec.json.decode(payload)["responses"]
        except (msgspec.DecodeError, KeyError, TypeError):
            return
        for answer in answers:
            asked = self._asked.get(str(answer.get("correlationData")))
            if asked is not None:
                asked.take(answer.get("error"))

    def _ask(self, *commands: dict[str, Any]) -> bool:
        """Whether the plug-in did all of it."""
        number = str(next(self._numbers))
        asked = self._asked[number] = _Asked(len(commands))
        try:
            self._control.command(msgspec.json.encode({"commands": [{**one, "correlationData": number} for one in commands]}))
            done = asked.done.wait(ANSWERS_WITHIN_S)
        finally:
            del self._asked[number]
        if asked.errors:
            _log.error("the broker's plug-in refuses: %s", "; ".join(asked.errors))
        return done and not asked.errors

    def _work(self) -> None:
        ends: list[tuple[float, str]] = []
        while True:
            try:
                item = self._pauses.get(timeout=max(0.0, ends[0][0] - time.monotonic()) if ends else None)
            except queue.Empty:
                _, device = heapq.heappop(ends)
                self._let_in_again(device)
                continue
            if item is None:
                return
            device, seconds = item
            heapq.heappush(ends, (time.monotonic() + seconds, device))
            self._begin_pause(device, seconds)

    def _begin_pause(self, device: str, seconds: float) -> None:
        _log.warning("%s sends or asks for too much: it is shut out for %.0f s", device, seconds)
        if self._plugin and device not in self._shut:
            self._ask(*_shut(device))
            with contextlib.suppress(OSError):  # its session would keep its subscriptions, and what waits for it
                self._forget(device)
        try:
            self._on_pause(device, seconds)
        except Exception:  # noqa: BLE001 - the thread must go on
            _log.exception("that %s is paused cannot be noted", device)

    def _let_in_again(self, device: str) -> None:
        if self._plugin and device not in self._shut:
            self._ask(*_open(device))


class _Asked:
    """Commands that wait for the plug-in's answers."""

    def __init__(self, count: int) -> None:
        self._missing = count
        self.errors: list[str] = []
        self.done = threading.Event()

    def take(self, error: str | None) -> None:
        if error is not None and error not in FINE:
            self.errors.append(error)
        self._missing -= 1
        if self._missing <= 0:
            self.done.set()


def _shut(device: str) -> tuple[dict[str, Any], ...]:
    role = {"rolename": SHUT_OUT, "priority": 10}
    return ({"command": "createClient", "username": device, "roles": [role]}, {"command": "disableClient", "username": device})


def _open(device: str) -> tuple[dict[str, Any], ...]:
    return ({"command": "deleteClient", "username": device},)
