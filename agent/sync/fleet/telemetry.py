"""What the fleet is told of how models do here: the difference between what `serve` has counted by now and at the last time.

A process of `serve` that began meanwhile counts from 0; what the one before it counted after the last time is lost, and so is what was
counted before this process first looked. The fleet judges by shares and ratios, so a gap says nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil

from agent.contract.telemetry import MAX_FIGURES, MAX_SECONDS, Figures, MachineFigures, ModelFigures, ServeFigures
from agent.host.throttle import THERMAL, Throttle
from agent.sync.ports import Clock
from agent.sync.serving import ServeAway, ServeRefused

log = logging.getLogger(__name__)

Key = tuple[str, str, int, str]


class Counting(Protocol):
    def counters(self) -> ServeFigures:
        """Raises: ServeAway, ServeRefused."""


class Telling(Protocol):
    def telemetry(self, seconds: float, figures: tuple[ModelFigures, ...], machine: MachineFigures) -> None:
        """Raises: OSError."""


class Collector:
    """Tells of it every `interval_s` seconds; never when that is 0. One thread."""

    def __init__(
        self, serving: Counting, teller: Telling, clock: Clock, interval_s: float, restarts: Callable[[], int], thermal: Path = THERMAL
    ) -> None:  # fmt: skip
        self._serving, self._teller, self._clock = serving, teller, clock
        self._interval_s, self._restarts, self._thermal = interval_s, restarts, thermal
        self._at: float | None = None
        self._before: dict[Key, Figures] = {}

    def collect(self) -> None:
        """Tells when it is time to. Never raises: telling is less than serving."""
        now = self._clock.monotonic()
        if not self._interval_s or (self._at is not None and now - self._at < self._interval_s):
            return
        try:
            counted = self._serving.counters()
        except (ServeAway, ServeRefused):
            return  # it is asked again with the next report
        figures = self._differences(counted)
        began, self._at = self._at, now
        if began is None:
            return  # it may have counted for months
        try:
            self._teller.telemetry(
                min(max(now - began, 1e-3), MAX_SECONDS), figures, machine_figures(self._restarts(), self._thermal)
            )
        except OSError as error:
            log.warning("telemetry could not be kept for the fleet: %s", error)

    def _differences(self, counted: ServeFigures) -> tuple[ModelFigures, ...]:
        found: dict[tuple[str, int], Figures] = {}
        now: dict[Key, Figures] = {}
        for one in counted.counters:
            key = (counted.instance, one.model, one.release, one.begun)
            now[key] = one.figures
            more = _more(one.figures, self._before.get(key, Figures()))
            if more:
                of = (one.model, one.release)
                found[of] = found[of].plus(more) if of in found else more
        self._before = now
        most = sorted(found.items(), key=lambda item: -item[1].requests)[:MAX_FIGURES]
        return tuple(ModelFigures(model=model, release=release, figures=more) for (model, release), more in sorted(most))


def _more(now: Figures, before: Figures) -> Figures:
    try:
        return now.minus(before)
    except ValueError as error:
        log.warning("serve has counted backwards: %s", error)
        return Figures()


def machine_figures(restarts: int, thermal: Path = THERMAL) -> MachineFigures:
    """How the machine does at this moment."""
    memory = psutil.virtual_memory()
    celsius = Throttle(0, 0, thermal).celsius()
    return MachineFigures(
        memory_bytes=memory.total, memory_free_bytes=memory.available, load=round(os.getloadavg()[0], 2),
        celsius=round(celsius, 1) if celsius is not None and -100 <= celsius <= 300 else None, throttled=_is_throttled(thermal),
        serve_restarts=restarts,
    )  # fmt: skip


def _is_throttled(thermal: Path) -> bool:
    """Whether a device that cools by slowing processors down is at work."""
    for device in thermal.glob("cooling_device*"):
        try:
            kind, state = (device / "type").read_text(), int((device / "cur_state").read_text())
        except (OSError, ValueError):
            continue  # it is switched off
        if state > 0 and ("processor" in kind.lower() or "cpufreq" in kind.lower()):
            return True
    return False
