"""Rollouts against the database and the signed assignment, in this process: what the fleet is told after every turn."""

import contextlib
import errno
import itertools
import sqlite3

import msgspec
import pytest

from agent.contract.assignment import EVERYONE, Assignment, reaches, slot, wanted
from agent.contract.codec import decode, encode
from agent.contract.names import ReleaseRef
from agent.contract.reports import Answer, ModelState, Outcome, Phase, Presence
from fleet_server.access import SERVER
from fleet_server.errors import Conflict, Invalid, NotFound, Refused
from fleet_server.releases import keys, publisher
from fleet_server.rollouts import rows, wording
from fleet_server.rollouts.gates import Counts
from fleet_server.rollouts.views import ModelView
from tests.fleet.stand import sha256, simple_manifest
from tests.fleet.test_intake import Known


class Story:
    """A fleet with published releases and devices that answer as told."""

    def __init__(self, fleet, clock):
        self.fleet, self.clock = fleet, clock
        self.devices, self.counters, self.pokes = {}, {}, []
        fleet.assignment.poker = self

    def poke_all(self, version):
        self.pokes.append(version)

    def publish(self, *versions):
        for version in versions:
            data = f"digits {version}".encode()
            (self.fleet.folder.blobs / sha256(data)).write_bytes(data)
            role = self.fleet.repository.releases()
            manifest = simple_manifest("digits", version, data)
            self.fleet.catalogue.publish(
                SERVER, *publisher.add(role, manifest, keys.load(self.fleet.releases_key), self.clock())
            )

    def join(self, *names, groups=(), online=True):
        for name in names:
            self.devices[name] = Known(self.fleet, name)
            self.counters[name] = 0
            if groups:
                self.fleet.inventory.set_groups(SERVER, name, list(groups))
            if online:
                self.devices[name].say("presence", Presence(device=name, session=1, online=True))

    def say(self, name, version, outcome=None, *, phase=Phase.STEADY, sha=None, reason=None, answered=None):
        """The device reports to serve `version` with this last answer (to `answered`, or to `version`)."""
        self.counters[name] += 1
        self.clock.now += 1
        answers = (
            () if outcome is None else (Answer(release=answered or version, outcome=outcome, at=self.clock(), reason=reason),)
        )
        state = ModelState(
            serving=version, sha256=sha or sha256(f"digits {version}".encode()), variant="cpu", phase=phase, answers=answers
        )  # fmt: skip
        device = self.devices[name]
        changes = device.state(device.report(self.counters[name], models={"digits": state}))
        self.fleet.judge.evaluate(changes.models)

    def commits(self, *names, version):
        for name in names:
            self.say(name, version, Outcome.COMMITTED)

    def start(self, version, **options):
        return self.fleet.rollouts.start(SERVER, ReleaseRef("digits", version), **options).id

    def state(self, rollout):
        return self.fleet.views.rollout(rollout).state

    @property
    def assignment(self):
        return decode(self.fleet.repository.assignment_bytes(), Assignment, limit_bytes=1 << 20)

    def wanted(self, name):
        model = self.assignment.models.get("digits")
        return model and wanted(model, name, self.fleet.inventory.get(name).groups).release


@pytest.fixture
def story(fleet, clock):
    made = Story(fleet, clock)
    made.publish(1, 2, 3)
    made.join("canary-1", groups=["canary"])
    made.join("plain-1", "plain-2")
    return made


def completed(story, version):
    rollout = story.start(version)
    story.commits("canary-1", "plain-1", "plain-2", version=version)
    assert story.state(rollout) == "completed"
    return rollout


def test_a_rollout_in_mode_shadow_installs_nothing(story):
    completed(story, 1)
    rollout = story.start(2, mode="shadow", groups=["canary"])
    assert story.assignment.models["digits"].rollout.mode == "shadow"
    story.say("canary-1", 1, Outcome.SHADOWED, phase=Phase.SHADOWING, answered=2)
    assert story.fleet.views.rollout(rollout).wave == 1, "the first wave passed"
    for name in ("plain-1", "plain-2"):
        story.say(name, 1, Outcome.SHADOWED, phase=Phase.SHADOWING, answered=2)

    assert story.state(rollout) == "completed"
    assert {story.wanted(name) for name in story.devices} == {1}
    assert story.fleet.views.models() == [ModelView("digits", 1, None)]
    with pytest.raises(Conflict, match="no earlier release"):
        story.fleet.rollouts.roll_back(SERVER, "digits", 2)

    installed = story.start(2)
    assert story.state(installed) == "running", "a good look is not an installation"
    story.commits("canary-1", "plain-1", "plain-2", version=2)
    assert story.state(installed) == "completed"


