"""Who may have a connection to a listener, and whose ends when there is no room. Decides only; sockets are `accepting`'s.

A connection that waits for its client's bytes may end to make room for another; one whose request is being answered never
does. When a listener is full, whoever holds most of it makes room, the connection first that has been silent longest. Nobody
can fill a listener alone: an address has a bound of its own until a certificate says who is there, and then the device has one.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum

import msgspec

FRESH_S = 1.0
"""For so long a silent connection keeps its place: the first bytes of a client on a bad line need a few hundred milliseconds."""
IPV6_NETWORK = 64
"""Bits of an IPv6 address that count as one address: whoever has one has the whole network."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many connections there may be at once: of the listener, of an address that has shown no certificate, of a device."""

    total: int
    per_address: int
    per_device: int


class Connection:
    """One connection of a listener. `since`: when its client was heard last, or was answered."""

    __slots__ = ("address", "device", "end", "since", "waits")

    def __init__(self, address: str, since: float, end: Callable[[], object]) -> None:
        self.address, self.since, self.end = address, since, end
        self.device: str | None = None
        self.waits: Callable[[], bool] = lambda: True
        """Whether it waits for bytes of its client."""


class Answer(Enum):
    """What becomes of a client that connects."""

    COME = "come"
    LATER = "later"
    """It waits in the system's queue until there is room."""
    REFUSED = "refused"


class Connections:
    """The connections of one listener."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits, self._clock = limits, clock
        self._all: dict[Connection, None] = {}
        self._held: dict[str, dict[Connection, None]] = {}
        """By holder; in the order in which they came, as all are."""
        self.accepted = 0
        self.refused: Counter[str] = Counter()
        """Those that were let in nowhere, by what was full: `address` or `device`."""
        self.ended: Counter[str] = Counter()
        """Those that made room, by what was full: `listener`, `address`, `device`; or that were too slow: `handshake`."""

    def __len__(self) -> int:
        return len(self._all)

    def ask(self, address: str) -> Answer:
        """Whether another connection of the address may come; one that is in its way is ended."""
        held = self._held.get(address, {})
        if len(held) >= self.limits.per_address and not self._make_room(held, "address"):
            self.refused["address"] += 1
            return Answer.REFUSED
        if len(self._all) >= self.limits.total and not self._make_room(self._all, "listener"):
            return Answer.LATER
        return Answer.COME

    def add(self, connection: Connection) -> None:
        self.accepted += 1
        self._all[connection] = None
        self._held.setdefault(connection.address, {})[connection] = None

    def identify(self, connection: Connection, device: str) -> bool:
        """Says whose it is from now on; whether it may stay. One that may not counts for its address until it ends."""
        held = self._held.get(device, {})
        if len(held) >= self.limits.per_device and not self._make_room(held, "device"):
            self.refused["device"] += 1
            return False
        self._forget(connection)
        connection.device = device
        self._held.setdefault(device, {})[connection] = None
        return True

    def remove(self, connection: Connection) -> None:
        if connection in self._all:
            del self._all[connection]
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        holder = _holder(connection)
        held = self._held[holder]
        del held[connection]
        if not held:
            del self._held[holder]

    def _make_room(self, among: Iterable[Connection], full: str) -> bool:
        """Ends one of them; False when each of them is busy or has just come."""
        latest = self._clock() - FRESH_S
        found = [one for one in among if one.since <= latest and one.waits()]
        if not found:
            return False
        victim = min(found, key=lambda one: (-len(self._held[_holder(one)]), one.since))
        self.ended[full] += 1
        self.remove(victim)
        victim.end()
        return True


def _holder(connection: Connection) -> str:
    """A device's name has no character in common with the marks of an address."""
    return connection.device if connection.device is not None else connection.address


def address_of(host: str) -> str:
    """What counts as one address; with a mark, so that no device is called like it."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return f"@{host}"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return f"@{found.ipv4_mapped}"
        return f"@{ipaddress.ip_network((found, IPV6_NETWORK), strict=False).network_address}"
    return f"@{found}"
