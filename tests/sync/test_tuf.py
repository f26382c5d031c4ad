"""`edge-agent tuf` as the public conformance suite drives it: a process, exit codes, the metadata folder, the requests that are made."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from tests import warm

UTC = dt.timezone.utc
ONLINE = ("timestamp", "snapshot", "targets")


class Repository:
    """A repository as any TUF tool would make it: nothing of our fleets."""

    def __init__(self) -> None:
        self.keys = {role: [CryptoSigner.generate_ed25519()] for role in ("root", *ONLINE)}
        self.root = Root(expires=days(30), consistent_snapshot=True)
        for role, signers in self.keys.items():
            for signer in signers:
                self.root.add_key(signer.public_key, role)
        self.timestamp = Timestamp(expires=days(30))
        self.snapshot = Snapshot(expires=days(30))
        self.targets = Targets(expires=days(30))
        self.delegated: dict[str, tuple[Targets, list[CryptoSigner]]] = {}
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.publish_root()
        self.first_root = self.files["1.root.json"]
        self.publish()

    def publish_root(self, *, also: tuple[CryptoSigner, ...] = ()) -> None:
        self.files[f"{self.root.version}.root.json"] = signed(self.root, [*self.keys["root"], *also])

    def next_root(self, *, also: tuple[CryptoSigner, ...] = ()) -> None:
        self.root.version += 1
        self.publish_root(also=also)

    def publish(self) -> None:
        for name, (role, signers) in self.delegated.items():
            self.files[f"{role.version}.{name}.json"] = signed(role, signers)
            self.snapshot.meta[f"{name}.json"] = MetaFile(role.version)
        self.files[f"{self.targets.version}.targets.json"] = signed(self.targets, self.keys["targets"])
        self.snapshot.meta["targets.json"] = MetaFile(self.targets.version)
        self.files[f"{self.snapshot.version}.snapshot.json"] = signed(self.snapshot, self.keys["snapshot"])
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        self.files["timestamp.json"] = signed(self.timestamp, self.keys["timestamp"])

    def update(self) -> None:
        """The next version of everything online."""
        for role in (self.timestamp, self.snapshot, self.targets):
            role.version += 1
        self.publish()

    def rotate(self, role: str) -> CryptoSigner:
        (old,) = self.keys[role]
        new = CryptoSigner.generate_ed25519()
        self.root.revoke_key(old.public_key.keyid, role)
        self.root.add_key(new.public_key, role)
        self.keys[role] = [new]
        return old

    def add_target(self, path: str, data: bytes, role: Targets | None = None) -> None:
        (self.targets if role is None else role).targets[path] = TargetFile.from_data(path, data, ["sha256"])
        folder, slash, name = path.rpartition("/")
        self.files[f"t/{folder}{slash}{hashlib.sha256(data).hexdigest()}.{name}"] = data


def days(count: float) -> dt.datetime:
    return (dt.datetime.now(UTC) + dt.timedelta(days=count)).replace(microsecond=0)


def signed(role: Root | Timestamp | Snapshot | Targets, signers: list[CryptoSigner]) -> bytes:
    metadata = Metadata(role)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


@pytest.fixture
def repository():
    return Repository()


@pytest.fixture
def url(repository):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args) -> None:
            return

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            repository.asked.append(path)
            data = repository.files.get(urllib.parse.unquote(path) if path.startswith("t/") else path)
            self.send_response(200 if data is not None else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


class Client:
    """The program under test, run anew for each command."""

    def __init__(self, folder: Path, url: str, repository: Repository) -> None:
        self.metadata, self.targets, self._url, self._repository = folder / "m", folder / "t", url, repository
        self._root = folder / "initial.json"
        self._root.write_bytes(repository.first_root)
        assert self.run("init", self._root) == 0

    def run(self, *command: object, at: str | None = None, options: tuple[object, ...] = ()) -> int:
        words = ["tuf", "--metadata-dir", str(self.metadata), *map(str, options), *map(str, command)]
        self._repository.asked.clear()
        if at is None:
            done = warm.run("agent.cli", words, env=os.environ)
        else:
            line = ["faketime", at, sys.executable, "-m", "agent.cli", *words]
            done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in done.stderr
        self.said = done.stderr
        return done.returncode

    def refresh(self, at: str | None = None) -> int:
        return self.run("refresh", at=at, options=("--metadata-url", self._url))

    def download(self, *names: str) -> int:
        wanted = [part for name in names for part in ("--target-name", name)]
        where = ("--target-dir", self.targets, "--target-base-url", f"{self._url}/t")
        return self.run("download", options=("--metadata-url", self._url, *wanted, *where))

    def versions(self) -> dict[str, int]:
        return {path.stem: Metadata.from_file(str(path)).signed.version for path in sorted(self.metadata.glob("*.json"))}

    def downloaded(self) -> list[bytes]:
        return [path.read_bytes() for path in self.targets.iterdir()] if self.targets.is_dir() else []


@pytest.fixture
def client(tmp_path, url, repository):
    return Client(tmp_path, url, repository)


def test_init_asks_nobody(client, repository):
    assert repository.asked == []
    assert client.versions() == {"root": 1}


def test_refresh(client, repository):
    assert client.refresh() == 0
    assert repository.asked == ["2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"]
    assert client.versions() == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}
    assert (client.metadata / "timestamp.json").read_bytes() == repository.files["timestamp.json"], "kept byte for byte"

    assert client.refresh() == 0
    assert repository.asked == ["2.root.json", "timestamp.json"], "what is known is not asked for again"


def test_a_command_without_its_options_is_wrong_usage(client):
    assert client.run("refresh") == 2
    assert "--metadata-url" in client.said
    assert client.run("download", options=("--metadata-url", "http://127.0.0.1:1")) == 2
    assert "--target-name" in client.said


def test_roots_one_after_the_other(client, repository):
    for _ in range(3):
        repository.next_root()
    assert client.refresh() == 0
    assert repository.asked[:4] == ["2.root.json", "3.root.json", "4.root.json", "5.root.json"]
    assert client.versions()["root"] == 4


def test_a_root_must_be_signed_by_the_old_and_by_the_new_keys(client, repository):
    old = repository.rotate("root")
    repository.next_root()
    assert client.refresh() == 1
    assert client.versions() == {"root": 1}
    assert "bad_signature" in client.said

    repository.publish_root(also=(old,))
    assert client.refresh() == 0
    assert client.versions()["root"] == 2


def test_a_threshold_counts_keys_not_signatures(client, repository):
    second = CryptoSigner.generate_ed25519()
    repository.root.add_key(second.public_key, "timestamp")
    repository.root.roles["timestamp"].threshold = 2
    repository.next_root()
    assert client.refresh() == 1

    document = Metadata.from_bytes(repository.files["timestamp.json"])
    (signature,) = document.signatures.values()
    text = document.to_bytes().replace(b'"signatures": [', b'"signatures": [' + twin(signature))
    repository.files["timestamp.json"] = text
    assert client.refresh() == 1, "the same signature twice"

    repository.keys["timestamp"].append(second)
    repository.publish()
    assert client.refresh() == 0


def twin(signature) -> bytes:
    return f'{{"keyid": "{signature.keyid}", "sig": "{signature.signature}"}},'.encode()


@pytest.mark.parametrize("skipped", [3, 1])
def test_a_root_of_another_number_is_refused(client, repository, skipped):
    repository.root.version = skipped
    repository.files["2.root.json"] = signed(repository.root, repository.keys["root"])
    assert client.refresh() == 1
    assert client.versions()["root"] == 1


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_rollback(client, repository, role):
    repository.update()
    assert client.refresh() == 0
    before = client.versions()
    getattr(repository, role).version -= 1
    if role != "timestamp":
        repository.timestamp.version += 1
    if role == "targets":
        repository.snapshot.version += 1
    repository.publish()

    assert client.refresh() == 1
    assert "metadata_rollback" in client.said
    assert client.versions()[role] == before[role]


@pytest.mark.parametrize(
    ("role", "rotated"),
    [
        ("timestamp", "timestamp"),
        ("snapshot", "snapshot"),
        ("snapshot", "timestamp"),
        ("targets", "snapshot"),
        ("targets", "timestamp"),
    ],
)
def test_fast_forward_recovery(client, repository, role, rotated):
    """After a key that signed huge numbers was replaced, numbers may start again."""
    getattr(repository, role).version = 99_999
    repository.publish()
    assert client.refresh() == 0
    repository.rotate(rotated)
    if role == "snapshot" or rotated == "timestamp":
        repository.rotate("timestamp" if rotated == "snapshot" else "snapshot")
    repository.next_root()
    for part in (repository.timestamp, repository.snapshot, repository.targets):
        part.version = 2 if part is getattr(repository, role) else part.version + 1
    repository.publish()

    assert client.refresh() == 0, client.said
    assert client.versions()[role] == 2


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_expired(client, repository, role):
    assert client.refresh() == 0
    getattr(repository, role).expires = days(-1)
    repository.next_root()
    repository.update()
    assert client.refresh() == 1
    assert "expired_metadata" in client.said or "clock_untrusted" in client.said
    assert client.versions()["root"] == 2, "the root is kept before its end is judged"
    assert client.versions()["targets"] == 1


def test_an_expired_copy_does_not_hinder_the_next(client, repository):
    """As the suite does it: the process gets its time from faketime."""
    assert shutil.which("faketime"), "apt-get install faketime"
    repository.timestamp.expires = days(7)
    repository.publish()
    assert client.refresh() == 0
    repository.timestamp.expires = days(21)
    repository.update()
    later = f"{dt.datetime.now(UTC) + dt.timedelta(days=18):%Y-%m-%d %H:%M:%S}"

    assert client.refresh(at=later) == 0, client.said
    assert client.versions()["timestamp"] == 2
    assert client.refresh() == 0, "a clock that was ahead for a while is not remembered"


def test_mix_and_match(client, repository):
    assert client.refresh() == 0
    old = repository.files["1.snapshot.json"]
    repository.update()
    repository.files["2.snapshot.json"] = old
    assert client.refresh() == 1
    assert client.versions()["snapshot"] == 1


def test_endless_metadata(client, repository):
    repository.files["timestamp.json"] += b" " * 20_000
    assert client.refresh() == 1
    assert "timestamp" not in client.versions()


@pytest.mark.parametrize(
    "garbage", [b"", b"{}", b"[" * 10_000, b"\xff\xfe", b'{"signed": {"_type": "timestamp"}, "signatures": []}']
)
def test_garbage(client, repository, garbage):
    repository.files["timestamp.json"] = garbage
    assert client.refresh() == 1
    assert client.versions() == {"root": 1}


def test_download(client, repository):
    repository.add_target("a/b c.txt", b"hello")
    repository.add_target("plain", b"world")
    repository.update()
    assert client.download("a/b c.txt", "plain") == 0, client.said
    assert sorted(client.downloaded()) == [b"hello", b"world"]
    assert sum(path.startswith("t/") for path in repository.asked) == 1 + 1

    assert client.download("a/b c.txt") == 0
    assert not [path for path in repository.asked if path.startswith("t/")], "what is there is not fetched again"

    repository.add_target("plain", b"new words")
    repository.update()
    assert client.download("plain") == 0
    assert sorted(client.downloaded()) == [b"hello", b"new words"], "the same file name"


def test_a_target_that_nobody_signed(client, repository):
    repository.add_target("one", b"1")
    repository.update()
    assert client.download("one", "two") == 1
    assert "wrong_release" in client.said
    assert client.downloaded() == [b"1"], "in order, up to the first that fails"


def test_a_target_with_other_bytes(client, repository):
    repository.add_target("one", b"good")
    repository.update()
    (path,) = [path for path in repository.files if path.startswith("t/")]
    for evil in (b"evil", b"good and more", b""):
        repository.files[path] = evil
        assert client.download("one") == 1
    assert client.downloaded() == []


@pytest.mark.parametrize(
    "name", ["../escape", "a/../../b", "..", "%2e%2e/x", "/etc/passwd", "a//b", "ünïcode", "q?x=1&y", "#f", "."]
)
def test_names_lead_nowhere(client, repository, name, tmp_path):
    """Whatever a target is called, at most one file appears, in the folder for targets."""
    repository.add_target(name, b"payload")
    repository.update()
    before = set(tmp_path.parent.rglob("*"))

    assert client.download(name) in {0, 1}

    made = {path for path in set(tmp_path.parent.rglob("*")) - before if client.metadata not in path.parents}
    assert {path.parent for path in made - {client.targets}} <= {client.targets}
    assert len(made) <= 2


def delegate(repository: Repository, name: str, paths: list[str], *, terminating: bool = False) -> Targets:
    signer, role = CryptoSigner.generate_ed25519(), Targets(expires=days(30))
    if repository.targets.delegations is None:
        repository.targets.delegations = Delegations({}, {})
    repository.targets.delegations.keys[signer.public_key.keyid] = signer.public_key
    assert repository.targets.delegations.roles is not None
    repository.targets.delegations.roles[name] = DelegatedRole(name, [signer.public_key.keyid], 1, terminating, paths=paths)
    repository.delegated[name] = (role, [signer])
    return role


def test_delegations_are_searched_in_their_order(client, repository):
    delegate(repository, "first", ["x/*"])
    second = delegate(repository, "second", ["x/*"])
    delegate(repository, "other", ["y/*"])
    repository.add_target("x/1", b"from second", second)
    repository.update()
    assert client.download("x/1") == 0, client.said
    assert [path for path in repository.asked if path.endswith(("first.json", "second.json", "other.json"))] == [
        "1.first.json",
        "1.second.json",
    ]


def test_a_terminating_delegation_ends_the_search(client, repository):
    delegate(repository, "first", ["x/*"], terminating=True)
    second = delegate(repository, "second", ["x/*"])
    repository.add_target("x/1", b"from second", second)
    repository.update()
    assert client.download("x/1") == 1


def test_a_role_cannot_sign_outside_its_paths(client, repository):
    role = delegate(repository, "first", ["x/*"])
    repository.add_target("y/1", b"outside", role)
    repository.update()
    assert client.download("y/1") == 1


def test_a_delegated_role_of_the_wrong_key(client, repository):
    role = delegate(repository, "first", ["x/*"])
    repository.add_target("x/1", b"x", role)
    repository.delegated["first"] = (role, [CryptoSigner.generate_ed25519()])
    repository.update()
    assert client.download("x/1") == 1
    assert "bad_signature" in client.said


def test_a_role_name_is_no_path(client, repository, tmp_path):
    role = delegate(repository, "../../evil", ["x/*"])
    repository.add_target("x/1", b"x", role)
    repository.update()
    repository.files["1...%2F..%2Fevil.json"] = signed(*repository.delegated["../../evil"])
    assert client.download("x/1") == 0, client.said
    assert not (tmp_path.parent / "evil.json").exists()
    assert not (tmp_path / "evil.json").exists()
