"""The client for asyncio: the same conversations, on non-blocking connections of the running loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from agent.client import calls, wire
from agent.client.blocking import DEFAULT_SOCKET, DEFAULT_TIMEOUT_S, new_sequence_id
from agent.client.errors import ClientError, ServerFailed, TimedOut, Unavailable
from agent.client.inference import SHARE_FROM_BYTES, Inference, Link, Models, Options, Steps, get, model_path
from agent.client.memory import Arrays
from agent.client.tensors import Array
from agent.client.wire import Answer, AnswerReader, Message

MAX_CONNECTIONS = 16
AGAIN_S = 0.005  # between two tries while the server's queue of connections is full

T = TypeVar("T")


class AsyncClient:
    """As Client, for the tasks of one event loop. At most `max_connections` requests are under way; others wait for their turn.

    A task that is cancelled closes its connection: the server drops what waits, and a run that began ends for nobody.
    """

    def __init__(
        self,
        socket_path: str | Path = DEFAULT_SOCKET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        share_from_bytes: int | None = SHARE_FROM_BYTES,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.socket_path = Path(socket_path)
        self.timeout_s = timeout_s
        self._share_from = (1 << 62) if share_from_bytes is None else share_from_bytes
        self._turns = asyncio.Semaphore(max_connections)
        self._idle: list[_Connection] = []
        self._models = Models()
        self._arrays = Arrays()
        self._closed = False

    async def __aenter__(self) -> AsyncClient:  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the idle connections; one that is in use ends with its request."""
        self._closed = True
        self._drop_idle()

    async def infer(
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
        """As Client.infer. `timeout_s` includes the wait for a connection."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        said = calls.options(version, outputs, into, timeout_s, priority, request_id, None, signature)
        return await self._infer(model, inputs, said, timeout_s)

    async def infer_real(
        self,
        model: str,
        inputs: Mapping[str, Array] | Array,
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> dict[str, Array]:
        """As Client.infer_real."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        said = calls.options(version, outputs, None, timeout_s, priority, "", None)
        asked = calls.RealInference(model, inputs, said, self._models, self._arrays, self._share_from)
        return await self._run(asked.steps, timeout_s)

    async def _infer(
        self, model: str, inputs: Mapping[str, Array] | Array, said: Options, timeout_s: float
    ) -> dict[str, Array]:
        return await self._run(Inference(model, inputs, said, self._models, self._arrays, self._share_from).steps, timeout_s)

    @contextlib.asynccontextmanager
    async def sequence(
        self, model: str, *, version: int | str | None = None, timeout_s: float | None = None
    ) -> AsyncIterator[AsyncStatefulSequence]:
        """As Client.sequence, with `async with` and `await`."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        made = AsyncStatefulSequence(self, model, calls.label(version), timeout_s)
        try:
            yield made
        finally:
            await made.end()

    def array(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """As Client.array."""
        return self._arrays.make(shape, dtype)

    async def metadata(self, model: str, version: int | str | None = None) -> dict[str, Any]:
        """As Client.metadata."""
        found: dict[str, Any] = await self._run(lambda _: get(model_path(model, calls.label(version))), self.timeout_s)
        return found

    async def models(self) -> list[dict[str, Any]]:
        """As Client.models."""
        return await self._run(calls.models, self.timeout_s)

    async def ready(self, model: str | None = None, version: int | str | None = None) -> bool:
        """As Client.ready."""
        try:
            return (await self.request("GET", calls.ready_path(model, version)))[0] == 200
        except Unavailable:
            return False

    async def status(self) -> dict[str, Any]:
        """As Client.status."""
        found: dict[str, Any] = await self._run(lambda _: get("/control/v1/status"), self.timeout_s)
        return found

    async def request(
        self, method: str, path: str, body: object = None, *, timeout_s: float | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """As Client.request."""
        answer = await self._run(lambda _: calls.plain(method, path, body), self.timeout_s if timeout_s is None else timeout_s)
        return answer.status, answer.headers, bytes(answer.body)

    # -- connections -----------------------------------------------------------------------------------------------------------

    async def _run(self, conversation: Callable[[Link], Steps[T]], timeout_s: float) -> T:
        """Raises: TimedOut after `timeout_s`; else as the conversation."""
        running = asyncio.ensure_future(self._in_turn(conversation))
        try:
            done, _ = await asyncio.wait({running}, timeout=timeout_s)
        except asyncio.CancelledError:
            await _cancelled(running)
            raise
        if not done:
            await _cancelled(running)
            raise TimedOut(f"no answer within {timeout_s} s")
        return running.result()

    async def _in_turn(self, conversation: Callable[[Link], Steps[T]]) -> T:
        again = True
        async with self._turns:
            while True:
                connection, used = await self._take()
                try:
                    return await self._converse(connection, conversation(connection.link))
                except _Closing:
                    continue
                except wire.Ended as error:
                    if not (used or again):
                        raise Unavailable(f"the server at {self.socket_path} closed the connection: {error}") from error
                    again = used
                    self._drop_idle()

    async def _converse(self, connection: _Connection, steps: Steps[T]) -> T:
        """Raises: wire.Ended, _Closing when there is more to ask than this connection answers."""
        healthy = True
        try:
            message = next(steps)
            while True:
                if not healthy:
                    raise _Closing
                healthy = False
                answer = await connection.exchange(message)
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

    async def _take(self) -> tuple[_Connection, bool]:
        if self._idle:
            return self._idle.pop(), True
        return await _Connection.open(self.socket_path), False

    @property
    def idle_connections(self) -> int:
        """How many connections wait for the next request."""
        return len(self._idle)

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()


class AsyncStatefulSequence:
    """As StatefulSequence. Belongs to one task at a time."""

    def __init__(self, client: AsyncClient, model: str, version: str | None, timeout_s: float) -> None:
        self.id = new_sequence_id()
        self._client = client
        self._model = model
        self._version = version
        self._timeout_s = timeout_s
        self._last: Mapping[str, Array] | Array | None = None

    @property
    def is_open(self) -> bool:
        """Whether the server keeps its state: it was begun, and not ended."""
        return self._last is not None

    async def infer(
        self, inputs: Mapping[str, Array] | Array, *, outputs: Sequence[str] | None = None, last: bool = False
    ) -> dict[str, Array]:
        """As StatefulSequence.infer."""
        said = calls.options(self._version, outputs, None, self._timeout_s, 0, "", (self.id, self._last is None, last))
        found = await self._client._infer(self._model, inputs, said, self._timeout_s)  # noqa: SLF001 - of this module
        self._last = None if last else inputs
        return found

    async def end(self) -> None:
        """As StatefulSequence.end."""
        if self._last is not None:
            with contextlib.suppress(ClientError):
                await self.infer(self._last, last=True)
            self._last = None


class _Closing(Exception):
    """The server closes this connection after the answer; what is still to be asked needs another one."""


async def _cancelled(running: asyncio.Future[T]) -> None:
    running.cancel()
    await asyncio.wait({running})
    if not running.cancelled():
        running.exception()  # it was faster; nobody wants to know any more


class _Connection:
    """One connection; used by one task at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.link = Link()
        self._sock = sock
        self._reader = AnswerReader()

    @classmethod
    async def open(cls, path: Path) -> _Connection:
        """Raises: Unavailable. Waits while the server's queue of connections is full."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            while True:
                try:
                    sock.connect(str(path))
                except BlockingIOError:  # noqa: PERF203 - waiting is what this loop is for
                    await asyncio.sleep(AGAIN_S)
                else:
                    return cls(sock)
        except OSError as error:
            sock.close()
            raise Unavailable(f"no server answers at {path}: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        self._sock.close()

    async def exchange(self, message: Message) -> Answer:
        """Raises: wire.Ended, Unavailable, ServerFailed."""
        loop = asyncio.get_running_loop()
        broken: OSError | None = None
        try:
            await self._send(loop, message)
        except OSError as error:
            broken = error  # a server that refuses a request may answer and stop reading
        reader, answer = self._reader, None
        try:
            while answer is None:
                answer = reader.came(await loop.sock_recv_into(self._sock, reader.room()))
        except wire.Ended as error:
            if error.started:
                raise Unavailable(str(error)) from error
            raise (wire.Ended(str(broken), started=False) if broken else error) from broken
        except wire.NotHttp as error:
            raise ServerFailed(str(error)) from error
        except OSError as error:
            raise wire.Ended(str(error), started=False) from error
        return answer

    async def _send(self, loop: asyncio.AbstractEventLoop, message: Message) -> None:
        parts = message.parts
        ancillary = []
        if message.descriptor is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, np.array([message.descriptor], np.intc).tobytes())]
        while True:
            try:
                sent = self._sock.sendmsg(parts, ancillary)
            except BlockingIOError:  # noqa: PERF203 - as above
                await _writable(loop, self._sock)
            else:
                break
        for part in wire.unsent(parts, sent):
            await loop.sock_sendall(self._sock, part)


async def _writable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready = loop.create_future()
    loop.add_writer(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_writer(sock)
