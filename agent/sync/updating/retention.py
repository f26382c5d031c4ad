"""What may be deleted from the store. Deciding is pure; deleting goes manifests first, so that no manifest names a missing
blob.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping

from agent.common import files
from agent.contract.names import SHA256, ReleaseRef
from agent.store import Selection, Store, StoreError
from agent.sync.fetching.staged import BLOCKS_SUFFIX


def named_by(selection: Selection | None) -> set[int]:
    """The releases that a selection names."""
    if selection is None:
        return set()
    return {selection.active.version} | ({selection.previous.version} if selection.previous else set())


def surplus(releases: Iterable[ReleaseRef], needed: Mapping[str, Collection[int | None]], keep_newest: int) -> list[ReleaseRef]:
    """The releases that nobody needs, oldest first, beyond the `keep_newest` newest unneeded ones of each model."""
    unneeded: dict[str, list[ReleaseRef]] = {}
    for ref in sorted(releases):
        if ref.version not in needed.get(ref.model, ()):
            unneeded.setdefault(ref.model, []).append(ref)
    return sorted(ref for refs in unneeded.values() for ref in refs[: max(0, len(refs) - keep_newest)])


def collect(store: Store, remove: Iterable[ReleaseRef], staging_needed: Collection[str] = ()) -> int:
    """Removes these releases, then every blob and staged download that no remaining release or `staging_needed` names.

    Gives the bytes freed. A manifest that cannot be read keeps all blobs: what it names is unknown.  Raises: OSError.
    """
    for ref in remove:
        store.remove_manifest(ref)
    try:
        named = {file.sha256 for ref in store.releases() for file in store.manifest(ref).files.values()}
    except StoreError:
        return 0
    freed = 0
    for folder, keep in ((store.blobs, named | set(staging_needed)), (store.staging, set(staging_needed))):
        for path in folder.iterdir():
            name = path.name.removesuffix(BLOCKS_SUFFIX)
            if name not in keep and (SHA256.fullmatch(name) or name.startswith(".")):
                freed += path.stat().st_blocks * 512  # a download under way has holes
                path.unlink()
        files.sync_directory(folder)
    return freed


class Housekeeping:
    """Keeps the store within bounds while several models may be fetching. Thread-safe."""

    def __init__(self, store: Store, keep_newest: int, held: Callable[[str], int | None] = lambda _: None) -> None:
        """`held`: the release that an operator here holds a model on, which may have to serve without any network."""
        self._held = held
        self._store = store
        self._keep_newest = keep_newest
        self._lock = threading.Lock()
        self._needed: dict[str, frozenset[int]] = {}
        self._fetching: dict[str, frozenset[str] | None] = {}

    def need(self, model: str, versions: Collection[int]) -> None:
        """The releases of the model that must stay: active, previous, target."""
        with self._lock:
            self._needed[model] = frozenset(versions)

    def need_selected(self, model: str, also: int | None = None) -> None:
        """What is selected for the model must stay, and `also` that release.  Raises: StoreError, OSError."""
        self.need(model, named_by(self._store.selection(model)) | ({also} if also is not None else set()))

    def fetching(self, model: str, blobs: Collection[str] | None) -> None:
        """The blobs the model's download needs; None while it is not known yet, which postpones collections until the disk is
        short.
        """
        with self._lock:
            self._fetching[model] = None if blobs is None else frozenset(blobs)

    def fetched(self, model: str) -> None:
        with self._lock:
            self._fetching.pop(model, None)

    def collect(self, *, short_of_space: bool = False) -> int:
        """Deletes what may go, oldest first; everything that is not needed when the disk is short. Gives the bytes freed.

        A model that nothing was said about keeps all its releases: it may have been set up by hand.  Raises: OSError.
        """
        with self._lock:
            if None in self._fetching.values() and not short_of_space:
                return 0
            needed = {model: {*versions, self._held(model)} for model, versions in self._needed.items()}
            releases = [ref for ref in self._store.releases() if ref.model in needed]
            remove = {*surplus(releases, needed, 0 if short_of_space else self._keep_newest)}
            remove |= {ref for ref in releases if ref.version not in needed[ref.model] and self._damaged(ref)}
            blobs = {blob for needed in self._fetching.values() if needed for blob in needed}
            return collect(self._store, sorted(remove), blobs)

    def _damaged(self, ref: ReleaseRef) -> bool:
        try:
            self._store.manifest(ref)
        except StoreError:
            return True
        return False
