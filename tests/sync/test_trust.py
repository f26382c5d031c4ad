"""What the trust client accepts and refuses: one story per attack, each against real HTTPS with client certificates."""

from __future__ import annotations

import json
import time

import pytest
from securesystemslib.signer import CryptoSigner

from agent.contract.assignment import Assignment
from agent.contract.codec import encode
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.host.clock import LastKnownGood, SignedClock
from agent.sync.http import FleetHttp
from agent.sync.problems import Problem
from agent.sync.trust.client import Trust
from tests.sync.conftest import FakeClock
from tests.sync.fleet import DAY, Repository, Server, enrolled, script_release, sha


@pytest.fixture
def make_trust(identity, tmp_path):
    made = []

    def make(clock=None, who=identity) -> Trust:
        known = LastKnownGood(tmp_path / "trust" / "clock.json", floor=who.not_before)
        clock = SignedClock(clock or FakeClock(), known)
        http = FleetHttp(
            who.address.device_url,
            clock,
            ca=who.ca_file,
            certificate=who.certificate_file,
            key=who.key_file,
            unset=clock.unset,
        )
        made.append(Trust(tmp_path / "trust", who, http, clock))
        return made[-1]

    yield make
    for trust in made:
        trust.close()


@pytest.fixture
def trust(make_trust) -> Trust:
    return make_trust()


def reason_of(action) -> Reason:
    with pytest.raises(Problem) as caught:
        action()
    return caught.value.reason


def test_a_device_learns_what_it_should_run(trust, repository: Repository, tmp_path):
    manifest, contents = script_release(tmp_path / "r", 1, "scale 2")
    repository.publish(manifest, contents)
    repository.groups = ("harbour-north",)
    repository.assign("crane", 1)

    desired = trust.refresh()

    assert desired.wanted("crane").release == 1
    assert desired.record.groups == ("harbour-north",)
    assert desired.fresh(time.time())
    assert not desired.fresh(time.time() + 2 * DAY), "the record is good for a day"
    signed = trust.manifest(ReleaseRef("crane", 1))
    assert signed.manifest == manifest
    assert signed.sha256 == sha(encode(manifest))
    assert trust.remembered() == desired


def test_a_release_that_nobody_signed_is_not_there(trust, repository):
    assert reason_of(lambda: trust.manifest(ReleaseRef("crane", 1))) is Reason.WRONG_RELEASE


def wrong(role: str):
    def attack(repository: Repository) -> None:
        repository.sign(signers={role: CryptoSigner.generate_ed25519()})

    return attack


def expired(role: str):
    def attack(repository: Repository) -> None:
        repository.expires[role] = time.time() - 60
        repository.sign()

    return attack


def older_timestamp(repository: Repository) -> None:
    repository.versions["timestamp"] -= 1
    repository.sign(bump=False)


def older_snapshot(repository: Repository) -> None:
    repository.versions["snapshot"] -= 1
    repository.versions["timestamp"] += 1
    repository.sign(bump=False)


def snapshot_of_another_day(repository: Repository) -> None:
    """Mix and match: the timestamp speaks of one snapshot, and an older, rightly signed one is served in its place."""
    old = repository.files[f"metadata/{repository.versions['snapshot']}.snapshot.json"]
    repository.sign()
    repository.files[f"metadata/{repository.versions['snapshot']}.snapshot.json"] = old


def releases_of_another_day(repository: Repository) -> None:
    old = repository.files[f"metadata/{repository.versions['assignments']}.assignments.json"]
    repository.sign()
    repository.files[f"metadata/{repository.versions['assignments']}.assignments.json"] = old


def older_assignment(repository: Repository) -> None:
    repository.assignment = Assignment(fleet="harbour", version=1, models={})
    repository.sign()


def foreign_assignment(repository: Repository) -> None:
    repository.assignment = Assignment(fleet="elsewhere", version=9, models={})
    repository.sign()


def garbage_assignment(repository: Repository) -> None:
    repository.assignment = {"version": "three"}  # type: ignore[assignment]
    repository.sign()


def older_record(repository: Repository) -> None:
    repository.serial = 0
    repository.sign()


def expired_record(repository: Repository) -> None:
    repository.record_expires = time.time() - 60
    repository.sign()


def foreign_record(repository: Repository) -> None:
    repository.sign()
    repository.files["record"] = repository.record(device="crane-8")


def self_signed_record(repository: Repository) -> None:
    repository.record_signer = CryptoSigner.generate_ed25519()
    repository.sign()


def record_signed_by_the_publisher(repository: Repository) -> None:
    repository.record_signer = repository.keys["releases"]
    repository.sign()


