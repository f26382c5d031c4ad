"""TRIALING: the release runs in a throw-away process, on its golden cases and within its limits."""

from __future__ import annotations

from agent.config import SyncSettings
from agent.contract.reasons import Reason
from agent.store import Store, StoreError
from agent.sync.problems import Problem, Stopped, store_problem
from agent.sync.trials.trial import Trials, make_request
from agent.sync.updating import update
from agent.sync.updating.admission import Admission
from agent.sync.updating.endings import Endings
from agent.sync.updating.manifests import Manifests, missing
from agent.sync.updating.model import AT_ONCE, ModelUpdate
from agent.sync.updating.update import Event


class Trialing:
    """Tries the target, and sends what passed on its way to serve."""

    def __init__(
        self,
        admission: Admission,
        endings: Endings,
        manifests: Manifests,
        trials: Trials,
        store: Store,
        settings: SyncSettings,
        engine_threads: int,
    ) -> None:
        self._admission = admission
        self._endings = endings
        self._manifests = manifests
        self._trials = trials
        self._store = store
        self._settings = settings
        self._engine_threads = engine_threads

    def step(self, one: ModelUpdate) -> float:
        if self._endings.overtaken(one):
            return AT_ONCE
        state = one.state
        if update.interrupted_too_often(state):
            message = f"its trial was cut off {state.interruptions} times by a crash or a power cut"
            return self._endings.refuse(one, Problem(Reason.INTERRUPTED_TOO_OFTEN, message), state.manifest or "")
        try:
            self._try(one)
        except (StoreError, KeyError) as error:
            message = missing(one.ref, error)
            return self._endings.put_off(one, Problem(Reason.STORE_FAILED, message))
        except OSError as error:
            return self._endings.put_off(one, store_problem(error, f"starting the trial of release {one.ref}"))
        except Problem as problem:
            if problem.retryable:
                return self._endings.put_off(one, problem)
            return self._endings.refuse(one, problem, state.manifest or "")
        except Stopped:
            return self._endings.given_up(one)
        self._passed(one)
        return AT_ONCE

    def _try(self, one: ModelUpdate) -> None:
        """Raises: Problem when it does not pass; Stopped; StoreError or KeyError when the store lost it; OSError."""
        manifest = self._manifests.get(one.ref)
        timeout_s = min(self._settings.trial_timeout_s, manifest.acceptance.max_trial_s)
        request = make_request(
            self._store,
            manifest,
            manifest.variant(one.state.variant or ""),
            memory_bytes=self._settings.trial_memory_bytes,
            timeout_s=timeout_s,
            threads=self._engine_threads,
        )

        def begins() -> None:
            """Its turn has come. On disk before it starts, because what it does to the machine is put down to it.  Raises:
            OSError.
            """
            one.save(one.state.but(trial_began=True), quietly=True)

        numbers = self._trials.run(request, timeout_s, lambda: self._endings.should_stop(one), begins)
        one.note("trial", "passed", _cases(len(request.cases)), evidence=numbers)

    def _passed(self, one: ModelUpdate) -> None:
        why_not = self._admission.why_not(one)
        if why_not == "overtaken":
            return  # the next step sees it
        if why_not == "shadow" or self._admission.shadows_first(one):
            one.to(Event.PASSED_AS_SHADOW, interruptions=0)
        elif why_not is None:
            one.to(self._admission.to_serve(one, Event.PASSED), interruptions=0)
        else:
            self._admission.note_waiting(one, why_not)
            one.to(Event.PASSED_EARLY, interruptions=0, waiting_for=why_not)


def _cases(number: int) -> str:
    if not number:
        return "it loads and runs; it has no golden case"
    return "1 golden case agrees" if number == 1 else f"{number} golden cases agree"
