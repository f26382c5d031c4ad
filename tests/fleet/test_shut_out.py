"""Devices whose certificate does not count any more: what they are told, what `doctor` and the log say, who lists them, and a late renewal.

The server, the broker and the agent's code are real; so are the certificates, which the fleet's own CA issues where it is to have issued them.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import logging
from typing import get_args

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy import delete

from agent.host.clock import SystemClock
from agent.store import Store
from agent.sync import identity
from agent.sync.fleet import enrol, renewal
from agent.sync.fleet.link import Broker, Link, tls_context
from agent.sync.fleet.outbox import Outbox
from agent.sync.http import FleetHttp, HttpStatus
from agent.sync.operator.doctor import examine
from fleet_server.config import Folder, load
from fleet_server.devices.pki import Authority, serial_hex
from fleet_server.devices.survey import Filters
from fleet_server.devices.views import CertificateState
from fleet_server.storage.database import Database
from fleet_server.storage.models import Certificate
from tests.fleet.stand import make_csr, wait_until

HOUR = 3600.0


class Gone:
    """An enrolled device with its agent's folders; its certificate can be replaced by another."""

    def __init__(self, server, folder, name):
        self.server, self.name, self.folder = server, name, folder
        folder.mkdir()
        self.store = Store.create(folder / "store")
        self.who = enrol.enrol(str(server.enrolment_string()), folder / "identity", SystemClock(), device=name, hardware=None)
        self.config = folder / "agent.yaml"
        settings = {"store": str(self.store.root), "sync": {"identity": str(folder / "identity")}}
        self.config.write_text(yaml.safe_dump({**settings, "serve": {"socket": str(folder / "agent.sock")}}))

    def has(self, certificate: x509.Certificate) -> None:
        """From now on it has this certificate."""
        self.who.certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.who = identity.load(self.who.folder)

    def ends(self) -> None:
        """Its certificate ended an hour ago, and so says what the server has of it."""
        csr = x509.load_pem_x509_csr(make_csr(self.who.key).encode())
        ended = Authority(self.server.data / "pki").issue_device(self.name, csr, -HOUR)
        folder = Folder(self.server.data)
        database = Database(folder.database_url(load(folder)))
        with database.session() as session:
            session.execute(delete(Certificate).where(Certificate.device == self.name))
            at = ended.not_valid_after_utc.timestamp()
            pem = ended.public_bytes(serialization.Encoding.PEM).decode()
            session.add(Certificate(serial=serial_hex(ended), device=self.name, issued=at - HOUR, pem=pem, expires=at))
        database.close()
        self.has(ended)

    def comes_from_elsewhere(self) -> None:
        """Another CA issued its certificate."""
        key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.timezone.utc)
        builder = x509.CertificateBuilder().serial_number(7).public_key(self.who.key.public_key())
        builder = builder.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
        builder = builder.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another fleet")]))
        builder = builder.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=9))
        self.has(builder.sign(key, hashes.SHA256()))

    def findings(self):
        return {finding.name: finding for finding in examine(self.config)}

    def https(self):
        who = self.who
        return FleetHttp(
            who.address.device_url, SystemClock(), ca=who.ca_file, certificate=who.certificate_file, key=who.key_file
        )

    def renewed(self):
        http = self.https()
        try:
            return renewal.over_https(self.who, http)
        finally:
            http.close()


@pytest.fixture
def gone(server, tmp_path, request):
    return Gone(server, tmp_path / "device", f"d{abs(hash(request.node.name)) % 10**9}")


SHUT_OUT = [
    # what happened, what doctor says of the fleet server and of the broker, and what is to be done
    ("ended", lambda d: d.ends(), "certificate has ended", "certificate has ended", "allow-renewal"),
    ("revoked", lambda d: d.server.post(f"/devices/{d.name}/revoke"), "shut this device out", "was revoked", "enrol --force"),
    ("deleted", lambda d: d.server.request("DELETE", f"/devices/{d.name}"), "does not know this device", "was revoked", "enrol --force"),
    ("of another CA", lambda d: d.comes_from_elsewhere(), "does not know who issued", "does not know who issued", "enrol --force"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "happens", "server_says", "broker_says", "advice"), SHUT_OUT, ids=[row[0] for row in SHUT_OUT]
)
def test_what_doctor_says(name, happens, server_says, broker_says, advice, gone):
    fine = gone.findings()
    assert (fine["fleet server"].level, fine["broker"].level) == ("ok", "ok")

    happens(gone)

    def told():
        found = gone.findings()
        for what, words in (("fleet server", server_says), ("broker", broker_says)):
            if found[what].level != "failed" or words not in found[what].message or advice not in found[what].advice:
                return False  # the broker reads its revocation list a moment later
        return found["files over the broker"].level != "ok"

    wait_until(told, f"doctor's words, last {gone.findings()}")


