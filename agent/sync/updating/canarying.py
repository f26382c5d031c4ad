"""CANARYING: the candidate answers a share of the requests before it is activated. Each step persists, then acts, and may be
repeated.
"""

from __future__ import annotations

from agent.config import SyncSettings
from agent.contract.acceptance import CanaryRules
from agent.contract.reasons import Reason
from agent.store import StoreError
from agent.sync.gates import canary, watch
from agent.sync.gates.canary import Canaried
from agent.sync.ports import Clock
from agent.sync.problems import Problem
from agent.sync.serving import ServeAway, ServeRefused, ServeStatus, ServingPort
from agent.sync.updating import update
from agent.sync.updating.admission import Admission
from agent.sync.updating.device import Device
from agent.sync.updating.endings import Endings
from agent.sync.updating.manifests import Manifests, missing
from agent.sync.updating.model import AGAIN_S, AT_ONCE, ModelUpdate
from agent.sync.updating.switching import SERVE_AWAY_S, AnotherFile, require_signed
from agent.sync.updating.update import Event, Failure
from agent.sync.updating.wanted import WantedReleases
from agent.sync.updating.watching import SAVE_S

SHARES = 1e-9  # a share as `serve` tells it again


class Canarying:
    """`serve` may restart between any two steps, and so may this process."""

    def __init__(
        self,
        wanted: WantedReleases,
        admission: Admission,
        endings: Endings,
        manifests: Manifests,
        serving: ServingPort,
        settings: SyncSettings,
        clock: Clock,
        device: Device,
    ) -> None:
        self._wanted = wanted
        self._admission = admission
        self._endings = endings
        self._manifests = manifests
        self._serving = serving
        self._settings = settings
        self._clock = clock
        self._device = device

    def step(self, one: ModelUpdate) -> float:
        if (done := self._why_not(one)) is not None:
            return done
        rules = self._admission.acceptance(one).canary or CanaryRules()
        try:
            status: ServeStatus | None = self._serving.status()
            assert status is not None
            if (skipped := self._place(one, status, rules)) is not None:
                return self._skip(one, skipped)
        except ServeAway as away:
            one.problem = str(away)
            status = None
            if not one.state.activated and self._clock.wall() - one.state.since > SERVE_AWAY_S:
                return self._endings.put_off(one, Problem(Reason.ACTIVATION_FAILED, str(away)))
        except ServeRefused as refused:
            return self._refused_by_serve(one, refused)
        except AnotherFile as wrong:
            return self._condemn(one, Failure(reason=Reason.LOAD_FAILED, message=str(wrong)))
        except StoreError as error:
            return self._failed(one, Problem(Reason.STORE_FAILED, missing(one.ref, error)))
        canaried = one.state.canaried
        return self._observe(one, canaried, status, rules) if canaried is not None else AGAIN_S

    def _why_not(self, one: ModelUpdate) -> float | None:
        """The answer of the step when it may not answer requests, or not any more; None when it may."""
        if one.memory.condemned is not None:
            return self._condemn(one, one.memory.condemned)
        if self._wanted.overtaken(one):
            one.to(Event.OVERTAKEN, failure=self._wanted.overtaken_by(one))
            return AT_ONCE
        if (over := self._admission.lease_of_either_over(one)) is not None:
            if one.state.activated:
                return self._condemn(one, over)
            return self._endings.put_off(one, Problem(over.reason, over.message))
        if not one.state.activated and (expired := self._wanted.expired(one.model)) is not None:
            return self._endings.put_off(one, expired)
        return None

    def _place(self, one: ModelUpdate, status: ServeStatus, rules: CanaryRules) -> str | None:
        """Makes sure that it answers its share. A text when there is nothing to do that beside, or no room.

        Raises: ServeAway, ServeRefused, AnotherFile, StoreError.
        """
        model, target = status.model(one.model), one.choice
        placed = model.canary
        if placed is not None and placed.version == target.version and abs(placed.share - rules.share) < SHARES:
            return None
        before = model.version(one.state.before.version) if one.state.before else None
        if before is None or model.serving is None or model.active != before.version:
            return None if one.state.activated else "what it would answer beside does not serve"
        loaded = self._serving.load(one.model, target.version, target.variant)
        require_signed(self._manifests.get(one.ref), target, loaded)
        if one.state.canaried is None:
            counted = before.stats.for_watch()
            watched = watch.Watched(
                baseline=None, instance=status.instance, agent_version=status.agent_version, boot=self._device.boot
            )
            one.memory.observed_at = None
            one.save(one.state.but(canaried=Canaried(watched=watched, begun=counted, latest=counted), activated=True))
        self._serving.canary(one.model, target.version, rules.share)
        return None

    def _observe(self, one: ModelUpdate, canaried: Canaried, status: ServeStatus | None, rules: CanaryRules) -> float:
        rebooted, lives = canaried.watched.boot != self._device.boot, self._device.lives()
        torn_away = watch.torn_away(canaried.watched, self._device.boot, lives)
        sample, active, in_place = _sample(one, status)
        canaried = canary.observe(canaried, one.version, sample, active, one.passed_s(), self._device.boot, lives)
        one.state = one.state.but(canaried=canaried, interruptions=one.state.interruptions + torn_away)
        if update.interrupted_too_often(one.state):
            message = f"the machine was restarted {one.state.interruptions} times while it answered a share of the requests"
            return self._condemn(one, Failure(reason=Reason.INTERRUPTED_TOO_OFTEN, message=message))
        verdict = canary.judge(canaried, rules, self._admission.acceptance(one).watch, in_place)
        if isinstance(verdict, watch.RollBack):
            return self._condemn(one, Failure(reason=verdict.reason, message=verdict.message, evidence=verdict.evidence))
        if isinstance(verdict, watch.Commit):
            answered = canaried.watched.total.answered
            message = f"answered {answered} requests beside the active release in {canaried.watched.elapsed_s:.0f} s"
            one.note("canary", "passed", message, evidence=verdict.evidence)
            one.say("canary-passed", f"release {one.version} {message}", release=one.version)
            return self._passed(one)
        if rebooted or canaried.watched.elapsed_s - one.memory.saved_s >= SAVE_S:
            one.memory.saved_s = canaried.watched.elapsed_s
            one.save(one.state)
        return self._settings.watch_poll_s

    def _passed(self, one: ModelUpdate) -> float:
        one.to(Event.CANARY_PASSED, canaried=None, interruptions=0)
        return AT_ONCE

    def _skip(self, one: ModelUpdate, why: str) -> float:
        """To activation without a canary."""
        message = f"no share of the requests first: {why}"
        one.note("canary", "passed", message)
        one.say("no-canary", message, release=one.version)
        return self._passed(one)

    def _condemn(self, one: ModelUpdate, failure: Failure) -> float:
        """BAD; and its share is 0 at once, before anything else is put in order and whether or not this can be written."""
        one.memory.condemned = failure
        try:
            one.to(Event.BAD, failure=failure)
        finally:
            one.asked(lambda: self._serving.canary(one.model, one.version, 0.0))
        return AT_ONCE

    def _refused_by_serve(self, one: ModelUpdate, refused: ServeRefused) -> float:
        if refused.code == "no_memory":
            return self._skip(one, str(refused))
        if refused.code == "model_invalid":
            return self._condemn(one, Failure(reason=Reason.LOAD_FAILED, message=str(refused)))
        if refused.code in ("not_in_store", "forbidden", "protocol"):
            return self._failed(one, Problem(Reason.STORE_FAILED, str(refused)))
        if refused.code in ("not_found", "") and not one.state.activated:
            return self._skip(one, f"this serve does not offer it ({refused})")
        if self._clock.wall() - one.state.since > SERVE_AWAY_S:
            return self._failed(one, Problem(Reason.ACTIVATION_FAILED, str(refused)))
        one.problem = str(refused)
        return AGAIN_S

    def _failed(self, one: ModelUpdate, problem: Problem) -> float:
        """Not the release's fault: later again while no request met it; else the release before serves first."""
        if not one.state.activated:
            return self._endings.put_off(one, problem)
        one.to(Event.BAD, failure=Failure(reason=problem.reason, message=problem.message))
        return AT_ONCE


def _sample(one: ModelUpdate, status: ServeStatus | None) -> tuple[watch.Sample | None, watch.Stats | None, bool]:
    """What `serve` says of the candidate, what of the version beside it, and whether the candidate has its share."""
    if status is None:
        return None, None, False
    model, target = status.model(one.model), one.version
    version = model.version(target)
    before = model.version(one.state.before.version) if one.state.before else None
    in_place = model.canary is not None and model.canary.version == target
    stats = version.stats.for_watch() if version else None
    sample = watch.Sample(status.instance, status.agent_version, target if in_place else None, stats)
    return sample, before.stats.for_watch() if before else None, in_place
