"""What operators do about a rollout: let a newer release take its place, complete it as it is, have devices try again."""

import pytest

from agent.contract.assignment import MAX_KEPT, DeviceRecord, Retry, wanted
from agent.contract.codec import decode
from agent.contract.names import ReleaseRef
from agent.contract.reports import Answer, ModelState, Outcome, Phase
from fleet_server.access import SERVER
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.simulation.news import record_in
from tests.fleet.stand import sha256
from tests.fleet.test_rollouts import Story, completed


@pytest.fixture
def story(fleet, clock):
    made = Story(fleet, clock)
    made.publish(1, 2, 3)
    made.join("canary-1", groups=["canary"])
    made.join("plain-1", "plain-2")
    return made


def view(story, rollout):
    return story.fleet.views.rollout(rollout)


def standing(story, rollout, device):
    return next(one.standing.value for one in story.fleet.views.devices(rollout).devices if one.device == device)


def record(story, device):
    return record_in(story.fleet.inventory.record(device))


def answers(story, name, version, outcome, *, serving, reason=None, attempt=0, rollout=None):
    """The device answers to `version`, while it serves `serving`."""
    story.counters[name] += 1
    story.clock.now += 1
    answer = Answer(release=version, outcome=outcome, at=story.clock(), reason=reason, attempt=attempt, rollout=rollout)
    phase = Phase.STEADY if serving == version else Phase.QUARANTINED
    data = f"digits {serving}".encode()
    state = ModelState(serving=serving, sha256=sha256(data), variant="cpu", phase=phase, answers=(answer,))
    device = story.devices[name]
    changes = device.state(device.report(story.counters[name], models={"digits": state}))
    story.fleet.judge.evaluate(changes.models)


# -- supersede -----------------------------------------------------------------------------------------------------------------


def test_devices_that_have_the_first_release_go_straight_on_to_the_second(story):
    completed(story, 1)
    first = story.start(2, groups=["canary"], confirm=True)
    story.commits("canary-1", version=2)
    second = story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3), waves=["1"]).id
    assert (view(story, first).state, view(story, second).previous) == ("superseded", 1)
    assert view(story, second).waves[0].count == 1
    runs = {device: story.wanted(device) for device in story.devices}
    assert set(runs.values()) <= {1, 2, 3}
    assert runs["canary-1"] in {2, 3}, "it does not go back to 1"
    assert 3 in runs.values(), "the first wave reaches one device"
    assert story.assignment.format == 2, "software that does not know of it must not take the device back"
    for _ in range(3):
        for device in story.devices:
            if story.wanted(device) == 3:
                story.commits(device, version=3)
        if view(story, second).state == "waiting":
            story.fleet.rollouts.promote(SERVER, second)
    assert view(story, second).state == "completed"
    assert {story.wanted(device) for device in story.devices} == {3}
    assert story.assignment.format == 1, "older software follows again"


def test_the_evidence_of_a_superseded_rollout_is_kept(story):
    completed(story, 1)
    first = story.start(2, groups=["canary"], confirm=True)
    story.commits("canary-1", version=2)
    before = view(story, first).verdicts
    second = story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3)).id
    assert view(story, first).verdicts == before
    assert before
    assert second in view(story, first).reason


def test_aborting_the_second_takes_everybody_to_what_ran_before_the_first(story):
    completed(story, 1)
    first = story.start(2, groups=["canary"], confirm=True)
    story.commits("canary-1", version=2)
    second = story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3), waves=["1"]).id
    story.fleet.rollouts.abort(SERVER, second)
    assert {story.wanted(device) for device in story.devices} == {1}


def test_a_superseded_release_that_is_withdrawn_is_not_kept(story):
    completed(story, 1)
    first = story.start(2, groups=["canary"], confirm=True)
    story.commits("canary-1", version=2)
    second = story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3), waves=["1"]).id
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 2))
    assert view(story, second).state == "running"
    assert 2 not in {story.wanted(device) for device in story.devices}


def test_a_superseded_release_is_not_deleted_while_devices_keep_it(story):
    completed(story, 1)
    first = story.start(2, groups=["canary"], confirm=True)
    story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3), waves=["1"])
    with pytest.raises(Conflict, match="devices keep it until rollout"):
        story.fleet.retention.delete(SERVER, ReleaseRef("digits", 2))


