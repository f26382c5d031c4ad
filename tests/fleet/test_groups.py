"""Groups with scopes: the signed groups of every device are what the scopes say, whatever happens in whatever order."""

import contextlib
import json
import re

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from agent.contract.enrolment import EnrolmentRequest, EnrolmentString
from agent.contract.names import ReleaseRef
from agent.contract.reports import Hardware
from fleet_server.access import SERVER
from fleet_server.devices import group_scopes, grouping
from fleet_server.devices import groups as groups_module
from fleet_server.devices.group_scopes import Known
from fleet_server.devices.groups import Groups
from fleet_server.devices.survey import Filters
from fleet_server.errors import Conflict, Denied, Invalid, NotFound, Refused
from fleet_server.simulation.news import record_in
from fleet_server.storage.models import Device
from tests.fleet.stand import Device as Joining
from tests.fleet.stand import make_csr, wait_until
from tests.fleet.test_device_listener import record_of
from tests.fleet.test_intake import Known as Enrolled
from tests.fleet.test_scopes import Scoped

JETSON, PI, PC = "aarch64/NVIDIA Jetson Orin Nano/cuda", "aarch64/Raspberry Pi 5/-", "x86_64/-/-"
HARDWARE = {
    JETSON: Hardware(arch="aarch64", machine="NVIDIA Jetson Orin Nano", accelerator="cuda"),
    PI: Hardware(arch="aarch64", machine="Raspberry Pi 5"), PC: Hardware(arch="x86_64"),
}  # fmt: skip


class Filled(Scoped):
    """Devices that say what they are, and are poked."""

    def __init__(self, fleet, clock):
        super().__init__(fleet, clock)
        self.poked = []
        fleet.inventory.link = self

    def poke_device(self, device):
        self.poked.append(device)

    def admit(self, device):
        """It may come in; here nobody keeps it out."""

    def shut_out(self, device):
        """There is no broker here."""

    def says(self, name, kind=None, version="1.0"):
        """The device reports its hardware and software."""
        self.counters[name] += 1
        device = self.devices[name]
        report = device.report(self.counters[name], models={}, hardware=HARDWARE.get(kind))
        device.state(msgspec.structs.replace(report, agent_version=version))

    def settle(self):
        steps = 0
        while self.fleet.groups.step():
            steps += 1
            assert steps < 1000, "a step never ends"
        return steps

    def set(self, group, *texts):
        return self.fleet.groups.set(SERVER, group, texts)

    def filled(self, group, *texts):
        self.set(group, *texts)
        self.settle()

    def record(self, name):
        return record_in(self.fleet.inventory.record(name))

    def signed(self):
        return {name: list(self.record(name).groups) for name in self.devices}

    def label(self, name, **labels):
        self.fleet.inventory.set_labels(SERVER, name, labels)


@pytest.fixture
def story(fleet, clock):
    made = Filled(fleet, clock)
    made.publish(1, 2)
    made.join("crane-1", "crane-2", "pump-1")
    return made


# -- what a scope says ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "met"),
    [
        (["class:aarch64/*/cuda"], True),
        (["class:aarch64/NVIDIA*/*"], True),
        (["class:*/*Orin*/c*a"], True),
        ([f"class:{JETSON}"], True),
        (["class:aarch64/*/-"], False),
        (["class:aarch64/NVIDIA/cuda"], False),
        (["class:*/Orin*/*"], False),
        (["label:site=berlin"], True),
        (["label:site=paris,site=berlin"], True),
        (["label:site=paris"], False),
        (["label:site=berlin", "label:shift=night"], True),
        (["label:site=berlin", "label:shift=day"], False),
        (["label:site=berlin", "class:x86_64/*/*"], False),
        (["agent:0.4.*"], True),
        (["agent:0.3.*,0.4.1"], True),
        (["agent:0.4"], False),
        (["device:d1,d2"], True),
        (["device:d2"], False),
    ],
)
def test_whom_a_scope_is_for(texts, met):
    known = Known("d1", {"site": "berlin", "shift": "night"}, JETSON, "0.4.1")
    assert group_scopes.read(texts).is_met_by(known) is met


