"""What changing a model takes besides the switch: finding its files, loading it beside the others or in place of one, bringing
it back.

All of it runs with the residency's `changing` held, by one thread at a time. What goes wrong is a Refusal with a code for
programs.
"""

from __future__ import annotations

import logging

from agent.serving.answers import Refusal
from agent.serving.models import loading
from agent.serving.models.host import ModelHost, Served
from agent.serving.models.residency import Residency
from agent.serving.models.swapping import SwapLost, Swapper
from agent.serving.models.version import Version
from agent.store import Choice, Selection, Store, StoreError
from runtimes.contract import ModelInvalid, RuntimeUnavailable
from runtimes.messages import without_paths

log = logging.getLogger(__name__)


class Changes:
    """Changes a host's models. `store` is what they are loaded from; None when files were named instead."""

    def __init__(self, host: ModelHost, store: Store | None, residency: Residency, swapper: Swapper) -> None:
        self._host = host
        self._store = store
        self._residency = residency
        self._swapper = swapper
        self._changing = residency.changing  # other transports than HTTP bring threads of their own

    def load_selected(self, name: str) -> None:
        """Makes serve what the store selects; on files, loads the file again when it changed.  Raises: Refusal."""
        with self._changing:
            if self._store is None:
                self._load_file_again(name)
                return
            selection = self._selection(name)
            if selection is None:
                raise Refusal(404, f"failed to load '{name}': the store selects no release of it", code="not_found")
            self.bring(name, selection.active)
            self._host.activate(name, selection.active.version)

    def unload_all(self, name: str) -> None:
        """Drains and closes every version of a model; they stay listed as unloaded.  Raises: Refusal (404)."""
        with self._changing:
            sources = [v.source for v in self._host.served(name).versions.values() if v.source is not None]
            self._host.unload(name, None)
            for source in sources:
                self._host.add(loading.failed(source, "unloaded"))

    def _load_file_again(self, name: str) -> None:
        for old in list(self._host.served(name).versions.values()):
            source: loading.Source = old.source
            try:
                source = loading.of_file(source)
            except (StoreError, OSError) as error:
                raise Refusal(404, f"failed to load '{name}': {loading.reason(source, error)}", code="not_found") from error
            if old.answers and old.sha256 == source.sha256:
                self._bring_back(old)
                continue
            self._host.replace(self._loaded(source, untried=True))

    def load(self, name: str, choice: Choice) -> Version:
        """Loads a version beside whatever is there; it is READY.  Raises: Refusal."""
        served = self._host.get(name)
        present = served.versions.get(choice.version) if served else None
        if present is not None and present.answers:
            if present.variant == choice.variant:
                self._bring_back(present)
                return present
            raise Refusal(
                409,
                f"model {name!r} version {choice.version} is loaded as variant {present.variant!r}; unload it first",
                code="other_variant",
            )
        source = self._source(name, choice)
        try:
            version = self._loaded(source)
        except Refusal as refusal:
            self._host.add(loading.failed(source, str(refusal)))
            raise
        self._host.add(version)
        return version

    def bring(self, name: str, choice: Choice) -> None:
        """Loads a version, in place of the active one if there is no room for both.  Raises: Refusal."""
        try:
            self.load(name, choice)
        except Refusal as refusal:
            served = self._host.get(name)
            if refusal.code != "no_memory" or served is None or served.active is None:
                raise
            before = served.active
            self.swap(name, choice)
            served.rollbacks += before.number > choice.version

    def swap(self, name: str, choice: Choice) -> Served:
        """Loads a version in place of the active one, without room for both; it is active.  Raises: Refusal."""
        served = self._host.get(name)
        old = served.active if served else None
        present = served.versions.get(choice.version) if served else None
        if served is None or old is None or old.state != "READY" or (present is not None and present.answers):
            self.load(name, choice)
            return self._host.activate(name, choice.version)
        source = self._source(name, choice)
        try:
            served = self._swapper.swap(served, old, source)
        except Refusal:
            raise
        except SwapLost as lost:
            raise self._not_swapped(source, _load_refusal(source, lost.refused), str(lost)) from lost
        except Exception as error:
            raise self._not_swapped(source, _load_refusal(source, error), f"version {old.number} serves again") from error
        log.info("model %r: version %d took the place of version %d", name, source.version, old.number)
        return served

    def _not_swapped(self, source: loading.Source, refusal: Refusal, outcome: str) -> Refusal:
        text = f"{refusal}; {outcome}"
        self._host.add(loading.failed(source, text))
        return Refusal(refusal.status, text, code=refusal.code)

    def _loaded(self, source: loading.Source, *, untried: bool = False) -> Version:
        try:
            if untried:
                self._residency.try_apart(source)
            return self._residency.load(source)
        except Exception as error:
            raise _load_refusal(source, error) from error

    def _bring_back(self, version: Version) -> None:
        try:
            self._residency.bring_back(version)
        except Exception as error:
            raise _load_refusal(version.source, error) from error

    def _source(self, name: str, choice: Choice) -> loading.Source:
        if self._store is None:
            raise Refusal(409, "this server was started on files and has no store to load from", code="not_in_store")
        try:
            return loading.source_of(self._store.release(name, choice))
        except (StoreError, ValueError, OSError) as error:
            raise Refusal(409, without_paths(str(error)), code="not_in_store") from error

    def selected(self, name: str, number: int) -> Choice:
        """The choice of variant that the model's Selection holds for this version.  Raises: Refusal."""
        selection = self._selection(name)
        for choice in (selection.active, selection.previous) if selection else ():
            if choice is not None and choice.version == number:
                return choice
        raise Refusal(409, f"model {name!r} version {number} is neither loaded nor selected in the store", code="not_in_store")

    def _selection(self, name: str) -> Selection | None:
        try:
            return self._store.selection(name) if self._store else None
        except (StoreError, OSError) as error:
            raise Refusal(409, without_paths(str(error)), code="not_in_store") from error


def _load_refusal(source: loading.Source, error: Exception) -> Refusal:
    what = f"cannot load model {source.name!r} version {source.version}: {loading.reason(source, error)}"
    if isinstance(error, RuntimeUnavailable):
        return Refusal(503, what, code="runtime_unavailable")
    if isinstance(error, ModelInvalid):
        return Refusal(422, what, code="model_invalid")
    if isinstance(error, MemoryError):
        return Refusal(507, what, code="no_memory")
    log.error("%s", what, exc_info=error)
    return Refusal(500, f"{what} ({type(error).__name__})", code="load_failed")
