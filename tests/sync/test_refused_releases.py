"""A release that fails its trial is refused and remembered; what ends a refusal."""

from __future__ import annotations

import msgspec
import pytest

from agent.contract.assignment import Retry, Rollout
from agent.contract.codec import encode
from agent.contract.reasons import METADATA, Reason
from agent.contract.reports import Outcome, Phase
from agent.sync.ports import Signed
from agent.sync.problems import Problem
from tests.sync.bench import MODEL, Bench
from tests.sync.fleet import sha
from tests.sync.stories import no

P = Phase


@pytest.mark.parametrize("reason", [Reason.GOLDEN_MISMATCH, Reason.TRIAL_CRASHED, Reason.TOO_SLOW, Reason.LOAD_FAILED])
def test_a_failed_trial_is_refused_and_never_tried_again(reason, on_one: Bench):
    on_one.trial = no(reason)
    on_one.want(2)
    on_one.step()

    assert on_one.until(P.QUARANTINED) == [P.FETCHING, P.TRIALING, P.QUARANTINED]
    assert on_one.serving == 1
    assert (on_one.answer.outcome, on_one.answer.reason) == (Outcome.REFUSED, reason.value)
    for _ in range(20):
        on_one.step()
    on_one.again()
    for _ in range(20):
        on_one.step()
    assert on_one.tried == ["crane:2"]
    assert on_one.serve.calls == []


def test_a_refused_release_answers_a_new_rollout_without_a_download_or_a_trial(on_one: Bench):
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)
    on_one.source.asked.clear()

    on_one.want(1, rollout=Rollout(id="second-try", release=2, previous=1, permille=1000))
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert (on_one.answer.rollout, on_one.answer.outcome) == ("second-try", Outcome.REFUSED)
    assert on_one.tried == ["crane:2"]
    assert on_one.source.asked == []


def test_a_repaired_release_gets_its_chance(on_one: Bench):
    """The fix is a new version, and the refusal of the old one does not stand in its way."""
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)
    on_one.trial = lambda *_: {}
    on_one.release(3)
    on_one.want(3)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 3


def test_an_operator_on_the_device_can_lift_a_refusal(on_one: Bench):
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)
    assert on_one.records.quarantine.forget(MODEL, 2)
    on_one.trial = lambda *_: {}
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_the_fleet_lets_this_device_alone_try_again_and_only_once(on_one: Bench):
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)
    on_one.retries = (Retry(model=MODEL, release=2, attempt=7), Retry(model="other", release=2, attempt=9))
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert on_one.tried == ["crane:2", "crane:2"]
    assert (on_one.answer.outcome, on_one.answer.attempt) == (Outcome.REFUSED, 7)
    for _ in range(20):
        on_one.step()
    on_one.again()
    for _ in range(20):
        on_one.step()
    assert on_one.tried == ["crane:2", "crane:2"], "the number is as it was: it is refused again, also after a restart"

    on_one.trial = lambda *_: {}
    on_one.retries = (Retry(model=MODEL, release=2, attempt=8),)
    on_one.step()
    on_one.until(P.STEADY)
    assert on_one.serving == 2


def test_a_rollout_with_a_higher_attempt_is_tried_again_and_one_without_is_not(on_one: Bench):
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(1, rollout=Rollout(id="first", release=2, previous=1, permille=1000))
    on_one.step()
    on_one.until(P.QUARANTINED)
    on_one.want(1, rollout=Rollout(id="first", release=2, previous=1, permille=1000, attempt=5))
    on_one.step()
    on_one.until(P.QUARANTINED)
    assert (on_one.tried, on_one.answer.attempt) == (["crane:2", "crane:2"], 5)
    on_one.want(1, rollout=Rollout(id="second", release=2, previous=1, permille=1000))
    on_one.step()
    on_one.until(P.QUARANTINED)
    assert on_one.answer.rollout == "second"
    on_one.want(1, rollout=Rollout(id="second", release=2, previous=1, permille=1000, attempt=5))
    for _ in range(20):
        on_one.step()
    assert on_one.tried == ["crane:2", "crane:2"], "the fifth attempt was made already"


@pytest.mark.parametrize("reason", sorted(METADATA, key=lambda reason: reason.value))
def test_what_was_refused_for_its_metadata_is_judged_anew_when_that_changes(reason, on_one: Bench):
    on_one.manifest_problem = Problem(reason, "not as it should be signed")
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    assert (on_one.answer.outcome, on_one.answer.reason) == (Outcome.REFUSED, reason.value)
    asked = on_one.clock.monotonic()
    on_one.manifest_problem, on_one.metadata = None, "now"
    on_one.until(P.FETCHING, P.TRIALING)
    assert on_one.clock.monotonic() - asked < 1.0, "it does not wait for its next try"

    on_one.until(P.STEADY)
    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)


def test_no_variant_for_this_device(on_one: Bench):
    manifest = on_one.release(2)
    other = msgspec.structs.replace(manifest, variants=(msgspec.structs.replace(manifest.variants[0], runtime="tensorrt"),))
    on_one.signed[manifest.ref] = Signed(encode(other), sha(encode(other)), other)
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert on_one.answer.reason == Reason.NO_VARIANT.value
    assert "'cpu': runtime 'tensorrt' does not work here (working: script)" in on_one.answer.message


def test_a_withdrawn_release_does_not_stay_because_the_next_one_is_refused(on_one: Bench):
    on_one.trial = no(Reason.GOLDEN_MISMATCH)
    on_one.want(2, withdrawn=(1,))
    on_one.step()
    on_one.until(P.QUARANTINED)
    on_one.step()

    assert on_one.serving is None
    assert on_one.store.selection(MODEL) is None