def test_what_a_device_has_not_said_meets_nothing():
    for text in ("class:*/*/*", "agent:*", "label:site=x"):
        assert not group_scopes.read([text]).is_met_by(Known("d1", {}, "", ""))


def test_conditions_in_another_order_are_the_same_scope():
    one, other = (group_scopes.read(t) for t in (["label:b=2,a=1", "agent:2,1"], ["agent:1,2 ", "label:a=1, b=2"]))
    assert one.texts == other.texts == ("label:a=1,b=2", "agent:1,2")
    assert group_scopes.read(one.texts) == one


@given(st.lists(st.sampled_from("ab*"), max_size=12), st.text("ab", max_size=12))
def test_a_star_is_any_characters(pattern, text):
    said = "".join(pattern)
    wanted = re.fullmatch(".*".join(map(re.escape, said.split("*"))), text) is not None
    assert group_scopes.matches(said, text) is (wanted and (text != "" or "*" not in said))


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ([], "from 1 to 8 conditions"),
        (["label:site=a"] + [f"label:x=v{n}" for n in range(9)], "from 1 to 8 conditions"),
        (["group:canary"], "not made of groups"),
        (["canary"], "none of"),
        (["site=berlin"], "none of"),
        (["label:site"], "label 'site' is not allowed"),
        (["class:jetson"], "ARCHITECTURE/MACHINE/ACCELERATOR"),
        (["class:aarch64//cuda"], "ARCHITECTURE/MACHINE/ACCELERATOR"),
        (["agent:"], "agent:0.4"),
        (["agent:1 2"], "agent:0.4"),
        (["device:../x"], "device '../x' is not allowed"),
    ],
)
def test_a_scope_that_cannot_be_read(story, texts, match):
    with pytest.raises(Invalid, match=match) as error:
        story.set("g", *texts)
    assert error.value.code == "bad_scope"
    assert story.fleet.groups.every() == []


def test_a_name_that_no_group_may_have(story):
    with pytest.raises(Invalid, match="group 'a b' is not allowed"):
        story.set("a b", "label:site=berlin")


# -- devices come and go -------------------------------------------------------------------------------------------------------


def test_devices_come_into_a_group_and_leave_it(story):
    story.label("crane-1", site="berlin")
    serials = {name: story.record(name).serial for name in story.devices}
    story.poked.clear()
    found = story.set("berlin", "label:site=berlin")
    assert (found.meeting, found.devices, found.settled) == (1, 0, False)
    story.settle()
    assert story.signed() == {"crane-1": ["berlin"], "crane-2": [], "pump-1": []}
    assert {name: story.record(name).serial - serials[name] for name in serials} == {"crane-1": 1, "crane-2": 0, "pump-1": 0}
    assert story.poked == ["crane-1"], "nobody else hears of it"
    found = story.fleet.groups.get("berlin")
    assert (found.devices, found.settled, found.first, found.scope) == (1, True, ["crane-1"], ["label:site=berlin"])

    story.label("pump-1", site="berlin")
    assert story.signed()["pump-1"] == ["berlin"], "at once"
    assert [one.id for one in story.fleet.survey.find(Filters(group="berlin")).devices] == ["crane-1", "pump-1"]
    story.label("crane-1", site="paris")
    assert story.signed()["crane-1"] == []
    story.set("berlin", "label:site=paris")
    story.settle()
    assert story.signed() == {"crane-1": ["berlin"], "crane-2": [], "pump-1": []}
    story.fleet.groups.remove(SERVER, "berlin")
    story.settle()
    assert story.signed() == {"crane-1": [], "crane-2": [], "pump-1": []}
    with pytest.raises(NotFound, match="group list"):
        story.fleet.groups.get("berlin")


