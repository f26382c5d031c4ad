"""The routes of shared memory: a connection's own, and Triton's system shared memory extension."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from agent.serving.access import Access
from agent.serving.answers import Answer, Refusal, json_answer
from agent.serving.api.json_body import read_body
from agent.serving.routes import Request, Route
from agent.serving.shared.memory import ClientMemory

NO_SOCKET = "memory is shared on the Unix socket only"

T = TypeVar("T")


class RegisterMemory(msgspec.Struct, forbid_unknown_fields=True):
    byte_size: int


class RegisterSystem(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


def routes() -> list[Route]:
    own, system = "/v2/edge/memory", "/v2/systemsharedmemory"
    return [
        Route("GET", own, Access.PREDICT, memory_status),
        Route("POST", own + "/unregister", Access.PREDICT, memory_unregister),
        Route("POST", own + "/{region}/register", Access.PREDICT, memory_register),
        Route("POST", own + "/{region}/unregister", Access.PREDICT, memory_unregister),
        Route("GET", system + "/status", Access.PREDICT, system_status),
        Route("POST", system + "/unregister", Access.PREDICT, system_unregister),
        Route("GET", system + "/region/{region}/status", Access.PREDICT, system_status),
        Route("POST", system + "/region/{region}/register", Access.PREDICT, system_register),
        Route("POST", system + "/region/{region}/unregister", Access.PREDICT, system_unregister),
    ]


def memory_register(call: Request) -> Answer:
    memory = _memory(call)
    try:
        size = _body(call, RegisterMemory).byte_size
    except Refusal:
        memory.status()  # the descriptor that came is dropped, the next one is looked for
        raise
    memory.register(call.params["region"], size)
    return json_answer({})


def memory_unregister(call: Request) -> Answer:
    _memory(call).unregister(call.params.get("region"))
    return json_answer({})


def memory_status(call: Request) -> Answer:
    return json_answer(_memory(call).status())


def system_register(call: Request) -> Answer:
    memory, asked = _memory(call), _body(call, RegisterSystem)
    memory.system.register(memory.uid, call.params["region"], asked.key, asked.offset, asked.byte_size)
    return Answer()


def system_unregister(call: Request) -> Answer:
    memory = _memory(call)
    memory.system.unregister(memory.uid, call.params.get("region"))
    return Answer()


def system_status(call: Request) -> Answer:
    memory = _memory(call)
    return json_answer(memory.system.status(memory.uid, call.params.get("region")))


def _memory(call: Request) -> ClientMemory:
    memory: Any = call.regions
    if not isinstance(memory, ClientMemory):
        raise Refusal(501, NO_SOCKET)
    return memory


def _body(call: Request, kind: type[T]) -> T:
    return read_body(call.body, kind)
