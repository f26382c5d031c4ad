"""What follows when the process of an isolated model ends by itself: it is started again, at once the first time, and later and
later after that. Who asks for the model meanwhile waits.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

from agent.serving.models import loading
from agent.serving.models.room import AGAIN_S, close
from agent.serving.models.version import Process, Version
from agent.serving.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

CLEAR_S = 10.0  # those in a process that ended fail within twice the time that it may take to be waited for
RETRY_S = 5.0  # after a load that failed; a model that cannot be loaded again must not keep the control thread busy
FIRST_S = 0.5  # before a process that ended twice in a row is started again; doubled each time, up to
LONGEST_S = 60.0
CALM_S = 60.0  # a process that lived so long begins anew with counting


class Defer(Protocol):
    """Gives the control thread work, to be done after a while."""

    def __call__(self, do: Callable[[], None], delay_s: float) -> None: ...


class Returns(Protocol):
    """Brings models back into memory."""

    def bring_back(self, version: Version) -> None:
        """Loads a version again that is away.  Raises: what loading raises."""

    def turn_away(self, version: Version, why: str) -> None:
        """Refuses who waits for it."""


class Restarts:
    """`changing` is held by whoever changes models; `defer` gives work to the control thread."""

    def __init__(self, scheduler: Scheduler, changing: threading.Lock, returns: Returns, defer: Defer) -> None:
        self._scheduler = scheduler
        self._changing = changing
        self._returns = returns
        self._defer = defer
        self._stuck: set[Version] = set()  # whose process ended, and a request in it did not
        self._ending = False

    def end(self) -> None:
        """Nothing is started again any more."""
        self._ending = True

    def follow(self, version: Version) -> None:
        """From now on the process of this version, if it has one, is started again when it ends by itself."""
        process = version.loaded.process
        if process is not None:
            process.on_death(lambda how: self._died(version, process, how))

    def _died(self, version: Version, process: Process, how: str) -> None:
        """In a thread that waits for the process. Callers wait from now on; what takes long is the control thread's."""
        if self._ending or version.loaded.process is not process or not version.send_away(f"its process ended ({how})"):
            return
        log.error("model %r version %d: its process ended (%s)", version.name, version.number, how)
        self._defer(lambda: self._clean_up(version, process), 0.0)

    def _clean_up(self, version: Version, process: Process) -> None:
        with self._changing:
            if not version.away or version.loaded.process is not process:
                self._stuck.discard(version)
            elif not self.clear(version):
                self._returns.turn_away(version, version.reason)
                self._defer(lambda: self._clean_up(version, process), RETRY_S)

    def clear(self, version: Version) -> bool:
        """Closes what is left of a process that ended; it is started again, at once the first time, and later and later after
        that.

        False while a request in it does not end, so that nothing of it can be closed: it is waited for once, and after that
        only checked.
        """
        deadline = time.perf_counter() + (0.0 if version in self._stuck else CLEAR_S)
        while not self._scheduler.is_drained(version.lane, lambda: version.inside):
            if time.perf_counter() > deadline:
                if version not in self._stuck:
                    self._stuck.add(version)
                    version.say(version.reason + "; a request that was in it has not ended")
                    log.error("model %r version %d: %s", version.name, version.number, version.reason)
                return False
            time.sleep(AGAIN_S)  # they fail as soon as they see it
        self._stuck.discard(version)
        self._scheduler.interrupt(version.lane)
        history = version.history
        lasted_s = time.perf_counter() - version.loaded.at_s
        close(version)
        history.has_crashed = True
        history.crashes = 1 if lasted_s > CALM_S else history.crashes + 1
        self._restart_later(version)
        return True

    def _restart_later(self, version: Version) -> None:
        delay_s = 0.0
        if version.history.crashes > 1:
            longest_s = min(LONGEST_S, FIRST_S * 2.0 ** min(version.history.crashes - 2, 16))
            delay_s = longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - it spreads, and hides nothing
            version.say(f"{version.reason.split(';')[0]}; it is started again after {delay_s:.1f} s")
        version.history.retry_s = time.perf_counter() + delay_s
        self._defer(lambda: self._restart(version), delay_s)

    def _restart(self, version: Version) -> None:
        with self._changing:
            if self._ending or not version.away:
                return
            try:
                self._returns.bring_back(version)
            except Exception as error:  # noqa: BLE001 - it was logged; runtimes of third parties raise what they like
                self._returns.turn_away(version, loading.reason(version.source, error))
                version.history.crashes += 1
                self._restart_later(version)
