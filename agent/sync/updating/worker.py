"""The threads that take this device's models through their updates, one for each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from agent.sync.problems import Stopped
from agent.sync.updating.updater import ModelUpdater

log = logging.getLogger(__name__)

AFTER_CRASH_S = 5.0
"""How soon a step is tried again that failed through a bug of ours: at once would fill the disk with logs."""


class Worker:
    """Steps one model's updater, and sleeps until its next step is due or somebody wakes it."""

    def __init__(self, updater: ModelUpdater) -> None:
        self.updater = updater
        self._wake = threading.Event()
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"update-{updater.model}", daemon=True)

    def wake(self) -> None:
        """Makes the next step due now."""
        self._wake.set()

    def stop(self) -> None:
        """Ends the thread after its step; long work in it is given up."""
        self._stop.set()
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                delay_s = self.updater.step(self._stop.is_set)
            except Stopped:
                break
            except Exception:  # a bug of ours in one model must not end the others
                log.exception("the update of model %r failed in a way that was not foreseen", self.updater.model)
                delay_s = AFTER_CRASH_S
            if delay_s > 0:
                self._wake.wait(delay_s)
        try:
            self.updater.leave()
        except OSError as error:
            log.warning("the state of model %r could not be written at the end: %s", self.updater.model, error)


class Workers:
    """A worker for every model that was ever wanted here. Thread-safe."""

    def __init__(self, updater: Callable[[str], ModelUpdater]) -> None:
        """`updater` makes the updater of a model."""
        self._updater = updater
        self._workers: dict[str, Worker] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def begin(self, model: str) -> None:
        """Starts the model's worker, if it has none and they were not told to stop.  Raises: OSError."""
        with self._lock:
            if model not in self._workers and not self._stopped:
                worker = self._workers[model] = Worker(self._updater(model))
                worker.thread.start()

    def wake(self) -> None:
        """Makes everybody's next step due now."""
        with self._lock:
            for worker in self._workers.values():
                worker.wake()

    def stop(self) -> list[threading.Thread]:
        """Tells all of them to end; gives their threads to wait for."""
        with self._lock:
            self._stopped = True
            for worker in self._workers.values():
                worker.stop()
            return [worker.thread for worker in self._workers.values()]

    def find(self, model: str) -> ModelUpdater | None:
        with self._lock:
            worker = self._workers.get(model)
        return worker.updater if worker is not None else None

    def updaters(self) -> list[ModelUpdater]:
        """In the order in which they began."""
        with self._lock:
            return [worker.updater for worker in self._workers.values()]

    def shortest_lease_s(self) -> float:
        """The shortest time within which the fleet has to be heard; infinite without leases."""
        return min((one.lease_s for one in self.updaters() if one.lease_s is not None), default=float("inf"))

    def problem(self) -> str | None:
        """The first model's that has one."""
        return next((f"model {one.model!r}: {one.problem}" for one in self.updaters() if one.problem), None)
