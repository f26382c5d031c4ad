"""What a simulated device does about what the fleet says: an agent's update, from wanted to committed, without the release. Pure.

The shell around it tells what was heard (`hear`), that time passed (`step`), that the link is there or gone, and which report the
broker has (`delivered`); the device says through its `Voice` what an agent would say at that moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Protocol

import msgspec

from agent.contract.assignment import Assignment, Wanted, wanted
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.contract.reports import Answer, ModelState, Outcome, Phase
from fleet_server.simulation.behaviours import Behaviour
from fleet_server.simulation.members import Member
from fleet_server.simulation.pace import Pace

NEVER = float("inf")
REPORT_PAUSE_S = 0.2
"""Changes that come this close together share a report, as an agent's do."""

ANSWERS_KEPT = 10
BUSY = frozenset({Phase.FETCHING, Phase.TRIALING, Phase.ACTIVATING, Phase.WATCHING, Phase.ROLLING_BACK})
OTHER_BYTES = hashlib.sha256(b"other bytes than the release's").hexdigest()


class Known(msgspec.Struct, frozen=True):
    """What a device must know of a release: the hash of its model's bytes, and the variant that it takes."""

    sha256: str
    variant: str


class Voice(Protocol):
    """How a device speaks: with its signature, over its link."""

    def report(self, models: dict[str, ModelState], *, assignment: int | None) -> int | None:
        """Sends a report; what `delivered` will name it by, None when there is no link."""

    def event(self, name: str, message: str, *, model: str, release: int | None, reason: str | None = None) -> None: ...


class Running(msgspec.Struct):
    """One model on the device."""

    name: str
    serving: int | None = None
    phase: Phase = Phase.STEADY
    wanted: int | None = None
    target: int | None = None
    before: int | None = None
    rollout: str | None = None
    attempt: int = 0
    answers: list[Answer] = []
    quarantined: list[Answer] = []
    committed: set[int] = set()
    due: float = NEVER
    """When its phase ends."""
    passed_in: int | None = None
    """The report that says that the watch ended well; it is committed once that was delivered."""
    passed: bool = False


