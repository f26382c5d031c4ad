"""What is selected on disk for a model, and `serve` brought to have exactly that."""

from __future__ import annotations

from agent.contract.names import ReleaseRef
from agent.store import Choice, Selection, Store, StoreError, hash_file
from agent.sync.serving import ServeStatus, ServingPort
from agent.sync.updating.model import REST_S, ModelUpdate
from agent.sync.updating.retention import Housekeeping, named_by


class Selected:
    """A crash between persisting and acting is made good here, while a model is at rest."""

    def __init__(self, store: Store, serving: ServingPort, housekeeping: Housekeeping) -> None:
        self._store = store
        self._serving = serving
        self._housekeeping = housekeeping

    def of(self, one: ModelUpdate, status: ServeStatus | None) -> Selection | None:
        """What is selected. A damaged record is replaced by what `serve` runs, or by nothing, and then the update begins anew.

        Raises: OSError.
        """
        try:
            return self._store.selection(one.model)
        except StoreError as error:
            one.say("damaged", str(error))
        serving = status.model(one.model).serving if status else None
        try:
            if serving is not None:
                choice = Choice(version=serving.version, variant=serving.variant)
                self._store.release(one.model, choice)
                self._store.select(Selection(model=one.model, active=choice))
                return self._store.selection(one.model)
        except StoreError as error:
            one.problem = str(error)
        self._store.deselect(one.model)
        return None

    def serve_it(self, one: ModelUpdate, selection: Selection | None, status: ServeStatus | None) -> float:
        """Asks `serve` for the next thing in which it differs from what is selected. Gives the seconds until the next step."""
        one.progress = None
        self._housekeeping.need(one.model, named_by(selection))
        if selection is None or status is None:
            return REST_S
        model, active = status.model(one.model), selection.active
        if model.active != active.version or model.serving is None:
            one.asked(lambda: self.serve_again(one.model, active))
        elif model.previous is not None:
            one.asked(lambda: self._serving.commit(one.model))
        elif others := [version.version for version in model.versions.values() if version.version != active.version]:
            one.asked(lambda: self._serving.unload(one.model, others[0]))
        else:
            one.problem = None
        return REST_S

    def serve_again(self, model: str, choice: Choice) -> None:
        """Brings a release that was selected before back to serve.  Raises: ServeAway, ServeRefused."""
        self._serving.load(model, choice.version, choice.variant)
        self._serving.activate(model, choice.version)
        self._serving.commit(model)

    def serve_nothing(self, one: ModelUpdate, selection: Selection | None, status: ServeStatus | None) -> float:
        """Takes the model away. Gives the seconds until the next step.  Raises: OSError."""
        if selection is not None:
            self._store.deselect(one.model)
            one.say("stopped", "no release of it may serve any more", release=selection.active.version)
        self._housekeeping.need(one.model, ())
        if status and one.model in status.models:
            one.asked(lambda: self._serving.unload(one.model))
        return REST_S

    def damaged(self, one: ModelUpdate, selection: Selection, status: ServeStatus | None) -> bool:
        """Whether the active release has to be fetched again: `serve` cannot run it, and the disk does not hold what was
        signed. What is damaged of it is removed.
        """
        model = status.model(one.model) if status else None
        if model is None or (model.active == selection.active.version and model.serving is not None):
            return False
        try:
            self._store.release(one.model, selection.active)
        except StoreError as error:
            one.say("damaged", f"{error}; it is fetched again", release=selection.active.version)
            self._remove_damaged(one.model, selection.active)
            return True
        return False

    def _remove_damaged(self, model: str, choice: Choice) -> None:
        try:
            manifest = self._store.manifest(ReleaseRef(model, choice.version))
            for name in manifest.variant(choice.variant).files:
                path = self._store.file(manifest, name)
                if path.exists() and hash_file(path) != manifest.files[name].sha256:
                    path.unlink()
        except (StoreError, KeyError):
            return  # the manifest itself is damaged or gone: fetching writes it again
