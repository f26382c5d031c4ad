"""SHADOWING: the candidate runs beside the active release, on copies of live requests; afterwards it waits for the rollout.

Nobody's answer comes from it, so whatever goes wrong here costs memory and idle time only. What it waits for ends it: its rules
say for how long it is compared, the rollout when it may serve, and something else being wanted ends both.
"""

from __future__ import annotations

import msgspec

from agent.config import SyncSettings
from agent.contract.acceptance import ShadowRules
from agent.contract.reasons import Reason
from agent.contract.reports import Outcome
from agent.store import StoreError
from agent.sync.gates import shadow, watch
from agent.sync.gates.shadow import Shadowed
from agent.sync.problems import Problem, store_problem
from agent.sync.serving import ServeAway, ServeRefused, ServeStatus, ServingPort, ShadowStatus
from agent.sync.updating import update
from agent.sync.updating.admission import Admission
from agent.sync.updating.device import Device
from agent.sync.updating.endings import Endings
from agent.sync.updating.manifests import missing
from agent.sync.updating.model import AGAIN_S, AT_ONCE, REST_S, ModelUpdate
from agent.sync.updating.update import Event
from agent.sync.updating.wanted import WantedReleases

SAVE_S = 10.0
"""How much of it a crash of `sync` may make it repeat."""

NOT_OFFERED = frozenset({"stateful", "not_found", ""})
"""Words of `serve` for a model whose requests cannot be run again, and of one that is older than this."""