def test_what_cannot_be_superseded_says_what_can_be_done(story):
    completed(story, 1)
    first = story.start(2, groups=["canary"])
    for version, match in ((2, "not newer"), (1, "not newer")):
        with pytest.raises(Conflict, match=match):
            story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", version))
    with pytest.raises(Invalid, match="another one"):
        story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("other", 3))
    with pytest.raises(NotFound):
        story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 9))
    assert view(story, first).state == "running", "nothing was changed by any of these"
    with pytest.raises(Conflict, match=f"rollout supersede {first} digits:3"):
        story.start(3)
    story.fleet.rollouts.abort(SERVER, first)
    with pytest.raises(Conflict, match="rollout start digits:3"):
        story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3))
    shadow = story.start(2, mode="shadow", groups=["canary"])
    with pytest.raises(Conflict, match="installs nothing"):
        story.fleet.rollouts.supersede(SERVER, shadow, ReleaseRef("digits", 3))


def test_of_two_operators_who_supersede_at_once_the_second_is_told(story):
    completed(story, 1)
    first = story.start(2, groups=["canary"])
    story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3))
    with pytest.raises(Conflict, match="is superseded"):
        story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3))


def test_a_chain_of_superseded_rollouts_has_an_end(story):
    story.publish(*range(4, MAX_KEPT + 5))
    completed(story, 1)
    last = story.start(2, groups=["canary"], confirm=True)
    for version in range(3, MAX_KEPT + 3):
        last = story.fleet.rollouts.supersede(SERVER, last, ReleaseRef("digits", version)).id
    assert len(story.assignment.models["digits"].rollout.kept) == MAX_KEPT
    with pytest.raises(Conflict, match="complete it or abort it first"):
        story.fleet.rollouts.supersede(SERVER, last, ReleaseRef("digits", MAX_KEPT + 3))


def test_a_server_that_dies_before_the_signature_signs_what_superseded(story, monkeypatch):
    completed(story, 1)
    first = story.start(2, groups=["canary"], confirm=True)
    story.commits("canary-1", version=2)
    with monkeypatch.context() as patched:
        patched.setattr(story.fleet.repository, "assign", _dies)
        with pytest.raises(KeyboardInterrupt):
            story.fleet.rollouts.supersede(SERVER, first, ReleaseRef("digits", 3), waves=["1"])
    assert story.assignment.models["digits"].rollout.id == first
    story.fleet.recover()
    assert story.assignment.models["digits"].rollout.release == 3
    assert story.wanted("canary-1") in {2, 3}


def _dies(*_):
    raise KeyboardInterrupt


# -- complete ------------------------------------------------------------------------------------------------------------------


def test_complete_assigns_the_release_to_everyone_at_once(story):
    completed(story, 1)
    rollout = story.start(2, groups=["canary"], confirm=True)
    assert story.wanted("plain-1") == 1
    assert story.fleet.rollouts.complete(SERVER, rollout).state == "completed"
    assert {story.wanted(device) for device in story.devices} == {2}
    story.fleet.rollouts.roll_back(SERVER, "digits", None)
    assert {story.wanted(device) for device in story.devices} == {1}


def test_what_is_over_says_what_can_be_done_in_the_operators_words(story):
    completed(story, 1)
    rollout = story.start(2, groups=["canary"], confirm=True)
    with pytest.raises(
        Conflict, match=r"is running and cannot be resumed; what can be done: pause, complete, supersede, abort"
    ):
        story.fleet.rollouts.resume(SERVER, rollout)
    story.fleet.rollouts.complete(SERVER, rollout)
    for verb in ("promote", "pause", "resume", "complete", "abort"):
        with pytest.raises(Conflict, match="it is over: begin another one with `edge-fleet rollout start`") as error:
            getattr(story.fleet.rollouts, verb)(SERVER, rollout)
        assert "wave_passed" not in str(error.value)


# -- retry ---------------------------------------------------------------------------------------------------------------------


