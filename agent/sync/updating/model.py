"""What every phase of an update shares: its state on disk, its surroundings, what is wanted, and how a phase is left."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from agent.config import SyncSettings
from agent.contract.assignment import Wanted
from agent.contract.manifest import Acceptance
from agent.contract.names import ReleaseRef
from agent.contract.reasons import METADATA, Reason
from agent.contract.reports import Answer, Hardware, Outcome, Phase, hardware_class
from agent.lives import Life
from agent.store import Choice, Selection, Store, StoreError
from agent.sync.fetching.downloader import Downloader
from agent.sync.ports import Clock, Releases, Stop
from agent.sync.problems import Problem, Stopped, store_problem
from agent.sync.serving import ServeAway, ServeRefused, ServeStatus, ServingPort
from agent.sync.trials.trial import Trials
from agent.sync.trust.desired import Desired
from agent.sync.trust.leases import Leases
from agent.sync.updating import update
from agent.sync.updating.approvals import Approvals
from agent.sync.updating.holds import Holds
from agent.sync.updating.journal import Entry, Gate, Journal, Verdict
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.retention import Housekeeping
from agent.sync.updating.states import States
from agent.sync.updating.update import Event, Failure, UpdateState

REST_S = 5.0
"""How often a model at rest is compared with what `serve` says, when nothing else wakes it."""

AGAIN_S = 1.0
"""How soon to ask a `serve` that did not answer again: systemd needs about a second to restart it."""


HEARD_BEATS = 3
"""So many missed reports are silence, as the fleet server counts them."""


class Deliveries(Protocol):
    """What is known of this device's reports to the fleet. Moments are of the monotonic clock."""

    def since(self, moment: float) -> bool:
        """Whether the broker has a report that was begun after `moment`."""

    def lately(self, within_s: float) -> bool:
        """Whether the broker acknowledged a report in the last `within_s` seconds."""


class Teller(Protocol):
    """Where news goes."""

    def changed(self) -> None:
        """The state of a model changed; a report is due."""

    def say(self, name: str, message: str, *, model: str, release: int | None = None, reason: str | None = None) -> None:
        """An event for people."""


@dataclass(frozen=True)
class Surroundings:
    """Everything an updater needs; shared by the updaters of all models."""

    store: Store
    states: States
    quarantine: Quarantine
    housekeeping: Housekeeping
    releases: Releases
    downloader: Downloader
    trials: Trials
    serving: ServingPort
    clock: Clock
    settings: SyncSettings
    hardware: Callable[[], Hardware]
    desired: Callable[[], Desired | None]
    teller: Teller
    boot: str
    lives: Callable[[], Sequence[Life]]
    """The processes that served here, oldest first, as `serve` noted them."""
    holds: Holds
    journal: Journal
    approvals: Approvals
    leases: Leases
    deliveries: Deliveries
    engine_threads: int = 1
    jitter: Callable[[], float] = random.random
    colleague: Callable[[str], ModelWork | None] = lambda _model: None
    """The work of another model, for releases that switch together."""
    joint: AbstractContextManager[object] = field(default_factory=threading.RLock)
    """Held while the states of several models change together."""


