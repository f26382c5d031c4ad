"""A rollback goes to what ran before, and never forward without being told to: whatever was rolled out, gone back from and withdrawn."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract.names import ReleaseRef
from fleet_server.access import SERVER
from fleet_server.errors import Conflict, Invalid, NotFound
from tests.fleet.test_rollouts import Story, completed

RELEASES = (1, 2, 3, 4)


@pytest.fixture
def story(fleet, clock):
    made = Story(fleet, clock)
    made.publish(*RELEASES)
    made.join("canary-1", groups=["canary"])
    made.join("plain-1", "plain-2")
    return made


def run_by_all(story):
    found = story.fleet.views.models()
    return found[0].release if found else None


def test_after_a_downgrade_a_rollback_does_not_go_up_again(story):
    for version in (1, 4, 2):
        completed(story, version)
    with pytest.raises(Conflict, match=r"digits:4 is newer than digits:2.*--to 4 --forward.*older one is named with --to"):
        story.fleet.rollouts.roll_back(SERVER, "digits", None)
    assert run_by_all(story) == 2
    story.fleet.rollouts.roll_back(SERVER, "digits", 1)
    assert run_by_all(story) == 1
    story.fleet.rollouts.roll_back(SERVER, "digits", 4, forward=True)
    assert run_by_all(story) == 4


def test_withdrawing_after_a_downgrade_does_not_go_up_again(story):
    for version in (1, 4, 2):
        completed(story, version)
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 2))
    assert {story.wanted(device) for device in story.devices} == {1}


def test_withdrawing_goes_to_nothing_where_nothing_older_ran(story):
    for version in (4, 2):
        completed(story, version)
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 2))
    assert {story.wanted(device) for device in story.devices} == {None}


def test_forward_does_not_let_what_never_passed_a_gate_through(story):
    completed(story, 1)
    with pytest.raises(Conflict, match="rollout start"):
        story.fleet.rollouts.roll_back(SERVER, "digits", 3, forward=True)
    with pytest.raises(Invalid, match="--to"):
        story.fleet.rollouts.roll_back(SERVER, "digits", None, forward=True)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("out"), st.sampled_from(RELEASES)),
        st.tuples(st.just("begin"), st.sampled_from(RELEASES)),
        st.tuples(st.just("back"), st.sampled_from((None, *RELEASES))),
        st.tuples(st.just("withdraw"), st.sampled_from(RELEASES)),
    ),
    max_size=8,
)


@pytest.mark.long
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_a_rollback_never_goes_forward_without_being_told_to(story, steps):
    """Nor does a withdrawal: after each, what every device is assigned is no newer than before."""
    for step, version in steps:
        before = run_by_all(story)
        with contextlib.suppress(Conflict, NotFound):
            if step == "out":
                completed(story, version)
            elif step == "begin":
                story.start(version, groups=["canary"])
            elif step == "back":
                story.fleet.rollouts.roll_back(SERVER, "digits", version)
            else:
                story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", version))
        after = run_by_all(story)
        if step in {"back", "withdraw"}:
            named = before is None and version is not None and step == "back"  # from nothing to what somebody names
            assert after is None or named or (before is not None and after <= before), (
                f"{step} {version}: from {before} to {after}"
            )
    for version in RELEASES:  # the fleet is used again: what was withdrawn may be rolled out again
        story.fleet.rollouts.reinstate(SERVER, ReleaseRef("digits", version))
    for rollout in story.fleet.views.rollouts():
        if rollout.state in {"running", "paused", "waiting"}:
            story.fleet.rollouts.abort(SERVER, rollout.id)
