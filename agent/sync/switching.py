"""What changes `serve`: activating, watching, rolling back. Each step persists, then acts, and may be repeated."""

from __future__ import annotations

import msgspec

from agent.contract.manifest import WatchRules
from agent.contract.reasons import RETRYABLE, Reason
from agent.contract.reports import Outcome
from agent.store import Choice, Selection, StoreError
from agent.sync import update
from agent.sync import watch as watching
from agent.sync.journal import Gate
from agent.sync.model import AGAIN_S, HEARD_BEATS, ModelWork, Surroundings, versions
from agent.sync.problems import Problem, store_problem
from agent.sync.serving import ModelStatus, ServeAway, ServeRefused, ServeStatus, VersionStatus
from agent.sync.update import Event, Failure

SERVE_PATIENCE_S = 120.0
"""How long an activation waits for a `serve` that is away before it is put off."""

ROLLBACK_REFUSALS = 3
"""After this many refusals by `serve` a roll-back ends all the same, so that a fixed release is not kept out."""

WATCH_SAVE_S = 5.0
"""How much of a watch a crash of `sync` may make it repeat. Each save is a write to flash."""


HEARD_LATELY_S = 180.0
"""A device that was heard within this time before a release began to serve could report then."""

NOT_ITS_FAULT = RETRYABLE | {Reason.OPERATOR, Reason.WITHDRAWN}
"""A release that is rolled back for one of these is not refused later."""


