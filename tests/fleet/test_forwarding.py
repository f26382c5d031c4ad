"""What an API process hands on and what it answers itself; who the leader answers; what readers along hear. In this process."""

from __future__ import annotations

import asyncio
import json
import os

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet_server.access import Role
from fleet_server.api.forwarding import Forwarding, RenewalsForwarded
from fleet_server.api.internal import CERTIFICATE, RECORD, RENEWAL, SIGNED_RENEWAL, Internal
from fleet_server.api.leader import NoLeader, ToLeader, Unanswered
from fleet_server.api.operator import app as operator_api
from fleet_server.api.tls import CERTIFICATE as SHOWN
from fleet_server.config import FleetConfig
from fleet_server.devices import pki
from fleet_server.errors import Refused, Unavailable
from fleet_server.journal import Happening
from fleet_server.live import Change, SharedHub
from fleet_server.processes import aside
from fleet_server.processes.api import tidy
from fleet_server.processes.common import refuse_what_is_not_shared
from fleet_server.sections import DecideSettings
from fleet_server.status import LeaderView, Messages
from fleet_server.storage.processes import ProcessView, new_id
from tests.fleet.stand import make_csr
from tests.fleet.test_intake import Known


class Client:
    """Sends requests to an application without sockets."""

    def __init__(self, app, headers=None):
        self._app, self._headers = app, headers or {}

    def request(self, method, path, *, headers=None, **options):
        async def send():
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False, client=("192.0.2.7", 1))
            async with httpx.AsyncClient(transport=transport, base_url="https://fleet", trust_env=False) as client:
                return await client.request(method, path, headers={**self._headers, **(headers or {})}, **options)

        return asyncio.run(send())

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, **options):
        return self.request("POST", path, **options)

    def put(self, path, **options):
        return self.request("PUT", path, **options)


async def pieces():
    yield b"{}"


class Answered:
    def __init__(self, status, body):
        self.status, self.headers, self._body = status, [("Content-Type", "application/json"), ("X-Kept", "1")], body
        self.closed = False

    def chunks(self):
        yield self._body[:3]
        yield self._body[3:]

    def close(self):
        self.closed = True


class Asked(ToLeader):
    """Instead of the leader: keeps what it is asked."""

    def __init__(self, authority):
        super().__init__(authority, lambda: None, lambda: None)
        self.asked, self.answer = [], Answered(202, b'{"by":"the leader"}')

    def ask(self, method, target, headers=None, body=b""):
        self.asked.append((method, target, dict(headers or {}), body))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def renewed(self, certificate, wanted):
        if isinstance(self.answer, Exception):
            raise self.answer
        self.asked.append((certificate, wanted.csr_pem))
        return b'{"device":"d"}'


@pytest.fixture
def leader(fleet):
    made = Asked(fleet.authority)
    yield made
    made.threads.shutdown()


@pytest.fixture
def client(fleet, leader):
    token = fleet.access.create("me", Role.ADMIN).token
    app = Forwarding(operator_api.build(fleet), fleet.access, leader)
    return Client(app, {"Authorization": f"Bearer {token}"})


def test_changes_are_handed_on_whole(client, leader):
    answer = client.post(
        "/api/v1/rollouts?x=%20y", json={"release": "m:1"}, headers={"X-Forwarded-For": "6.6.6.6", "Idempotency-Key": "k"}
    )
    assert (answer.status_code, answer.json(), answer.headers["x-kept"]) == (202, {"by": "the leader"}, "1")
    assert answer.headers["cache-control"] == "no-store"
    ((method, target, headers, body),) = leader.asked
    assert (method, target, json.loads(body)) == ("POST", "/api/v1/rollouts?x=%20y", {"release": "m:1"})
    assert headers["authorization"].startswith("Bearer ef_")
    assert headers["x-forwarded-for"] == "192.0.2.7", "what the client says of that is not handed on"
    assert headers["x-forwarded-proto"] == "https"
    assert headers["idempotency-key"] == "k"
    assert leader.answer.closed


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/devices/d/groups"), ("DELETE", "/access-tokens/x"), ("POST", "/bundles")]
)
def test_every_kind_of_change(client, leader, method, path):
    assert client.request(method, f"/api/v1{path}", json={}).status_code == 202
    assert leader.asked[0][:2] == (method, f"/api/v1{path}")


