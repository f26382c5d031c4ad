"""What a prediction asks for besides its tensors, and what comes back, whatever transport brought it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtimes.contract import Array

if TYPE_CHECKING:
    from agent.serving.models.host import Version


@dataclass(frozen=True, slots=True)
class SequenceDemand:
    """A request's place in a sequence of requests that share state. `id` is never 0 or empty: those mean no sequence."""

    id: int | str
    start: bool = False
    end: bool = False


@dataclass(slots=True)
class Demand:
    """`priority` 1 is the highest, 0 the model's default; `timeout_s` counts from `arrived_s`, a perf_counter."""

    outputs: Sequence[str] | None = None
    priority: int = 0
    timeout_s: float | None = None
    sequence: SequenceDemand | None = None
    arrived_s: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class Result:
    """`arrays` are in the order of the outputs demanded (None: all, in the model's order) and belong to the caller."""

    version: Version
    arrays: list[Array]
