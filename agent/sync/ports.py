"""What the update machinery needs from outside, declared here by the side that needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef

Stop = Callable[[], bool]
"""Asked often during long work; true means give up now."""

JsonObject = Mapping[str, Any]


class Clock(Protocol):
    def wall(self) -> float:
        """Seconds since the epoch, UTC."""

    def monotonic(self) -> float:
        """Seconds that never go back."""


class Signed(msgspec.Struct, frozen=True):
    """A manifest that its publisher's key vouches for, and its exact bytes."""

    data: bytes
    sha256: str
    manifest: ReleaseManifest


class Releases(Protocol):
    """Where verified manifests come from."""

    def manifest(self, ref: ReleaseRef) -> Signed:
        """Raises: Problem when it is not there, not signed, expired, or not what it says."""


class Deliveries(Protocol):
    """What is known of this device's reports to the fleet. Moments are of the monotonic clock."""

    def since(self, moment: float) -> bool:
        """Whether the broker has a report that was begun after `moment`."""

    def lately(self, within_s: float) -> bool:
        """Whether the broker acknowledged a report in the last `within_s` seconds."""


class Teller(Protocol):
    """Where news goes."""

    def changed(self) -> None:
        """The state of a model changed; a report is due."""

    def say(self, name: str, message: str, *, model: str, release: int | None = None, reason: str | None = None) -> None:
        """An event for people."""
