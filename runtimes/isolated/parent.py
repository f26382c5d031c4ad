"""The parent's side of an isolated model: starts its process, gives it runs, and hears when it ends.

The rules:
- A thread starts the process and waits for it, for as long as it lives: the kernel ends a child with the thread that made it.
- Each run has a slot of its own while it goes on; slots are made as they are needed, `slots` at most.
- A process that ends by itself fails the runs in it, and those that come after, whoever else has its ends of the connections (an engine's
  own children, which stay behind); `on_death` is told once, with words.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from runtimes import contract
from runtimes.contract import (
    Array,
    InputInvalid,
    LoadOptions,
    ModelInvalid,
    Placement,
    RunFailed,
    RuntimeUnavailable,
    Signature,
    TensorSpec,
)
from runtimes.isolated import wire

MAX_SLOTS = 16
COPY_BYTES = 32 * 1024  # outputs up to this size are copied out of the slot, which is then free at once
END_S = 5.0  # how long a process that is told to end may take
RUN_LIMIT_S = 60.0
LOAD_LIMIT_S = 600.0  # engines that optimise for the hardware take minutes; whoever waits for one that hangs waits no longer
NOT_ITS_OWN = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)  # systemd's to the server
TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}

Died = Callable[[str], None]


def load(runtime: str, path: Path, options: LoadOptions, *, slots: int = 0, limit_s: float = LOAD_LIMIT_S) -> IsolatedModel:
    """Loads it in a process of its own; `slots` runs may go on at once there (0: as many as there are threads, to a limit).

    Raises: as `Runtime.load`; ModelInvalid when the process dies of it or is not done in time, MemoryError when the kernel killed it.
    """
    process = Process()
    try:
        data = None if options.data is None else {name: str(file) for name, file in options.data.items()}
        libraries = tuple(map(str, options.libraries))
        found = process.load(wire.Load(runtime, str(path), options.threads, dict(options.extra), data, libraries), limit_s)
        return IsolatedModel(process, found, slots or MAX_SLOTS)
    except BaseException:
        process.end(patience_s=0)
        raise


class Process:
    """A child and the control socket to it."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.on_death: Died = lambda _: None
        self.pid = 0
        self._ended = threading.Event()
        self._told = threading.Event()  # whoever wanted to know of that knows
        self._lines: weakref.WeakSet[socket.socket] = weakref.WeakSet([self._control])
        self._lining = threading.Lock()
        self._is_ending = False
        self._code = 0
        self._why = ""
        self._troubles: list[OSError] = []
        self._sending = threading.Lock()
        self._ends: deque[int] = deque()  # of sequences, which it has not been told
        started = threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(theirs, started), name="isolated", daemon=True)
        self._watcher.start()
        started.wait()
        theirs.close()
        for trouble in self._troubles:
            self._control.close()
            raise RuntimeUnavailable(f"a process for the model cannot be started: {trouble}")

    def _watch(self, theirs: socket.socket, started: threading.Event) -> None:
        try:
            child = subprocess.Popen(  # noqa: S603 - this package's own module
                [sys.executable, "-m", "runtimes.isolated.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**{name: value for name, value in os.environ.items() if name not in NOT_ITS_OWN}, **TELEMETRY},
                start_new_session=True,
            )
        except OSError as error:
            self._troubles.append(error)
            started.set()
            return
        self.pid = child.pid
        started.set()
        self._code = child.wait()
        self._ended.set()
        with self._lining:
            for line in self._lines:
                _hang_up(line)
        try:
            if not self._is_ending:
                self.on_death(self.ending)
        finally:
            self._told.set()

    def listen_on(self, line: socket.socket) -> None:
        """From now on who waits at `line` hears when the process ends."""
        with self._lining:
            self._lines.add(line)
            if self._ended.is_set():
                _hang_up(line)

    def load(self, order: wire.Load, limit_s: float) -> wire.Loaded:
        with contextlib.suppress(OSError):
            self._control.send(wire.encode(order))
        self._control.settimeout(limit_s)
        try:
            data = self._control.recv(wire.MAX_MESSAGE_BYTES)
        except TimeoutError:
            raise ModelInvalid(f"loading it was not done in {limit_s:.0f} s") from None
        except OSError:
            data = b""
        self._control.settimeout(None)
        if not data:
            self._ended.wait(END_S)
            if self._code == -signal.SIGKILL:
                raise MemoryError(f"loading it ended its process ({self.ending}): most likely memory ran out")
            raise ModelInvalid(f"loading it ended its process ({self.ending})")
        found = wire.decode_loaded.decode(data)
        if isinstance(found, wire.Failed):
            raise _error(found)
        return found

    def tell(self, order: wire.NewSlot | wire.Sequence_, descriptors: Sequence[int] = ()) -> None:
        """Raises: RunFailed when it is gone."""
        try:
            with self._sending:
                self._tell_ends()
                socket.send_fds(self._control, [wire.encode(order)], descriptors)
        except OSError as error:
            raise self.gone() from error

    def end_sequence(self, number: int) -> None:
        """Never waits, for whoever calls may hold locks: a process that does not listen now hears of it later."""
        self._ends.append(number)
        if self._sending.acquire(blocking=False):
            try:
                self._tell_ends(socket.MSG_DONTWAIT)
            except OSError:
                pass  # it is told before the next order, or is gone
            finally:
                self._sending.release()

    def _tell_ends(self, flags: int = 0) -> None:
        """With `_sending` held.  Raises: OSError."""
        while self._ends:
            self._control.send(wire.encode(wire.Sequence_(self._ends[0], opens=False)), flags)
            self._ends.popleft()

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        if self._why:
            return self._why
        if self._code >= 0:
            return f"exit status {self._code}"
        try:
            return signal.Signals(-self._code).name
        except ValueError:
            return f"signal {-self._code}"

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def gone(self) -> RunFailed:
        """Once whoever listens knows, so that nobody who hears of it and asks again meets the process that ended."""
        self._told.wait(END_S)  # its sockets close a moment before it can be waited for
        return RunFailed(f"the model's process has ended ({self.ending})")

    def kill(self, why: str = "") -> None:
        """Ends it at once, and as a crash would: whoever listens is told. `why` is said as its ending."""
        if self._ended.is_set():
            return
        self._why = why
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._ended.wait(END_S)

    def end(self, patience_s: float = END_S) -> None:
        self._is_ending = True
        self._control.close()
        if not self._ended.wait(patience_s):
            self.kill()
        if threading.current_thread() is not self._watcher:
            self._watcher.join()


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
            raise _error(answer)
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


class IsolatedModel:
    """A model in a process of its own."""

    def __init__(self, process: Process, loaded: wire.Loaded, slots: int) -> None:
        self._process = process
        self._inputs = tuple(spec.spec() for spec in loaded.inputs)
        self._outputs = tuple(spec.spec() for spec in loaded.outputs)
        self._placement = Placement(loaded.requested, loaded.actual, loaded.fallback)
        self._stateful = loaded.stateful
        self._signatures = tuple(signed.signature() for signed in loaded.signatures)
        self._idle: list[Slot] = []
        self._all: list[Slot] = []
        self._most = slots
        self._free = threading.Condition()
        self._numbers = itertools.count(1)
        self.run_limit_s = RUN_LIMIT_S
        """How long a run may take; then it fails, and with it its process and whatever else runs there."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def stateful(self) -> bool:
        return self._stateful

    @property
    def signatures(self) -> tuple[Signature, ...]:
        return self._signatures

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive

    @property
    def ending(self) -> str:
        """How its process ended, in words."""
        return self._process.ending

    @property
    def memory_bytes(self) -> int:
        """What of its process is in memory now; 0 when it is gone."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, IndexError):
            return 0

    def on_death(self, died: Died) -> None:
        """Calls `died`, in a thread of this module, once the process ends by itself; at once when it has."""
        self._process.on_death = died
        if not self._process.is_alive:
            died(self._process.ending)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        return self.run_in(0, feeds, outputs)

    def run_in(self, sequence: int, feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        slot, spare = self._take()
        try:
            tensors = slot.run(feeds, outputs, sequence, self.run_limit_s)
            if spare and sum(tensor.size for tensor in tensors) > COPY_BYTES:
                kept, slot_of_views = slot, weakref.ref(self)
                slot = None  # type: ignore[assignment]
                return kept.views(tensors, lambda: _give_back(slot_of_views, kept))
            return slot.copies(tensors)
        finally:
            if slot is not None:
                self._give_back(slot)

    def sequence(self) -> IsolatedSequence:
        number = next(self._numbers)
        self._process.tell(wire.Sequence_(number, opens=True))
        return IsolatedSequence(self, number)

    def end_sequence(self, number: int) -> None:
        self._process.end_sequence(number)

    def close(self) -> None:
        self._process.end()
        self._process.on_death = lambda _: None  # whoever wanted to know may know this model
        with self._free:
            for slot in self._all:
                slot.close()
            self._idle.clear()
            self._all.clear()

    def _take(self) -> tuple[Slot, bool]:
        """A slot, and whether there are others for whoever comes next."""
        with self._free:
            while not self._idle and len(self._all) >= self._most:
                self._free.wait()
            if not self._process.is_alive:
                self._free.notify_all()  # nor will anybody else who waits have a run
                raise self._process.gone()
            if not self._idle:
                slot = Slot(self._process)
                self._all.append(slot)
            else:
                slot = self._idle.pop()
            return slot, bool(self._idle) or len(self._all) < self._most

    def _give_back(self, slot: Slot) -> None:
        with self._free:
            self._idle.append(slot)
            self._free.notify()


def _hang_up(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _give_back(model: weakref.ref[IsolatedModel], slot: Slot) -> None:
    found = model()
    if found is not None:
        found._give_back(slot)  # noqa: SLF001 - the two are one thing


class IsolatedSequence:
    """State that lives in the process."""

    def __init__(self, model: IsolatedModel, number: int) -> None:
        self._model = model
        self._number = number

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        return self._model.run_in(self._number, feeds, outputs)

    def close(self) -> None:
        self._model.end_sequence(self._number)


def _error(failed: wire.Failed) -> Exception:
    """The exception that the child had, of the contract where it is one."""
    if failed.kind == "MemoryError":
        return MemoryError(failed.text)
    kind = getattr(contract, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, contract.RuntimeFailure):
        return kind(failed.text)
    return RunFailed(f"{failed.kind}: {failed.text}")


__all__ = ["InputInvalid", "IsolatedModel", "load"]