def test_hardware_and_software_are_followed_as_devices_report_them(story):
    story.filled("jetsons", "class:aarch64/*/cuda")
    story.filled("new", "agent:2.*")
    story.says("crane-1", JETSON)
    story.says("crane-2", PI, "2.0")
    assert story.signed()["crane-1"] == [], "whoever stores reports signs nothing"
    story.settle()
    assert story.signed() == {"crane-1": ["jetsons"], "crane-2": ["new"], "pump-1": []}
    story.says("crane-1", JETSON, "2.1")
    story.says("crane-2", JETSON, "3.0")
    story.settle()
    assert story.signed() == {"crane-1": ["jetsons", "new"], "crane-2": ["jetsons"], "pump-1": []}
    story.poked.clear()
    story.says("crane-1", JETSON, "2.1")
    assert story.settle() == 0
    assert story.poked == []


def enrol(fleet, name, hardware=None, **token):
    made = fleet.enrolment.create_token(SERVER, device=name, **{"groups": [], "uses": 1, "ttl_s": 60, **token})
    csr = make_csr(ec.generate_private_key(ec.SECP256R1()))
    fleet.enrolment.enrol(
        EnrolmentRequest(token=EnrolmentString.parse(made.string).token, csr_pem=csr, hardware=HARDWARE.get(hardware))
    )


def test_a_device_that_joins_is_in_its_groups_from_its_first_record_on(story):
    story.filled("jetsons", "class:*/*/cuda")
    story.filled("night", "label:shift=night")
    enrol(story.fleet, "new-1", JETSON, groups=["canary"], labels={"shift": "night"})
    record = story.record("new-1")
    assert (record.groups, record.labels) == (("canary", "jetsons", "night"), {"shift": "night"})
    view = story.fleet.inventory.get("new-1")
    assert (view.groups, view.groups_by_scope) == (["canary", "jetsons", "night"], ["jetsons", "night"])


def test_labels_of_a_token_are_checked_and_shown(story):
    with pytest.raises(Invalid, match="value of the label 'site'"):
        story.fleet.enrolment.create_token(SERVER, device=None, groups=[], uses=1, ttl_s=60, labels={"site": ""})
    made = story.fleet.enrolment.create_token(SERVER, device=None, groups=[], uses=1, ttl_s=60, labels={"site": "x"})
    shown = {one.id: one.labels for one in story.fleet.enrolment.tokens()}
    assert made.labels == shown[made.id] == {"site": "x"}


# -- by hand and by scope ------------------------------------------------------------------------------------------------------


def test_what_a_scope_gives_no_hand_takes(story):
    story.label("crane-1", site="berlin")
    story.filled("berlin", "label:site=berlin")
    for wanted in ([], ["canary"]):
        with pytest.raises(Conflict, match=r"crane-1 is in the group 'berlin' .*label:site=berlin.*group set berlin") as error:
            story.fleet.inventory.set_groups(SERVER, "crane-1", wanted)
        assert error.value.code == "by_scope"
    with pytest.raises(Conflict, match=r"'berlin' fills itself .*, and crane-2 does not"):
        story.fleet.inventory.set_groups(SERVER, "crane-2", ["berlin"])
    view = story.fleet.inventory.set_groups(SERVER, "crane-1", ["canary", "berlin"])
    assert (view.groups, view.groups_by_scope) == (["berlin", "canary"], ["berlin"])
    story.label("crane-1", site="paris")
    assert story.signed()["crane-1"] == ["canary"], "what a hand gave stays"


def test_a_name_is_filled_by_hand_or_by_a_scope(story):
    story.fleet.inventory.set_groups(SERVER, "crane-1", ["canary"])
    with pytest.raises(Conflict, match=r"have the group 'canary' by hand, such as crane-1"):
        story.set("canary", "label:site=berlin")
    with pytest.raises(Conflict, match=r"'canary' has no scope.*device group"):
        story.fleet.groups.remove(SERVER, "canary")
    token = story.fleet.enrolment.create_token(SERVER, device=None, groups=["soon"], uses=1, ttl_s=60)
    with pytest.raises(Conflict, match=f"token {token.id} .*token revoke {token.id}"):
        story.set("soon", "label:site=berlin")
    story.clock.now += 61
    story.set("soon", "label:site=berlin")
    with pytest.raises(Conflict, match="the group 'soon' fills itself"):
        story.fleet.enrolment.create_token(SERVER, device=None, groups=["soon"], uses=1, ttl_s=60)
    with pytest.raises(NotFound, match="group list"):
        story.fleet.groups.remove(SERVER, "nobody")


