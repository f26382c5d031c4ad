"""Devices that report events without end through a cluster, each in order, and keep what was not acknowledged, as an agent does."""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import time

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from agent.contract import topics
from agent.contract.reports import Event
from tests.fleet.stand import signed_event, wait_until

WINDOW = 10


class Reporter:
    """One device; between `start` and `stop` it is connected to any of the ports that lets it be, and sends."""

    def __init__(self, device, ports, context, *, pause_s=0.03):
        self.device, self._ports, self._context, self._pause_s = device, ports, context, pause_s
        self._numbers = itertools.count(1)
        self._kept: collections.deque = collections.deque()  # (number, payload), not acknowledged yet, in order
        self.acknowledged: set[int] = set()
        self.connections = 0
        self._stop, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()
        return self

    def finish(self, within=60):
        """Sends nothing new, and waits until all is acknowledged."""
        self._ending.set()
        self._thread.join(within)
        assert not self._thread.is_alive(), f"{self.device.id} has {len(self._kept)} messages that nobody acknowledges"

    def stop(self):
        self._stop.set()
        self._thread.join(20)

    def _run(self):
        for port in itertools.cycle(self._ports):
            if self._stop.is_set() or (self._ending.is_set() and not self._kept):
                return
            with contextlib.suppress(OSError, ValueError):
                self._converse(port)
            self._stop.wait(0.2)

    def _converse(self, port):
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, self.device.id, protocol=mqtt.MQTTv311, reconnect_on_failure=False, clean_session=True
        )
        client.tls_set_context(self._context)
        client.connect_timeout = 5.0
        sent, accepted = {}, []
        client.on_connect = lambda _c, _u, _f, reason, _p: accepted.append(not reason.is_failure)
        client.on_publish = lambda _c, _u, mid, *_: self._done(sent.pop(mid, None))
        client.connect("127.0.0.1", port, keepalive=10)
        to_send: collections.deque | None = None
        due = moved = time.monotonic()
        while not self._stop.is_set():
            if client.loop(0.01) != 0 or accepted == [False]:
                break
            if not accepted:
                if time.monotonic() - moved > 15:
                    break
                continue
            if to_send is None:
                to_send = collections.deque(self._kept)
                self.connections += 1
            now = time.monotonic()
            if not sent:
                moved = now
            if now - moved > 20:
                break  # nothing is acknowledged: another node
            if now >= due and not self._ending.is_set():
                due = now + self._pause_s
                item = self._next()
                self._kept.append(item)
                to_send.append(item)
            while to_send and len(sent) < WINDOW:
                number, payload = to_send.popleft()
                sent[client.publish(topics.up(self.device.id, "events"), payload, qos=1).mid] = number
            if self._ending.is_set() and not self._kept:
                break
        client.disconnect()
        client.loop(0.05)

    def _next(self):
        number = next(self._numbers)
        event = Event(
            device=self.device.id, id=f"{self.device.id}-{number}", at=time.time(), name="tested", message=str(number)
        )
        return number, signed_event(event, self.device.key)

    def _done(self, number):
        if number is not None:
            self.acknowledged.add(number)
            while self._kept and self._kept[0][0] in self.acknowledged:
                self._kept.popleft()


def stored(server, device):
    """The numbers of a device's events in the order in which they were stored."""
    from sqlalchemy import select

    from fleet_server.config import Folder, load
    from fleet_server.storage.database import Database
    from fleet_server.storage.models import EventRow

    folder = Folder(server.data)
    database = Database(folder.database_url(load(folder)))
    try:
        with database.reading() as session:
            query = (
                select(EventRow.message).where(EventRow.device == device.id, EventRow.name == "tested").order_by(EventRow.seq)
            )
            return [int(message) for message in session.scalars(query)]
    finally:
        database.close()


def assert_all_is_stored(server, reporters):
    """What was acknowledged is stored, once, and in the order in which each device said it."""
    for one in reporters:
        one.finish()
    for one in reporters:
        wait_until(lambda one=one: set(stored(server, one.device)) >= one.acknowledged, f"all of {one.device.id} is stored")
        numbers = stored(server, one.device)
        assert numbers == sorted(set(numbers)), f"{one.device.id}: in order, and once"
        assert set(numbers) >= one.acknowledged
