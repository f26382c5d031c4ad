"""One prediction as a conversation: which messages to send over a connection, and what their answers mean. No I/O.

`Inference.steps` is a generator: it gives Messages, is sent their Answers, and returns the result. When the connection ends
before an answer, the caller starts it again on another one; what it has found out stays in the Inference and the Models.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np

from agent.client import tensors, wire
from agent.client.errors import InputRejected, document, error_of, loads, said
from agent.client.memory import ALIGNMENT, Arrays, Memory
from agent.client.tensors import Array
from agent.client.wire import Answer, Message

T = TypeVar("T")
Steps = Generator[Message, Answer, T]

SHARE_FROM_BYTES = 128 * 1024  # below, copying through the socket is as fast; see benchmarks/sharing.py
MAX_KNOWN = 32  # heads of requests remembered per connection


@dataclass(slots=True)
class Models:
    """What a client has learned of the models: the name of the only input, and the metadata of numbered versions, which never
    change.
    """

    only_inputs: dict[tuple[str, str | None, str], str] = field(default_factory=dict)
    versions: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    latest: dict[tuple[str, str | None], str] = field(default_factory=dict)


class Link:
    """What both ends of one connection know: the memory that is registered there. A new connection has a new one."""

    def __init__(self) -> None:
        self.registered: dict[str, weakref.ref[Memory]] = {}
        self.scratch: Memory | None = None
        self.refused = False  # the server does not take memory here: tensors go through the socket
        self.known: dict[Any, bytes] = {}
        # The last answer's JSON, read; the next one mostly has the same bytes.
        self.layout: tuple[bytes, dict[str, Any]] = (b"", {})

    def share(self, memory: Memory) -> Steps[bool]:
        """Registers it when it is not. False when the server does not take it."""
        if memory.name in self.registered:
            return True
        for name in [name for name, kept in self.registered.items() if kept() is None]:
            del self.registered[name]
            yield Message((wire.request("POST", f"/v2/edge/memory/{name}/unregister"),))
        payload = msgspec.json.encode({"byte_size": memory.size})
        message = Message((wire.request("POST", f"/v2/edge/memory/{memory.name}/register", payload),), memory.fd)
        answer = yield message
        if answer.status == 400 and said(answer)[1] == "no_descriptor":
            answer = yield message  # from now on it looks for descriptors
        if answer.status != 200:
            self.refused = answer.status != 503
            return False
        self.registered[memory.name] = weakref.ref(memory)
        return True

    def room(self, size: int) -> Steps[Memory | None]:
        """The memory that this connection's tensors go through, with `size` bytes at least; None when the server takes none."""
        if self.scratch is None or self.scratch.size < size:
            self.known.clear()
            self.scratch = None
            try:
                fresh = Memory(size)
            except OSError:  # no descriptor left, or no memory: the socket does it
                self.refused = True
                return None
            if not (yield from self.share(fresh)):
                return None
            self.scratch = fresh
        return self.scratch


@dataclass(slots=True)
class Options:
    """What a request says besides its tensors."""

    version: str | None = None
    outputs: tuple[str, ...] | None = None
    into: Mapping[str, Array] = field(default_factory=dict)
    parameters: tuple[tuple[str, Any], ...] = ()
    request_id: str = ""
    signature: str = ""


def tensors_of(metadata: Mapping[str, Any], role: str, signature: str = "") -> list[dict[str, Any]]:
    """The model's inputs or outputs, or those of a signature.  Raises: InputRejected when it has no such signature."""
    if not signature:
        return list(metadata[role])
    signatures = metadata.get("parameters", {}).get("signatures", {})
    if signature not in signatures:
        known = ", ".join(map(repr, signatures)) or "none"
        raise InputRejected(f"signature {signature!r} is not one of model {metadata['name']!r}; it has {known}")
    return list(signatures[signature][role])


def model_path(model: str, version: str | None) -> str:
    path = "/v2/models/" + quote(model, safe="")
    return path if version is None else f"{path}/versions/{quote(version, safe='')}"


