"""The server as a process: what systemd is told, what the certificates name, and that metadata is renewed while it runs."""

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys

import pytest
from cryptography import x509

from fleet_server.app import Fleet
from fleet_server.config import FleetConfig, Folder, load
from fleet_server.devices.pki import Authority
from tests.fleet.stand import environment, wait_until


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(30)
        yield listening, str(tmp_path / "notify")


def test_systemd_is_told(own_server, systemd):
    listening, address = systemd
    with (own_server.base / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fleet_server.cli", "serve", str(own_server.data)], stdout=log, stderr=log,
            env=environment(NOTIFY_SOCKET=address, WATCHDOG_USEC="200000"),
        )  # fmt: skip
    try:
        assert listening.recv(100) == b"READY=1", own_server.log()
        assert own_server.get("/status")["broker_connected"]
        assert [listening.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        process.send_signal(signal.SIGTERM)
        heard = b"WATCHDOG=1"
        while heard == b"WATCHDOG=1":
            heard = listening.recv(100)
        assert heard == b"STOPPING=1"
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(20)


def names_of(authority):
    certificate = x509.load_pem_x509_certificate(authority.server_cert.read_bytes())
    sans = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(san.value) for san in sans}


def test_the_certificate_names_every_host(tmp_path):
    authority = Authority.create(tmp_path, "x", ("fleet.example.com", "192.0.2.7"))
    assert names_of(authority) == {"fleet.example.com", "192.0.2.7", "localhost", "127.0.0.1", "::1"}
    before = authority.server_cert.read_bytes()
    assert not authority.renew_own(("fleet.example.com", "192.0.2.7"))
    assert authority.server_cert.read_bytes() == before
    assert authority.renew_own(("fleet.example.com", "other.example.com"))
    assert "other.example.com" in names_of(authority)


def test_a_lost_or_torn_server_key_is_made_again(tmp_path):
    """A power cut between writing the key and the certificate."""
    authority = Authority.create(tmp_path, "x", ("h",))
    other = Authority.create(_made(tmp_path / "other"), "x", ("h",))
    shutil.copy(other.server_key, authority.server_key)
    assert authority.renew_own(("h",))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority.server_cert, authority.server_key)
    authority.server_cert.unlink()
    assert authority.renew_own(("h",))


def _made(path):
    path.mkdir()
    return path


def test_own_names():
    config = FleetConfig(fleet="x", hosts=("a", "b"), listen="192.0.2.1")
    assert config.own_names == ("a", "b", "192.0.2.1")


def test_metadata_is_renewed_while_it_runs(own_server):
    own_server.set(expiry={"timestamp_s": 60.0})
    timestamp = own_server.data / "repository" / "metadata" / "timestamp.json"
    fleet = Fleet(Folder(own_server.data), load(Folder(own_server.data)), lambda: __import__("time").time() - 31)
    fleet.repository.assign(fleet.repository.assignment_bytes())  # as if signed 31 s ago: less than half is left
    fleet.close()
    version = json.loads(timestamp.read_bytes())["signed"]["version"]
    own_server.start()
    wait_until(lambda: json.loads(timestamp.read_bytes())["signed"]["version"] > version, "renewed at start")
