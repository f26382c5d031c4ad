"""What devices say: only signed, fresh reports of the device itself count, and no message can stop the intake."""

import base64
import json

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract import topics
from agent.contract.codec import encode
from agent.contract.enrolment import EnrolmentRequest, EnrolmentString
from agent.contract.reports import (
    EVENT_PAYLOAD_TYPE,
    MAX_EVENT_BYTES,
    MAX_REPORT_BYTES,
    STATE_PAYLOAD_TYPE,
    Event,
    Hardware,
    ModelState,
    Phase,
    Presence,
    StateReport,
)
from fleet_server.access import SERVER
from fleet_server.devices import shared_identity
from fleet_server.ingest.intake import Message
from fleet_server.storage.models import Device, DeviceModel
from tests.fleet.stand import make_csr, signed, signed_event, signed_report


class Known:
    """A device enrolled in this process."""

    def __init__(self, fleet, name):
        self.fleet, self.id = fleet, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        made = fleet.enrolment.create_token(SERVER, device=name, groups=[], uses=1, ttl_s=60)
        fleet.enrolment.enrol(EnrolmentRequest(token=EnrolmentString.parse(made.string).token, csr_pem=make_csr(self.key)))

    def report(self, counter, device=None, **fields):
        models = fields.pop("models", {"m": ModelState(serving=counter, sha256="0" * 64, phase=Phase.STEADY, variant="cpu")})
        return StateReport(
            device=device or self.id, counter=counter, session=1, at=0.0, agent_version="t", models=models, **fields
        )  # fmt: skip

    def say(self, what, payload, *, as_device=None):
        data = payload if isinstance(payload, bytes) else encode(payload)
        return self.fleet.intake.store([Message(topics.up(as_device or self.id, what), data)])

    def state(self, report, *, key=None, as_device=None):
        return self.say("state", signed_report(report, key or self.key), as_device=as_device)

    def event(self, event, *, key=None, as_device=None):
        return self.say("events", signed_event(event, key or self.key), as_device=as_device)

    @property
    def view(self):
        return self.fleet.inventory.get(self.id)

    @property
    def serving(self):
        return {name: m.serving for name, m in self.view.models.items()}


@pytest.fixture
def device(fleet):
    return Known(fleet, "d1")


@pytest.fixture
def other(fleet):
    return Known(fleet, "d2")


def dropped(fleet):
    return dict(fleet.intake.dropped)


def test_a_good_report_counts(fleet, device):
    changes = device.state(device.report(1))
    assert changes.models == {"m"}
    assert device.serving == {"m": 1}
    assert dropped(fleet) == {}


def test_a_replayed_report_does_not(fleet, device):
    for counter in (5, 5, 4, -1):
        device.state(device.report(counter))
    assert device.serving == {"m": 5}
    assert dropped(fleet) == {"replayed": 3}


def test_a_report_signed_by_another_device_does_not(fleet, device, other):
    device.state(device.report(1), key=other.key)
    assert device.serving == {}
    assert dropped(fleet) == {"bad_signature": 1}


def test_a_report_of_another_device_does_not(fleet, device, other):
    device.state(device.report(1, device="d2"))
    device.state(device.report(1), as_device="d2")
    assert (device.serving, other.serving) == ({}, {})
    assert dropped(fleet) == {"wrong_device": 1, "bad_signature": 1}


def test_an_unsigned_report_does_not(fleet, device):
    device.say("state", device.report(1))
    envelope = msgspec.json.decode(signed_report(device.report(1), device.key))
    device.say("state", msgspec.json.encode({**envelope, "signatures": []}))
    device.say("state", msgspec.json.encode({**envelope, "payloadType": "text/plain"}))
    device.say("state", msgspec.json.encode({**envelope, "payload": envelope["payload"][:-8] + "AAAAAAA="}))
    assert device.serving == {}
    assert sum(dropped(fleet).values()) == 4


def test_a_revoked_or_deleted_device_says_nothing(fleet, device, other):
    fleet.inventory.revoke(SERVER, device.id)
    fleet.inventory.delete(SERVER, other.id)
    device.state(device.report(1))
    other.state(other.report(1))
    assert device.serving == {}
    assert dropped(fleet) == {"unknown_device": 2}


