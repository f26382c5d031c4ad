"""What a run of a version costs, and what follows from that: which thread does it, and whether it gives way to shorter ones."""

from __future__ import annotations

from agent.serving.scheduling.lanes import INLINE_RUN_S, LONG_RUN_S

FIRST_COST_S = 1.0  # until it was measured a run counts as long
STAYS_CHEAP_S = (
    4 * INLINE_RUN_S
)  # what was cheap is so up to here: among long runs it would meet cold caches and look dear for ever
BEYOND_INLINE_S = 2 * INLINE_RUN_S
INLINE_BODY_BYTES = 64 * 1024  # reading more takes long by itself
UNKNOWN_BODY_BYTES = (
    1024  # where inputs have any size: a run was timed on zeros of size 1, and grows with some power of the size
)


class Cost:
    """`run_s` is a moving mean. `is_cheap`: a run costs the next caller less than a switch of threads, in requests of up to
    `inline_bytes`. `is_long`: it gives way to whatever is shorter.
    """

    def __init__(self) -> None:
        self.run_s = FIRST_COST_S
        self.is_cheap = False
        self.is_long = False
        self.inline_bytes = INLINE_BODY_BYTES

    def begin(self, run_s: float | None, *, any_size: bool) -> None:
        """It is loaded, and a run of it took `run_s` (None: nothing new is known). `any_size`: its inputs may have any."""
        if run_s is not None:
            self.run_s = run_s
        self.is_cheap = self.run_s <= INLINE_RUN_S
        self.is_long = self.run_s > LONG_RUN_S
        if any_size:
            self.inline_bytes = UNKNOWN_BODY_BYTES

    def measured(self, run_s: float) -> bool:
        """Whether from now on it gives way, or no longer. One run that the kernel interrupted does not make a cheap model dear."""
        mean_s = self.run_s
        if run_s > 4 * mean_s:  # noqa: PLR1730 - calling min takes as long as all the rest
            run_s = 4 * mean_s
        self.run_s = mean_s = mean_s + 0.1 * (run_s - mean_s)
        self.is_cheap = mean_s <= (STAYS_CHEAP_S if self.is_cheap else INLINE_RUN_S)
        if (mean_s > LONG_RUN_S) is self.is_long:
            return False
        self.is_long = not self.is_long
        return True

    def learn(self, size_bytes: int) -> None:
        """A request of that size was cheap: smaller ones will be."""
        self.inline_bytes = max(self.inline_bytes, min(size_bytes, INLINE_BODY_BYTES))


class NeverCheap(Cost):
    """The cost of a version that the thread which polls never runs: what happens to its process, or in its engine, must not
    keep that thread.
    """

    def begin(self, run_s: float | None, *, any_size: bool) -> None:
        super().begin(max(BEYOND_INLINE_S, self.run_s if run_s is None else run_s), any_size=any_size)

    def measured(self, run_s: float) -> bool:
        changed = super().measured(run_s)
        self.run_s, self.is_cheap = max(self.run_s, BEYOND_INLINE_S), False
        return changed
