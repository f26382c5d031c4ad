"""Attacks by name against the real client over real HTTPS, each refused with a reason code of its own.

docs/explanation/attacks.md shows this table; a test holds the two together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from agent.contract import topics
from agent.contract.assignment import Assignment
from agent.contract.codec import encode
from agent.contract.manifest import File
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.store import Store
from agent.sync.fetching.https import HttpBlobs
from agent.sync.http import FleetHttp
from agent.sync.identity import Identity
from agent.sync.problems import Problem
from agent.sync.trust.follower import Follower
from tests.sync.blobs import downloader
from tests.sync.conftest import FakeClock, eventually
from tests.sync.fleet import Authority, Repository, Server, script_release, sha
from tests.sync.test_link import Ours, broker, ours, outbox
from tests.sync.test_link import fleet as broker_fleet
from tests.sync.test_trust import make_trust, reason_of

__all__ = ["broker", "broker_fleet", "make_trust", "ours", "outbox"]
PAGE = Path(__file__).parents[2] / "docs/explanation/attacks.md"


@dataclass
class Scene:
    """A device that follows a fleet: release 1 of crane is assigned, 1 and 2 are published."""

    repository: Repository
    server: Server
    identity: Identity
    store: Store
    folder: Path
    make_trust: Callable

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.trust = self.make_trust(self.clock)

    def refresh(self):
        return self.trust.refresh()

    def manifest(self, version: int = 1):
        return self.trust.manifest(ReleaseRef("crane", version))


@pytest.fixture
def scene(repository, server, identity, store, tmp_path, make_trust):
    for version in (1, 2):
        repository.publish(*script_release(tmp_path / f"r{version}", version, f"scale {version}"))
    repository.assign("crane", 1)
    made = Scene(repository, server, identity, store, tmp_path, make_trust)
    made.refresh()
    return made


def arbitrary_installation(scene: Scene):
    """A model of the attacker's own, signed with a key of his own."""
    scene.repository.publish(*script_release(scene.folder / "evil", 3, "scale 666"))
    scene.repository.sign(signers={"releases": CryptoSigner.generate_ed25519()})
    return lambda: scene.manifest(3)


def endless_data(scene: Scene):
    """An answer that never ends, to fill the disk or the memory."""

    def endless(handler) -> bool:
        handler.send_response(200)
        handler.end_headers()
        while not handler.server_double.released.is_set():
            handler.wfile.write(b" " * 65536)
        return True

    scene.server.faults["metadata/timestamp.json"] = endless
    return scene.refresh


def fast_forward(scene: Scene):
    """Version one million, signed with stolen online keys, so that the honest fleet looks old for ever: new keys undo it."""
    for role in ("timestamp", "snapshot"):
        scene.repository.versions[role] = 1_000_000
    scene.repository.sign()
    scene.refresh()
    stolen = dict(scene.repository.files)
    for role in ("timestamp", "snapshot"):
        scene.repository.rotate_root(role)
        scene.repository.versions[role] = 10
    scene.repository.assign("crane", 2)
    assert scene.refresh().wanted("crane").release == 2, "the fleet's own low numbers count again"
    scene.repository.files["metadata/timestamp.json"] = stolen["metadata/timestamp.json"]
    return scene.refresh


def indefinite_freeze(scene: Scene):
    """Everything as it was, for ever: no update is ever seen."""
    scene.repository.expires = dict.fromkeys(("timestamp", "snapshot", "assignments"), time.time() - 1)
    scene.repository.sign()
    return scene.refresh


def mix_and_match(scene: Scene):
    """Rightly signed parts that never belonged together."""
    name = f"metadata/{scene.repository.versions['snapshot']}.snapshot.json"
    old = scene.repository.files[name]
    scene.repository.sign()
    scene.repository.files[f"metadata/{scene.repository.versions['snapshot']}.snapshot.json"] = old
    return scene.refresh


def rollback(scene: Scene):
    """Older metadata, rightly signed in its day."""
    old = dict(scene.repository.files)
    scene.repository.assign("crane", 2)
    scene.refresh()
    scene.repository.files = old
    return scene.refresh


def wrong_software(scene: Scene):
    """The manifest of one release under the name of another."""
    path = scene.folder / "other"
    manifest, _ = script_release(path, 2, "scale 2")
    scene.repository.manifests["releases/crane/1.json"] = encode(manifest)
    scene.repository.sign()
    return scene.manifest


