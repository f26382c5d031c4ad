"""Rollouts to a part of the fleet: they end at their scope, a part may stay on its own release, and two never have a device in common."""

import pytest

from agent.contract.assignment import slot, wanted
from agent.contract.names import ReleaseRef
from agent.contract.reports import Outcome, Presence
from agent.contract.scopes import scope_of
from fleet_server.access import SERVER
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.rollouts.machine import Wave, resolved
from fleet_server.rollouts.planning import Drawn, spread
from fleet_server.simulation.news import record_in
from tests.fleet.test_rollouts import Story, completed


class Scoped(Story):
    def wanted(self, name):
        model, record = self.assignment.models.get("digits"), record_in(self.fleet.inventory.record(name))
        return model and wanted(model, name, record.groups, labels=record.labels).release

    def runs(self):
        return {name: self.wanted(name) for name in self.devices}

    def to(self, version, *scope, **options):
        return self.start(version, scope=scope_of(scope), **options)

    def back(self, to=None, *, scope=(), **options):
        return self.fleet.rollouts.roll_back(SERVER, "digits", to, scope=scope_of(scope), **options)


@pytest.fixture
def story(fleet, clock):
    made = Scoped(fleet, clock)
    made.publish(1, 2, 3, 4)
    made.join("canary-1", groups=["canary"])
    made.join("plain-1", "plain-2")
    completed(made, 1)
    return made


def test_a_rollout_ends_at_its_scope_and_the_group_stays_there_for_good(story):
    rollout = story.to(2, "group:canary")
    assert story.runs() == {"canary-1": 2, "plain-1": 1, "plain-2": 1}
    story.commits("canary-1", version=2)
    view = story.fleet.views.rollout(rollout)
    assert (view.state, view.verdict.counts.total) == ("completed", 1)
    assert story.runs() == {"canary-1": 2, "plain-1": 1, "plain-2": 1}

    everyone = story.start(3)
    assert story.runs() == {"canary-1": 2, "plain-1": 3, "plain-2": 3}
    story.commits("plain-1", "plain-2", version=3)
    assert story.state(everyone) == "completed", "the group is not waited for"
    assert story.runs() == {"canary-1": 2, "plain-1": 3, "plain-2": 3}
    assert [(r.release, r.previous) for r in story.fleet.views.models()[0].rules] == [(2, None)]


def test_an_abort_takes_the_scope_back_to_what_the_next_rule_says(story):
    rollout = story.to(2, "group:canary")
    story.fleet.rollouts.abort(SERVER, rollout)
    assert set(story.runs().values()) == {1}
    assert story.assignment.models["digits"].rules == ()
    assert story.assignment.format == 1


def test_waves_are_of_the_devices_in_the_scope(story):
    story.join("kiosk-1", "kiosk-2", "kiosk-3", groups=["kiosk"])
    rollout = story.to(2, "group:kiosk", waves=["1"])
    assert sorted(story.runs().values()) == [1, 1, 1, 1, 1, 2]
    (first,) = [name for name, release in story.runs().items() if release == 2]
    assert first.startswith("kiosk")
    assert story.fleet.views.rollout(rollout).verdict.counts.total == 1


def test_no_draw_is_taken_in_which_the_first_wave_reaches_more_than_it_is_to():
    """Of many draws some have two devices at one slot, or several below a small share."""
    devices = [Drawn(f"d{number}", frozenset(), None, None, there=True) for number in range(3)]
    for wave, most in ((Wave(count=1), 1), (Wave(count=2), 2), (Wave(permille=50), 1), (Wave(permille=500), 2)):
        names = [f"r{number}" for number in range(2000)]
        best = max(names, key=lambda name: spread(name, devices, [wave]))
        first = resolved([wave], [(slot(best, one.id), one.groups) for one in devices])[0]
        assert sum(slot(best, one.id) < first.permille for one in devices) == most


def test_two_rollouts_of_a_model_go_on_at_once_where_nobody_is_in_both(story):
    for device, site in (("plain-1", "berlin"), ("plain-2", "paris")):
        story.fleet.inventory.set_labels(SERVER, device, {"site": site})
    berlin, paris = story.to(2, "label:site=berlin"), story.to(3, "label:site=paris")
    assert story.runs() == {"canary-1": 1, "plain-1": 2, "plain-2": 3}
    story.say("plain-2", 1, Outcome.REFUSED, reason="too_slow", answered=3)
    assert (story.state(berlin), story.state(paris)) == ("running", "aborted")
    story.commits("plain-1", version=2)
    assert story.state(berlin) == "completed"
    assert story.runs() == {"canary-1": 1, "plain-1": 2, "plain-2": 1}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((), ("group:canary",)),
        (("group:canary",), ()),
        (("group:canary",), ("device:canary-1",)),
        (("group:canary",), ("group:canary", "label:site=berlin")),
        (("label:site=berlin",), ("group:canary",)),
    ],
)
def test_scopes_with_a_device_in_common_are_refused_and_the_other_rollout_is_named(story, first, second):
    story.fleet.inventory.set_labels(SERVER, "canary-1", {"site": "berlin"})
    running = story.to(2, *first)
    with pytest.raises(Conflict, match=f"two rollouts of digits: {running} .*rollout abort {running}") as error:
        story.to(3, *second)
    assert error.value.code == "overlap"
    assert len(story.fleet.views.rollouts()) == 2, "nothing of it was written down"