def test_a_report_with_the_old_key_after_a_renewal_still_counts(fleet, device):
    from agent.contract.enrolment import RenewalRequest

    new = ec.generate_private_key(ec.SECP256R1())
    fleet.enrolment.renew(device.id, RenewalRequest(csr_pem=make_csr(new)))
    device.state(device.report(1))
    device.state(device.report(2), key=new)
    assert device.serving == {"m": 2}


def test_a_model_that_is_gone_is_forgotten(fleet, device):
    device.state(device.report(1))
    assert device.state(device.report(2, models={})).models == {"m"}
    assert device.serving == {}
    with fleet.database.reading() as session:
        assert session.get(DeviceModel, ("d1", "m")) is None


BAD = {
    "empty": b"", "garbage": b"\xff\x00", "deep": b"[" * 200_000, "null": b"null", "number": b"1", "list": b"[]", "object": b"{}",
    "too large": b" " * (2 * MAX_REPORT_BYTES + 1), "nul": b"\x00" * 100, "signatures wrong": b'{"payload":"","payloadType":"","signatures":1}',
    "signature wrong": b'{"payload":"","payloadType":"","signatures":["x"]}', "payload wrong": b'{"payload":1,"payloadType":"","signatures":[]}',
    "surrogates": b'{"payload":"","payloadType":"\\ud800","signatures":[]}',
}  # fmt: skip


@pytest.mark.parametrize("what", ["state", "events", "presence"])
@pytest.mark.parametrize("payload", BAD.values(), ids=BAD.keys())
def test_hostile_payloads(fleet, device, what, payload):
    device.say(what, payload)
    if (what, payload) != ("presence", b""):
        assert sum(dropped(fleet).values()) == 1
    device.state(device.report(1))
    assert device.serving == {"m": 1}


HUGE = 2**70
REPORTS = {
    "counter": lambda d: d.report(2**63), "version": lambda d: d.report(1, models={"m": ModelState(serving=HUGE, sha256=None, phase=Phase.STEADY)}),
    "long name": lambda d: d.report(1, models={"m" * 100: ModelState(serving=1, sha256=None, phase=Phase.STEADY)}),
    "many models": lambda d: d.report(1, models={f"m{n}": ModelState(serving=1, sha256=None, phase=Phase.STEADY) for n in range(300)}),
}  # fmt: skip


@pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS.keys())
def test_signed_but_impossible_reports_leave_nothing(fleet, device, make):
    report = make(device)
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

    envelope = Envelope(json.dumps(msgspec.to_builtins(report)).encode(), STATE_PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(device.key, SSlibKey.from_crypto(device.key.public_key())))
    device.say("state", msgspec.json.encode(envelope.to_dict()))
    assert device.serving == {}
    device.state(device.report(1))
    assert device.serving == {"m": 1}


def test_topics_that_are_no_devices(fleet, device):
    for topic in ("v1/d/d1/up/other", "v1/d/nobody/up/state", "v1/all/poke", "x", "", "v1/d/d1/up/state/x"):
        fleet.intake.store([Message(topic, b"{}")])
    assert sum(dropped(fleet).values()) == 6


def test_one_bad_message_does_not_take_the_others_with_it(fleet, device, other):
    good = [Message(topics.up(d.id, "state"), signed_report(d.report(1), d.key)) for d in (device, other)]
    fleet.intake.store([good[0], Message("v1/d/d1/up/state", b"x"), good[1]])
    assert (device.serving, other.serving) == ({"m": 1}, {"m": 1})


# -- presence ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "online"),
    [
        ([(1, True)], True), ([(1, True), (1, False)], False), ([(1, True), (2, True), (1, False)], True),
        ([(2, True), (1, True), (2, False)], False), ([(2, False), (1, True)], False), ([(1, True), (2, False)], False),
        ([(3, True), (3, False), (4, True)], True),
    ],
)  # fmt: skip
def test_an_old_will_cannot_override_a_new_birth(device, said, online):
    for session, there in said:
        device.say("presence", Presence(device=device.id, session=session, online=there))
    assert device.view.online is online


def test_presence_of_another_device(fleet, device):
    device.say("presence", Presence(device="d2", session=1, online=True))
    device.say("presence", b'{"device":"d1","session":99999999999999999999,"online":true}')
    assert not device.view.online
    assert sum(dropped(fleet).values()) == 2


