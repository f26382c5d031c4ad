"""The base of every section of fleet.yaml, and some of them; `config` has the others and the whole."""

from __future__ import annotations

import socket

import msgspec

from agent.contract import addresses

DAY_S = 86400.0
WILDCARDS = {"0.0.0.0", "::", ""}  # noqa: S104 - recognising it, not binding it


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: frozen, and a misspelt setting is an error."""


class RolloutSettings(Settings, frozen=True, kw_only=True):
    """When rollouts are judged, and what their waves must keep to pass."""

    tick_s: float = 5.0
    """Seconds after which rollouts are judged again although no report came: a device may have fallen silent."""
    silence_s: float = 180.0
    """Seconds without a word after which a device counts as offline: three heartbeats."""
    min_devices: int = 1
    """How many devices of a wave must serve the release before the wave passes."""
    min_share: float = 0.5
    """And which part of those that were there when they were told, less those that are held or skipped."""
    missing_share: float = 0.1
    """Which part of them may fall silent, or not answer in time. A wave with more does not pass until they are back, or somebody decides."""
    confidence: float = 0.99
    """How sure it must be that more than `missing_share` are missing: of rollouts in which no more are, 1 % is held up at 0.99."""
    time_limit_s: float = DAY_S
    """Seconds that a wave waits for a device from when it was told. A rollout with a window allows a week more."""
    exclude_after: int = 3
    """How many devices of one hardware class must have quarantined a release for the class to be excluded from it. 0: never."""
    exclude_share: float = 0.02
    """And which part of the class's devices that run or quarantined the release: a few that are broken do not speak for a
    thousand.
    """

    def __post_init__(self) -> None:
        if self.tick_s <= 0 or self.silence_s <= 0 or self.min_devices < 1 or self.exclude_after < 0:
            raise ValueError("tick_s and silence_s must be above 0, min_devices at least 1, exclude_after not negative")
        if not (0 <= self.exclude_share <= 1 and 0 <= self.min_share <= 1 and 0 < self.missing_share < 1):
            raise ValueError("exclude_share and min_share must be from 0 to 1, missing_share above 0 and below 1")
        if not (0.5 <= self.confidence < 1 and self.time_limit_s >= 1):
            raise ValueError("confidence must be from 0.5 to below 1, time_limit_s at least 1 second")


class DecideSettings(Settings, frozen=True, kw_only=True):
    """Where `edge-fleet decide` listens for the server's other processes, which show the server's own client certificate there. With
    `edge-fleet serve` nobody listens.
    """

    listen: str = "127.0.0.1"
    """The address of this machine: one that the machines of the other processes reach, where there are several."""
    port: int = 8445
    """The TCP port (HTTPS)."""
    told: str | None = None
    """HOST:PORT by which the others reach this one; without it `listen` and `port`."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError("a port is a number from 1 to 65535")
        if self.told is not None:
            addresses.split(self.told, "decide.told")

    @property
    def address(self) -> str:
        """HOST:PORT by which the others reach this one."""
        host = socket.gethostname() if self.listen in WILDCARDS else self.listen
        return self.told or addresses.join(host, self.port)
