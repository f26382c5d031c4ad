"""Joining the fleet over real HTTPS: who gets in, who does not, and what a certificate says."""

import hashlib
import ssl
import threading

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.contract.enrolment import EnrolmentRequest, EnrolmentString
from agent.contract.reports import Presence
from fleet_server.access import SERVER
from fleet_server.errors import Denied, Refused
from fleet_server.storage.models import Certificate
from tests.fleet.stand import Device, make_csr, wait_until

KEY = ec.generate_private_key(ec.SECP256R1())


def post(server, token, **fields):
    body = {"token": token, "csr_pem": make_csr(KEY), **fields}
    return requests.post(f"{server.url}/enrolment", json=body, verify=str(server.ca), timeout=20)


def code(answer):
    body = answer.json()
    assert set(body) == {"error", "code"}
    return answer.status_code, body["code"]


def test_a_device_joins(server):
    string = server.enrolment_string(groups=["canary"])
    ca = requests.get(f"{string.base_url}/enrolment/ca", verify=str(server.ca), timeout=20).text
    assert hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca)).hexdigest() == string.ca_sha256
    device = Device.join(server, string, "joins-1")
    certificate = x509.load_pem_x509_certificate(device.response["certificate_pem"].encode())
    assert [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["joins-1"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert device.response["ca_pem"] == ca
    assert server.get("/devices/joins-1")["groups"] == ["canary"]


def test_the_server_chooses_an_id_when_none_is_wished(server):
    device = server.enrol()
    assert device.id.startswith("dev-")


def test_a_token_works_as_often_as_it_was_made_for(server):
    string = server.enrolment_string(uses=2)
    assert post(server, string.token).status_code == 200
    assert post(server, string.token).status_code == 200
    assert code(post(server, string.token)) == (401, "bad_token")


def test_an_unknown_token(server):
    assert code(post(server, "A" * 32)) == (401, "bad_token")


def test_a_revoked_token(server):
    made = server.post("/enrolment-tokens", {})
    assert server.request("DELETE", f"/enrolment-tokens/{made['id']}").status_code == 200
    assert code(post(server, made["string"].split("//")[1].split("@")[0])) == (401, "bad_token")


def test_an_expired_token(fleet, clock):
    made = fleet.enrolment.create_token(SERVER, device=None, groups=[], uses=1, ttl_s=60)
    clock.now += 61
    with pytest.raises(Denied, match="expired"):
        fleet.enrolment.enrol(EnrolmentRequest(token=EnrolmentString.parse(made.string).token, csr_pem=make_csr(KEY)))


def test_a_token_for_one_device(server):
    token = server.enrolment_string(device="only-me").token
    assert code(post(server, token, device="somebody-else")) == (403, "wrong_device")
    assert post(server, token).json()["device"] == "only-me"


def test_an_id_that_is_taken(server):
    server.enrol("twice")
    assert code(post(server, server.enrolment_string().token, device="twice")) == (409, "id_taken")


@pytest.mark.parametrize("device", ["fleet-server", "all"])
def test_reserved_ids(server, device):
    assert code(post(server, server.enrolment_string().token, device=device)) == (400, "reserved_id")


@pytest.mark.parametrize(
    "device",
    ["+", "#", "a/b", "../x", "", "a b", "ä", "x" * 65, "a\n", "a\x00b", "<script>", ".hidden", "$SYS", 7, ["a"], {"a": 1}],
)
def test_hostile_ids(server, device):
    assert code(post(server, server.enrolment_string().token, device=device)) == (400, "invalid")


RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
P384 = ec.generate_private_key(ec.SECP384R1())


def _tampered():
    text = make_csr(KEY).splitlines()
    middle = len(text) // 2
    text[middle] = text[middle][:10] + ("A" if text[middle][10] != "A" else "B") + text[middle][11:]
    return "\n".join(text)


@pytest.mark.parametrize(
    "csr",
    ["", "garbage", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", make_csr(RSA), make_csr(P384),
     _tampered(), "x" * 20_000, "\x00"],
    ids=["empty", "garbage", "not asn1", "rsa", "p384", "tampered", "too long", "nul"],
)  # fmt: skip
def test_csr_garbage_does_not_use_the_token_up(server, csr):
    token = server.enrolment_string().token
    assert code(post(server, token, csr_pem=csr)) == (400, "bad_csr")
    assert post(server, token).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 50_000, b'"x"', b"null", b"\xff", b'{"token": 1}', b'{"token":"x","csr_pem":"y","format":99}']
)
def test_hostile_bodies(server, body):
    answer = requests.post(f"{server.url}/enrolment", data=body, verify=str(server.ca), timeout=20)
    assert code(answer) == (400, "invalid")


