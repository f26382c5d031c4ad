"""Drives one model through the update machine: the shell around `update.py` and `watch.py`. Every step persists, then acts."""

from __future__ import annotations

import datetime as dt
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from agent.config import SyncSettings
from agent.contract.assignment import Wanted
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.contract.reports import Answer, Hardware, Outcome, Phase
from agent.store import Choice, Selection, Store, StoreError
from agent.sync import update, windows
from agent.sync import watch as watching
from agent.sync.desired import Desired
from agent.sync.download import Downloader
from agent.sync.holds import Holds
from agent.sync.ports import Clock, Releases, Signed, Stop
from agent.sync.problems import Problem, Stopped, store_problem
from agent.sync.quarantine import Quarantine
from agent.sync.retention import Housekeeping
from agent.sync.serving import ModelStatus, ServeAway, ServeRefused, ServeStatus, ServingPort
from agent.sync.states import States
from agent.sync.trial import Trials, make_request
from agent.sync.update import Event, Failure, UpdateState
from agent.sync.variants import choose, needed_files

REST_S = 5.0
"""How often a model at rest is compared with what `serve` says, when nothing else wakes it."""

AGAIN_S = 1.0
"""How soon to ask a `serve` that did not answer again: systemd needs about a second to restart it."""

SERVE_PATIENCE_S = 120.0
"""How long an activation waits for a `serve` that is away before it is put off."""

ROLLBACK_REFUSALS = 3
"""After this many refusals by `serve` a roll-back ends all the same, so that a fixed release is not kept out."""

WATCH_SAVE_S = 5.0
"""How much of a watch a crash of `sync` may make it repeat. Each save is a write to flash."""

DISK_AGAIN_S = 30.0


class Teller(Protocol):
    """Where news goes."""

    def changed(self) -> None:
        """The state of a model changed; a report is due."""

    def say(self, name: str, message: str, *, model: str, release: int | None = None, reason: str | None = None) -> None:
        """An event for people."""


@dataclass(frozen=True)
class Surroundings:
    """Everything an updater needs; shared by the updaters of all models."""

    store: Store
    states: States
    quarantine: Quarantine
    housekeeping: Housekeeping
    releases: Releases
    downloader: Downloader
    trials: Trials
    serving: ServingPort
    clock: Clock
    settings: SyncSettings
    hardware: Callable[[], Hardware]
    desired: Callable[[], Desired | None]
    teller: Teller
    boot: str
    holds: Holds
    engine_threads: int = 1
    jitter: Callable[[], float] = random.random


