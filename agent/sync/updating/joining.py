# ruff: noqa: SLF001 - those of a team are of one class
"""Releases that switch together: each waits until the others are fetched and tried, and then all begin at once.

What follows (activating, the watch, going back) is in `switching`, for a team as for one. A device that was told of no such releases
never comes here.
"""

from __future__ import annotations

from agent.contract.reports import Phase
from agent.store import StoreError
from agent.sync.trust.desired import Desired
from agent.sync.updating import update
from agent.sync.updating.model import AGAIN_S, REST_S, ModelWork
from agent.sync.updating.update import Event


class Joining(ModelWork):
    """WAITING for the others."""

    def _others(self, desired: Desired | None) -> dict[str, int] | None:
        """Model → release of all that switch together with the target, itself among them; None when it switches alone."""
        if desired is None or self.state.target is None or self.held:
            return None
        return desired.together(self.model, self.state.target)

    def _join(self) -> float:
        """Begins the switch of all when the last of them is ready. Called with `joint` held."""
        members, team = self._others(self._s.desired()) or {}, []
        for model, release in sorted(members.items()):
            found = self if model == self.model else self._s.colleague(model)
            if self._serves_already(model, release):
                continue
            if not isinstance(found, Joining) or not found._ready(release):
                self.problem = f"waits for {model}:{release}, which switches together with it"
                return AGAIN_S
            team.append(found)
        if self not in team or any(one._expired() is not None for one in team):
            return REST_S
        now, peers = self._s.clock.wall(), tuple(one.model for one in team) if len(team) > 1 else ()
        self.problem = None
        for one in team:
            one._note("together", "passed", f"ready together: {', '.join(f'{m}:{r}' for m, r in sorted(members.items()))}")
        self._apply_all(
            [
                (one, update.after(one.state, Event.WINDOW_OPEN, now, waiting_for=None, failure=None, peers=peers))
                for one in team
            ]
        )
        return 0.0

    def _ready(self, release: int) -> bool:
        """Whether only the others are missing."""
        state = self.state
        ready = state.phase is Phase.WAITING and state.waiting_for == "others" and state.target == release
        return ready and not self.busy and not self._overtaken()

    def _serves_already(self, model: str, release: int) -> bool:
        colleague = self._s.colleague(model)
        if model == self.model or (colleague is not None and colleague.state.target is not None):
            return False
        try:
            selection = self._s.store.selection(model)
        except StoreError:
            return False
        return selection is not None and selection.active.version == release