def test_what_is_read_and_what_needs_no_leader_stays_here(client, leader):
    assert client.get("/api/v1/me").json()["name"] == "me"
    assert client.get("/health").json() == {"ready": True, "why_not": ""}
    assert client.get("/").status_code == 200
    assert client.put(f"/api/v1/blobs/{'0' * 64}", content=b"x").status_code == 400
    assert client.post("/api/v1/session", json={"token": "ef_no"}).status_code == 401
    assert client.post("/elsewhere").status_code in {404, 405}
    assert leader.asked == []


def test_strangers_reach_nobody(client, leader):
    for headers in ({"Authorization": "Bearer ef_wrong"}, {"Authorization": ""}):
        assert client.post("/api/v1/rollouts", json={}, headers=headers).status_code == 401
    assert leader.asked == []
    assert client.post("/enrolment", content=b"{}", headers={"Authorization": ""}).status_code == 202, (
        "devices that join have no token"
    )
    assert leader.asked[0][1] == "/enrolment"


def test_bodies_are_bounded_before_they_are_read(client, leader):
    huge = client.post("/api/v1/rollouts", content=b"", headers={"Content-Length": str(2**40)})
    assert huge.status_code == 413
    assert client.post("/api/v1/rollouts", content=pieces()).status_code == 411
    assert leader.asked == []


def test_nobody_leads(client, leader):
    leader.answer = NoLeader("no process decides now; nothing was changed, try again")
    answer = client.post("/api/v1/rollouts", json={})
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "no_leader", "5")
    leader.answer = Unanswered("not known", "the key")
    answer = client.post("/api/v1/rollouts", json={})
    assert (answer.status_code, answer.headers["idempotency-key"]) == (503, "the key")


# -- renewals --------------------------------------------------------------------------------------------------------------


def shown(app, der):
    """The application as a connection with that certificate sees it."""

    async def with_certificate(scope, receive, send):
        await app({**scope, "state": {SHOWN: der}}, receive, send)

    return Client(with_certificate)


def der_of(certificate):
    return certificate.public_bytes(serialization.Encoding.DER)


def test_a_renewal_is_handed_on_with_what_the_device_showed(leader):
    async def devices(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})

    device = shown(RenewalsForwarded(devices, leader), b"der")
    assert device.get("/record").content == b"here"
    assert device.post("/renew", json={"csr_pem": "x"}).json() == {"device": "d"}
    assert leader.asked == [(b"der", "x")]
    assert device.post("/renew", content=b"{").status_code == 400
    leader.answer = Refused("no", code="revoked")
    assert device.post("/renew", json={"csr_pem": "x"}).json()["code"] == "revoked"


@pytest.fixture
def inside(fleet):
    """The leader's application, and a device of the fleet."""
    device = Known(fleet, "cam")
    ours = x509.load_pem_x509_certificate(fleet.authority.client_cert.read_bytes())
    return Internal(fleet, operator_api.build(fleet)), device, ours


def test_the_leader_answers_its_own_alone(fleet, inside):
    app, _, ours = inside
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.load_pem_x509_csr(make_csr(key).encode())
    device = fleet.authority.issue_device("cam2", request, 3600)
    ended = fleet.authority.issue_device(pki.SERVER_CN, request, -86400.0 / 2)
    assert shown(app, der_of(ours)).get(RECORD + "cam").status_code == 200
    assert shown(app, der_of(device)).get(RECORD + "cam").json()["code"] == "not_ours"
    assert shown(app, der_of(ended)).get(RECORD + "cam").json()["code"] == "expired"
    assert shown(app, None).get(RECORD + "cam").json()["code"] == "no_certificate"
    assert shown(app, der_of(ours)).post("/api/v1/rollouts", json={}).status_code == 401, "it makes nobody an operator"