def changed_record(repository: Repository) -> None:
    repository.sign()
    envelope = json.loads(repository.files["record"])
    envelope["payload"] = envelope["payload"][:-8] + "AAAAAAA="
    repository.files["record"] = json.dumps(envelope).encode()


def record_that_is_no_envelope(repository: Repository) -> None:
    repository.sign()
    repository.files["record"] = b"[1, 2, 3]"


def no_record(repository: Repository) -> None:
    repository.sign()
    del repository.files["record"]


def other_assignment_bytes(repository: Repository) -> None:
    repository.assign("crane", 2)  # a device that has the document asks for it no more
    for path in repository.files:
        if path.startswith("targets/assignments/"):
            repository.files[path] = repository.files[path].replace(b"harbour", b"Harbour")


def metadata_that_is_not_json(repository: Repository) -> None:
    repository.files["metadata/timestamp.json"] = b"<html>a captive portal</html>"


ATTACKS = [
    (wrong("timestamp"), Reason.BAD_SIGNATURE),
    (wrong("snapshot"), Reason.BAD_SIGNATURE),
    (wrong("root"), Reason.BAD_SIGNATURE),  # signs the top-level targets
    (wrong("assignments"), Reason.BAD_SIGNATURE),
    (expired("timestamp"), Reason.EXPIRED_METADATA),
    (expired("snapshot"), Reason.EXPIRED_METADATA),
    (expired("targets"), Reason.EXPIRED_METADATA),
    (expired("assignments"), Reason.EXPIRED_METADATA),
    (older_timestamp, Reason.METADATA_ROLLBACK),
    (older_snapshot, Reason.METADATA_ROLLBACK),
    (snapshot_of_another_day, Reason.MIX_AND_MATCH),
    (releases_of_another_day, Reason.MIX_AND_MATCH),
    (older_assignment, Reason.REPLAYED_ASSIGNMENT),
    (foreign_assignment, Reason.WRONG_FLEET),
    (garbage_assignment, Reason.BAD_MANIFEST),
    (other_assignment_bytes, Reason.HASH_MISMATCH),
    (older_record, Reason.REPLAYED_ASSIGNMENT),
    (expired_record, Reason.EXPIRED_METADATA),
    (foreign_record, Reason.WRONG_FLEET),
    (self_signed_record, Reason.BAD_SIGNATURE),
    (record_signed_by_the_publisher, Reason.BAD_SIGNATURE),
    (changed_record, Reason.BAD_SIGNATURE),
    (record_that_is_no_envelope, Reason.BAD_SIGNATURE),
    (no_record, Reason.DOWNLOAD_FAILED),
    (metadata_that_is_not_json, Reason.UNREADABLE),
]


@pytest.mark.parametrize(("attack", "expected"), ATTACKS, ids=lambda v: getattr(v, "__qualname__", None) or str(v))
def test_attack_is_refused_and_what_was_known_stays(attack, expected, trust, repository):
    repository.assign("crane", 1)
    before = trust.refresh()

    attack(repository)

    assert reason_of(trust.refresh) is expected
    assert trust.remembered() == before


@pytest.mark.parametrize(("attack", "expected"), ATTACKS[:11], ids=lambda v: getattr(v, "__qualname__", None) or str(v))
def test_after_an_attack_the_device_can_update_again(attack, expected, trust, repository):
    repository.assign("crane", 1)
    trust.refresh()
    attack(repository)
    reason_of(trust.refresh)

    repository.expires = {}
    repository.sign()
    repository.assign("crane", 2)

    assert trust.refresh().wanted("crane").release == 2


def test_a_rollback_is_seen_even_when_python_tufs_own_memory_was_lost(trust, repository, make_trust, tmp_path):
    """A power cut can empty its files, which are not synced: our own record still knows the versions."""
    repository.assign("crane", 1)
    trust.refresh()
    for path in (tmp_path / "trust" / "metadata").glob("*.json"):
        path.unlink()
    older_timestamp(repository)

    assert reason_of(make_trust().refresh) is Reason.METADATA_ROLLBACK


def test_after_stolen_online_keys_were_replaced_versions_may_start_again(trust, repository):
    """Fast-forward recovery: the thief signed version one million, the new key starts at a low number."""
    repository.versions["timestamp"] = repository.versions["snapshot"] = 1_000_000
    repository.sign()
    trust.refresh()

    repository.rotate_root("timestamp")
    repository.rotate_root("snapshot")
    repository.versions["timestamp"] = repository.versions["snapshot"] = 5
    repository.sign()

    assert trust.refresh().assignment.version == repository.assignment.version


