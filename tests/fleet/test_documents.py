"""Signed documents in a folder and in the database: the same to whoever reads and writes them; and requests that are done once."""

import hashlib
import threading

import msgspec
import pytest
import requests
from tuf.api.metadata import TargetFile

from fleet_server.errors import Conflict, Invalid, Unavailable
from fleet_server.releases import keys, publisher
from fleet_server.releases.online_keys import NoKeys
from fleet_server.releases.repository import Repository
from fleet_server.storage import once
from fleet_server.storage.database import Database
from fleet_server.storage.documents import FolderDocuments, StoredDocuments, copy
from fleet_server.storage.signals import MAX_PAYLOAD_BYTES, payloads
from tests.fleet import databases
from tests.fleet.stand import simple_manifest


@pytest.fixture
def database(tmp_path):
    url = databases.new()
    made = Database(url or f"sqlite:///{tmp_path}/x.sqlite3")
    made.migrate()
    yield made
    made.close()
    databases.drop(url)


@pytest.fixture(params=["folder", "database"])
def documents(request, tmp_path, database):
    return FolderDocuments(tmp_path / "documents") if request.param == "folder" else StoredDocuments(database)


def test_what_is_written_is_read(documents):
    assert documents.read("a/x.json") is None
    assert documents.identity("a/x.json") is None
    assert documents.size("a/x.json") is None
    assert documents.written("a/x.json") is None
    documents.write("a/x.json", b"one")
    first = documents.identity("a/x.json")
    documents.write("a/x.json", b"two!")
    documents.write("a/b/y.json", b"deep")
    documents.write("top.json", b"top")

    assert documents.read("a/x.json") == b"two!"
    assert documents.size("a/x.json") == 4
    assert documents.identity("a/x.json") not in {first, None}
    assert documents.written("a/x.json") > 0
    assert documents.names("a") == ["a/x.json"]
    assert documents.all() == ["a/b/y.json", "a/x.json", "top.json"]
    assert documents.at_hand("a/x.json")
    digest = hashlib.sha256(b"two!").hexdigest()
    assert documents.holds("a/x.json", digest, 4)
    assert not documents.holds("a/x.json", digest, 5)
    assert not documents.holds("a/x.json", hashlib.sha256(b"one").hexdigest(), 3)
    assert not documents.holds("a/y.json", digest, 4)

    documents.remove("a/x.json")
    documents.remove("a/x.json")
    documents.remove("top.json", durably=True)
    assert documents.read("a/x.json") is None
    assert documents.all() == ["a/b/y.json"]


def test_copied(documents, tmp_path, database):
    source = FolderDocuments(tmp_path / "source")
    for name in ("metadata/1.root.json", "targets/releases/m/x.json", "change-under-way.json"):
        source.write(name, name.encode())
    assert copy(source, documents) == 3
    assert {name: documents.read(name) for name in documents.all()} == {name: name.encode() for name in source.all()}


def test_a_transaction_is_there_as_a_whole_or_not_at_all(database):
    documents, other = StoredDocuments(database), StoredDocuments(database)
    told = []
    documents.on_written = lambda: told.append(1)
    documents.write("kept", b"old")
    assert other.read("kept") == b"old"
    with pytest.raises(ValueError, match="stop"), documents.together():  # noqa: PT012 - the end of it fails
        documents.write("kept", b"new")
        documents.write("added", b"x")
        assert documents.read("kept") == b"new", "whoever writes sees it"
        assert documents.names("") == []
        seen = []
        watcher = threading.Thread(target=lambda: seen.append((documents.read("kept"), documents.read("added"))))
        watcher.start()
        watcher.join()
        assert seen == [(b"old", None)], "nobody else does before it is stored"
        raise ValueError("stop")
    assert (documents.read("kept"), documents.read("added"), documents.all()) == (b"old", None, ["kept"])

    with documents.together():
        documents.write("added", b"x")
        with documents.together():
            documents.remove("kept")
    assert documents.all() == ["added"]
    assert len(told) == 2
    other.stale()
    assert other.read("added") == b"x"
    assert other.read("kept") in {b"old", None}, "what was pruned may still be answered from memory"


def test_what_is_forgotten_is_read_again(database, monkeypatch):
    monkeypatch.setattr("fleet_server.storage.documents.KEPT_BYTES", 10)
    documents = StoredDocuments(database)
    for number in range(5):
        documents.write(f"{number}", bytes([number]) * 8)
    assert not documents.at_hand("0")
    assert documents.read("0") == b"\0" * 8
    assert documents.at_hand("0")


