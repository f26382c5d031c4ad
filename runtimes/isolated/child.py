"""The process of one isolated model: `python -m runtimes.isolated.child FD`, where FD is its end of the control socket.

It expects to die: its engine may take it down at any line, and the parent makes words of that. It ends when the control socket
does, and with its parent; the signals that stop a whole service are not for it, because its parent still answers what was
asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from runtimes.isolated import wire

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWNET = 0x40000000
OOM_SCORE = 300  # when memory runs out it goes before the server, which goes on with the other models
MAX_FILES = 512


def main() -> int:
    prepare_process()
    control = socket.socket(fileno=int(sys.argv[1]))
    child = Child(control)
    try:
        child.serve()
    finally:
        os._exit(0)  # threads inside an engine are not waited for


def prepare_process() -> None:
    """Best effort each: under systemd the unit does most of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.unshare(_CLONE_NEWNET)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # engines that print


class Child:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._model: Any = None
        self._sequences: dict[int, Any] = {}
        self._beginning = threading.Lock()

    def serve(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._control, wire.MAX_MESSAGE_BYTES, 2)
            if not data:
                return
            order = wire.decode_order.decode(data)
            if isinstance(order, wire.Load):
                self._control.send(wire.encode(self._load(order)))
            elif isinstance(order, wire.NewSlot):
                threading.Thread(target=self._serve_slot, args=descriptors, daemon=True).start()
            else:
                self._change_sequence(order)

    def _load(self, order: wire.Load) -> wire.Loaded | wire.Failed:
        from runtimes import registry
        from runtimes.contract import is_stateful, signatures_of

        try:
            runtime = registry.find(order.runtime)
            model = self._model = runtime.load(Path(order.path), _options(order))
            found = wire.Loaded(
                tuple(wire.Spec.of(spec) for spec in model.inputs),
                tuple(wire.Spec.of(spec) for spec in model.outputs),
                model.placement.requested,
                model.placement.actual,
                model.placement.fallback,
                is_stateful(model),
                tuple(wire.Signed.of(signature) for signature in signatures_of(model)),
            )
            if len(wire.encode(found)) > wire.MAX_MESSAGE_BYTES:  # of thousands of weights that may be given as inputs
                found.inputs = tuple(spec for spec in found.inputs if not spec.optional)
            return found
        except Exception as error:  # noqa: BLE001 - the parent raises it
            return _failed(error)

    def _change_sequence(self, order: wire.Sequence_) -> None:
        if order.opens:
            with contextlib.suppress(Exception):  # the run that names it says so
                self._sequence(order.number)
        else:
            sequence = self._sequences.pop(order.number, None)
            if sequence is not None:
                sequence.close()

    def _sequence(self, number: int) -> Any:
        """Begun by whichever is heard first, the order to or its first run: they come over different sockets."""
        with self._beginning:
            if number not in self._sequences:
                self._sequences[number] = self._model.sequence()
            return self._sequences[number]

    def _serve_slot(self, channel_fd: int, memory_fd: int) -> None:
        channel, arena = socket.socket(fileno=channel_fd), wire.Arena(memory_fd)
        with channel:
            while data := channel.recv(wire.MAX_MESSAGE_BYTES):
                channel.send(wire.encode(self._run(wire.decode_run.decode(data), arena)))
        os.close(memory_fd)

    def _run(self, order: wire.Run, arena: wire.Arena) -> wire.Ran | wire.Failed:
        try:
            arena.follow(order.size_bytes)
            feeds = {tensor.name: wire.view(arena.map, tensor) for tensor in order.feeds}
            target = self._sequence(order.sequence) if order.sequence else self._model
            names = order.outputs or [spec.name for spec in self._model.outputs]
            arrays = target.run(feeds, order.outputs)
            tensors = arena.put(zip(names, arrays, strict=True), wire.end_of(order.feeds))
            return wire.Ran(arena.size_bytes, tensors)
        except Exception as error:  # noqa: BLE001 - the parent raises it
            return _failed(error)


def _options(order: wire.Load) -> Any:
    from runtimes.contract import LoadOptions

    data = None if order.data is None else {name: Path(file) for name, file in order.data.items()}
    return LoadOptions(order.threads, order.extra, data, tuple(map(Path, order.libraries)))


def _failed(error: Exception) -> wire.Failed:
    return wire.Failed(type(error).__name__, str(error)[:4000])


if __name__ == "__main__":
    sys.exit(main())
