"""WAITING: for the time to try again, for its window, for approval, or for the releases that switch together with it."""

from __future__ import annotations

from agent.contract.reasons import Reason
from agent.contract.reports import Outcome
from agent.sync.ports import Clock, Deliveries
from agent.sync.serving import ServingPort
from agent.sync.updating import update
from agent.sync.updating.admission import Admission
from agent.sync.updating.endings import Endings
from agent.sync.updating.model import AT_ONCE, REST_S, ModelUpdate
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.selected import Selected
from agent.sync.updating.team import Teams
from agent.sync.updating.update import Event
from agent.sync.updating.wanted import WantedReleases


class Waiting:
    """Called with the teams' lock held, so that nothing comes between finding out that it may go on and going on."""

    def __init__(
        self,
        wanted: WantedReleases,
        admission: Admission,
        endings: Endings,
        teams: Teams,
        selected: Selected,
        quarantine: Quarantine,
        deliveries: Deliveries,
        serving: ServingPort,
        clock: Clock,
    ) -> None:
        self._wanted = wanted
        self._admission = admission
        self._endings = endings
        self._teams = teams
        self._selected = selected
        self._quarantine = quarantine
        self._deliveries = deliveries
        self._serving = serving
        self._clock = clock

    def step(self, one: ModelUpdate) -> float:
        self._stop_withdrawn(one)
        if self._endings.overtaken(one):
            return AT_ONCE
        now = self._clock.wall()
        if one.state.waiting_for != "retry":
            return self._wait_to_serve(one)
        left_s = (one.state.retry_at or 0.0) - now
        if one.state.judged_by not in (None, self._wanted.metadata):
            left_s = 0.0  # what it was put off for says something else now
        if 0 < left_s <= update.longest_wait_s(one.state):
            return min(left_s, REST_S)
        failure = one.state.failure
        if one.state.unreported and (failure is None or failure.reason is not Reason.STORE_FAILED):
            return self._once_more(one, now)
        # What the store lost since is fetched again, and then tried again: nothing of it counts as known any more.
        one.to(Event.RETRY_DUE, waiting_for=None, retry_at=None, unreported=0)
        return AT_ONCE

    def _stop_withdrawn(self, one: ModelUpdate) -> None:
        """While it waits for another that is refused here, so perhaps for ever, nothing serves that nobody may run."""
        desired = self._wanted.desired
        others = {model: release for model, release in (self._wanted.team(one, desired) or {}).items() if model != one.model}
        if not any(self._quarantine.names_version(model, release) for model, release in others.items()):
            return
        status = one.asked(self._serving.status)
        selection = self._selected.of(one, status)
        if selection and desired and desired.withdrawn(one.model, selection.active.version):
            self._selected.serve_nothing(one, selection, status)

    def _wait_to_serve(self, one: ModelUpdate) -> float:
        why_not = self._admission.why_not(one)
        if why_not == one.state.waiting_for == "team":
            return self._teams.begin_when_ready(one)
        if why_not is None:
            if self._wanted.expired(one.model) is None:
                one.to(self._admission.to_serve(one, Event.WINDOW_OPEN), waiting_for=None, failure=None)
                return AT_ONCE
        elif why_not == "overtaken":
            return AT_ONCE
        elif why_not not in {"shadow", one.state.waiting_for}:
            self._admission.note_waiting(one, why_not)
            one.save(one.state.but(waiting_for=why_not))
            return AT_ONCE
        return REST_S

    def _once_more(self, one: ModelUpdate, now: float) -> float:
        """After a release that could not be reported: everything of it is here and was tried, so no network is needed.

        When nothing could be reported since it went, either, it is not what cut the device off, and its answer says so.
        """
        state = one.state
        if not self._deliveries.lately(now - state.since):
            message = "no report got through while the release before served, either: the network is away"
            answer = one.answer(Outcome.FAILED, Reason.CANNOT_REPORT, message)
            state = state.but(answers=update.keep_answers(state.answers, answer))
            one.note("report", "put off", message, reason=Reason.CANNOT_REPORT)
        one.save(state.but(waiting_for="window", retry_at=None))
        return self._wait_to_serve(one)
