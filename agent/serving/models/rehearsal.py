"""A model loaded and warmed up in a copy of this process before it is in this one: what hangs or kills there hurts nobody.

The copies are forks, so that the engine, once imported, is there at no cost. They are made by a fork that stays as this process
was before it had threads or models (a zygote), a few at a time, and try one model after the other. A model that ends or hangs
one that has tried others before is tried once more by a new one: it may have died of what they left behind. Where many hang,
most of them wait until all others were tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from agent.host import priority
from agent.serving.models import loading
from agent.serving.models.loading import Source
from runtimes import registry
from runtimes.contract import RuntimeFailure

PATIENCE_S = (
    1.0  # one that takes longer does not count among those that go on at once: what hangs must not keep the others waiting
)
MOST_LATE = (
    8  # copies that take long: each takes a processor's time and memory. Of one more, the newest is tried again at the end
)
OOM_SCORE = 300  # when memory runs out a copy goes, and the process that is to serve stays
MAX_REASON_CHARACTERS = 4000
MAX_VERDICT_BYTES = 64 * 1024
LAST_WORDS_BYTES = 400
_PR_SET_PDEATHSIG = 1


class Rehearsals:
    """The rehearsals of several models. `limit_s` is how long one may last; `descriptors` are closed in the copies.

    Made in the main thread before there are others; waited for by any one thread.
    """

    def __init__(self, sources: Iterable[Source], *, threads: int, limit_s: float, descriptors: Sequence[int] = ()) -> None:
        self._sources = list(sources)
        for source in self._sources:
            with contextlib.suppress(RuntimeFailure):  # which the copy says better
                (registry.find(source.runtime) if source.runtime else registry.for_file(source.path)).version()
        self._said, say = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _prepare(parent)
                for descriptor in descriptors:
                    os.close(descriptor)
                Zygote(self._sources, say, threads, limit_s).rehearse_all()
            finally:
                os._exit(0)
        os.close(say)

    def verdicts(self) -> Iterator[tuple[Source, str | None]]:
        """Each source once, as soon as it is known: why it cannot be loaded, None when it can."""
        left = dict(enumerate(self._sources))
        with os.fdopen(self._said, "rb") as said:
            while left and (line := said.readline()).endswith(b"\n"):  # a half one is the last that was said
                number, reason = json.loads(line)
                yield left.pop(number), reason
        self.end()  # it has said all, or cannot say more; its copies end with it
        os.waitpid(self._pid, 0)
        for source in left.values():
            yield source, "it could not be tried before: the process for that has ended"

    def end(self) -> None:
        """Whoever waits for verdicts hears that there are no more."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)


