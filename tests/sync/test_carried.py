"""Pokes that carry the news: what a device learns from them without asking anybody, and what a hostile broker gains by them.

Real signed metadata, a real HTTPS server that notes every request, and the follower by a clock of the test.
"""

from __future__ import annotations

import base64
import json
import random
import zlib

import pytest

from agent.contract import news as contract
from agent.contract.assignment import Rollout
from agent.contract.codec import ContractError, encode
from agent.contract.names import ReleaseRef
from agent.contract.news import LIKELY, News, pack_what_fits, unpack
from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.contract.topics import Poke
from agent.sync.problems import Problem
from agent.sync.trust import pokes
from agent.sync.trust.follower import Follower
from agent.sync.trust.pokes import BAD_SPREAD_S, Pokes, place
from agent.sync.updating import update
from tests.sync.conftest import FakeClock
from tests.sync.fleet import DAY, DEVICE, Repository, Server, script_release, sha
from tests.sync.test_trust import make_trust

__all__ = ["make_trust"]

HOUR_S = 3600.0
FLOOD_S = 240


class Listener:
    """A device's follower and all that it asks of its server."""

    def __init__(self, trust, server: Server, clock: FakeClock, interval_s: float = 10 * HOUR_S) -> None:
        self.trust, self.server, self.clock = trust, server, clock
        self.changed = 0
        self.follower = Follower(trust, interval_s, self._changed, device=DEVICE, jitter=lambda: 0.5, monotonic=clock.monotonic)

    def _changed(self) -> None:
        self.changed += 1

    def poke(self, payload: bytes, *, alone: bool = False) -> list[str]:
        """What the device asks its server for at once because of this poke."""
        self.server.asked.clear()
        self.follower.poked(payload, alone)
        self.follower.turn()
        return list(self.server.asked)

    def wait(self, seconds: float) -> int:
        """How many looks are made within so many seconds."""
        self.server.asked.clear()
        end = self.clock.monotonic() + seconds
        while (rest_s := self.follower.rest_s()) <= end - self.clock.monotonic():
            self.clock.pass_(rest_s + 0.001)
            self.follower.turn()
        self.clock.pass_(max(0.0, end - self.clock.monotonic()))
        return self.server.asked.count("metadata/timestamp.json")

    @property
    def version(self) -> int:
        assert self.follower.current is not None
        return self.follower.current.assignment.version


@pytest.fixture
def device(make_trust, server, repository, clock) -> Listener:
    """A device that has looked once."""
    repository.assign("crane", None)
    listener = Listener(make_trust(clock), server, clock)
    listener.follower.turn()
    assert listener.follower.problem is None
    server.asked.clear()
    return listener


def documents(repository: Repository, *more: str) -> dict[str, str]:
    """What a server carries: the newest of each."""
    v = repository.versions
    names = ["metadata/timestamp.json", *(f"metadata/{v[role]}.{role}.json" for role in ("snapshot", "targets", "assignments"))]
    names.append(f"targets/assignments/{sha(encode(repository.assignment))}.fleet.json")
    return {name: repository.files[name].decode() for name in (*names, *more)}


def poke(said: dict[str, str], *, root: int = 1, spread_s: float = 0.0) -> bytes:
    return encode(Poke(news=zlib.compress(encode(News(root=root, documents=said))), spread_s=spread_s))


# -- what a device learns ------------------------------------------------------------------------------------------------------


def test_a_device_that_is_told_asks_for_nothing(device: Listener, repository: Repository):
    repository.assign("crane", None, withdrawn=())
    assert device.poke(poke(documents(repository))) == []
    assert device.version == repository.assignment.version
    assert device.changed == 2
    assert device.wait(HOUR_S) == 0, "nor later"


def test_what_was_heard_is_heard_once(device: Listener, repository: Repository, tmp_path):
    repository.assign("crane", None)
    said = poke(documents(repository))
    device.poke(said)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "trust").rglob("*.json")}
    for _ in range(5):
        assert device.poke(said) == []
    assert device.changed == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "trust").rglob("*.json")} == kept, "flash wears"


def test_what_was_heard_outlasts_the_process(device: Listener, repository: Repository, make_trust, clock):
    repository.assign("crane", None)
    device.poke(poke(documents(repository)))
    again = make_trust(clock)
    assert again.remembered().assignment.version == repository.assignment.version
    assert again.refresh().assignment.version == repository.assignment.version


