"""Whether a version's model is there, and who is inside.

`TRANSITIONS` has every step that there is; any other raises, and changes nothing. What is away comes back when it is asked for:
see `residency`. What is gone is gone for good, or was never there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from enum import Enum
from typing import Literal

State = Literal["LOADING", "READY", "UNAVAILABLE"]


class Place(Enum):
    """Where the model is."""

    LOADING = "loading"
    READY = "ready"
    AWAY = "away"
    RETURNING = "returning"
    GONE = "gone"


class Step(Enum):
    """What happens to it."""

    LOADED = "it is loaded and warm"
    FAILED = "it cannot be loaded"
    SENT_AWAY = "its model leaves memory, to come back"
    RELOADING = "it is being loaded again"
    CAME_BACK = "its model is there again, or has not left after all"
    RETIRED = "it goes for good"


LOADING, READY, AWAY, RETURNING, GONE = Place  # looking a member up at its class takes longer than the comparison

TRANSITIONS: Mapping[tuple[Place, Step], Place] = {
    (LOADING, Step.LOADED): READY,
    (LOADING, Step.FAILED): GONE,
    (LOADING, Step.RETIRED): GONE,
    (READY, Step.SENT_AWAY): AWAY,
    (READY, Step.RETIRED): GONE,
    (AWAY, Step.RELOADING): RETURNING,
    (AWAY, Step.CAME_BACK): READY,
    (AWAY, Step.RETIRED): GONE,
    (RETURNING, Step.CAME_BACK): READY,
    (RETURNING, Step.FAILED): AWAY,
    (RETURNING, Step.RETIRED): GONE,
    (GONE, Step.RETIRED): GONE,
}

SAID: Mapping[Place, State] = {
    LOADING: "LOADING",
    READY: "READY",
    AWAY: "UNAVAILABLE",
    RETURNING: "LOADING",
    GONE: "UNAVAILABLE",
}
"""The state that clients are told."""


class IllegalStep(Exception):
    """A step that cannot follow: a mistake of this program."""


class Presence:
    """Any thread enters and leaves. `lock` is held while a step is taken, by who takes it; `reason` says why the model is not
    there.
    """

    def __init__(self) -> None:
        self.place = LOADING
        self.reason = ""
        self.lock = threading.Lock()
        self._guests: list[None] = []  # one for each request inside: adding and removing one is one step, and needs no lock
        self._empty = threading.Condition(self.lock)

    def step(self, step: Step, reason: str = "") -> None:
        """With `lock` held.  Raises: IllegalStep."""
        place = TRANSITIONS.get((self.place, step))
        if place is None:
            raise IllegalStep(f"{step.name} cannot follow {self.place.name}")
        self.place, self.reason = place, reason

    def reloading(self) -> None:
        """Its model, which is away, is being loaded again."""
        with self.lock:
            self.step(Step.RELOADING, self.reason)

    def enter(self) -> bool:
        """Keeps the model open until `leave`. False when it is not there (any more), and does not come back either."""
        self._guests.append(None)  # before the place is read: whoever changes that counts afterwards
        if self.place is READY:
            return True
        with self.lock:
            if self.answers:
                return True
        self.leave()
        return False

    def leave(self) -> None:
        self._guests.pop()
        if self.place is not READY:
            with self.lock:
                self._empty.notify_all()

    @property
    def inside(self) -> int:
        return len(self._guests)

    @property
    def is_away(self) -> bool:
        """Whether it comes back when it is asked for."""
        return self.place is AWAY or self.place is RETURNING

    @property
    def answers(self) -> bool:
        """Whether a prediction will be answered, if after a while."""
        return self.place is READY or self.is_away

    def wait_until_empty(self, timeout_s: float) -> bool:
        """With `lock` held. False when somebody is still inside then."""
        return self._empty.wait_for(lambda: not self._guests, timeout_s)
