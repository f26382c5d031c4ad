"""A candidate run on copies of live requests beside the version that answers them, and what came of it: numbers, nothing else.

The rules:
- A request that is not copied pays one look at an attribute: the thread of the shadow lays its tap on the active version when
  it wants a sample, and the first request that meets it takes it off again.
- Only requests that were answered are copied, after their run; what they get is not touched. A copy that does not fit (too
  large, too many waiting, another thread at it) is dropped.
- The candidate runs in a thread of low priority, while no prediction waits and the machine is neither loaded nor hot; until
  then nothing is copied either.
- It ends with its share at 0, with the candidate or the active version going, and when the candidate fails hard. Its numbers
  can be asked for until the next one begins.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agent.host import priority
from agent.host.throttle import Throttle
from agent.serving.answers import Refusal
from agent.serving.candidates.comparing import Comparison, Tolerance
from agent.serving.models.host import ModelHost, Served
from agent.serving.models.version import Version
from agent.serving.scheduling.scheduler import Scheduler
from runtimes.check import check_feeds
from runtimes.contract import Array, InputInvalid, is_stateful

log = logging.getLogger(__name__)

MAX_WAITING = 8
MAX_BYTES = 16 * 1024 * 1024
"""What the copies that wait may take together; a single one too."""

TICK_S = 0.05
"""How often the tap is laid on anew; varied by half, so that callers with a rhythm are met at every point of it."""

AGAIN_BELOW_S = 5e-3
"""A run that took less is timed a second time: the first one found its caches cold, which a live one rarely does."""

HARD_FAILURES = 20
"""So many failed runs in a row end it."""

HUNG_S = 60.0
END_S = 2.0

Why = Literal["invalid", "run"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Copied inputs, the answer they got, and what its run took (0: not to be compared)."""

    feeds: Mapping[str, Array]
    names: Sequence[str]
    arrays: Sequence[Array]
    run_s: float
    size_bytes: int


