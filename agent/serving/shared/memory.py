"""Memory that clients share over their own connection: sealed memfds, mapped as long as the connection lives.

A descriptor comes with the bytes of `POST /v2/edge/memory/{name}/register` (SCM_RIGHTS). What is demanded of it makes the
mapping safe to read whatever the client does afterwards: it is a memfd, whose size is sealed, so that no page of it can go
away. What the client can always do is change the bytes; they are its own.

Descriptors are looked for only where they may come: on a connection that has asked for nothing else yet, or that shares memory.
After a register request that came without one, they are looked for again, so sending it once more always works.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import socket
import stat
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from agent.serving.answers import Buffer, Refusal
from agent.serving.shared.regions import check_fits, check_range, not_found
from agent.serving.shared.systemmemory import SystemMemory, SystemRegion

MAX_REGIONS = 64  # of one connection
MAX_REGIONS_IN_ALL = 512  # each keeps a descriptor
MAX_WAITING = 64  # descriptors, on all connections, whose request is not complete
CONNECTION_SHARE = 4  # a connection may map this part of what all may
MAX_NAME_CHARS = 256
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
ANCILLARY_BYTES = socket.CMSG_SPACE(2 * array.array("i").itemsize)  # one is taken; a second shows that there were several
CLOSE_ON_EXEC, CUT = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)  # each `&` of the enumeration makes a member anew
NONE_CAME = (
    "no descriptor came with this request: send one memfd as SCM_RIGHTS with its bytes. "
    "From now on this connection looks for descriptors again, so send it once more"
)
SEVERAL_CAME = "several descriptors came with one message: send one memfd with each register request"
TOO_MANY = "too many descriptors are under way at once: try again"


class MemoryBudget:
    """What all connections together may map and hold; counts what is really mapped, also by runs after the region has gone."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._bytes = self._regions = self._waiting = 0
        self._lock = threading.Lock()

    def map(self, fd: int, size: int) -> mmap.mmap:
        """The mapping, which is given back by itself when nothing uses it any more.  Raises: Refusal (503), OSError."""
        with self._lock:
            if self._bytes + size > self.limit_bytes or self._regions >= MAX_REGIONS_IN_ALL:
                raise Refusal(
                    503, f"clients share all the memory they may, {self.limit_bytes} bytes (serve.client_memory_bytes)"
                )
            self._bytes += size
            self._regions += 1
        try:
            mapping = _mapping(fd, size)
        except BaseException:
            self._unmapped(size)
            raise
        weakref.finalize(mapping, self._unmapped, size).atexit = False
        return mapping

    def _unmapped(self, size: int) -> None:
        with self._lock:
            self._bytes -= size
            self._regions -= 1

    def wait(self) -> bool:
        """Counts a descriptor whose request is not complete; False when there are too many."""
        with self._lock:
            if self._waiting >= MAX_WAITING:
                return False
            self._waiting += 1
            return True

    def waited(self) -> None:
        with self._lock:
            self._waiting -= 1


def _mapping(fd: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size)
    except OSError:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:  # sealed bytes cannot change: a private view is the same
            return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        return mmap.mmap(fd, size, prot=mmap.PROT_READ)


@dataclass(frozen=True, slots=True)
class _Region:
    mapping: mmap.mmap
    size: int
    writable: bool

    def view(self, name: str, offset: int, size: int) -> memoryview:
        check_range(name, offset, size, self.size)
        return memoryview(self.mapping)[offset : offset + size].toreadonly()

    def check(self, name: str, offset: int, size: int) -> None:
        check_range(name, offset, size, self.size)
        if not self.writable:
            raise Refusal(400, f"shared memory region '{name}' cannot be written: it is sealed, or its descriptor is read-only")

    def store(self, name: str, offset: int, size: int, data: Buffer) -> None:
        self.check(name, offset, size)
        view = memoryview(data)
        check_fits(name, view.nbytes, size)
        if view.nbytes:
            memoryview(self.mapping)[offset : offset + view.nbytes] = view.cast("B")