def test_a_group_that_was_removed_can_be_given_by_hand_before_its_devices_have_left(story):
    story.label("crane-1", site="berlin")
    story.label("crane-2", site="berlin")
    story.filled("berlin", "label:site=berlin")
    story.fleet.groups.remove(SERVER, "berlin")
    story.fleet.inventory.set_groups(SERVER, "crane-1", ["berlin"])
    story.settle()
    assert story.signed() == {"crane-1": ["berlin"], "crane-2": [], "pump-1": []}


def test_a_scope_that_nobody_meets_is_kept_and_said(story):
    found = story.set("mars", "label:site=mars")
    assert (found.meeting, found.devices) == (0, 0)
    story.settle()
    assert [(one.name, one.devices) for one in story.fleet.groups.every()] == [("mars", 0)]


def test_the_same_scope_once_more_changes_nothing(story):
    story.filled("berlin", "label:site=berlin")
    entries, events = len(story.fleet.journal.audited()), len(story.fleet.journal.events())
    assert story.set("berlin", " label:site=berlin").settled
    assert (len(story.fleet.journal.audited()), len(story.fleet.journal.events())) == (entries, events)


def test_there_may_not_be_too_many(story, monkeypatch):
    monkeypatch.setattr(groups_module, "MAX_SCOPED", 2)
    story.set("a", "label:a=1")
    story.set("b", "label:a=1")
    with pytest.raises(Conflict, match="2 groups have scopes already"):
        story.set("c", "label:a=1")
    story.set("b", "label:a=2")


# -- rollouts ------------------------------------------------------------------------------------------------------------------


def test_a_device_that_comes_into_the_group_of_a_wave_that_began_is_reached(story):
    story.filled("jetsons", "class:*/*/cuda")
    story.says("crane-1", JETSON)
    story.settle()
    rollout = story.start(1, waves=["jetsons"], at_once=True)
    assert story.runs() == {"crane-1": 1, "crane-2": None, "pump-1": None}
    story.says("crane-2", JETSON)
    story.settle()
    assert story.runs() == {"crane-1": 1, "crane-2": 1, "pump-1": None}
    assert story.fleet.views.rollout(rollout).verdict.counts.total == 2
    story.says("crane-2", PI)
    story.settle()
    assert story.runs()["crane-2"] is None
    assert story.fleet.views.rollout(rollout).verdict.counts.total == 1


@pytest.mark.parametrize("named", ["wave", "scope", "superseded", "rule"])
def test_a_group_that_is_named_is_not_removed(story, named):
    story.label("crane-1", site="berlin")
    story.filled("berlin", "label:site=berlin")
    if named == "wave":
        name = story.start(1, waves=["1", "berlin"])
    elif named == "superseded":
        first = story.start(1, waves=["berlin"], confirm=True)
        name = story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 2), waves=["1"]).id
    else:
        name = story.to(1, "group:berlin")
    if named == "rule":
        story.commits("crane-1", version=1)
        name = "the rule of digits for group:berlin: .*rule remove digits --scope group:berlin"
    assert len(story.fleet.groups.get("berlin").named_by) == 1
    with pytest.raises(Conflict, match=name) as error:
        story.fleet.groups.remove(SERVER, "berlin")
    assert error.value.code == "in_use"
    if named != "rule":
        story.fleet.rollouts.abort(SERVER, name)
        story.fleet.groups.remove(SERVER, "berlin")


# -- regroupings ---------------------------------------------------------------------------------------------------------------


def many(story, number):
    """Rows as enrolment makes them."""
    with story.fleet.database.session() as session:
        session.add_all(
            Device(id=f"m{n:04}", created=story.clock(), groups=[], labels={"site": "berlin"}, serial=1) for n in range(number)
        )


def members(story, group="berlin"):
    return next((one.devices for one in story.fleet.groups.every() if one.name == group), 0)