def test_a_repository_in_the_database(fleet, clock):
    """All that the repository does, on the other kind of storage."""
    stored = StoredDocuments(fleet.database, clock)
    copy(fleet.repository.documents, stored)
    repository = Repository(stored, fleet.repository.online.keys, fleet.config.expiry, clock)
    repository.check()
    assert repository.versions() == fleet.repository.versions()
    document = repository.assignment_bytes()
    for _ in range(20):
        repository.assign(document + b" ")
    manifest = simple_manifest("m", 1, b"x")
    data, metadata = publisher.add(repository.releases(), manifest, keys.load(fleet.releases_key), clock())
    repository.publish(TargetFile.from_data(manifest.ref.target_path, data, ["sha256"]), data, metadata, 2)
    repository.check()
    assert len(repository.metadata.versions_of("assignments")) == 16, "old versions are pruned there, too"
    assert len(stored.names("targets/assignments")) <= 2
    documents, targets, _ = repository.in_force()
    assert documents["metadata/timestamp.json"] == stored.read("metadata/timestamp.json")
    assert list(targets(manifest.ref.target_path)) == [name for name in stored.all() if "targets/releases/" in name]
    assert repository.renew() == []
    clock.now += fleet.config.expiry.timestamp_s * 0.6
    assert repository.renew() == ["timestamp"]

    elsewhere = Repository(StoredDocuments(fleet.database, clock), NoKeys(), fleet.config.expiry, clock)
    elsewhere.check()
    assert elsewhere.record_keyid == fleet.repository.record_keyid
    before = stored.all(), stored.read("metadata/timestamp.json")
    with pytest.raises(Unavailable, match="no key"):
        elsewhere.assign(document)
    with pytest.raises(Unavailable, match="no key"):
        elsewhere.sign_record(b"{}", "x")
    stored.stale()
    assert (stored.all(), stored.read("metadata/timestamp.json")) == before, "nothing of it is stored"


def test_payloads_are_such_that_the_database_takes_them():
    signals = {("models", f"{'ä' * 60}{number}"): None for number in range(1000)}
    made = payloads(signals)
    assert len(made) > 5
    assert max(len(payload.encode()) for payload in made) <= MAX_PAYLOAD_BYTES + 2
    assert [tuple(one) for payload in made for one in msgspec.json.decode(payload)] == list(signals)


# -- once ------------------------------------------------------------------------------------------------------------------


def test_a_request_with_a_key_is_done_once(server):
    headers = {"Idempotency-Key": "k1"}
    body = {"name": "once", "role": "viewer"}

    def names():
        return [one["name"] for one in server.get("/access-tokens")].count("once")

    assert server.request("POST", "/access-tokens", json=body, headers=headers).status_code == 200
    again = server.request("POST", "/access-tokens", json=body, headers=headers)
    assert (again.status_code, again.json()["code"]) == (409, "already_done")
    assert names() == 1
    assert server.request("POST", "/access-tokens", json=body, headers={"Idempotency-Key": "k2"}).status_code == 200
    assert names() == 2
    other = server.make_token("admin")
    assert server.request("POST", "/access-tokens", json=body, headers=headers, token=other).status_code == 200, "another's key"
    assert names() == 3
    refused = server.request("POST", "/rollouts", json={"release": "nothing:1"}, headers={"Idempotency-Key": "k3"})
    assert refused.status_code == 404
    refused = server.request("POST", "/rollouts", json={"release": "nothing:1"}, headers={"Idempotency-Key": "k3"})
    assert refused.status_code == 404, "what was not done may be tried again"
    assert server.request("POST", "/access-tokens", json=body, headers={"Idempotency-Key": "k" * 300}).status_code == 400


def test_at_the_same_moment_too(server):
    answers = []

    def ask():
        answer = server.request(
            "POST", "/access-tokens", json={"name": "race", "role": "viewer"}, headers={"Idempotency-Key": "r"}
        )
        answers.append(answer.status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] + [409] * 7
    assert [one["name"] for one in server.get("/access-tokens")].count("race") == 1


def test_once_begins_with_what_is_stored(database):
    database.at_beginning.append(once.check)
    with pytest.raises(ValueError, match="no"), once.only("k", "me"), database.session():
        raise ValueError("no")
    with once.only("k", "me"):
        for _ in range(2):
            with database.session():
                pass
    with once.only(None, "me"), database.session():
        pass
    with once.only("k", "me"), pytest.raises(Conflict, match="made already"), database.session():
        pass
    with pytest.raises(Invalid, match="Idempotency-Key"), once.only("", "me"):
        pass
    with database.session() as session:
        once.forget(session, 1e12)
    with once.only("k", "me"), database.session():
        pass


def test_health(server):
    answer = requests.get(f"{server.url}/health", verify=str(server.ca), timeout=20)
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "why_not": ""})
