"""A model loaded and warmed up in a copy of this process before it is in this one: what hangs or kills there hurts nobody.

The copies are forks, so that the engine, once imported, is there at no cost. They are made by a fork that stays as this process was before it
had threads or models (a zygote), one for each model, a few at a time; each ends with its verdict.
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
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from agent.serving.models import loading
from agent.serving.models.loading import Source
from runtimes import registry
from runtimes.contract import RuntimeFailure

PATIENCE_S = (
    1.0  # one that takes longer does not count among those that go on at once: what hangs must not keep the others waiting
)
OOM_SCORE = 300  # when memory runs out a copy goes, and the process that is to serve stays
MAX_REASON_BYTES = 4000
LAST_WORDS_BYTES = 400
_PR_SET_PDEATHSIG = 1


class Rehearsals:
    """Of several models. `limit_s` is what one may take; `descriptors` are closed in the copies.

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
                _settle(parent)
                for descriptor in descriptors:
                    os.close(descriptor)
                _rehearse_all(self._sources, say, threads, limit_s)
            finally:
                os._exit(0)
        os.close(say)

    def verdicts(self) -> Iterator[tuple[Source, str | None]]:
        """Each source once, as soon as it is known: why it cannot be loaded, None when it can."""
        left = dict(enumerate(self._sources))
        with os.fdopen(self._said, "rb") as said:
            for line in said:
                number, reason = json.loads(line)
                yield left.pop(number), reason
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
    number: int
    pid: int
    says: int  # where its verdict comes from
    errors: int  # a file of what its engine printed
    begun_s: float  # monotonic
    text: bytes = b""


def _rehearse_all(sources: Sequence[Source], say: int, threads: int, limit_s: float) -> None:
    """Writes a line for each source: its number, and the reason or null."""
    waiting = deque(enumerate(sources))
    running: dict[int, _Copy] = {}
    most = len(os.sched_getaffinity(0))
    while waiting or running:
        now = time.monotonic()
        while waiting and sum(now - copy.begun_s < PATIENCE_S for copy in running.values()) < most:
            copy = _fork(*waiting.popleft(), threads)
            running[copy.says] = copy
        steps = [copy.begun_s + step_s - now for copy in running.values() for step_s in (PATIENCE_S, limit_s)]
        ready, _, _ = select.select(list(running), [], [], min([step_s for step_s in steps if step_s > 0], default=0.0))
        for copy in list(running.values()):
            piece = os.read(copy.says, 65536) if copy.says in ready else None
            copy.text += piece or b""
            late = piece is None and time.monotonic() - copy.begun_s >= limit_s
            if piece or (piece is None and not late):
                continue
            del running[copy.says]
            reason = _end(copy, killed=f"loading it and a first run were not done in {limit_s:g} s" if late else None)
            os.write(say, json.dumps([copy.number, reason]).encode() + b"\n")


def _fork(number: int, source: Source, threads: int) -> _Copy:
    says, say = os.pipe2(os.O_CLOEXEC)
    errors = os.memfd_create("rehearsal", os.MFD_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _rehearse(source, threads, say, errors, parent)
    os.close(say)
    return _Copy(number, pid, says, errors, time.monotonic())


def _end(copy: _Copy, *, killed: str | None) -> str | None:
    """The verdict of a copy that has closed its pipe; or `killed`, of one that is ended now."""
    if killed is not None:
        os.kill(copy.pid, signal.SIGKILL)
    _, status = os.waitpid(copy.pid, 0)
    os.close(copy.says)
    with os.fdopen(copy.errors, "rb") as errors:
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
        last = " ".join(errors.read().decode(errors="replace").split())
    if killed is not None:
        return killed
    if copy.text:
        reason: str | None = json.loads(copy.text)
        return reason
    code = os.waitstatus_to_exitcode(status)
    how = signal.Signals(-code).name if -code in signal.valid_signals() else f"exit status {code}"
    return f"loading it or its first run ends the process ({how}){f': {last}' if last else ''}"


# -- in a copy -----------------------------------------------------------------------------------------------------------------


def _rehearse(source: Source, threads: int, say: int, errors: int, parent: int) -> NoReturn:
    """It ends here, whatever happens: nothing that the original has to do at its end is done by it."""
    try:
        _settle(parent)
        logging.disable(logging.CRITICAL)  # the original says it all once more
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        reason = None
        try:
            loading.load(source, threads=threads)
        except (RuntimeFailure, MemoryError, OSError, ValueError) as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - a runtime that breaks its contract is refused as well
            reason = f"{type(error).__name__}: {error}"
        os.write(say, json.dumps(reason and reason[:MAX_REASON_BYTES]).encode())
    finally:
        os._exit(0)


def _settle(parent: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # of a whole group or service: the original ends it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it had ended before that was asked for
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:  # noqa: PTH123
        score.write(str(OOM_SCORE))