def test_one_device_is_told_in_its_own_record_to_try_again(story):
    completed(story, 1)
    rollout = story.start(2, max_failures=1)
    answers(story, "plain-1", 2, Outcome.REFUSED, serving=1, reason="golden_mismatch")
    assert standing(story, rollout, "plain-1") == "refused"
    story.fleet.rollouts.retry(SERVER, rollout, "plain-1")
    (retry,) = record(story, "plain-1").retries
    assert (retry.model, retry.release) == ("digits", 2)
    assert retry.attempt > 0
    assert not record(story, "plain-2").retries
    assert standing(story, rollout, "plain-1") == "told", "what it answered before counts no more"
    answers(story, "plain-1", 2, Outcome.REFUSED, serving=1, reason="golden_mismatch", attempt=retry.attempt)
    assert standing(story, rollout, "plain-1") == "refused"
    story.commits("plain-1", "plain-2", "canary-1", version=2)
    assert view(story, rollout).state == "completed"


def test_all_devices_of_a_rollout_try_again(story):
    completed(story, 1)
    rollout = story.start(2, max_failures=2)
    for device in ("plain-1", "plain-2"):
        answers(story, device, 2, Outcome.ROLLED_BACK, serving=1, reason="error_ratio")
    assert view(story, rollout).verdict.counts.rolled_back == 2
    story.fleet.rollouts.retry(SERVER, rollout)
    assert story.assignment.models["digits"].rollout.attempt > 0
    assert view(story, rollout).verdict.counts.rolled_back == 0
    assert view(story, rollout).state == "running"
    rolled_back = [one for one in view(story, rollout).verdicts if one.counts.rolled_back]
    assert view(story, rollout).verdict.counts.to_answer == 3 or rolled_back


def test_attempts_only_grow(story, clock):
    completed(story, 1)
    rollout = story.start(2, max_failures=3)
    told = []
    for _ in range(3):
        answers(story, "plain-1", 2, Outcome.REFUSED, serving=1, reason="too_slow", attempt=told[-1] if told else 0)
        story.fleet.rollouts.retry(SERVER, rollout, "plain-1")
        told.append(record(story, "plain-1").attempt("digits", 2))
        clock.now -= 1000  # the server's clock goes back
    assert told == sorted(set(told))


def test_a_device_that_refused_what_everybody_runs_tries_again_after_the_end(story):
    completed(story, 1)
    rollout = story.start(2)
    story.commits("plain-1", "plain-2", "canary-1", version=2)
    assert view(story, rollout).state == "completed"
    answers(story, "plain-1", 2, Outcome.ROLLED_BACK, serving=1, reason="error_ratio")
    story.fleet.rollouts.retry(SERVER, rollout)
    assert record(story, "plain-1").attempt("digits", 2) > 0
    assert not record(story, "plain-2").retries


def test_devices_that_refuse_after_the_end_are_shown_on_the_rollout_and_in_the_status(story):
    completed(story, 1)
    rollout = story.start(2)
    story.commits("plain-1", "plain-2", "canary-1", version=2)
    assert view(story, rollout).refusals is None
    answers(story, "plain-1", 2, Outcome.ROLLED_BACK, serving=1, reason="error_ratio")
    answers(story, "plain-2", 2, Outcome.REFUSED, serving=1, reason="too_slow")
    shown = view(story, rollout).refusals
    assert (shown.causes, shown.devices) == ({"error_ratio": 1, "too_slow": 1}, ("plain-1", "plain-2"))
    assert standing(story, rollout, "plain-1") == "rolled_back"
    (warning,) = [text for text in story.fleet.status.view().warnings if "after the end" in text]
    assert "digits:2, by 2 devices (plain-1, plain-2): 1 error_ratio, 1 too_slow" in warning
    assert f"edge-fleet rollout retry {rollout}" in warning
    story.fleet.rollouts.retry(SERVER, rollout, "plain-1")
    assert view(story, rollout).refusals.causes == {"too_slow": 1}, "it is to try again"
    completed(story, 3)
    assert view(story, rollout).refusals is None, "another release is what they should run"


