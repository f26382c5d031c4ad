"""Takes one model through its update, a step at a time. Every step persists, then acts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from agent.contract.reports import Phase
from agent.store import StoreError
from agent.sync.ports import Stop
from agent.sync.problems import store_problem
from agent.sync.updating import update
from agent.sync.updating.holds import Holds
from agent.sync.updating.model import REST_S, ModelUpdate
from agent.sync.updating.update import OBSERVING, SWITCHING, UpdateState

DISK_AGAIN_S = 30.0
"""How soon a step is tried again that the disk refused."""

Step = Callable[[ModelUpdate], float]
"""Does what a phase asks for, and gives the seconds after which the next step is due.  Raises: Stopped, OSError, StoreError."""


class ModelUpdater:
    """The steps of one model. One thread takes them; what it shows may be read by others."""

    def __init__(
        self,
        one: ModelUpdate,
        steps: Mapping[Phase, Step],
        stop_for_lease: Callable[[ModelUpdate], bool],
        holds: Holds,
        lock: AbstractContextManager[object],
    ) -> None:
        self._one = one
        self._steps = steps
        self._stop_for_lease = stop_for_lease
        self._holds = holds
        self._lock = lock

    @property
    def model(self) -> str:
        return self._one.model

    @property
    def state(self) -> UpdateState:
        return self._one.state

    @property
    def progress(self) -> float | None:
        """The share of the target's files that is here, while they are fetched."""
        return self._one.progress

    @property
    def problem(self) -> str | None:
        """What an operator should know first."""
        return self._one.problem

    @property
    def stopped(self) -> str | None:
        """Why the model does not serve although it could."""
        return self._one.stopped

    @property
    def lease_s(self) -> float | None:
        """Within how many seconds the fleet has to be heard, for what serves or is to serve."""
        return self._one.lease_s

    @property
    def held(self) -> bool:
        """Whether an operator on the device said that this model stays on one release."""
        return self._holds.held(self.model) is not None

    def step(self, ending: Stop) -> float:
        """Does what the phase asks for. Gives the seconds after which the next step is due, if nothing happens before.

        Raises: Stopped when `ending` said so in the middle.
        """
        one = self._one
        one.ending = ending
        try:
            if one.state.phase not in SWITCHING and self._stop_for_lease(one):
                return REST_S
            with self._lock if one.state.phase is Phase.WAITING else contextlib.nullcontext():
                return self._steps[one.state.phase](one)
        except OSError as error:
            one.problem = store_problem(error, f"updating model {self.model!r}").message
        except StoreError as error:
            one.problem = str(error)
        return DISK_AGAIN_S

    def leave(self) -> None:
        """The process ends in order, between two steps or after Stopped: what the next start will count against the release is
        given back in advance, and what was counted since the last save is kept, because `serve` may be restarted too.

        Raises: OSError.
        """
        one = self._one
        with self._lock:
            if update.counts(one.state):
                one.save(one.state.but(interruptions=one.state.interruptions - 1), quietly=True)
            elif one.state.phase in OBSERVING:
                one.save(one.state, quietly=True)
