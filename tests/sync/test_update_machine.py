"""The update machine under any sequence of events and crashes. What must hold afterwards, whatever happened:

1. `serve` answers with a release once one was committed, or it is away for its own reasons.
2. What is selected on disk is whole in the store: its manifest and its variant's file, with the right hash.
3. Nothing serves that did not pass its trial here.
4. At rest, what is selected was committed, or nothing is.
5. A release that failed its trial or was rolled back as bad does not serve afterwards.
6. When the trouble ends, the device ends up with what is wanted, unless it refuses that release.
7. An illegal event changes nothing.
8. A release whose trial never began is not refused for being interrupted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract.acceptance import CanaryRules, ShadowRules, WatchRules
from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.store import StoreError
from agent.sync.problems import Problem
from agent.sync.serving import ServeAway
from agent.sync.updating import update
from agent.sync.updating.update import RESUME, TRANSITIONS, Event, IllegalTransition, UpdateState
from tests.sync.bench import MODEL, Bench, Killed, numbers

GOOD, BAD_TRIAL, BAD_SERVING = (1, 2, 5), 3, 4
RELEASES = (*GOOD, BAD_TRIAL, BAD_SERVING)


# -- the table --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_every_pair_is_either_in_the_table_or_changes_nothing(phase, event):
    state = UpdateState(model=MODEL, phase=phase)
    if (phase, event) in TRANSITIONS:
        assert update.after(state, event, 1.0).phase is TRANSITIONS[phase, event]
    else:
        with pytest.raises(IllegalTransition):
            update.after(state, event, 1.0)
        assert state == UpdateState(model=MODEL, phase=phase)


def test_every_phase_can_be_resumed_and_ends_at_rest():
    assert set(RESUME) == set(Phase)
    for phase in Phase:
        reached, grown = {phase}, {phase}
        while grown:
            grown = {target for (source, _), target in TRANSITIONS.items() if source in reached} - reached
            reached |= grown
        assert Phase.STEADY in reached, phase


def test_nothing_serves_without_a_trial_in_the_table():
    """ACTIVATING is reached only from a passed trial, or where the device committed the release before."""
    ways = {(source, event) for (source, event), target in TRANSITIONS.items() if target is Phase.ACTIVATING}

    assert ways == {
        (Phase.TRIALING, Event.PASSED),
        (Phase.FETCHING, Event.FETCHED_KNOWN),
        (Phase.SHADOWING, Event.TO_SERVE),
        (Phase.WAITING, Event.WINDOW_OPEN),
        (Phase.CANARYING, Event.CANARY_PASSED),
    }
    before = {source for (source, _), target in TRANSITIONS.items() if target is Phase.CANARYING}
    assert before == {Phase.TRIALING, Phase.SHADOWING, Phase.WAITING}


def test_rolling_back_cannot_fail():
    assert {event for source, event in TRANSITIONS if source is Phase.ROLLING_BACK} == {
        Event.BACK,
        Event.BACK_ONLY,
        Event.BACK_FOR_NOW,
    }


def test_the_diagram_has_every_transition():
    lines = update.mermaid().splitlines()

    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == 2 + len(TRANSITIONS)


# -- any sequence -----------------------------------------------------------------------------------------------------------------


class Trouble:
    """Decides, from numbers that hypothesis shrinks, where the process dies and what fails."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.die_in: int | None = None
        self.cut_off: int | None = None
        self.passed: set[int] = set()
        bench.trial = self.trial
        bench.queue = lambda _stop: self.moment()
        bench.serve.fault = self.serve_called
        save = bench.records.states.__class__.save

        def counting(states, state) -> None:
            self.moment()  # killed before it is on disk,
            save(states, state)
            self.moment()  # or right after

        self.counting = counting

    def moment(self) -> None:
        if self.die_in is not None:
            self.die_in -= 1
            if self.die_in <= 0:
                self.die_in = None
                raise Killed

    def trial(self, request, _timeout_s, _stop) -> dict:
        self.moment()
        version = int(request.release.split(":")[1])
        if version == BAD_TRIAL:
            raise Problem(Reason.GOLDEN_MISMATCH, "wrong answers")
        self.passed.add(version)
        return {}

    def serve_called(self, action: str, version: int | None) -> None:
        self.moment()
        if self.cut_off is not None and action != "status":
            self.cut_off -= 1
            if self.cut_off <= 0:
                self.cut_off = None
                raise ServeAway("cut off", sent=True)


ACTIONS = st.one_of(
    st.tuples(st.just("want"), st.sampled_from([*RELEASES, None])),
    st.tuples(st.just("withdraw"), st.sampled_from(RELEASES)),
    st.tuples(st.just("steps"), st.integers(1, 12)),
    st.tuples(st.just("kill"), st.integers(1, 12)),
    st.tuples(st.just("cut off"), st.integers(1, 4)),
    st.tuples(st.just("serve"), st.sampled_from(["crashes", "restarts", "goes away", "comes back"])),
    st.tuples(st.just("reboot"), st.just(0)),
    st.tuples(st.just("no network"), st.booleans()),
)