class Shadow:
    """One candidate beside one active version. `copy` is called by threads that answer, the rest by its own thread and the
    control thread.
    """

    def __init__(
        self, served: Served, active: Version, candidate: Version, tolerances: Mapping[str, Tolerance], scheduler: Scheduler,
        throttle: Throttle,
    ) -> None:  # fmt: skip
        self.served = served
        self.active = active
        self.candidate = candidate
        self.share = 0.0
        self.max_rate = 0.0
        self.seen = 0  # runs of the active version since it began
        self.taken = 0
        self.dropped = 0
        self.errors: dict[Why, int] = {"invalid": 0, "run": 0}
        self.last_error = ""
        self.throttled: str | None = None
        self.ended: str | None = None
        self.failed = False  # whether that it ended is the candidate's fault
        self.comparison = Comparison(active.interfaces.every_output, tolerances)
        self.begun_s = time.monotonic()
        self._restarts = candidate.history.restarts
        self._names = [spec.name for spec in active.outputs]
        self._pictures_differ = active.picture != candidate.picture
        self._scheduler = scheduler
        self._throttle = throttle
        self._answered_before = active.stats.executions
        self._tokens, self._filled_s = 1.0, time.monotonic()
        self._credit = 0
        self._in_a_row = 0
        self._running_since: float | None = None
        self._waiting: deque[Sample] = deque()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"shadow-{active.name}", daemon=True)

    # -- by the control thread -------------------------------------------------------------------------------------------------

    def start(self, share: float, max_rate: float) -> None:
        self.change(share, max_rate)
        self._thread.start()

    def change(self, share: float, max_rate: float) -> None:
        self.share, self.max_rate = share, max_rate

    def end(self, why: str, *, failed: bool = False) -> None:
        """Any thread. The first reason counts."""
        if self.ended is None:
            self.failed, self.ended = failed, why
        if self.active.tap is self:
            self.active.tap = None
        self._wake.set()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join(END_S)

    @property
    def running_s(self) -> float:
        """How long the run of the candidate has gone on that goes on now."""
        since = self._running_since
        return time.monotonic() - since if since is not None else 0.0

    def check(self) -> None:
        """Ends it when what it compares is not there any more."""
        if self.ended is not None:
            return
        if self.served.active is not self.active:
            self.end(f"version {self.active.number} is not active any more")
        elif self.served.versions.get(self.candidate.number) is not self.candidate:
            self.end(f"version {self.candidate.number} was unloaded")
        elif self.candidate.away or self.candidate.history.restarts != self._restarts:
            self.end(f"the process of version {self.candidate.number} ended", failed=True)
        elif self.running_s > HUNG_S:
            self.end(f"a run of version {self.candidate.number} has not ended for {HUNG_S:g} s", failed=True)

    def document(self) -> dict[str, Any]:
        self.check()
        return {
            "version": self.candidate.number,
            "active": self.active.number,
            "state": "running" if self.ended is None else "ended",
            "ended": self.ended or "",
            "failed": self.failed,
            "share": self.share,
            "max_rate": self.max_rate,
            "seconds": round(time.monotonic() - self.begun_s, 3),
            "seen": self.seen,
            "taken": self.taken,
            "dropped": self.dropped,
            "throttled": self.throttled or "",
            "errors": dict(self.errors),
            "last_error": self.last_error,
            **self.comparison.document(),
        }

    # -- by threads that answer
    # --------------------------------------------------------------------------------------------------

    def copy(self, plan: Any, feeds: Mapping[str, Array], arrays: Sequence[Array], run_s: float) -> None:
        """Copies a request that was answered.  Never raises, never waits."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._credit <= 0:
                return
            self._credit -= 1
            if self._credit == 0:
                self.active.tap = None
            if self._pictures_differ and hasattr(plan, "picture"):
                return  # its tensors were made for the other one
            self._copy(plan.outputs, feeds, arrays, 0.0 if self.active.lane.batches else run_s)
        except Exception as error:  # noqa: BLE001 - short of memory, most likely; the answer goes its way
            self.dropped += 1
            self.last_error = f"a request could not be copied: {error}"
        finally:
            self._lock.release()

    def _copy(self, outputs: Sequence[str] | None, feeds: Mapping[str, Array], arrays: Sequence[Array], run_s: float) -> None:
        size = sum(_bytes(array) for array in (*feeds.values(), *arrays))
        if size + self._waiting_bytes > MAX_BYTES or len(self._waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        copies = {name: np.array(array, order="C") for name, array in feeds.items()}
        self._waiting_bytes += size
        self._waiting.append(Sample(copies, outputs or self._names, arrays, run_s, size))
        self.taken += 1
        self._wake.set()

    # -- by its own thread
    # ---------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            priority.lower()
            while self.ended is None:
                self._step()
                self._wake.wait(TICK_S * random.uniform(0.5, 1.5))  # noqa: S311 - it spreads, and hides nothing
                self._wake.clear()
                self.check()
        except Exception as error:
            log.exception(
                "the shadow of model %r version %d failed in an unforeseen way", self.active.name, self.candidate.number
            )
            self.end(f"it failed in an unforeseen way: {error}")
        self._forget()

    def _step(self) -> None:
        self.throttled = self._busy()
        while self._waiting and self.throttled is None and self.ended is None:
            with self._lock:
                sample = self._waiting.popleft()
                self._waiting_bytes -= sample.size_bytes
            self._compare(sample)
            self.throttled = self._busy()
        self._lay_tap()

    def _busy(self) -> str | None:
        return "predictions wait" if self._scheduler.waiting else self._throttle.reason()

    def _lay_tap(self) -> None:
        """Grants as many samples as the share of what was answered, the rate, and the room for them allow."""
        now = time.monotonic()
        self._tokens = min(max(1.0, self.max_rate * TICK_S * 4), self._tokens + (now - self._filled_s) * self.max_rate)
        self._filled_s = now
        self.seen = self.active.stats.executions - self._answered_before
        with self._lock:
            due = int(self.share * self.seen + 1) - self.taken
            granted = 0 if self.throttled else max(0, min(due, int(self._tokens), MAX_WAITING - len(self._waiting)))
            self._tokens -= granted
            self._tokens += self._credit  # of the last grant, and met by no request
            self._credit = granted
        self.active.tap = self if granted else None
        if self.ended is not None:  # by another thread, meanwhile
            self.active.tap = None

    def _compare(self, sample: Sample) -> None:
        candidate = self.candidate
        if not candidate.enter():
            self.end(f"version {candidate.number} was unloaded")
            return
        try:
            if candidate.model is None:
                return  # its process ended, which is noticed next
            self._running_since = time.monotonic()
            check_feeds(candidate.interfaces.inputs_for(sample.feeds), sample.feeds)
            arrays, run_s = self._run(candidate.model, sample)
            self.comparison.add(sample.names, sample.arrays, arrays, sample.run_s, run_s)
            self._in_a_row = 0
        except InputInvalid as error:
            self._failed("invalid", error)
        except Exception as error:  # noqa: BLE001 - runtimes of third parties raise what they like
            self._failed("run", error)
        finally:
            self._running_since = None
            candidate.leave()

    @staticmethod
    def _run(model: Any, sample: Sample) -> tuple[list[Array], float]:
        run_s = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            arrays: list[Array] = model.run(sample.feeds, list(sample.names))
            run_s = min(run_s, time.perf_counter() - started)
            if run_s > AGAIN_BELOW_S:
                break
        return arrays, run_s

    def _failed(self, why: Why, error: Exception) -> None:
        self.errors[why] += 1
        self.last_error = str(error)[:300]
        self._in_a_row += 1
        if self._in_a_row >= HARD_FAILURES:
            self.end(f"version {self.candidate.number} failed {HARD_FAILURES} times in a row: {self.last_error}", failed=True)

    def _forget(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._waiting_bytes = self._credit = 0


def _bytes(array: Array) -> int:
    return sum(map(len, array.ravel())) if array.dtype == np.object_ else array.nbytes


class Shadows:
    """One for each model at most. Only the control thread begins and ends them."""

    def __init__(self, host: ModelHost, scheduler: Scheduler, throttle: Throttle) -> None:
        self._host = host
        self._scheduler = scheduler
        self._throttle = throttle
        self._shadows: dict[str, Shadow] = {}  # also those that ended, until the next one; replaced as a whole

    def __iter__(self) -> Any:
        return iter(list(self._shadows.values()))

    def get(self, model: str) -> Shadow | None:
        return self._shadows.get(model)

    def begin(self, model: str, number: int, share: float, max_rate: float, tolerances: Mapping[str, Tolerance]) -> Shadow:
        """The shadow, running; one that runs for the same version goes on with its numbers.  Raises: Refusal (404, 409)."""
        served = self._host.served(model)
        shadow = self._shadows.get(model)
        if shadow is not None:
            shadow.check()
            if shadow.ended is None and shadow.candidate.number == number:
                shadow.change(share, max_rate)
                return shadow
        active, candidate = pair(served, number, "compared with")
        if is_stateful(active.model) or is_stateful(candidate.model):
            raise Refusal(
                409, f"model {model!r} has state, so single requests of it cannot be run again beside it", code="stateful"
            )
        self.end(model, "another one begins")
        shadow = Shadow(served, active, candidate, tolerances, self._scheduler, self._throttle)
        self._shadows = {**self._shadows, model: shadow}
        shadow.start(share, max_rate)
        log.info("model %r: version %d runs beside version %d on copies of its requests", model, number, active.number)
        return shadow

    def end(self, model: str, why: str) -> Shadow | None:
        shadow = self._shadows.get(model)
        if shadow is not None:
            shadow.end(why)
            shadow.join()
        return shadow

    def check(self) -> None:
        """After a change of what is loaded or active."""
        for shadow in self:
            shadow.check()

    def close(self) -> None:
        for model in list(self._shadows):
            self.end(model, "the server is ending")


def pair(served: Served, number: int, what: str) -> tuple[Version, Version]:
    """The active version, and the loaded one that is to be beside it.  Raises: Refusal (409)."""
    active, candidate = served.active, served.versions.get(number)
    if candidate is None or candidate.state != "READY":
        raise Refusal(409, f"model {served.name!r} version {number} is not loaded; load it first", code="not_loaded")
    if active is None or not active.answers:
        raise Refusal(409, f"model {served.name!r} has no active version to be {what}", code="no_active")
    if candidate is active:
        raise Refusal(409, f"model {served.name!r} version {number} is the active one", code="active")
    return active, candidate
