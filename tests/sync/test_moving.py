"""A fleet server that moves: what is known of its addresses, and when a device goes to another one. The clock is a fake one."""

import itertools

import msgspec
import pytest

from agent.contract.addresses import Addresses
from agent.sync import addresses
from agent.sync.addresses import KEPT, Known
from agent.sync.fleet import moving
from agent.sync.fleet.moving import Mover

LOST_S = 1.5 * moving.LOST_S  # of a device whose place is in the middle
BOTH = frozenset({"https", "mqtt"})
HTTPS, MQTT, NOTHING = frozenset({"https"}), frozenset({"mqtt"}), frozenset()


def place(name, since, **more):
    return Addresses(device_url=f"https://{name}:8444", broker=f"{name}:8883", since=since, **more)


OLD, NEW, NEWER = place("old", 10), place("new", 20), place("newer", 30)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def wall(self):
        return 5e8 + self.now


class World:
    """What answers at which address, and a device that knows the old one."""

    def __init__(self, folder, known=None):
        self.folder, self.clock = folder, Clock()
        self.ways = {"old": BOTH}
        self.asked, self.moved = [], []
        self.while_asked = lambda _: None
        self.mover = Mover(folder, known or Known(used=OLD), self.clock, 0.5, self.ask, lambda k: self.moved.append(k.used))
        self.mover.connected(True)

    def ask(self, one):
        self.asked.append(one.broker_host)
        self.while_asked(one)
        return self.ways.get(one.broker_host, NOTHING)

    def after(self, seconds):
        self.clock.now += seconds
        self.mover.turn()

    @property
    def used(self):
        assert addresses.read(self.folder, OLD).used == self.mover.known.used, "what is on disk is what is used"
        return self.mover.known.used


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_newer_address_is_used_once_it_answers_and_not_before(world):
    world.mover.told(NEW)
    world.after(0)
    assert (world.used, world.moved) == (OLD, [])
    world.ways["new"] = BOTH
    world.after(moving.LONGEST_PAUSE_S)
    assert (world.used, world.moved) == (NEW, [NEW])
    assert world.mover.known.used_since == world.clock.wall()


def test_an_address_that_never_answers_is_asked_ever_more_seldom(world):
    world.mover.told(NEW)
    moments = []
    for _ in range(5000):
        before = len(world.asked)
        world.after(1)
        moments += [world.clock.now] * (len(world.asked) > before)
    pauses = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert pauses[:4] == [5, 10, 20, 40]
    assert max(pauses) == moving.LONGEST_PAUSE_S
    assert world.used == OLD


def test_one_that_was_heard_before_is_no_news(world):
    world.mover.told(OLD)
    world.mover.told(place("older", 5))
    world.mover.told(place("as-old", 10))
    world.after(1000)
    assert world.asked == []
    assert world.mover.known == Known(used=OLD)


def test_a_way_that_works_is_not_given_up_for_a_newer_address(world):
    """Where only the broker is reached, that is what must be reached at the new address."""
    world.mover.told(NEW)
    world.ways["new"] = HTTPS
    world.after(0)
    assert world.used == OLD
    world.ways["old"] = MQTT
    world.after(moving.LONGEST_PAUSE_S)
    assert world.used == OLD
    world.ways["new"] = MQTT
    world.after(moving.LONGEST_PAUSE_S)
    assert world.used == NEW


def test_a_server_that_is_restarted_makes_nobody_ask(world):
    world.mover.told(NEW)
    world.ways["new"] = BOTH
    world.after(0)
    world.asked.clear()
    world.mover.connected(False)
    world.after(LOST_S - 1)
    world.mover.connected(True)
    world.after(1000)
    assert world.asked == []


def test_a_lost_server_is_looked_for_where_it_was(world):
    world.mover.told(NEW)
    world.ways["new"] = BOTH
    world.after(0)
    world.ways["new"] = NOTHING
    world.mover.connected(False)
    world.after(LOST_S)
    assert world.used == OLD
    world.mover.connected(True)
    world.asked.clear()
    world.ways["new"] = BOTH  # the fleet said last that it is there, so it is gone to again
    world.after(0)
    assert world.used == NEW


