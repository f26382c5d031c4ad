"""How the broker is, as it is shown."""

from __future__ import annotations

import msgspec


class NodeView(msgspec.Struct, frozen=True):
    """A node of a cluster. `problem` says why it does not answer; empty when it does."""

    name: str
    problem: str


class QueueView(msgspec.Struct, frozen=True):
    """A queue of what devices send: how many messages wait in it, and how many processes read it now."""

    name: str
    messages: int
    consumers: int


class BrokerView(msgspec.Struct, frozen=True):
    """Which broker it is. A mosquitto of the server's own has no nodes and no queues here."""

    kind: str
    nodes: list[NodeView] = []
    queues: list[QueueView] = []
