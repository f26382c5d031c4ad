"""The manifests in the store, each read and parsed once for as long as its file stays what it was."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from agent.store import Store
from agent.sync.ports import Signed

KEPT_BYTES = 1024 * 1024
"""Manifests are kept up to this size together, measured as they are on disk. One of a small release has 2 kB; one with a list
of blocks may have megabytes, and is then the only one that is kept."""


@dataclass(frozen=True)
class _Kept:
    stamp: tuple[int, int, int]
    """The inode, the time of the last change and the length of the file that was read."""
    size_bytes: int
    sha256: str
    manifest: ReleaseManifest


class Manifests:
    """Gives the store's manifests without reading a file again that has not changed. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: OrderedDict[ReleaseRef, _Kept] = OrderedDict()

    def get(self, ref: ReleaseRef) -> ReleaseManifest:
        """Raises: StoreError when the release is not in the store or its manifest is damaged."""
        return self._find(ref).manifest

    def signed(self, ref: ReleaseRef) -> Signed:
        """The manifest with its exact bytes, which are read anew.  Raises: StoreError as `get` does."""
        data = self._store.manifest_bytes(ref)
        return Signed(data, hashlib.sha256(data).hexdigest(), self._store.parse(ref, data))

    def _find(self, ref: ReleaseRef) -> _Kept:
        with self._lock:
            stamp = self._store.manifest_stamp(ref)
            kept = self._kept.get(ref)
            if kept is None or kept.stamp != stamp:
                kept = self._read(ref, stamp, kept)
            self._kept[ref] = kept
            self._kept.move_to_end(ref)
            self._forget_oldest()
            return kept

    def _read(self, ref: ReleaseRef, stamp: tuple[int, int, int], known: _Kept | None) -> _Kept:
        """The same bytes in another file, as a release that was fetched again has them, are not parsed again."""
        self._kept.pop(ref, None)
        data = self._store.manifest_bytes(ref)
        sha256 = hashlib.sha256(data).hexdigest()
        same = known is not None and known.sha256 == sha256
        manifest = known.manifest if known is not None and same else self._store.parse(ref, data)
        return _Kept(stamp, len(data), sha256, manifest)

    def _forget_oldest(self) -> None:
        while len(self._kept) > 1 and sum(kept.size_bytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)


def missing(ref: ReleaseRef, error: Exception) -> str:
    """What to say of a release of which the store lost something."""
    return f"release {ref} has to be fetched again: {error}"