def test_a_manifest_signed_by_the_wrong_key_is_refused(trust, repository, tmp_path):
    repository.publish(*script_release(tmp_path / "r", 1, "scale 2"))
    repository.sign(signers={"releases": CryptoSigner.generate_ed25519()})

    assert reason_of(lambda: trust.manifest(ReleaseRef("crane", 1))) is Reason.BAD_SIGNATURE


def test_a_manifest_with_other_bytes_than_were_signed_is_refused(trust, repository, tmp_path):
    repository.publish(*script_release(tmp_path / "r", 1, "scale 2"))
    path = next(path for path in repository.files if path.startswith("targets/releases/"))
    data = repository.files[path]
    repository.files[path] = data.replace(b"cpu", b"gpu")

    assert reason_of(lambda: trust.manifest(ReleaseRef("crane", 1))) is Reason.HASH_MISMATCH

    repository.files[path] = data + b" " * 100
    assert reason_of(lambda: trust.manifest(ReleaseRef("crane", 1))) is Reason.ENDLESS_DATA


def test_the_manifest_of_another_release_in_its_place_is_refused(trust, repository, tmp_path):
    """Mix and match by a publisher's tool: rightly signed, but under the wrong name."""
    manifest, contents = script_release(tmp_path / "r", 2, "scale 2")
    repository.publish(manifest, contents)
    repository.manifests["releases/crane/1.json"] = encode(manifest)
    repository.sign()

    assert reason_of(lambda: trust.manifest(ReleaseRef("crane", 1))) is Reason.WRONG_RELEASE


def test_a_manifest_that_breaks_the_format_is_refused(trust, repository):
    repository.manifests["releases/crane/1.json"] = b'{"kind": "release", "format": 99}'
    repository.sign()

    assert reason_of(lambda: trust.manifest(ReleaseRef("crane", 1))) is Reason.BAD_MANIFEST


@pytest.mark.parametrize("year", [1970, 2001])
def test_a_device_whose_clock_is_behind_catches_up(year, trust, repository, make_trust):
    """It judges by the day of its enrolment until the signed timestamp tells a later one."""
    repository.assign("crane", 1)
    machine = FakeClock(wall=(year - 1970) * 365.25 * DAY)

    desired = make_trust(machine).refresh()

    assert desired.wanted("crane").release == 1
    assert abs(desired.verified_at - time.time()) < 60, "the signed time, not the machine's"


def test_what_expired_is_refused_also_with_a_clock_that_is_behind(trust, repository, make_trust):
    """The time that was signed once is enough to see a freeze."""
    trust.refresh()
    repository.issued = time.time() - 8 * DAY
    repository.expires = dict.fromkeys(("timestamp", "snapshot", "assignments"), time.time() - 7 * DAY)
    repository.sign()

    assert reason_of(make_trust(FakeClock(wall=0.0)).refresh) is Reason.EXPIRED_METADATA


def test_a_board_without_a_clock_keeps_the_time_while_it_runs(repository, make_trust):
    machine = FakeClock(wall=0.0)
    trust = make_trust(machine)
    repository.sign()
    trust.refresh()
    machine.pass_(8 * DAY)

    assert reason_of(trust.refresh) in {Reason.EXPIRED_METADATA, Reason.CLOCK_UNTRUSTED}, "the test's server has not aged"


def test_the_known_time_survives_a_restart(trust, repository, make_trust, tmp_path):
    trust.refresh()

    known = LastKnownGood(tmp_path / "trust" / "clock.json")

    assert abs(known.time - time.time()) < 60


def test_a_clock_far_ahead_is_told_and_harms_nothing(trust, repository, make_trust):
    repository.assign("crane", 1)
    with pytest.raises(Problem, match=r"clock says 2\d{3}-.*, the fleet server's 20") as caught:
        make_trust(FakeClock(wall=time.time() + 30 * 365 * DAY)).refresh()

    assert caught.value.reason is Reason.CLOCK_UNTRUSTED
    assert trust.refresh().wanted("crane").release == 1, "nothing of it was remembered"


def test_a_thief_of_the_timestamp_key_cannot_move_time_for_good(trust, repository, make_trust, tmp_path):
    """He says it is the year 2100: believed up to the end of the root, and forgotten with his key."""
    repository.assign("crane", 1)
    trust.refresh()
    repository.issued = 4_102_444_800
    repository.expires["timestamp"] = repository.issued + DAY
    repository.sign()
    assert reason_of(trust.refresh) in {Reason.EXPIRED_METADATA, Reason.CLOCK_UNTRUSTED}
    assert LastKnownGood(tmp_path / "trust" / "clock.json").time <= repository.root.signed.expires.timestamp()
    repository.expires, repository.issued = {}, None
    repository.sign()
    assert reason_of(make_trust().refresh) in {Reason.EXPIRED_METADATA, Reason.CLOCK_UNTRUSTED}

    repository.rotate_root("timestamp")
    repository.sign()

    assert make_trust().refresh().wanted("crane").release == 1