class Switching(ModelWork):
    """ACTIVATING, WATCHING, ROLLING_BACK."""

    def __init__(self, model: str, surroundings: Surroundings) -> None:
        super().__init__(model, surroundings)
        self._looked: float | None = None
        self._rollback_refusals = 0
        self._asked: float | None = None

    # -- activating --------------------------------------------------------------------------------------------------------

    def _activate(self) -> float:
        state = self.state
        if self._overtaken():
            return self._bad(Event.OVERTAKEN, self._overtaken_by())
        if update.interrupted_too_often(state):
            message = f"serve did not survive its activation, or the machine did not: cut off {state.interruptions} times"
            return self._bad(Event.BAD, Failure(reason=Reason.INTERRUPTED_TOO_OFTEN, message=message))
        if not state.activated and (expired := self._expired()) is not None:
            return self._put_off(expired)
        if not state.activated and (over := self._lease_over(self._choice_version)) is not None:
            return self._put_off(Problem(over.reason, over.message))
        try:
            return self._switch()
        except ServeAway as away:
            if away.sent:
                self._save(self.state.but(interruptions=self.state.interruptions + 1))
            elif not self.state.activated and self._s.clock.wall() - state.since > SERVE_PATIENCE_S:
                return self._put_off(Problem(Reason.ACTIVATION_FAILED, str(away)))
            return AGAIN_S
        except ServeRefused as refused:
            return self._activation_refused(refused)
        except StoreError as error:
            problem = Problem(Reason.STORE_FAILED, f"release {self._ref} has to be fetched again: {error}")
            if not self.state.activated:
                return self._put_off(problem)
            return self._bad(Event.BAD, Failure(reason=problem.reason, message=problem.message))

    def _switch(self) -> float:
        """Loads, remembers the baseline, selects, switches: each may be repeated. Without room for both, what serves goes first."""
        serving, target = self._s.serving, self._choice
        status = serving.status()
        loaded = self._load_beside(target)
        if (wrong := self._another_file(target, loaded)) is not None:
            return self._bad(Event.BAD, wrong)
        if self.state.watched is None:
            watched = watching.Watched(
                baseline=self._baseline(status.model(self.model)),
                instance=status.instance,
                agent_version=status.agent_version,
                boot=self._s.boot,
                could_report=self._s.deliveries.lately(max(HEARD_BEATS * self._s.settings.heartbeat_s, HEARD_LATELY_S)),
            )
            self._save(self.state.but(watched=watched, activated=True, stopped=None))
        self._s.store.select(Selection(model=self.model, active=target, previous=self.state.before))
        if loaded is None:
            serving.swap(self.model, target.version, target.variant)
        else:
            serving.activate(self.model, target.version)
        self._looked = self._asked = None
        self._note(
            "activation", "passed", f"serves in place of {_named(self.state.before)}", evidence=self._activation_numbers(loaded)
        )
        self._apply(update.after(self.state, Event.ACTIVATED, self._s.clock.wall(), interruptions=0))
        return 0.0

    def _activation_numbers(self, loaded: VersionStatus | None) -> dict[str, float | str]:
        watched = self.state.watched
        found: dict[str, float | str] = {"could_report": "yes" if watched and watched.could_report else "no"}
        if loaded is not None and loaded.memory_bytes:
            found["memory_bytes"] = loaded.memory_bytes
        return found

    def _load_beside(self, target: Choice) -> VersionStatus | None:
        """None when `serve` has no memory for it beside what serves, which then has to make room for it."""
        try:
            return self._s.serving.load(self.model, target.version, target.variant)
        except ServeRefused as refused:
            if refused.code != "no_memory" or self.state.before is None:
                raise
        self._say(
            "swapping", f"there is no memory for two: release {self.state.before.version} makes room", release=target.version
        )
        return None

    def _another_file(self, target: Choice, loaded: VersionStatus | None) -> Failure | None:
        manifest = self._s.store.manifest(self._ref)
        signed = manifest.files[manifest.variant(target.variant).file].sha256
        if loaded is None or loaded.sha256 in (None, "", signed):
            return None
        return Failure(reason=Reason.HASH_MISMATCH, message=f"serve loaded {loaded.sha256}, the manifest says {signed}")

    def _unselect(self) -> None:
        """A swap was refused, and what served before serves again: nothing of the target was met by a request."""
        assert self.state.before is not None
        self._s.store.select(Selection(model=self.model, active=self.state.before))
        self._save(self.state.but(watched=None, activated=False))

    def _baseline(self, model: ModelStatus) -> watching.Stats | None:
        before = model.version(self.state.before.version) if self.state.before else None
        return before.stats.for_watch() if before else None

    def _activation_refused(self, refused: ServeRefused) -> float:
        if refused.code in ("no_memory", "busy"):
            if self.state.activated and self.state.before is not None:
                self._unselect()
            if not self.state.activated:
                reason = Reason.TOO_MUCH_MEMORY if refused.code == "no_memory" else Reason.ACTIVATION_FAILED
                return self._put_off(Problem(reason, f"serve has no room for it: {refused}"))
        if refused.code == "not_in_store" and not self.state.activated:
            return self._put_off(Problem(Reason.STORE_FAILED, str(refused)))
        if refused.code in ("forbidden", "protocol") and not self.state.activated:  # how this agent is set up
            return self._put_off(Problem(Reason.ACTIVATION_FAILED, str(refused)))
        if refused.code == "not_loaded":  # serve was restarted between load and activate
            self._save(self.state.but(interruptions=self.state.interruptions + 1))
            return AGAIN_S
        reason = Reason.LOAD_FAILED if refused.code == "model_invalid" else Reason.ACTIVATION_FAILED
        return self._bad(Event.BAD, Failure(reason=reason, message=str(refused)))

    # -- watching ----------------------------------------------------------------------------------------------------------

    def _watch(self) -> float:
        state = self.state
        assert state.watched is not None
        assert state.target is not None
        if self._overtaken():
            return self._leave_watch()
        rebooted = state.watched.boot != self._s.boot
        status = self._status()
        watched = watching.observe(state.watched, state.target, self._sample(status), self._passed_s(), self._s.boot)
        self.state = state = state.but(watched=watched, interruptions=state.interruptions + (1 if rebooted else 0))
        if update.interrupted_too_often(state):
            message = f"the machine was restarted {state.interruptions} times during its watch"
            return self._bad(Event.BAD, Failure(reason=Reason.INTERRUPTED_TOO_OFTEN, message=message))
        if (over := self._lease_over(self._choice_version)) is not None:
            return self._condemn(over)
        rules = self._rules()
        serving = status.model(self.model).serving if status else None
        verdict = watching.judge(watched, rules, serving is not None and serving.version == state.target)
        if isinstance(verdict, watching.RollBack):
            return self._condemn(Failure(reason=verdict.reason, message=verdict.message, evidence=verdict.evidence))
        if isinstance(verdict, watching.Commit):
            return self._commit_when_reported(verdict, rules)
        if watched.passed_s is not None:
            self.state, self._asked = state.but(watched=msgspec.structs.replace(watched, passed_s=None)), None
        if rebooted or watched.elapsed_s - self._watch_saved_s >= WATCH_SAVE_S:
            self._keep_watch()
        return self._s.settings.watch_poll_s

    def _rules(self) -> WatchRules:
        """The publisher's; the default ones when the manifest was damaged on disk meanwhile: a watch without rules would never end."""
        try:
            return self._s.store.manifest(self._ref).acceptance.watch
        except StoreError as error:
            self.problem = str(error)
            return WatchRules()

    def _keep_watch(self) -> None:
        """Saves how far the watch is. A disk that is full must not blind it."""
        assert self.state.watched is not None
        self._watch_saved_s = self.state.watched.elapsed_s
        try:
            self._save(self.state, quietly=True)
        except OSError as error:
            self.problem = store_problem(error, f"watching model {self.model!r}").message

    def _condemn(self, failure: Failure) -> float:
        """BAD, persisted. When nothing can be persisted the callers come first: `serve` goes back all the same, and what is
        selected on disk follows as soon as it can be written.
        """
        try:
            return self._bad(Event.BAD, failure)
        except OSError:
            self._protect_callers()
            raise

    def _protect_callers(self) -> None:
        before = self.state.before
        if before is not None:
            self._ask(lambda: self._s.serving.rollback(self.model, before.version))

    def _passed_s(self) -> float:
        now = self._s.clock.monotonic()
        passed_s = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        return passed_s

    def _sample(self, status: ServeStatus | None) -> watching.Sample | None:
        if status is None:
            return None
        model = status.model(self.model)
        version = model.version(self.state.target)
        stats = version.stats.for_watch() if version else None
        return watching.Sample(status.instance, status.agent_version, model.active, stats)

    def _commit_when_reported(self, verdict: watching.Commit, rules: WatchRules) -> float:
        """The watch ended well. It goes on while the report that says so is on its way: whom a release cut off from the fleet, nobody
        could help from there.
        """
        watched = self.state.watched
        assert watched is not None
        if not self._has_to_report():
            return self._commit(verdict)
        if watched.passed_s is None:
            watched = msgspec.structs.replace(watched, passed_s=watched.elapsed_s)
            self._save(self.state.but(watched=watched))
            self._note("watch", "passed", verdict.message, evidence=verdict.evidence)
        if self._asked is None:
            self._asked = self._s.clock.monotonic()
            self._s.teller.changed()
        if self._s.deliveries.since(self._asked):
            return self._commit(verdict)
        waited_s = watched.elapsed_s - (watched.passed_s or 0.0)
        if waited_s <= rules.report_within_s:
            return self._s.settings.watch_poll_s
        return self._unheard(verdict, waited_s)

    def _has_to_report(self) -> bool:
        """Whether the fleet must hear of it before it stays. What an operator holds the model on is his own word."""
        assert self.state.watched is not None
        try:
            offline = self._s.store.manifest(self._ref).acceptance.offline_commit
        except StoreError:
            offline = None
        if offline is None:
            return self.state.watched.could_report and not self.held
        return not offline and not self.held

    def _unheard(self, verdict: watching.Commit, waited_s: float) -> float:
        """No report got through in time. With nothing to go back to, a model that serves is better than none."""
        if self.state.before is None:
            return self._commit(verdict)
        message = f"its watch ended well, but no report of it reached the fleet in {waited_s:.0f} s: it may be what cut this device off"
        evidence = {**verdict.evidence, "waited_s": round(waited_s, 1)}
        return self._condemn(Failure(reason=Reason.CANNOT_REPORT, message=message, evidence=evidence))

    def _commit(self, verdict: watching.Commit) -> float:
        answer = self._answer(Outcome.COMMITTED, None, verdict.message, verdict.evidence)
        heard = "; the fleet has heard of it" if self._asked is not None else ""
        self._note("watch", "committed", verdict.message + heard, evidence=verdict.evidence)
        self._apply(update.committed(self.state, self._s.clock.wall(), answer))
        self._say("committed", f"release {answer.release} stays: {verdict.message}", release=answer.release)
        self._ask(lambda: self._s.serving.commit(self.model))
        self._s.housekeeping.need(self.model, versions(self._s.store.selection(self.model)))
        self._s.housekeeping.collect()
        return 0.0

    def _leave_watch(self) -> float:
        """Something else is wanted. Go back first, so that the next one is compared with a proved release; with nothing to go back
        to it serves on, uncommitted, until the next one takes over, unless nobody may run it.
        """
        desired, wanted, target = self._s.desired(), self._wanted(), self.state.target
        assert target is not None
        nothing = wanted is None or wanted.release is None
        if self.state.before is None and not nothing and not (desired and desired.withdrawn(self.model, target)):
            self._apply(update.rest(self.state, Event.SETTLED, self._s.clock.wall()))
            return 0.0
        return self._bad(Event.OVERTAKEN, self._overtaken_by())

    # -- rolling back ------------------------------------------------------------------------------------------------------

    def _roll_back(self) -> float:
        before = self.state.before
        try:
            if before is not None:
                self._s.store.select(Selection(model=self.model, active=before))
            else:
                self._s.store.deselect(self.model)
        except OSError:
            self._protect_callers()
            raise
        trouble = ""
        try:
            if before is not None:
                self._s.serving.rollback(self.model, before.version)
            else:
                self._s.serving.unload(self.model)
        except ServeAway as away:
            self.problem = str(away)
            return AGAIN_S
        except ServeRefused as refused:
            if before is not None:
                self._rollback_refusals += 1
                if self._rollback_refusals < ROLLBACK_REFUSALS:
                    return AGAIN_S
                trouble = f"; and release {before.version} could not take over: {refused}"
        self._rollback_refusals = 0
        self._went_back(trouble)
        return 0.0

    def _went_back(self, trouble: str) -> None:
        state, now = self.state, self._s.clock.wall()
        failure = state.failure or Failure(reason=Reason.ACTIVATION_FAILED, message="interrupted")
        outcome = Outcome.ROLLED_BACK if state.activated else Outcome.REFUSED
        answer = self._answer(outcome, failure.reason, failure.message + trouble, failure.evidence)
        gate: Gate = "watch" if state.activated else "activation"
        self._note(gate, "rolled back", answer.message, reason=failure.reason, evidence=failure.evidence)
        if failure.reason is Reason.CANNOT_REPORT:
            self._apply(update.back_for_now(state, now, self._s.jitter(), answer))
        elif failure.reason in NOT_ITS_FAULT:
            self._apply(update.rest(state, Event.BACK_ONLY, now, answer))
        else:
            self._s.quarantine.add(self.model, state.manifest or "", answer)
            self._apply(update.rest(state, Event.BACK, now, answer))
        serves = f"{_named(state.before)} serves"
        self._say("rolled-back", f"{serves} again: {answer.message}", release=answer.release, reason=answer.reason)
        again = {self.state.target} if self.state.target is not None else set()
        self._s.housekeeping.need(self.model, versions(self._s.store.selection(self.model)) | again)


def _named(choice: Choice | None) -> str:
    return f"release {choice.version}" if choice else "nothing"
