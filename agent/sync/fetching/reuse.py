"""Blocks that this store holds already: in files of any release, and in downloads that are not finished.

Where a block should be is what manifests say; whether it is there is found by hashing. So damaged files cost a download and no
more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from agent.contract.manifest import File
from agent.host.priority import rest
from agent.store import Store, StoreError
from agent.sync.fetching.pieces import pieces
from agent.sync.fetching.staged import BLOCKS_SUFFIX, Staged, noted
from agent.sync.ports import Stop
from agent.sync.problems import Stopped

ASK_EVERY = 64
"""Blocks between two questions whether to give up."""


def copy(store: Store, staged: Staged, stop: Stop) -> None:
    """Adds the missing pieces that the store has elsewhere.  Raises: Stopped, OSError of the staged file."""
    missing = staged.missing
    if not missing:
        return
    where = _where(_files(store, besides=staged.file.sha256), {piece.digest for piece in missing}, store)
    with contextlib.ExitStack() as opened:
        open_files: dict[Path, int | None] = {}
        for number, piece in enumerate(missing):
            if number % ASK_EVERY == 0 and stop():
                raise Stopped
            place = where.get(piece.digest)
            if place is not None:
                staged.add(piece, _read(*place, piece.size_bytes, open_files, opened))
                rest()


def _files(store: Store, besides: str) -> Iterator[File]:
    for ref in store.releases():
        with contextlib.suppress(StoreError, OSError):  # a manifest that cannot be read names nothing
            yield from (file for file in store.manifest(ref).files.values() if file.sha256 != besides)
    for note in sorted(store.staging.glob(f"*{BLOCKS_SUFFIX}")):
        file = noted(note)
        if file is not None and file.sha256 != besides:
            yield file


def _where(candidates: Iterable[File], wanted: set[bytes], store: Store) -> dict[bytes, tuple[Path, int]]:
    """For each wanted block the first file that should have it, and where in it. A staged file may not have it yet."""
    found: dict[bytes, tuple[Path, int]] = {}
    for file in candidates:
        path = store.blob(file.sha256) if store.has_blob(file.sha256) else store.staging / file.sha256
        if not file.blocks or not path.is_file():
            continue
        for piece in pieces(file):
            if piece.digest in wanted and (piece.digest not in found or found[piece.digest][0].parent == store.staging):
                found[piece.digest] = (path, piece.start)
    return found


def _read(path: Path, start: int, size: int, open_files: dict[Path, int | None], opened: contextlib.ExitStack) -> bytes:
    """The bytes there; none when they cannot be read: then they are fetched."""
    if path not in open_files:
        try:
            open_files[path] = fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, fd)
        except OSError:
            open_files[path] = None
    fd_or_none = open_files[path]
    try:
        return os.pread(fd_or_none, size, start) if fd_or_none is not None else b""
    except OSError:
        return b""
