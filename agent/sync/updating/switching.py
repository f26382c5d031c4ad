# ruff: noqa: SLF001 - those of a team are of one class
"""What changes `serve`: activating, watching, rolling back. Each step persists, then acts, and may be repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import msgspec

from agent.contract.manifest import WatchRules
from agent.contract.reasons import RETRYABLE, Reason
from agent.contract.reports import Answer, Outcome
from agent.lives import crashed
from agent.store import Choice, Selection, StoreError
from agent.sync.gates import watch as watching
from agent.sync.problems import Problem, store_problem
from agent.sync.serving import ModelStatus, ServeAway, ServeRefused, ServeStatus, VersionStatus
from agent.sync.updating import update
from agent.sync.updating.journal import Gate
from agent.sync.updating.model import AGAIN_S, HEARD_BEATS, ModelWork, Surroundings, versions
from agent.sync.updating.update import Event, Failure, UpdateState

SERVE_PATIENCE_S = 120.0
"""How long an activation waits for a `serve` that is away before it is put off."""

ROLLBACK_REFUSALS = 3
"""After this many refusals by `serve` a roll-back ends all the same, so that a fixed release is not kept out."""

WATCH_SAVE_S = 5.0
"""How much of a watch a crash of `sync` may make it repeat. Each save is a write to flash."""


HEARD_LATELY_S = 180.0
"""A device that was heard within this time before a release began to serve could report then."""

COLLEAGUES_S = 60.0
"""How long after a start the others of a team are waited for: their threads begin one after the other."""

NOT_ITS_FAULT = RETRYABLE | {Reason.OPERATOR, Reason.WITHDRAWN}
"""A release that is rolled back for one of these is not refused later."""


class Switching(ModelWork):
    """ACTIVATING, WATCHING, ROLLING_BACK. Each acts on a team: this model, and those that switch together with it. The first of them
    that is there does the work for all, and every step is stored for all of them at once.
    """

    def __init__(self, model: str, surroundings: Surroundings) -> None:
        super().__init__(model, surroundings)
        self._rollback_refusals = 0
        self._asked: float | None = None
        self._at: Switching | None = None
        self._asked_of = ""
        """The instance of `serve` that was asked to switch."""
        self._lost: str | None = None
        """The one that went away in the middle of it, and was counted as an interruption."""

    # -- the team ----------------------------------------------------------------------------------------------------------

    def _team(self) -> list[Switching] | None:
        """Whom this step is for; None when another of them does it. One whose stored state was lost is left out."""
        peers = self.state.peers
        if not peers:
            return [self]
        with self._s.joint:
            found = [self._s.colleague(model) for model in peers]
            mine = (self.state.phase, peers)
            team = [one for one in found if isinstance(one, Switching) and (one.state.phase, one.state.peers) == mine]
        if None in found and self._s.clock.wall() - self.state.since < COLLEAGUES_S:
            return None  # the process has just begun
        return team if team and team[0] is self else None

    def _leave(self, team: list[Switching], event: Event, failures: Mapping[str, Failure]) -> float:
        """The whole team goes back. Who has no failure of its own goes because of the others."""
        whose = ", ".join(
            f"{one.model}:{one.state.target} ({failures[one.model].reason.value})" for one in team if one.model in failures
        )
        shared = Failure(reason=Reason.TOGETHER, message=f"it serves only together with {whose}")
        now = self._s.clock.wall()
        self._apply_all([(one, update.after(one.state, event, now, failure=failures.get(one.model, shared))) for one in team])
        return 0.0

    def _put_off_all(self, team: list[Switching], problem: Problem) -> float:
        self._apply_all([(one, one._put_off_state(problem)) for one in team])
        return 0.0

    def _select(self, selections: dict[str, Selection | None]) -> None:
        if len(selections) > 1:
            self._s.store.select_together(selections)
            return
        for model, selection in selections.items():
            if selection is None:
                self._s.store.deselect(model)
            else:
                self._s.store.select(selection)

    # -- activating --------------------------------------------------------------------------------------------------------

    def _activate(self) -> float:
        team = self._team()
        if team is None:
            return AGAIN_S
        if gone := {one.model: one._overtaken_by() for one in team if one._overtaken()}:
            return self._leave(team, Event.OVERTAKEN, gone)
        if any(update.interrupted_too_often(one.state) for one in team):
            return self._leave(team, Event.BAD, {one.model: _cut_off(one.state.interruptions) for one in team})
        if not self.state.activated and (why_not := self._why_not_now(team)) is not None:
            return self._put_off_all(team, why_not)
        try:
            return self._switch(team)
        except ServeAway as away:
            if away.sent:
                self._count_interruption(team)
            elif not self.state.activated and self._s.clock.wall() - self.state.since > SERVE_PATIENCE_S:
                return self._put_off_all(team, Problem(Reason.ACTIVATION_FAILED, str(away)))
            return AGAIN_S
        except ServeRefused as refused:
            return self._activation_refused(team, refused)
        except StoreError as error:
            problem = Problem(Reason.STORE_FAILED, f"release {(self._at or self)._ref} has to be fetched again: {error}")
            if not self.state.activated:
                return self._put_off_all(team, problem)
            failure = Failure(reason=problem.reason, message=problem.message)
            return self._leave(team, Event.BAD, {(self._at or self).model: failure})

    def _why_not_now(self, team: list[Switching]) -> Problem | None:
        for one in team:
            if (expired := one._expired()) is not None:
                return expired
            if (over := one._lease_over(one._choice_version)) is not None:
                return Problem(over.reason, over.message)
        return None

    def _switch(self, team: list[Switching]) -> float:
        """Loads, remembers the baseline, selects, switches: each may be repeated. Without room for both, what serves goes first."""
        status = self._s.serving.status()
        self._forgive_restart(team, status.instance)
        self._asked_of = status.instance
        loaded: list[VersionStatus | None] = []
        for self._at in team:
            loaded.append(self._at._load_beside(self._at._choice, alone=len(team) == 1))
            if (wrong := self._at._another_file(self._at._choice, loaded[-1])) is not None:
                return self._leave(team, Event.BAD, {self._at.model: wrong})
        if any(one.state.watched is None for one in team):
            self._apply_all([(one, one._with_watch(status)) for one in team], quietly=True)
        self._select({one.model: Selection(model=one.model, active=one._choice, previous=one.state.before) for one in team})
        self._at = None
        if len(team) > 1:
            self._s.serving.activate_together({one.model: one._choice_version for one in team})
        elif loaded[0] is None:
            self._s.serving.swap(self.model, self._choice_version, self._choice.variant)
        else:
            self._s.serving.activate(self.model, self._choice_version)
        for one, what in zip(team, loaded, strict=True):
            one._looked = one._asked = None
            one._note("activation", "passed", one._in_place_of(team), evidence=one._activation_numbers(what))
        now = self._s.clock.wall()
        self._apply_all([(one, update.after(one.state, Event.ACTIVATED, now, interruptions=0)) for one in team])
        return 0.0

    def _count_interruption(self, team: list[Switching]) -> None:
        self._lost = self._asked_of
        self._apply_all([(one, one.state.but(interruptions=one.state.interruptions + 1)) for one in team])

    def _forgive_restart(self, team: list[Switching], instance: str) -> None:
        """A `serve` that went away in the middle is counted at once, and taken back when it turns out that it was told to end."""
        lost, self._lost = self._lost, None
        if lost is not None and crashed(self._s.lives(), lost, instance) == ():
            self._apply_all([(one, one.state.but(interruptions=max(0, one.state.interruptions - 1))) for one in team])

    def _with_watch(self, status: ServeStatus) -> UpdateState:
        if self.state.watched is not None:
            return self.state
        watched = watching.Watched(
            baseline=self._baseline(status.model(self.model)),
            instance=status.instance,
            agent_version=status.agent_version,
            boot=self._s.boot,
            could_report=self._s.deliveries.lately(max(HEARD_BEATS * self._s.settings.heartbeat_s, HEARD_LATELY_S)),
        )
        return self.state.but(watched=watched, activated=True, stopped=None)

    def _in_place_of(self, team: list[Switching]) -> str:
        others = ", ".join(f"{one.model}:{one.state.target}" for one in team if one is not self)
        return f"serves in place of {_named(self.state.before)}" + (f", together with {others}" if others else "")

    def _activation_numbers(self, loaded: VersionStatus | None) -> dict[str, float | str]:
        watched = self.state.watched
        found: dict[str, float | str] = {"could_report": "yes" if watched and watched.could_report else "no"}
        if loaded is not None and loaded.memory_bytes:
            found["memory_bytes"] = loaded.memory_bytes
        return found

    def _load_beside(self, target: Choice, *, alone: bool = True) -> VersionStatus | None:
        """None when `serve` has no memory for it beside what serves, which then has to make room for it. A team needs room for all."""
        try:
            return self._s.serving.load(self.model, target.version, target.variant)
        except ServeRefused as refused:
            if refused.code != "no_memory" or self.state.before is None or not alone:
                raise
        self._say(
            "swapping", f"there is no memory for two: release {self.state.before.version} makes room", release=target.version
        )
        return None

    def _another_file(self, target: Choice, loaded: VersionStatus | None) -> Failure | None:
        manifest = self._s.store.manifest(self._ref)
        signed = manifest.model_sha256(manifest.variant(target.variant))
        if loaded is None or loaded.sha256 in (None, "", signed):
            return None
        return Failure(reason=Reason.HASH_MISMATCH, message=f"serve loaded {loaded.sha256}, the manifest says {signed}")

    def _unselect(self, team: list[Switching]) -> None:
        """A switch was refused, and what served before serves again: nothing of the targets was met by a request."""
        self._select({one.model: one._selection_before() for one in team})
        self._apply_all([(one, one.state.but(watched=None, activated=False)) for one in team])

    def _selection_before(self) -> Selection | None:
        before = self.state.before
        return Selection(model=self.model, active=before) if before is not None else None

    def _baseline(self, model: ModelStatus) -> watching.Stats | None:
        before = model.version(self.state.before.version) if self.state.before else None
        return before.stats.for_watch() if before else None

    def _activation_refused(self, team: list[Switching], refused: ServeRefused) -> float:
        if refused.code == "not_loaded":  # serve was restarted between load and activate
            self._count_interruption(team)
            return AGAIN_S
        together = len(team) > 1 and self._at is None
        if refused.code in ("no_memory", "busy") or together:
            if self.state.activated and (together or self.state.before is not None):
                self._unselect(team)
            if not self.state.activated:
                reason = Reason.TOO_MUCH_MEMORY if refused.code == "no_memory" else Reason.ACTIVATION_FAILED
                return self._put_off_all(team, Problem(reason, f"serve has no room for it: {refused}"))
        if refused.code == "not_in_store" and not self.state.activated:
            return self._put_off_all(team, Problem(Reason.STORE_FAILED, str(refused)))
        if refused.code in ("forbidden", "protocol") and not self.state.activated:  # how this agent is set up
            return self._put_off_all(team, Problem(Reason.ACTIVATION_FAILED, str(refused)))
        reason = Reason.LOAD_FAILED if refused.code == "model_invalid" else Reason.ACTIVATION_FAILED
        return self._leave(team, Event.BAD, {(self._at or self).model: Failure(reason=reason, message=str(refused))})

    # -- watching ----------------------------------------------------------------------------------------------------------

    def _watch(self) -> float:
        team = self._team()
        if team is None:
            return self._s.settings.watch_poll_s
        if condemned := {one.model: one._condemned for one in team if one._condemned is not None}:
            return self._condemn_all(team, condemned)
        if gone := {one.model: one._overtaken_by() for one in team if one._overtaken()}:
            return self._leave_watch(team, gone)
        status = self._status()
        verdicts = [(one, one._verdict(status)) for one in team]
        bad = {one.model: _failure(verdict) for one, verdict in verdicts if isinstance(verdict, watching.RollBack)}
        if bad:
            return self._condemn_all(team, bad)
        good = [(one, verdict) for one, verdict in verdicts if isinstance(verdict, watching.Commit)]
        if len(good) < len(team):
            for one in team:
                one._not_yet()
            return self._s.settings.watch_poll_s
        heard = [one._heard(verdict) for one, verdict in good]
        if unheard := next((answer for answer in heard if isinstance(answer, Failure)), None):
            return self._condemn_all(team, {one.model: unheard for one in team})
        return self._commit(good) if all(heard) else self._s.settings.watch_poll_s

    def _verdict(self, status: ServeStatus | None) -> watching.Verdict:
        """What `serve` says now, taken into the watch and judged."""
        state = self.state
        assert state.watched is not None
        assert state.target is not None
        rebooted, lives = state.watched.boot != self._s.boot, self._s.lives()
        torn_away = watching.torn_away(state.watched, self._s.boot, lives)
        watched = watching.observe(state.watched, state.target, self._sample(status), self._passed_s(), self._s.boot, lives)
        self.state = state = state.but(watched=watched, interruptions=state.interruptions + torn_away)
        if update.interrupted_too_often(state):
            message = f"the machine was restarted {state.interruptions} times during its watch"
            return watching.RollBack(Reason.INTERRUPTED_TOO_OFTEN, message, {})
        if (over := self._lease_over(self._choice_version)) is not None:
            return watching.RollBack(over.reason, over.message, {})
        if rebooted or watched.elapsed_s - self._watch_saved_s >= WATCH_SAVE_S:
            self._keep_watch()
        serving = status.model(self.model).serving if status else None
        return watching.judge(watched, self._rules(), serving is not None and serving.version == state.target)

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

    def _condemn_all(self, team: list[Switching], failures: Mapping[str, Failure]) -> float:
        """BAD, persisted. When nothing can be persisted the callers come first: `serve` goes back all the same, and what is
        selected on disk follows as soon as it can be written.
        """
        try:
            return self._leave(team, Event.BAD, failures)
        except OSError:
            for one in team:
                one._condemned = failures.get(one.model)
            self._protect_callers(team)
            raise

    def _protect_callers(self, team: list[Switching]) -> None:
        if len(team) > 1:
            self._ask(lambda: self._together_back(team))
        for one in team:
            before = one.state.before
            if before is not None:
                self._ask(lambda model=one.model, version=before.version: self._s.serving.rollback(model, version))  # type: ignore[misc]

    def _sample(self, status: ServeStatus | None) -> watching.Sample | None:
        if status is None:
            return None
        model = status.model(self.model)
        version = model.version(self.state.target)
        stats = version.stats.for_watch() if version else None
        return watching.Sample(status.instance, status.agent_version, model.active, stats)

    def _not_yet(self) -> None:
        """What was said of the end of the watch is said again when it comes."""
        watched = self.state.watched
        if watched is not None and watched.passed_s is not None:
            self.state, self._asked = self.state.but(watched=msgspec.structs.replace(watched, passed_s=None)), None

    def _heard(self, verdict: watching.Commit) -> bool | Failure:
        """The watch ended well. It goes on while the report that says so is on its way: whom a release cut off from the fleet, nobody
        could help from there. True: the fleet knows, or need not; a Failure: it could not be told in time.
        """
        watched = self.state.watched
        assert watched is not None
        if not self._has_to_report():
            return True
        if watched.passed_s is None:
            watched = msgspec.structs.replace(watched, passed_s=watched.elapsed_s)
            self._save(self.state.but(watched=watched))
            self._note("watch", "passed", verdict.message, evidence=verdict.evidence)
        if self._asked is None:
            self._asked = self._s.clock.monotonic()
            self._s.teller.changed()
        waited_s = watched.elapsed_s - (watched.passed_s or 0.0)
        if self._s.deliveries.since(self._asked):
            return True
        if waited_s <= self._rules().report_within_s:
            return False
        if self.state.before is None:  # with nothing to go back to, a model that serves is better than none
            return True
        message = f"its watch ended well, but no report of it reached the fleet in {waited_s:.0f} s: it may be what cut this device off"
        return Failure(
            reason=Reason.CANNOT_REPORT, message=message, evidence={**verdict.evidence, "waited_s": round(waited_s, 1)}
        )

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

    def _commit(self, good: Sequence[tuple[Switching, watching.Commit]]) -> float:
        now, changes = self._s.clock.wall(), []
        for one, verdict in good:
            answer = one._answer(Outcome.COMMITTED, None, verdict.message, verdict.evidence)
            heard = "; the fleet has heard of it" if one._asked is not None else ""
            one._note("watch", "committed", verdict.message + heard, evidence=verdict.evidence)
            changes.append((one, update.committed(one.state, now, answer)))
        self._apply_all(changes)
        for one, verdict in good:
            release = one.state.answers[-1].release
            one._say("committed", f"release {release} stays: {verdict.message}", release=release)
            self._ask(lambda model=one.model: self._s.serving.commit(model))  # type: ignore[misc]
            self._s.housekeeping.need(one.model, versions(self._s.store.selection(one.model)))
        self._s.housekeeping.collect()
        return 0.0

    def _leave_watch(self, team: list[Switching], gone: Mapping[str, Failure]) -> float:
        """Something else is wanted. Go back first, so that the next one is compared with a proved release; with nothing to go back
        to it serves on, uncommitted, until the next one takes over, unless nobody may run it.
        """
        desired, wanted = self._s.desired(), self._wanted()
        nothing = wanted is None or wanted.release is None
        withdrawn = desired is not None and desired.withdrawn(self.model, self._choice_version)
        if len(team) == 1 and self.state.before is None and not nothing and not withdrawn:
            self._apply(update.rest(self.state, Event.SETTLED, self._s.clock.wall()))
            return 0.0
        return self._leave(team, Event.OVERTAKEN, gone)

    # -- rolling back ------------------------------------------------------------------------------------------------------

    def _roll_back(self) -> float:
        team = self._team()
        if team is None:
            return AGAIN_S
        try:
            self._select({one.model: one._selection_before() for one in team})
        except OSError:
            self._protect_callers(team)
            raise
        try:
            if len(team) > 1:
                self._together_back(team)
            troubles = [one._back_alone() for one in team]
        except ServeAway as away:
            self.problem = str(away)
            return AGAIN_S
        if None in troubles:
            return AGAIN_S
        self._went_back([(one, trouble or "") for one, trouble in zip(team, troubles, strict=True)])
        return 0.0

    def _together_back(self, team: list[Switching]) -> None:
        """One switch for all, while all that served before is still loaded; else each goes back by itself.  Raises: ServeAway."""
        befores = {one.model: one.state.before.version for one in team if one.state.before is not None}
        with contextlib.suppress(ServeRefused):
            self._s.serving.activate_together(befores)

    def _back_alone(self) -> str | None:
        """What went wrong, empty for nothing; None when it has to be tried again.  Raises: ServeAway."""
        before = self.state.before
        try:
            if before is not None:
                self._s.serving.rollback(self.model, before.version)
            else:
                self._s.serving.unload(self.model)
        except ServeRefused as refused:
            if before is not None:
                self._rollback_refusals += 1
                if self._rollback_refusals < ROLLBACK_REFUSALS:
                    return None
                return f"; and release {before.version} could not take over: {refused}"
        return ""

    def _went_back(self, team: Sequence[tuple[Switching, str]]) -> None:
        before = [(one, one.state, one._gone_back(trouble)) for one, trouble in team]
        self._apply_all([(one, state) for one, _, (state, _) in before])
        for one, was, (state, answer) in before:
            one._rollback_refusals = 0
            one._say(
                "rolled-back",
                f"{_named(was.before)} serves again: {answer.message}",
                release=answer.release,
                reason=answer.reason,
            )
            again = {state.target} if state.target is not None else set()
            self._s.housekeeping.need(one.model, versions(self._s.store.selection(one.model)) | again)

    def _gone_back(self, trouble: str) -> tuple[UpdateState, Answer]:
        """The state after going back, and its answer. What proved bad is refused, durably, from here on."""
        state, now = self.state, self._s.clock.wall()
        failure = state.failure or Failure(reason=Reason.ACTIVATION_FAILED, message="interrupted")
        outcome = Outcome.ROLLED_BACK if state.activated else Outcome.REFUSED
        answer = self._answer(outcome, failure.reason, failure.message + trouble, failure.evidence)
        gate: Gate = "watch" if state.activated else "activation"
        self._note(gate, "rolled back", answer.message, reason=failure.reason, evidence=failure.evidence)
        if failure.reason is Reason.CANNOT_REPORT:
            return update.back_for_now(state, now, self._s.jitter(), answer), answer
        if failure.reason in NOT_ITS_FAULT:
            return update.rest(state, Event.BACK_ONLY, now, answer), answer
        self._s.quarantine.add(self.model, state.manifest or "", answer)
        return update.rest(state, Event.BACK, now, answer), answer


def _named(choice: Choice | None) -> str:
    return f"release {choice.version}" if choice else "nothing"


def _failure(verdict: watching.RollBack) -> Failure:
    return Failure(reason=verdict.reason, message=verdict.message, evidence=verdict.evidence)


def _cut_off(times: int) -> Failure:
    message = f"serve did not survive its activation, or the machine did not: cut off {times} times"
    return Failure(reason=Reason.INTERRUPTED_TOO_OFTEN, message=message)
