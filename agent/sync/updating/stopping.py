"""A model whose lease has ended is stopped, and brought back when the fleet was heard again."""

from __future__ import annotations

from agent.store import Selection, Store, StoreError
from agent.sync.problems import store_problem
from agent.sync.serving import ServingPort
from agent.sync.updating.admission import Admission
from agent.sync.updating.model import ModelUpdate
from agent.sync.updating.selected import Selected
from agent.sync.updating.team import Teams
from agent.sync.updating.update import SWITCHING, Failure


class Stopping:
    """What is to be brought back is on disk before anything is taken away, and stays there until it is selected again.

    `serve` is asked without the teams' lock: that may take minutes, in which no other model could roll back.
    """

    def __init__(self, admission: Admission, selected: Selected, teams: Teams, store: Store, serving: ServingPort) -> None:
        self._admission = admission
        self._selected = selected
        self._teams = teams
        self._store = store
        self._serving = serving

    def step(self, one: ModelUpdate) -> bool:
        """Stops the model when its lease has ended, and brings it back when it was renewed. Whether it has to rest meanwhile.

        Raises: OSError.
        """
        stopped = one.state.stopped
        try:
            selection = stopped or self._store.selection(one.model)
        except StoreError:
            return False  # mended at rest
        over = self._admission.lease_over(one, selection.active.version) if selection else None
        one.stopped = over.message if over else None
        one.selected_lease_s = one.lease_s if selection is not None else None
        if selection is None:
            one.memory.lease_stop = False
            return False
        if over is not None:
            return self._stop(one, selection, over)
        if stopped is not None or one.memory.lease_stop:
            self._bring_back(one, selection)
        return False

    def _bring_back(self, one: ModelUpdate, selection: Selection) -> None:
        with self._teams.lock:
            if one.state.phase in SWITCHING:
                return
            if one.state.stopped is not None:
                self._store.select(selection)
                one.save(one.state.but(stopped=None))
            one.memory.lease_stop = False
            one.busy = True
        one.note("lease", "resumed", "the fleet was heard again", release=selection.active.version)
        one.say("resumed", f"release {selection.active.version} may serve again", release=selection.active.version)
        try:
            one.asked(lambda: self._selected.serve_again(one.model, selection.active))
        finally:
            one.busy = False

    def _stop(self, one: ModelUpdate, selection: Selection, over: Failure) -> bool:
        """Whether it stopped. A disk that refuses the word of it must not keep the model alive: `serve` unloads it all the
        same, as often as it comes back, until what is on disk can follow.
        """
        with self._teams.lock:
            if one.state.phase in SWITCHING:
                return False
            first = one.state.stopped is None and not one.memory.lease_stop
            one.memory.lease_stop = True
            try:
                if one.state.stopped is None:
                    one.save(one.state.but(stopped=selection))
                self._store.deselect(one.model)
            except OSError as error:
                one.problem = store_problem(error, f"stopping model {one.model!r}").message
        if first:
            one.note("lease", "stopped", over.message, reason=over.reason, release=selection.active.version)
            one.say("stopped", over.message, release=selection.active.version, reason=over.reason.value)
        status = one.asked(self._serving.status)
        if status is not None and one.model in status.models:
            one.asked(lambda: self._serving.unload(one.model))
        return True