def test_silence_is_offline(fleet, device, clock):
    device.say("presence", Presence(device=device.id, session=1, online=True))
    clock.now += fleet.config.rollouts.silence_s - 1
    assert device.view.online
    clock.now += 2
    assert not device.view.online
    device.state(device.report(1))
    assert device.view.online


def test_a_batch_is_what_its_messages_are_one_by_one(fleet, device, other):
    """Several reports of a device in one batch: the last one counts; nothing changed, nothing is judged."""
    batch = [
        Message(topics.up(d.id, "state"), signed_report(d.report(counter), d.key))
        for counter in (1, 2, 3)
        for d in (device, other)
    ]
    assert fleet.intake.store(batch).models == {"m"}
    assert (device.serving, other.serving) == ({"m": 3}, {"m": 3})
    back = [device.report(4, models={}), device.report(5, models=device.report(3).models)]
    assert fleet.intake.store([Message(topics.up("d1", "state"), signed_report(r, device.key)) for r in back]).models == set()
    assert device.serving == {"m": 3}
    assert fleet.intake.store([]).models == set()


@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
def test_either_alphabet_of_base64_is_read(fleet, device, alphabet):
    """DSSE leaves it to whoever writes an envelope."""
    envelope = msgspec.json.decode(signed_report(device.report(1), device.key))
    payload = base64.b64decode(envelope["payload"])
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    envelope["payload"] = alphabet(payload).decode()
    envelope["signatures"][0]["sig"] = alphabet(signature).decode()
    device.say("state", msgspec.json.encode(envelope))
    assert (device.serving, dropped(fleet)) == ({"m": 1}, {})


def test_a_report_of_before_the_digest_is_compared_with_what_is_stored(fleet, device):
    """The first report after an upgrade: what it says is in the tables, but nobody wrote a digest of it yet."""
    device.state(device.report(1))
    with fleet.database.session() as session:
        session.get(Device, "d1").said = None
    again = device.report(2, models=device.report(1).models)
    assert device.state(again).models == set()
    with fleet.database.reading() as session:
        assert session.get(Device, "d1").said is not None


def test_hardware_that_changes_concerns_every_model(fleet, device):
    device.state(device.report(1, hardware=Hardware(arch="aarch64", memory_bytes=1)))
    same = device.report(1).models
    assert device.state(device.report(2, models=same, hardware=Hardware(arch="aarch64", memory_bytes=2))).models == set()
    assert device.view.hardware.memory_bytes == 2
    assert device.state(device.report(3, models=same, hardware=Hardware(arch="x86_64"))).models == {"m"}
    device.state(device.report(4, models=same))
    assert device.view.hardware.arch == "x86_64", "a report that does not say it changes nothing"


# -- events --------------------------------------------------------------------------------------------------------------------


def event(number, device="d1", **fields):
    return Event(id=f"e{number}", device=device, at=1.0, name="committed", message="it runs", **fields)


def test_events_of_one_batch(fleet, device, other):
    """Each once and in their order, whatever comes twice or was stored before."""
    device.event(event(2))
    batch = [(device, event(1)), (other, event(1, device="d2")), (device, event(2)), (device, event(1)), (device, event(3))]
    stored = fleet.intake.store([Message(topics.up(d.id, "events"), signed_event(one, d.key)) for d, one in batch]).events
    assert [(one.device, one.id.rpartition("/")[2]) for one in stored] == [
        ("d1", event(1).id),
        ("d2", event(1).id),
        ("d1", event(3).id),
    ]
    assert [one.seq for one in stored] == sorted(one.seq for one in stored)
    assert fleet.journal.events()[-3:] == stored
    assert dropped(fleet) == {}, "what comes again is no fault"


def test_an_event_is_stored_once(fleet, device):
    for number in (1, 2, 1, 2, 2):
        device.event(event(number))
    found = [e for e in fleet.journal.events(device="d1") if e.name == "committed"]
    assert [e.id for e in found] == ["d1/e1", "d1/e2"]


def test_devices_cannot_take_each_others_event_ids(fleet, device, other):
    device.event(event(1))
    other.event(event(1, device="d2"))
    device.event(event(3, device="d2"))
    assert len([e for e in fleet.journal.events() if e.name == "committed"]) == 2
    assert dropped(fleet) == {"wrong_device": 1}