def test_a_regrouping_goes_by_small_steps_and_another_process_goes_on_with_it(story, monkeypatch):
    monkeypatch.setattr(groups_module, "READ_AT_ONCE", 40)
    monkeypatch.setattr(groups_module, "SIGNED_AT_ONCE", 15)
    many(story, 100)
    story.set("berlin", "label:site=berlin")
    assert story.fleet.groups.step()
    assert 0 < members(story) <= 15, "whoever writes waits for no more than that"
    fleet = story.fleet
    fleet.groups = Groups(fleet.database, fleet.inventory, fleet.journal, story.clock)  # the process before was killed
    story.settle()
    assert members(story) == 100
    with fleet.database.reading() as session:
        assert {row.serial for row in session.scalars(select(Device).where(Device.id.like("m%")))} == {2}, "each is signed once"
    (event,) = [one for one in fleet.journal.events() if one.name == "groups_settled"]
    assert "100 are in others than before" in event.message


def test_a_scope_that_changes_in_the_middle_begins_the_regrouping_anew(story, monkeypatch):
    monkeypatch.setattr(groups_module, "READ_AT_ONCE", 20)
    many(story, 60)
    story.set("berlin", "label:site=berlin")
    story.fleet.groups.step()
    story.fleet.groups.step()
    story.set("berlin", "device:m0001,m0059")
    story.settle()
    assert story.fleet.groups.get("berlin").first == ["m0001", "m0059"]


def test_a_step_that_is_overtaken_writes_nothing_of_what_it_read(story, monkeypatch):
    """The scope is set once more between what a step reads and what it writes."""
    many(story, 5)
    story.set("berlin", "label:site=berlin")
    differs, once = grouping.differs, []

    def overtaken(row, found):
        if not once:
            once.append(True)
            story.set("berlin", "device:m0002")
        return differs(row, found)

    monkeypatch.setattr(grouping, "differs", overtaken)
    assert story.fleet.groups.step()
    assert members(story) == 0
    story.settle()
    assert story.fleet.groups.get("berlin").first == ["m0002"]


def test_a_device_that_is_deleted_in_the_middle_of_a_step(story, monkeypatch):
    many(story, 3)
    story.set("berlin", "label:site=berlin")
    differs, once = grouping.differs, []

    def deleted(row, found):
        if row.id == "m0001" and not once:
            once.append(True)
            story.fleet.inventory.delete(SERVER, "m0001")
        return differs(row, found)

    monkeypatch.setattr(grouping, "differs", deleted)
    story.settle()
    assert story.fleet.groups.get("berlin").first == ["m0000", "m0002"]


# -- anything ------------------------------------------------------------------------------------------------------------------

NAMES, SITES, KINDS = ("d1", "d2", "d3", "d4"), ("berlin", "paris"), (JETSON, PI, PC)
SCOPES = (
    ("label:site=berlin",), ("label:site=berlin,site=paris",), ("class:aarch64/*/*",), ("class:*/*/cuda", "label:site=paris"), ("agent:2.*",),
    ("device:d1,d2",),
)  # fmt: skip
REFUSED = (Conflict, Invalid, NotFound, Refused, Denied)


