"""The thread that steps one model's updater."""

from __future__ import annotations

import logging
import threading

from agent.sync.problems import Stopped
from agent.sync.updating.updater import ModelUpdater

log = logging.getLogger(__name__)

AFTER_CRASH_S = 5.0


class Worker:
    def __init__(self, updater: ModelUpdater) -> None:
        self.updater = updater
        self._wake = threading.Event()
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"update-{updater.model}", daemon=True)

    def wake(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                delay_s = self.updater.step(self._stop.is_set)
            except Stopped:
                break
            except Exception:
                # A bug of ours in one model must not end the others, and trying again at once would fill the disk with logs.
                log.exception("the update of model %r failed in a way that was not foreseen", self.updater.model)
                delay_s = AFTER_CRASH_S
            if delay_s > 0:
                self._wake.wait(delay_s)
        try:
            self.updater.leave()
        except OSError as error:
            log.warning("the state of model %r could not be written at the end: %s", self.updater.model, error)