def test_there_is_nothing_to_look_at_a_first_release_with(story):
    with pytest.raises(Conflict, match="no release of digits serves yet"):
        story.start(1, mode="shadow")


def test_one_bad_look_ends_a_rollout_in_mode_shadow(story):
    completed(story, 1)
    rollout = story.start(2, mode="shadow", max_failures=0)
    story.say("plain-1", 1, Outcome.REFUSED, reason="shadow_disagrees", answered=2)
    assert story.state(rollout) == "aborted"
    assert {story.wanted(name) for name in story.devices} == {1}


def test_a_team_cannot_be_rolled_out_in_mode_shadow(story):
    with pytest.raises(Invalid, match="mode shadow"):
        story.start(2, mode="shadow", team=[ReleaseRef("other", 1)])


def test_the_first_rollout_goes_to_everyone_and_completes(story):
    rollout = story.start(1)
    assert story.state(rollout) == "running"
    assert {story.wanted(d) for d in story.devices} == {1}
    assert story.assignment.models["digits"].rollout.previous is None
    story.commits("canary-1", "plain-1", version=1)
    assert story.state(rollout) == "running"
    story.commits("plain-2", version=1)
    assert story.state(rollout) == "completed"
    assert story.assignment.models["digits"].release == 1
    assert story.assignment.models["digits"].rollout is None


def test_waves(story):
    completed(story, 1)
    rollout = story.start(2, groups=["canary"])
    assert [story.wanted(d) for d in sorted(story.devices)] == [2, 1, 1]
    story.say("canary-1", 2, phase=Phase.WATCHING)
    assert story.fleet.views.rollout(rollout).wave == 0
    story.commits("canary-1", version=2)
    assert story.fleet.views.rollout(rollout).wave == 1
    assert {story.wanted(d) for d in story.devices} == {2}
    story.commits("plain-1", "plain-2", version=2)
    assert story.state(rollout) == "completed"
    assert story.assignment.models["digits"].release == 2


def test_waiting_for_confirmation_and_promote(story):
    completed(story, 1)
    rollout = story.start(2, groups=["canary"], confirm=True)
    with pytest.raises(Conflict):
        story.fleet.rollouts.promote(SERVER, rollout)
    story.commits("canary-1", version=2)
    assert story.state(rollout) == "waiting"
    assert story.wanted("plain-1") == 1
    story.fleet.rollouts.promote(SERVER, rollout)
    assert story.wanted("plain-1") == 2
    story.commits("plain-1", "plain-2", version=2)
    assert story.state(rollout) == "completed"


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.ROLLED_BACK])
def test_a_failure_takes_everybody_back(story, outcome):
    completed(story, 1)
    before = story.assignment.version
    rollout = story.start(2, groups=["canary"])
    story.say("canary-1", 1, outcome, answered=2, reason="golden_mismatch")
    found = story.fleet.views.rollout(rollout)
    assert found.state == "aborted"
    assert found.verdicts[-1].verdict == "fail"
    assert found.verdicts[-1].evidence[0].reason == "golden_mismatch"
    assert {story.wanted(d) for d in story.devices} == {1}
    assert story.assignment.version == before + 2
    assert story.pokes[-1] == story.assignment.version
    assert story.fleet.journal.events()[-1].name == "rollout_aborted"


def test_failures_that_are_allowed(story):
    completed(story, 1)
    rollout = story.start(2, max_failures=1)
    story.say("plain-1", 1, Outcome.ROLLED_BACK, answered=2)
    story.commits("canary-1", "plain-2", version=2)
    assert story.state(rollout) == "completed"


