"""The machine that updates happen on, as the phases see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent.contract.reports import Hardware
from agent.lives import Life


@dataclass(frozen=True)
class Device:
    """What is known of this machine and of the processes that served on it."""

    boot: str
    """Changes with every start of the machine."""
    lives: Callable[[], Sequence[Life]]
    """The processes that served here, oldest first, as `serve` noted them."""
    hardware: Callable[[], Hardware]
    engine_threads: int = 1
    """Threads that one run of a model may use."""