def test_the_leader_renews_only_for_the_same_key(fleet, inside):
    app, _, ours = inside
    client = shown(app, der_of(ours))
    key = ec.generate_private_key(ec.SECP256R1())
    with fleet.database.session() as session:
        request = x509.load_pem_x509_csr(make_csr(key).encode())
        certificate = fleet.enrolment.add(session, "cam3", request, [], None)
    import base64

    def renew(presented, with_key):
        headers = {CERTIFICATE: base64.b64encode(presented).decode()}
        return client.post(RENEWAL, json={"csr_pem": make_csr(with_key, "cam3")}, headers=headers)

    assert renew(der_of(certificate), key).json()["device"] == "cam3"
    assert renew(der_of(certificate), ec.generate_private_key(ec.SECP256R1())).json()["code"] == "wrong_key"
    other = pki.Authority.create(_made(fleet.folder.root / "other"), "x", ("h",))
    forged = _forged(other, certificate, key)
    assert renew(der_of(forged), key).status_code == 403, "one that another CA signed, with the same name and number"
    assert renew(b"no certificate", key).status_code == 400
    assert client.post(SIGNED_RENEWAL + "cam3", content=b"{}").status_code in {400, 403}


def _made(path):
    path.mkdir()
    return path


def _forged(authority, certificate, key):
    builder = (
        x509.CertificateBuilder()
        .subject_name(certificate.subject)
        .issuer_name(x509.load_pem_x509_certificate(authority.ca_path.read_bytes()).subject)
    )
    builder = builder.public_key(key.public_key()).serial_number(certificate.serial_number)
    builder = builder.not_valid_before(certificate.not_valid_before_utc).not_valid_after(certificate.not_valid_after_utc)
    from cryptography.hazmat.primitives import hashes, serialization

    stolen = serialization.load_pem_private_key((authority.folder / "ca.key").read_bytes(), None)
    return builder.sign(stolen, hashes.SHA256())


# -- readers along ---------------------------------------------------------------------------------------------------------


class Called:
    """Signals that are heard at once, by whoever listens here."""

    def __init__(self):
        self.handlers, self.again = {}, {}

    def on(self, kind, handler):
        self.handlers[kind] = handler

    def on_again(self, what, handler):
        self.again[what] = handler

    def send(self, kind, about=""):
        self.handlers[kind](about)


def test_readers_of_every_process_hear_each_event_once_and_in_order(fleet):
    signals = Called()
    hub = SharedHub(signals)
    hub.read = lambda after: fleet.journal.events(after=after, limit=2)
    fleet.journal.note(Happening(name="before", message="x"))

    async def heard():
        with hub.reader() as reader:
            hub.start()
            await asyncio.sleep(0)
            fleet.journal._hub = hub  # noqa: SLF001 - as the process is made with it
            await asyncio.to_thread(
                lambda: [fleet.journal.note(Happening(name=f"e{number}", message="x")) for number in range(5)]
            )
            hub.tell(Change("devices"))
            signals.again["events"]()
            return [await asyncio.wait_for(reader.get(), 10) for _ in range(6)]

    found = asyncio.run(heard())
    hub.close()
    assert [one.name for one in found if not isinstance(one, Change)] == [f"e{number}" for number in range(5)]
    assert Change("devices") in found


# -- status ----------------------------------------------------------------------------------------------------------------


def process(kind, number, *, since=100.0, seen=200.0, missing=False):
    return ProcessView(id=f"{kind}-box-{number}-abc", kind=kind, version="1", since=since, seen=seen, missing=missing)