def test_a_device_that_could_not_fetch_stops_nothing_and_passes_nothing(story):
    rollout = story.start(1)
    story.commits("canary-1", "plain-1", version=1)
    story.say("plain-2", None, Outcome.FAILED, answered=1, sha="0" * 64)
    assert story.state(rollout) == "running"
    story.say("plain-2", 1, Outcome.COMMITTED)
    assert story.state(rollout) == "completed"


def test_offline_devices_do_not_keep_a_wave_waiting(story, clock):
    story.join("away", online=False)
    rollout = story.start(1)
    story.commits("canary-1", "plain-1", version=1)
    assert story.state(rollout) == "running"
    story.devices["plain-2"].say("presence", Presence(device="plain-2", session=1, online=False))
    story.fleet.judge.evaluate()
    found = story.fleet.views.rollout(rollout)
    assert found.state == "completed"
    assert (found.verdict.counts.offline, found.verdict.counts.lost) == (1, 1)


def test_a_wave_most_of_which_fell_silent_does_not_pass_until_they_are_back(story, clock):
    rollout = story.start(1)
    story.commits("canary-1", version=1)
    clock.now += story.fleet.config.rollouts.silence_s
    story.commits("canary-1", version=1)
    found = story.fleet.views.rollout(rollout)
    assert (found.state, found.verdict.verdict, found.verdict.counts.lost) == ("running", "stall", 2)
    assert "2 fell silent after they were told" in found.verdict.why
    assert [one.name for one in story.fleet.journal.events(limit=1000)].count("rollout_stalled") == 1
    assert story.fleet.views.stalled() == [(rollout, found.verdict.why)]
    assert any(f"rollout {rollout} does not go on by itself" in text for text in story.fleet.status.view().warnings)
    story.fleet.judge.ledgers.keep(())  # as after a restart
    story.fleet.judge.evaluate()
    assert story.fleet.views.rollout(rollout).verdict.counts.lost == 2, "it is written down who was told"
    story.commits("plain-1", version=1)
    assert story.state(rollout) == "completed"
    assert story.fleet.views.stalled() == []


def test_a_device_that_was_away_and_is_told_when_it_comes_counts_from_then_on(story, clock):
    story.join("away", online=False)
    rollout = story.start(1, groups=["canary"], confirm=True)
    story.fleet.inventory.set_groups(SERVER, "away", ["canary"])
    assert story.fleet.views.rollout(rollout).verdict.counts == Counts(told=1, offline=1, not_reached=2)
    story.devices["away"].say("presence", Presence(device="away", session=2, online=True))
    story.fleet.judge.evaluate()
    assert story.fleet.views.rollout(rollout).verdict.counts == Counts(told=2, not_reached=2)
    story.devices["away"].say("presence", Presence(device="away", session=2, online=False))
    story.fleet.judge.evaluate()
    assert story.fleet.views.rollout(rollout).verdict.counts == Counts(told=1, lost=1, not_reached=2)


def test_a_device_that_is_held_is_not_waited_for(story):
    rollout = story.start(1)
    story.commits("canary-1", "plain-1", version=1)
    story.counters["plain-2"] += 1
    held = ModelState(serving=None, sha256=None, phase=Phase.STEADY, held=True)
    device = story.devices["plain-2"]
    story.fleet.judge.evaluate(device.state(device.report(story.counters["plain-2"], models={"digits": held})).models)
    found = story.fleet.views.rollout(rollout)
    assert (found.state, found.verdict.counts) == ("completed", Counts(committed=2, held=1))


def test_a_device_without_room_is_waited_for_as_long_as_a_device_may_take(story, clock):
    rollout = story.start(1, time_limit_s=3600)
    story.commits("canary-1", "plain-1", version=1)
    for _ in range(29):
        clock.now += 118
        story.say("plain-2", None, Outcome.FAILED, answered=1, sha="0" * 64)
        story.commits("canary-1", "plain-1", version=1)
    assert story.fleet.views.rollout(rollout).verdict.counts == Counts(committed=2, failed=1)
    clock.now += 100
    story.fleet.judge.evaluate()
    found = story.fleet.views.rollout(rollout)
    assert (found.state, found.verdict.counts) == ("completed", Counts(committed=2, timed_out=1))


