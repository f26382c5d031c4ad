"""Triton's system shared memory extension: POSIX shared memory that a client created, named once and then used by name.

Off unless serve.shared_memory says so. A peer registers only what belongs to its own user, and finds only what its own user
registered. The memory is never mapped here: its owner may shrink it at any time, and touching what is gone would kill this
process. It is read and written as a file instead, which costs one copy and fails with a short read.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from typing import Literal

import numpy as np

from agent.serving.answers import Buffer, Refusal
from agent.serving.shared.regions import check_fits, check_range

FOLDER = "/dev/shm"  # noqa: S108 - where shm_open(3) keeps them
RESERVED = "triton_python_backend_shm_region_"
MAX_KEY_BYTES = 255
MAX_NAME_CHARS = 256
MAX_REGIONS = 64  # of one user
MAX_REGIONS_IN_ALL = 256  # each keeps a descriptor
OFF = "Client shared memory is disabled: set serve.shared_memory to owner in agent.yaml, or share a memfd over the connection"


class SystemRegion:
    """An open file and the part of it that was registered. Closed when nothing refers to it any more."""

    def __init__(self, key: str, fd: int, start: int, size: int, *, writable: bool, max_view_bytes: int) -> None:
        self.key = key
        self.start = start
        self.size = size
        self._fd = fd
        self._writable = writable
        self._max_view = max_view_bytes
        weakref.finalize(self, os.close, fd).atexit = False

    def view(self, name: str, offset: int, size: int) -> memoryview:
        """A copy."""
        check_range(name, offset, size, self.size)
        if size > self._max_view:
            raise Refusal(
                413, f"{size} bytes are asked for, larger than the {self._max_view} bytes allowed (serve.max_body_bytes)"
            )
        copy = np.empty(size, np.uint8).data
        at = self.start + offset
        have = 0
        while have < size:
            count = os.preadv(self._fd, [copy[have:]], at + have)
            if count == 0:
                raise _shrunk(name)
            have += count
        return copy

    def check(self, name: str, offset: int, size: int) -> None:
        check_range(name, offset, size, self.size)
        if not self._writable:
            raise Refusal(400, f"shared memory region '{name}' cannot be written by the server")

    def store(self, name: str, offset: int, size: int, data: Buffer) -> None:
        self.check(name, offset, size)
        view = memoryview(data)
        check_fits(name, view.nbytes, size)
        if not view.nbytes:
            return
        view, at = view.cast("B"), self.start + offset
        if os.fstat(self._fd).st_size < at + len(view):
            raise _shrunk(name)
        try:
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count
        except OSError as error:
            raise Refusal(500, f"shared memory region '{name}' cannot be written: {error.strerror}") from error


def _shrunk(name: str) -> Refusal:
    return Refusal(400, f"shared memory region '{name}' is smaller than when it was registered")


class SystemMemory:
    """The regions of all users. Any thread may call it."""

    def __init__(self, mode: Literal["off", "owner"], max_view_bytes: int) -> None:
        self._offered = mode == "owner"
        self._max_view = max_view_bytes
        self._regions: dict[tuple[int, str], SystemRegion] = {}
        self._lock = threading.Lock()
        self.largest_bytes = 0

    def find(self, uid: int, name: str) -> SystemRegion | None:
        return self._regions.get((uid, name))

    def register(self, uid: int, name: str, key: str, offset: int, size: int) -> None:
        """Raises: Refusal."""
        self._check_offered()
        if len(name) > MAX_NAME_CHARS:
            raise Refusal(400, f"a region's name has at most {MAX_NAME_CHARS} characters")
        with self._lock:
            if (uid, name) in self._regions:
                raise Refusal(400, f"shared memory region '{name}' already in manager")
            if len(self._regions) >= MAX_REGIONS_IN_ALL or sum(owner == uid for owner, _ in self._regions) >= MAX_REGIONS:
                raise Refusal(503, "too many shared memory regions are registered: unregister one")
            self._regions[uid, name] = self._open(uid, name, key, offset, size)
            self.largest_bytes = max(self.largest_bytes, size)

    def _open(self, uid: int, name: str, key: str, offset: int, size: int) -> SystemRegion:
        fd, writable = _open_file(uid, name, key)
        length = os.fstat(fd).st_size
        if offset < 0 or size < 1 or offset > length or size > length - offset:
            os.close(fd)
            raise Refusal(400, f"failed to register shared memory region '{name}': invalid args: it does not have these bytes")
        return SystemRegion(key, fd, offset, size, writable=writable, max_view_bytes=self._max_view)

    def unregister(self, uid: int, name: str | None) -> None:
        """One region of this user, or all. A request that uses one now goes on with it; a name that is not there is as good as
        gone.
        """
        self._check_offered()
        with self._lock:
            for key in [key for key in self._regions if key[0] == uid and name in {None, key[1]}]:
                del self._regions[key]
            self.largest_bytes = max((region.size for region in self._regions.values()), default=0)

    def status(self, uid: int, name: str | None) -> list[dict[str, object]]:
        """What this user registered.  Raises: Refusal (404) for a name that is not there."""
        self._check_offered()
        with self._lock:
            found = sorted(
                (key[1], region) for key, region in self._regions.items() if key[0] == uid and name in {None, key[1]}
            )
        if name is not None and not found:
            raise Refusal(404, f"Unable to find system shared memory region: '{name}'")
        return [{"name": n, "key": r.key, "offset": r.start, "byte_size": r.size} for n, r in found]

    def _check_offered(self) -> None:
        if not self._offered:
            raise Refusal(501, OFF)


def _open_file(uid: int, name: str, key: str) -> tuple[int, bool]:
    """A descriptor, and whether it can be written. What is wrong with somebody else's memory is not told.  Raises: Refusal."""
    file = key.removeprefix("/")
    refusal = Refusal(
        400,
        f"Unable to open shared memory region: '{name}': it must exist, belong to the user that registers it (uid {uid}) "
        "and let the server open it",
    )
    if not file or "/" in file or "\0" in file or file in {".", ".."} or len(os.fsencode(file)) > MAX_KEY_BYTES:
        raise refusal
    if file.startswith(RESERVED):
        raise Refusal(400, f"cannot register shared memory region '{name}': keys that begin with '{RESERVED}' are reserved")
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    for access, writable in ((os.O_RDWR, True), (os.O_RDONLY, False)):
        try:
            fd = os.open(f"{FOLDER}/{file}", flags | access)
        except PermissionError:
            continue
        except (OSError, ValueError):
            raise refusal from None
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and uid in {0, status.st_uid}:
            return fd, writable
        os.close(fd)
        break
    raise refusal