def key_compromise_below_threshold(scene: Scene):
    """Two keys must sign, one was stolen."""
    second = CryptoSigner.generate_ed25519()
    root = scene.repository.root.signed
    root.add_key(second.public_key, "timestamp")
    root.roles["timestamp"].threshold = 2
    root.version += 1
    scene.repository.root.sign(scene.repository.keys["root"])
    scene.repository.files[f"metadata/{root.version}.root.json"] = scene.repository.root.to_bytes()
    scene.repository.assign("crane", 2)
    return scene.refresh


def slow_retrieval(scene: Scene):
    """A byte now and then, which passes every limit on silence."""

    def trickle(handler) -> bool:
        handler.send_response(200)
        handler.end_headers()
        while not handler.server_double.released.is_set():
            scene.clock.pass_(10)
            handler.wfile.write(b" ")
            handler.server_double.released.wait(0.01)
        return True

    scene.server.faults["metadata/timestamp.json"] = trickle
    return scene.refresh


def replayed_assignment(scene: Scene):
    """An older assignment under new metadata, by a thief of the online keys or a server restored from a backup."""
    scene.repository.assignment = Assignment(fleet="harbour", version=1, models={})
    scene.repository.sign()
    return scene.refresh


def replayed_device_record(scene: Scene):
    """The device's record of the time when it was in another group."""
    scene.repository.serial = 0
    scene.repository.sign()
    return scene.refresh


def downgrade_by_the_online_key(scene: Scene):
    """A thief of the online keys offers again what was withdrawn."""
    scene.repository.assign("crane", 1, withdrawn=(2,))
    scene.refresh()
    scene.repository.assign("crane", 2)

    def install():
        desired = scene.refresh()
        assert desired.wanted("crane").release is None
        raise Problem(Reason.WITHDRAWN, str(desired.contradicted()))

    return install


def blob_swapped_by_a_mirror(scene: Scene):
    """Other bytes under the name of a model's file."""
    good, evil = b"good" * 1000, b"evil" * 1000
    scene.repository.blobs[sha(good)] = evil
    who = scene.identity

    def connect() -> FleetHttp:
        return FleetHttp(
            who.address.device_url, scene.clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file
        )

    download = downloader(scene.store, HttpBlobs(connect))

    def fetch() -> None:
        try:
            download.fetch(File(sha256=sha(good), size_bytes=len(good)), lambda _: None, lambda: False)
        finally:
            assert not scene.store.has_blob(sha(good))

    return fetch


def documents_of_another_fleet(scene: Scene):
    """Rightly signed for a fleet that shares the keys, a copy of the server for tests for example."""
    scene.repository.assignment = Assignment(fleet="elsewhere", version=9, models={})
    scene.repository.sign()
    return scene.refresh


def record_of_another_device(scene: Scene):
    """The signed record of the neighbour, who is in the canary group."""
    scene.repository.files["record"] = scene.repository.record(device="crane-8")
    return scene.refresh


def path_traversal(scene: Scene):
    """A file of a release called ../../../etc/cron.d/x, signed by a careless publisher."""
    manifest, _ = script_release(scene.folder / "r3", 3, "scale 3")
    scene.repository.manifests["releases/crane/3.json"] = encode(manifest).replace(b"model.script", b"../../../etc/cron.d/x")
    scene.repository.sign()
    return lambda: scene.manifest(3)


def json_bomb(scene: Scene):
    """Nested a hundred thousand times, small enough to be read."""
    scene.repository.manifests["releases/crane/3.json"] = b'{"anything":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    scene.repository.sign()
    return lambda: scene.manifest(3)


def json_bomb_as_metadata(scene: Scene):
    """The same before any signature was checked."""
    scene.repository.files["metadata/timestamp.json"] = b"[" * 8000 + b"]" * 8000
    return scene.refresh


def a_server_of_somebody_else(scene: Scene):
    """Whoever answers at the fleet's address without the key of its certificate."""
    stranger = Server(Authority("stranger"), scene.repository, scene.folder / "stranger")

    def ask() -> None:
        http = FleetHttp(stranger.url, scene.clock, ca=scene.identity.ca_file)
        try:
            http.get(http.url("/metadata/timestamp.json"), limit_bytes=1000, deadline_s=10)
        finally:
            http.close()
            stranger.close()

    return ask