def test_a_group_with_a_rule_of_its_own_and_everyone_else_go_on_at_once(story):
    story.to(2, "group:canary")
    story.commits("canary-1", version=2)
    everyone, canary = story.start(3), story.to(4, "group:canary")
    assert story.runs() == {"canary-1": 4, "plain-1": 3, "plain-2": 3}
    story.fleet.rollouts.abort(SERVER, canary)
    assert story.runs() == {"canary-1": 2, "plain-1": 3, "plain-2": 3}
    assert story.state(everyone) == "running"


def test_a_device_that_moves_between_scopes_follows_the_most_specific_rule(story):
    story.to(2, "group:canary")
    story.commits("canary-1", version=2)
    story.fleet.inventory.set_groups(SERVER, "plain-1", ["canary"])
    assert story.wanted("plain-1") == 2
    story.fleet.inventory.set_labels(SERVER, "plain-1", {"site": "berlin"})
    rollout = story.to(3, "group:canary", "label:site=berlin")
    assert story.runs() == {"canary-1": 2, "plain-1": 3, "plain-2": 1}
    story.fleet.inventory.set_labels(SERVER, "plain-1", {}, ["site"])
    assert story.wanted("plain-1") == 2
    story.fleet.judge.evaluate()
    assert story.fleet.views.rollout(rollout).verdict.counts.total == 0, "who left the scope is not waited for"
    story.fleet.inventory.set_groups(SERVER, "plain-1", [])
    assert story.wanted("plain-1") == 1


def test_a_device_that_joins_or_is_enrolled_again_follows_its_rule(story):
    story.to(2, "group:canary")
    story.commits("canary-1", version=2)
    story.join("late-1", groups=["canary"])
    assert story.wanted("late-1") == 2
    story.fleet.inventory.delete(SERVER, "late-1")
    story.join("late-1")
    assert story.wanted("late-1") == 1


def test_a_device_that_is_deleted_in_the_middle_is_not_waited_for(story):
    story.join("canary-2", groups=["canary"])
    rollout = story.to(2, "group:canary")
    story.commits("canary-1", version=2)
    assert story.state(rollout) == "running"
    story.fleet.inventory.delete(SERVER, "canary-2")
    story.fleet.judge.evaluate()
    assert story.state(rollout) == "completed"


@pytest.mark.parametrize(
    ("scope", "match"),
    [
        (["group:canray"], "no device is in group:canray; devices have: canary"),
        (["label:site=berlin"], "no device is in label:site=berlin"),
        (["class:riscv/-/-"], "no device is in class:riscv/-/-"),
        (["class:riscv/*/-"], "group set GROUP 'class:riscv/"),
        (["device:plain-1,plain-9"], "no device is in device:plain-9"),
        (["group:canary", "device:plain-1"], "none has all"),
    ],
)
def test_a_scope_that_nobody_is_in_is_refused(story, scope, match):
    with pytest.raises(Invalid, match=match) as error:
        story.to(2, *scope)
    assert error.value.code == "nobody"
    with pytest.raises(Invalid, match=match):
        story.fleet.views.preview([ReleaseRef("digits", 2)], (), (), None, scope_of(scope))


def test_a_scope_whose_devices_all_follow_more_specific_rules_is_refused(story):
    story.to(2, "device:canary-1")
    story.commits("canary-1", version=2)
    with pytest.raises(Invalid, match="follows a more specific rule"):
        story.to(3, "group:canary")


def test_a_preview_counts_the_devices_of_the_scope(story):
    (shown,) = story.fleet.views.preview([ReleaseRef("digits", 2)], (), (), None, scope_of(["group:canary"]))
    assert [(wave.reach, wave.devices) for wave in shown.waves] == [("every device in group:canary", 1)]


def test_the_rule_of_a_scope_is_rolled_back_alone_and_never_forward(story):
    for version in (2, 3):
        story.to(version, "group:canary")
        story.commits("canary-1", version=version)
    with pytest.raises(NotFound, match="has no rule for group:plain"):
        story.back(scope=["group:plain"])
    story.back(scope=["group:canary"])
    assert story.runs() == {"canary-1": 2, "plain-1": 1, "plain-2": 1}
    with pytest.raises(Conflict, match="--to 3 --forward"):
        story.back(3, scope=["group:canary"])