def test_a_manifest_that_came_along_is_not_asked_for(device: Listener, repository: Repository, tmp_path):
    manifest, contents = script_release(tmp_path / "r", 1, "scale 2")
    repository.publish(manifest, contents)
    repository.assign("crane", None, rollout=Rollout(id="r1", release=1, previous=None, permille=1000))
    target = next(name for name in repository.files if name.startswith("targets/releases/"))
    roles = f"metadata/{repository.versions['releases']}.releases.json"
    assert device.poke(poke(documents(repository, roles, target))) == []
    assert device.follower.current.wanted("crane").release == 1
    assert device.trust.manifest(ReleaseRef("crane", 1)).manifest == manifest
    assert device.server.asked == []


def test_what_did_not_come_along_is_asked_for_and_nothing_else(device: Listener, repository: Repository, tmp_path):
    manifest, contents = script_release(tmp_path / "r", 1, "scale 2")
    repository.publish(manifest, contents)
    repository.assign("crane", 1)
    assert device.poke(poke(documents(repository))) == []
    assert device.trust.manifest(ReleaseRef("crane", 1)).manifest == manifest
    roles = f"metadata/{repository.versions['releases']}.releases.json"
    assert device.server.asked == [roles, next(name for name in repository.files if name.startswith("targets/releases/"))]


def test_new_groups_come_with_the_record(device: Listener, repository: Repository):
    repository.groups, repository.serial = ("harbour-north",), 2
    said = {**documents(repository), "record": repository.record().decode()}
    assert device.poke(poke(said), alone=True) == []
    assert device.follower.current.record.groups == ("harbour-north",)
    assert device.changed == 2
    assert device.poke(poke(documents(repository))) == [], "and is kept"
    assert device.follower.current.record.groups == ("harbour-north",)


def test_without_a_document_that_is_needed_the_device_looks_within_the_spread(device: Listener, repository: Repository):
    repository.assign("crane", None)
    said = documents(repository)
    del said[f"metadata/{repository.versions['snapshot']}.snapshot.json"]
    assert device.poke(poke(said, spread_s=100.0)) == []
    due_s = device.follower.rest_s()
    assert due_s == pytest.approx(100.0 * place(DEVICE))
    assert device.wait(100.0) == 1
    assert device.version == repository.assignment.version


def test_a_newer_root_is_asked_for(device: Listener, repository: Repository):
    repository.rotate_root("timestamp")
    repository.assign("crane", None)
    assert device.poke(poke(documents(repository), root=2)) != []
    assert device.version == repository.assignment.version
    repository.assign("crane", None)
    assert device.poke(poke(documents(repository), root=2)) == [], "the next one finds it here"
    assert device.version == repository.assignment.version


def test_a_bare_poke_of_an_older_server(device: Listener, repository: Repository):
    repository.assign("crane", None)
    assert "metadata/timestamp.json" in device.poke(b'{"assignment_version":3,"format":1,"kind":"poke"}')
    assert device.version == repository.assignment.version


def test_a_device_still_looks_by_itself(device: Listener, repository: Repository):
    """A broker that keeps back what it should carry delays it no longer than this."""
    repository.assign("crane", None)
    device.poke(poke(documents(repository)))
    repository.assign("crane", None)
    assert device.wait(11 * HOUR_S) == 1
    assert device.version == repository.assignment.version


def test_the_looks_of_a_fleet_are_spread_evenly():
    places = sorted(place(f"camera-{number}") for number in range(2000))
    assert all(abs(at - index / 2000) < 0.04 for index, at in enumerate(places))


# -- what a hostile broker gains -----------------------------------------------------------------------------------------------


def garbage(_: Repository) -> bytes:
    return bytes(range(256))


def nothing(_: Repository) -> bytes:
    return b""


def too_large(repository: Repository) -> bytes:
    return poke({**documents(repository), "x": base64.b85encode(random.Random(1).randbytes(60_000)).decode()})


def a_bomb(repository: Repository) -> bytes:
    return encode(Poke(news=zlib.compress(b"[" * 40_000_000)))


def nested(_: Repository) -> bytes:
    return b"[" * 60_000


def truncated(repository: Repository) -> bytes:
    return encode(Poke(news=zlib.compress(encode(News(root=1, documents=documents(repository))))[:-20]))