class Anything(Filled):
    """Does what may happen, and keeps in plain words what should come of it."""

    def __init__(self, fleet, clock):
        super().__init__(fleet, clock)
        self.facts, self.scopes, self.serials = {}, {}, {}

    def wanted(self, name):
        known = self.facts[name]
        met = {group for group, texts in self.scopes.items() if group_scopes.read(texts).is_met_by(Known(name, *known["is"]))}
        return sorted(known["by_hand"] | met)

    def does_join(self, one, two):
        name = NAMES[one % 4]
        if name not in self.devices:
            self.devices[name], self.counters[name] = Enrolled(self.fleet, name), 0
            self.facts[name] = {"by_hand": set(), "is": [{}, "", ""]}

    def does_label(self, one, two):
        name = NAMES[one % 4]
        if name in self.devices:
            labels = self.facts[name]["is"][0]
            if two % 3 < 2:
                self.label(name, site=SITES[two % 3])
                labels["site"] = SITES[two % 3]
            elif "site" in labels:
                self.fleet.inventory.set_labels(SERVER, name, {}, ["site"])
                del labels["site"]

    def does_report(self, one, two):
        name = NAMES[one % 4]
        if name in self.devices:
            kind, version = KINDS[two % 3], ("1.0", "2.0")[two % 2]
            self.says(name, kind, version)
            self.facts[name]["is"][1:] = [kind, version]

    def does_set(self, one, two):
        group, texts = ("a", "b", "h")[one % 3], SCOPES[two % len(SCOPES)]
        with contextlib.suppress(*REFUSED):
            self.set(group, *texts)
            assert not any(group in known["by_hand"] for known in self.facts.values()), "a name is one or the other"
            self.scopes[group] = texts

    def does_remove(self, one, _two):
        group = ("a", "b", "h")[one % 3]
        with contextlib.suppress(*REFUSED):
            self.fleet.groups.remove(SERVER, group)
            del self.scopes[group]

    def does_give(self, one, two):
        name = NAMES[one % 4]
        if name in self.devices:
            asked = [["h"], ["h", "k"], [], ["a"]][two % 4]
            with contextlib.suppress(*REFUSED):
                self.fleet.inventory.set_groups(SERVER, name, asked)
                self.facts[name]["by_hand"] = set(asked) - self.scopes.keys()

    def does_delete(self, one, _two):
        name = NAMES[one % 4]
        if name in self.devices:
            self.fleet.inventory.delete(SERVER, name)
            del self.devices[name], self.facts[name]

    def does_step(self, _one, _two):
        self.fleet.groups.step()

    def does_start_anew(self, _one, _two):
        self.fleet.groups = Groups(self.fleet.database, self.fleet.inventory, self.fleet.journal, self.clock)

    def compare(self):
        self.settle()
        assert self.signed() == {name: self.wanted(name) for name in self.devices}
        for name in self.devices:
            view, record = self.fleet.inventory.get(name), self.record(name)
            assert view.groups == list(record.groups)
            assert set(view.groups_by_scope) == set(view.groups) & self.scopes.keys()
            known = self.serials.get(name, (0, ()))
            assert record.serial > known[0] or record == known[1], "other words have a higher serial"
            self.serials[name] = (record.serial, record)
        counts = {one.name: one.devices for one in self.fleet.groups.every()}
        said = [group for name in self.devices for group in self.wanted(name)]
        assert counts == {group: said.count(group) for group in {*said, *self.scopes}}


STEPS = sorted(name for name in vars(Anything) if name.startswith("does_"))
OFTEN = [*STEPS, "does_label", "does_report", "does_report", "does_set", "does_give"]
steps = st.lists(st.tuples(st.sampled_from(OFTEN), st.integers(0, 11), st.integers(0, 11)), min_size=5, max_size=25)
EXAMPLES = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.fixture
def anything(fleet, clock):
    return Anything(fleet, clock)


def tried(anything, done, often):
    for group in list(anything.scopes):
        anything.does_remove(("a", "b", "h").index(group), 0)
    for name in list(anything.devices):
        anything.does_delete(NAMES.index(name), 0)
    anything.serials.clear()
    for one in range(3):
        anything.does_join(one, 0)
    for number, (name, one, two) in enumerate(done):
        getattr(anything, name)(one, two)
        if number % often == 0:
            anything.compare()
    anything.compare()


@pytest.mark.parametrize(
    "done",
    [
        [("does_set", 0, 5), ("does_remove", 0, 0)],
        [("does_set", 0, 5), ("does_remove", 0, 0), ("does_give", 0, 3), ("does_set", 0, 5)],
        [("does_give", 2, 0), ("does_set", 2, 5), ("does_set", 0, 5), ("does_give", 0, 3), ("does_label", 0, 0)],
        [("does_set", 1, 0), ("does_label", 1, 0), ("does_label", 1, 1), ("does_set", 1, 1), ("does_label", 1, 2)],
        [("does_set", 0, 3), ("does_report", 0, 0), ("does_label", 0, 1), ("does_report", 0, 1)],
        [("does_set", 1, 4), ("does_report", 2, 1), ("does_start_anew", 0, 0), ("does_report", 2, 0)],
        [
            ("does_set", 0, 5),
            ("does_set", 1, 2),
            ("does_delete", 0, 0),
            ("does_join", 0, 0),
            ("does_report", 0, 1),
            ("does_remove", 1, 0),
        ],
    ],
)
def test_each_thing_that_may_happen(anything, done):
    tried(anything, done, 1)