def test_a_rollout_with_a_window_gives_a_week_more(story):
    assert rules(story, story.start(1, window="sat 01:00-04:00")).time_limit_s == 8 * 86400
    story.fleet.rollouts.abort(SERVER, story.fleet.views.rollouts()[0].id)
    assert rules(story, story.start(1, window="sat 01:00-04:00", time_limit_s=60)).time_limit_s == 60


def rules(story, rollout):
    with story.fleet.database.reading() as session:
        return rows.rules_of(rows.find(session, rollout))


def test_a_device_that_is_skipped_counts_no_more_until_it_is_not(story):
    rollout = story.start(1, max_failures=0)
    story.commits("canary-1", version=1)
    story.fleet.rollouts.skip(SERVER, rollout, "plain-1")
    story.say("plain-1", None, Outcome.REFUSED, answered=1, sha="0" * 64)
    assert story.fleet.views.rollout(rollout).verdict.counts == Counts(committed=1, skipped=1, told=1)
    with pytest.raises(Conflict, match="skipped already"):
        story.fleet.rollouts.skip(SERVER, rollout, "plain-1")
    with pytest.raises(NotFound, match="no device 'nobody'"):
        story.fleet.rollouts.skip(SERVER, rollout, "nobody")
    with pytest.raises(Conflict, match="is not skipped"):
        story.fleet.rollouts.unskip(SERVER, rollout, "plain-2")
    story.fleet.rollouts.unskip(SERVER, rollout, "plain-1")
    assert story.state(rollout) == "aborted", "its refusal counts again"
    with pytest.raises(Conflict, match="nobody is waited for"):
        story.fleet.rollouts.skip(SERVER, rollout, "plain-2")
    assert [one.action for one in story.fleet.journal.audited(limit=10)][:2] == ["rollout.unskip", "rollout.skip"]


def test_what_a_wave_must_keep_is_what_was_said_when_the_rollout_began(story):
    rollout = story.start(1, min_share=1.0)
    story.fleet.judge.rules = msgspec.structs.replace(story.fleet.judge.rules, min_share=0.1)
    story.commits("canary-1", "plain-1", version=1)
    story.devices["plain-2"].say("presence", Presence(device="plain-2", session=1, online=False))
    story.fleet.judge.evaluate()
    found = story.fleet.views.rollout(rollout)
    assert (found.verdict.verdict, found.verdict.why) == (
        "stall", "2 committed; 1 fell silent after they were told; at least 100% of 3 needed"
    )  # fmt: skip
    with pytest.raises(Invalid, match="min_share"):
        story.start(2, min_share=1.5)


def test_devices_that_nobody_could_hear_are_not_silent(story, clock):
    """The server or its broker was away: that says nothing about the devices, and must not let a wave pass."""
    rollout = story.start(1)
    story.commits("canary-1", version=1)
    clock.now += 10 * story.fleet.config.rollouts.silence_s
    story.fleet.inventory.heard_since = lambda: clock.now - 1
    story.fleet.judge.evaluate()
    found = story.fleet.views.rollout(rollout)
    assert (found.state, found.verdict.counts.lost, found.verdict.counts.told) == ("running", 0, 2)
    since = clock.now
    story.fleet.inventory.heard_since = lambda: since
    clock.now += story.fleet.config.rollouts.silence_s + 1
    story.fleet.judge.evaluate()
    assert story.fleet.views.rollout(rollout).verdict.counts.lost == 3 - 1


def test_nobody_there_is_no_pass(story):
    story.join("away", groups=["shop"], online=False)
    rollout = story.start(1, groups=["shop"])
    story.fleet.judge.evaluate()
    assert story.state(rollout) == "running"
    story.fleet.inventory.set_groups(SERVER, "plain-1", ["shop"])
    story.commits("plain-1", version=1)
    assert story.fleet.views.rollout(rollout).wave == 1


@pytest.mark.parametrize("asked", [{"groups": ["canari"]}, {"waves": ["1", "canari", "50%"]}])
def test_a_wave_that_reaches_nobody_is_refused(story, asked):
    with pytest.raises(
        Invalid, match="no device is in the group 'canari', so a wave would reach nobody; groups with devices: canary"
    ):
        story.start(1, **asked)
    assert story.fleet.views.rollouts() == []


