"""The part of fleet.yaml that is about a server of several processes, and what every part of it has in common."""

from __future__ import annotations

import socket

import msgspec

from agent.contract import addresses

WILDCARDS = {"0.0.0.0", "::", ""}  # noqa: S104 - recognising it, not binding it


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: frozen, and a misspelt setting is an error."""


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