def test_a_rule_that_ends_leaves_its_devices_to_the_next_one(story):
    with pytest.raises(NotFound, match="rule list"):
        story.fleet.rollouts.remove_rule(SERVER, "digits", scope_of(["group:canary"]))
    story.to(2, "group:canary")
    story.commits("canary-1", version=2)
    rollout = story.to(3, "group:canary")
    with pytest.raises(Conflict, match=rollout):
        story.fleet.rollouts.remove_rule(SERVER, "digits", scope_of(["group:canary"]))
    story.fleet.rollouts.abort(SERVER, rollout)
    story.fleet.rollouts.remove_rule(SERVER, "digits", scope_of(["group:canary"]))
    assert set(story.runs().values()) == {1}


def test_what_is_withdrawn_is_left_by_rules_too(story):
    story.to(2, "group:canary")
    story.commits("canary-1", version=2)
    rollout = story.to(3, "group:canary")
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 3))
    assert (story.state(rollout), story.wanted("canary-1")) == ("aborted", 2)
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 2))
    assert story.wanted("canary-1") == 1


def test_the_release_of_a_rule_is_not_deleted(story):
    story.to(2, "group:canary")
    story.commits("canary-1", version=2)
    with pytest.raises(Conflict, match="devices in group:canary are assigned it"):
        story.fleet.retention.delete(SERVER, ReleaseRef("digits", 2))


def test_a_rollout_to_a_scope_is_superseded_within_it(story):
    story.join("canary-2", groups=["canary"])
    first = story.to(2, "group:canary")
    story.commits("canary-1", version=2)
    second = story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3), waves=["1"]).id
    assert sorted(story.runs().values()) == [1, 1, 2, 3]
    story.fleet.rollouts.complete(SERVER, second)
    assert story.runs() == {"canary-1": 3, "canary-2": 3, "plain-1": 1, "plain-2": 1}


def test_a_database_that_was_restored_learns_the_rules_from_what_is_signed(story):
    from sqlalchemy import delete

    from fleet_server.storage.models import RolloutRow, RuleRow, Setting

    story.to(2, "group:canary")
    story.commits("canary-1", version=2)
    with story.fleet.database.session() as session:  # as it was before the rollout
        session.execute(delete(RuleRow))
        session.execute(delete(RolloutRow).where(RolloutRow.release == 2))
        session.get_one(Setting, "assignment_version").value = "2"
    story.fleet.recover()
    assert story.runs() == {"canary-1": 2, "plain-1": 1, "plain-2": 1}


def test_a_team_has_no_scope(story):
    with pytest.raises(Invalid, match="a team is for every device"):
        story.to(2, "group:canary", team=[ReleaseRef("other", 1)])


# -- labels --------------------------------------------------------------------------------------------------------------------


def test_labels_stand_in_the_signed_record_and_are_searched_by(story):
    from fleet_server.devices.survey import Filters

    before = record_in(story.fleet.inventory.record("plain-1")).serial
    story.fleet.inventory.set_labels(SERVER, "plain-1", {"site": "berlin", "line": "3"})
    record = record_in(story.fleet.inventory.record("plain-1"))
    assert (record.labels, record.serial) == ({"line": "3", "site": "berlin"}, before + 1)
    story.fleet.inventory.set_labels(SERVER, "plain-1", {"line": "4"}, ["site"])
    assert story.fleet.inventory.get("plain-1").labels == {"line": "4"}
    story.fleet.inventory.set_labels(SERVER, "plain-2", {"line": "5"})
    for label, found in (("line", ["plain-1", "plain-2"]), ("line=4", ["plain-1"]), ("line=9", []), ("site=berlin", [])):
        assert [one.id for one in story.fleet.survey.find(Filters(label=label)).devices] == found
    story.fleet.inventory.delete(SERVER, "plain-1")
    assert [one.id for one in story.fleet.survey.find(Filters(label="line")).devices] == ["plain-2"]


@pytest.mark.parametrize(
    ("given", "taken", "match"),
    [
        ({"si te": "x"}, (), "label name 'si te' is not allowed"),
        ({"site": ""}, (), "value of the label 'site'"),
        ({f"n{number}": "x" for number in range(33)}, (), "at most 32 labels"),
        ({}, ("site",), "has no label 'site'; it has: line=3"),
    ],
)
def test_labels_that_are_not_allowed(story, given, taken, match):
    story.fleet.inventory.set_labels(SERVER, "plain-1", {"line": "3"})
    with pytest.raises(Invalid, match=match):
        story.fleet.inventory.set_labels(SERVER, "plain-1", given, taken)
    assert story.fleet.inventory.get("plain-1").labels == {"line": "3"}


def test_labels_of_a_device_that_is_not_there(story):
    with pytest.raises(NotFound, match="device list"):
        story.fleet.inventory.set_labels(SERVER, "nobody", {"site": "x"})


def test_a_device_without_a_last_word_is_in_its_scope(story):
    story.join("silent-1", groups=["canary"], online=False)
    story.to(2, "group:canary")
    assert story.wanted("silent-1") == 2
    story.devices["silent-1"].say("presence", Presence(device="silent-1", session=1, online=True))
