"""Shared memory by name over gRPC. Everyone on the socket counts as the user that runs the server, whose memory it must be."""

from __future__ import annotations

from agent.serving.answers import Buffer
from agent.serving.shared.regions import not_found
from agent.serving.shared.systemmemory import SystemMemory, SystemRegion


class SocketRegions:
    """The regions of one user, as every call on the socket sees them."""

    def __init__(self, system: SystemMemory, uid: int) -> None:
        self._system = system
        self._uid = uid

    @property
    def reach_bytes(self) -> int:
        return self._system.largest_bytes

    def view(self, name: str, offset: int, size: int) -> memoryview:
        return self._find(name).view(name, offset, size)

    def check(self, name: str, offset: int, size: int) -> None:
        self._find(name).check(name, offset, size)

    def store(self, name: str, offset: int, size: int, data: Buffer) -> None:
        self._find(name).store(name, offset, size, data)

    def _find(self, name: str) -> SystemRegion:
        region = self._system.find(self._uid, name)
        if region is None:
            raise not_found(name)
        return region

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        self._system.register(self._uid, name, key, offset, size)

    def unregister(self, name: str | None) -> None:
        self._system.unregister(self._uid, name)

    def status(self, name: str | None) -> list[dict[str, object]]:
        return self._system.status(self._uid, name)
