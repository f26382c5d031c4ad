"""Drives one model through the update machine: the shell around `update.py` and `watch.py`. Every step persists, then acts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from agent.contract.assignment import Wanted
from agent.contract.names import ReleaseRef
from agent.contract.reports import Outcome, Phase
from agent.store import Choice, Selection, StoreError, hash_file
from agent.sync.ports import Stop
from agent.sync.problems import store_problem
from agent.sync.serving import ServeStatus
from agent.sync.updating import update
from agent.sync.updating.canarying import Canarying
from agent.sync.updating.model import REST_S, Surroundings, versions
from agent.sync.updating.shadowing import Shadowing
from agent.sync.updating.switching import Switching
from agent.sync.updating.update import Event, Failure

DISK_AGAIN_S = 30.0

SWITCHING = frozenset({Phase.CANARYING, Phase.ACTIVATING, Phase.WATCHING, Phase.ROLLING_BACK})
"""While these go on, whether what serves may serve is their own affair."""

OBSERVING = frozenset({Phase.SHADOWING, Phase.CANARYING, Phase.WATCHING})
"""These count what `serve` says, in memory for a few seconds before it is saved."""


class ModelUpdater(Shadowing, Canarying, Switching):
    """All phases of one model: those of rest here, those before it may serve in `preparing` and `shadowing`, those that change `serve` in
    `canarying` and `switching`.
    """

    def __init__(self, model: str, surroundings: Surroundings) -> None:
        super().__init__(model, surroundings)
        self._told_to_stop = False
        """Because its lease ended, in this life of the process."""
        if self.state.phase is Phase.FETCHING or self.state.waiting_for == "retry":
            surroundings.housekeeping.fetching(model, None)
        self._steps: dict[Phase, Callable[[], float]] = {
            Phase.STEADY: self._rest,
            Phase.QUARANTINED: self._rest,
            Phase.FETCHING: self._fetch,
            Phase.TRIALING: self._try,
            Phase.SHADOWING: self._shadow,
            Phase.WAITING: self._wait,
            Phase.CANARYING: self._canary,
            Phase.ACTIVATING: self._activate,
            Phase.WATCHING: self._watch,
            Phase.ROLLING_BACK: self._roll_back,
        }

    def step(self, ending: Stop) -> float:
        """Does what the phase asks for. Gives the seconds after which the next step is due, if nothing happens before.

        Raises: Stopped when `ending` said so in the middle.
        """
        self._ending = ending
        try:
            if self.state.phase not in SWITCHING and self._mind_lease():
                return REST_S
            with self._s.joint if self.state.phase is Phase.WAITING else contextlib.nullcontext():
                return self._steps[self.state.phase]()
        except OSError as error:
            self.problem = store_problem(error, f"updating model {self.model!r}").message
        except StoreError as error:
            self.problem = str(error)
        return DISK_AGAIN_S

    def leave(self) -> None:
        """The process ends in order, between two steps or after Stopped: what the next start will count against the release is
        taken back in advance, and what was counted since the last save is kept, because `serve` may be restarted too.
        """
        with self._s.joint:
            if update.counts(self.state):
                self._save(self.state.but(interruptions=self.state.interruptions - 1), quietly=True)
            elif self.state.phase in OBSERVING:
                self._save(self.state, quietly=True)

    # -- leases ------------------------------------------------------------------------------------------------------------

    def _mind_lease(self) -> bool:
        """Stops the model when its lease has ended, and brings it back when it was renewed. Whether it has to rest meanwhile.

        `serve` is asked without `joint`: that may take minutes, in which no other model could go back.
        What is to be brought back is on disk before anything is taken away, and stays there until it is selected again.
        """
        stopped = self.state.stopped
        try:
            selection = stopped or self._s.store.selection(self.model)
        except StoreError:
            return False  # mended at rest
        over = self._lease_over(selection.active.version) if selection else None
        self.stopped = over.message if over else None
        self._serving_lease_s = self.lease_s if selection is not None else None
        if selection is None:
            self._told_to_stop = False
            return False
        if over is not None:
            return self._stop_for_lease(selection, over)
        if stopped is not None or self._told_to_stop:
            self._resume_after_lease(selection)
        return False

    def _resume_after_lease(self, selection: Selection) -> None:
        with self._s.joint:
            if self.state.phase in SWITCHING:
                return
            if self.state.stopped is not None:
                self._s.store.select(selection)
                self._save(self.state.but(stopped=None))
            self._told_to_stop = False
            self.busy = True
        self._note("lease", "resumed", "the fleet was heard again", release=selection.active.version)
        self._say("resumed", f"release {selection.active.version} may serve again", release=selection.active.version)
        try:
            self._ask(lambda: self._serve_again(selection.active))
        finally:
            self.busy = False

    def _stop_for_lease(self, selection: Selection, over: Failure) -> bool:
        """Whether it stopped. A disk that refuses the word of it must not keep the model alive: `serve` unloads it all the same, as often as
        it comes back, until what is on disk can follow.
        """
        with self._s.joint:
            if self.state.phase in SWITCHING:
                return False
            first = self.state.stopped is None and not self._told_to_stop
            self._told_to_stop = True
            try:
                if self.state.stopped is None:
                    self._save(self.state.but(stopped=selection))
                self._s.store.deselect(self.model)
            except OSError as error:
                self.problem = store_problem(error, f"stopping model {self.model!r}").message
        if first:
            self._note("lease", "stopped", over.message, reason=over.reason, release=selection.active.version)
            self._say("stopped", over.message, release=selection.active.version, reason=over.reason.value)
        status = self._status()
        if status is not None and self.model in status.models:
            self._ask(lambda: self._s.serving.unload(self.model))
        return True

    # -- at rest -----------------------------------------------------------------------------------------------------------

    def _rest(self) -> float:
        wanted = self._wanted()
        status = self._status()
        selection = self._selection(status)
        if wanted is None:
            return self._tidy(selection, status)
        if self.state.wanted != wanted.release:
            self._s.approvals.expire(self.model, wanted.release)
            self._save(self.state.but(wanted=wanted.release))
        if wanted.release is None:
            return self._serve_nothing(selection, status)
        if selection and selection.active.version == wanted.release and not self._damaged(selection, status):
            return self._settled(selection, wanted, status)
        if self._refused_already(wanted) or self._expired() is not None:
            desired = self._s.desired()
            if selection and desired and desired.withdrawn(self.model, selection.active.version):
                return self._serve_nothing(selection, status)
            return self._tidy(selection, status)
        before = _other_than(wanted.release, selection)
        self._s.housekeeping.fetching(self.model, None)
        self._apply(
            update.begin(
                self.state, self._s.clock.wall(), wanted=wanted.release, rollout=wanted.rollout, mode=wanted.mode, before=before
            )
        )
        self._note("assignment", "wanted", self._why_wanted(wanted), release=wanted.release)
        self._say("update-started", f"release {wanted.release} is wanted", release=wanted.release)
        return 0.0

    def _why_wanted(self, wanted: Wanted) -> str:
        desired = self._s.desired()
        if self.held or desired is None:
            return "held by an operator on this device"
        why = f"rollout {wanted.rollout}" if wanted.rollout else "what every device runs"
        return f"{why}, assignment {desired.assignment.version}"

    def _selection(self, status: ServeStatus | None) -> Selection | None:
        """What is selected. A damaged record is replaced by what `serve` runs, or by nothing, and then the update begins anew."""
        store = self._s.store
        try:
            return store.selection(self.model)
        except StoreError as error:
            self._say("damaged", str(error))
        serving = status.model(self.model).serving if status else None
        try:
            if serving is not None:
                choice = Choice(version=serving.version, variant=serving.variant)
                store.release(self.model, choice)
                store.select(Selection(model=self.model, active=choice))
                return store.selection(self.model)
        except StoreError as error:
            self.problem = str(error)
        store.deselect(self.model)
        return None

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

    def _wait(self) -> float:
        """While it waits for another that is refused here, so perhaps for ever, nothing serves that nobody may run."""
        desired = self._s.desired()
        others = {model: release for model, release in (self._others(desired) or {}).items() if model != self.model}
        if any(self._s.quarantine.names_version(model, release) for model, release in others.items()):
            status = self._status()
            selection = self._selection(status)
            if selection and desired and desired.withdrawn(self.model, selection.active.version):
                self._serve_nothing(selection, status)
        return super()._wait()

    def _serve_nothing(self, selection: Selection | None, status: ServeStatus | None) -> float:
        if selection is not None:
            self._s.store.deselect(self.model)
            self._say("stopped", "no release of it may serve any more", release=selection.active.version)
        self._s.housekeeping.need(self.model, ())
        if status and self.model in status.models:
            self._ask(lambda: self._s.serving.unload(self.model))
        return REST_S

    def _tidy(self, selection: Selection | None, status: ServeStatus | None) -> float:
        """At rest, `serve` should have exactly what is selected: a crash between persisting and acting is made good here."""
        self.progress = None
        self._s.housekeeping.need(self.model, versions(selection))
        if selection is None or status is None:
            return REST_S
        model = status.model(self.model)
        active = selection.active
        if model.active != active.version or model.serving is None:
            self._ask(lambda: self._serve_again(active))
        elif model.previous is not None:
            self._ask(lambda: self._s.serving.commit(self.model))
        elif others := [version.version for version in model.versions.values() if version.version != active.version]:
            self._ask(lambda: self._s.serving.unload(self.model, others[0]))
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
            for name in manifest.variant(choice.variant).files:
                path = self._s.store.file(manifest, name)
                if path.exists() and hash_file(path) != manifest.files[name].sha256:
                    path.unlink()
        except (StoreError, KeyError):
            return  # the manifest itself is damaged or gone: fetching writes it again


def _other_than(release: int, selection: Selection | None) -> Choice | None:
    """What to go back to should `release` fail: what serves, or what served before when `release` itself has to be repaired."""
    if selection is None or selection.active.version != release:
        return selection.active if selection else None
    return selection.previous