def many_documents(repository: Repository) -> bytes:
    said = {"root": 1, "documents": {**documents(repository), **{str(n): "" for n in range(100)}}, "format": 1}
    return encode(Poke(news=zlib.compress(json.dumps(said).encode())))


def wrong_signature(repository: Repository) -> bytes:
    said = documents(repository)
    stamp = json.loads(said["metadata/timestamp.json"])
    stamp["signatures"][0]["sig"] = "00" * 64
    return poke({**said, "metadata/timestamp.json": json.dumps(stamp)})


def changed_assignment(repository: Repository) -> bytes:
    said = documents(repository)
    name = next(name for name in said if name.startswith("targets/"))
    return poke({**said, name: said[name].replace("harbour", "barbour")})


def expired(repository: Repository) -> bytes:
    repository.expires["timestamp"] = 1_700_000_000.0
    repository.sign()
    said = poke(documents(repository))
    del repository.expires["timestamp"]
    repository.sign()
    return said


def another_repository(_: Repository) -> bytes:
    other = Repository()
    for _ in range(9):
        other.assign("crane", None)
    return poke(documents(other))


def another_device(repository: Repository) -> bytes:
    return poke({**documents(repository), "record": repository.record(device="crane-8").decode()})


def another_fleet(repository: Repository) -> bytes:
    return poke({**documents(repository), "record": repository.record(fleet="airport").decode()})


def any_root(repository: Repository) -> bytes:
    return poke(documents(repository), root=10**9)


HOSTILE = [
    garbage, nothing, too_large, a_bomb, nested, truncated, many_documents, wrong_signature, changed_assignment, expired,
    another_repository, another_device, another_fleet, any_root,
]  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE, ids=[attack.__name__ for attack in HOSTILE])
def test_a_hostile_poke(attack, device: Listener, repository: Repository):
    """It says nothing that is believed, is no reason to report a problem, and costs a look that is spread over time."""
    before = device.follower.current
    repository.assign("crane", None)
    payload = attack(repository)
    asked = device.poke(payload)
    assert device.follower.current == before or (attack is any_root and asked)
    assert device.follower.problem is None
    assert asked == [] or attack is any_root, "a root that is said to be there has to be asked for; once"
    assert device.wait(BAD_SPREAD_S) == (1 if not asked else 0)
    assert device.follower.problem is None
    assert device.version == repository.assignment.version


def test_an_older_word_takes_nothing_back(device: Listener, repository: Repository):
    repository.assign("crane", None)
    older = poke(documents(repository))
    repository.assign("crane", None)
    newer = poke(documents(repository))
    assert device.poke(newer) == []
    for alone, looks in ((False, 0), (True, 1)):
        assert device.poke(older, alone=alone) == []
        assert device.wait(BAD_SPREAD_S) == looks, "it is asked of the server alone why it went back"
    assert device.version == repository.assignment.version
    assert device.follower.problem is None