@pytest.mark.no_cover  # it would take two or three times as long
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTIONS, max_size=25))
def test_any_sequence_of_events_and_crashes(actions):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        run(Bench(Path(folder)), actions, patch)


def run(bench: Bench, actions: list, patch: pytest.MonkeyPatch) -> None:
    watch = WatchRules(duration_s=5.0, max_duration_s=20.0, min_requests_to_judge=5)
    asks = {
        2: {"canary": CanaryRules(duration_s=3.0, max_duration_s=10.0, min_requests=5)},
        5: {"shadow": ShadowRules(required=True, duration_s=2.0, max_duration_s=4.0), "canary": CanaryRules(max_duration_s=10.0, duration_s=3.0)},
        BAD_SERVING: {"canary": CanaryRules(duration_s=3.0, max_duration_s=10.0, min_requests=5)},
    }  # fmt: skip
    for version in RELEASES:
        bench.release(version, watch=watch, **asks.get(version, {}))
    bench.serve.numbers = {version: numbers(100) for version in GOOD} | {BAD_SERVING: numbers(50, run=50)}
    trouble = Trouble(bench)
    patch.setattr("agent.sync.updating.states.States.save", trouble.counting)
    withdrawn: set[int] = set()
    for action, value in actions:
        perform(bench, trouble, action, value, withdrawn)
        check(bench, trouble)
    come_to_rest(bench, trouble, withdrawn)


def perform(bench: Bench, trouble: Trouble, action: str, value, withdrawn: set[int]) -> None:
    if action == "want":
        bench.want(value, withdrawn=tuple(sorted(withdrawn)))
    elif action == "withdraw":
        withdrawn.add(value)
        bench.want(1, withdrawn=tuple(sorted(withdrawn)))
    elif action == "steps":
        walk(bench, value)
    elif action == "kill":
        trouble.die_in = value
        walk(bench, 12)
        trouble.die_in = None
    elif action == "cut off":
        trouble.cut_off = value
        walk(bench, 4)
        trouble.cut_off = None
    elif action == "no network":
        bench.manifest_problem = Problem(Reason.DOWNLOAD_FAILED, "unplugged") if value else None
    elif action == "reboot":
        bench.boot += "'"
        bench.serve.start()
        bench.again()
    elif value == "restarts":
        bench.serve.restart()
    elif value == "crashes":
        bench.serve.start()
    else:
        bench.serve.away = value == "goes away"
        if value == "comes back":
            bench.serve.start()


def walk(bench: Bench, steps: int) -> None:
    for _ in range(steps):
        try:
            bench.step()
        except Killed:
            bench.again()


def check(bench: Bench, trouble: Trouble) -> None:
    selection = bench.store.selection(MODEL)
    state = bench.updater.state
    for entry in bench.records.quarantine.entries(MODEL):
        began = f"{MODEL}:{entry.answer.release}" in bench.tried
        assert began or entry.answer.reason != Reason.INTERRUPTED_TOO_OFTEN.value, "rule 8"
    if selection is not None:
        try:
            bench.store.release(MODEL, selection.active)
        except StoreError as error:
            raise AssertionError("rule 2") from error
        assert selection.active.version in trouble.passed, "rule 3"
    if bench.serving is not None:
        assert bench.serving in trouble.passed, "rule 3"
    for found in bench.serve.canaries.values():
        assert found.version in trouble.passed, "rule 3"
    if state.phase in (Phase.STEADY, Phase.QUARANTINED) and selection is not None:
        assert selection.active.version not in refused(bench), "rule 4"


def refused(bench: Bench) -> set[int]:
    return {entry.answer.release for entry in bench.records.quarantine.entries(MODEL)}


def come_to_rest(bench: Bench, trouble: Trouble, withdrawn: set[int]) -> None:
    """The trouble ends: within bounded steps the device is where it should be."""
    trouble.die_in = trouble.cut_off = bench.manifest_problem = None
    if bench.serve.away:
        bench.serve.away = False
        bench.serve.start()
    bench.want(5, withdrawn=tuple(sorted(withdrawn - {5})))
    for _ in range(3000):
        bench.step()
        if bench.phase in (Phase.STEADY, Phase.QUARANTINED) and (bench.serving == 5 or 5 in refused(bench)):
            break
    selection = bench.store.selection(MODEL)
    assert bench.phase in (Phase.STEADY, Phase.QUARANTINED), "rule 5"
    if 5 not in refused(bench):
        assert (bench.serving, selection and selection.active.version) == (5, 5), "rule 5"
    else:  # crashes of serve were put down to it
        assert {a.reason for a in bench.updater.state.answers if a.release == 5} & {
            "serve_crashed",
            "interrupted_too_often",
            "activation_failed",
        }
    bench.step()
    if selection is not None:
        assert bench.serving == selection.active.version, "rule 1"
