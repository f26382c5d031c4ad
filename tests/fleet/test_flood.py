"""One device that sends without end, and a database that stores nothing for a while: nobody else's messages are lost or late."""

import contextlib
import sqlite3
import threading

import paho.mqtt.client as mqtt
import pytest
from sqlalchemy.exc import OperationalError

from agent.contract import topics
from fleet_server.broker.subscriptions import ALLOWED, SubscriptionWatch
from fleet_server.ingest import mqtt_link
from fleet_server.ingest.fair_queue import FairQueue, Room
from fleet_server.ingest.flood import BURST, BURST_BYTES, FORGIVEN_S, LONGEST_PAUSE_S, PAUSE_S, RATE, FloodWatch
from fleet_server.ingest.intake import Message
from fleet_server.ingest.mqtt_link import MqttLink, Received
from fleet_server.ingest.taken import LATELY_S, MUCH_BYTES, Taken
from tests.fleet.stand import signed_report
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
    assert len(waiting) == 6
    assert sorted(waiting.take(100)) == [0, 0, 0, 1, 2, 3]
    assert len(waiting) == 0
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


def test_who_was_away_for_days_may_say_it_all_at_once():
    watch = FloodWatch(lambda: 0.0)
    assert [watch.is_paused("away", 8 * 1024) for _ in range(2000)] == [(False, 0.0)] * 2000


@pytest.mark.parametrize(("size", "after"), [(100, BURST), (1024 * 1024, BURST_BYTES // 1024**2)], ids=["many", "large"])
def test_who_floods_is_paused_and_nobody_else(size, after):
    watch = FloodWatch(lambda: 0.0)
    verdicts = [watch.is_paused("flood", size) for _ in range(after + 3)]
    assert verdicts == [(False, 0.0)] * after + [(True, PAUSE_S), (True, 0.0), (True, 0.0)]
    assert watch.is_paused("quiet", size) == (False, 0.0)
    assert watch.paused() == ["flood"]


def test_pauses_end_and_grow_and_are_forgiven():
    now = [0.0]
    watch = FloodWatch(lambda: now[0])

    def flood():
        return next(pause for _, pause in iter(lambda: watch.is_paused("flood", 1), None) if pause)

    seen = []
    for _ in range(9):
        seen.append(flood())
        now[0] += seen[-1]
        assert watch.paused() == []
    assert seen == [PAUSE_S * 2**n for n in range(6)] + [LONGEST_PAUSE_S] * 3
    now[0] += FORGIVEN_S + 1
    assert flood() == PAUSE_S


def test_a_steady_rate_is_no_flood():
    now = [0.0]
    watch = FloodWatch(lambda: now[0])
    for _ in range(20_000):
        now[0] += 1 / (RATE - 1)
        assert watch.is_paused("busy", 100) == (False, 0.0)


def test_together_they_have_no_more_than_their_shares_beyond_a_bound():
    waiting = queue(limit=1000, limit_bytes=10**6, crowd_bytes=10)
    assert [waiting.put("a", n, 3) for n in range(4)] == [Room.WAITS, Room.WAITS, Room.CROWDED, Room.FULL]
    assert [waiting.put("b", n, 3) for n in range(3)] == [Room.WAITS, Room.WAITS, Room.FULL]
    assert len(waiting.take(100)) == 5
    assert [waiting.put("a", n, 3) for n in range(3)] == [Room.WAITS, Room.WAITS, Room.CROWDED]


def test_who_is_sent_the_most_is_named_once():
    now = [0.0]
    taken = Taken(lambda: now[0])
    taken.count("reads", 1)
    assert taken.most() is None
    for _ in range(3):
        taken.count("deaf", MUCH_BYTES // 2)
        taken.count("reads", MUCH_BYTES // 2)
    taken.count("deaf", 2)
    assert (taken.most(), taken.most(), taken.most()) == ("deaf", "reads", None)


def test_what_was_sent_long_ago_does_not_count():
    now = [0.0]
    taken = Taken(lambda: now[0])
    for passed in range(40):
        now[0] = passed * LATELY_S / 2
        taken.count("slow", MUCH_BYTES // 8)
        assert taken.most() is None
    taken.count("slow", MUCH_BYTES)
    now[0] += 3 * LATELY_S
    assert taken.most() is None


def test_a_device_may_subscribe_to_what_exists_as_often_as_it_likes():
    told = []
    watch = SubscriptionWatch(told.append)
    for _ in range(100):
        for line in ("d1 1 v1/d/d1/down/poke", "d1 1 v1/all/poke", "d1 0 v1/d/d1/down/blocks/+", "fleet-server 1 v1/d/+/up/#"):
            assert watch.read(line)
    assert not watch.read("Outgoing messages are being dropped for client fleet-server.")
    assert told == []
    for number in range(ALLOWED + 1):
        assert watch.read(f"d1 0 v1/d/d2/down/{number} with a space")
    assert told == ["d1"]
