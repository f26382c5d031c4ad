"""How models come into memory at a start: in threads of their own, so that the main thread hears of a signal, and held to a
time.

The rules:
- A file given by hand was never tried here: it is rehearsed in a copy of this process first. What has a process of its own
  needs no copy.
- A release of the store was tried before it was selected, and is loaded at once; but not the one in whose loading the process
  before this one ended. That one is rehearsed, so that a model which kills or hangs does it once; the others do not wait for
  it.
- Until a model is there it is listed as LOADING. Files are waited for a moment only: those that take longer come when they are
  ready.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from agent.host.signals import Ending
from agent.serving.models import loading
from agent.serving.models.host import ModelHost
from agent.serving.models.loading import Guard, Limits, Source, unguarded
from agent.serving.models.loading_note import LoadingNote
from agent.serving.models.rehearsal import MOST_LATE, PATIENCE_S, Rehearsals
from agent.serving.models.residency import Residency
from agent.serving.models.room import discard, file_bytes
from agent.serving.models.version import Version
from agent.store import Choice, Selection, Store, StoreError
from runtimes.contract import RuntimeFailure

log = logging.getLogger(__name__)

FILES_PATIENCE_S = (
    5.0  # a large model on a slow card is there by then; clients of the others should not wait for one that hangs
)
SUSPECTS_PATIENCE_S = 2.0  # most are tried within it; one that hangs again takes up to `load_timeout_s`
EXPECTED = (RuntimeFailure, MemoryError, OSError, ValueError, StoreError)
"""What loading a model raises for reasons of the model, the store or the machine. Anything else is a runtime that broke its
contract.
"""


class Start(Protocol):
    """Loads the models at a start."""

    def begin(self, descriptors: Sequence[int]) -> None:
        """Begins to load. Called in the main thread, before there are others; copies of this process close the `descriptors`."""

    def wait(self, end: Ending) -> bool:
        """Waits until predictions can be asked for, or the end. False when none ever can, and why was logged."""

    def end(self) -> bool:
        """Nothing is loaded any more. False when a thread is still inside an engine."""


class _Loading:
    """What both kinds of a start share."""

    def __init__(self, host: ModelHost, residency: Residency, threads: int, limits: Limits, guard: Guard = unguarded) -> None:
        self._host = host
        self._residency = residency
        self._threads = threads
        self._limits = limits
        self._guard = guard
        self._ended = False
        self._working: list[None] = []  # one for each thread at work: adding and removing one is one step, and needs no lock
        self._told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._rehearsals: Rehearsals | None = None

    def end(self) -> bool:
        self._ended = True
        if self._rehearsals is not None:
            self._rehearsals.end()
        return not self._working

    def _rehearse(self, sources: Iterable[Source], descriptors: Sequence[int]) -> Rehearsals:
        self._rehearsals = Rehearsals(sources, threads=self._threads, limit_s=self._limits.load_s, descriptors=descriptors)
        return self._rehearsals

    def _work(self, name: str, act: Callable[[], None]) -> None:
        """Calls `act` in a thread that does not keep the process from ending."""

        def work() -> None:
            try:
                act()
            finally:
                self._working.pop()
                self._tell()

        self._working.append(None)
        threading.Thread(target=work, name=name, daemon=True).start()

    def _tell(self) -> None:
        os.eventfd_write(self._told, 1)

    def _await_change(self, end: Ending, timeout_s: float | None) -> bool:
        """Waits until something is loaded, has failed or is through, the time has passed, or the end. Whether something has
        changed.
        """
        end.wait(timeout_s, or_readable=self._told)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._told)
            return True
        return False

    def _load(self, source: Source) -> Version:
        """Loads a version. The budget is applied once it is active.  Raises: as `loading.load`."""
        version = loading.load(source, threads=self._threads, limits=self._limits, guard=self._guard)
        self._residency.restarts.follow(version)
        return version

    def _put(self, version: Version, *, active: bool) -> None:
        """Lists a version, in place of the one that was LOADING."""
        with self._residency.changing:
            if self._ended:
                discard(version)
                return
            served = self._host.get(version.name)
            if active and served is not None and served.active is not None:
                discard(version)  # the model was given another one meanwhile
                return
            self._host.add(version)
            if active:
                self._host.activate(version.name, version.number)
                self._residency.room.trim()


class FilesStart(_Loading):
    """Files named by hand, each of which becomes active; one that cannot be loaded is listed with its reason."""

    def __init__(
        self, host: ModelHost, residency: Residency, sources: Iterable[Source], *, threads: int, limits: Limits
    ) -> None:
        super().__init__(host, residency, threads, limits)
        self._sources = list(sources)
        self._alone: queue.SimpleQueue[Source] = queue.SimpleQueue()  # for processes of their own
        self._late = False

    def begin(self, descriptors: Sequence[int]) -> None:
        here = []
        for source in self._sources:
            self._put(_listed(source), active=False)
            if _is_isolated(source):
                self._alone.put(source)
            else:
                here.append(source)
        rehearsals = self._rehearse(here, descriptors) if here else None
        if rehearsals is not None:
            self._work("loading", lambda: self._load_tried(rehearsals))
        for _ in range(min(self._alone.qsize(), len(os.sched_getaffinity(0)))):
            self._work("loading", self._load_alone)

    def wait(self, end: Ending) -> bool:
        """Waits as long as one model after the other comes, and for FILES_PATIENCE_S after the last of them, if there is any."""
        while self._working and not end.is_set():
            serves = any(served.active for served in self._host)
            if not self._await_change(end, FILES_PATIENCE_S if serves else None) and serves:
                break
        self._late = True
        return bool(self._working) or any(served.active for served in self._host)

    def _load_tried(self, rehearsals: Rehearsals) -> None:
        for source, reason in rehearsals.verdicts():
            if self._ended:
                return
            if reason is None:
                self._load_one(source)
            else:
                self._refuse(source, reason)

    def _load_alone(self) -> None:
        while not self._ended:
            try:
                source = self._alone.get_nowait()
            except queue.Empty:
                return
            late = threading.Timer(PATIENCE_S, self._load_alone_too)
            late.daemon = True
            late.start()
            try:
                self._load_one(source)
            finally:
                late.cancel()

    def _load_alone_too(self) -> None:
        """One more thread does it, because one takes long: what hangs must not keep the others waiting."""
        if not self._ended and not self._alone.empty() and len(self._working) < MOST_LATE + len(os.sched_getaffinity(0)):
            self._work("loading", self._load_alone)

    def _load_one(self, source: Source) -> None:
        with self._residency.changing:
            self._residency.room.trim(file_bytes(source))
        try:
            version = self._load(source)
        except EXPECTED as error:
            self._refuse(source, str(error))
        except Exception as error:
            log.exception("the runtime of model %r broke its contract", source.name)
            self._refuse(source, f"{type(error).__name__}: {error}")
        else:
            self._put(version, active=True)
            if self._late:
                log.warning("model %r is served now", source.name)
            self._tell()

    def _refuse(self, source: Source, reason: str) -> None:
        log.error("cannot load model %r: %s", source.name, reason)
        self._put(loading.failed(source, reason), active=False)
        self._tell()


class StoreStart(_Loading):
    """The active release of every selected model, or its previous one when that fails. Nothing here stops the process."""

    def __init__(
        self,
        host: ModelHost,
        residency: Residency,
        store: Store,
        note: LoadingNote,
        *,
        threads: int,
        limits: Limits,
        before: Callable[[], None],
    ) -> None:
        super().__init__(host, residency, threads, limits, note.during)
        self._store = store
        self._note = note
        self._before = before
        self._rest_s: float | None = None  # monotonic; since when only suspects are left

    def begin(self, descriptors: Sequence[int]) -> None:
        """`before` is called first: only now is it known that this is the only server."""
        self._before()
        selections = self._store.selections()
        suspects = self._suspects(selections)
        rehearsals = self._rehearse(suspects, descriptors) if suspects else None
        self._work("loading", lambda: self._load_all(selections, suspects, rehearsals))

    def wait(self, end: Ending) -> bool:
        """Waits for all that was never suspected, and for SUSPECTS_PATIENCE_S for the rest."""
        while self._working and not end.is_set():
            if self._rest_s is not None and time.monotonic() - self._rest_s > SUSPECTS_PATIENCE_S:
                break
            self._await_change(end, 1.0)
            what = self._note.overdue(self._limits.load_s)
            if what is not None:
                log.error(
                    "loading %s has taken more than %g s: this process ends, and the next one tries it apart",
                    what,
                    self._limits.load_s,
                )
                return False
        return True

    def _suspects(self, selections: Mapping[str, Selection | StoreError]) -> list[Source]:
        """The sources that a process before this one was loading as it ended."""
        choices = {
            (selection.model, choice.version): choice
            for selection in selections.values()
            if isinstance(selection, Selection)
            for choice in (selection.active, selection.previous)
            if choice is not None
        }
        found = []
        for model, version in sorted(self._note.left(choices)):
            log.warning(
                "a process before this one ended while it loaded model %r version %d: it is tried apart first", model, version
            )
            self._note.suspect((model, version), "it is being tried apart")
            with contextlib.suppress(StoreError):  # which is said where it is loaded
                found.append(loading.source_of(self._store.release(model, choices[model, version])))
        return found

    def _load_all(
        self, selections: Mapping[str, Selection | StoreError], suspects: Sequence[Source], rehearsals: Rehearsals | None
    ) -> None:
        """What is over the memory budget is put out again, known from then on."""
        later = {source.name for source in suspects}
        for name, selection in selections.items():
            if self._ended:
                return
            if isinstance(selection, StoreError):
                log.error("model %r is not served: %s", name, selection)
                self._put(loading.failed(Source(name, 0, self._store.root, ""), str(selection)), active=False)
            elif name not in later:
                self._load_selection(selection)
        if rehearsals is None:
            return
        for source in suspects:
            self._put(_listed(source), active=False)
        self._rest_s = time.monotonic()
        self._tell()
        for source, reason in rehearsals.verdicts():
            why = reason and f"tried apart, {reason}; it is tried again when this program starts again"
            self._note.suspect((source.name, source.version), why)
        for name in sorted(later):
            now = self._store.selections().get(name)  # others are served meanwhile, and `sync` may have gone back
            if isinstance(now, Selection) and not self._ended:
                self._load_selection(now)

    def _load_selection(self, selection: Selection) -> None:
        reason = ""
        for choice in (selection.active, selection.previous):
            if choice is None:
                continue
            error = self._load_choice(selection.model, choice)
            if error is None:
                served = self._host.get(selection.model)
                if reason and served is not None and served.active is not None:
                    served.active.say(f"serves in place of the active release: {reason}")
                return
            reason = reason or error

    def _load_choice(self, model: str, choice: Choice) -> str | None:
        """Why it could not be loaded; None when it is."""
        source = Source(model, choice.version, self._store.root, "", variant=choice.variant)
        try:
            source = loading.source_of(self._store.release(model, choice))
            self._note.check(source)
            version = self._load(source)
        except EXPECTED as error:
            text = f"cannot load model {model!r} version {choice.version}: {loading.reason(source, error)}"
            log.error("%s", text)  # noqa: TRY400 - an expected failure with its reason; a trace would hide it
        except Exception as error:
            text = (
                f"cannot load model {model!r} version {choice.version}: {type(error).__name__}: {loading.reason(source, error)}"
            )
            log.exception("%s: the runtime broke its contract", text)
        else:
            self._put(version, active=True)
            return None
        self._put(loading.failed(source, text), active=False)
        return text


def _listed(source: Source) -> Version:
    version = Version(source.name, source.version, source.variant, source.sha256, source.runtime)
    version.source = source
    version.say("it is being loaded")
    return version


def _is_isolated(source: Source) -> bool:
    try:
        return loading.is_isolated(source)
    except RuntimeFailure:
        return False  # the copy says why