# -- in the zygote -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Copy:
    pid: int
    line: socket.socket  # to it go numbers of sources, from it come verdicts
    errors: int  # a file of what its engine printed
    number: int = -1  # of the source that it tries
    tried: int = 0
    begun_s: float = 0.0  # monotonic

    def is_late(self) -> bool:
        return self.number >= 0 and time.monotonic() - self.begun_s >= PATIENCE_S

    def ask(self, number: int) -> bool:
        """Has it try the source of this number. False when it is not there any more."""
        try:
            self.line.send(b"%d" % number)
        except OSError:
            return False
        self.number, self.begun_s = number, time.monotonic()
        return True

    def hear(self) -> bytes:
        """Its verdict; nothing when it has ended, or has not come to one."""
        try:
            return self.line.recv(MAX_VERDICT_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            return b""


class Zygote:
    """Writes a line to `say` for each source: its number, and the reason or null."""

    def __init__(self, sources: Sequence[Source], say: int, threads: int, limit_s: float) -> None:
        self._sources = sources
        self._say = say
        self._threads = threads
        self._limit_s = limit_s
        self._waiting = deque(range(len(sources)))
        self._again: deque[int] = deque()  # for a copy that has tried nothing
        self._aside: deque[int] = deque()  # what took long while others waited
        self._copies: list[_Copy] = []

    def rehearse_all(self) -> None:
        while self._waiting or self._again or self._aside or any(copy.number >= 0 for copy in self._copies):
            self._give_work()
            for copy in self._heard():
                self._take_verdict(copy)
            late = sorted((copy for copy in self._copies if copy.is_late()), key=lambda copy: copy.begun_s)
            for copy in late:
                priority.lower_process(copy.pid)  # others are served meanwhile
            for copy in late[MOST_LATE:] if self._waiting or self._again else ():
                self._aside.append(copy.number)
                self._end(copy, killed="others come first")
        for copy in list(self._copies):
            self._end(copy, killed="it is not needed any more")

    def _give_work(self) -> None:
        """To as many copies as there are processors, not counting those that take long."""
        most = len(os.sched_getaffinity(0))
        while sum(copy.number >= 0 and not copy.is_late() for copy in self._copies) < most:
            queue = self._again or self._waiting
            if not queue and sum(copy.number >= 0 for copy in self._copies) < MOST_LATE:
                queue = self._aside
            if not queue:
                return
            copy = None if queue is self._again else next((copy for copy in self._copies if copy.number < 0), None)
            if copy is None:
                copy = _fork(self._sources, self._threads, [self._say, *(other.line.fileno() for other in self._copies)])
                self._copies.append(copy)
            if copy.ask(queue[0]):
                queue.popleft()
            else:  # what it tried before has ended it since
                self._end(copy, killed="it cannot be asked any more")

    def _heard(self) -> list[_Copy]:
        """The copies that have said something, have ended or have had their time; waits until one has, or takes long from then
        on.
        """
        at_work = [copy for copy in self._copies if copy.number >= 0]
        now = time.monotonic()
        steps = [copy.begun_s + step_s - now for copy in at_work for step_s in (PATIENCE_S, self._limit_s)]
        poll = select.poll()
        for copy in at_work:
            poll.register(copy.line, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(1000 * min([s for s in steps if s > 0], default=0.0))}
        return [copy for copy in at_work if copy.line.fileno() in ready or self._has_had_its_time(copy)]

    def _has_had_its_time(self, copy: _Copy) -> bool:
        return time.monotonic() - copy.begun_s >= self._limit_s

    def _take_verdict(self, copy: _Copy) -> None:
        said = copy.hear()
        number, copy.number = copy.number, -1
        copy.tried += 1
        if said:
            self._report(number, json.loads(said))
            return
        late = f"loading it and a first run were not done in {self._limit_s:g} s" if self._has_had_its_time(copy) else None
        reason = self._end(copy, killed=late)
        if copy.tried > 1:
            self._again.append(number)
        else:
            self._report(number, reason)

    def _report(self, number: int, reason: str | None) -> None:
        os.write(self._say, json.dumps([number, reason]).encode() + b"\n")

    def _end(self, copy: _Copy, *, killed: str | None) -> str:
        self._copies.remove(copy)
        return _end(copy, killed=killed)


def _fork(sources: Sequence[Source], threads: int, others: Sequence[int]) -> _Copy:
    """`others` are descriptors that are none of its business."""
    line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    errors = os.memfd_create("rehearsal", os.MFD_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        for other in (line.fileno(), *others):
            os.close(other)
        _rehearse(sources, threads, theirs, errors, parent)
    theirs.close()
    return _Copy(pid, line, errors)


def _end(copy: _Copy, *, killed: str | None) -> str:
    """Why a copy ended that is gone; or `killed`, of one that is ended now."""
    os.kill(
        copy.pid, signal.SIGKILL
    )  # how one has ended that has, that does not change; another one may have closed its line and go on
    _, status = os.waitpid(copy.pid, 0)
    copy.line.close()
    with os.fdopen(copy.errors, "rb") as errors:
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
        last = " ".join(errors.read().decode(errors="replace").split())
    if killed is not None:
        return killed
    code = os.waitstatus_to_exitcode(status)
    how = signal.Signals(-code).name if -code in signal.valid_signals() else f"exit status {code}"
    return f"loading it or its first run ends the process ({how}){f': {last}' if last else ''}"


# -- in a copy -----------------------------------------------------------------------------------------------------------------


def _rehearse(sources: Sequence[Source], threads: int, line: socket.socket, errors: int, parent: int) -> NoReturn:
    """It ends here, whatever happens: nothing that the original has to do at its end is done by it."""
    try:
        _prepare(parent)
        logging.disable(logging.CRITICAL)  # the original says it all once more
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        while number := line.recv(MAX_VERDICT_BYTES):
            reason = _try(sources[int(number)], threads)
            line.send(json.dumps(reason and reason[:MAX_REASON_CHARACTERS]).encode())
    finally:
        os._exit(0)


def _try(source: Source, threads: int) -> str | None:
    """Why it cannot be loaded; None when it can."""
    try:
        version = loading.load(source, threads=threads)
        if version.model is not None:
            version.model.close()
    except (RuntimeFailure, MemoryError, OSError, ValueError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - a runtime that breaks its contract is refused as well
        return f"{type(error).__name__}: {error}"
    return None


def _prepare(parent: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # of a whole group or service: the original ends it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it had ended before that was asked for
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:  # noqa: PTH123
        score.write(str(OOM_SCORE))