@settings(max_examples=10, **EXAMPLES)
@given(done=steps, often=st.integers(1, 10))
def test_signed_groups_are_what_the_scopes_say(anything, done, often):
    tried(anything, done, often)


@pytest.mark.long  # many stories
@pytest.mark.timeout(300)
@settings(max_examples=80, **EXAMPLES)
@given(done=steps, often=st.integers(1, 10))
def test_signed_groups_are_what_the_scopes_say_for_long(anything, done, often):
    tried(anything, done, often)


# -- a running server ----------------------------------------------------------------------------------------------------------


def test_an_operator_fills_a_group_on_a_running_server(server, connect):
    device, other = connect(server.enrol("berlin-1")), server.enrol("paris-1")
    server.post("/devices/berlin-1/labels", {"set": {"site": "berlin"}})
    assert device.wait_for_poke()
    before = record_of(device)
    done = server.cli("group", "set", "berliners", "label:site=berlin")
    assert (done.returncode, done.stdout[:9]) == (0, "1 device "), done.stderr
    wait_until(lambda: record_of(device).groups == ("berliners",), "the record is signed anew")
    assert record_of(device).serial > before.serial
    assert record_of(other).groups == ()
    wait_until(lambda: json.loads(server.cli("group", "show", "berliners", "--json").stdout)["settled"], "all were looked at")
    assert "by label:site=berlin" in server.cli("group", "list").stdout
    assert "berliners by their scopes" in server.cli("device", "show", "berlin-1").stdout
    refused = server.cli("device", "group", "berlin-1", "canary")
    assert (refused.returncode, "[by_scope]" in refused.stderr) == (3, True)
    assert "berlin-1 is in berliners, canary" in server.cli("device", "group", "berlin-1", "canary", "berliners").stdout
    assert "no device meets label:site=mars now" in server.cli("group", "set", "martians", "label:site=mars").stdout
    bad = server.cli("group", "set", "berliners", "site=berlin")
    assert (bad.returncode, "label:site=berlin" in bad.stderr) == (3, True)

    server.publish_simple("grouped", 1)
    rollout = server.post("/rollouts", {"release": "grouped:1", "groups": ["berliners"]})["id"]
    refused = server.cli("group", "remove", "berliners", "--yes")
    assert (refused.returncode, rollout in refused.stderr) == (3, True)
    server.post(f"/rollouts/{rollout}/abort")
    assert server.cli("group", "remove", "berliners", "--yes").returncode == 0
    wait_until(lambda: record_of(device).groups == ("canary",), "it left")
    assert server.cli("group", "show", "berliners").returncode == 3
    actions = [one["action"] for one in server.get("/audit")]
    assert {"group.set", "group.remove"} <= set(actions)
    assert {"group_set", "group_removed", "groups_settled"} <= {one["name"] for one in server.get("/events")}
    viewer = server.make_token("viewer")
    assert server.request("PUT", "/groups/x", json={"scope": ["label:a=b"]}, token=viewer).status_code == 403
    assert server.request("GET", "/groups", token=viewer).status_code == 200


def test_a_token_gives_labels(server):
    string = EnrolmentString.parse(server.cli("token", "create", "--label", "site=rome", "--label", "shift=night").stdout)
    device = Joining.join(server, string, "rome-1")
    assert record_of(device).labels == {"shift": "night", "site": "rome"}
    assert "site=rome" in server.cli("token", "list").stdout
    assert server.cli("token", "create", "--label", "rome").returncode == 2