class Others:
    def __init__(self, *found, leads=True, hears=True):
        self._found, self._leads, self._hears = list(found), leads, hears

    def leading(self):
        return LeaderView(7, "decide-box-1-abc", 100.0) if self._leads else None

    def processes(self):
        return self._found

    def connected(self):
        return self._hears

    def messages(self):
        return Messages(3, {})

    def paused(self):
        return []

    def broker(self):
        return None

    def warnings(self):
        return []


@pytest.mark.parametrize(
    ("others", "warned"),
    [
        (Others(process("decide", 1)), []),
        (Others(leads=False), ["no `edge-fleet decide` leads"]),
        (Others(hears=False), ["no `edge-fleet ingest` is connected"]),
        (Others(process("api", 1, missing=True)), ["api-box-1-abc ended without saying so"]),
        (Others(process("api", 1, seen=200.0, missing=True), process("api", 2, since=201.0)), []),
        (Others(process("api", 1, seen=200.0, missing=True), process("api", 2, since=150.0)), ["api-box-1-abc ended"]),
    ],
    ids=["well", "no leader", "nobody hears", "one is gone", "one was replaced", "one is gone beside another"],
)
def test_what_is_wrong_with_the_processes_is_said(fleet, others, warned):
    fleet.status.several = others
    view = fleet.status.view()
    assert len(view.warnings) == len(warned), view.warnings
    assert all(words in said for words, said in zip(warned, view.warnings, strict=True))
    assert (view.leader is None) is (others.leading() is None)
    assert (view.messages.accepted, view.processes) == (3, others.processes())


def test_a_process_has_a_name_of_its_own_that_postgresql_keeps():
    names = {new_id("decide") for _ in range(10)}
    assert len(names) == 10
    assert all(len(name) <= 63 for name in names)


def test_health_and_metrics_of_those_that_answer_nobody_else(fleet):
    why = ["it waits"]
    listening = aside.listener("127.0.0.1:1", fleet.metrics.text, lambda: why[0])
    client = Client(listening.config.app)
    assert (client.get("/health").status_code, client.get("/health").json()["why_not"]) == (503, "it waits")
    why[0] = ""
    assert client.get("/health").json() == {"ready": True, "why_not": ""}
    assert "edge_fleet_database_ok 1" in client.get("/metrics").text


# -- settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "needs PostgreSQL"),
        ({"database_url": "postgresql://h/x"}, "object store"),
        ({"database_url": "postgresql://h/x", "shared_port": 443}, "shared_port"),
    ],
)
def test_what_several_processes_need(settings, said):
    with pytest.raises(Unavailable, match=said):
        refuse_what_is_not_shared(FleetConfig(fleet="x", hosts=("h",), **settings))


def test_where_the_leader_is_reached():
    assert DecideSettings().address == "127.0.0.1:8445"
    assert DecideSettings(listen="::1", port=1).address == "[::1]:1"
    assert DecideSettings(listen="0.0.0.0", told="a.example.org:2").address == "a.example.org:2"
    assert DecideSettings(listen="0.0.0.0").address.endswith(":8445")
    for wrong in ({"port": 0}, {"told": "nothing"}):
        with pytest.raises(ValueError, match=r"port|told"):
            DecideSettings(**wrong)


def test_what_is_uploaded_and_published_waits_for_no_release_here(fleet):
    mark = fleet.blobs.pending
    old, named, fresh = ("a" * 64, "b" * 64, "c" * 64)
    for sha256 in (old, named, fresh):
        mark.begin(sha256, "me")
        (fleet.folder.uploads / sha256).write_bytes(b"x")
    for path in fleet.folder.uploads.glob(f"{old}*"):
        os.utime(path, (1, 1))
    fleet.catalogue.blobs = lambda: {named}
    tidy(fleet)
    assert mark.marked() == {fresh}
    assert sorted(path.name for path in fleet.folder.uploads.iterdir()) == [named, fresh, f"{fresh}.by"]