def test_a_share_of_a_few_devices_is_one_of_them(story):
    rollout = story.start(1, permille=1, confirm=True)
    assert sum(story.wanted(name) == 1 for name in story.devices) == 1
    assert story.fleet.views.rollout(rollout).verdict.counts.total == 1


def test_any_number_of_waves(story):
    story.join(*(f"more-{n}" for n in range(17)))
    rollout = story.start(1, waves=["1", "canary", "25%"], at_once=True)
    reached = []
    while story.state(rollout) == "running":
        reached.append([name for name in story.devices if story.wanted(name) == 1])
        story.commits(*reached[-1], version=1)
    assert len(reached[0]) == 1
    assert len(reached) == 4
    assert set(reached[1]) == {*reached[0], "canary-1"}
    assert len(reached[3]) == 20
    assert all(set(before) <= set(after) for before, after in itertools.pairwise(reached))
    assert [wording.reach(wave) for wave in story.fleet.views.rollout(rollout).waves][:2] == ["one device", "group canary"]


def test_all_waves_or_the_first_one(story):
    with pytest.raises(Invalid, match="not both"):
        story.start(1, waves=["1"], groups=["canary"])


def test_the_right_version_with_other_bytes_is_no_success(story):
    rollout = story.start(1)
    story.say("canary-1", 1, Outcome.COMMITTED, sha="f" * 64)
    story.commits("plain-1", "plain-2", version=1)
    assert story.state(rollout) == "running"


def test_devices_that_serve_it_already_count(story):
    for name in story.devices:
        story.say(name, 1)
    assert story.state(story.start(1, groups=["canary"])) == "completed"


def test_an_old_answer_of_a_device_that_remembers_counts(story):
    """A device that quarantined the release does not try again: the rollout ends at once instead of waiting for ever."""
    story.say("canary-1", None, Outcome.REFUSED, answered=1, sha="0" * 64)
    assert story.state(story.start(1, max_failures=0)) == "aborted"


def test_pause_and_resume(story):
    completed(story, 1)
    rollout = story.start(2, groups=["canary"])
    story.fleet.rollouts.pause(SERVER, rollout)
    story.commits("canary-1", version=2)
    assert (story.state(rollout), story.wanted("plain-1")) == ("paused", 1)
    story.fleet.rollouts.resume(SERVER, rollout)
    assert (story.state(rollout), story.wanted("plain-1")) == ("running", 2)


def test_a_pause_does_not_protect_a_bad_release(story):
    completed(story, 1)
    rollout = story.start(2, groups=["canary"])
    story.fleet.rollouts.pause(SERVER, rollout)
    story.say("canary-1", 1, Outcome.ROLLED_BACK, answered=2)
    assert (story.state(rollout), story.wanted("canary-1")) == ("aborted", 1)


def test_abort(story):
    completed(story, 1)
    rollout = story.start(2)
    story.fleet.rollouts.abort(SERVER, rollout)
    assert {story.wanted(d) for d in story.devices} == {1}
    with pytest.raises(Conflict):
        story.fleet.rollouts.abort(SERVER, rollout)


def test_percent(story):
    completed(story, 1)
    rollout = story.start(2, permille=500)
    for name in story.devices:
        assert story.wanted(name) == (2 if slot(rollout, name) < 500 else 1)


def test_what_cannot_be_started(story):
    with pytest.raises(NotFound):
        story.start(9)
    completed(story, 1)
    with pytest.raises(Conflict, match="already"):
        story.start(1)
    story.start(2, groups=["canary"])
    with pytest.raises(Conflict, match="running"):
        story.start(3)
    with pytest.raises(Invalid):
        story.start(3, groups=["../x"])


# -- roll back, withdraw -------------------------------------------------------------------------------------------------------