def test_earlier_ones_are_left_alone_for_a_while_though_a_newer_one_is_awaited(world):
    world.mover.told(NEW)
    world.ways["new"] = BOTH
    world.after(0)
    world.mover.told(NEWER)
    world.asked.clear()
    world.mover.connected(False)
    world.after(LOST_S - 1)
    assert world.asked == ["new", "newer"]
    world.after(moving.FIRST_PAUSE_S)
    assert world.asked[2:] == ["new", "newer", "old"]


def test_two_that_work_equally_well_do_not_alternate(world):
    world.mover.told(NEW)
    world.ways |= {"new": MQTT, "old": MQTT}
    world.after(0)
    world.mover.connected(False)
    for _ in range(100):
        world.after(100)
    assert world.moved == [NEW]


def test_the_newest_of_several_that_were_told(world):
    world.mover.told(NEW)
    world.mover.told(NEWER)
    world.ways |= {"new": BOTH, "newer": BOTH}
    world.after(0)
    assert world.used == NEWER


def test_an_address_that_is_taken_back_is_awaited_no_more(world):
    world.mover.told(NEW)
    world.mover.told(msgspec.structs.replace(OLD, since=40))
    world.ways["new"] = BOTH
    world.after(1000)
    assert world.asked == []
    assert world.mover.known.awaited is None


def test_told_while_another_one_is_asked(world):
    """The answer of the earlier one counts no more."""

    world.ways |= {"new": BOTH, "newer": BOTH}
    world.while_asked = lambda one: world.mover.told(NEWER) if one == NEW else None
    world.mover.told(NEW)
    world.after(0)
    assert world.used == OLD
    world.after(0)
    assert world.used == NEWER


def test_a_fleet_that_hears_of_it_at_once_comes_spread(world):
    world.mover.told(place("new", 20, spread_s=100))
    world.ways["new"] = BOTH
    world.after(49)
    assert world.used == OLD
    world.after(1)  # this device's place is in the middle
    assert world.used.broker_host == "new"


def test_a_fleet_that_lost_its_server_looks_elsewhere_spread(tmp_path):
    known = Known(used=NEW, others=(OLD,))
    clock, first = Clock(), {}

    def mover(number):
        def ask(_):
            first.setdefault(number, clock.now - 1000)
            return NOTHING

        return Mover(tmp_path, known, clock, number / 100, ask, list)

    movers = [mover(number) for number in range(100)]
    for _ in range(50):
        clock.now += 1
        for one in movers:
            one.turn()
    moments = sorted(first.values())
    assert (moments[0], moments[-1], len(moments)) == (moving.LOST_S, 2 * moving.LOST_S, 100)
    assert max(moments.count(second) for second in moments) <= 6


def test_a_spread_that_would_never_end_is_bounded(world):
    world.mover.told(place("new", 20, spread_s=1e12))
    world.ways["new"] = BOTH
    world.after(moving.LONGEST_SPREAD_S)
    assert world.used.broker_host == "new"


def test_a_restart_goes_on_waiting(tmp_path):
    first = World(tmp_path)
    first.mover.told(NEW)
    again = World(tmp_path, addresses.read(tmp_path, OLD))
    again.ways["new"] = BOTH
    again.after(0)
    assert again.used == NEW


def test_what_enrolment_said_is_never_forgotten(tmp_path):
    known = Known(used=OLD)
    for number in range(20, 20 + 2 * KEPT):
        one = place(f"at-{number}", number)
        known = addresses.gone_to(addresses.hear(known, one), one, number)
        assert OLD in known.others
    addresses.write(tmp_path, known)
    found = addresses.read(tmp_path, OLD)
    assert OLD in found.others
    assert len(found.others) == KEPT + 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"used": 7}', b'{"used":{"device_url":"ftp://x","broker":"x:1"},"format":1}']
)
def test_a_file_that_cannot_be_used_is_as_none(content, tmp_path):
    (tmp_path / addresses.FILE).write_bytes(content)
    assert addresses.read(tmp_path, OLD) == Known(used=OLD)


def test_a_disk_that_takes_nothing_keeps_nobody_from_going(world, monkeypatch):
    def full(*_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(addresses.files, "write", full)
    world.ways["new"] = BOTH
    world.mover.told(NEW)
    world.after(0)
    assert world.moved == [NEW]
