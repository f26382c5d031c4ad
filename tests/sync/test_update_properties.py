"""Whatever happens, in whatever order, and wherever the process dies, these stay true of a device with several models:

 1. What `serve` has active passed its trial here.
 2. What a `serve` that starts now would load is whole: its manifest and its file are on disk, as signed.
 3. A model at rest does not have selected what this device refuses.
 4. Of releases that switch together none serves without the others, unless all of them were committed here before.
 5. A release that asks for approval serves only after somebody here gave it.
 6. A model that is held stays what it is held on, while that is not withdrawn.
 7. What is on disk about an update can always be read; what switches together is found in the same phase.
 8. When the trouble ends, every model comes to rest within bounded time: on what is wanted, or, where that is refused here, on what
    served before; `serve` runs what is selected; and no withdrawn release is among it.

The updaters, their store, their states and their quarantine are the real ones; `serve`, the fleet and the clock are played. The process
dies at anything that lasts: a file written or removed, or a word to `serve`, before it or after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from agent.contract.acceptance import WatchRules
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.store import Selection, Store, StoreError
from agent.sync.operator import actions
from agent.sync.problems import Problem
from agent.sync.serving import ServeAway
from agent.sync.updating.states import States
from tests.sync.bench import Killed, numbers
from tests.sync.team_bench import TeamBench
from tests.sync.test_teams import Death

WATCH = WatchRules(duration_s=5.0, max_duration_s=20.0, min_requests_to_judge=5, report_within_s=30.0)
MODELS = ("arm", "eye")
GOOD = {"arm": (1, 11), "eye": (2, 12)}
TEAM = {"arm": 21, "eye": 22}
"""Only ever wanted together."""
BAD_TEAM = {"arm": 31, "eye": 32}
"""The same, and eye:32 fails its watch."""
BAD_TRIAL, BAD_WATCH, ASKS = {"arm": 41, "eye": 42}, {"arm": 51, "eye": 52}, {"arm": 61, "eye": 62}
SINGLE = {model: (*GOOD[model], BAD_TRIAL[model], BAD_WATCH[model], ASKS[model]) for model in MODELS}
FAILS = {32, 51, 52}
REST = (Phase.STEADY, Phase.QUARANTINED)


class Device(RuleBasedStateMachine):
    """One device, from its first release on."""

    def __init__(self) -> None:
        super().__init__()
        self.ending = contextlib.ExitStack()
        folder = self.ending.enter_context(tempfile.TemporaryDirectory())
        self.patch = self.ending.enter_context(pytest.MonkeyPatch.context())
        self.bench = TeamBench(Path(folder), MODELS)
        self.passed: set[tuple[str, int]] = set()
        self.approved: set[tuple[str, int]] = set()
        self.withdrawn: dict[str, set[int]] = {model: set() for model in MODELS}
        self.wanted: dict[str, int | None] = dict.fromkeys(MODELS)
        self.team: tuple[str, ...] = ()
        self.calls_until_cut: int | None = None
        self.bench.trial = self.trial
        self.bench.link_up = True
        for model in MODELS:
            for version in (*SINGLE[model], TEAM[model], BAD_TEAM[model]):
                self.bench.release(version, model=model, watch=WATCH, approval=version == ASKS[model])
                self.bench.serve.numbers[version] = numbers(50, run=50) if version in FAILS else numbers(100)
        self.death = Death(self.patch, self.bench)
        self.bench.serve.fault = self.called

    def teardown(self) -> None:
        self.death.left = None
        try:
            self.come_to_rest()
        finally:
            self.ending.close()

    # -- what is played ------------------------------------------------------------------------------------------------------

    def trial(self, request, *_) -> dict:
        self.death.moment()
        ref = ReleaseRef.parse(request.release)
        if ref.version == BAD_TRIAL[ref.model]:
            raise Problem(Reason.GOLDEN_MISMATCH, "wrong answers")
        self.passed.add((ref.model, ref.version))
        return {}

    def called(self, action: str, _version: int | None) -> None:
        if action == "status":
            return
        self.death.moment()
        if self.calls_until_cut is not None:
            self.calls_until_cut -= 1
            if self.calls_until_cut < 0:
                self.calls_until_cut = None
                raise ServeAway("cut off", sent=True)

    def go(self, rounds: int) -> None:
        for _ in range(rounds):
            try:
                self.bench.round()
            except Killed:
                self.rules_2_and_3()
                self.rule_7()
                self.rule_4()  # what another process finds right now, before this one mends anything
                self.bench.again()

    def desire(self) -> None:
        gone = {model: tuple(sorted(numbers)) for model, numbers in self.withdrawn.items()}
        self.bench.desire(self.wanted, self.team, gone)

    # -- what may happen -----------------------------------------------------------------------------------------------------

    @initialize()
    def first_releases(self) -> None:
        self.wanted = {model: GOOD[model][0] for model in MODELS}
        self.desire()
        self.go(30)

    @rule(model=st.sampled_from(MODELS), choice=st.integers(0, 4), rounds=st.integers(0, 25))
    def want_one(self, model: str, choice: int, rounds: int) -> None:
        self.want(model, choice)
        self.go(rounds)

    def want(self, model: str, choice: int) -> None:
        for other in MODELS:  # whoever was one of a team leaves it with the others
            if self.wanted[other] in (TEAM[other], BAD_TEAM[other]):
                self.wanted[other] = GOOD[other][0]
        self.wanted[model], self.team = SINGLE[model][choice], ()
        self.desire()

    @rule(good=st.booleans(), rounds=st.integers(0, 40))
    def want_all(self, good: bool, rounds: int) -> None:
        self.want_team(good)
        self.go(rounds)

    def want_team(self, good: bool) -> None:
        self.wanted, self.team = dict(TEAM if good else BAD_TEAM), MODELS
        self.desire()

    @rule(model=st.sampled_from(MODELS))
    def want_nothing(self, model: str) -> None:
        self.want(model, 0)
        self.wanted[model] = None
        self.desire()

    @rule(model=st.sampled_from(MODELS), choice=st.integers(1, 6))
    def withdraw(self, model: str, choice: int) -> None:
        number = (*SINGLE[model], TEAM[model], BAD_TEAM[model])[choice]
        self.withdrawn[model].add(number)
        self.desire()

    @rule(rounds=st.integers(5, 40))
    def time_passes(self, rounds: int) -> None:
        self.go(rounds)

    @rule(moment=st.integers(0, 60), serve_too=st.booleans())
    def dies(self, moment: int, serve_too: bool) -> None:
        self.death.left = moment
        self.go(12)
        self.death.left = None
        if serve_too:
            self.bench.serve.start()

    @rule(
        good=st.booleans(),
        phase=st.sampled_from((Phase.WAITING, Phase.ACTIVATING, Phase.WATCHING, Phase.ROLLING_BACK)),
        moment=st.integers(0, 25),
    )
    def dies_in_a_switch_of_all(self, good: bool, phase: Phase, moment: int) -> None:
        self.want_team(good)
        for _ in range(40):
            if any(updater.state.phase is phase for updater in self.bench.updaters.values()):
                break
            self.go(1)
        self.death.left = moment
        self.go(4)
        self.death.left = None

    @rule()
    def reboots(self) -> None:
        self.bench.boot += "'"
        self.bench.serve.start()
        self.bench.again()

    @rule()
    def serve_crashes(self) -> None:
        self.bench.serve.start()

    @rule(away=st.sampled_from((False, False, True)))
    def serve_goes(self, away: bool) -> None:
        if self.bench.serve.away and not away:
            self.bench.serve.start()
        self.bench.serve.away = away

    @rule(calls=st.integers(0, 4))
    def a_word_to_serve_is_cut_off(self, calls: int) -> None:
        self.calls_until_cut = calls
        self.go(4)
        self.calls_until_cut = None

    @rule(up=st.booleans())
    def the_broker(self, up: bool) -> None:
        self.bench.link_up = up

    @rule(up=st.sampled_from((True, True, False)))
    def the_network(self, up: bool) -> None:
        self.bench.manifest_problem = None if up else Problem(Reason.DOWNLOAD_FAILED, "unplugged")

    @rule(hours=st.integers(-24, 24))
    def the_clock_is_set(self, hours: int) -> None:
        self.bench.clock.set_wall(self.bench.clock.wall() + 3600 * hours)

    @rule(model=st.sampled_from(MODELS))
    def somebody_approves(self, model: str) -> None:
        with contextlib.suppress(StoreError):
            self.approved.add((model, actions.approve(self.bench.store, model)))

    @rule(model=st.sampled_from(MODELS))
    def somebody_holds(self, model: str) -> None:
        if self.bench.updaters[model].state.phase in REST and not self.bench.serve.away:
            with contextlib.suppress(StoreError):
                actions.hold(self.bench.store, model)

    @rule(model=st.sampled_from(MODELS))
    def somebody_lets_go(self, model: str) -> None:
        self.bench.records.holds.unhold(model)

    @rule(model=st.sampled_from(MODELS))
    def somebody_clears_the_quarantine(self, model: str) -> None:
        actions.clear(self.bench.store, model)

    # -- what stays true -----------------------------------------------------------------------------------------------------

    @invariant()
    def rule_1(self) -> None:
        for model, version in self.bench.runs.items():
            assert version is None or (model, version) in self.passed

    @invariant()
    def rules_2_and_3(self) -> None:
        for model, selection in Store(self.bench.store.root).selections().items():
            assert isinstance(selection, Selection)
            self.bench.store.release(model, selection.active)
            if self.bench.updaters[model].state.phase in REST:
                assert selection.active.version not in self.refused(model)

    @invariant()
    def rule_4(self) -> None:
        for found in (self.bench.on_disk(), self.bench.runs):
            for team in (TEAM, BAD_TEAM):
                there = [model for model in MODELS if found[model] == team[model]]
                if there and len(there) < len(MODELS):
                    assert all(self.committed(model, team[model]) for model in there), f"{found}"

    @invariant()
    def rule_5(self) -> None:
        for found in (self.bench.on_disk(), self.bench.runs):
            for model in MODELS:
                assert found[model] != ASKS[model] or (model, ASKS[model]) in self.approved

    @invariant()
    def rule_6(self) -> None:
        for model in MODELS:
            held, updater = self.bench.records.holds.held(model), self.bench.updaters[model]
            if held is not None and updater.state.phase in REST and held not in self.withdrawn[model]:
                assert self.bench.on_disk()[model] in (held, None)

    @invariant()
    def rule_7(self) -> None:
        states = States(self.bench.store.private / "updates")
        found = {model: states.read(model) for model in MODELS}
        for state in found.values():
            assert state is not None
            for member in state.team:
                other = found[member]
                assert other is not None
                assert (other.phase, other.team) == (state.phase, state.team)

    # -- how it ends ---------------------------------------------------------------------------------------------------------

    def come_to_rest(self) -> None:
        """Rule 8."""
        bench = self.bench
        bench.manifest_problem, bench.link_up, self.calls_until_cut = None, True, None
        if bench.serve.away:
            bench.serve.away = False
            bench.serve.start()
        for model in MODELS:
            bench.records.holds.unhold(model)
            if self.wanted[model] == ASKS[model]:
                self.want(model, 1)
            if self.wanted[model] in self.withdrawn[model]:
                self.want(model, 0)
        self.desire()
        for _ in range(6000):
            bench.round()
            if self.still():
                break
        bench.rounds(3)
        assert self.still(), {model: (u.state.phase, u.state.target, u.problem) for model, u in bench.updaters.items()}
        assert bench.runs == bench.on_disk()
        for model in MODELS:
            assert bench.runs[model] not in self.withdrawn[model]
        self.rule_1()
        self.rule_4()

    def still(self) -> bool:
        """Every model rests on what is wanted, or waits for another of its team that this device refuses."""
        stuck = self.team and any(self.wanted[m] in self.refused(m) for m in self.team)
        return all(
            (updater.state.phase in REST and (self.bench.runs[m] == self.wanted[m] or self.wanted[m] in self.refused(m)))
            or (stuck and updater.state.waiting_for == "team")
            for m, updater in self.bench.updaters.items()
        )

    def refused(self, model: str) -> set[int]:
        return {entry.answer.release for entry in self.bench.records.quarantine.entries(model)}

    def committed(self, model: str, version: int) -> bool:
        manifest = self.bench.signed[ReleaseRef(model, version)].data
        return hashlib.sha256(manifest).hexdigest() in self.bench.updaters[model].state.committed


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@pytest.mark.no_cover  # it would take two or three times as long
def test_any_sequence():
    run_state_machine_as_test(
        Device, settings=settings(max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=QUIET)
    )


@pytest.mark.long
@pytest.mark.parametrize("nothing", [(), ("arm",), MODELS], ids=lambda models: "+".join(models) or "none")
def test_death_at_any_moment_of_a_switch_back_after_a_reboot(nothing: tuple[str, ...]):
    """`serve` has only what is selected then. `nothing`: the models that nothing served of before."""
    moment, died = 0, True
    while died:
        device = Device()
        device.first_releases()
        for model in nothing:
            device.want_nothing(model=model)
        device.go(3)
        device.the_broker(up=False)  # so the watch goes on
        device.want_all(good=True, rounds=30)
        device.reboots()
        assert device.bench.runs == TEAM
        device.want_nothing(model="arm")
        device.death.left = moment
        device.go(12)
        died = device.death.left is None
        device.rule_4()
        device.teardown()
        moment += 1
    assert moment > 40


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_any_sequence_at_length():
    run_state_machine_as_test(
        Device, settings=settings(max_examples=400, stateful_step_count=40, deadline=None, suppress_health_check=QUIET)
    )
