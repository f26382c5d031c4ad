"""CANARYING: the candidate answers a share of the requests before it is activated. Each step persists, then acts, and may be repeated."""

from __future__ import annotations

from agent.contract.manifest import CanaryRules
from agent.contract.reasons import Reason
from agent.store import StoreError
from agent.sync.gates import canary
from agent.sync.gates import watch as watching
from agent.sync.gates.canary import Canaried
from agent.sync.problems import Problem
from agent.sync.serving import ServeAway, ServeRefused, ServeStatus, VersionStatus
from agent.sync.updating import update
from agent.sync.updating.model import AGAIN_S, ModelWork
from agent.sync.updating.switching import SERVE_PATIENCE_S, WATCH_SAVE_S
from agent.sync.updating.update import Event, Failure

SHARES = 1e-9  # a share as `serve` tells it again


class Canarying(ModelWork):
    """One model. `serve` may restart between any two steps, and so may we."""

    def _canary(self) -> float:
        if self._condemned is not None:
            return self._condemn_canary(self._condemned)
        if self._overtaken():
            return self._bad(Event.OVERTAKEN, self._overtaken_by())
        if (over := self._lease_of_either_over()) is not None:
            return self._condemn_canary(over) if self.state.activated else self._put_off(Problem(over.reason, over.message))
        if not self.state.activated and (expired := self._expired()) is not None:
            return self._put_off(expired)
        try:
            rules = self._acceptance().canary or CanaryRules()
            status = self._s.serving.status()
            if (skipped := self._place(status, rules)) is not None:
                return self._go_on(skipped)
        except ServeAway as away:
            self.problem = str(away)
            status = None
            if not self.state.activated and self._s.clock.wall() - self.state.since > SERVE_PATIENCE_S:
                return self._put_off(Problem(Reason.ACTIVATION_FAILED, str(away)))
        except ServeRefused as refused:
            return self._not_placed(refused)
        except StoreError as error:
            problem = Problem(Reason.STORE_FAILED, f"release {self._ref} has to be fetched again: {error}")
            return self._canary_failed(problem)
        return self._look_at_canary(status, rules) if self.state.canaried is not None else AGAIN_S

    def _lease_of_either_over(self) -> Failure | None:
        """Both answer requests, so both leases count, and the fleet is to be heard often enough for the shorter one."""
        over, leases = [], []
        for version in (self._choice_version, *([self.state.before.version] if self.state.before else [])):
            over.append(self._lease_over(version))
            leases.append(self.lease_s)
        self.lease_s = min((lease_s for lease_s in leases if lease_s is not None), default=None)
        return next((failure for failure in over if failure is not None), None)

    def _place(self, status: ServeStatus, rules: CanaryRules) -> str | None:
        """Makes sure that it answers its share. A text when there is nothing to do that beside, or no room.

        Raises: ServeAway, ServeRefused, StoreError.
        """
        model, target = status.model(self.model), self._choice
        placed = model.canary
        if placed is not None and placed.version == target.version and abs(placed.share - rules.share) < SHARES:
            return None
        before = model.version(self.state.before.version) if self.state.before else None
        if before is None or model.serving is None or model.active != before.version:
            return None if self.state.activated else "what it would answer beside does not serve"
        loaded = self._s.serving.load(self.model, target.version, target.variant)
        self._require_signed(loaded)
        if self.state.canaried is None:
            counted = before.stats.for_watch()
            watched = watching.Watched(
                baseline=None, instance=status.instance, agent_version=status.agent_version, boot=self._s.boot
            )
            begun = Canaried(watched=watched, begun=counted, latest=counted)
            self._looked = None
            self._save(self.state.but(canaried=begun, activated=True))
        self._s.serving.canary(self.model, target.version, rules.share)
        return None

    def _require_signed(self, loaded: VersionStatus) -> None:
        """Raises: ServeRefused when `serve` has another file than the manifest names."""
        manifest = self._s.store.manifest(self._ref)
        signed = manifest.model_sha256(manifest.variant(self._choice.variant))
        if loaded.sha256 not in (None, "", signed):
            raise ServeRefused(200, "model_invalid", f"serve loaded {loaded.sha256}, the manifest says {signed}")

    def _look_at_canary(self, status: ServeStatus | None, rules: CanaryRules) -> float:
        canaried, target = self.state.canaried, self._choice_version
        assert canaried is not None
        rebooted, lives = canaried.watched.boot != self._s.boot, self._s.lives()
        torn_away = watching.torn_away(canaried.watched, self._s.boot, lives)
        sample, active, in_place = self._canary_sample(status)
        canaried = canary.observe(canaried, target, sample, active, self._passed_s(), self._s.boot, lives)
        self.state = self.state.but(canaried=canaried, interruptions=self.state.interruptions + torn_away)
        if update.interrupted_too_often(self.state):
            message = f"the machine was restarted {self.state.interruptions} times while it answered a share of the requests"
            return self._condemn_canary(Failure(reason=Reason.INTERRUPTED_TOO_OFTEN, message=message))
        verdict = canary.judge(canaried, rules, self._acceptance().watch, in_place)
        if isinstance(verdict, watching.RollBack):
            return self._condemn_canary(Failure(reason=verdict.reason, message=verdict.message, evidence=verdict.evidence))
        if isinstance(verdict, watching.Commit):
            answered = canaried.watched.total.answered
            message = f"answered {answered} requests beside the active release in {canaried.watched.elapsed_s:.0f} s"
            self._note("canary", "passed", message, evidence=verdict.evidence)
            self._say("canary-passed", f"release {target} {message}", release=target)
            self._apply(update.after(self.state, Event.CANARY_PASSED, self._s.clock.wall(), canaried=None, interruptions=0))
            return 0.0
        if rebooted or canaried.watched.elapsed_s - self._watch_saved_s >= WATCH_SAVE_S:
            self._watch_saved_s = canaried.watched.elapsed_s
            self._save(self.state)
        return self._s.settings.watch_poll_s

    def _canary_sample(self, status: ServeStatus | None) -> tuple[watching.Sample | None, watching.Stats | None, bool]:
        """What `serve` says of the candidate, what of the version beside it, and whether the candidate has its share."""
        if status is None:
            return None, None, False
        model, target = status.model(self.model), self._choice_version
        version = model.version(target)
        before = model.version(self.state.before.version) if self.state.before else None
        in_place = model.canary is not None and model.canary.version == target
        stats = version.stats.for_watch() if version else None
        sample = watching.Sample(status.instance, status.agent_version, target if in_place else None, stats)
        return sample, before.stats.for_watch() if before else None, in_place

    def _condemn_canary(self, failure: Failure) -> float:
        """BAD; and its share is 0 at once, before anything else is put in order and whether or not this can be written."""
        self._condemned = failure
        try:
            return self._bad(Event.BAD, failure)
        finally:
            target = self._choice_version
            self._ask(lambda: self._s.serving.canary(self.model, target, 0.0))

    def _go_on(self, why: str) -> float:
        """To activation without a canary."""
        message = f"no share of the requests first: {why}"
        self._note("canary", "passed", message)
        self._say("no-canary", message, release=self._choice_version)
        self._apply(update.after(self.state, Event.CANARY_PASSED, self._s.clock.wall(), canaried=None, interruptions=0))
        return 0.0

    def _not_placed(self, refused: ServeRefused) -> float:
        if refused.code == "no_memory":
            return self._go_on(str(refused))
        if refused.code == "model_invalid":
            return self._condemn_canary(Failure(reason=Reason.LOAD_FAILED, message=str(refused)))
        if refused.code in ("not_in_store", "forbidden", "protocol"):
            return self._canary_failed(Problem(Reason.STORE_FAILED, str(refused)))
        if refused.code in ("not_found", "") and not self.state.activated:
            return self._go_on(f"this serve does not offer it ({refused})")
        if self._s.clock.wall() - self.state.since > SERVE_PATIENCE_S:
            return self._canary_failed(Problem(Reason.ACTIVATION_FAILED, str(refused)))
        self.problem = str(refused)
        return AGAIN_S

    def _canary_failed(self, problem: Problem) -> float:
        """Not the release's fault: later again while no request met it; else back first."""
        if not self.state.activated:
            return self._put_off(problem)
        return self._bad(Event.BAD, Failure(reason=problem.reason, message=problem.message))