class ModelWork:
    """One model. One thread works on it; `state`, `progress` and `problem` may be read by others."""

    def __init__(self, model: str, surroundings: Surroundings) -> None:
        self.model = model
        self.progress: float | None = None
        self.problem: str | None = None
        self.stopped: str | None = None
        self.lease_s: float | None = None
        self._serving_lease_s: float | None = None
        """Of what served when this step began."""
        self.busy = False
        """`serve` is being asked for something that a switch must not overtake. Changes under `joint` when a switch could begin."""
        stored = surroundings.states.load(model)
        self.state = update.resumed(stored)
        self._s = surroundings
        self._ending: Stop = lambda: False
        self._watch_saved_s = 0.0
        self._looked: float | None = None
        self._condemned: Failure | None = None
        """Why the target must not stay, while that cannot be written: what is seen meanwhile, of a target that was stopped, changes nothing."""
        if self.state != stored:
            surroundings.states.save(self.state)

    @property
    def held(self) -> bool:
        """Whether an operator on the device said that this model stays on one release."""
        return self._s.holds.pinned(self.model) is not None

    # -- how a phase is left ---------------------------------------------------------------------------------------------

    def _left_behind(self) -> float | None:
        """Before anything serves: forget the update when something else is wanted. None when it is to go on."""
        if not self._overtaken():
            return None
        self._note(self._gate(), "overtaken", self._overtaken_by().message)
        self._s.housekeeping.fetched(self.model)
        self._apply(update.rest(self.state, Event.OVERTAKEN, self._s.clock.wall()))
        return 0.0

    def _wanted(self) -> Wanted | None:
        """What the fleet wants, or what an operator on the device holds the model on; None before the fleet ever spoke."""
        return self._wanted_by(self._s.desired())

    def _wanted_by(self, desired: Desired | None) -> Wanted | None:
        """`_wanted`, by this word of the fleet. What is decided from several questions asks all of them of one word: another may come
        between two.
        """
        pinned = self._s.holds.pinned(self.model)
        if pinned is not None and not (desired and desired.withdrawn(self.model, pinned)):
            return Wanted(pinned)
        if desired is None:
            return None
        return desired.wanted(self.model, self._hardware_class() if desired.depends_on_hardware(self.model) else "")

    def _hardware_class(self) -> str:
        return hardware_class(self._s.hardware())

    def _overtaken(self) -> bool:
        wanted = self._wanted()
        return wanted is not None and wanted.release != self.state.target

    def _overtaken_by(self) -> Failure:
        desired, target = self._s.desired(), self.state.target
        if desired and target is not None and desired.withdrawn(self.model, target):
            return Failure(reason=Reason.WITHDRAWN, message=f"release {target} was withdrawn")
        return Failure(reason=Reason.OPERATOR, message=f"release {target} is no longer wanted")

    def _expired(self) -> Problem | None:
        """Why nothing may be installed now. Going back by hand to what was proved here needs nobody's fresh word."""
        desired = self._s.desired()
        if self.held:
            return None
        if desired is not None and desired.fresh(self._s.clock.wall()):
            return None
        return Problem(
            Reason.EXPIRED_METADATA, "what the fleet last said has expired: nothing is installed until it can be reached"
        )

    def _lease_over(self, version: int) -> Failure | None:
        """Why the release may not serve now although nothing is wrong with it; None when it may."""
        try:
            lease_s = self._s.store.manifest(ReleaseRef(self.model, version)).acceptance.lease_s
        except StoreError:
            self.lease_s = None
            return None
        self.lease_s = lease_s
        why_not = self._s.leases.over(lease_s) if lease_s is not None else None
        return Failure(reason=Reason.LEASE_ENDED, message=f"release {version}: {why_not}") if why_not else None

    def _should_stop(self) -> bool:
        return self._ending() or self._overtaken() or self._lease_ran_out()

    def _lease_ran_out(self) -> bool:
        """Of what serves, while one step takes long: a download waits for its hour, or trickles."""
        return self._serving_lease_s is not None and self._s.leases.over(self._serving_lease_s) is not None

    def _stopped(self) -> float:
        if self._ending():
            raise Stopped
        if self.state.trial_began:  # it will wait for another turn
            self._save(self.state.but(trial_began=False), quietly=True)
        return 0.0  # overtaken, or what serves has to stop: the next step sees it

    def _put_off(self, problem: Problem) -> float:
        self._apply(self._put_off_state(problem))
        return 0.0

    def _put_off_state(self, problem: Problem) -> UpdateState:
        """The state after PUT_OFF; people are told."""
        outcome = Outcome.FAILED if problem.retryable or self.state.manifest else Outcome.REFUSED
        answer = self._answer(outcome, problem.reason, problem.message, problem.evidence)
        failure = Failure(reason=problem.reason, message=problem.message, evidence=problem.evidence)
        self._note(self._gate(), "put off", problem.message, reason=problem.reason, evidence=problem.evidence)
        if self.state.tries == 0:
            self._say("put-off", problem.message, release=self.state.target, reason=problem.reason.value)
        judged_by = self._metadata() if problem.reason in METADATA and not self.state.manifest else None
        return update.put_off(self.state, self._s.clock.wall(), failure, self._s.jitter(), answer, judged_by=judged_by)

    def _metadata(self) -> str:
        desired = self._s.desired()
        return desired.metadata if desired is not None else ""

    def _refuse(self, problem: Problem, manifest: str) -> float:
        answer = self._answer(Outcome.REFUSED, problem.reason, problem.message, problem.evidence)
        self._s.quarantine.add(self.model, manifest, answer)
        self._s.housekeeping.fetched(self.model)
        self._note(self._gate(), "refused", problem.message, reason=problem.reason, evidence=problem.evidence)
        self._apply(update.rest(self.state, Event.REFUSED, self._s.clock.wall(), answer))
        self._say("refused", problem.message, release=answer.release, reason=answer.reason)
        self._s.housekeeping.need(self.model, versions(self._s.store.selection(self.model)))
        self._s.housekeeping.collect()
        return 0.0

    def _bad(self, event: Event, failure: Failure) -> float:
        self._apply(update.after(self.state, event, self._s.clock.wall(), failure=failure))
        return 0.0

    def _answer(
        self,
        outcome: Outcome,
        reason: Reason | None,
        message: str,
        evidence: dict[str, float | str] | None = None,
        *,
        rollout: str | None = None,
        release: int | None = None,
    ) -> Answer:
        return Answer(
            release=release if release is not None else self._choice_version,
            outcome=outcome,
            rollout=rollout or self.state.rollout,
            reason=reason.value if reason else None,
            message=message,
            at=self._s.clock.wall(),
            evidence=evidence or {},
        )

    # -- small things ------------------------------------------------------------------------------------------------------

    @property
    def _choice_version(self) -> int:
        assert self.state.target is not None
        return self.state.target

    @property
    def _ref(self) -> ReleaseRef:
        return ReleaseRef(self.model, self._choice_version)

    @property
    def _choice(self) -> Choice:
        assert self.state.variant is not None
        return Choice(version=self._choice_version, variant=self.state.variant)

    def _acceptance(self) -> Acceptance:
        """What the target's publisher demands; the defaults when its manifest was damaged on disk meanwhile."""
        try:
            return self._s.store.manifest(self._ref).acceptance
        except StoreError as error:
            self.problem = str(error)
            return Acceptance()

    def _apply(self, state: UpdateState) -> None:
        """Persists, then lets everybody know."""
        self.progress = None
        self._watch_saved_s = 0.0
        self._save(state)
        self._condemned = None

    def _apply_all(self, changes: Sequence[tuple[ModelWork, UpdateState]], *, quietly: bool = False) -> None:
        """`_apply` for several models: all of them or none, on disk as in memory."""
        with self._s.joint:
            if len(changes) > 1:
                self._s.states.save_together([state for _, state in changes])
            for one, state in changes:
                if len(changes) == 1:
                    self._s.states.save(state)
                one.progress, one._watch_saved_s, one._condemned, one.state = None, 0.0, None, state  # noqa: SLF001 - of our own class
        if not quietly:
            self._s.teller.changed()

    def _save(self, state: UpdateState, *, quietly: bool = False) -> None:
        self._s.states.save(state)
        self.state = state
        if not quietly:
            self._s.teller.changed()

    def _status(self) -> ServeStatus | None:
        try:
            return self._s.serving.status()
        except (ServeAway, ServeRefused) as error:
            self.problem = str(error)
            return None

    def _ask(self, action: Callable[[], None]) -> None:
        """Something that is tried again at the next rest when it does not work now."""
        try:
            action()
        except (ServeAway, ServeRefused) as error:
            self.problem = str(error)

    def _passed_s(self) -> float:
        """Since the last look; 0 at the first one."""
        now = self._s.clock.monotonic()
        passed_s = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        return passed_s

    def _gate(self) -> Gate:
        """The gate that the phase is."""
        return _GATES.get(self.state.phase, "fetch")

    def _note(
        self,
        gate: Gate,
        verdict: Verdict,
        message: str,
        *,
        reason: Reason | None = None,
        evidence: Mapping[str, float | str] | None = None,
        release: int | None = None,
    ) -> None:
        """A line for `edge-agent why`. It never stands in the way."""
        state = self.state
        entry = Entry(
            at=self._s.clock.wall(),
            release=release if release is not None else state.target,
            gate=gate,
            verdict=verdict,
            message=message,
            reason=reason.value if reason else None,
            rollout=state.rollout,
            evidence=dict(evidence or {}),
        )
        try:
            self._s.journal.add(self.model, entry)
        except OSError as error:
            self.problem = store_problem(error, f"writing the journal of model {self.model!r}").message

    def _say(self, name: str, message: str, *, release: int | None = None, reason: str | None = None) -> None:
        self._s.teller.say(name, message, model=self.model, release=release, reason=reason)


_GATES: Mapping[Phase, Gate] = MappingProxyType({
    Phase.FETCHING: "fetch",
    Phase.TRIALING: "trial",
    Phase.SHADOWING: "shadow",
    Phase.CANARYING: "canary",
    Phase.ACTIVATING: "activation",
    Phase.WATCHING: "watch",
    Phase.ROLLING_BACK: "watch",
})  # fmt: skip


def versions(selection: Selection | None) -> set[int]:
    if selection is None:
        return set()
    return {selection.active.version} | ({selection.previous.version} if selection.previous else set())