class Shadowing:
    """`serve` may restart between any two steps, and so may this process."""

    def __init__(
        self,
        wanted: WantedReleases,
        admission: Admission,
        endings: Endings,
        serving: ServingPort,
        settings: SyncSettings,
        device: Device,
    ) -> None:
        self._wanted = wanted
        self._admission = admission
        self._endings = endings
        self._serving = serving
        self._settings = settings
        self._device = device

    def step(self, one: ModelUpdate) -> float:
        if self._wanted.overtaken(one):
            self._end(one)
            self._endings.overtaken(one)
            return AT_ONCE
        rules = self._admission.acceptance(one).shadow or ShadowRules()
        if _running(one):
            pause_s = self._compare(one, rules)
            if pause_s is not None:
                return pause_s
        why_not = self._admission.why_not(one)
        if why_not == "overtaken":
            return AT_ONCE
        pause_s = self._settings.watch_poll_s if _running(one) else REST_S
        if why_not == "shadow" or (_running(one) and rules.required) or self._wanted.expired(one.model) is not None:
            return pause_s
        if why_not is None:
            one.to(self._admission.to_serve(one, Event.TO_SERVE))
        else:
            self._end(one)
            self._admission.note_waiting(one, why_not)
            one.to(Event.PASSED_EARLY, waiting_for=why_not)
        return AT_ONCE

    def _compare(self, one: ModelUpdate, rules: ShadowRules) -> float | None:
        """Reads once how it does. None to go on; else when the next step is due."""
        try:
            status = self._serving.status()
            numbers = self._numbers(one, status, rules)
        except ServeAway as away:
            one.problem = str(away)
            status, numbers = None, None
        except ServeRefused as refused:
            return self._refused_by_serve(one, refused, rules)
        except StoreError as error:
            return self._endings.put_off(one, Problem(Reason.STORE_FAILED, missing(one.ref, error)))
        shadowed = one.state.shadowed
        if shadowed is None or shadowed.verdict != "running":
            return AGAIN_S if shadowed is None else None
        torn_away = watch.torn_away(shadowed.watched, self._device.boot, self._device.lives())
        shadowed = self._observe(one, shadowed, status, numbers)
        if torn_away:
            one.save(one.state.but(interruptions=one.state.interruptions + 1))
            if update.interrupted_too_often(one.state):
                message = f"the machine was restarted {one.state.interruptions} times while it ran beside the active release"
                return self._refuse(one, Problem(Reason.INTERRUPTED_TOO_OFTEN, message))
        return self._judge(one, shadowed, rules, numbers)

    def _numbers(self, one: ModelUpdate, status: ServeStatus, rules: ShadowRules) -> ShadowStatus | None:
        """What came of it so far, from a shadow that runs: it is begun where there is none. None when there is nothing to be
        beside.

        Raises: ServeAway, ServeRefused.
        """
        model, target = status.model(one.model), one.choice
        if model.serving is None or model.active == target.version:
            self._skip(one, "nothing serves that it could be compared with")
            return None
        if one.state.shadowed is None:
            watched = watch.Watched(
                baseline=None, instance=status.instance, agent_version=status.agent_version, boot=self._device.boot
            )
            one.memory.observed_at = None
            one.save(one.state.but(shadowed=Shadowed(watched=watched)))
        said = self._serving.shadow_numbers(one.model)
        if said.version == target.version and (said.state == "running" or said.failed):
            return said
        self._serving.load(one.model, target.version, target.variant)
        said = self._serving.shadow(one.model, target.version, rules)
        assert one.state.shadowed is not None
        one.state = one.state.but(shadowed=one.state.shadowed.anew())
        return said

    def _observe(
        self, one: ModelUpdate, shadowed: Shadowed, status: ServeStatus | None, numbers: ShadowStatus | None
    ) -> Shadowed:
        """Adds what `serve` says to what is in memory; saves it now and then."""
        sample = watch.Sample(status.instance, status.agent_version, one.version, None) if status else None
        watched = watch.observe(shadowed.watched, one.version, sample, one.passed_s(), self._device.boot, self._device.lives())
        shadowed = msgspec.structs.replace(shadowed, watched=watched)
        if numbers is not None:
            shadowed = msgspec.structs.replace(shadowed, current=numbers.counts(), throttled=numbers.throttled)
        one.state = one.state.but(shadowed=shadowed)
        if watched.elapsed_s - one.memory.saved_s >= SAVE_S:
            one.memory.saved_s = watched.elapsed_s
            try:
                one.save(one.state)
            except OSError as error:
                one.problem = store_problem(error, f"the shadow of model {one.model!r}").message
        return shadowed

    def _judge(self, one: ModelUpdate, shadowed: Shadowed, rules: ShadowRules, numbers: ShadowStatus | None) -> float | None:
        given_up = numbers.ended if numbers is not None and numbers.failed else None
        verdict = shadow.judge(shadowed, rules, given_up)
        if isinstance(verdict, watch.RollBack):
            return self._refuse(one, Problem(verdict.reason, verdict.message, verdict.evidence))
        if isinstance(verdict, watch.Commit):
            one.note("shadow", "passed", verdict.message, evidence=verdict.evidence)
            self._end(one)
            answer = one.answer(Outcome.SHADOWED, None, verdict.message, verdict.evidence)
            answers = update.keep_answers(one.state.answers, answer)
            one.apply(one.state.but(shadowed=shadowed.ended("passed", verdict.message), answers=answers))
            one.say("shadowed", f"release {answer.release}: {verdict.message}", release=answer.release)
        return None

    def _refuse(self, one: ModelUpdate, problem: Problem) -> float:
        self._end(one)
        return self._endings.refuse(one, problem, one.state.manifest or "")

    def _end(self, one: ModelUpdate) -> None:
        """Gives its memory back: a shadow ends with its version. What `serve` does not do now is done at rest."""
        one.asked(lambda: self._serving.unload(one.model, one.version))

    def _skip(self, one: ModelUpdate, why: str) -> None:
        shadowed = one.state.shadowed or Shadowed(
            watched=watch.Watched(baseline=None, instance="", agent_version="", boot=self._device.boot)
        )
        message = f"not run beside the active release: {why}"
        one.note("shadow", "passed", message)
        one.apply(one.state.but(shadowed=shadowed.ended("skipped", message)))
        one.say("not-shadowed", message, release=one.version)

    def _refused_by_serve(self, one: ModelUpdate, refused: ServeRefused, rules: ShadowRules) -> float | None:
        """`serve` does not run it beside the active one."""
        if refused.code == "no_memory":
            if rules.without_memory == "wait":
                one.problem = f"waits for memory to run release {one.ref} beside the active one: {refused}"
                return REST_S
            self._skip(one, str(refused))
        elif refused.code == "not_in_store":
            return self._endings.put_off(one, Problem(Reason.STORE_FAILED, str(refused)))
        elif refused.code == "model_invalid":
            return self._refuse(one, Problem(Reason.LOAD_FAILED, str(refused)))
        elif refused.code in NOT_OFFERED:
            self._end(one)
            self._skip(one, str(refused))
        else:  # not_loaded, no_active, busy, …: `serve` is in the middle of something, or was restarted between two questions
            one.problem = str(refused)
            return AGAIN_S
        return None


def _running(one: ModelUpdate) -> bool:
    return one.state.shadowed is None or one.state.shadowed.verdict == "running"