ATTACKS = [
    (arbitrary_installation, Reason.BAD_SIGNATURE),
    (endless_data, Reason.ENDLESS_DATA),
    (fast_forward, Reason.BAD_SIGNATURE),
    (indefinite_freeze, Reason.EXPIRED_METADATA),
    (mix_and_match, Reason.MIX_AND_MATCH),
    (rollback, Reason.METADATA_ROLLBACK),
    (wrong_software, Reason.WRONG_RELEASE),
    (key_compromise_below_threshold, Reason.BELOW_THRESHOLD),
    (slow_retrieval, Reason.SLOW_RETRIEVAL),
    (replayed_assignment, Reason.REPLAYED_ASSIGNMENT),
    (replayed_device_record, Reason.REPLAYED_ASSIGNMENT),
    (downgrade_by_the_online_key, Reason.WITHDRAWN),
    (blob_swapped_by_a_mirror, Reason.HASH_MISMATCH),
    (documents_of_another_fleet, Reason.WRONG_FLEET),
    (record_of_another_device, Reason.WRONG_FLEET),
    (path_traversal, Reason.BAD_MANIFEST),
    (json_bomb, Reason.UNREADABLE),
    (json_bomb_as_metadata, Reason.UNREADABLE),
    (a_server_of_somebody_else, Reason.DOWNLOAD_FAILED),
]


@pytest.mark.parametrize(("attack", "reason"), ATTACKS, ids=[attack.__name__ for attack, _ in ATTACKS])
def test_attack(attack, reason, scene: Scene):
    before = scene.trust.remembered()
    strike = attack(scene)
    known = scene.trust.remembered()

    assert reason_of(strike) is reason

    after = scene.trust.remembered()
    assert after == known or reason is Reason.WITHDRAWN, "what was known stays"
    assert before is not None
    assert after is not None
    assert list(scene.store.selections()) == []


@pytest.mark.mosquitto
def test_forged_poke(scene: Scene, ours: Ours, broker_fleet, monkeypatch: pytest.MonkeyPatch):
    """Whoever can publish at the broker: what a poke says is verified, and one that cannot be believed is one more look."""
    monkeypatch.setattr("agent.sync.trust.follower.BAD_SPREAD_S", 0.0)
    looked = threading.Event()
    follower = Follower(scene.trust, 3600.0, lambda: None, looked.set)
    thread = threading.Thread(target=follower.run)
    thread.start()
    try:
        assert looked.wait(20)
        before = follower.current

        def poked(payload: bytes, alone: bool) -> None:
            ours.pokes += 1
            looked.clear()
            follower.poked(payload, alone)

        ours.link.on_poke = poked
        ours.link.start()
        eventually(broker_fleet.online, "the birth")
        forged = encode(Assignment(fleet="harbour", version=99, models={}))
        for count, payload in enumerate((forged, b"[" * 50_000, b"", bytes(range(256))), start=1):
            broker_fleet.client.publish(topics.POKE_ALL, payload, qos=1)
            eventually(lambda n=count: ours.pokes == n, "a poke")
            assert looked.wait(20)
        assert follower.problem is None
        assert follower.current is not None
        assert follower.current.assignment == before.assignment
    finally:
        follower.stop()
        thread.join(20)


POKE = ("forged poke", "Whoever can publish at the broker: what a poke says is verified, and one that cannot be believed is one more look.", "none: the device looks, and knows what it knew")  # fmt: skip


def table() -> str:
    """The attacks as the page shows them."""
    lines = ["| attack | what the attacker does | the device says | test |", "|---|---|---|---|"]
    for attack, reason in ATTACKS:
        name, story = attack.__name__.replace("_", " "), " ".join((attack.__doc__ or "").split())
        lines.append(f"| {name} | {story} | `{reason.value}` | `test_attack[{attack.__name__}]` |")
    lines.append(f"| {POKE[0]} | {POKE[1]} | {POKE[2]} | `test_forged_poke` |")
    return "\n".join(lines)


def test_the_page_shows_this_table():
    assert table() in PAGE.read_text(), f"{PAGE} must hold exactly:\n{table()}"
