"""Joining a fleet: what is checked before anything is sent, and that the identity appears whole or not at all."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent.contract.codec import encode
from agent.contract.enrolment import EnrolmentResponse, EnrolmentString
from agent.sync import identity
from agent.sync.fleet import enrol, renewal
from agent.sync.fleet.enrol import EnrolmentFailed
from agent.sync.http import FleetHttp
from agent.sync.identity import IdentityError
from tests.sync.conftest import FakeClock
from tests.sync.fleet import DAY, DEVICE, FLEET, UTC, Authority, Repository, Server, enrolled

TOKEN = "a-token-of-sixteen-or-more"


class Office:
    """The enrolment side of the fleet server."""

    def __init__(self, server: Server, authority: Authority) -> None:
        server.anonymous()
        self.server, self.authority = server, authority
        self.requests: list[dict] = []
        self.begins: dt.datetime | None = None
        self.changes: dict[str, str] = {}
        self.refusal: tuple[int, bytes] | None = None
        server.repository.files["enrolment/ca"] = authority.pem.encode()
        server.posts["/enrolment"] = self.answer
        server.posts["/renew"] = self.answer

    def answer(self, body: bytes) -> tuple[int, bytes]:
        request = json.loads(body)
        self.requests.append(request)
        if self.refusal:
            return self.refusal
        csr = x509.load_pem_x509_csr(request["csr_pem"].encode())
        name = request.get("device") or DEVICE
        fields = {
            "fleet": FLEET, "device": name, "certificate_pem": self.authority.issue(name, csr.public_key(), begins=self.begins),
            "ca_pem": self.authority.pem, "device_url": self.server.url, "broker_host": "127.0.0.1", "tuf_root": "{}", **self.changes,
        }  # fmt: skip
        return 200, encode(EnrolmentResponse(**fields, broker_port=8883))

    def string(self, **changes) -> str:
        fields = {
            "host": "127.0.0.1",
            "port": self.server.port,
            "token": TOKEN,
            "ca_sha256": self.authority.fingerprint,
            **changes,
        }
        return str(EnrolmentString(**fields))


@pytest.fixture
def office(server: Server, authority: Authority) -> Office:
    return Office(server, authority)


def join(office: Office, folder: Path, clock: FakeClock | None = None, text: str | None = None, **options):
    options = {"device": None, "hardware": None, **options}
    return enrol.enrol(text or office.string(), folder, clock or FakeClock(), **options)


def test_a_device_joins(office: Office, tmp_path: Path):
    who = join(office, tmp_path / "identity", device="crane-9")

    assert who.device == "crane-9"
    assert office.requests[0]["token"] == TOKEN
    assert (who.folder / "key.pem").stat().st_mode & 0o777 == 0o600
    assert who.root == b"{}"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".identity")] == []


def refused(action, words: str) -> None:
    with pytest.raises(EnrolmentFailed, match=words):
        action()


def test_a_wrong_fingerprint_stops_it_before_the_token_is_sent(office: Office, tmp_path: Path):
    refused(lambda: join(office, tmp_path / "identity", text=office.string(ca_sha256="0" * 64)), "Nothing was sent")

    assert office.requests == []
    assert not (tmp_path / "identity").exists()


def test_a_ca_swapped_on_the_way_is_the_wrong_fingerprint(office: Office, tmp_path: Path):
    office.server.repository.files["enrolment/ca"] = Authority("an impostor").pem.encode()

    refused(lambda: join(office, tmp_path / "identity"), "somebody is between")


def test_the_right_ca_shown_by_a_server_it_did_not_certify(office: Office, tmp_path: Path, repository: Repository):
    impostor = Server(Authority("an impostor"), repository, tmp_path / "impostor")
    impostor.anonymous()
    try:
        refused(lambda: join(office, tmp_path / "identity", text=office.string(port=impostor.port)), "TLS failed")
    finally:
        impostor.close()
    assert office.requests == []


def test_a_wrong_token_gets_the_servers_words(office: Office, tmp_path: Path):
    office.refusal = 403, b'{"error": "the token was used already", "code": "bad_token"}'

    refused(lambda: join(office, tmp_path / "identity"), "the token was used already")
    assert not (tmp_path / "identity").exists()


def test_a_server_that_is_not_there(office: Office, tmp_path: Path):
    refused(lambda: join(office, tmp_path / "identity", text=office.string(port=1)), "cannot be reached.*check the address")


@pytest.mark.parametrize(
    "text", ["", "edge://", "https://a:1/", "edge://short@h:1/?ca=" + "0" * 64, "edge://" + TOKEN + "@h:1/"]
)
def test_a_string_that_is_none(text, tmp_path: Path):
    with pytest.raises(EnrolmentFailed) as caught:
        enrol.enrol(text, tmp_path / "identity", FakeClock(), device=None, hardware=None)

    assert TOKEN not in str(caught.value)


def test_a_clock_in_the_past_is_named(office: Office, tmp_path: Path):
    refused(lambda: join(office, tmp_path / "identity", FakeClock(wall=time.time() - 3 * DAY)), "set the clock")
    assert not (tmp_path / "identity").exists()


def test_a_certificate_from_the_future_is_named(office: Office, tmp_path: Path):
    office.begins = dt.datetime.now(UTC) + dt.timedelta(hours=6)

    refused(lambda: join(office, tmp_path / "identity"), "valid from")


WRONG_ANSWERS = [
    ({"ca_pem": Authority("another").pem}, "another CA"),
    ({"device": "crane-2"}, "another key or name"),
    ({"certificate_pem": "none"}, "did not issue"),
    (
        {"certificate_pem": Authority("another").issue(DEVICE, ec.generate_private_key(ec.SECP256R1()).public_key())},
        "did not issue",
    ),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_ANSWERS, ids=["other CA", "other name", "no certificate", "other issuer"])
def test_an_answer_that_does_not_fit_is_not_kept(changes, words, office: Office, tmp_path: Path):
    office.changes = changes

    refused(lambda: join(office, tmp_path / "identity"), words)
    assert not (tmp_path / "identity").exists()


def test_an_enrolled_device_is_not_enrolled_twice_by_accident(office: Office, tmp_path: Path):
    first = join(office, tmp_path / "identity")
    refused(lambda: join(office, tmp_path / "identity"), "--force")
    second = join(office, tmp_path / "identity", force=True)

    assert first.certificate != second.certificate
    assert len(office.requests) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["identity", "server"]


KILLED = """
import os, sys, time
from agent.common import files
from tests.sync.fleet import *
moments = int(sys.argv[2])
def count(name):
    real = getattr(os, name)
    def counted(*args, **kwargs):
        global moments
        moments -= 1
        if moments == 0:
            os._exit(9)
        return real(*args, **kwargs)
    setattr(os, name, counted)
