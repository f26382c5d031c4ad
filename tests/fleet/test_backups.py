"""Backups: what is copied at one moment while the server works, what is refused, and a server made of one that devices follow."""

from __future__ import annotations

import datetime as dt
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.contract.addresses import Addresses
from agent.contract.reports import ModelState, Phase
from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.backups import archive, encryption
from fleet_server.backups.backup import Backup
from fleet_server.backups.restore import AHEAD, restore
from fleet_server.config import FleetConfig, Folder, dump, load
from fleet_server.devices import pki
from fleet_server.devices.survey import Filters
from fleet_server.errors import Conflict, Invalid, Refused
from fleet_server.releases import keys
from tests import warm
from tests.fleet.stand import environment
from tests.fleet.test_rollouts import Story

pytestmark = pytest.mark.sqlite


@pytest.fixture
def story(fleet, clock):
    fleet.database.migrate()
    fleet.folder.config.write_bytes(dump(fleet.config))
    made = Story(fleet, clock)
    made.publish(1, 2)
    made.join("d1", "d2")
    made.start(1)
    made.commits("d1", "d2", version=1)
    return made


def taken(folder: Folder, scratch: Path, clock, *, blobs: bool = True) -> bytes:
    scratch.mkdir()
    out = io.BytesIO()
    Backup(folder, scratch, clock, blobs=blobs).write(out)
    return out.getvalue()


@pytest.fixture
def backup(story, tmp_path, clock) -> bytes:
    return taken(story.fleet.folder, tmp_path / "scratch", clock)


def restored(data: bytes, root: Path, clock, **options) -> Fleet:
    restore(io.BytesIO(data), Folder(root), clock, **options)
    return Fleet(Folder(root), load(Folder(root)), clock)


def test_a_server_made_of_a_backup_says_the_same_with_larger_numbers(story, backup, tmp_path, clock):
    lost = story.fleet
    for _ in range(3):  # what it signs after the backup
        lost.assignment.publish()
        lost.repository.assign(lost.repository.assignment_bytes())
    made = restored(backup, tmp_path / "new", clock)
    before, after = lost.repository.versions(), made.repository.versions()
    assert {role for role in before if after[role] > before[role]} == {"assignments", "snapshot", "timestamp"}
    assert after["timestamp"] > before["timestamp"] + AHEAD / 2
    signed = made.assignment.signed()
    assert signed.version > lost.assignment.signed().version + AHEAD / 2
    assert signed.models == lost.assignment.signed().models
    assert made.authority.fingerprint == lost.authority.fingerprint
    assert [one.id for one in made.survey.find(Filters()).devices] == ["d1", "d2"]
    for sha256 in lost.catalogue.blobs():
        assert (made.folder.blobs / sha256).read_bytes() == (lost.folder.blobs / sha256).read_bytes()
    records = [json.loads(fleet.inventory.record("d1"))["payload"] for fleet in (lost, made)]
    assert records[0] != records[1]
    assert made.inventory.get("d1").record_serial > lost.inventory.get("d1").record_serial + AHEAD / 2
    assert any("was restored at" in warning for warning in made.status.view().warnings)
    assert [row.action for row in made.journal.audited(limit=50) if row.action == "server.restore"] == ["server.restore"]
    made.close()


def test_it_goes_on_from_there(story, backup, tmp_path, clock):
    made = restored(backup, tmp_path / "new", clock)
    made.releases_key = story.fleet.releases_key
    again = Story(made, clock)
    again.devices, again.counters = story.devices, story.counters
    for device in again.devices.values():
        device.fleet = made
    again.join()
    rollout = again.start(2)
    again.commits("d1", "d2", version=2)
    assert again.state(rollout) == "completed"
    made.close()


def test_new_online_keys_and_another_address(story, backup, tmp_path, clock):
    root = keys.load(story.fleet.releases_key.with_name("root.key"))
    made = restored(backup, tmp_path / "new", clock, hosts=("fleet-2.example.com", "192.0.2.7"), choose=lambda _: [root])
    assert made.repository.versions()["root"] == story.fleet.repository.versions()["root"] + 1
    assert made.config.hosts == ("fleet-2.example.com", "192.0.2.7")
    names = x509.load_pem_x509_certificate(made.authority.server_cert.read_bytes()).extensions
    assert "fleet-2.example.com" in str(names.get_extension_for_class(x509.SubjectAlternativeName).value)
    made.repository.check()
    assert made.assignment.signed().addresses.device_url == "https://fleet-2.example.com:8444"
    made.close()


