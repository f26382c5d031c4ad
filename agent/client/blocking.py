"""The client for threads."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from agent.client import calls, wire
from agent.client.errors import ClientError, ServerFailed, TimedOut, Unavailable
from agent.client.inference import SHARE_FROM_BYTES, Inference, Link, Models, Options, Steps, get, model_path
from agent.client.memory import Arrays
from agent.client.tensors import Array
from agent.client.wire import Answer, AnswerReader, Message
from agent.host import unix

DEFAULT_SOCKET = Path("/run/edge-agent/agent.sock")
DEFAULT_TIMEOUT_S = 30.0
JOIN_BYTES = 16 * 1024  # copying a request up to here into one buffer is cheaper than sending its parts

T = TypeVar("T")


class Client:
    """Talks to the server at `socket_path`. Nothing is connected before the first request.

    It may be used from several threads at once; each request has a connection of its own, kept open between requests. Tensors
    of `share_from_bytes` and more go through memory shared with the server instead of through the socket; None: never.
    """

    def __init__(
        self,
        socket_path: str | Path = DEFAULT_SOCKET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        share_from_bytes: int | None = SHARE_FROM_BYTES,
    ) -> None:
        self.socket_path = Path(socket_path)
        self.timeout_s = timeout_s
        self._share_from = (1 << 62) if share_from_bytes is None else share_from_bytes
        self._idle: list[_Connection] = []
        self._models = Models()
        self._arrays = Arrays()
        self._closed = False

    def __enter__(self) -> Client:  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the idle connections; one that is in use ends with its request."""
        self._closed = True
        self._drop_idle()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array] | Array,
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        into: Mapping[str, Array] | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        request_id: str = "",
        signature: str = "",
    ) -> dict[str, Array]:
        """Output name → array, for the named `outputs` or all of them. `inputs` may be one array when the model has one input.

        Every array has the shape and dtype that the model's metadata says; BYTES are object arrays of bytes or str, FP16 is
        float16, BF16 comes back as float32. `into` names arrays that outputs are written to, which are then what is returned
        for them; without `outputs`, only these are asked for. Made with `array`, they are written by the server itself.
        `version` is a number, or stable, candidate or previous. `timeout_s` is for all of the call, connecting included, and is
        told to the server, which drops what it could only answer later. `priority` 1 is the highest, 0 the model's default.
        `signature` is one of the model's file, whose names inputs and outputs then have.

        Raises: ModelNotFound, InputRejected, Forbidden, Unavailable, TimedOut, ServerFailed.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        said = calls.options(version, outputs, into, timeout_s, priority, request_id, None, signature)
        return self._infer(model, inputs, said, timeout_s)

    def infer_real(
        self,
        model: str,
        inputs: Mapping[str, Array] | Array,
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> dict[str, Array]:
        """As `infer`, with floating-point arrays for quantized inputs, and float32 for quantized outputs.

        They are converted here with the scale and zero point of the version that answers; values beyond its range become the
        nearest that it has. Integer arrays, and tensors that are not quantized, pass as they are.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        said = calls.options(version, outputs, None, timeout_s, priority, "", None)
        asked = calls.RealInference(model, inputs, said, self._models, self._arrays, self._share_from)
        return self._run(asked.steps, timeout_s)

    def _infer(self, model: str, inputs: Mapping[str, Array] | Array, said: Options, timeout_s: float) -> dict[str, Array]:
        return self._run(Inference(model, inputs, said, self._models, self._arrays, self._share_from).steps, timeout_s)

    @contextlib.contextmanager
    def sequence(
        self, model: str, *, version: int | str | None = None, timeout_s: float | None = None
    ) -> Iterator[StatefulSequence]:
        """Predictions that share the model's state, in the order they are asked: the first starts it, leaving the block ends
        it.

        with client.sequence("speech") as speech:
            for frame in frames:
                text = speech.infer(frame)["text"]
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        made = StatefulSequence(self, model, calls.label(version), timeout_s)
        try:
            yield made
        finally:
            made.end()

    def array(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """An array of zeros in memory that the server can reach: as an input or in `into` it is not copied at all.

        It lives as long as it is referred to, whatever becomes of connections. Until a call that uses it has returned, changing
        it changes what the model sees; after a timeout the server may still be reading or writing it.  Raises: OSError,
        ValueError for objects.
        """
        return self._arrays.make(shape, dtype)

    def metadata(self, model: str, version: int | str | None = None) -> dict[str, Any]:
        """The model's inputs and outputs: names, datatypes, shapes, and the scale and zero point of quantized ones."""
        found: dict[str, Any] = self._run(lambda _: get(model_path(model, calls.label(version))), self.timeout_s)
        return found

    def models(self) -> list[dict[str, Any]]:
        """Every version the server knows: name, version, state, and the reason when it is not ready."""
        return self._run(calls.models, self.timeout_s)

    def ready(self, model: str | None = None, version: int | str | None = None) -> bool:
        """Whether the model, or the server as a whole, answers predictions now. False too when there is no server."""
        try:
            return self.request("GET", calls.ready_path(model, version))[0] == 200
        except Unavailable:
            return False

    def status(self) -> dict[str, Any]:
        """What the server runs, with statistics per version; see the control routes."""
        found: dict[str, Any] = self._run(lambda _: get("/control/v1/status"), self.timeout_s)
        return found

    def request(
        self, method: str, path: str, body: object = None, *, timeout_s: float | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Any request: (status, headers with lower-case names, body). `body` is sent as JSON; bytes are sent as they are.

        Raises: Unavailable, TimedOut when no answer comes. An error status is not raised.
        """
        answer = self._run(lambda _: calls.plain(method, path, body), self.timeout_s if timeout_s is None else timeout_s)
        return answer.status, answer.headers, bytes(answer.body)

    # -- connections -----------------------------------------------------------------------------------------------------------

    def _run(self, conversation: Callable[[Link], Steps[T]], timeout_s: float) -> T:
        """Holds the conversation on one connection, or from its beginning on another one when the server ended that."""
        deadline = time.monotonic() + timeout_s
        again = True
        while True:
            connection, used = self._take(deadline, timeout_s)
            try:
                return self._converse(connection, conversation(connection.link), deadline, timeout_s)
            except _Closing:
                continue
            except wire.Ended as error:
                if not (used or again):  # the server may have been restarted: its next process, or a new connection, tells
                    raise Unavailable(f"the server at {self.socket_path} closed the connection: {error}") from error
                again = used
                self._drop_idle()

    def _converse(self, connection: _Connection, steps: Steps[T], deadline: float, timeout_s: float) -> T:
        """Raises: wire.Ended, _Closing when there is more to ask than this connection answers."""
        answer: Answer | None = None
        healthy = True
        try:
            message = next(steps)
            while True:
                if not healthy:
                    raise _Closing
                healthy = False
                answer = connection.exchange(message, deadline, timeout_s)
                healthy = answer.headers.get("connection", "") != "close"
                message = steps.send(answer)
        except StopIteration as ended:
            result: T = ended.value
            return result
        finally:
            if healthy and not self._closed:
                self._idle.append(connection)
            else:
                connection.close()

    def _take(self, deadline: float, timeout_s: float) -> tuple[_Connection, bool]:
        """A connection for this call alone, and whether it has been used before."""
        try:
            return self._idle.pop(), True
        except IndexError:
            return _Connection(self.socket_path, deadline, timeout_s), False

    def _drop_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


def new_sequence_id() -> int:
    """One that no other client has, most probably, and that is not 0: that means none."""
    return secrets.randbits(62) + 1


class StatefulSequence:
    """Requests that share a model's state. Belongs to one thread at a time."""

    def __init__(self, client: Client, model: str, version: str | None, timeout_s: float) -> None:
        self.id = new_sequence_id()
        self._client = client
        self._model = model
        self._version = version
        self._timeout_s = timeout_s
        self._last: Mapping[str, Array] | Array | None = None  # while it is open

    @property
    def is_open(self) -> bool:
        """Whether the server keeps its state: it was begun, and not ended."""
        return self._last is not None

    def infer(
        self, inputs: Mapping[str, Array] | Array, *, outputs: Sequence[str] | None = None, last: bool = False
    ) -> dict[str, Array]:
        """The next step. `last` says that it is the last one; the one after it would start anew.  Raises: as Client.infer."""
        said = calls.options(self._version, outputs, None, self._timeout_s, 0, "", (self.id, self._last is None, last))
        found = self._client._infer(self._model, inputs, said, self._timeout_s)  # noqa: SLF001 - of this module
        self._last = None if last else inputs
        return found

    def steps(self, inputs: Iterable[Mapping[str, Array] | Array]) -> Iterator[dict[str, Array]]:
        """The answers to all of `inputs`, the last of which ends the sequence."""
        before: list[Mapping[str, Array] | Array] = []
        for item in inputs:
            if before:
                yield self.infer(before.pop())
            before.append(item)
        if before:
            yield self.infer(before.pop(), last=True)

    def end(self) -> None:
        """Lets the server forget the state. The protocol ends a sequence with a request, so the last one is repeated for
        nothing.
        """
        if self._last is not None:
            with contextlib.suppress(ClientError):  # it forgets by itself after a while
                self.infer(self._last, last=True)
            self._last = None


class _Closing(Exception):
    """The server closes this connection after the answer; what is still to be asked needs another one."""


class _Connection:
    """One connection; used by one thread at a time."""

    def __init__(self, path: Path, deadline: float, timeout_s: float) -> None:
        self.link = Link()
        self._reader = AnswerReader()
        left_s = max(deadline - time.monotonic(), 1e-3)
        self._timeout_s = left_s
        try:
            self._sock = unix.connect(str(path), left_s)
        except TimeoutError as error:
            raise TimedOut(f"the server at {path} did not accept the connection within {timeout_s} s") from error
        except OSError as error:
            raise Unavailable(f"no server answers at {path}: {error.strerror}") from error

    def close(self) -> None:
        self._sock.close()

    def exchange(self, message: Message, deadline: float, timeout_s: float) -> Answer:
        """Raises: wire.Ended, TimedOut, Unavailable, ServerFailed."""
        try:
            self._set_timeout(deadline)
            broken = self._send(message)
        except TimeoutError as error:
            raise TimedOut(f"the server did not take the request within {timeout_s} s") from error
        try:
            return self._receive(deadline)
        except TimeoutError as error:
            raise TimedOut(f"no answer within {timeout_s} s") from error
        except wire.Ended as error:
            if error.started:
                raise Unavailable(str(error)) from error
            raise (wire.Ended(str(broken), started=False) if broken else error) from broken
        except wire.NotHttp as error:
            raise ServerFailed(str(error)) from error
        except OSError as error:
            raise wire.Ended(str(error), started=False) from error

    def _set_timeout(self, deadline: float) -> None:
        """Setting one takes as long as a short call, so a timeout that is nearly right stays: no call waits more than a quarter
        longer.
        """
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        if not 0.8 * left_s <= self._timeout_s <= 1.25 * left_s:
            self._sock.settimeout(left_s)
            self._timeout_s = left_s

    def _send(self, message: Message) -> OSError | None:
        """A server that refuses a request may answer and stop reading: its answer is still to be read."""
        parts = message.parts
        try:
            if message.descriptor is not None:
                rights = np.array([message.descriptor], np.intc).tobytes()
                sent = self._sock.sendmsg(parts, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            elif len(parts) == 1 or sum(map(len, parts)) <= JOIN_BYTES:
                self._sock.sendall(parts[0] if len(parts) == 1 else b"".join(parts))
                return None
            else:
                sent = self._sock.sendmsg(parts)
            for part in wire.unsent(parts, sent):
                self._sock.sendall(part)
        except TimeoutError:
            raise
        except OSError as error:
            return error
        return None

    def _receive(self, deadline: float) -> Answer:
        reader, answer = self._reader, None
        while answer is None:
            answer = reader.came(self._sock.recv_into(reader.room()))
            if answer is None:
                self._set_timeout(deadline)
        return answer