class Device:
    """One device. Times are seconds of a clock that never goes back; `wall` gives what the device takes for the time."""

    def __init__(
        self, member: Member, pace: Pace, voice: Voice, known: Callable[[ReleaseRef], Known | None], wall: Callable[[], float],
        bad: Collection[ReleaseRef],
    ) -> None:  # fmt: skip
        """`known` tells of a release what its manifest says, None while that has not come. `bad`: the releases with which the
        device behaves as it is to.
        """
        self.member, self._pace, self._voice, self._known, self._wall = member, pace, voice, known, wall
        self._bad = bad
        self.models = {
            name: Running(name, serving=release, committed={release}, wanted=release) for name, release in member.runs.items()
        }
        self.assignment: Assignment | None = None
        self.groups = member.groups
        self.muted = False
        """It hangs: nothing more is sent, nor read."""
        self.spoilt = False
        """What it reports from now on does not bear its signature."""
        self.fetch: Callable[[ReleaseRef], None] | None = None
        """Begins to fetch a release for real; `fetched` says when that is done."""
        self.missing: set[ReleaseRef] = set()
        """Releases that it would begin with, if it had their manifests."""
        self._connected = False
        self._dirty = True
        self._reported_at = -NEVER
        self._heartbeat_at = NEVER

    # -- what the shell tells ----------------------------------------------------------------------------------------------

    def connected(self, now: float) -> None:
        self._connected, self._dirty = True, True
        if self._heartbeat_at is NEVER:
            self._heartbeat_at = now + self._pace.first_heartbeat_s()

    def disconnected(self) -> None:
        self._connected = False
        for model in self.models.values():
            model.passed_in = None  # it is said again

    def hear(self, assignment: Assignment, groups: tuple[str, ...], now: float) -> None:
        """The fleet's word, newer or the same. An older one is no news."""
        if self.assignment is not None and assignment.version < self.assignment.version:
            return
        self.assignment, self.groups = assignment, groups
        self.missing.clear()
        for name, rules in assignment.models.items():
            model = self.models.setdefault(name, Running(name))
            self._follow(model, wanted(rules, self.member.id, groups, self.member.hardware_class), now)
        self._dirty = True

    def fetched(self, ref: ReleaseRef, now: float, problem: str = "") -> None:
        """A release that was fetched for real is here, or could not be had; then it is tried again."""
        model = self.models[ref.model]
        if model.phase is Phase.FETCHING and model.target == ref.version:
            if problem:
                self._answer(model, Outcome.FAILED, Reason.DOWNLOAD_FAILED, problem)
                self._begin(model, Wanted(ref.version, rollout=model.rollout, attempt=model.attempt), now)
            else:
                model.due = now

    def delivered(self, report: int, now: float) -> None:
        """The broker has the report."""
        for model in self.models.values():
            if model.passed and model.passed_in is not None and report >= model.passed_in:
                self._commit(model)
        self.step(now)

    def step(self, now: float) -> None:
        """Does what is due."""
        for model in self.models.values():
            if now >= model.due and not self.muted:
                self._advance(model, now)
        if not self._connected or self.muted:
            return
        if now >= self._heartbeat_at:
            self._heartbeat_at, self._dirty = now + self._pace.heartbeat_s, True
        if self._dirty and now >= self._reported_at + REPORT_PAUSE_S:
            self._report(now)

    def beat(self, now: float) -> None:
        """Makes the next heartbeat due now."""
        self._heartbeat_at = now
        self.step(now)

    def next_at(self) -> float:
        """When something is due."""
        if self.muted:
            return NEVER
        due = min((model.due for model in self.models.values()), default=NEVER)
        if not self._connected:
            return due
        return min(due, self._reported_at + REPORT_PAUSE_S if self._dirty else self._heartbeat_at)

    @property
    def busy(self) -> bool:
        """Whether an update is under way."""
        return any(model.phase in BUSY for model in self.models.values())

    # -- an update ---------------------------------------------------------------------------------------------------------

    def _follow(self, model: Running, said: Wanted, now: float) -> None:
        model.wanted = said.release
        if model.name in self.member.held or said.mode == "shadow":
            return
        if model.phase in BUSY:
            if model.target == said.release:
                model.rollout = said.rollout
                return
            self._overtaken(model)
        if said.release is None:
            model.serving, model.phase = None, Phase.STEADY
        elif said.release == model.serving:
            model.phase = Phase.STEADY
        elif any(answer.release == said.release and answer.attempt >= said.attempt for answer in model.quarantined):
            model.phase = Phase.QUARANTINED
        else:
            self._begin(model, said, now)

    @staticmethod
    def _overtaken(model: Running) -> None:
        if model.phase in {Phase.WATCHING, Phase.ROLLING_BACK}:
            model.serving = model.before
        model.phase, model.target, model.due, model.passed, model.passed_in = Phase.STEADY, None, NEVER, False, None

    def _begin(self, model: Running, said: Wanted, now: float) -> None:
        assert said.release is not None
        ref = ReleaseRef(model.name, said.release)
        if self._known(ref) is None:
            self.missing.add(ref)
            return
        model.target, model.before, model.rollout, model.attempt = said.release, model.serving, said.rollout, said.attempt
        model.quarantined = [answer for answer in model.quarantined if answer.release != said.release]
        model.phase, model.passed, model.passed_in = Phase.FETCHING, False, None
        self.spoilt |= ref in self._bad and self.member.behaviour in {Behaviour.UNSIGNED, Behaviour.WRONG_KEY}
        self._voice.event("update-started", f"release {ref} is wanted", model=model.name, release=said.release)
        if said.release in model.committed:  # it was here before, and is known to be good
            self._enter(model, Phase.ACTIVATING, now)
        elif self.fetch is not None:
            model.due = NEVER
            self._dirty = True
            self.fetch(ref)
        else:
            self._enter(model, Phase.FETCHING, now)

    def _enter(self, model: Running, phase: Phase, now: float) -> None:
        model.phase, self._dirty = phase, True
        model.due = now + self._pace.phase_s(phase)

    def _advance(self, model: Running, now: float) -> None:
        """The model's phase is over."""
        assert model.target is not None
        does = self.member.behaviour if ReleaseRef(model.name, model.target) in self._bad else Behaviour.HONEST
        if model.phase is Phase.FETCHING:
            self._enter(model, Phase.TRIALING, now)
        elif model.phase is Phase.TRIALING and does is Behaviour.REFUSING:
            self._refuse(model, Outcome.REFUSED, Reason.GOLDEN_MISMATCH, "a golden case gave other outputs (simulated)")
        elif model.phase is Phase.TRIALING:
            self._enter(model, Phase.ACTIVATING, now)
        elif model.phase is Phase.ACTIVATING and does is Behaviour.SILENT:
            self.muted = True
        elif model.phase is Phase.ACTIVATING:
            model.serving = model.target
            self._enter(model, Phase.WATCHING, now)
        elif model.phase is Phase.WATCHING and does is Behaviour.ROLLING_BACK:
            self._enter(model, Phase.ROLLING_BACK, now)
        elif model.phase is Phase.WATCHING:
            model.passed, model.passed_in, model.due, self._dirty = True, None, NEVER, True
        elif model.phase is Phase.ROLLING_BACK:
            model.serving = model.before
            self._refuse(model, Outcome.ROLLED_BACK, Reason.ERROR_RATIO, "too many predictions failed (simulated)")

    def _refuse(self, model: Running, outcome: Outcome, reason: Reason, message: str) -> None:
        answer = self._answer(model, outcome, reason, message)
        model.quarantined.append(answer)
        release, model.target = model.target, None
        model.phase, model.due = Phase.QUARANTINED, NEVER
        name = "refused" if outcome is Outcome.REFUSED else "rolled-back"
        self._voice.event(name, message, model=model.name, release=release, reason=reason.value)

    def _commit(self, model: Running) -> None:
        release = model.target
        assert release is not None
        self._answer(model, Outcome.COMMITTED, None, "its watch ended well")
        model.committed.add(release)
        model.phase, model.target, model.passed, model.passed_in = Phase.STEADY, None, False, None
        self._voice.event("committed", f"release {release} stays: its watch ended well", model=model.name, release=release)

    def _answer(self, model: Running, outcome: Outcome, reason: Reason | None, message: str) -> Answer:
        assert model.target is not None
        answer = Answer(
            release=model.target, outcome=outcome, rollout=model.rollout, reason=reason.value if reason else None,
            message=message, at=self._wall(), attempt=model.attempt,
        )  # fmt: skip
        model.answers = [*model.answers, answer][-ANSWERS_KEPT:]
        self._dirty = True
        return answer

    # -- what it says ------------------------------------------------------------------------------------------------------

    def _report(self, now: float) -> None:
        self._dirty, self._reported_at = False, now
        said = {name: self._state(model) for name, model in self.models.items()}
        number = self._voice.report(said, assignment=self.assignment.version if self.assignment is not None else None)
        if number is None:
            self._dirty = True
            return
        for model in self.models.values():
            if model.passed and model.passed_in is None:
                model.passed_in = number

    def _state(self, model: Running) -> ModelState:
        ref = ReleaseRef(model.name, model.serving) if model.serving is not None else None
        serves = self._known(ref) if ref is not None else None
        sha256 = serves.sha256 if serves is not None else None
        if self.member.behaviour is Behaviour.WRONG_DIGEST and ref in self._bad:
            sha256 = OTHER_BYTES
        return ModelState(
            serving=model.serving, sha256=sha256, phase=model.phase, wanted=model.wanted, target=model.target,
            previous=model.before, variant=serves.variant if serves is not None else None, placement="cpu",
            answers=tuple(model.answers), quarantined=tuple(model.quarantined), held=model.name in self.member.held,
            passed=model.passed,
        )  # fmt: skip
