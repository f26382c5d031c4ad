"""A new certificate over MQTT: for the device that signs with the key of a good one, once, and for nobody else."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey

from agent.contract import topics
from agent.contract.codec import encode
from agent.contract.enrolment import RENEWAL_PAYLOAD_TYPE, SignedRenewal
from agent.contract.reports import STATE_PAYLOAD_TYPE
from agent.contract.transfers import Ask, Status, decode_part
from agent.sync import identity
from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.config import Folder, load
from fleet_server.devices.renewals import Renewals
from fleet_server.errors import FleetError
from fleet_server.ingest.transfers import WAITING, TransferAnswers
from fleet_server.storage.models import Certificate
from tests import warm
from tests.fleet.stand import DEADLINE_S, Server, environment, make_csr, wait_until
from tests.fleet.test_intake import Known
from tests.fleet.test_transfers import enrolled

DAY = 86400.0
STRANGER = ec.generate_private_key(ec.SECP256R1())


def signed(document: bytes, key, payload_type: str = RENEWAL_PAYLOAD_TYPE) -> str:
    envelope = Envelope(document, payload_type, {})
    envelope.sign(CryptoSigner(key, SSlibKey.from_crypto(key.public_key())))
    return msgspec.json.encode(envelope.to_dict()).decode()


def serials(fleet, device: str) -> list[str]:
    return [one.serial for one in fleet.inventory.get(device).certificates]


class Office:
    """The server's side without sockets, with two devices whose certificates end in two months."""

    def __init__(self, fleet) -> None:
        self.fleet = fleet
        self.lasting(60 * DAY)
        self.one, self.other = Known(fleet, "d1"), Known(fleet, "d2")
        self.lasting(365 * DAY)
        self.renewals = Renewals(fleet.inventory, fleet.enrolment)

    def lasting(self, seconds: float) -> None:
        """How long certificates last that are issued from now on."""
        self.fleet.enrolment.certificate_s = seconds

    def request(self, *, signer=None, payload_type=RENEWAL_PAYLOAD_TYPE, key=None, cn="d1", **changes) -> str:
        """What device d1 would ask, but for what is said here."""
        fields = {"device": "d1", "replaces": serials(self.fleet, "d1")[0], "csr_pem": make_csr(key or self.one.key, cn=cn)}
        return signed(encode(SignedRenewal(**{**fields, **changes})), signer or self.one.key, payload_type)

    def ask(self, request: str, device: str = "d1") -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.renewals.certificate(device, request))


@pytest.fixture
def office(fleet) -> Office:
    return Office(fleet)


def test_a_device_gets_one_for_its_key_and_name(office):
    given = office.ask(office.request())

    assert given.public_key() == office.one.key.public_key()
    assert given.subject.rfc4514_string() == "CN=d1"
    given.verify_directly_issued_by(office.fleet.authority.ca)
    assert office.fleet.inventory.authenticate(given) == "d1"


def test_a_lost_answer_and_a_repeated_request_get_the_same_again(office):
    request = office.request()
    given = {office.ask(asked).serial_number for asked in (request, request, office.request(), request)}

    assert len(given) == 1
    assert len(serials(office.fleet, "d1")) == 2


def test_the_next_one_comes_when_the_new_one_is_no_longer_new(office, clock):
    first = office.ask(office.request())
    clock.now += 59 * DAY
    assert office.ask(office.request()) == first
    clock.now += 65 * DAY

    again = office.ask(office.request(replaces=f"{first.serial_number:x}"))

    assert again.serial_number != first.serial_number
    assert len(serials(office.fleet, "d1")) == 3


REFUSED = {
    "signed by another device": ("bad_signature", lambda o: o.request(signer=o.other.key)),
    "signed by a stranger": ("bad_signature", lambda o: o.request(signer=STRANGER)),
    "in another device's name": ("wrong_device", lambda o: o.request(device="d2")),
    "for another device's certificate": ("wrong_device", lambda o: o.request(replaces=serials(o.fleet, "d2")[0])),
    "for a certificate that nobody has": ("wrong_device", lambda o: o.request(replaces="0" * 40)),
    "for another name": ("wrong_key", lambda o: o.request(cn="d2")),
    "for the server's name": ("wrong_key", lambda o: o.request(cn="fleet-server")),
    "for another key": ("wrong_key", lambda o: o.request(key=STRANGER)),
    "for the other device's key": ("wrong_key", lambda o: o.request(key=o.other.key)),
    "no certificate request": ("bad_csr", lambda o: o.request(csr_pem="x")),
    "a signed report": ("bad_envelope", lambda o: o.request(payload_type=STATE_PAYLOAD_TYPE)),
    "a signed report under the name of a request": ("invalid", lambda o: signed(encode(o.one.report(1)), o.one.key)),
    "unsigned": ("bad_signature", lambda o: msgspec.json.encode({**msgspec.json.decode(o.request()), "signatures": []}).decode()),
    "changed": ("bad_signature", lambda o: o.request().replace('"payload":"', '"payload":"ICAg')),
    "nothing": ("bad_envelope", lambda o: ""),
    "deep": ("bad_envelope", lambda o: "[" * 3000),
}  # fmt: skip


