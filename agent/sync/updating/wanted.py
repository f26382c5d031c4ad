"""What is wanted of a model: by an operator on this device first, else by the fleet."""

from __future__ import annotations

from collections.abc import Callable

from agent.contract.assignment import Wanted
from agent.contract.reasons import Reason
from agent.contract.reports import Hardware, hardware_class
from agent.sync.ports import Clock
from agent.sync.problems import Problem
from agent.sync.trust.desired import Desired
from agent.sync.updating.holds import Holds
from agent.sync.updating.model import ModelUpdate
from agent.sync.updating.update import Failure


class WantedReleases:
    """Answers what should run here, from the fleet's last verified word and from the holds of this device."""

    def __init__(
        self, desired: Callable[[], Desired | None], holds: Holds, hardware: Callable[[], Hardware], clock: Clock
    ) -> None:
        self._desired = desired
        self._holds = holds
        self._hardware = hardware
        self._clock = clock

    @property
    def desired(self) -> Desired | None:
        """The fleet's last verified word; None before it ever spoke. Another may come between two questions."""
        return self._desired()

    @property
    def metadata(self) -> str:
        """Which metadata the fleet's last word rests on."""
        desired = self._desired()
        return desired.metadata if desired is not None else ""

    def held(self, model: str) -> bool:
        """Whether an operator on the device said that this model stays on one release."""
        return self._holds.held(model) is not None

    def of(self, model: str) -> Wanted | None:
        """What the fleet wants, or what an operator on the device holds the model on; None before the fleet ever spoke."""
        return self.by(self._desired(), model)

    def by(self, desired: Desired | None, model: str) -> Wanted | None:
        """What is wanted by this word of the fleet. What is decided from several questions asks all of them of one word."""
        held = self._holds.held(model)
        if held is not None and not (desired and desired.withdrawn(model, held)):
            return Wanted(held)
        if desired is None:
            return None
        return desired.wanted(model, hardware_class(self._hardware()) if desired.depends_on_hardware(model) else "")

    def withdrawn(self, model: str, release: int) -> bool:
        """Whether nobody may run the release any more."""
        desired = self._desired()
        return desired is not None and desired.withdrawn(model, release)

    def overtaken(self, one: ModelUpdate) -> bool:
        """Whether something else is wanted than what the update is about."""
        wanted = self.of(one.model)
        return wanted is not None and wanted.release != one.state.target

    def overtaken_by(self, one: ModelUpdate) -> Failure:
        """Why the update does not go on, once it is overtaken."""
        target = one.state.target
        if target is not None and self.withdrawn(one.model, target):
            return Failure(reason=Reason.WITHDRAWN, message=f"release {target} was withdrawn")
        return Failure(reason=Reason.OPERATOR, message=f"release {target} is no longer wanted")

    def expired(self, model: str) -> Problem | None:
        """Why nothing may be installed now. Rolling back by hand to what was proved here needs nobody's fresh word."""
        if self.held(model):
            return None
        desired = self._desired()
        if desired is not None and desired.fresh(self._clock.wall()):
            return None
        return Problem(
            Reason.EXPIRED_METADATA, "what the fleet last said has expired: nothing is installed until it can be reached"
        )

    def team(self, one: ModelUpdate, desired: Desired | None) -> dict[str, int] | None:
        """Model → release of all that switch together with the target, itself among them; None when it switches alone."""
        if desired is None or one.state.target is None or self.held(one.model):
            return None
        return desired.team(one.model, one.state.target)