def test_a_retry_of_nothing_is_refused(story):
    completed(story, 1)
    rollout = story.start(2, groups=["canary"], max_failures=1)
    with pytest.raises(NotFound, match="there is no device 'nobody'"):
        story.fleet.rollouts.retry(SERVER, rollout, "nobody")
    with pytest.raises(Conflict, match="plain-1 did not refuse digits:2"):
        story.fleet.rollouts.retry(SERVER, rollout, "plain-1")
    story.fleet.rollouts.abort(SERVER, rollout)
    with pytest.raises(Conflict, match=r"no device that .* reached refused"):
        story.fleet.rollouts.retry(SERVER, rollout)


def test_after_a_repair_the_release_is_rolled_out_again(story):
    """The first device refuses it, the rollout ends; it is repaired, told to try again, and the next rollout is judged by that."""
    completed(story, 1)
    first = story.start(2, max_failures=0)
    answers(story, "plain-1", 2, Outcome.REFUSED, serving=1, reason="trial_crashed")
    assert view(story, first).state == "aborted"
    again = story.start(2, max_failures=0)
    assert view(story, again).state == "aborted", "it refuses it still"
    story.fleet.rollouts.retry(SERVER, first, "plain-1")
    last = story.start(2, max_failures=0)
    assert view(story, last).state == "running"
    story.commits("plain-1", "plain-2", "canary-1", version=2)
    assert view(story, last).state == "completed"


def test_a_rollout_in_which_all_try_again(story):
    completed(story, 1)
    story.start(2, max_failures=0)
    answers(story, "plain-1", 2, Outcome.REFUSED, serving=1, reason="trial_crashed")
    last = story.start(2, max_failures=0, retry=True)
    assert view(story, last).state == "running"
    assert story.assignment.models["digits"].rollout.attempt > 0


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [("failed", "no_space"), ("rolled_back", "operator"), ("rolled_back", "cannot_report"), ("refused", "bad_signature")],
)
def test_what_was_refused_for_causes_of_the_device_is_judged_anew(story, outcome, reason):
    completed(story, 1)
    first = story.start(2, max_failures=1)
    answers(story, "plain-1", 2, Outcome(outcome), serving=1, reason=reason, rollout=first)
    assert standing(story, first, "plain-1") == outcome
    story.fleet.rollouts.abort(SERVER, first)
    again = story.start(2)
    assert view(story, again).state == "running"
    assert standing(story, again, "plain-1") == "told"


def test_a_device_that_is_enrolled_again_has_no_retries_of_the_old_one(story):
    completed(story, 1)
    rollout = story.start(2, max_failures=1)
    answers(story, "plain-1", 2, Outcome.REFUSED, serving=1, reason="too_slow")
    story.fleet.rollouts.retry(SERVER, rollout, "plain-1")
    story.fleet.inventory.delete(SERVER, "plain-1")
    story.join("plain-1", online=False)
    assert record(story, "plain-1").retries == ()


def test_a_record_of_before_is_read():
    data = b'{"fleet":"demo","device":"d","serial":1,"groups":[],"issued":0,"expires":1,"kind":"device-record","format":1}'
    assert decode(data, DeviceRecord, limit_bytes=1000).attempt("digits", 2) == 0


def test_the_newest_retries_are_kept(story):
    from fleet_server.rollouts import retries

    known = []
    for number in range(100):
        known = retries.with_retry(known, "digits", number + 1, number)
    found = DeviceRecord(
        fleet="demo", device="d", serial=1, groups=(), issued=0, expires=1, retries=tuple(Retry(**one) for one in known)
    )
    assert len(known) == 32
    assert found.attempt("digits", 100) == 99
    assert found.attempt("digits", 1) == 0


def test_a_device_that_a_superseded_rollout_reached_goes_on_with_its_release():
    from agent.contract.assignment import ModelAssignment, Reach, Rollout

    kept = Reach(id="r1", release=2, groups=("canary",))
    model = ModelAssignment(release=1, rollout=Rollout(id="r2", release=3, previous=1, groups=("first",), kept=(kept,)))
    assert wanted(model, "d", ["canary"]).release == 2
    assert wanted(model, "d", ["canary", "first"]).release == 3
    assert wanted(model, "d", []).release == 1
