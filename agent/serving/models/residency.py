"""How models come into memory, stay within the budget, and come back after they left it.

The rules:
- A version that was put out stays known, with its tensors. Who asks for it waits in its lane, which is closed, while the
  control thread loads it again; whom no room can be made for is told so, and when to ask again.
- `room` chooses who leaves, `restarts` follows the processes of isolated models.
- Everything here that changes a model runs with `changing` held, one at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from msgspec import structs

from agent.serving.answers import Refusal
from agent.serving.models import loading
from agent.serving.models.host import ModelHost
from agent.serving.models.loading import DEFAULT_LIMITS, Limits, Source
from agent.serving.models.loading_note import LoadingNote
from agent.serving.models.restarts import RETRY_S, Defer, Restarts
from agent.serving.models.room import NoRoom, Room, discard, file_bytes, size_of
from agent.serving.models.version import Version
from agent.serving.scheduling.lanes import Job
from agent.serving.scheduling.scheduler import Scheduler
from runtimes.contract import ModelInvalid

log = logging.getLogger(__name__)


class Waiting(Protocol):
    """What becomes of jobs that were taken out of the lane of a version."""

    def follow(self, job: Job) -> None:
        """Has it wait for the version that answers now."""

    def refuse(self, job: Job, error: Exception) -> None:
        """Answers it with the error."""


class Residency:
    """`budget_bytes` 0 is no budget: then nothing goes unless it is told to."""

    def __init__(
        self,
        host: ModelHost,
        scheduler: Scheduler,
        waiting: Waiting,
        *,
        engine_threads: int,
        budget_bytes: int = 0,
        pinned: Sequence[str] = (),
        min_residency_s: float = 10.0,
        limits: Limits = DEFAULT_LIMITS,
        note: LoadingNote | None = None,
    ) -> None:
        self._host = host
        self._scheduler = scheduler
        self._waiting = waiting
        self._engine_threads = engine_threads
        self._limits = limits
        self._summoned: set[Version] = set()
        self._lock = threading.Lock()  # of `_summoned`
        self._ending = False
        self.note = note or LoadingNote()
        self.changing = threading.Lock()
        self.room = Room(host, scheduler, budget_bytes=budget_bytes, pinned=pinned, min_residency_s=min_residency_s)
        self.restarts = Restarts(scheduler, self.changing, self, self._later)
        self._early: list[tuple[Callable[[], None], float]] = []  # work that came before there was a control thread
        self.defer: Defer = lambda do, delay_s: self._early.append((do, delay_s))
        host.on_close = self._closing

    def begin(self, defer: Defer) -> None:
        """There is a control thread now, which `defer` gives work to."""
        self.defer = defer
        for do, delay_s in self._early:
            defer(do, delay_s)

    def _later(self, do: Callable[[], None], delay_s: float) -> None:
        self.defer(do, delay_s)

    # -- loading ---------------------------------------------------------------------------------------------------------------

    def load(self, source: Source) -> Version:
        """The version, READY, in no list yet, within the budget.  Raises: as `loading.load`; NoRoom."""
        self.room.make(file_bytes(source), source.name, source.version)
        version = self._load(source)
        try:
            self.room.make(size_of(version), source.name, source.version)
        except NoRoom:
            discard(version)
            raise
        self.restarts.follow(version)
        return version

    def _load(self, source: Source) -> Version:
        self.note.check(source)
        return loading.load(source, threads=self._engine_threads, limits=self._limits, guard=self.note.during)

    def try_apart(self, source: Source) -> None:
        """Loads it and runs it once in a process that ends then: nobody has tried the file as it is now.  Raises: as
        `loading.load`.
        """
        if source.serving.isolation != "in-process" and not loading.is_isolated(source):
            apart = replace(source, serving=structs.replace(source.serving, isolation="process"))
            discard(loading.load(apart, threads=self._engine_threads, limits=self._limits))

    def is_overdue(self) -> bool:
        """Whether loading a model takes longer than it may, so that nothing else can be loaded: only a restart ends that."""
        what = self.note.overdue(self._limits.load_s)
        if what is not None:
            log.error("loading %s has taken more than %g s", what, self._limits.load_s)
        return what is not None

    # -- going -----------------------------------------------------------------------------------------------------------------

    def _closing(self, version: Version) -> None:
        """A version that is away goes for good: who waits for it waits for another one."""
        for job in self._scheduler.evacuate(version.lane, retire=True):
            self._waiting.follow(job)

    def end(self) -> None:
        """Nothing is brought back any more, and nobody waits for it."""
        self._ending = True
        self.restarts.end()
        for served in self._host:
            for version in list(served.versions.values()):
                if version.away:
                    self.turn_away(version, "the server is ending", 1.0)

    # -- coming back -----------------------------------------------------------------------------------------------------------

    def summon(self, version: Version) -> None:
        """Somebody waits in the lane of a version that is away. Any thread may call it, and goes on."""
        with self._lock:
            if version in self._summoned:
                return
            self._summoned.add(version)
        self.defer(lambda: self._answer(version), 0.0)

    def _answer(self, version: Version) -> None:
        with self.changing:
            try:
                trouble = self._trouble(version)
            finally:
                with self._lock:
                    self._summoned.discard(version)  # before they are turned away: who comes later summons anew
            if trouble is not None:
                self.turn_away(version, *trouble)

    def _trouble(self, version: Version) -> tuple[str, float] | None:
        """Brings it back; else why not, and when to ask again."""
        if self._ending:
            return "the server is ending", 1.0
        if version.away and version.loaded.process is not None and not self.restarts.clear(version):
            return version.reason, RETRY_S
        left_s = version.history.retry_s - time.perf_counter()
        if left_s > 0:
            return version.reason, left_s
        try:
            self.bring_back(version)
        except NoRoom as error:
            return str(error), error.retry_s
        except Exception as error:  # noqa: BLE001 - runtimes of third parties raise what they like
            return loading.reason(version.source, error), RETRY_S
        return None

    def bring_back(self, version: Version) -> None:
        """Loads a version again that is away, and opens its lane to who waits. With `changing` held.

        Raises: NoRoom, and what loading raises.
        """
        if not version.away:
            return
        what, history = f"model {version.name!r} version {version.number}", version.history
        self.room.make(size_of(version), version.name, version.number)
        version.presence.reloading()
        try:
            source: Source = version.source
            if loading.has_changed(source):
                raise ModelInvalid(f"{source.path} has changed since it was loaded; load the model by name")  # noqa: TRY301
            fresh = self._load(source)
        except Exception as error:
            before = version.reason.split(";")[0]
            version.failed(f"{before}; it cannot be loaded again: {loading.reason(version.source, error)}")
            history.retry_s = time.perf_counter() + RETRY_S
            log.error("%s cannot be loaded again: %s", what, error)  # noqa: TRY400 - the reason says it
            raise
        if history.has_crashed:
            history.restarts += 1
            history.has_crashed = False
        else:
            history.reloads += 1
        version.install(fresh)
        version.come_back()
        self._scheduler.open(version.lane)
        self.restarts.follow(version)
        self._keep_within(version)

    def _keep_within(self, version: Version) -> None:
        """It may have turned out larger than before. Too much is better than a model that nobody can use."""
        try:
            self.room.make(0, version.name, version.number)
        except NoRoom as error:
            log.warning("%s", error)

    def turn_away(self, version: Version, why: str, retry_s: float = RETRY_S) -> None:
        """Refuses who waits for it."""
        headers = ((b"retry-after", b"%d" % max(1, round(retry_s + 0.5))),)
        for job in self._scheduler.evacuate(version.lane, retire=False):
            text = f"model '{version.name}' version {version.number} is not in memory: {why}"
            self._waiting.refuse(job, Refusal(503, text, code="evicted", headers=headers))