class ClientMemory:
    """What one connection shares, and finds of the system's regions. Belongs to the thread that owns the connection.

    `attentive`: descriptors may come, or something is to be forgotten when the request ends.
    """

    __slots__ = ("_budget", "_held", "_kept", "_largest", "_regions", "_system", "_touched", "_uid", "_waiting", "attentive")

    def __init__(self, budget: MemoryBudget, system: SystemMemory, uid: int) -> None:
        self.attentive = True
        self._budget = budget
        self._system = system
        self._uid = uid
        self._regions: dict[str, _Region] = {}
        self._held: dict[
            str, _Region | SystemRegion
        ] = {}  # where outputs of the request under way go, even if unregistered meanwhile
        self._waiting: list[int | str] = []  # descriptors that came, or why one that came was dropped
        self._touched = False
        self._largest = 0
        self._kept: tuple[object, Any] | None = None  # replaced as a whole: whoever runs the request reads it, too

    # -- descriptors ---------------------------------------------------------------------------------------------------------

    def receive(self, sock: socket.socket, room: memoryview) -> int:
        """As recv_into.  Raises: OSError."""
        count, ancillary, flags, _ = sock.recvmsg_into((room,), ANCILLARY_BYTES, CLOSE_ON_EXEC)
        if ancillary or flags & CUT:
            self._take(ancillary, cut=bool(flags & CUT))
        return count

    def _take(self, ancillary: Iterable[tuple[int, int, bytes]], *, cut: bool) -> None:
        came = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                came.frombytes(data[: len(data) - len(data) % came.itemsize])
        if len(came) == 1 and not cut and not self._waiting and self._budget.wait():
            self._waiting.append(came[0])
            return
        _close_all(came)
        if len(self._waiting) < 2:
            self._waiting.append(SEVERAL_CAME if len(came) > 1 or cut or self._waiting else TOO_MANY)

    def request_ended(self, *, nothing_buffered: bool) -> None:
        """A request was answered: descriptors that came and that it did not ask for are closed."""
        self._held.clear()
        if self._waiting and nothing_buffered:
            self._drop_waiting()
        if not (self._touched or self._regions or self._waiting):
            self.attentive = False
        self._touched = False

    def _drop_waiting(self) -> None:
        while self._waiting:
            fd = self._waiting.pop()
            if isinstance(fd, int):
                os.close(fd)
                self._budget.waited()

    def close(self) -> None:
        self._drop_waiting()
        self._kept = None
        self._regions.clear()
        self._held.clear()

    # -- what the routes do ----------------------------------------------------------------------------------------------------

    def register(self, name: str, size: int) -> None:
        """Maps the memfd that came with this request.  Raises: Refusal."""
        self._kept = None
        self._touched = self.attentive = True
        waiting = self._waiting.pop(0) if self._waiting else None
        if not isinstance(waiting, int):
            code = "no_descriptor" if waiting is None else None
            raise Refusal(503 if waiting is TOO_MANY else 400, waiting or NONE_CAME, code=code)
        self._budget.waited()
        try:
            self._check_room(name, size)
            _check_memfd(name, waiting, size)
            try:
                mapping = self._budget.map(waiting, size)
            except (OSError, ValueError) as error:
                raise Refusal(400, f"memory '{name}' cannot be mapped: {error}") from error
        finally:
            os.close(waiting)
        with memoryview(mapping) as view:
            self._regions[name] = _Region(mapping, size, not view.readonly)
        self._largest = max(self._largest, size)

    def _check_room(self, name: str, size: int) -> None:
        if len(name) > MAX_NAME_CHARS:
            raise Refusal(400, f"a region's name has at most {MAX_NAME_CHARS} characters")
        if name in self._regions:
            raise Refusal(400, f"shared memory region '{name}' already in manager")
        if len(self._regions) >= MAX_REGIONS:
            raise Refusal(503, f"this connection shares {MAX_REGIONS} regions already: unregister one")
        limit = self._budget.limit_bytes // CONNECTION_SHARE
        if sum(region.size for region in self._regions.values()) + size > limit:
            raise Refusal(503, f"a connection may share {limit} bytes (a quarter of serve.client_memory_bytes)")

    def unregister(self, name: str | None) -> None:
        """One region or all. A name that is not there is as good as gone; what is in use stays until it is not."""
        self._touched = self.attentive = True
        self._kept = None
        if name is None:
            self._regions.clear()
        else:
            self._regions.pop(name, None)
        self._largest = max((region.size for region in self._regions.values()), default=0)

    def status(self) -> list[dict[str, object]]:
        self._touched = self.attentive = True
        return [
            {"name": name, "byte_size": region.size, "writable": region.writable}
            for name, region in sorted(self._regions.items())
        ]

    @property
    def system(self) -> SystemMemory:
        return self._system

    @property
    def uid(self) -> int:
        return self._uid

    # -- what requests do: see regions.Regions
    # -----------------------------------------------------------------------------------

    @property
    def reach_bytes(self) -> int:
        """How large a tensor can be that a request on this connection does not carry itself."""
        others = self._system.largest_bytes
        return max(self._largest, others) if others else self._largest

    def view(self, name: str, offset: int, size: int) -> memoryview:
        return self._find(name).view(name, offset, size)

    def check(self, name: str, offset: int, size: int) -> None:
        region = self._find(name)
        region.check(name, offset, size)
        self._held[name] = region
        self.attentive = True

    def store(self, name: str, offset: int, size: int, data: Buffer) -> None:
        (self._held.get(name) or self._find(name)).store(name, offset, size, data)

    def keep(self, key: object, made: Any, names: Iterable[str]) -> None:
        if all(name in self._regions for name in names):  # a system region may go at any time by what others do
            self._kept = (key, made)

    def recall(self, key: object) -> Any:
        kept = self._kept
        return kept[1] if kept is not None and kept[0] is key else None

    def _find(self, name: str) -> _Region | SystemRegion:
        region = self._regions.get(name) or self._system.find(self._uid, name)
        if region is None:
            raise not_found(name)
        return region


def _check_memfd(name: str, fd: int, size: int) -> None:
    """Raises: Refusal (400) unless nothing that its owner does can take away a page of it."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise Refusal(400, f"the descriptor of memory '{name}' is not a memfd") from None
    if seals & SEALS != SEALS:
        raise Refusal(400, f"memory '{name}' can still change its size: seal it with F_SEAL_SHRINK and F_SEAL_GROW first")
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise Refusal(400, f"memory '{name}' is not made of ordinary pages: create the memfd without MFD_HUGETLB")
    if not 0 < size <= status.st_size:
        raise Refusal(400, f"memory '{name}' has {status.st_size} bytes, {size} are to be shared")


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
