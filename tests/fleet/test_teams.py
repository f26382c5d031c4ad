"""Teams, and hardware classes that are excluded from a release: what the fleet is told after every turn."""

from __future__ import annotations

import json

import msgspec
import pytest

from agent.contract.acceptance import Acceptance
from agent.contract.assignment import Window, wanted
from agent.contract.names import ReleaseRef
from agent.contract.reports import Answer, Hardware, ModelState, Outcome, Phase, Presence, hardware_class
from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.releases import keys, publisher
from fleet_server.rollouts.views import MemberView
from fleet_server.sections import RolloutSettings
from tests.fleet.stand import sha256, simple_manifest
from tests.fleet.test_intake import Known
from tests.fleet.test_rollouts import Story

JETSON = Hardware(arch="aarch64", machine="NVIDIA Jetson Orin Nano", accelerator="cuda")
PI = Hardware(arch="aarch64", machine="Raspberry Pi 5")
JETSONS, PIS = hardware_class(JETSON), hardware_class(PI)


class Pair(Story):
    """Models `arm` and `eye` on devices of two hardware classes."""

    def __init__(self, fleet, clock):
        super().__init__(fleet, clock)
        self.kinds: dict[str, Hardware] = {}
        self.runs: dict[str, dict[str, ModelState]] = {}

    def publish(self, *versions, models=("arm", "eye"), **acceptance):
        for model in models:
            for version in versions:
                data = f"{model} {version}".encode()
                (self.fleet.folder.blobs / sha256(data)).write_bytes(data)
                manifest = simple_manifest(model, version, data)
                manifest = msgspec.structs.replace(manifest, acceptance=Acceptance(**acceptance))
                signed = publisher.add(
                    self.fleet.repository.releases(), manifest, keys.load(self.fleet.releases_key), self.clock()
                )
                self.fleet.catalogue.publish(SERVER, *signed)

    def join(self, *names, groups=(), kind=JETSON):
        for name in names:
            self.devices[name], self.counters[name], self.kinds[name] = Known(self.fleet, name), 0, kind
            self.runs[name] = {}
            self.fleet.inventory.set_groups(SERVER, name, list(groups))
            self.devices[name].say("presence", Presence(device=name, session=1, online=True))

    def say(self, name, model, version, outcome=Outcome.COMMITTED, *, reason=None, answered=None):
        self.counters[name] += 1
        self.clock.now += 1
        answer = Answer(release=answered or version, outcome=outcome, at=self.clock(), reason=reason)
        self.runs[name][model] = ModelState(
            serving=version, sha256=sha256(f"{model} {version}".encode()), variant="cpu", phase=Phase.STEADY, answers=(answer,)
        )  # fmt: skip
        device = self.devices[name]
        report = device.report(self.counters[name], models=self.runs[name], hardware=self.kinds[name])
        self.fleet.judge.evaluate(device.state(report).models)

    def all_run(self, model, version):
        for name in self.devices:
            self.say(name, model, version)

    def start(self, model, version, **options):
        return self.fleet.rollouts.start(SERVER, ReleaseRef(model, version), **options).id

    def start_both(self, version, **options):
        return self.start("arm", version, team=[ReleaseRef("eye", version)], **options)

    def wants(self, name, model):
        groups = self.fleet.inventory.get(name).groups
        return wanted(self.assignment.models[model], name, groups, hardware_class(self.kinds[name])).release

    def get(self, rollout):
        return self.fleet.views.rollout(rollout)


@pytest.fixture
def pair(fleet, clock):
    made = Pair(fleet, clock)
    made.publish(1, 2, 3)
    made.join("jetson-1", "jetson-2", "jetson-3", "jetson-4")
    made.join("pi-1", "pi-2", kind=PI, groups=["canary"])
    for model in ("arm", "eye"):
        rollout = made.start(model, 1)
        made.all_run(model, 1)
        assert made.state(rollout) == "completed"
    return made


# -- teams -------------------------------------------------------------------------------------------------------------------------


def test_a_team_has_one_fate(pair):
    first = pair.start_both(2)
    second = pair.get(first).team[0].id
    assert pair.assignment.teams == {first: {"arm": 2, "eye": 2}}
    assert pair.get(second).team == (MemberView(first, "arm", 2),)
    pair.all_run("arm", 2)
    assert (pair.state(first), pair.state(second)) == ("running", "running"), "the other one is still to answer"
    pair.all_run("eye", 2)

    assert (pair.state(first), pair.state(second)) == ("completed", "completed")
    assert pair.assignment.teams == {first: {"arm": 2, "eye": 2}}, "who was away switches together, too"
    assert {pair.wants(d, m) for d in pair.devices for m in ("arm", "eye")} == {2}


