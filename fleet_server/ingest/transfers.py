"""Answers devices that ask for documents, blobs and new certificates over MQTT: what the device listener serves, part by part.

Devices wait in turn (a queue for each, one ask after the other), and what is published waits for the broker's socket: a device
that asks for much waits behind itself, and never fills this process's memory. Which device asks is what the broker's access
list vouches for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

from agent.contract import topics, transfers
from agent.contract.codec import ContractError, decode
from agent.contract.transfers import Ask, Part, Status
from fleet_server.devices.inventory import Inventory
from fleet_server.errors import FleetError
from fleet_server.ingest.fair_queue import FairQueue, Room
from fleet_server.ingest.taken import Taken
from fleet_server.releases.repository import Repository
from fleet_server.storage.blobs import Blobs
from fleet_server.storage.shelves import Opened, open_file

_log = logging.getLogger(__name__)

WAITING, WAITING_BYTES = 4, 64 * 1024  # asks of one device; a device asks again for what found no room
AHEAD = 4  # messages that may wait for the socket
SENT_WITHIN_S = 10.0


class Sent(Protocol):
    """A message on its way to the broker."""

    def wait_for_publish(self, timeout: float | None = None) -> None: ...


class RenewalsAsked(Protocol):
    """Makes certificates for devices that ask over the broker."""

    def certificate(self, device: str, request: str) -> bytes:
        """The device's new certificate, PEM.  Raises: FleetError."""
        ...


Send = Callable[[str, bytes], Sent]


class _Asked(msgspec.Struct):
    device: str
    payload: bytes


class TransferAnswers:
    """Runs one thread between `start` and `stop`. `ask` is for any thread and never blocks."""

    def __init__(self, blobs: Blobs, repository: Repository, inventory: Inventory, renewals: RenewalsAsked) -> None:
        self._blobs, self._repository, self._inventory, self._renewals = blobs, repository, inventory, renewals
        self._waiting: FairQueue[_Asked] = FairQueue(share=WAITING, limit=WAITING, limit_bytes=WAITING_BYTES)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="transfers", daemon=True)
        self._send: Send | None = None
        self.taken = Taken()

    def start(self, send: Send) -> None:
        self._send = send
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._waiting.close()
        if self._thread.ident is not None:
            self._thread.join(timeout=SENT_WITHIN_S)

    def ask(self, device: str, payload: bytes) -> bool:
        """Whether the ask waits to be answered: it has a bearable size and the device has room in the queue."""
        return (
            len(payload) <= transfers.MAX_ASK_BYTES
            and self._waiting.put(device, _Asked(device, payload), len(payload)) is not Room.FULL
        )

    def _work(self) -> None:
        while asked := self._waiting.take(1):
            if self._stopping.is_set():
                return
            try:
                self._answer(asked[0])
            except (
                RuntimeError,
                ValueError,
            ) as error:  # how the MQTT library says that the broker went away: the device asks again
                _log.info("an ask of device %s is left to be asked again: %s", asked[0].device, error)
            except Exception:  # noqa: BLE001 - the thread must go on
                _log.exception("an ask of device %s could not be answered", asked[0].device)

    def _answer(self, asked: _Asked) -> None:
        try:
            ask = decode(asked.payload, Ask, limit_bytes=transfers.MAX_ASK_BYTES)
        except ContractError as error:
            _log.info("device %s asks for something that is no ask: %s", asked.device, error)
            return
        topic = topics.down_blocks(asked.device, ask.id)
        try:
            found = self._find(asked.device, ask)
        except FleetError as error:
            self._publish(topic, Part(Status.REFUSED, ask.first, 0, str(error).encode()[:512]))
            return
        if found is None:
            self._publish(topic, Part(Status.NOT_FOUND, ask.first, 0, b""))
            return
        with contextlib.ExitStack() as stack:
            read, size = _reader(found, stack)
            under_way: list[Sent] = []
            for number in ask.parts():
                data = read(number * ask.part_bytes, ask.part_bytes)
                if not data and number:
                    break
                self.taken.count(asked.device, len(data))
                under_way.append(self._publish(topic, Part(Status.OK, number, size, data)))
                if len(under_way) > AHEAD:
                    under_way.pop(0).wait_for_publish(SENT_WITHIN_S)

    def _publish(self, topic: str, part: Part) -> Sent:
        assert self._send is not None
        return self._send(topic, part.encode())

    def _find(self, device: str, ask: Ask) -> Opened | bytes | None:
        """What is asked for; None when there is none of that name.  Raises: FleetError."""
        if ask.thing == "record":
            return self._inventory.record(device)
        if ask.thing == "renewal":
            return self._renewals.certificate(device, ask.request)
        if ask.thing == "blob":
            return self._blobs.open(ask.name)
        target = ask.thing == "target"
        name = self._repository.targets.served(ask.name) if target else self._repository.metadata.served(ask.name)
        if name is None:
            return None
        documents = self._repository.documents
        path = documents.local(name)
        return open_file(path) if path is not None else documents.read(name)


def _reader(found: Opened | bytes, stack: contextlib.ExitStack) -> tuple[Callable[[int, int], bytes], int]:
    """(offset, count) → bytes, and the size of the whole."""
    if isinstance(found, bytes):
        return lambda offset, count: found[offset : offset + count], len(found)
    stack.callback(found.close)
    return found.read, found.size
