"""Releases that switch together. Each waits until the others are fetched and tried; then all begin at once, and go on, stay or
roll back as one.

A release that switches alone is a team of one. So activating, watching and rolling back know teams only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.store import Selection, Store, StoreError
from agent.sync.ports import Clock, Teller
from agent.sync.problems import Problem
from agent.sync.updating import update
from agent.sync.updating.endings import Endings
from agent.sync.updating.model import AGAIN_S, AT_ONCE, REST_S, ModelUpdate
from agent.sync.updating.states import States
from agent.sync.updating.update import Event, Failure, UpdateState
from agent.sync.updating.wanted import WantedReleases

MEMBERS_S = 60.0
"""How long after a start the other members are waited for: their threads begin one after the other."""


class Team:
    """Those for whom one step acts: all of them or none. The first one, its leader, does the work."""

    def __init__(self, members: Sequence[ModelUpdate], teams: Teams) -> None:
        self.members = tuple(members)
        self._teams = teams

    @property
    def leader(self) -> ModelUpdate:
        return self.members[0]

    @property
    def alone(self) -> bool:
        """Whether it is a team of one."""
        return len(self.members) == 1

    def apply(self, change: Callable[[ModelUpdate], UpdateState], *, quietly: bool = False) -> None:
        """Gives every member the state that `change` makes of it: all or none, on disk as in memory.  Raises: OSError."""
        self._teams.apply([(one, change(one)) for one in self.members], quietly=quietly)

    def select(self, selection: Callable[[ModelUpdate], Selection | None]) -> None:
        """Makes these what `serve` loads from its next start on: all or none.  Raises: OSError."""
        self._teams.select({one.model: selection(one) for one in self.members})

    def leave(self, event: Event, failures: Mapping[str, Failure]) -> float:
        """The whole team is overtaken or bad. A member without a failure of its own leaves because of the others.  Raises:
        OSError.
        """
        whose = ", ".join(
            f"{one.model}:{one.state.target} ({failures[one.model].reason.value})"
            for one in self.members
            if one.model in failures
        )
        shared = Failure(reason=Reason.TOGETHER, message=f"it serves only together with {whose}")
        now = self._teams.clock.wall()
        self.apply(lambda one: update.after(one.state, event, now, failure=failures.get(one.model, shared)))
        return AT_ONCE

    def put_off(self, problem: Problem) -> float:
        """The whole team tries again later.  Raises: OSError."""
        self.apply(lambda one: self._teams.endings.put_off_state(one, problem))
        return AT_ONCE


class Teams:
    """Finds out who switches with whom. Thread-safe."""

    def __init__(
        self, states: States, store: Store, teller: Teller, clock: Clock, wanted: WantedReleases, endings: Endings
    ) -> None:
        self.lock = threading.RLock()
        """Held while the states of several models change together, and while one that waits finds out whether it may go on."""
        self.clock = clock
        self.endings = endings
        self._states = states
        self._store = store
        self._teller = teller
        self._wanted = wanted
        self._updates: dict[str, ModelUpdate] = {}

    def add(self, one: ModelUpdate) -> None:
        """Makes the model known to its teams."""
        self._updates[one.model] = one

    def led_by(self, one: ModelUpdate) -> Team | None:
        """The team that `one` acts for; None when another member does. A member whose stored state was lost is left out."""
        names = one.state.team
        if not names:
            return Team([one], self)
        with self.lock:
            found = [self._updates.get(model) for model in names]
            mine = (one.state.phase, names)
            members = [other for other in found if other is not None and (other.state.phase, other.state.team) == mine]
        if None in found and self.clock.wall() - one.state.since < MEMBERS_S:
            return None  # the process has just begun
        return Team(members, self) if members and members[0] is one else None

    def begin_when_ready(self, one: ModelUpdate) -> float:
        """Begins the switch of all when `one`, which waits for its team, is the last of them. Called with `lock` held.

        Gives the seconds until the next step.  Raises: OSError.
        """
        releases, ready = self._wanted.team(one, self._wanted.desired) or {}, []
        for model, release in sorted(releases.items()):
            other = self._updates.get(model)
            if model != one.model and self._serves_already(model, release):
                continue
            if other is None or not self._ready(other, release):
                one.problem = f"waits for {model}:{release}, which switches together with it"
                return AGAIN_S
            ready.append(other)
        if one not in ready or any(self._wanted.expired(other.model) is not None for other in ready):
            return REST_S
        now, names = self.clock.wall(), tuple(other.model for other in ready) if len(ready) > 1 else ()
        one.problem = None
        for other in ready:
            other.note("team", "passed", f"ready together: {', '.join(f'{m}:{r}' for m, r in sorted(releases.items()))}")
        Team(ready, self).apply(
            lambda other: update.after(other.state, Event.WINDOW_OPEN, now, waiting_for=None, failure=None, team=names)
        )
        return AT_ONCE

    def apply(self, changes: Sequence[tuple[ModelUpdate, UpdateState]], *, quietly: bool = False) -> None:
        """Gives each of these models its state: all or none, on disk as in memory.  Raises: OSError."""
        with self.lock:
            if len(changes) > 1:
                self._states.save_team([state for _, state in changes])
            else:
                self._states.save(changes[0][1])
            for one, state in changes:
                one.adopt(state)
        if not quietly:
            self._teller.changed()

    def select(self, selections: Mapping[str, Selection | None]) -> None:
        """Makes these what `serve` loads from its next start on: all or none.  Raises: OSError."""
        if len(selections) > 1:
            self._store.select_team(selections)
            return
        for model, selection in selections.items():
            if selection is None:
                self._store.deselect(model)
            else:
                self._store.select(selection)

    def _ready(self, one: ModelUpdate, release: int) -> bool:
        """Whether only the others are missing."""
        state = one.state
        ready = state.phase is Phase.WAITING and state.waiting_for == "team" and state.target == release
        return ready and not one.busy and not self._wanted.overtaken(one)

    def _serves_already(self, model: str, release: int) -> bool:
        other = self._updates.get(model)
        if other is not None and other.state.target is not None:
            return False
        try:
            selection = self._store.selection(model)
        except StoreError:
            return False
        return selection is not None and selection.active.version == release