def test_its_waves_reach_the_same_devices(pair):
    first = pair.start_both(2, permille=500)
    for name in pair.devices:
        assert pair.wants(name, "arm") == pair.wants(name, "eye")
    rollouts = [pair.assignment.models[model].rollout for model in ("arm", "eye")]
    assert {rollout.team for rollout in rollouts} == {first}
    assert rollouts[0].id != rollouts[1].id


def test_one_bad_member_aborts_all_and_they_go_back_together(pair):
    first = pair.start_both(2, max_failures=0, at_once=True)
    pair.say("jetson-1", "eye", 1, Outcome.ROLLED_BACK, reason="error_ratio", answered=2)
    second = pair.get(first).team[0].id

    assert (pair.state(first), pair.state(second)) == ("aborted", "aborted")
    assert "eye:2 1 rolled back" in pair.get(first).reason
    assert pair.assignment.teams == {f"{first}-back": {"arm": 1, "eye": 1}}
    assert {pair.wants(d, m) for d in pair.devices for m in ("arm", "eye")} == {1}


def test_a_team_that_has_not_begun_takes_the_place_of_none(pair):
    first = pair.start_both(2, at_once=True)
    for name in pair.devices:
        for model in ("arm", "eye"):
            pair.say(name, model, 2)
    assert pair.assignment.teams == {first: {"arm": 2, "eye": 2}}
    later = pair.start_both(3, starts=pair.clock.now + 600)
    pair.fleet.inventory.set_groups(SERVER, "pi-1", ["canary"])
    assert pair.state(later) == "scheduled"
    pair.fleet.rollouts.abort(SERVER, later)
    assert pair.assignment.teams == {first: {"arm": 2, "eye": 2}}, "nobody was told of the other"


@pytest.mark.parametrize("member", [0, 1])
def test_what_is_asked_of_one_is_done_to_all(pair, member):
    first = pair.start_both(2, groups=["canary"], confirm=True)
    ids = [first, pair.get(first).team[0].id]
    rollouts = pair.fleet.rollouts
    rollouts.pause(SERVER, ids[member])
    assert [pair.state(one) for one in ids] == ["paused", "paused"]
    rollouts.resume(SERVER, ids[member])
    for device in ("pi-1", "pi-2"):
        for model in ("arm", "eye"):
            pair.say(device, model, 2)
    assert [pair.state(one) for one in ids] == ["waiting", "waiting"]
    rollouts.promote(SERVER, ids[member])
    assert [pair.get(one).wave for one in ids] == [1, 1]
    rollouts.abort(SERVER, ids[member])
    assert [pair.state(one) for one in ids] == ["aborted", "aborted"]


def test_a_withdrawal_of_one_ends_all(pair):
    first = pair.start_both(2)
    pair.fleet.rollouts.withdraw(SERVER, ReleaseRef("eye", 2))
    assert pair.state(first) == "aborted"
    assert {pair.wants(d, m) for d in pair.devices for m in ("arm", "eye")} == {1}


def test_a_later_rollout_of_one_member_ends_what_bound_them(pair):
    pair.start_both(2)
    pair.all_run("arm", 2)
    pair.all_run("eye", 2)
    pair.start("arm", 3)
    pair.all_run("arm", 3)

    assert pair.assignment.teams == {}


def test_nothing_is_begun_when_one_of_them_cannot(pair):
    pair.start("eye", 2)
    with pytest.raises(Conflict, match="eye:2 is running"):
        pair.start_both(3)
    assert pair.assignment.models["arm"].rollout is None
    with pytest.raises(NotFound):
        pair.start("arm", 2, team=[ReleaseRef("ear", 1)])
    with pytest.raises(Invalid, match="different models"):
        pair.start("arm", 2, team=[ReleaseRef("arm", 3)])


def test_a_fleet_without_teams_pays_nothing(pair):
    pair.start("arm", 2)
    assert pair.assignment.teams == {}
    assert pair.assignment.models["arm"].rollout.team is None


def test_a_window_of_the_rollout(pair):
    pair.start("arm", 2, window="sat,sun 02:00-05:00")
    assert pair.assignment.models["arm"].rollout.window == Window(start_minute=120, end_minute=300, days=(5, 6))
    with pytest.raises(Invalid, match="window"):
        pair.start("eye", 2, window="at night")