for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink"):
    count(name)
enrolled(__import__("pathlib").Path(sys.argv[1]), Authority(), b"{}", url="https://localhost:1")
"""


@pytest.mark.long  # dozens of processes
@pytest.mark.parametrize("before", ["nothing", "an identity"])
def test_a_crash_at_any_moment_leaves_none_or_a_whole_identity(before, tmp_path: Path):
    """The process ends at the n-th call that changes the disk, for every n until it survives."""
    folder = tmp_path / "identity"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for moment in range(1, 60):
        shutil.rmtree(folder, ignore_errors=True)
        if before == "an identity":
            enrolled(folder, Authority("old"), b"{}", url="https://localhost:2")
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(moment)], check=False, env=env, timeout=60)
        if folder.exists() and any(folder.iterdir()):
            assert identity.load(folder).device == DEVICE
        else:
            assert before == "nothing", "the old identity is lost"
        if done.returncode == 0:
            return
    pytest.fail("it never survived")


DAMAGE = [
    ("key.pem", None, "key.pem is missing"),
    ("key.pem", b"", "key.pem is empty"),
    ("key.pem", b"junk", "is not a private key"),
    ("certificate.pem", b"junk", "is not a certificate"),
    ("fleet.json", b"{}", "fleet.json"),
    ("root.json", None, "root.json is missing"),
]


@pytest.mark.parametrize(("name", "data", "words"), DAMAGE)
def test_a_damaged_identity_says_which_file_and_what_to_do(name, data, words, authority: Authority, tmp_path: Path):
    folder = tmp_path / "identity"
    enrolled(folder, authority, b"{}", url="https://localhost:1")
    path = folder / name
    path.unlink() if data is None else path.write_bytes(data)

    with pytest.raises(IdentityError, match=words) as caught:
        identity.load(folder)
    assert "--force" in str(caught.value)


def test_a_certificate_is_renewed_for_the_same_key(office: Office, authority: Authority, tmp_path: Path):
    who = enrolled(tmp_path / "identity", authority, b"{}", url=office.server.url)
    http = FleetHttp(who.address.device_url, FakeClock(), ca=who.ca_file, certificate=who.certificate_file, key=who.key_file)
    assert not renewal.due(who, time.time())
    assert renewal.due(who, time.time() + 300 * DAY)

    renewed = renewal.over_https(who, http)
    http.close()

    assert renewed.certificate.serial_number != who.certificate.serial_number
    assert renewed.key.public_key() == who.key.public_key()


def test_a_renewed_certificate_for_another_key_is_not_kept(office: Office, authority: Authority, tmp_path: Path):
    who = enrolled(tmp_path / "identity", authority, b"{}", url=office.server.url)
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()

    with pytest.raises(IdentityError, match="kept the old one"):
        identity.replace_certificate(who, authority.issue(DEVICE, stranger).encode())
    assert identity.load(who.folder).certificate == who.certificate
