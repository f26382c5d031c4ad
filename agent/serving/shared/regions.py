"""Memory that a client shares, as an inference request may name it instead of sending a tensor's bytes.

Two kinds: a memfd that came over this connection and goes with it, and a system region (POSIX shared memory) that its owner
registered. A connection's own are looked for first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from agent.serving.answers import Buffer, Refusal


class Regions(Protocol):
    """What one request can name. Any thread may call it, also while the client unregisters the region or goes away."""

    @property
    def reach_bytes(self) -> int:
        """How large a tensor can be that a request with these regions does not carry itself."""
        ...

    def view(self, name: str, offset: int, size: int) -> memoryview:
        """`size` bytes of the region from `offset`. What is made of the view keeps the memory; nothing needs to be released.

        The client can change these bytes at any time, also during a run: copy first what has to stay as it was checked.
        `offset` and `size` are any integers that the request said.

        Raises: Refusal (404 no such region, 400 outside of it, 501 no regions are offered).
        """
        ...

    def check(self, name: str, offset: int, size: int) -> None:
        """Whether `size` bytes can be stored there: to be asked before the model is run.  Raises: Refusal, as `view`."""
        ...

    def store(self, name: str, offset: int, size: int, data: Buffer) -> None:
        """Writes an output's bytes (C-contiguous, or bytes) into the `size` bytes from `offset`.

        Raises: Refusal (400 when they do not fit, and as `view`).
        """
        ...


class ConnectionRegions(Regions, Protocol):
    """The regions that the requests of one connection can name. Nobody else changes the connection's own."""

    def keep(self, key: object, made: Any, names: Iterable[str]) -> None:
        """Keeps what was made of views of the regions with these names until one of them may be another one; or does not."""
        ...

    def recall(self, key: object) -> Any:
        """What was last kept, if it was for the very same `key` and still holds; else None."""
        ...


def check_range(name: str, offset: int, size: int, region_bytes: int) -> None:
    """Raises: Refusal (400) when `size` bytes from `offset` are not all inside a region of `region_bytes`."""
    if offset < 0 or offset > region_bytes:
        raise Refusal(400, f"Invalid offset for shared memory region: '{name}': {offset}, it has {region_bytes} bytes")
    if size < 0 or size > region_bytes - offset:
        raise Refusal(
            400,
            f"Invalid offset + byte size for shared memory region: '{name}': "
            f"{size} bytes from {offset}, it has {region_bytes} bytes",
        )


def not_found(name: str) -> Refusal:
    return Refusal(404, f"Unable to find shared memory region: '{name}'")


def check_fits(name: str, needed: int, room: int) -> None:
    """Raises: Refusal (400) when an output is larger than the room that the request gave it."""
    if needed > room:
        raise Refusal(400, f"an output of {needed} bytes does not fit the {room} bytes given in shared memory region '{name}'")