def test_a_clock_corrected_by_minutes_is_believed(trust, repository, make_trust):
    trust.refresh()

    assert make_trust(FakeClock(wall=time.time() - 300)).refresh()


def test_a_device_without_a_certificate_of_the_fleet_gets_nothing(make_trust, repository, server, tmp_path):
    from tests.sync.fleet import Authority

    stranger = enrolled(tmp_path / "stranger", Authority("stranger"), repository.first_root, url=server.url)

    assert reason_of(make_trust(who=stranger).refresh) is Reason.DOWNLOAD_FAILED


def five_hundred(handler) -> bool:
    handler.answer(500, b'{"error": "the database is away", "code": "internal"}')
    return True


def hang_up(handler) -> bool:
    handler.hang_up()
    return True


def endless(handler) -> bool:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server_double.released.is_set():
        handler.wfile.write(b" " * 65536)
    return True


@pytest.mark.parametrize("fault", [five_hundred, hang_up, endless])
@pytest.mark.parametrize("path", ["metadata/timestamp.json", "metadata/2.root.json", "targets/", "record"])
def test_a_server_in_trouble_is_a_failed_download(fault, path, trust, repository, server: Server):
    repository.assign("crane", 1)
    server.faults[path] = fault

    expected = Reason.ENDLESS_DATA if fault is endless else Reason.DOWNLOAD_FAILED
    assert reason_of(trust.refresh) is expected
    server.faults.clear()
    assert trust.refresh().wanted("crane").release == 1


def test_the_servers_own_words_reach_the_message(trust, repository, server):
    server.faults["record"] = five_hundred

    with pytest.raises(Problem, match="the database is away"):
        trust.refresh()


def test_one_process_per_trust_folder(trust, make_trust, repository, server):
    """The second finds the lock held, in the middle of the first one's refresh."""
    second, seen = make_trust(), []

    def meanwhile(_handler) -> bool:
        if not seen:
            seen.append(reason_of(second.refresh))
        return False

    server.faults["record"] = meanwhile
    trust.refresh()

    assert seen == [Reason.STORE_FAILED]


def test_a_server_that_says_nothing_is_given_up(make_trust, server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("agent.sync.http.READ_TIMEOUT_S", 0.3)  # read when the client is made

    def hang(handler) -> bool:
        handler.server_double.released.wait(20)
        return True

    server.faults["metadata/timestamp.json"] = hang

    with pytest.raises(Problem, match="no answer within"):
        make_trust().refresh()


def test_a_server_that_trickles_is_given_up(make_trust, server: Server):
    """A byte now and then passes every limit on silence; the deadline of the whole answer ends it."""
    clock = FakeClock()

    def trickle(handler) -> bool:
        handler.send_response(200)
        handler.end_headers()
        while not handler.server_double.released.is_set():
            clock.pass_(10)
            handler.wfile.write(b" ")
            handler.server_double.released.wait(0.01)
        return True

    server.faults["metadata/timestamp.json"] = trickle

    with pytest.raises(Problem, match="not finished after 60 s"):
        make_trust(clock).refresh()


def test_one_number_says_one_thing(trust, make_trust, repository: Repository):
    """Two servers that speak for one fleet, or a server that forgot what it said."""
    repository.assign("crane", 1)
    trust.refresh()
    said = repository.assignment
    repository.assignment = Assignment(fleet=said.fleet, version=said.version, models={})
    repository.sign()
    assert reason_of(trust.refresh) is Reason.REPLAYED_ASSIGNMENT
    assert trust.remembered().wanted("crane").release == 1

    repository.assignment = said
    repository.sign()
    assert trust.refresh().assignment == said
    repository.assign("crane", 2)
    assert trust.refresh().wanted("crane").release == 2


def test_a_word_is_heard_when_it_is_new(make_trust, repository: Repository):
    clock = FakeClock()
    trust = make_trust(clock)
    first = trust.refresh()
    clock.pass_(100)
    again = trust.refresh()
    assert (again.issued, again.heard_at) == (first.issued, first.heard_at)
    assert again.verified_at > first.verified_at
    repository.issued = first.issued + 50
    repository.sign()

    assert trust.refresh().heard_at > first.heard_at
