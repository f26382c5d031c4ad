"""Which models are in memory: the budget, whom it puts out, and how what was put out comes back when it is asked for.

The rules:
- An evicted version stays known, with its tensors. Who asks for it waits in its lane, which is held, while the control thread loads
  it again; whom no room can be made for is told so, and when to ask again.
- Only the version that serves alone for its model may go: one with a candidate or a previous one beside it is being updated.
- A model counts with what was measured when it was loaded, at least with the size of its file: memory that an earlier model gave
  back to the process does not show when the next one takes it.
- Everything here that changes a model runs with `changing` held, one at a time.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from msgspec import structs

from agent.host import memory
from agent.serving.answers import Refusal
from agent.serving.models import budget, loading
from agent.serving.models.budget import Resident
from agent.serving.models.host import ModelHost, Process, Served, Version
from agent.serving.models.loading import DEFAULT_LIMITS, Limits, Source
from agent.serving.models.loading_note import LoadingNote
from agent.serving.scheduling.lanes import Job
from agent.serving.scheduling.scheduler import Scheduler
from runtimes.contract import ModelInvalid

log = logging.getLogger(__name__)

BUSY_PATIENCE_S = 0.5  # how long a moment is waited for in which nobody is inside a model that is to go
LOOK_S = 0.005
CLEAR_S = 10.0  # those in a process that ended fail within twice the time that it may take to be waited for
RETRY_S = 5.0  # after a load that failed; a model that cannot be loaded again must not keep the control thread busy

FIRST_S = 0.5  # before a process that ended twice in a row is started again; doubled each time, up to
LONGEST_S = 60.0
CALM_S = 60.0  # a process that lived so long begins anew with counting


class Defer(Protocol):
    """Gives the control thread work, to be done after a while."""

    def __call__(self, do: Callable[[], None], delay_s: float) -> None: ...


class Waiting(Protocol):
    """What becomes of jobs that were taken out of the lane of a version."""

    def follow(self, job: Job) -> None:
        """Has it wait for the version that answers now."""

    def refuse(self, job: Job, error: Exception) -> None:
        """Answers it with the error."""


class NoRoom(MemoryError):
    """The budget does not allow it. `retry_s`: when that may be different."""

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


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
        self._pinned = frozenset(pinned)
        self._min_residency_s = min_residency_s
        self._limits = limits
        self.note = note or LoadingNote()
        self._summoned: set[Version] = set()
        self._lock = threading.Lock()  # of `_summoned`
        self._stuck: set[Version] = set()  # whose process ended, and a request in it did not
        self._ending = False
        self.budget_bytes = budget_bytes
        self.changing = threading.Lock()
        self._early: list[tuple[Callable[[], None], float]] = []  # work that came before there was a control thread
        self.defer: Defer = lambda do, delay_s: self._early.append((do, delay_s))
        host.on_close = self._closing

    def begin(self, defer: Defer) -> None:
        """There is a control thread now, which `defer` gives work to."""
        self.defer = defer
        for do, delay_s in self._early:
            defer(do, delay_s)

    @property
    def used_bytes(self) -> int:
        return sum(size_of(version) for _, version in self._resident())

    # -- loading ---------------------------------------------------------------------------------------------------------------

    def load(self, source: Source) -> Version:
        """The version, READY, in no list yet, within the budget.  Raises: as `loading.load`; NoRoom."""
        self._make_room(file_bytes(source), source.name, source.version)
        version = self._load(source)
        try:
            self._make_room(size_of(version), source.name, source.version)
        except NoRoom:
            discard(version)
            raise
        self.watch(version)
        return version

    def _load(self, source: Source) -> Version:
        self.note.check(source)
        return loading.load(source, threads=self._engine_threads, limits=self._limits, guard=self.note.during)

    def try_apart(self, source: Source) -> None:
        """Loads it and runs it once in a process that ends then: nobody has tried the file as it is now.  Raises: as `loading.load`."""
        if source.serving.isolation != "in-process" and not loading.is_isolated(source):
            apart = replace(source, serving=structs.replace(source.serving, isolation="process"))
            discard(loading.load(apart, threads=self._engine_threads, limits=self._limits))

    def is_overdue(self) -> bool:
        """Whether loading a model takes longer than it may, so that nothing else can be loaded: only a restart ends that."""
        what = self.note.overdue(self._limits.load_s)
        if what is not None:
            log.error("loading %s has taken more than %g s", what, self._limits.load_s)
        return what is not None

    def settle(self, needed_bytes: int = 0) -> None:
        """Puts out what is over the budget, however new: for a start, when nobody has asked for anything yet."""
        if not self.budget_bytes:
            return
        residents, versions = self._residents()
        excess = self._excess(residents, needed_bytes)
        chosen = budget.choose(residents, excess, time.perf_counter(), 0.0)
        if chosen is None:
            chosen = [resident for resident in residents if resident.free]
            log.warning("the models that must stay in memory take more than the budget of %d bytes", self.budget_bytes)
        for resident in chosen:
            self._evict(versions[resident.key])

    def _make_room(self, needed_bytes: int, name: str, number: int) -> None:
        """For a version whose model's other versions stay: they answer while it is loaded.  Raises: NoRoom."""
        if not self.budget_bytes:
            return
        deadline = time.perf_counter() + BUSY_PATIENCE_S
        while True:
            now = time.perf_counter()
            residents, versions = self._residents(sparing=name)
            excess = self._excess(residents, needed_bytes)
            chosen = budget.choose(residents, excess, now, self._min_residency_s)
            if chosen is None:
                what = f"model {name!r} version {number} needs {needed_bytes} bytes"
                self._wait_or_give_up(residents, [v.name != name and self._may_go(v) for v in versions], excess, what, deadline)
            elif all(self._evict(versions[resident.key]) for resident in chosen):
                return
            else:
                time.sleep(LOOK_S)  # somebody has just come in

    def _wait_or_give_up(
        self, residents: Sequence[Resident], may_go: Sequence[bool], excess: int, what: str, deadline: float
    ) -> None:
        """Returns when it is worth looking again: somebody is inside a model that could go.  Raises: NoRoom."""
        now = time.perf_counter()
        hopeful = [Resident(r.key, r.size_bytes, r.used_s, r.loaded_s, may_go[r.key]) for r in residents]
        if now < deadline and budget.choose(hopeful, excess, now, self._min_residency_s) is not None:
            time.sleep(LOOK_S)
            return
        used = sum(r.size_bytes for r in residents)
        raise NoRoom(
            f"{what}; of the memory budget's {self.budget_bytes} are {used} in use by models that may not be unloaded now",
            max(1.0, budget.soonest_s(residents, now, self._min_residency_s)),
        )

    def _excess(self, residents: Sequence[Resident], needed_bytes: int) -> int:
        return sum(r.size_bytes for r in residents) + needed_bytes - self.budget_bytes

    def _residents(self, sparing: str = "") -> tuple[list[Resident], list[Version]]:
        versions = [version for _, version in self._resident()]
        residents = [
            Resident(
                key,
                size_of(version),
                max(version.loaded_s, version.stats.last_s),
                version.loaded_s,
                version.name != sparing and self._may_go(version) and self._is_quiet(version),
            )
            for key, version in enumerate(versions)
        ]
        return residents, versions

    def _resident(self) -> Iterator[tuple[Served, Version]]:
        for served in self._host:
            for version in list(served.versions.values()):
                if version.state == "READY":
                    yield served, version

    def _is_quiet(self, version: Version) -> bool:
        """Whether nobody is inside, and no sequence is under way whose next request may come."""
        return not version.inside and not self._scheduler.remembers(version.lane)

    def _may_go(self, version: Version) -> bool:
        served = self._host.get(version.name)
        if served is None or version.source is None or version.name in self._pinned:
            return False
        alone = all(other is version or other.state != "READY" for other in served.versions.values())
        return alone and served.active is version and served.previous is None

    # -- going -----------------------------------------------------------------------------------------------------------------

    def _evict(self, version: Version) -> bool:
        """False when somebody came in meanwhile."""
        if not self._scheduler.rest(version.lane, lambda: version.rest("evicted")):
            return False
        close(version)
        version.evictions += 1
        log.info("model %r version %d was unloaded: the memory is needed for others", version.name, version.number)
        return True

    def _closing(self, version: Version) -> None:
        """A held version goes for good: who waits for it looks for another one."""
        for job in self._scheduler.evacuate(version.lane, close=True):
            self._waiting.follow(job)

    def end(self) -> None:
        """Nothing is brought back any more, and nobody waits for it."""
        self._ending = True
        for served in self._host:
            for version in list(served.versions.values()):
                if version.held:
                    self.turn_away(version, "the server is ending", 1.0)

    # -- coming back -----------------------------------------------------------------------------------------------------------

    def summon(self, version: Version) -> None:
        """Somebody waits in the lane of a held version. Any thread may call it, and goes on."""
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
        if version.held and version.process is not None and not self._clear(version):
            return version.reason, RETRY_S
        left_s = version.retry_s - time.perf_counter()
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
        """Loads a held version again, and lets go on who waits for it. With `changing` held.  Raises: NoRoom, and what loading raises."""
        if not version.held or version.state == "READY":
            return
        what = f"model {version.name!r} version {version.number}"
        self._make_room(size_of(version), version.name, version.number)
        version.state = "LOADING"
        try:
            source: Source = version.source
            if loading.has_changed(source):
                raise ModelInvalid(f"{source.path} has changed since it was loaded; load the model by name")  # noqa: TRY301
            fresh = self._load(source)
        except Exception as error:
            version.state, version.reason = (
                "UNAVAILABLE",
                f"{version.reason.split(';')[0]}; it cannot be loaded again: {loading.reason(version.source, error)}",
            )
            version.retry_s = time.perf_counter() + RETRY_S
            log.error("%s cannot be loaded again: %s", what, error)  # noqa: TRY400 - the reason says it
            raise
        if version.has_crashed:
            version.restarts += 1
            version.has_crashed = False
        else:
            version.reloads += 1
        self.resume(version, fresh)
        self._keep_within(version)

    def resume(self, version: Version, fresh: Version) -> None:
        """Gives a held version the model of `fresh`, which was loaded from the same file."""
        version.revive(fresh)
        version.resume()
        self._scheduler.resume(version.lane)
        self.watch(version)

    # -- processes that end ------------------------------------------------------------------------------------------------------

    def watch(self, version: Version) -> None:
        """Of an isolated model: when its process ends by itself, it is started again."""
        process = version.process
        if process is not None:
            process.on_death(lambda how: self._died(version, process, how))

    def _died(self, version: Version, process: Process, how: str) -> None:
        """In a thread that waits for the process. Callers wait from now on; what takes long is the control thread's."""
        if self._ending or version.process is not process or not version.hold(f"its process ended ({how})"):
            return
        log.error("model %r version %d: its process ended (%s)", version.name, version.number, how)
        self.defer(lambda: self._clean_up(version, process), 0.0)

    def _clean_up(self, version: Version, process: Process) -> None:
        with self.changing:
            if not version.held or version.process is not process:
                self._stuck.discard(version)
            elif not self._clear(version):
                self.turn_away(version, version.reason)
                self.defer(lambda: self._clean_up(version, process), RETRY_S)

    def _clear(self, version: Version) -> bool:
        """What is left of a process that ended; then it is started again, at once the first time, and later and later after that.

        False while a request in it does not end, so that nothing of it can be closed: it is waited for once, and then looked for only.
        """
        deadline = time.perf_counter() + (0.0 if version in self._stuck else CLEAR_S)
        while not self._scheduler.is_drained(version.lane, lambda: version.inside):
            if time.perf_counter() > deadline:
                if version not in self._stuck:
                    self._stuck.add(version)
                    version.reason += "; a request that was in it has not ended"
                    log.error("model %r version %d: %s", version.name, version.number, version.reason)
                return False
            time.sleep(LOOK_S)  # they fail as soon as they see it
        self._stuck.discard(version)
        self._scheduler.interrupt(version.lane)
        lasted_s = time.perf_counter() - version.loaded_s
        close(version)
        version.has_crashed = True
        version.crashes = 1 if lasted_s > CALM_S else version.crashes + 1
        self._restart_later(version)
        return True

    def _restart_later(self, version: Version) -> None:
        delay_s = 0.0
        if version.crashes > 1:
            longest_s = min(LONGEST_S, FIRST_S * 2.0 ** min(version.crashes - 2, 16))
            delay_s = longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - it spreads, and hides nothing
            version.reason = f"{version.reason.split(';')[0]}; it is started again after {delay_s:.1f} s"
        version.retry_s = time.perf_counter() + delay_s
        self.defer(lambda: self._restart(version), delay_s)

    def _restart(self, version: Version) -> None:
        with self.changing:
            if self._ending or not version.held:
                return
            try:
                self.bring_back(version)
            except Exception as error:  # noqa: BLE001 - it was logged; runtimes of third parties raise what they like
                self.turn_away(version, loading.reason(version.source, error))
                version.crashes += 1
                self._restart_later(version)

    def _keep_within(self, version: Version) -> None:
        """It may have turned out larger than before. Too much is better than a model that nobody can use."""
        try:
            self._make_room(0, version.name, version.number)
        except NoRoom as error:
            log.warning("%s", error)

    def turn_away(self, version: Version, why: str, retry_s: float = RETRY_S) -> None:
        """Refuses who waits for it."""
        headers = ((b"retry-after", b"%d" % max(1, round(retry_s + 0.5))),)
        for job in self._scheduler.evacuate(version.lane, close=False):
            text = f"model '{version.name}' version {version.number} is not in memory: {why}"
            self._waiting.refuse(job, Refusal(503, text, code="evicted", headers=headers))


def size_of(version: Version) -> int:
    if version.process is not None:
        return version.now_bytes
    return max(version.now_bytes, file_bytes(version.source) if version.source is not None else 0)


def file_bytes(source: Source) -> int:
    """Of all its files; 0 when one cannot be looked at."""
    try:
        return sum(path.stat().st_size for path in {source.path, *source.others.values()})
    except OSError:
        return 0


def close(version: Version) -> None:
    """The memory of a held version's model goes back to the machine."""
    model = version.take_model()
    if model is not None:
        model.close()
    del model
    memory.give_back()


def discard(version: Version) -> None:
    """The same of one that never served."""
    version.failed("unloaded")
    close(version)
