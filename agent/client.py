"""The Python SDK: predictions from a local `edge-agent serve`, over its Unix socket.

    client = Client("/run/edge-agent/agent.sock")
    probabilities = client.infer("digits", image)["probs"]

A client may be used from several threads at once; each has a connection of its own, kept open between requests. When the server
ends a connection without an answer, because it was restarted, the request is sent once more on a new one: predictions and the
agent's control routes give the same result when they are asked twice.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.host import unix

DEFAULT_SOCKET = Path("/run/edge-agent/agent.sock")
DEFAULT_TIMEOUT_S = 30.0
MAX_HEAD_BYTES = 64 * 1024

Array = NDArray[Any]

_DTYPES: dict[str, str] = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_DATATYPES = {np.dtype(code): name for name, code in _DTYPES.items()}
_LENGTH = struct.Struct("<I")


class ClientError(Exception):
    """Root of what a client raises. `status` is the HTTP status, None when no answer came."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ModelNotFound(ClientError):
    """No such model, or no such version of it."""


class InputRejected(ClientError):
    """The inputs do not fit the model; the message names the input and says what was expected."""


class Forbidden(ClientError):
    """The peer may not do that; the message says where it is granted."""


class Unavailable(ClientError):
    """Not now: no server at the socket, the model is not ready, or it is overloaded. Trying again later may work."""


class TimedOut(Unavailable):
    """The answer did not come in time. The request may still be running."""


class ServerFailed(ClientError):
    """The server or the model's engine failed on a request that it accepted."""


