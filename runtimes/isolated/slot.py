"""A slot of an isolated model: memory that both processes map, and a channel, for one run at a time."""

from __future__ import annotations

import ctypes
import os
import socket
import weakref
from collections.abc import Callable, Mapping, Sequence

from runtimes.contract import Array, RunFailed
from runtimes.isolated import wire
from runtimes.isolated.process import Process


class Slot:
    """One run at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        memory = os.memfd_create("isolated", os.MFD_CLOEXEC)
        os.ftruncate(memory, wire.LEAST_BYTES)
        self._arena = wire.Arena(memory)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process.listen_on(self._channel)
        try:
            process.tell(wire.NewSlot(), [theirs.fileno(), memory])
        except RunFailed:
            self.close()
            raise
        finally:
            theirs.close()

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None, sequence: int, limit_s: float
    ) -> list[wire.Tensor]:
        """Where the outputs lie.  Raises: InputInvalid, RunFailed; after `limit_s`, and the process is ended."""
        arena = self._arena
        tensors = arena.put(feeds.items(), 0)
        order = wire.Run(arena.size_bytes, tensors, None if outputs is None else list(outputs), sequence)
        try:
            self._channel.settimeout(limit_s)
            self._channel.send(wire.encode(order))
            data = self._channel.recv(wire.MAX_MESSAGE_BYTES)
        except TimeoutError:
            self._process.kill(f"a run did not end within {limit_s:g} s")
            raise self._process.gone() from None
        except OSError as error:
            raise self._process.gone() from error
        if not data:
            raise self._process.gone()
        answer = wire.decode_ran.decode(data)
        if isinstance(answer, wire.Failed):
            raise wire.error_of(answer)
        arena.follow(answer.size_bytes)
        return answer.arrays

    def copies(self, tensors: Sequence[wire.Tensor]) -> list[Array]:
        return [wire.view(self._arena.map, tensor).copy() for tensor in tensors]

    def views(self, tensors: Sequence[wire.Tensor], done: Callable[[], object]) -> list[Array]:
        """The outputs where they lie; `done` is called when nobody has them any more."""
        holder = (ctypes.c_char * self._arena.size_bytes).from_buffer(self._arena.map)
        weakref.finalize(holder, done)
        return [wire.view(holder, tensor) for tensor in tensors]

    def close(self) -> None:
        if self._arena.fd >= 0:
            os.close(self._arena.fd)
            self._arena.fd = -1
            self._channel.close()