def test_devices_forget_what_they_were_told_of_addresses_after_the_backup(story, backup, tmp_path, clock):
    lost = story.fleet
    clock.now += 60
    lost.assignment.tell(Addresses(device_url="https://elsewhere.example.com:8444", broker="elsewhere.example.com:8883"))
    lost.assignment.publish()
    clock.now += 60
    made = restored(backup, tmp_path / "new", clock)
    told, before = made.assignment.signed().addresses, lost.assignment.signed().addresses
    assert told.since > before.since
    assert told.is_same_place(made.addresses())
    made.close()


# -- what came after the backup ----------------------------------------------------------------------------------------------------


def certificate_of(fleet: Fleet, device: str) -> x509.Certificate:
    (one,) = fleet.inventory.get(device).certificates
    found = fleet.inventory.issued(one.serial)
    assert found is not None
    return found


def test_devices_that_joined_or_renewed_since_are_known_again_by_their_certificates(story, backup, tmp_path, clock):
    clock.now += 100
    story.join("late")
    renewed = story.fleet.authority.issue_device("d1", _request(story.devices["d1"].key), 86400)
    clock.now += 100
    made = restored(backup, tmp_path / "new", clock)
    late = certificate_of(story.fleet, "late")
    with pytest.raises(Refused, match="belongs to no device"):
        story.fleet.inventory.authenticate(renewed)
    assert made.inventory.authenticate(late) == "late"
    assert made.inventory.authenticate(renewed) == "d1"
    assert made.inventory.authenticate(certificate_of(story.fleet, "d2")) == "d2"
    detail = made.inventory.get("late")
    assert (detail.groups, detail.revoked, len(detail.certificates)) == ([], False, 1)
    assert json.loads(made.inventory.record("late"))["payload"]
    events = [event.message for event in made.journal.events(limit=10) if event.name == "device_adopted"]
    assert len(events) == 2
    assert "its groups are lost" in events[0]
    report = story.devices["late"].report(
        5, models={"digits": ModelState(serving=1, sha256="0" * 64, variant="cpu", phase=Phase.STEADY)}
    )
    story.devices["late"].fleet = made
    story.devices["late"].state(report)
    assert made.inventory.get("late").state.counter == 5
    made.close()


@pytest.mark.parametrize("what", ["older", "younger", "ended", "of another authority", "shut out", "not a device"])
def test_certificates_that_are_not_taken_back(story, backup, tmp_path, clock, what):
    clock.now += 1000
    device, days, authority, moment = "stranger", 1.0, story.fleet.authority, clock.now - 500
    if what == "older":
        moment = clock.now - 1000 - 7200  # issued, and forgotten, before the backup: a device that was deleted
    elif what == "younger":
        moment = clock.now + 7200
    elif what == "ended":
        days = 100 / 86400
    elif what == "of another authority":
        (tmp_path / "other").mkdir()
        authority = pki.Authority.create(tmp_path / "other", "test", ("localhost",))
    elif what == "shut out":
        device = "d2"
    else:
        device = pki.SERVER_CN
    made = restored(backup, tmp_path / "new", clock)
    if what == "shut out":
        made.inventory.revoke(SERVER, "d2")
    certificate = _issued_at(authority, device, moment, days)
    with pytest.raises(Refused):
        made.inventory.authenticate(certificate)
    assert sorted(one.id for one in made.survey.find(Filters()).devices) == ["d1", "d2"]
    made.close()


def test_a_server_that_was_never_restored_takes_nobody_back(story, clock):
    certificate = _issued_at(story.fleet.authority, "stranger", clock.now, 1.0)
    with pytest.raises(Refused, match="belongs to no device"):
        story.fleet.inventory.authenticate(certificate)


def _request(key: ec.EllipticCurvePrivateKey) -> x509.CertificateSigningRequest:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    return x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())


