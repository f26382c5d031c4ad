"""How long things take a simulated device. Pure."""

from __future__ import annotations

import math
import random

import msgspec

from agent.contract.reports import Phase
from fleet_server.simulation.behaviours import Behaviour

MEDIAN_S = {
    Phase.FETCHING: 8.0,
    Phase.TRIALING: 4.0,
    Phase.ACTIVATING: 0.5,
    Phase.WATCHING: 30.0,
    Phase.ROLLING_BACK: 0.5,
}
SPREAD = 0.4
"""Of the logarithm: of 100 devices one takes more than two and a half times the median."""

SLOWER = 10.0
HEARTBEAT_S = 60.0
"""An agent's `sync.heartbeat_s`."""

SILENCES = 3
"""After as many heartbeats that did not come a throw-away server counts a device as offline, as other servers do."""

FLAP_S = 20.0
LEAST_S = 0.5
"""No heartbeat comes sooner, however fast the time passes."""


class Realism(msgspec.Struct, frozen=True, kw_only=True):
    """How much of what an agent does is done for real: shares of the devices that verify what they hear, and that fetch."""

    verify: float = 0.01
    fetch: float = 0.0
    speed: float = 1.0
    beats_s: float | None = None
    """Seconds between two heartbeats, when these are not to come `speed` times as fast as well."""

    @property
    def heartbeat_s(self) -> float:
        return self.beats_s or max(LEAST_S, HEARTBEAT_S / self.speed)

    @property
    def silence_s(self) -> float:
        """After how many seconds without a word a throw-away server counts a device as offline."""
        return SILENCES * self.heartbeat_s


class Pace:
    """The durations of one device."""

    def __init__(self, rng: random.Random, behaviour: Behaviour, realism: Realism) -> None:
        self._rng = rng
        self._factor = (SLOWER if behaviour is Behaviour.SLOW else 1.0) / realism.speed
        self._speed = realism.speed
        self.heartbeat_s = realism.heartbeat_s

    def phase_s(self, phase: Phase) -> float:
        """How long the device stays in a phase of an update."""
        return MEDIAN_S[phase] * math.exp(self._rng.gauss(0.0, SPREAD)) * self._factor

    def first_heartbeat_s(self) -> float:
        """Devices do not start at the same moment."""
        return self._rng.random() * self.heartbeat_s

    def flap_s(self) -> float:
        """Until the next break of a connection that does not hold."""
        return max(LEAST_S, FLAP_S * (0.5 + self._rng.random()) / self._speed)

    def jitter(self) -> float:
        return self._rng.random()