class ModelUpdater:
    """One model. `step` is called by one thread; `state`, `progress` and `problem` may be read by others."""

    def __init__(self, model: str, surroundings: Surroundings) -> None:
        self.model = model
        self._s = surroundings
        self.progress: float | None = None
        self.problem: str | None = None
        self._ending: Stop = lambda: False
        self._looked: float | None = None
        self._saved_watch_s = 0.0
        self._rollback_refusals = 0
        self.state = update.resumed(surroundings.states.load(model))
        if self.state.phase is Phase.FETCHING or self.state.waiting_for == "retry":
            surroundings.housekeeping.fetching(model, None)
        if update.RESUME[self.state.phase].counts:
            surroundings.states.save(self.state)
        self._steps: dict[Phase, Callable[[], float]] = {
            Phase.STEADY: self._rest,
            Phase.QUARANTINED: self._rest,
            Phase.FETCHING: self._fetch,
            Phase.TRIALING: self._try,
            Phase.SHADOWING: self._shadow,
            Phase.WAITING: self._wait,
            Phase.ACTIVATING: self._activate,
            Phase.WATCHING: self._watch,
            Phase.ROLLING_BACK: self._roll_back,
        }

    @property
    def held(self) -> bool:
        """Whether an operator on the device said that this model stays as it is."""
        return self._s.holds.pinned(self.model) is not None

    def step(self, ending: Stop) -> float:
        """Does what the phase asks for. Gives the seconds after which the next step is due, if nothing happens before.

        Raises: Stopped when `ending` said so in the middle.
        """
        self._ending = ending
        try:
            delay = self._steps[self.state.phase]()
        except Stopped:
            self._forgive_interruption()
            raise
        except OSError as error:
            self.problem = store_problem(error, f"updating model {self.model!r}").message
            return DISK_AGAIN_S
        except StoreError as error:
            self.problem = str(error)
            return DISK_AGAIN_S
        return delay

    # -- at rest -----------------------------------------------------------------------------------------------------------

    def _rest(self) -> float:
        wanted = self._wanted()
        status = self._status()
        selection = self._s.store.selection(self.model)
        if wanted is None:
            return self._tidy(selection, status)
        if self.state.wanted != wanted.release:
            self._save(self.state.but(wanted=wanted.release))
        if wanted.release is None:
            return self._serve_nothing(selection, status)
        if selection and selection.active.version == wanted.release and not self._damaged(selection, status):
            return self._settled(selection, wanted, status)
        if self._refused_already(wanted) or self._expired() is not None:
            return self._tidy(selection, status)
        before = _other_than(wanted.release, selection)
        self._s.housekeeping.fetching(self.model, None)
        self._apply(
            update.begin(
                self.state, self._s.clock.wall(), wanted=wanted.release, rollout=wanted.rollout, mode=wanted.mode, before=before
            )
        )
        self._say("update-started", f"release {wanted.release} is wanted", release=wanted.release)
        return 0.0

    def _settled(self, selection: Selection, wanted: Wanted, status: ServeStatus | None) -> float:
        if self.state.phase is Phase.QUARANTINED:
            self._apply(update.rest(self.state, Event.SETTLED, self._s.clock.wall()))
        serving = status.model(self.model).serving if status else None
        if wanted.rollout and serving and serving.version == wanted.release and not self._answered(wanted):
            answer = self._answer(
                Outcome.COMMITTED, None, "it was serving here already", rollout=wanted.rollout, release=wanted.release
            )
            self._save(self.state.but(answers=update.keep_answers(self.state.answers, answer)))
        return self._tidy(selection, status)

    def _answered(self, wanted: Wanted) -> bool:
        return any((a.release, a.rollout) == (wanted.release, wanted.rollout) for a in self.state.answers)

    def _refused_already(self, wanted: Wanted) -> bool:
        """A new rollout of a refused release gets an answer of its own: then the manifest is fetched and compared, and no more."""
        assert wanted.release is not None
        return self._s.quarantine.names_version(self.model, wanted.release) and self._answered(wanted)

    def _serve_nothing(self, selection: Selection | None, status: ServeStatus | None) -> float:
        if selection is not None:
            self._s.store.deselect(self.model)
            self._say("stopped", "no release of it is wanted any more", release=selection.active.version)
        if status and self.model in status.models:
            self._ask(lambda: self._s.serving.unload(self.model))
        return REST_S

    def _tidy(self, selection: Selection | None, status: ServeStatus | None) -> float:
        """At rest, `serve` should have exactly what is selected: a crash between persisting and acting is made good here."""
        self.progress = None
        self._s.housekeeping.need(self.model, _versions(selection))
        if selection is None or status is None:
            return REST_S
        model = status.model(self.model)
        active = selection.active
        if model.active != active.version or model.serving is None:
            self._ask(lambda: self._serve_again(active))
        elif model.previous is not None:
            self._ask(lambda: self._s.serving.commit(self.model))
        else:
            self.problem = None
        return REST_S

    def _serve_again(self, choice: Choice) -> None:
        self._s.serving.load(self.model, choice.version, choice.variant)
        self._s.serving.activate(self.model, choice.version)
        self._s.serving.commit(self.model)

    def _damaged(self, selection: Selection, status: ServeStatus | None) -> bool:
        """Whether the active release has to be fetched again: `serve` cannot run it, and the disk does not hold what was signed."""
        model = status.model(self.model) if status else None
        if model is None or (model.active == selection.active.version and model.serving is not None):
            return False
        try:
            self._s.store.release(self.model, selection.active)
        except StoreError as error:
            self._say("damaged", f"{error}; it is fetched again", release=selection.active.version)
            self._remove_damaged(selection.active)
            return True
        return False

    def _remove_damaged(self, choice: Choice) -> None:
        try:
            manifest = self._s.store.manifest(ReleaseRef(self.model, choice.version))
            self._s.store.file(manifest, manifest.variant(choice.variant).file).unlink(missing_ok=True)
        except (StoreError, KeyError):
            return  # the manifest itself is damaged or gone: fetching writes it again

    # -- fetching ----------------------------------------------------------------------------------------------------------

    def _fetch(self) -> float:
        if (left := self._left_behind()) is not None:
            return left
        if (expired := self._expired()) is not None:
            return self._put_off(expired)
        signed: Signed | None = None
        try:
            signed = self._proved_in_store() or self._s.releases.manifest(self._ref)
            return self._bring(signed)
        except Problem as problem:
            if signed is None or problem.retryable:
                return self._put_off(problem)
            return self._refuse(problem, signed.sha256)
        except OSError as error:
            return self._put_off(store_problem(error, f"fetching release {self._ref}"))
        except Stopped:
            return self._stopped()

    def _bring(self, signed: Signed) -> float:
        known = self._s.quarantine.find(self.model, signed.manifest.version, signed.sha256)
        if known is not None:
            return self._refuse(
                Problem(Reason(known.reason), f"refused before: {known.message}", known.evidence), signed.sha256
            )
        variant = choose(signed.manifest, self._s.hardware())
        needed = needed_files(signed.manifest, variant)
        wanted = [signed.manifest.files[name] for name in needed]
        self._s.housekeeping.fetching(self.model, [file.sha256 for file in wanted])
        downloader = self._s.downloader
        if downloader.shortage_bytes(wanted) > 0:
            self._s.housekeeping.collect(short_of_space=True)
            downloader.require_space(wanted)
        missing = downloader.missing(wanted)
        total, done = sum(file.size_bytes for file in missing) or 1, 0
        for file in missing:
            downloader.fetch(file, lambda have, base=done: self._progress((base + have) / total), self._should_stop)  # type: ignore[misc]
            done += file.size_bytes
        self._s.store.write_manifest(signed.data, needed)
        choice = Choice(version=signed.manifest.version, variant=variant.name)
        event = Event.FETCHED_KNOWN if self._proved_here(signed, choice) else Event.FETCHED
        self._apply(
            update.after(
                self.state, event, self._s.clock.wall(),
                manifest=signed.sha256, variant=variant.name, waiting_for=None, retry_at=None, failure=None,
            )
        )  # fmt: skip
        self._s.housekeeping.need(self.model, {*_versions(self._s.store.selection(self.model)), choice.version})
        self._s.housekeeping.fetched(self.model)
        return 0.0

    def _proved_in_store(self) -> Signed | None:
        """The target's manifest from our own store, for a hold: its signature was verified when it was stored, and it was committed here.
        So an operator can go back without any network. What the fleet wants is always asked for anew.
        """
        if not self.held:
            return None
        try:
            data, manifest = self._s.store.manifest_bytes(self._ref), self._s.store.manifest(self._ref)
        except StoreError:
            return None
        signed = Signed(data, hashlib.sha256(data).hexdigest(), manifest)
        return signed if signed.sha256 in self.state.committed else None

    def _proved_here(self, signed: Signed, choice: Choice) -> bool:
        """Whether the trial may be skipped: this release was committed here, its file is intact, and it may serve right now."""
        if signed.sha256 not in self.state.committed or self._may_serve() is not None:
            return False
        try:
            self._s.store.release(self.model, choice)
        except StoreError:
            return False
        return True

    def _progress(self, share: float) -> None:
        self.progress = min(1.0, share)

    # -- trying ------------------------------------------------------------------------------------------------------------

    def _try(self) -> float:
        if (left := self._left_behind()) is not None:
            return left
        state = self.state
        if update.interrupted_too_often(state):
            message = f"its trial was cut off {state.interruptions} times by a crash or a power cut"
            return self._refuse(Problem(Reason.INTERRUPTED_TOO_OFTEN, message), state.manifest or "")
        try:
            manifest = self._s.store.manifest(self._ref)
            timeout_s = min(self._s.settings.trial_timeout_s, manifest.acceptance.max_trial_s)
            request = make_request(
                self._s.store,
                manifest,
                manifest.variant(state.variant or ""),
                memory_bytes=self._s.settings.trial_memory_bytes,
                timeout_s=timeout_s,
                threads=self._s.engine_threads,
            )
            self._s.trials.run(request, timeout_s, self._should_stop)
        except (StoreError, KeyError) as error:
            return self._put_off(Problem(Reason.STORE_FAILED, f"release {self._ref} has to be fetched again: {error}"))
        except OSError as error:
            return self._put_off(store_problem(error, f"starting the trial of release {self._ref}"))
        except Problem as problem:
            return self._put_off(problem) if problem.retryable else self._refuse(problem, state.manifest or "")
        except Stopped:
            return self._stopped()
        self._passed()
        return 0.0

    def _passed(self) -> None:
        now = self._s.clock.wall()
        why_not = self._may_serve()
        if why_not is None:
            self._apply(update.after(self.state, Event.PASSED, now, interruptions=0))
        elif why_not == "shadow":
            self._apply(update.after(self.state, Event.PASSED_AS_SHADOW, now, interruptions=0))
        else:
            self._apply(update.after(self.state, Event.PASSED_EARLY, now, interruptions=0, waiting_for="window"))

    def _may_serve(self) -> str | None:
        """None when the target may serve right now; else `shadow` or `window`."""
        wanted = self._wanted()
        if wanted is None:
            return None
        if wanted.mode == "shadow":
            return "shadow"
        local = dt.datetime.fromtimestamp(self._s.clock.wall()).astimezone()
        return None if windows.is_open(wanted.window, local) else "window"

    # -- waiting -----------------------------------------------------------------------------------------------------------

    def _shadow(self) -> float:
        if (left := self._left_behind()) is not None:
            return left
        if self._may_serve() is None and self._expired() is None:
            self._apply(update.after(self.state, Event.TO_SERVE, self._s.clock.wall()))
            return 0.0
        return REST_S

    def _wait(self) -> float:
        if (left := self._left_behind()) is not None:
            return left
        now = self._s.clock.wall()
        if self.state.waiting_for == "window":
            if self._may_serve() is None and self._expired() is None:
                self._apply(update.after(self.state, Event.WINDOW_OPEN, now, waiting_for=None))
                return 0.0
            return REST_S
        left_s = (self.state.retry_at or 0.0) - now
        if 0 < left_s <= update.RETRY_LONGEST_S:  # longer than that means that the clock was set back meanwhile
            return min(left_s, REST_S)
        self._apply(update.after(self.state, Event.RETRY_DUE, now, waiting_for=None, retry_at=None))
        return 0.0

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

    def _switch(self) -> float:
        """Loads, remembers the baseline, selects, switches: each may be repeated."""
        serving, target = self._s.serving, self._choice
        status = serving.status()
        loaded = serving.load(self.model, target.version, target.variant)
        manifest = self._s.store.manifest(self._ref)
        signed = manifest.files[manifest.variant(target.variant).file].sha256
        if loaded.sha256 not in (None, "", signed):
            message = f"serve loaded {loaded.sha256}, the manifest says {signed}"
            return self._bad(Event.BAD, Failure(reason=Reason.HASH_MISMATCH, message=message))
        if self.state.watched is None:
            watched = watching.Watched(
                baseline=self._baseline(status.model(self.model)),
                instance=status.instance,
                agent_version=status.agent_version,
                boot=self._s.boot,
            )
            self._save(self.state.but(watched=watched, activated=True))
        self._s.store.select(Selection(model=self.model, active=target, previous=self.state.before))
        serving.activate(self.model, target.version)
        self._looked = None
        self._apply(update.after(self.state, Event.ACTIVATED, self._s.clock.wall(), interruptions=0))
        return 0.0

    def _baseline(self, model: ModelStatus) -> watching.Stats | None:
        before = model.version(self.state.before.version) if self.state.before else None
        return before.stats.for_watch() if before else None

    def _activation_refused(self, refused: ServeRefused) -> float:
        if refused.code == "no_memory" and not self.state.activated:
            return self._put_off(Problem(Reason.TOO_MUCH_MEMORY, f"serve has no memory for it beside what runs: {refused}"))
        if refused.code == "not_in_store" and not self.state.activated:
            return self._put_off(Problem(Reason.STORE_FAILED, str(refused)))
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
        rules = self._s.store.manifest(self._ref).acceptance.watch
        serving = status.model(self.model).serving if status else None
        verdict = watching.judge(watched, rules, serving is not None and serving.version == state.target)
        if isinstance(verdict, watching.RollBack):
            return self._bad(Event.BAD, Failure(reason=verdict.reason, message=verdict.message, evidence=verdict.evidence))
        if isinstance(verdict, watching.Commit):
            return self._commit(verdict)
        if rebooted or watched.elapsed_s - self._saved_watch_s >= WATCH_SAVE_S:
            self._saved_watch_s = watched.elapsed_s
            self._save(state, quietly=True)
        return self._s.settings.watch_poll_s

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

    def _commit(self, verdict: watching.Commit) -> float:
        answer = self._answer(Outcome.COMMITTED, None, verdict.message, verdict.evidence)
        self._apply(update.committed(self.state, self._s.clock.wall(), answer))
        self._say("committed", f"release {answer.release} stays: {verdict.message}", release=answer.release)
        self._ask(lambda: self._s.serving.commit(self.model))
        self._s.housekeeping.need(self.model, _versions(self._s.store.selection(self.model)))
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
        if before is not None:
            self._s.store.select(Selection(model=self.model, active=before))
        else:
            self._s.store.deselect(self.model)
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
        if failure.reason in (Reason.OPERATOR, Reason.WITHDRAWN):
            self._apply(update.rest(state, Event.BACK_ONLY, now, answer))
        else:
            self._s.quarantine.add(self.model, state.manifest or "", answer)
            self._apply(update.rest(state, Event.BACK, now, answer))
        serves = f"release {state.before.version} serves" if state.before else "nothing serves"
        self._say("rolled-back", f"{serves} again: {answer.message}", release=answer.release, reason=answer.reason)
        self._s.housekeeping.need(self.model, _versions(self._s.store.selection(self.model)))

    # -- how a phase is left -----------------------------------------------------------------------------------------------

    def _left_behind(self) -> float | None:
        """Before anything serves: forget the update when something else is wanted. None when it is to go on."""
        if not self._overtaken():
            return None
        self._s.housekeeping.fetched(self.model)
        self._apply(update.rest(self.state, Event.OVERTAKEN, self._s.clock.wall()))
        return 0.0

    def _wanted(self) -> Wanted | None:
        """What the fleet wants, or what an operator on the device holds the model on; None before the fleet ever spoke."""
        desired, pinned = self._s.desired(), self._s.holds.pinned(self.model)
        if pinned is not None and not (desired and desired.withdrawn(self.model, pinned)):
            return Wanted(pinned)
        return desired.wanted(self.model) if desired else None

    def _overtaken(self) -> bool:
        wanted = self._wanted()
        return wanted is not None and wanted.release != self.state.target

    def _overtaken_by(self) -> Failure:
        desired, target = self._s.desired(), self.state.target
        if desired and target is not None and desired.withdrawn(self.model, target):
            return Failure(reason=Reason.WITHDRAWN, message=f"release {target} was withdrawn")
        return Failure(reason=Reason.OPERATOR, message=f"release {target} is no longer wanted")

    def _expired(self) -> Problem | None:
        """Why nothing may be installed now. Going back by hand to what was proved here needs nobody's fresh word."""
        desired = self._s.desired()
        if self.held:
            return None
        if desired is not None and desired.fresh(self._s.clock.wall()):
            return None
        return Problem(
            Reason.EXPIRED_METADATA, "what the fleet last said has expired: nothing is installed until it can be reached"
        )

    def _should_stop(self) -> bool:
        return self._ending() or self._overtaken()

    def _stopped(self) -> float:
        if self._ending():
            raise Stopped
        return 0.0  # overtaken: the next step sees it

    def _forgive_interruption(self) -> None:
        """An orderly end is no fault of the release: take back, in advance, what the next start will count."""
        if update.RESUME[self.state.phase].counts:
            self._save(self.state.but(interruptions=self.state.interruptions - 1), quietly=True)

    def _put_off(self, problem: Problem) -> float:
        outcome = Outcome.FAILED if problem.retryable or self.state.manifest else Outcome.REFUSED
        answer = self._answer(outcome, problem.reason, problem.message, problem.evidence)
        failure = Failure(reason=problem.reason, message=problem.message, evidence=problem.evidence)
        if self.state.tries == 0:
            self._say("put-off", problem.message, release=self.state.target, reason=problem.reason.value)
        self._apply(update.put_off(self.state, self._s.clock.wall(), failure, self._s.jitter(), answer))
        return 0.0

    def _refuse(self, problem: Problem, manifest: str) -> float:
        answer = self._answer(Outcome.REFUSED, problem.reason, problem.message, problem.evidence)
        self._s.quarantine.add(self.model, manifest, answer)
        self._s.housekeeping.fetched(self.model)
        self._apply(update.rest(self.state, Event.REFUSED, self._s.clock.wall(), answer))
        self._say("refused", problem.message, release=answer.release, reason=answer.reason)
        self._s.housekeeping.need(self.model, _versions(self._s.store.selection(self.model)))
        self._s.housekeeping.collect()
        return 0.0

    def _bad(self, event: Event, failure: Failure) -> float:
        self._apply(update.after(self.state, event, self._s.clock.wall(), failure=failure))
        return 0.0

    def _answer(
        self,
        outcome: Outcome,
        reason: Reason | None,
        message: str,
        evidence: dict[str, float | str] | None = None,
        *,
        rollout: str | None = None,
        release: int | None = None,
    ) -> Answer:
        return Answer(
            release=release if release is not None else self._choice_version,
            outcome=outcome,
            rollout=rollout or self.state.rollout,
            reason=reason.value if reason else None,
            message=message,
            at=self._s.clock.wall(),
            evidence=evidence or {},
        )

    # -- small things ------------------------------------------------------------------------------------------------------

    @property
    def _choice_version(self) -> int:
        assert self.state.target is not None
        return self.state.target

    @property
    def _ref(self) -> ReleaseRef:
        return ReleaseRef(self.model, self._choice_version)

    @property
    def _choice(self) -> Choice:
        assert self.state.variant is not None
        return Choice(version=self._choice_version, variant=self.state.variant)

    def _apply(self, state: UpdateState) -> None:
        """Persists, then lets everybody know."""
        self.progress = None
        self._saved_watch_s = 0.0
        self._save(state)

    def _save(self, state: UpdateState, *, quietly: bool = False) -> None:
        self._s.states.save(state)
        self.state = state
        if not quietly:
            self._s.teller.changed()

    def _status(self) -> ServeStatus | None:
        try:
            return self._s.serving.status()
        except (ServeAway, ServeRefused) as error:
            self.problem = str(error)
            return None

    def _ask(self, action: Callable[[], None]) -> None:
        """Something that is tried again at the next rest when it does not work now."""
        try:
            action()
        except (ServeAway, ServeRefused) as error:
            self.problem = str(error)

    def _say(self, name: str, message: str, *, release: int | None = None, reason: str | None = None) -> None:
        self._s.teller.say(name, message, model=self.model, release=release, reason=reason)


def _versions(selection: Selection | None) -> set[int]:
    if selection is None:
        return set()
    return {selection.active.version} | ({selection.previous.version} if selection.previous else set())


def _other_than(release: int, selection: Selection | None) -> Choice | None:
    """What to go back to should `release` fail: what serves, or what served before when `release` itself has to be repaired."""
    if selection is None or selection.active.version != release:
        return selection.active if selection else None
    return selection.previous
