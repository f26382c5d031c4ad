"""Room in memory: the budget, and which models leave for others.

The rules:
- Only the version that serves alone for its model may go: one with a candidate or a previous one beside it is being updated.
- A model counts with what was measured when it was loaded, at least with the size of its file: memory that an earlier model
  gave back to the process does not show when the next one takes it.
- What is pinned stays. `budget` chooses among the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from agent.host import memory
from agent.serving.models import budget
from agent.serving.models.budget import Resident
from agent.serving.models.host import ModelHost, Served
from agent.serving.models.loading import Source
from agent.serving.models.version import Version
from agent.serving.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

BUSY_PATIENCE_S = 0.5  # how long a moment is waited for in which nobody is inside a model that is to go
AGAIN_S = 0.005  # between two tries


class NoRoom(MemoryError):
    """The budget does not allow it. `retry_s`: when that may be different."""

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class Room:
    """`budget_bytes` 0 is no budget: then nothing goes. Only whoever changes the host calls what makes room."""

    def __init__(
        self, host: ModelHost, scheduler: Scheduler, *, budget_bytes: int, pinned: Sequence[str], min_residency_s: float
    ) -> None:
        self._host = host
        self._scheduler = scheduler
        self._pinned = frozenset(pinned)
        self._min_residency_s = min_residency_s
        self.budget_bytes = budget_bytes

    @property
    def used_bytes(self) -> int:
        return sum(size_of(version) for _, version in self._resident())

    def trim(self, needed_bytes: int = 0) -> None:
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

    def make(self, needed_bytes: int, name: str, number: int) -> None:
        """Makes room for a version. Other versions of its model stay: they answer while it is loaded.  Raises: NoRoom."""
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
                time.sleep(AGAIN_S)  # somebody has just come in

    def _wait_or_give_up(
        self, residents: Sequence[Resident], may_go: Sequence[bool], excess: int, what: str, deadline: float
    ) -> None:
        """Returns when it is worth trying again: somebody is inside a model that could go.  Raises: NoRoom."""
        now = time.perf_counter()
        hopeful = [Resident(r.key, r.size_bytes, r.used_s, r.loaded_s, may_go[r.key]) for r in residents]
        if now < deadline and budget.choose(hopeful, excess, now, self._min_residency_s) is not None:
            time.sleep(AGAIN_S)
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
                max(version.loaded.at_s, version.stats.last_s),
                version.loaded.at_s,
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

    def _evict(self, version: Version) -> bool:
        """False when somebody came in meanwhile."""
        if not self._scheduler.close_if_idle(version.lane, lambda: version.send_away_if_empty("evicted")):
            return False
        close(version)
        version.history.evictions += 1
        log.info("model %r version %d was unloaded: the memory is needed for others", version.name, version.number)
        return True


def size_of(version: Version) -> int:
    if version.loaded.process is not None:
        return version.loaded.now_bytes
    return max(version.loaded.now_bytes, file_bytes(version.source) if version.source is not None else 0)


def file_bytes(source: Source) -> int:
    """The size of all files of a model; 0 when one of them cannot be read."""
    try:
        return sum(path.stat().st_size for path in {source.path, *source.others.values()})
    except OSError:
        return 0


def close(version: Version) -> None:
    """The memory of the model of a version that is away goes back to the machine."""
    model = version.remove_model()
    if model is not None:
        model.close()
    del model
    memory.give_back()


def discard(version: Version) -> None:
    """Closes the model of a version that never served."""
    version.part()
    close(version)
