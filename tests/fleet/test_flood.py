"""One device that sends without end, and a database that stores nothing for a while: nobody else's messages are lost or late."""

import contextlib
import sqlite3
import threading

import paho.mqtt.client as mqtt
import pytest
from sqlalchemy.exc import OperationalError

from agent.contract import topics
from agent.contract.reports import Presence
from fleet_server.ingest import mqtt_link
from fleet_server.ingest.fair_queue import FairQueue, Room
from fleet_server.ingest.intake import Message
from fleet_server.ingest.mqtt_link import MqttLink, Received
from tests.fleet.stand import signed_report, wait_until
from tests.fleet.test_intake import Known


def queue(**limits):
    return FairQueue(**{"share": 2, "limit": 4, "limit_bytes": 100, **limits})


def test_everybody_comes_before_the_second_of_anybody():
    waiting = queue(limit=1000, limit_bytes=10**6)
    for number in range(500):
        waiting.put("flood", ("flood", number), 1)
    waiting.put("quiet", ("quiet", 0), 1)
    taken = waiting.take(3)
    assert taken == [("flood", 0), ("quiet", 0), ("flood", 1)]
    assert waiting.take(2) == [("flood", 2), ("flood", 3)]


def test_each_sender_has_its_own_bounds():
    waiting = queue()
    assert [waiting.put("a", n, 1) for n in range(5)] == [Room.WAITS, Room.WAITS, Room.CROWDED, Room.CROWDED, Room.FULL]
    assert waiting.put("b", 0, 1) is Room.WAITS
    assert waiting.put("b", 1, 100) is Room.FULL
    assert waiting.put("c", 0, 1000) is Room.WAITS, "a single message is bounded by the broker"
    assert sorted(waiting.take(100)) == [0, 0, 0, 1, 2, 3]
    assert waiting.put("a", 9, 1) is Room.WAITS


def test_what_waits_is_taken_before_the_end():
    waiting = queue()
    waiting.put("a", 1, 1)
    waiting.close()
    assert waiting.take(10) == [1]
    assert waiting.take(10) == []


def test_take_waits_for_the_first():
    waiting, taken = queue(), []
    worker = threading.Thread(target=lambda: taken.extend(waiting.take(10)))
    worker.start()
    waiting.put("a", 1, 1)
    worker.join(10)
    assert taken == [1]


@contextlib.contextmanager
def full_disk():
    raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
    yield


def test_nothing_is_dropped_while_the_database_stores_nothing(fleet, monkeypatch):
    device = Known(fleet, "d1")
    said = Message(topics.up("d1", "state"), signed_report(device.report(1), device.key))
    with monkeypatch.context() as patched:
        patched.setattr(fleet.database, "session", full_disk)
        for batch in ([said], [said, said]):
            with pytest.raises(OperationalError):
                fleet.intake.store(batch)
    assert (fleet.intake.accepted, dict(fleet.intake.dropped)) == (0, {})
    fleet.intake.store([said])
    assert device.serving == {"m": 1}


def test_a_batch_is_acknowledged_when_it_is_stored_at_last(fleet, monkeypatch):
    monkeypatch.setattr(mqtt_link, "RETRY_S", 0.01)
    device = Known(fleet, "d1")
    acknowledged, works, tries = [], fleet.database.session, []
    monkeypatch.setattr(mqtt.Client, "ack", lambda _client, mid, _qos: acknowledged.append(mid))
    link = MqttLink(fleet.authority, "127.0.0.1", 1, fleet.intake, lambda _models: None)

    def at_the_third_try():
        tries.append(len(acknowledged))
        return works() if len(tries) > 2 else full_disk()

    said = Message(topics.up("d1", "state"), signed_report(device.report(1), device.key))
    with monkeypatch.context() as patched:
        patched.setattr(fleet.database, "session", at_the_third_try)
        link.store([Received(said, 7, 1, 0)])
    assert (tries, acknowledged, device.serving) == ([0, 0, 0], [7], {"m": 1})
    monkeypatch.setattr(fleet.database, "session", full_disk)
    link.stop()
    link.store([Received(said, 8, 1, 0)])
    assert acknowledged == [7]


@pytest.mark.alone  # the quiet one is heard within 10 s of a flood
def test_a_flooding_device_does_not_keep_others_waiting(server, connect):
    flood, quiet = connect(server.enrol("flood")), connect(server.enrol("quiet"))
    lines = [flood.mqtt.publish(topics.up("flood", "events"), b"x" * 2000, qos=1) for _ in range(8000)]
    quiet.report({})
    wait_until(lambda: server.get("/devices/quiet")["state"] is not None, "the quiet one is heard", within=10)
    lines[-1].wait_for_publish(60)
    flood.send("presence", Presence(device="flood", session=2, online=True))
    wait_until(lambda: sum(server.get("/status")["messages"]["dropped"].values()) >= 8000, "all were judged")
