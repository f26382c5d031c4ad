"""What a prediction asks for besides its tensors, whatever transport brought it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field


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