def test_the_name_in_the_request_is_not_taken_over(server):
    body = {"token": server.enrolment_string().token, "csr_pem": make_csr(KEY, cn="fleet-server"), "device": "modest"}
    answer = requests.post(f"{server.url}/enrolment", json=body, verify=str(server.ca), timeout=20).json()
    assert "CN=modest" in x509.load_pem_x509_certificate(answer["certificate_pem"].encode()).subject.rfc4514_string()


def test_a_deleted_id_can_enrol_again_with_a_higher_serial(fleet, clock):
    def enrol():
        made = fleet.enrolment.create_token(SERVER, device="again", groups=[], uses=1, ttl_s=60)
        fleet.enrolment.enrol(EnrolmentRequest(token=EnrolmentString.parse(made.string).token, csr_pem=make_csr(KEY)))
        return fleet.inventory.get("again").record_serial

    first = enrol()
    assert fleet.inventory.set_groups(SERVER, "again", ["a"]).record_serial == first + 1
    fleet.inventory.delete(SERVER, "again")
    clock.now += 10
    assert enrol() > first + 1


def test_a_clock_that_went_back_does_not_lower_a_serial(fleet, clock):
    """A device never believes a record with a lower serial than it has seen, so it would stay in its old groups for good."""
    from tests.fleet.test_intake import Known

    Known(fleet, "d1")
    seen = fleet.inventory.set_groups(SERVER, "d1", ["a"]).record_serial
    fleet.inventory.delete(SERVER, "d1")
    clock.now -= 86400
    Known(fleet, "d1")
    assert fleet.inventory.get("d1").record_serial > seen


def test_a_connection_does_not_outlive_its_certificate(fleet, clock):
    from tests.fleet.test_intake import Known

    Known(fleet, "d1")
    pem = fleet.inventory.get("d1").certificates
    with fleet.database.reading() as session:
        certificate = x509.load_pem_x509_certificate(session.get(Certificate, pem[0].serial).pem.encode())
    assert fleet.inventory.authenticate(certificate) == "d1"
    clock.now = pem[0].expires + 1
    with pytest.raises(Refused, match="has ended"):
        fleet.inventory.authenticate(certificate)


def test_one_use_lets_one_of_many_in(server):
    string = server.enrolment_string()
    answers = []
    workers = [threading.Thread(target=lambda: answers.append(post(server, string.token).status_code)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert sorted(answers) == [200, *[401] * 7]


def test_what_an_earlier_device_of_the_id_left_with_the_broker_is_forgotten(own_server, connect):
    """Its last session number would make every word of the new device an old one."""
    server = own_server.start()
    first = server.enrol("again")
    first.session = 1000
    connect(first)
    wait_until(lambda: server.get("/devices/again")["online"], "the first one is there")
    first.disconnect()
    server.request("DELETE", "/devices/again")
    second = server.enrol("again")
    server.stop()
    server.start()  # and is told everything again that the broker kept
    connect(second)
    second.report({})
    wait_until(lambda: server.get("/devices/again")["state"] is not None, "the second one is heard")
    assert server.get("/devices/again")["online"]
    second.send("presence", Presence(device="again", session=1, online=False))
    wait_until(lambda: not server.get("/devices/again")["online"], "the second one has gone")