def test_the_log_says_what_doctor_says(gone, tmp_path, caplog):
    gone.ends()
    who, outbox = gone.who, Outbox(tmp_path / "outbox.db")
    broker = Broker(
        who.address.broker_host,
        who.address.broker_port,
        lambda: tls_context(str(who.ca_file), str(who.certificate_file), str(who.key_file)),
    )
    link = Link(
        who.device, broker, outbox, itertools.count(1).__next__, on_poke=lambda _said, _alone: None, jitter=lambda: 0.01
    )
    with caplog.at_level(logging.WARNING):
        link.start()
        try:
            wait_until(lambda: "certificate has ended" in (link.problem or ""), f"the link's problem, {link.problem}")
        finally:
            link.stop()
            outbox.close()
    said = [record.message for record in caplog.records if "certificate has ended" in record.message]
    assert said
    assert len(said) == len(set(said)), "an outage is a line, not one for each attempt"


def test_a_late_renewal_is_allowed_for_a_time_and_proved_with_the_old_key(gone, server):
    gone.ends()
    listed = {one["id"] for one in json.loads(server.cli("device", "list", "--certificate", "ended", "--json").stdout)}
    assert gone.name in listed
    assert any("allow-renewal" in text for text in server.get("/status")["warnings"])
    with pytest.raises(HttpStatus) as refused:
        gone.renewed()
    assert (refused.value.status, refused.value.code) == (403, "expired")

    done = server.cli("device", "allow-renewal", gone.name, "--for", "2h")
    assert done.returncode == 0, done.stderr
    assert server.get(f"/devices/{gone.name}")["renewal_allowed_until"] is not None
    http = gone.https()
    with pytest.raises(HttpStatus) as still:
        http.get(http.url("/record"), limit_bytes=1 << 20, deadline_s=10)
    http.close()
    assert still.value.code == "expired", "to renew, and for nothing else"
    stranger = ec.generate_private_key(ec.SECP256R1())
    kept = gone.who.key_file.read_bytes()
    gone.who.key_file.write_bytes(
        stranger.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip
    with pytest.raises(Exception, match=r"(?i)key"):
        gone.renewed()
    gone.who.key_file.write_bytes(kept)

    gone.who = gone.renewed()

    found = gone.findings()
    assert (found["certificate"].level, found["fleet server"].level, found["broker"].level) == ("ok", "ok", "ok")
    assert server.get(f"/devices/{gone.name}")["certificate"] == "good"
    names = [event["name"] for event in server.get(f"/events?limit=100&device={gone.name}")]
    assert "renewal_allowed" in names
    assert "device.allow_renewal" in {row["action"] for row in server.get("/audit?limit=100")}


def test_what_an_operator_allows_ends(fleet, clock):
    from tests.fleet.test_intake import Known

    device = Known(fleet, "d1")
    (serial,) = (one.serial for one in fleet.inventory.get("d1").certificates)
    certificate = fleet.inventory.issued(serial)
    clock.now = certificate.not_valid_after_utc.timestamp() + 1
    from fleet_server.access import SERVER
    from fleet_server.errors import FleetError

    def code(**options):
        try:
            return fleet.inventory.authenticate(certificate, **options)
        except FleetError as error:
            return error.code

    assert code(to_renew=True) == "expired"
    fleet.inventory.allow_renewal(SERVER, "d1", HOUR)
    assert (code(to_renew=True), code()) == ("d1", "expired")
    clock.now += HOUR
    assert code(to_renew=True) == "expired"
    fleet.inventory.revoke(SERVER, "d1")
    with pytest.raises(FleetError) as refused:
        fleet.inventory.allow_renewal(SERVER, "d1", HOUR)
    assert refused.value.code == "revoked"
    assert device.id == "d1"


@pytest.mark.parametrize(
    ("left", "state"), [(1.0, "good"), (0.2, "good"), (0.16, "ends_soon"), (0.0, "ended"), (-1.0, "ended")]
)
def test_how_a_certificate_stands_by_the_time_it_has_left(left, state, fleet, clock):
    from tests.fleet.test_intake import Known

    Known(fleet, "d1")
    expires = fleet.inventory.get("d1").certificate_expires
    clock.now = expires - left * fleet.config.expiry.device_certificate_s

    assert fleet.inventory.get("d1").certificate == state
    assert [one.id for one in fleet.survey.find(Filters(certificate=state)).devices] == ["d1"]
    assert {one: fleet.survey.certificates(one, 5).first for one in get_args(CertificateState)} == {
        one: ["d1"] if one == state else [] for one in get_args(CertificateState)
    }
