"""STEADY and QUARANTINED: nothing is under way. What is wanted is compared with what is selected, and `serve` with both."""

from __future__ import annotations

from agent.contract.assignment import Wanted
from agent.contract.reports import Outcome, Phase
from agent.store import Choice, Selection
from agent.sync.ports import Clock
from agent.sync.serving import ServeStatus, ServingPort
from agent.sync.updating import update
from agent.sync.updating.approvals import Approvals
from agent.sync.updating.model import AT_ONCE, ModelUpdate
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.retention import Housekeeping
from agent.sync.updating.selected import Selected
from agent.sync.updating.update import Event
from agent.sync.updating.wanted import WantedReleases


class Resting:
    """Begins an update when another release is wanted."""

    def __init__(
        self,
        wanted: WantedReleases,
        selected: Selected,
        quarantine: Quarantine,
        approvals: Approvals,
        housekeeping: Housekeeping,
        serving: ServingPort,
        clock: Clock,
    ) -> None:
        self._wanted = wanted
        self._selected = selected
        self._quarantine = quarantine
        self._approvals = approvals
        self._housekeeping = housekeeping
        self._serving = serving
        self._clock = clock

    def step(self, one: ModelUpdate) -> float:
        wanted = self._wanted.of(one.model)
        status = one.asked(self._serving.status)
        selection = self._selected.of(one, status)
        if wanted is None:
            return self._selected.serve_it(one, selection, status)
        if one.state.wanted != wanted.release:
            self._approvals.expire(one.model, wanted.release)
            one.save(one.state.but(wanted=wanted.release))
        if wanted.release is None:
            return self._selected.serve_nothing(one, selection, status)
        if selection and selection.active.version == wanted.release and not self._selected.damaged(one, selection, status):
            return self._in_place(one, selection, wanted, status)
        if self._quarantine.lift(one.model, wanted.release, wanted.attempt):
            one.note(
                "assignment", "retried", f"attempt {wanted.attempt}: what was refused is tried again", release=wanted.release
            )
            one.say("retried", f"release {wanted.release} is tried again, as the fleet asks", release=wanted.release)
        if self._refused_already(one, wanted) or self._wanted.expired(one.model) is not None:
            if selection and self._wanted.withdrawn(one.model, selection.active.version):
                return self._selected.serve_nothing(one, selection, status)
            return self._selected.serve_it(one, selection, status)
        return self._begin(one, wanted, wanted.release, selection)

    def _begin(self, one: ModelUpdate, wanted: Wanted, release: int, selection: Selection | None) -> float:
        self._housekeeping.fetching(one.model, None)
        before = _other_than(release, selection)
        now = self._clock.wall()
        begun = update.begin(
            one.state, now, wanted=release, rollout=wanted.rollout, mode=wanted.mode, before=before, attempt=wanted.attempt
        )
        one.apply(begun)
        one.note("assignment", "wanted", self._why(one.model, wanted), release=release)
        one.say("update-started", f"release {release} is wanted", release=release)
        return AT_ONCE

    def _why(self, model: str, wanted: Wanted) -> str:
        desired = self._wanted.desired
        if self._wanted.held(model) or desired is None:
            return "held by an operator on this device"
        why = f"rollout {wanted.rollout}" if wanted.rollout else "what every device runs"
        return f"{why}, assignment {desired.assignment.version}"

    def _in_place(self, one: ModelUpdate, selection: Selection, wanted: Wanted, status: ServeStatus | None) -> float:
        """What is wanted is what serves. A rollout that wants it gets its answer."""
        if one.state.phase is Phase.QUARANTINED:
            one.rest(Event.IN_PLACE)
        serving = status.model(one.model).serving if status else None
        if wanted.rollout and serving and serving.version == wanted.release and not _answered(one, wanted):
            message = "it was serving here already"
            answer = one.answer(Outcome.COMMITTED, None, message, rollout=wanted.rollout, release=wanted.release)
            one.save(one.state.but(answers=update.keep_answers(one.state.answers, answer)))
        return self._selected.serve_it(one, selection, status)

    def _refused_already(self, one: ModelUpdate, wanted: Wanted) -> bool:
        """A new rollout of a refused release gets an answer of its own: then the manifest is fetched and compared, and no
        more.
        """
        assert wanted.release is not None
        return self._quarantine.names_version(one.model, wanted.release) and _answered(one, wanted)


def _answered(one: ModelUpdate, wanted: Wanted) -> bool:
    return any((answer.release, answer.rollout) == (wanted.release, wanted.rollout) for answer in one.state.answers)


def _other_than(release: int, selection: Selection | None) -> Choice | None:
    """What to roll back to should `release` fail: what serves, or what served before when `release` itself has to be
    repaired.
    """
    if selection is None or selection.active.version != release:
        return selection.active if selection else None
    return selection.previous
