"""SHADOWING: the candidate beside the active release, on copies of live requests; and waiting for the rollout afterwards.

Nobody's answer comes from it, so whatever goes wrong here costs memory and idle time only. What it waits for ends it: its rules say for
how long it looks, the rollout when it may serve, and something else being wanted ends both.
"""

from __future__ import annotations

import msgspec

from agent.contract.manifest import ShadowRules
from agent.contract.reasons import Reason
from agent.contract.reports import Outcome
from agent.store import StoreError
from agent.sync.gates import shadow
from agent.sync.gates import watch as watching
from agent.sync.gates.shadow import Shadowed
from agent.sync.problems import Problem, store_problem
from agent.sync.serving import ServeAway, ServeRefused, ServeStatus, ShadowStatus
from agent.sync.updating import update
from agent.sync.updating.model import AGAIN_S, REST_S
from agent.sync.updating.preparing import Preparing
from agent.sync.updating.update import Event

SAVE_S = 10.0
"""How much of it a crash of `sync` may make it repeat."""

NOT_OFFERED = frozenset({"stateful", "not_found", ""})
"""Words of `serve` for a model whose requests cannot be run again, and of one that is older than this."""


class Shadowing(Preparing):
    """One model. `serve` may restart between any two steps, and so may we."""

    def _shadow(self) -> float:
        if self._overtaken():
            self._end_shadow()
            return self._left_behind() or 0.0
        rules = self._shadow_rules()
        if self.state.shadowed is None or self.state.shadowed.verdict == "running":
            pause_s = self._look(rules)
            if pause_s is not None:
                return pause_s
        why_not = self._may_serve()
        if why_not == "overtaken":
            return 0.0
        running = self.state.shadowed is None or self.state.shadowed.verdict == "running"
        pause_s = self._s.settings.watch_poll_s if running else REST_S
        if why_not == "shadow" or (running and rules.required) or self._expired() is not None:
            return pause_s
        if why_not is None:
            self._apply(update.after(self.state, self._to_serve(Event.TO_SERVE), self._s.clock.wall()))
        else:
            self._end_shadow()
            self._note_waiting(why_not)
            self._apply(update.after(self.state, Event.PASSED_EARLY, self._s.clock.wall(), waiting_for=why_not))
        return 0.0

    def _shadow_rules(self) -> ShadowRules:
        return self._acceptance().shadow or ShadowRules()

    def _look(self, rules: ShadowRules) -> float | None:
        """One look at it. None to go on; else when the next step is due."""
        try:
            status = self._s.serving.status()
            numbers = self._numbers(status, rules)
        except ServeAway as away:
            self.problem = str(away)
            status, numbers = None, None
        except ServeRefused as refused:
            return self._not_shadowed(refused, rules)
        except StoreError as error:
            return self._put_off(Problem(Reason.STORE_FAILED, f"release {self._ref} has to be fetched again: {error}"))
        if self.state.shadowed is None or self.state.shadowed.verdict != "running":
            return AGAIN_S if self.state.shadowed is None else None
        torn_away = watching.torn_away(self.state.shadowed.watched, self._s.boot, self._s.lives())
        self._observe(status, numbers)
        if torn_away:
            self._save(self.state.but(interruptions=self.state.interruptions + 1))
            if update.interrupted_too_often(self.state):
                message = f"the machine was restarted {self.state.interruptions} times while it ran beside the active release"
                return self._refuse_shadow(Problem(Reason.INTERRUPTED_TOO_OFTEN, message))
        return self._judge_shadow(rules, numbers)

    def _numbers(self, status: ServeStatus, rules: ShadowRules) -> ShadowStatus | None:
        """What came of it so far, from a shadow that runs: it is begun where there is none. None when there is nothing to be beside.

        Raises: ServeAway, ServeRefused.
        """
        model, target = status.model(self.model), self._choice
        if model.serving is None or model.active == target.version:
            self._skip("nothing serves that it could be compared with")
            return None
        if self.state.shadowed is None:
            watched = watching.Watched(
                baseline=None, instance=status.instance, agent_version=status.agent_version, boot=self._s.boot
            )
            self._looked = None
            self._save(self.state.but(shadowed=Shadowed(watched=watched)))
        said = self._s.serving.shadow_numbers(self.model)
        if said.version == target.version and (said.state == "running" or said.failed):
            return said
        self._s.serving.load(self.model, target.version, target.variant)
        said = self._s.serving.shadow(self.model, target.version, rules)
        assert self.state.shadowed is not None
        self.state = self.state.but(shadowed=self.state.shadowed.anew())
        return said

    def _observe(self, status: ServeStatus | None, numbers: ShadowStatus | None) -> None:
        """Takes it into memory; to disk now and then."""
        shadowed = self.state.shadowed
        assert shadowed is not None
        target = self._choice_version
        sample = watching.Sample(status.instance, status.agent_version, target, None) if status else None
        watched = watching.observe(shadowed.watched, target, sample, self._passed_s(), self._s.boot, self._s.lives())
        shadowed = msgspec.structs.replace(shadowed, watched=watched)
        if numbers is not None:
            shadowed = msgspec.structs.replace(shadowed, current=numbers.counts(), throttled=numbers.throttled)
        self.state = self.state.but(shadowed=shadowed)
        if watched.elapsed_s - self._watch_saved_s >= SAVE_S:
            self._watch_saved_s = watched.elapsed_s
            try:
                self._save(self.state)
            except OSError as error:
                self.problem = store_problem(error, f"the shadow of model {self.model!r}").message

    def _judge_shadow(self, rules: ShadowRules, numbers: ShadowStatus | None) -> float | None:
        shadowed = self.state.shadowed
        assert shadowed is not None
        given_up = None
        if numbers is not None and numbers.failed:
            given_up = numbers.ended
        verdict = shadow.judge(shadowed, rules, given_up)
        if isinstance(verdict, watching.RollBack):
            return self._refuse_shadow(Problem(verdict.reason, verdict.message, verdict.evidence))
        if isinstance(verdict, watching.Commit):
            self._note("shadow", "passed", verdict.message, evidence=verdict.evidence)
            self._end_shadow()
            answer = self._answer(Outcome.SHADOWED, None, verdict.message, verdict.evidence)
            self._apply(
                self.state.but(
                    shadowed=shadowed.ended("passed", verdict.message), answers=update.keep_answers(self.state.answers, answer)
                )
            )
            self._say("shadowed", f"release {answer.release}: {verdict.message}", release=answer.release)
        return None

    def _refuse_shadow(self, problem: Problem) -> float:
        self._end_shadow()
        return self._refuse(problem, self.state.manifest or "")

    def _end_shadow(self) -> None:
        """Its memory goes back; a shadow ends with its version. What is not done now is done at rest."""
        target = self._choice_version
        self._ask(lambda: self._s.serving.unload(self.model, target))

    def _skip(self, why: str) -> None:
        shadowed = self.state.shadowed or Shadowed(
            watched=watching.Watched(baseline=None, instance="", agent_version="", boot=self._s.boot)
        )
        message = f"not run beside the active release: {why}"
        self._note("shadow", "passed", message)
        self._apply(self.state.but(shadowed=shadowed.ended("skipped", message)))
        self._say("not-shadowed", message, release=self._choice_version)

    def _not_shadowed(self, refused: ServeRefused, rules: ShadowRules) -> float | None:
        """`serve` will not have it beside the active one."""
        if refused.code == "no_memory":
            if rules.without_memory == "wait":
                self.problem = f"waits for memory to run release {self._ref} beside the active one: {refused}"
                return REST_S
            self._skip(str(refused))
        elif refused.code == "not_in_store":
            return self._put_off(Problem(Reason.STORE_FAILED, str(refused)))
        elif refused.code == "model_invalid":
            return self._refuse_shadow(Problem(Reason.LOAD_FAILED, str(refused)))
        elif refused.code in NOT_OFFERED:
            self._end_shadow()
            self._skip(str(refused))
        else:  # not_loaded, no_active, busy, …: `serve` is in the middle of something, or was restarted between two questions
            self.problem = str(refused)
            return AGAIN_S
        return None