@pytest.mark.parametrize("attack", [nothing, wrong_signature, truncated], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("bare", [False, True], ids=["forged", "bare"])
def test_a_flood(attack, bare, device: Listener, repository: Repository):
    """Four minutes of pokes, ten a second."""
    payload = encode(Poke()) if bare else attack(repository)
    device.server.asked.clear()
    for _ in range(FLOOD_S * 10):
        device.follower.poked(payload, False)
        device.clock.pass_(0.1)
        if device.follower.rest_s() == 0.0:
            device.follower.turn()
    looks = device.server.asked.count("metadata/timestamp.json")
    assert 0 < looks <= pokes.LOOKS_AT_ONCE + FLOOD_S / pokes.LOOK_EVERY_S + 1


def test_a_flood_is_heard_at_a_bounded_rate():
    waiting, heard = Pokes(DEVICE), 0
    for tick in range(36_000):
        waiting.put(b"x", alone=bool(tick % 2))
        heard += waiting.take(tick / 10) is not None
    assert heard <= pokes.HEARD_AT_ONCE + 3600 / pokes.HEARD_EVERY_S + 1


def test_a_flood_keeps_no_good_poke_out_for_long(device: Listener, repository: Repository):
    for _ in range(200):
        device.follower.poked(garbage(repository), False)
        device.follower.turn()
    repository.assign("crane", None)
    device.follower.poked(poke(documents(repository)), True)
    device.clock.pass_(pokes.HEARD_EVERY_S)
    device.follower.turn()
    assert device.version == repository.assignment.version


# -- packing -------------------------------------------------------------------------------------------------------------------


def test_what_is_useful_comes_along_as_far_as_there_is_room():
    needed = {"metadata/timestamp.json": b'{"a": 1}'}
    useful = [("large", bytes(i * i % 191 + 32 for i in range(3000)).decode("latin-1").encode()), ("small", b"{}")]
    both = unpack(pack_what_fits(3, needed, useful, 8000))
    assert set(both.documents) == {"metadata/timestamp.json", "large", "small"}
    assert both.root == 3
    assert set(unpack(pack_what_fits(3, needed, useful, 200)).documents) == {"metadata/timestamp.json", "small"}
    assert pack_what_fits(3, needed, useful, 20) == b""


def test_what_is_packed_can_be_unpacked_or_is_refused():
    """Every cut of news, and what stands behind it."""
    packed = pack_what_fits(1, {"metadata/timestamp.json": b'{"signed": {}}'}, ())
    for end in range(len(packed)):
        with pytest.raises(ContractError):
            unpack(packed[:end])
    with pytest.raises(ContractError):
        unpack(packed + b"x")
    assert LIKELY * contract.PACKED_BYTES < contract.MAX_NEWS_BYTES


def test_a_record_that_ended_is_asked_for(make_trust, server: Server, repository: Repository, clock: FakeClock):
    """What is kept is verified anew each time."""
    repository.expires = dict.fromkeys(repository.keys, clock.wall() + 9 * DAY)
    repository.sign()
    device = Listener(make_trust(clock), server, clock, interval_s=30 * DAY)
    device.follower.turn()
    clock.pass_(DAY + 60)
    repository.record_expires = clock.wall() + DAY
    repository.assign("crane", None)
    assert device.poke(poke(documents(repository))) == []
    assert device.wait(BAD_SPREAD_S) == 1
    assert device.follower.current.record.expires > clock.wall()


# -- a busy server -------------------------------------------------------------------------------------------------------------


def busy(seconds: str):
    def fault(handler) -> bool:
        handler.send_response(503)
        handler.send_header("Retry-After", seconds)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return fault


@pytest.mark.parametrize("path", ["metadata/timestamp.json", "record"])
def test_a_busy_server_is_left_alone_for_as_long_as_it_says(path, device: Listener, repository: Repository):
    device.server.faults[path] = busy("200")
    device.follower.look_soon()
    device.follower.turn()
    assert device.follower.problem is not None
    del device.server.faults[path]
    repository.assign("crane", None)
    assert device.poke(encode(Poke())) == [], "also when it is poked"
    assert device.wait(199) == 0
    assert device.wait(102) == 1, "and within half as much more"
    assert device.follower.problem is None


def test_a_busy_server_is_asked_once_for_a_manifest(device: Listener, repository: Repository, tmp_path):
    manifest, contents = script_release(tmp_path / "r", 1, "scale 2")
    repository.publish(manifest, contents)
    repository.assign("crane", 1)
    device.poke(poke(documents(repository)))
    device.server.faults["metadata/"] = busy("30")
    with pytest.raises(Problem) as caught:
        device.trust.manifest(ReleaseRef("crane", 1))
    assert caught.value.wait_s == 30.0
    assert len(device.server.asked) == 1


@pytest.mark.parametrize(("said", "longest_s"), [("999999999999", 900.0), ("-5", 8.0), ("soon", 8.0), ("", 8.0), ("²", 8.0)])
def test_no_server_is_left_alone_for_ever(said, longest_s, device: Listener):
    device.server.faults["metadata/timestamp.json"] = busy(said.encode().decode("latin-1"))
    device.follower.look_soon()
    device.follower.turn()
    assert device.follower.rest_s() <= longest_s


def test_a_download_that_a_busy_server_put_off_waits_as_long():
    fetching = update.UpdateState(model="crane", phase=Phase.FETCHING, since=0.0, wanted=1, target=1)
    failure = update.Failure(reason=Reason.DOWNLOAD_FAILED, message="busy")
    assert update.put_off(fetching, 0.0, failure, 1.0).retry_at == pytest.approx(10.0)
    assert update.put_off(fetching, 0.0, failure, 0.0, wait_s=200.0).retry_at == pytest.approx(200.0)
    assert update.put_off(fetching, 0.0, failure, 1.0, wait_s=200.0).retry_at == pytest.approx(300.0)
