"""The Python SDK: predictions from a local `edge-agent serve`, over its Unix socket.

    client = Client("/run/edge-agent/agent.sock")
    probabilities = client.infer("digits", image)["probs"]

When the server ends a connection without an answer, because it was restarted, the request is sent once more on a new one, and
memory that was shared is shared again: predictions and the agent's control routes give the same result when they are asked
twice.

`AsyncClient` is the same for asyncio. `agent.client.triton` lets tritonclient speak to the socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent.client.blocking import DEFAULT_SOCKET, DEFAULT_TIMEOUT_S, Client, StatefulSequence
from agent.client.errors import (
    ClientError,
    Forbidden,
    InputRejected,
    ModelNotFound,
    ServerFailed,
    TimedOut,
    Unavailable,
)
from agent.client.quantization import dequantize, quantize
from agent.client.tensors import DTYPES, Array

if TYPE_CHECKING:
    from agent.client.aio import AsyncClient

__all__ = [
    "DEFAULT_SOCKET",
    "DEFAULT_TIMEOUT_S",
    "DTYPES",
    "Array",
    "AsyncClient",
    "Client",
    "ClientError",
    "Forbidden",
    "InputRejected",
    "ModelNotFound",
    "ServerFailed",
    "StatefulSequence",
    "TimedOut",
    "Unavailable",
    "dequantize",
    "quantize",
]


def __getattr__(name: str) -> Any:
    """AsyncClient on first use: asyncio takes longer to import than everything else here."""
    if name == "AsyncClient":
        from agent.client.aio import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