@pytest.mark.parametrize(("code", "make"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(office, code, make):
    with pytest.raises(FleetError) as refused:
        office.ask(make(office))
    assert refused.value.code == code
    assert (len(serials(office.fleet, "d1")), len(serials(office.fleet, "d2"))) == (1, 1)


def test_a_rightful_request_on_another_devices_topic(office):
    with pytest.raises(FleetError) as refused:
        office.ask(office.request(), device="d2")
    assert refused.value.code == "bad_signature"


@pytest.mark.parametrize("way", ["revoke", "delete"])
def test_a_device_that_was_shut_out_gets_none(office, way):
    request, before = office.request(), serials(office.fleet, "d1")
    getattr(office.fleet.inventory, way)(SERVER, "d1")

    with pytest.raises(FleetError) as refused:
        office.ask(request)
    assert refused.value.code == "bad_signature"
    assert way == "delete" or serials(office.fleet, "d1") == before


def test_shut_out_between_the_question_and_the_answer(office, monkeypatch):
    """Neither way issues a certificate that would be on no revocation list."""
    authenticate = office.fleet.inventory.authenticate

    def then_revoked(certificate):
        device = authenticate(certificate)
        office.fleet.inventory.revoke(SERVER, device)
        return device

    monkeypatch.setattr(office.fleet.inventory, "authenticate", then_revoked)
    with pytest.raises(FleetError) as refused:
        office.ask(office.request())
    assert refused.value.code == "revoked"
    assert len(serials(office.fleet, "d1")) == 1


def test_an_old_request_is_worth_nothing_once_its_certificate_has_ended(office, clock):
    """Whoever has the broker may have kept it; otherwise it would prolong for ever what should have ended."""
    kept = office.request()
    office.ask(kept)
    clock.now += 61 * DAY
    assert office.fleet.inventory.signers("d1"), "the new one is still good"

    with pytest.raises(FleetError) as refused:
        office.ask(kept)
    assert refused.value.code == "expired"


def test_a_certificate_that_has_ended_renews_nothing(office, clock):
    clock.now += 61 * DAY
    with pytest.raises(FleetError) as refused:
        office.ask(office.request())
    assert refused.value.code == "bad_signature"


# -- at the transfers ---------------------------------------------------------------------------------------------------------------


class Sent:
    def wait_for_publish(self, timeout=None):
        return


def renewal_ask(request: str, id_: str = "r1") -> bytes:
    return encode(Ask(id=id_, thing="renewal", name="", first=0, wanted="01", request=request))


def test_a_flood_of_requests_waits_behind_itself_and_makes_one_certificate(office):
    fleet = office.fleet
    transfers = TransferAnswers(fleet.blobs, fleet.repository, fleet.inventory, office.renewals)
    answers, begun, go = [], threading.Event(), threading.Event()

    def send(topic, payload):
        begun.set()
        go.wait(DEADLINE_S)
        answers.append((topic, decode_part(payload)))
        return Sent()

    transfers.start(send)
    flood = renewal_ask(office.request())
    transfers.ask("d1", flood)
    assert begun.wait(DEADLINE_S)
    taken = sum(transfers.ask("d1", flood) for _ in range(3000))
    record = Ask(id="mine", thing="record", name="", first=0, wanted="01")
    assert transfers.ask("d2", encode(record)), "there is room for everybody else"
    go.set()
    mine = topics.down_blocks("d2", "mine")
    wait_until(lambda: len(answers) == taken + 2, "everything that was taken is answered")
    transfers.stop()

    assert taken == WAITING
    assert [topic for topic, _ in answers].index(mine) <= 2
    assert {part.status for _, part in answers} == {Status.OK}
    assert len(serials(fleet, "d1")) == 2


def test_who_is_refused_is_told_why(office):
    fleet = office.fleet
    transfers = TransferAnswers(fleet.blobs, fleet.repository, fleet.inventory, office.renewals)
    answers = []
    transfers.start(lambda topic, payload: answers.append((topic, decode_part(payload))) or Sent())
    transfers.ask("d1", renewal_ask(office.request(cn="d2")))
    wait_until(lambda: answers, "an answer")
    transfers.stop()

    ((topic, part),) = answers
    assert (topic, part.status) == (topics.down_blocks("d1", "r1"), Status.REFUSED)
    assert b"another key or name" in part.data


@pytest.mark.parametrize("fields", [{"thing": "renewal"}, {"thing": "record", "request": "x"}])
def test_a_request_goes_with_a_renewal_and_with_nothing_else(fields):
    with pytest.raises(ValueError, match="a request goes with a renewal"):
        Ask(**{"id": "a", "thing": "blob", "name": "", "first": 0, "wanted": "01", **fields})


# -- the whole of it ----------------------------------------------------------------------------------------------------------------


def lasting(server: Server, seconds: float) -> None:
    """How long certificates last that are issued from the next start on."""
    path = server.data / "fleet.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["expiry"]["device_certificate_s"] = seconds
    path.write_text(yaml.safe_dump(settings))


def revoke_one(server: Server, serial: str) -> None:
    """One certificate, not the device; with the server stopped, which puts it on its list when it starts."""
    fleet = Fleet(Folder(server.data), load(Folder(server.data)))
    with fleet.database.session() as session:
        session.get(Certificate, serial).revoked = 1.0
    fleet.close()


def heard(server: Server, device: str) -> int:
    state = server.get(f"/devices/{device}")["state"]
    return state["counter"] if state else 0


def synced(config: Path, log) -> warm.Process:
    return warm.Process("agent.cli", ["sync", "--config", str(config)], stdout=log, stderr=log, env=environment())


@pytest.mark.long
@pytest.mark.alone  # the first certificate lasts a minute
def test_by_the_brokers_port_alone(own_server, tmp_path):
    """HTTPS closed, the certificate nearly over: `edge-agent sync` has a new one, and comes back when only that one opens the broker."""
    server = own_server
    lasting(server, 60.0)
    (tmp_path / "device").mkdir()
    server.start()
    folder, config = enrolled(server, tmp_path / "device", "harbour-2")
    first = identity.load(folder)
    server.stop()
    lasting(server, 365 * DAY)
    server.start()
    with (tmp_path / "device" / "log").open("wb") as log:
        process = synced(config, log)
    try:
        wait_until(lambda: identity.load(folder).certificate != first.certificate, "a new certificate", within=50)
        second = identity.load(folder)
        assert second.certificate.public_key() == first.certificate.public_key()
        assert second.not_after > first.not_after + 300 * DAY
        assert len(server.get("/devices/harbour-2")["certificates"]) == 2
        server.stop()
        revoke_one(server, f"{first.certificate.serial_number:x}")
        server.start()
        last = heard(server, "harbour-2")
        wait_until(lambda: heard(server, "harbour-2") > last, "the device reports with its new certificate")
    finally:
        process.terminate()
        process.wait(15)


def test_a_device_that_floods_the_broker_with_requests(server, connect):
    """Everybody else is answered, and it has one certificate more than before at most."""
    flood, quiet = connect(server.enrol("asks-1")), connect(server.enrol("quiet-1"))
    present = x509.load_pem_x509_certificate(flood.response["certificate_pem"].encode())
    document = SignedRenewal(device="asks-1", replaces=f"{present.serial_number:x}", csr_pem=make_csr(flood.key, cn="asks-1"))
    ask = renewal_ask(signed(encode(document), flood.key))
    for _ in range(3000):
        flood.mqtt.publish(topics.up("asks-1", "blocks"), ask, qos=0)
    quiet.send("blocks", encode(Ask(id="mine", thing="record", name="", first=0, wanted="01")))

    while True:
        topic, payload = quiet.received.get(timeout=DEADLINE_S)
        if topic == topics.down_blocks("quiet-1", "mine"):
            break
    assert decode_part(payload).status is Status.OK
    assert len(server.get("/devices/asks-1")["certificates"]) == 1, "what it has is new: it is given again"