def test_an_assignment_that_was_signed_before_is_read_with_its_teams(pair, clock):
    """As the version before signed it: a restored database learns from it what devices were told."""
    said = {
        "fleet": "test", "format": 1, "kind": "assignment", "version": 99, "together": {"r9-ffff": {"arm": 2, "eye": 2}},
        "models": {
            "arm": {"release": 2, "rollout": None, "withdrawn": [], "excluded": []},
            "eye": {
                "release": 1, "withdrawn": [], "excluded": [],
                "rollout": {"id": "r9-ffff", "release": 2, "previous": 1, "groups": [], "permille": 1000, "together": "r9-ffff"},
            },
        },
    }  # fmt: skip
    pair.fleet.repository.assign(json.dumps(said).encode())
    restarted = Fleet(pair.fleet.folder, pair.fleet.config, clock)
    signed = restarted.assignment.signed()
    assert (signed.teams, signed.models["eye"].rollout.team) == ({"r9-ffff": {"arm": 2, "eye": 2}}, "r9-ffff")
    restarted.recover()
    assert restarted.assignment.signed().version > 99
    assert [(one.model, one.release) for one in restarted.views.models()] == [("arm", 2), ("eye", 1)]
    restarted.close()


# -- exclusions ---------------------------------------------------------------------------------------------------------------------


def refuse(pair, *names, release=2, reason="golden_mismatch", outcome=Outcome.REFUSED):
    for name in names:
        pair.say(name, "arm", 1, outcome, reason=reason, answered=release)


def test_three_devices_of_a_class_exclude_it_from_a_release(pair):
    rollout = pair.start("arm", 2, at_once=True)
    pair.say("pi-1", "arm", 2)
    refuse(pair, "jetson-1", "jetson-2")
    assert pair.wants("jetson-3", "arm") == 2
    refuse(pair, "jetson-3")

    assert {pair.wants(name, "arm") for name in pair.devices if name.startswith("jetson")} == {1}
    assert pair.wants("pi-1", "arm") == 2
    excluded = pair.get(rollout).exclusions
    assert [(one.hardware, one.count, one.instead) for one in excluded] == [(JETSONS, 3, 1)]
    assert "3 devices quarantined arm:2" in excluded[0].reason
    assert {device.device for device in excluded[0].devices} == {"jetson-1", "jetson-2", "jetson-3"}
    for name in ("pi-1", "pi-2"):
        pair.say(name, "arm", 2)
    assert pair.state(rollout) == "completed", "it goes on for the others, and those left out do not count any more"
    assert pair.wants("jetson-4", "arm") == 1, "also when every other device runs it"
    assert pair.wants("pi-1", "arm") == 2


def test_devices_of_different_classes_do_not_add_up(pair):
    pair.start("arm", 2, at_once=True)
    pair.say("pi-2", "arm", 2)
    refuse(pair, "jetson-1", "pi-1")
    assert pair.assignment.models["arm"].excluded == ()


@pytest.mark.parametrize("reason", ["operator", "cannot_report", "together", "no_space"])
def test_what_is_not_the_releases_fault_does_not_count(pair, reason):
    pair.start("arm", 2, at_once=True)
    pair.say("pi-1", "arm", 2)
    refuse(pair, "jetson-1", "jetson-2", "jetson-3", reason=reason, outcome=Outcome.ROLLED_BACK)
    assert pair.assignment.models["arm"].excluded == ()


def test_with_no_failures_allowed_the_first_one_still_ends_it(pair):
    rollout = pair.start("arm", 2, max_failures=0, at_once=True)
    refuse(pair, "jetson-1")
    assert pair.state(rollout) == "aborted"


def test_more_failures_than_allowed_end_it_for_everybody(pair):
    rollout = pair.start("arm", 2, max_failures=2, at_once=True)
    pair.say("pi-1", "arm", 2)
    refuse(pair, "jetson-1", "jetson-2", "jetson-3")
    assert pair.state(rollout) == "aborted"
    assert pair.get(rollout).exclusions == ()


def test_a_wave_in_which_no_device_is_left_ends_the_rollout(pair):
    pair.join("jetson-5", groups=["jetsons"])
    pair.say("jetson-5", "arm", 1)
    for name in ("jetson-1", "jetson-2", "jetson-3"):
        pair.fleet.inventory.set_groups(SERVER, name, ["jetsons"])
    rollout = pair.start("arm", 2, groups=["jetsons"])
    refuse(pair, "jetson-1", "jetson-2", "jetson-3")

    assert pair.state(rollout) == "aborted", "the kinds that it was not tried on do not get it untried"
    assert "3 refused it" in pair.get(rollout).reason
    assert pair.get(rollout).exclusions == ()