def _issued_at(authority: pki.Authority, device: str, moment: float, days: float) -> x509.Certificate:
    """As the authority issues one at that moment."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fleet_server.devices.ca._now", lambda: dt.datetime.fromtimestamp(moment, tz=dt.timezone.utc))
        return authority.issue_device(device, _request(ec.generate_private_key(ec.SECP256R1())), days * 86400)


# -- while the server works --------------------------------------------------------------------------------------------------------


def test_copies_taken_while_decisions_are_made_hold_together(story, tmp_path, clock):
    stop, failed = threading.Event(), []

    def decide():
        try:
            version = 2
            while not stop.is_set():
                rollout = story.start(version)
                story.commits("d1", "d2", version=version)
                assert story.state(rollout) == "completed"
                version = 3 - version
        except Exception as error:  # noqa: BLE001 - told below
            failed.append(error)

    worker = threading.Thread(target=decide)
    worker.start()
    copies = []
    try:
        copies += [taken(story.fleet.folder, tmp_path / f"scratch-{number}", time.time) for number in range(6)]
    finally:
        stop.set()
        worker.join()
    assert failed == []
    for number, data in enumerate(copies):
        made = restored(data, tmp_path / f"new-{number}", clock)
        made.repository.check()
        signed = made.assignment.signed().models["digits"]
        (row,) = made.views.models()
        assert (row.release, row.previous is not None) == (signed.release, row.previous is not None)
        made.close()


# -- what is refused ---------------------------------------------------------------------------------------------------------------


def refused(data: bytes, root: Path, clock, match: str) -> None:
    with pytest.raises(Invalid, match=match):
        restore(io.BytesIO(data), Folder(root), clock)
    assert not root.exists()
    assert [path.name for path in root.parent.iterdir() if path.name.startswith(".")] == []


def test_a_backup_that_is_cut_off_anywhere_makes_nothing(backup, tmp_path, clock):
    places = {
        0,
        1,
        511,
        512,
        513,
        1024,
        len(backup) // 3,
        len(backup) // 2,
        backup.rindex(archive.HASHES.encode()),
        backup.rindex(archive.HASHES.encode()) + 600,
    }
    for place in sorted(places):
        refused(backup[:place], tmp_path / "new", clock, "cut off|no backup")


def test_a_backup_with_a_wrong_byte_makes_nothing(story, backup, tmp_path, clock):
    for word in (b"digits 1", b"BEGIN CERTIFICATE", b'"_type":"snapshot"', b"fleet: test"):
        place = backup.index(word)
        damaged = backup[:place] + bytes([backup[place] ^ 1]) + backup[place + 1 :]
        refused(damaged, tmp_path / "new", clock, "damaged")


def made_of(members: list[tuple[tarfile.TarInfo, bytes]], description: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        data = json.dumps(description).encode()
        first = tarfile.TarInfo(archive.DESCRIPTION)
        first.size = len(data)
        tar.addfile(first, io.BytesIO(data))
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


DESCRIPTION = {
    "format": 1,
    "fleet": "x",
    "taken": 1.0,
    "software": "1",
    "ca_sha256": "0",
    "metadata": {},
    "devices": 0,
    "releases": 0,
    "blobs": 0,
}


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "pki/../../outside", "keys/.hidden", "blobs/short", "server.lock", "repository/targets/../../x", "pki/a/b", "fleet.yaml/x", "."],
)  # fmt: skip
def test_names_outside_of_a_fleet_are_not_written(tmp_path, clock, name):
    member = tarfile.TarInfo(name)
    refused(made_of([(member, b"x")], DESCRIPTION), tmp_path / "new", clock, "nothing of a fleet server")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_not_made(tmp_path, clock, kind):
    member = tarfile.TarInfo("fleet.yaml")
    member.type, member.linkname = kind, "/etc/passwd"
    refused(made_of([(member, b"")], DESCRIPTION), tmp_path / "new", clock, "nothing of a fleet server")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no backup"), (b"x" * 5000, "no backup"), (b"\0" * 20_000, "no backup"),
        (made_of([], {**DESCRIPTION, "format": 2}), "newer version"), (made_of([], {"format": "x"}), "no backup"), (made_of([], []), "no backup"),
        (made_of([], DESCRIPTION), "its end is missing"),
        (made_of([(tarfile.TarInfo(archive.HASHES), b"[]")], DESCRIPTION), "no backup"),
        (made_of([(tarfile.TarInfo(archive.HASHES), b"{}")], DESCRIPTION), "damaged"),
    ],
)  # fmt: skip
def test_what_is_no_backup(tmp_path, clock, data, match):
    refused(data, tmp_path / "new", clock, match)


def test_a_folder_that_holds_something_is_left_alone(backup, tmp_path, clock):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "precious").write_text("x")
    with pytest.raises(Conflict, match="is not empty"):
        restore(io.BytesIO(backup), Folder(tmp_path / "new"), clock)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["precious"]


def test_what_an_interrupted_restore_left_is_no_obstacle(backup, tmp_path, clock):
    (tmp_path / ".new.restoring" / "pki").mkdir(parents=True)
    (tmp_path / ".new.restoring" / "pki" / "ca.crt").write_text("of another one")
    made = restored(backup, tmp_path / "new", clock)
    assert not (tmp_path / ".new.restoring").exists()
    made.close()


# -- the commands ------------------------------------------------------------------------------------------------------------------


def test_encrypted_for_somebody_else(story, tmp_path, clock):
    from pyrage import x25519

    mine, other = x25519.Identity.generate(), x25519.Identity.generate()
    for name, identity in (("mine", mine), ("other", other)):
        (tmp_path / f"{name}.key").write_text(f"# a comment\n{identity}\n")
    file = tmp_path / "fleet.backup"
    said = run_fleet("backup", story.fleet.folder.root, file, "--encrypt-to", str(mine.to_public()), "--json")
    assert json.loads(said.stdout)["encrypted"] is True
    assert file.read_bytes().startswith(encryption.MAGIC)
    assert b"PRIVATE KEY" not in file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600

    assert "--identity" in run_fleet("restore", file, tmp_path / "new", ok=False).stderr
    assert (
        "cannot be decrypted"
        in run_fleet("restore", file, tmp_path / "new", "--identity", tmp_path / "other.key", ok=False).stderr
    )
    assert "no secret key" in run_fleet("restore", file, tmp_path / "new", "--identity", file, ok=False).stderr
    assert (
        "no public key"
        in run_fleet("backup", story.fleet.folder.root, tmp_path / "b", "--encrypt-to", "age1x", ok=False).stderr
    )
    assert not (tmp_path / "b").exists()
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cut off" in run_fleet("restore", file, tmp_path / "new", "--identity", tmp_path / "mine.key", ok=False).stderr
    assert not (tmp_path / "new").exists()
    file.unlink()
    run_fleet("backup", story.fleet.folder.root, file, "--encrypt-to", str(mine.to_public()))
    said = run_fleet("restore", file, tmp_path / "new", "--identity", tmp_path / "mine.key")
    assert "2 devices, 2 releases" in said.stdout
    assert Folder(tmp_path / "new").config.exists()


def test_through_a_pipe_without_the_files_of_releases(story, tmp_path):
    data = piped("backup", story.fleet.folder.root, "-", "--without-blobs")
    assert b"2 devices" in piped("restore", "-", given=data)
    assert json.loads(piped("restore", "-", tmp_path / "new", "--json", given=data))["missing_blobs"] == 2
    assert load(Folder(tmp_path / "new")) == FleetConfig(fleet="test", hosts=("127.0.0.1",))
    assert "exists already" in run_fleet("backup", story.fleet.folder.root, tmp_path / "new" / "fleet.yaml", ok=False).stderr
    assert "is no file" in run_fleet("restore", tmp_path / "nothing", tmp_path / "x", ok=False).stderr


def run_fleet(*words, ok=True):
    done = warm.run("fleet_server.cli", [*map(str, words)], env=environment())
    assert (done.returncode == 0) is ok, done.stderr
    return done


def piped(*words, given=b""):
    line = [sys.executable, "-m", "fleet_server.cli", *map(str, words)]
    return subprocess.run(line, input=given, capture_output=True, timeout=60, check=True).stdout