def told(fleet):
    return [e.id for e in fleet.journal.events() if e.name == "committed"]


def test_an_event_that_its_device_did_not_sign_is_not_stored(fleet, device, other):
    """Whoever has the broker would otherwise put words into a device's mouth."""
    rightful = msgspec.json.decode(signed_event(event(1), device.key))
    changed = encode(msgspec.json.decode(encode(event(1))) | {"message": "it does not run"})
    device.say("events", event(1))
    device.event(event(1), key=other.key)
    device.say("events", msgspec.json.encode({**rightful, "signatures": []}))
    device.say("events", msgspec.json.encode({**rightful, "payload": base64.b64encode(changed).decode()}))
    assert (told(fleet), dropped(fleet)) == ([], {"bad_envelope": 1, "bad_signature": 3})
    device.event(event(1))
    assert told(fleet) == ["d1/e1"]


def test_what_is_signed_as_one_thing_is_no_other(fleet, device):
    device.say("events", signed(event(1), STATE_PAYLOAD_TYPE, device.key))
    device.say("state", signed(device.report(1), EVENT_PAYLOAD_TYPE, device.key))
    assert (told(fleet), device.serving, dropped(fleet)) == ([], {}, {"bad_envelope": 2})


def test_an_event_that_is_too_large_is_not_even_read(fleet, device):
    device.event(Event(id="e1", device="d1", at=0, name="committed", message="x" * 2 * MAX_EVENT_BYTES))
    assert (told(fleet), dropped(fleet)) == ([], {"too_large": 1})


def test_a_revoked_device_tells_no_more(fleet, device):
    fleet.inventory.revoke(SERVER, device.id)
    device.event(event(1))
    assert told(fleet) == []


def test_event_texts_are_bounded(fleet, device):
    device.event(event(1, reason="r" * 1000, model="m" * 1000))
    device.event(Event(id="long", device="d1", at=0, name="n" * 500, message="x" * 20_000))
    stored = fleet.journal.events(device="d1")[-1]
    assert len(stored.message) == 2000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from(["state", "events", "presence", "telemetry"]))
def test_no_bytes_stop_the_intake(fleet, payload, what):
    """Whatever a device sends is stored or dropped; nothing is raised."""
    fleet.intake.store([Message(f"v1/d/d1/up/{what}", payload)])


RUNS = [
    # name, (counter, run) of each report, whether several machines showed themselves
    ("an agent of the last version", [(1, ""), (2, "")], False),
    ("one process", [(1, "a"), (2, "a")], False),
    ("one that was restarted often", [(number, f"run {number}") for number in range(1, 20)], False),
    ("two in turns", [(1, "a"), (2, "b"), (3, "a")], True),
    ("three in turns", [(1, "a"), (2, "b"), (3, "c"), (4, "a")], True),
    ("a late copy of an earlier message", [(1, "a"), (2, "b"), (1, "a")], False),
    ("one whose clock is behind", [(5, "a"), (3, "b")], True),
]


@pytest.mark.parametrize(("name", "reports", "several"), RUNS, ids=[row[0] for row in RUNS])
def test_several_machines_with_one_identity(name, reports, several, fleet, device, clock):
    for counter, run in reports:
        device.state(device.report(counter, run=run))

    assert device.view.shared is several
    events = [event for event in fleet.journal.events(limit=100) if event.name == "identity_shared"]
    assert len(events) == several
    warned = any("several machines" in text for text in fleet.status.view().warnings)
    assert warned is several
    clock.now += shared_identity.SHARED_S
    assert device.view.shared is False, "without signs for an hour it is one again"


def test_a_character_that_no_database_keeps_costs_nobody_the_report(fleet, device):
    """PostgreSQL takes no NUL in a text, and fails at looking into a document that has one."""
    strange = "lost\0 \\u0000 \\\0"
    state = ModelState(serving=1, sha256="0" * 64, variant="c\0pu", phase=Phase.STEADY)
    device.state(device.report(1, models={"m": state}, problem=f"metadata_rollback: {strange}"))
    assert device.view.state.problem == "metadata_rollback: lost\ufffd \\u0000 \\\ufffd"
    assert fleet.survey.ahead(5).first == ["d1"]
    assert fleet.status.view().messages.dropped == {}
