"""One process at a time works on a store."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from agent.common import files
from agent.store import Store, StoreError


class StoreBusy(StoreError):
    """Another process is working on the store."""


@contextlib.contextmanager
def exclusive(store: Store) -> Iterator[None]:
    """Holds the store for this process, without what killed ones left half written.

    Raises: StoreBusy naming the one that has it; OSError.
    """
    path = store.private / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StoreBusy(f"another edge-agent sync holds the store {store.root} (process {holder}): stop it first") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        files.sweep(store.root)
        yield
    finally:
        os.close(fd)
