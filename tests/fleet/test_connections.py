"""Who may have a connection and who makes room, by the rules alone: nobody fills a listener, nobody who is busy is thrown out."""

import pytest

from fleet_server.api.connections import FRESH_S, Answer, Connection, Connections, Limits, address_of
from fleet_server.config import ConnectionSettings
from fleet_server.listeners import OTHER_DESCRIPTORS, fitted
from tests.fleet.conftest import Clock


class Listener:
    """A listener of six connections: four of an address without a certificate, two of a device."""

    def __init__(self):
        self.clock = Clock(100.0)
        self.room = Connections(Limits(total=6, per_address=4, per_device=2), self.clock)
        self.ended = []

    def come(self, address, *, device=None, busy=False, passes=FRESH_S):
        """A client connects, and some time passes; whether it was let in, to stay."""
        if (answer := self.room.ask(address)) is not Answer.COME:
            return answer
        connection = Connection(address, self.clock.now, lambda: self.ended.append(connection))
        self.room.add(connection)
        if busy:
            connection.waits = lambda: False
        if device is not None and not self.room.identify(connection, device):
            return Answer.REFUSED
        self.clock.now += passes
        return connection


@pytest.fixture
def listener():
    return Listener()


def test_whoever_holds_most_makes_room_the_longest_silent_first(listener):
    quiet = listener.come("@quiet")
    crowd = [listener.come("@crowd") for _ in range(4)]
    other = listener.come("@other")
    newcomer = listener.come("@newcomer")
    assert listener.ended == [crowd[0]]
    assert listener.room.ended == {"listener": 1}
    crowd[1].since = listener.clock.now  # it spoke
    listener.clock.now += FRESH_S
    listener.come("@another")
    assert listener.ended == [crowd[0], crowd[2]]
    assert {quiet, other, newcomer}.isdisjoint(listener.ended)


def test_an_address_fills_no_listener(listener):
    crowd = [listener.come("@crowd", passes=0) for _ in range(4)]
    assert listener.come("@crowd") is Answer.REFUSED, "its own have just come"
    assert isinstance(listener.come("@quiet"), Connection)
    listener.come("@crowd")
    assert listener.ended == [crowd[0]], "its own make room for its own"
    assert (listener.room.refused, listener.room.ended) == ({"address": 1}, {"address": 1})


def test_nobody_is_ended_who_is_being_answered(listener):
    for number in range(6):
        listener.come(f"@{number}", busy=True)
    assert listener.come("@late") is Answer.LATER
    assert listener.ended == []


def test_nobody_is_ended_who_has_just_come(listener):
    for number in range(6):
        listener.come(f"@{number}", passes=0)
    assert listener.come("@late") is Answer.LATER
    listener.clock.now += FRESH_S
    assert isinstance(listener.come("@late"), Connection)


def test_a_device_has_its_own_bound_and_many_may_share_an_address(listener):
    many = [listener.come("@nat", device=f"d{number}") for number in range(5)]
    assert all(isinstance(one, Connection) for one in many), "a known device does not count for its address"
    again = listener.come("@nat", device="d0")
    third = listener.come("@nat", device="d0")
    assert isinstance(again, Connection)
    assert isinstance(third, Connection)
    assert listener.ended[0] is many[0], "the device's own, when it has more than two"
    busy = Listener()
    for _ in range(2):
        busy.come("@nat", device="d0", busy=True)
    assert busy.come("@nat", device="d0") is Answer.REFUSED
    assert busy.room.refused == {"device": 1}
    assert isinstance(busy.come("@nat", device="d1"), Connection)


def test_what_left_is_forgotten(listener):
    for number in range(100):
        connection = listener.come("@one", device=f"d{number}")
        listener.room.remove(connection)
        listener.room.remove(connection)
    assert (len(listener.room), listener.ended) == (0, [])


@pytest.mark.parametrize(
    ("host", "counts_as"),
    [
        ("192.0.2.7", "@192.0.2.7"), ("::ffff:192.0.2.7", "@192.0.2.7"), ("2001:db8:1:2:3:4:5:6", "@2001:db8:1:2::"),
        ("fe80::1%eth0", "@fe80::"), ("nothing", "@nothing"),
    ],
)  # fmt: skip
def test_what_counts_as_an_address(host, counts_as):
    assert address_of(host) == counts_as


def test_a_process_with_few_descriptors_gives_each_listener_its_part():
    wanted = ConnectionSettings()
    together = wanted.devices + wanted.operators + wanted.loopback
    assert fitted(wanted, together + OTHER_DESCRIPTORS) == wanted
    few = fitted(wanted, 1024)
    assert few.devices + few.operators + few.loopback <= 1024 - OTHER_DESCRIPTORS
    assert (few.devices > few.operators > few.loopback > 20, few.per_device) == (True, wanted.per_device)
    assert few.devices_per_address <= few.devices
