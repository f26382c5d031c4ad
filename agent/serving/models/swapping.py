"""One version in place of another where memory has no room for both: callers wait meanwhile, and none fails because of it.

The order: the old one is sent away, so that who comes waits; those under way end; the old one is closed, the new one loaded;
who waited goes to the new one. When the new one cannot be loaded, the old one is loaded again, and the one who asked for the
swap is told so.
"""

from __future__ import annotations

import time

from agent.serving.answers import Refusal
from agent.serving.models import loading
from agent.serving.models.host import ModelHost, Served
from agent.serving.models.loading import Source
from agent.serving.models.residency import Residency
from agent.serving.models.room import AGAIN_S, close
from agent.serving.models.version import DRAIN_TIMEOUT_S, Version
from agent.serving.scheduling.scheduler import Scheduler


class Swapper:
    """With the residency's `changing` held."""

    def __init__(self, host: ModelHost, scheduler: Scheduler, residency: Residency) -> None:
        self._host = host
        self._scheduler = scheduler
        self._residency = residency

    def swap(self, served: Served, old: Version, source: Source) -> Served:
        """Makes `source` active in place of `old`, which is active and the only one of its model that counts: a previous one
        goes first.

        Raises: Refusal (503 `busy` when a run does not end), and what loading raises, `old` serving again; SwapLost when it
        does not.
        """
        self._host.commit(served.name)
        reason = f"being replaced by version {source.version}"
        if not old.send_away(reason):
            raise Refusal(503, f"model {old.name!r} version {old.number} has just gone: {old.reason}", code="busy")
        if not self._drained(old):
            old.come_back()
            self._scheduler.open(old.lane)
            raise Refusal(
                503,
                f"model {old.name!r} version {old.number} still runs a request after {DRAIN_TIMEOUT_S:.0f} s, so it was not replaced",
                code="busy",
            )
        self._scheduler.interrupt(old.lane)
        close(old)
        try:
            version = self._residency.load(source)
        except Exception as error:
            self._go_back(old, error)
            raise
        return self._host.supersede(version, old)

    def _drained(self, old: Version) -> bool:
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while not self._scheduler.is_drained(old.lane, lambda: old.inside):
            if time.monotonic() > deadline:
                return False
            time.sleep(AGAIN_S)
        return True

    def _go_back(self, old: Version, refused: Exception) -> None:
        try:
            self._residency.bring_back(old)
        except Exception as error:
            why = loading.reason(old.source, error)
            self._residency.turn_away(old, why)
            raise SwapLost(f"version {old.number} could not be loaded again: {why}", refused) from error


class SwapLost(Exception):
    """Neither version could be loaded. `refused` is about the new one."""

    def __init__(self, message: str, refused: Exception) -> None:
        super().__init__(message)
        self.refused = refused