def test_roll_back(story):
    completed(story, 1)
    with pytest.raises(Conflict, match="--to"):
        story.fleet.rollouts.roll_back(SERVER, "digits", None)
    completed(story, 2)
    story.fleet.rollouts.roll_back(SERVER, "digits", None)
    assert {story.wanted(d) for d in story.devices} == {1}
    with pytest.raises(Conflict, match="--to 2 --forward"):
        story.fleet.rollouts.roll_back(SERVER, "digits", 2)
    assert {story.wanted(d) for d in story.devices} == {1}
    story.fleet.rollouts.roll_back(SERVER, "digits", 2, forward=True)
    assert {story.wanted(d) for d in story.devices} == {2}
    with pytest.raises(NotFound):
        story.fleet.rollouts.roll_back(SERVER, "digits", 77)
    with pytest.raises(NotFound):
        story.fleet.rollouts.roll_back(SERVER, "other", None)


def test_rolling_back_twice_does_not_come_back_to_the_bad_release(story):
    """An impatient operator, or a request that is sent again because its answer was lost."""
    completed(story, 1)
    completed(story, 2)
    completed(story, 3)
    story.fleet.rollouts.roll_back(SERVER, "digits", None)
    assert story.wanted("plain-1") == 2
    story.fleet.rollouts.roll_back(SERVER, "digits", None)
    assert story.wanted("plain-1") == 1
    with pytest.raises(Conflict, match="no earlier release"):
        story.fleet.rollouts.roll_back(SERVER, "digits", None)
    assert story.wanted("plain-1") == 1


def test_withdrawing_after_a_roll_back_does_not_come_back_to_the_bad_release(story):
    completed(story, 1)
    completed(story, 2)
    completed(story, 3)
    story.fleet.rollouts.roll_back(SERVER, "digits", None)
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 2))
    assert {story.wanted(d) for d in story.devices} == {1}


def test_a_roll_back_never_goes_to_what_no_gate_has_passed(story):
    completed(story, 1)
    with pytest.raises(Conflict, match="rollout start"):
        story.fleet.rollouts.roll_back(SERVER, "digits", 2)
    rollout = story.start(2, groups=["canary"])
    with pytest.raises(Conflict, match="rollout start"):
        story.fleet.rollouts.roll_back(SERVER, "digits", 2)
    assert story.state(rollout) == "running"
    assert {story.wanted(d) for d in ("plain-1", "plain-2")} == {1}


def test_roll_back_ends_a_rollout(story):
    completed(story, 1)
    rollout = story.start(2)
    story.fleet.rollouts.roll_back(SERVER, "digits", None)
    assert story.state(rollout) == "aborted"
    assert {story.wanted(d) for d in story.devices} == {1}


def test_withdraw_what_everybody_runs(story):
    completed(story, 1)
    completed(story, 2)
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 2))
    assert {story.wanted(d) for d in story.devices} == {1}
    assert story.assignment.models["digits"].withdrawn == (2,)
    with pytest.raises(Conflict):
        story.start(2)
    with pytest.raises(Conflict):
        story.fleet.rollouts.roll_back(SERVER, "digits", 2)


def test_withdraw_what_is_being_rolled_out(story):
    completed(story, 1)
    rollout = story.start(2)
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 2))
    assert (story.state(rollout), story.wanted("plain-1")) == ("aborted", 1)


def test_withdraw_the_only_one(story):
    completed(story, 1)
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 1))
    assert {story.wanted(d) for d in story.devices} == {None}


# -- a server that dies in between ---------------------------------------------------------------------------------------------


def test_a_decision_that_was_not_signed_is_signed_at_the_next_start(story, monkeypatch):
    completed(story, 1)
    signed = story.assignment.version
    with monkeypatch.context() as patched:
        patched.setattr(story.fleet.repository, "assign", _dies)
        with pytest.raises(KeyboardInterrupt):
            story.start(2)
    assert story.assignment.version == signed
    story.fleet.recover()
    assert story.assignment.version == signed + 1
    assert {story.wanted(d) for d in story.devices} == {2}


def test_a_decision_that_could_not_be_signed_is_signed_when_the_disk_has_space_again(story, monkeypatch):
    completed(story, 1)
    signed = story.assignment.version
    with monkeypatch.context() as patched:
        patched.setattr(story.fleet.repository, "assign", _no_space)
        with pytest.raises(OSError, match="No space"):
            story.start(2)
    assert story.assignment.version == signed
    story.fleet.judge.evaluate()  # the tick
    assert {story.wanted(d) for d in story.devices} == {2}
    assert story.pokes[-1] == story.assignment.version