def get(path: str) -> Steps[Any]:
    return document((yield Message((wire.request("GET", path),))))


class Inference:
    """One call of `infer`. `models` and `arrays` belong to the client; `share_from_bytes` is where copying through memory
    begins.
    """

    def __init__(
        self,
        model: str,
        inputs: Mapping[str, Array] | Array,
        options: Options,
        models: Models,
        arrays: Arrays,
        share_from_bytes: int,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._options = options
        self._models = models
        self._arrays = arrays
        self._share_from = share_from_bytes
        self._rejected: tuple[str, InputRejected] | None = None
        self.served_by = ""  # the version that answered

    def steps(self, link: Link) -> Steps[dict[str, Array]]:
        """Raises: ClientError."""
        if isinstance(self._inputs, Mapping):
            return (yield from self._ask(link, self._inputs))
        key = (self._model, self._options.version, self._options.signature)
        known = key in self._models.only_inputs
        name = yield from self._only_input(key)
        if self._rejected is not None and self._rejected[0] == name:
            raise self._rejected[1]
        try:
            return (yield from self._ask(link, {name: self._inputs}))
        except InputRejected as error:
            if not known or self._rejected is not None:
                raise
            self._rejected = name, error
        self._models.only_inputs.pop(key, None)  # another release may serve by now, whose input has another name
        return (yield from self.steps(link))

    def _only_input(self, key: tuple[str, str | None, str]) -> Steps[str]:
        name = self._models.only_inputs.get(key)
        if name is None:
            specs = tensors_of((yield from get(model_path(*key[:2]))), "inputs", key[2])
            names = [spec["name"] for spec in specs if not spec.get("parameters", {}).get("optional")]
            if len(names) != 1:
                given = ", ".join(map(repr, names))
                raise InputRejected(f"model {key[0]!r} has the inputs {given}: give each by its name")
            name = self._models.only_inputs[key] = str(names[0])
        return name

    def _ask(self, link: Link, inputs: Mapping[str, Array]) -> Steps[dict[str, Array]]:
        prepared = [(name, *tensors.prepare(name, value)) for name, value in inputs.items()]
        regions, parts = yield from self._place(link, [array for _, _, _, array in prepared])
        into = yield from self._place_outputs(link)
        head = self._head(link, prepared, regions, into)
        answer = yield Message((head, *parts))
        if answer.status != 200:
            if answer.status == 404 and "shared memory region" in said(answer)[0]:
                link.registered.clear()  # not ours: somebody unregistered it behind our back
                link.refused = True
            raise error_of(answer)
        return self._outputs(link, answer)

    # -- where the tensors go ------------------------------------------------------------------------------------------------

    def _place(self, link: Link, arrays: Sequence[Array]) -> Steps[tuple[list[tuple[str, int] | None], list[memoryview]]]:
        """For each array its region and offset, None for those in `parts`, which are sent."""
        regions: list[tuple[str, int] | None] = [None] * len(arrays)
        copied: list[int] = []
        total = 0
        if not link.refused:
            for index, array in enumerate(arrays):
                found = self._arrays.place(array) if array.nbytes else None
                if found is not None and (yield from link.share(found[0])):
                    regions[index] = found[0].name, found[1]
                elif array.nbytes >= self._share_from:
                    copied.append(index)
                    total += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        room = (yield from link.room(total)) if copied else None
        if room is not None:
            at = 0
            for index in copied:
                array = arrays[index]
                np.copyto(room.bytes[at : at + array.nbytes].view(array.dtype).reshape(array.shape), array)
                regions[index] = room.name, at
                at += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        parts = [tensors.raw(a) for a, place in zip(arrays, regions, strict=True) if place is None and a.nbytes]
        return regions, parts

    def _place_outputs(self, link: Link) -> Steps[dict[str, tuple[str, int, int]]]:
        """Region, offset and size of the outputs that the server can write where they are wanted."""
        found: dict[str, tuple[str, int, int]] = {}
        for name, array in self._options.into.items():
            place = self._arrays.place(array) if array.flags.c_contiguous and not link.refused else None
            if place is not None and (yield from link.share(place[0])):
                found[name] = place[0].name, place[1], array.nbytes
        return found

    # -- the request and its answer ------------------------------------------------------------------------------------------

    def _head(
        self,
        link: Link,
        prepared: Sequence[tuple[str, str, tuple[int, ...], Array]],
        regions: Sequence[tuple[str, int] | None],
        into: Mapping[str, tuple[str, int, int]],
    ) -> bytes:
        options = self._options
        inputs = tuple((n, d, s, a.nbytes, r) for (n, d, s, a), r in zip(prepared, regions, strict=True))
        key = (self._model, options.version, options.outputs, options.parameters, inputs, tuple(into.items()))
        head = None if options.request_id else link.known.get(key)
        if head is None:
            head = _encode(self._model, options, inputs, into)
            if not options.request_id:
                if len(link.known) >= MAX_KNOWN:
                    link.known.clear()
                link.known[key] = head
        return head

    def _outputs(self, link: Link, answer: Answer) -> dict[str, Array]:
        body = answer.body
        at = int(answer.headers.get("inference-header-content-length", len(body)))
        json, document = link.layout
        if json != body[:at]:
            json = bytes(body[:at])
            document = loads(json)
            link.layout = json, document
        self.served_by = document.get("model_version", "")
        arrays: dict[str, Array] = {}
        for output in document["outputs"]:
            name, shape, datatype = output["name"], tuple(output["shape"]), output["datatype"]
            size = output.get("parameters", {}).get("binary_data_size")
            if size is not None:
                array = tensors.from_bytes(datatype, body[at : at + size], shape)
                at += size
            elif "data" in output:
                array = tensors.from_json(datatype, output["data"], shape)
            else:
                arrays[name] = _checked(name, datatype, shape, self._options.into[name])
                continue
            into = self._options.into.get(name)
            arrays[name] = array if into is None else _copied(name, datatype, array, into)
        return arrays


def _checked(name: str, datatype: str, shape: tuple[int, ...], into: Array) -> Array:
    """The array that the output was to go into.  Raises: InputRejected when it is another kind of array."""
    if shape != into.shape or tensors.DTYPES.get(datatype, "O") != into.dtype:
        raise InputRejected(
            f"output {name!r} is {datatype} {list(shape)}, the array it is to go into is {into.dtype} {list(into.shape)}"
        )
    return into


def _copied(name: str, datatype: str, array: Array, into: Array) -> Array:
    np.copyto(_checked(name, datatype, array.shape, into), array)
    return into


def _encode(
    model: str,
    options: Options,
    inputs: Sequence[tuple[str, str, tuple[int, ...], int, tuple[str, int] | None]],
    into: Mapping[str, tuple[str, int, int]],
) -> bytes:
    documents = []
    size = 0
    for name, datatype, shape, nbytes, region in inputs:
        parameters: dict[str, Any] = {"binary_data_size": nbytes}
        if region is None:
            size += nbytes
        else:
            parameters = _memory(region[0], region[1], nbytes)
        documents.append({"name": name, "shape": shape, "datatype": datatype, "parameters": parameters})
    request: dict[str, Any] = {"inputs": documents, "parameters": {"binary_data_output": True, **dict(options.parameters)}}
    if options.request_id:
        request["id"] = options.request_id
    if options.outputs is not None or options.into:
        names = dict.fromkeys([*(options.outputs or ()), *options.into])
        request["outputs"] = [{"name": n, "parameters": _memory(*into[n])} if n in into else {"name": n} for n in names]
    json = msgspec.json.encode(request)
    lines = f"inference-header-content-length: {len(json)}\r\ncontent-length: {len(json) + size}\r\n\r\n"
    return f"POST {model_path(model, options.version)}/infer HTTP/1.1\r\nhost: edge-agent\r\n{lines}".encode() + json


def _memory(region: str, offset: int, size: int) -> dict[str, Any]:
    return {"shared_memory_region": region, "shared_memory_offset": offset, "shared_memory_byte_size": size}