class _Answer:
    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], body: memoryview) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class Client:
    """Talks to the server at `socket_path`. Nothing is connected before the first request."""

    def __init__(self, socket_path: str | Path = DEFAULT_SOCKET, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.socket_path = Path(socket_path)
        self.timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._names: dict[tuple[str, str | None], list[str]] = {}
        self._closed = False

    def __enter__(self) -> Client:  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the idle connections; one that is in use ends with its request."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array] | Array,
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Array]:
        """Output name → array, for the named `outputs` or all of them. `inputs` may be one array when the model has one input.

        Raises: ModelNotFound, InputRejected, Forbidden, Unavailable, TimedOut, ServerFailed.
        """
        label = None if version is None else str(version)
        if isinstance(inputs, Mapping):
            return self._infer(model, inputs, label, outputs, timeout_s)
        known = (model, label) in self._names
        name = self._only_input(model, label)
        try:
            return self._infer(model, {name: inputs}, label, outputs, timeout_s)
        except InputRejected:
            if not known:
                raise
            self._names.pop((model, label), None)  # another release may serve by now, whose input has another name
            if (now := self._only_input(model, label)) == name:
                raise
        return self._infer(model, {now: inputs}, label, outputs, timeout_s)

    def _infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        label: str | None,
        outputs: Sequence[str] | None,
        timeout_s: float | None,
    ) -> dict[str, Array]:
        head, parts = _encode_inputs(inputs, outputs)
        size = len(head) + sum(len(part) for part in parts)
        request = (
            f"POST {_model_path(model, label)}/infer HTTP/1.1\r\nhost: edge-agent\r\n"
            f"inference-header-content-length: {len(head)}\r\ncontent-length: {size}\r\n\r\n"
        ).encode()
        answer = self._exchange([request + head, *parts], timeout_s)
        if answer.status != 200:
            raise _error(answer)
        return _decode_outputs(answer)

    def metadata(self, model: str, version: int | str | None = None) -> dict[str, Any]:
        """The model's inputs and outputs: names, datatypes, shapes, and the scale and zero point of quantized ones."""
        return self._get(_model_path(model, None if version is None else str(version)))

    def models(self) -> list[dict[str, Any]]:
        """Every version the server knows: name, version, state, and the reason when it is not ready."""
        status, _, body = self.request("POST", "/v2/repository/index", {})
        found: list[dict[str, Any]] = _document(status, body)
        return found

    def ready(self, model: str | None = None, version: int | str | None = None) -> bool:
        """Whether the model, or the server as a whole, answers predictions now. False too when there is no server."""
        path = "/v2/health/ready" if model is None else _model_path(model, None if version is None else str(version)) + "/ready"
        try:
            return self.request("GET", path)[0] == 200
        except Unavailable:
            return False

    def status(self) -> dict[str, Any]:
        """What the server runs, with statistics per version; see the control routes."""
        return self._get("/control/v1/status")

    def request(
        self, method: str, path: str, body: object = None, *, timeout_s: float | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Any request: (status, headers with lower-case names, body). `body` is sent as JSON; bytes are sent as they are.

        Raises: Unavailable, TimedOut when no answer comes. An error status is not raised.
        """
        payload = b"" if body is None else bytes(body) if isinstance(body, bytes | bytearray) else msgspec.json.encode(body)
        head = f"{method} {path} HTTP/1.1\r\nhost: edge-agent\r\ncontent-length: {len(payload)}\r\n\r\n".encode()
        answer = self._exchange([head + payload], timeout_s)
        return answer.status, answer.headers, bytes(answer.body)

    def _get(self, path: str) -> dict[str, Any]:
        status, _, body = self.request("GET", path)
        found: dict[str, Any] = _document(status, body)
        return found

    def _only_input(self, model: str, version: str | None) -> str:
        key = (model, version)
        names = self._names.get(key)
        if names is None:
            names = [tensor["name"] for tensor in self.metadata(model, version)["inputs"]]
            self._names[key] = names
        if len(names) != 1:
            raise InputRejected(f"model {model!r} has the inputs {', '.join(map(repr, names))}: give each by its name")
        return names[0]

    def _exchange(self, parts: Sequence[bytes | memoryview], timeout_s: float | None) -> _Answer:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        again = True
        while True:
            connection, used = self._take(timeout_s)
            try:
                answer = connection.exchange(parts, timeout_s)
            except _Stale as error:
                connection.close()
                if used or again:  # the server may have been restarted: its next process, or a new connection, tells
                    again = used
                    self._drop_idle()
                    continue
                raise Unavailable(f"the server at {self.socket_path} closed the connection: {error}") from error
            except BaseException:
                connection.close()
                raise
            if answer.headers.get("connection", "") == "close" or self._closed:
                connection.close()
            else:
                self._idle.append(connection)
            return answer

    def _take(self, timeout_s: float) -> tuple[_Connection, bool]:
        """A connection for this call alone, and whether it has been used before."""
        try:
            return self._idle.pop(), True
        except IndexError:
            return _Connection(self.socket_path, timeout_s), False

    def _drop_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


class _Stale(Exception):
    """The connection ended before any byte of an answer came."""


class _Connection:
    """One connection; used by one thread at a time."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._buffer = bytearray(16 * 1024)
        try:
            self._sock = unix.connect(str(path), timeout_s)
        except TimeoutError as error:
            raise TimedOut(f"the server at {path} did not accept the connection within {timeout_s} s") from error
        except OSError as error:
            raise Unavailable(f"no server answers at {path}: {error.strerror}") from error

    def close(self) -> None:
        self._sock.close()

    def exchange(self, parts: Sequence[bytes | memoryview], timeout_s: float) -> _Answer:
        """Raises: _Stale, TimedOut, Unavailable."""
        if timeout_s != self._timeout_s:
            self._sock.settimeout(timeout_s)
            self._timeout_s = timeout_s
        broken = self._send(parts)
        try:
            return self._receive()
        except TimeoutError as error:
            raise TimedOut(f"no answer within {timeout_s} s") from error
        except _Stale as error:
            raise (_Stale(str(broken)) if broken else error) from broken
        except OSError as error:
            raise _Stale(str(error)) from error

    def _send(self, parts: Sequence[bytes | memoryview]) -> OSError | None:
        """A server that refuses a request may answer and stop reading: its answer is still to be read."""
        try:
            if len(parts) == 1:
                self._sock.sendall(parts[0])
                return None
            sent = self._sock.sendmsg(parts)
            for part in parts:
                if sent >= len(part):
                    sent -= len(part)
                    continue
                self._sock.sendall(memoryview(part)[sent:])
                sent = 0
        except TimeoutError as error:
            raise TimedOut("the server did not take the request in time") from error
        except OSError as error:
            return error
        return None

    def _receive(self) -> _Answer:
        buffer, have = self._buffer, 0
        while True:
            count = self._sock.recv_into(memoryview(buffer)[have:])
            if count == 0:
                if have == 0:
                    raise _Stale("it ended before an answer")
                raise Unavailable("the connection ended within an answer")
            have += count
            end = buffer.find(b"\r\n\r\n", 0, have)
            if end >= 0:
                break
            if have == len(buffer):
                if have >= MAX_HEAD_BYTES:
                    raise ServerFailed("the answer's head does not end")
                buffer.extend(bytes(have))
        status, headers = _head(bytes(buffer[:end]))
        size = int(headers.get("content-length", "0"))
        body = bytearray(size)
        got = min(have - end - 4, size)
        body[:got] = memoryview(buffer)[end + 4 : end + 4 + got]
        view = memoryview(body)
        while got < size:
            count = self._sock.recv_into(view[got:])
            if count == 0:
                raise Unavailable("the connection ended within an answer")
            got += count
        return _Answer(status, headers, view)


def _head(data: bytes) -> tuple[int, dict[str, str]]:
    lines = data.decode("latin-1").split("\r\n")
    try:
        status = int(lines[0].split(" ", 2)[1])
    except (IndexError, ValueError):
        raise ServerFailed(f"what answers at this socket does not speak HTTP: {lines[0][:40]!r}") from None
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return status, headers


def _model_path(model: str, version: str | None) -> str:
    path = "/v2/models/" + quote(model, safe="")
    return path if version is None else f"{path}/versions/{quote(version, safe='')}"


def _encode_inputs(inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> tuple[bytes, list[memoryview]]:
    documents, parts = [], []
    for name, value in inputs.items():
        array = np.asarray(value)
        if array.dtype.kind in "OSU":
            datatype, data = "BYTES", memoryview(_pack_bytes(name, array))
        else:
            little = array.dtype.newbyteorder("<")
            found = _DATATYPES.get(little)
            if found is None:
                raise InputRejected(f"input {name!r} has dtype {array.dtype}, which the protocol cannot carry")
            datatype = found
            shaped = np.ascontiguousarray(array, dtype=little)
            data = memoryview(shaped.reshape(-1).view(np.uint8).data)
        documents.append({
            "name": name, "shape": list(array.shape), "datatype": datatype, "parameters": {"binary_data_size": len(data)},
        })  # fmt: skip
        if data:
            parts.append(data)
    request: dict[str, Any] = {"inputs": documents, "parameters": {"binary_data_output": True}}
    if outputs is not None:
        request["outputs"] = [{"name": name} for name in outputs]
    return msgspec.json.encode(request), parts


def _pack_bytes(name: str, array: Array) -> bytes:
    packed = bytearray()
    for element in array.flat:
        if not isinstance(element, bytes | str):
            raise InputRejected(f"input {name!r} holds a {type(element).__name__}: expected bytes or str")
        data = element.encode() if isinstance(element, str) else bytes(element)
        packed += _LENGTH.pack(len(data)) + data
    return bytes(packed)


def _decode_outputs(answer: _Answer) -> dict[str, Array]:
    body = answer.body
    at = int(answer.headers.get("inference-header-content-length", len(body)))
    document = msgspec.json.decode(body[:at])
    arrays: dict[str, Array] = {}
    for output in document["outputs"]:
        shape = tuple(output["shape"])
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            dtype = _DTYPES.get(output["datatype"], "O")
            arrays[output["name"]] = np.array(output["data"], dtype=dtype).reshape(shape)
            continue
        data = body[at : at + size]
        at += size
        if output["datatype"] == "BYTES":
            arrays[output["name"]] = _unpack_bytes(data, shape)
        else:
            arrays[output["name"]] = np.frombuffer(data, _DTYPES[output["datatype"]]).reshape(shape).copy()
    return arrays


def _unpack_bytes(data: memoryview, shape: tuple[int, ...]) -> Array:
    array = np.empty(math.prod(shape), np.object_)
    at = 0
    for index in range(array.size):
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        array[index] = bytes(data[at : at + size])
        at += size
    return array.reshape(shape)


def _document(status: int, body: bytes) -> Any:
    if status != 200:
        raise _error(_Answer(status, {}, memoryview(body)))
    return msgspec.json.decode(body)


def _error(answer: _Answer) -> ClientError:
    try:
        text = str(msgspec.json.decode(answer.body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        text = f"status {answer.status}"
    kinds: dict[int, type[ClientError]] = {403: Forbidden, 404: ModelNotFound, 503: Unavailable}
    kind = kinds.get(answer.status) or (ServerFailed if answer.status >= 500 else InputRejected)
    return kind(text, answer.status)