def _no_space(_document):
    raise OSError(errno.ENOSPC, "No space left on device")


def _dies(_document):
    raise KeyboardInterrupt


@pytest.mark.sqlite
def test_a_database_from_a_backup_catches_up_with_what_is_signed(story, clock):
    completed(story, 1)
    backup = story.fleet.folder.root / "backup"
    with (
        contextlib.closing(sqlite3.connect(story.fleet.folder.database)) as now,
        contextlib.closing(sqlite3.connect(backup)) as kept,
    ):
        now.backup(kept)
    completed(story, 2)
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 1))
    lost = story.start(3, groups=["canary"])
    signed = story.assignment
    with (
        contextlib.closing(sqlite3.connect(backup)) as kept,
        contextlib.closing(sqlite3.connect(story.fleet.folder.database)) as now,
    ):
        kept.backup(now)
    story.fleet.recover()
    assert story.assignment.version > signed.version
    assert {story.wanted(d) for d in story.devices} == {2}
    assert story.assignment.models["digits"].withdrawn == (1,)
    with pytest.raises(NotFound):
        story.fleet.views.rollout(lost)
    story.start(3)
    assert {story.wanted(d) for d in story.devices} == {3}, "decisions reach devices again"
    assert not story.fleet.assignment.catch_up()


def test_versions_only_grow_and_unchanged_is_not_signed_again(story):
    story.start(1)
    version = story.assignment.version
    story.fleet.assignment.publish()
    story.fleet.recover()
    assert story.assignment.version == version
    assert story.pokes == sorted(set(story.pokes))


def test_size_does_not_grow_with_devices(story):
    story.start(1, groups=["canary"])
    small = len(encode(story.assignment))
    story.join(*(f"more-{n}" for n in range(20)))
    story.fleet.judge.evaluate()
    assert len(encode(story.assignment)) == small


def test_server_and_device_agree_on_who_is_reached(story):
    completed(story, 1)
    rollout = story.start(2, groups=["canary"], permille=300)
    told = story.assignment.models["digits"].rollout
    facts = {w.device for w in story.fleet.views.rollout(rollout).verdict.evidence}
    assert facts == {d for d in story.devices if reaches(told, d, story.fleet.inventory.get(d).groups)}
    assert EVERYONE == 1000


# -- renewal -------------------------------------------------------------------------------------------------------------------


def test_online_metadata_is_renewed_before_it_ends(story, clock):
    first = story.fleet.repository.expirations()
    assert story.fleet.repository.renew() == []
    clock.now += 0.6 * 86400
    assert story.fleet.repository.renew() == ["timestamp"]
    clock.now += 3.5 * 86400
    assert "assignments" in story.fleet.repository.renew()
    second = story.fleet.repository.expirations()
    assert all(second[role] > first[role] for role in ("assignments", "snapshot", "timestamp"))
    story.fleet.repository.check()


def test_old_versions_are_removed_but_not_those_in_use(story):
    for _ in range(40):
        story.fleet.repository.assign(story.fleet.repository.assignment_bytes())
    names = [p.name for p in story.fleet.folder.metadata.glob("*.snapshot.json")]
    assert 2 <= len(names) <= 20
    story.fleet.repository.check()
    story.fleet.catalogue.get(ReleaseRef("digits", 1))


def test_offline_metadata_is_renewed_with_the_offline_keys(story, clock):
    folder = story.fleet.releases_key.parent
    root, releases = keys.load(folder / "root.key"), keys.load(folder / "releases.key")
    clock.now += 340 * 86400
    story.fleet.repository.renew()
    assert {w.split()[1] for w in story.fleet.status.view().warnings if "metadata" in w} == {"root", "targets", "releases"}
    with pytest.raises(Refused):
        story.fleet.key_changes.renew_offline(releases, None)
    with pytest.raises(Refused):
        story.fleet.key_changes.renew_offline(root, root)
    assert story.fleet.key_changes.renew_offline(root, releases) == ["root", "targets", "releases"]
    assert [w for w in story.fleet.status.view().warnings if "metadata" in w] == []
    story.fleet.repository.check()
    story.publish(4)
    assert story.fleet.repository.documents.read("metadata/2.root.json") is not None