def test_a_wave_whose_last_kind_of_hardware_is_excluded_ends_the_rollout(pair):
    for name in ("jetson-1", "jetson-2", "jetson-3", "jetson-4"):
        pair.fleet.inventory.set_groups(SERVER, name, ["jetsons"])
    pair.fleet.inventory.set_groups(SERVER, "pi-1", ["jetsons"])
    rollout = pair.start("arm", 2, groups=["jetsons"], at_once=True, confirm=True)
    pair.say("pi-1", "arm", 2)
    refuse(pair, "jetson-1", "jetson-2", "jetson-3")
    assert pair.get(rollout).exclusions[0].hardware == JETSONS
    pair.fleet.inventory.set_groups(SERVER, "pi-1", [])
    pair.fleet.judge.evaluate()
    assert pair.state(rollout) == "aborted", "the kinds that it was not tried on do not get it untried"
    assert "every kind of hardware in the wave" in pair.get(rollout).reason


def test_an_operator_ends_an_exclusion_once_and_for_all(pair):
    rollout = pair.start("arm", 2, at_once=True)
    pair.say("pi-1", "arm", 2)
    refuse(pair, "jetson-1", "jetson-2", "jetson-3")
    pair.say("pi-2", "arm", 2)
    [one] = pair.fleet.views.exclusions(model="arm")
    ended = pair.fleet.rollouts.end_exclusion(SERVER, one.id)
    assert ended.ended_by == SERVER.name
    assert pair.wants("jetson-4", "arm") == 2
    pair.say("jetson-4", "arm", 2)
    assert pair.wants("jetson-4", "arm") == 2, "the same refusals do not exclude the class again"
    with pytest.raises(Conflict, match="ended already"):
        pair.fleet.rollouts.end_exclusion(SERVER, one.id)
    with pytest.raises(NotFound):
        pair.fleet.rollouts.end_exclusion(SERVER, 99)
    assert pair.get(rollout).exclusions[0].ended is not None


def test_a_class_that_may_not_run_one_of_a_team_runs_none_of_it(pair):
    pair.start_both(2, at_once=True)
    for model in ("arm", "eye"):
        pair.say("pi-1", model, 2)
    refuse(pair, "jetson-1", "jetson-2", "jetson-3")
    assert (pair.wants("jetson-4", "arm"), pair.wants("jetson-4", "eye")) == (1, 1)
    assert (pair.wants("pi-1", "arm"), pair.wants("pi-1", "eye")) == (2, 2)


def test_devices_that_were_away_exclude_their_class_after_its_end(pair):
    pair.start("arm", 2)
    pair.all_run("arm", 2)
    refuse(pair, "jetson-1", "jetson-2", "jetson-3")
    pair.clock.now += 61
    pair.fleet.judge.evaluate()
    assert {pair.wants(name, "arm") for name in pair.devices if name.startswith("jetson")} == {1}
    assert pair.wants("pi-1", "arm") == 2


@pytest.mark.parametrize("settings", [RolloutSettings(exclude_share=0.5)])
def test_a_few_devices_do_not_speak_for_a_class_that_runs_it_well(pair):
    well = ["jetson-5", "jetson-6", "jetson-7", "jetson-8"]
    pair.join(*well)
    for name in well:
        pair.say(name, "arm", 1)
    pair.start("arm", 2, at_once=True)
    pair.say("pi-1", "arm", 2)
    for name in well:
        pair.say(name, "arm", 2)
    refuse(pair, "jetson-1", "jetson-2", "jetson-3")
    assert pair.assignment.models["arm"].excluded == (), "3 of 7 are less than half"

    refuse(pair, "jetson-4")
    assert [one.hardware for one in pair.assignment.models["arm"].excluded] == [JETSONS], "4 of 8 are not"


def test_a_later_release_is_another_matter(pair):
    pair.start("arm", 2, at_once=True)
    pair.say("pi-1", "arm", 2)
    refuse(pair, "jetson-1", "jetson-2", "jetson-3")
    pair.say("pi-2", "arm", 2)
    pair.start("arm", 3, at_once=True)
    assert {pair.wants(name, "arm") for name in pair.devices} == {3}


# -- leases ------------------------------------------------------------------------------------------------------------------------


def test_the_timestamp_is_signed_often_enough_for_the_shortest_lease(pair):
    assignment, repository = pair.fleet.assignment, pair.fleet.repository
    assert assignment.shortest_lease_s() is None
    pair.publish(4, models=("arm",), lease_s=3600.0)
    pair.start("arm", 4)
    assert assignment.shortest_lease_s() == 3600.0
    repository.renew(oldest_s=900.0)
    assert repository.renew(oldest_s=900.0) == []
    pair.clock.now += 901
    assert repository.renew(oldest_s=900.0) == ["timestamp"]
    assert repository.renew() == []
