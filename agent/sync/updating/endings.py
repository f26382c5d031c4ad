"""How an update leaves the phases in which nothing of it serves yet: put off, refused, overtaken, or given up for now."""

from __future__ import annotations

from collections.abc import Callable

from agent.contract.reasons import METADATA
from agent.contract.reports import Outcome
from agent.sync.ports import Clock
from agent.sync.problems import Problem, Stopped
from agent.sync.updating import update
from agent.sync.updating.admission import Admission
from agent.sync.updating.model import AT_ONCE, ModelUpdate
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.retention import Housekeeping
from agent.sync.updating.update import Event, Failure, UpdateState
from agent.sync.updating.wanted import WantedReleases


class Endings:
    """Ends an update early. What comes next is due at once; the answer of a phase that ended so is AT_ONCE."""

    def __init__(
        self,
        wanted: WantedReleases,
        admission: Admission,
        quarantine: Quarantine,
        housekeeping: Housekeeping,
        clock: Clock,
        jitter: Callable[[], float],
    ) -> None:
        """`jitter` gives numbers from 0 to 1, which spread a fleet that failed together."""
        self._wanted = wanted
        self._admission = admission
        self._quarantine = quarantine
        self._housekeeping = housekeeping
        self._clock = clock
        self._jitter = jitter

    def overtaken(self, one: ModelUpdate) -> bool:
        """Forgets the update when something else is wanted, before anything of it serves. Whether it did."""
        if not self._wanted.overtaken(one):
            return False
        one.note(one.gate, "overtaken", self._wanted.overtaken_by(one).message)
        self._housekeeping.fetched(one.model)
        one.rest(Event.OVERTAKEN)
        return True

    def put_off(self, one: ModelUpdate, problem: Problem) -> float:
        """PUT_OFF: it is tried again later."""
        one.apply(self.put_off_state(one, problem))
        return AT_ONCE

    def put_off_state(self, one: ModelUpdate, problem: Problem) -> UpdateState:
        """The state after PUT_OFF, which is not applied yet; people are told."""
        outcome = Outcome.FAILED if problem.retryable or one.state.manifest else Outcome.REFUSED
        answer = one.answer(outcome, problem.reason, problem.message, problem.evidence)
        failure = Failure(reason=problem.reason, message=problem.message, evidence=problem.evidence)
        one.note(one.gate, "put off", problem.message, reason=problem.reason, evidence=problem.evidence)
        if one.state.tries == 0:
            one.say("put-off", problem.message, release=one.state.target, reason=problem.reason.value)
        judged_by = self._wanted.metadata if problem.reason in METADATA and not one.state.manifest else None
        return update.put_off(
            one.state, self._clock.wall(), failure, self._jitter(), answer, judged_by=judged_by, wait_s=problem.wait_s
        )

    def refuse(self, one: ModelUpdate, problem: Problem, manifest: str) -> float:
        """REFUSED: the release with this manifest (by sha256) is not tried here again."""
        answer = one.answer(Outcome.REFUSED, problem.reason, problem.message, problem.evidence)
        self._quarantine.add(one.model, manifest, answer)
        self._housekeeping.fetched(one.model)
        one.note(one.gate, "refused", problem.message, reason=problem.reason, evidence=problem.evidence)
        one.rest(Event.REFUSED, answer)
        one.say("refused", problem.message, release=answer.release, reason=answer.reason)
        self._housekeeping.need_selected(one.model)
        self._housekeeping.collect()
        return AT_ONCE

    def should_stop(self, one: ModelUpdate) -> bool:
        """Whether long work has to be given up: the process ends, something else is wanted, or what serves has to stop."""
        return one.ending() or self._wanted.overtaken(one) or self._admission.lease_ran_out(one)

    def given_up(self, one: ModelUpdate) -> float:
        """After long work was given up; the next step sees why.  Raises: Stopped when the process ends."""
        if one.ending():
            raise Stopped
        if one.state.trial_began:  # it will wait for another turn
            one.save(one.state.but(trial_began=False), quietly=True)
        return AT_ONCE
