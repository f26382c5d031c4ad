"""The process of an isolated model: starts it, gives it orders, and hears when it ends.

The rules:
- A thread starts the process and waits for it, for as long as it lives: the kernel ends a child with the thread that made it.
- A process that ends by itself fails the runs in it, and those that come after, whoever else has its ends of the connections
  (an engine's own children, which stay behind); `on_death` is told once, with words.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from runtimes.contract import ModelInvalid, RunFailed, RuntimeUnavailable
from runtimes.isolated import wire

END_S = 5.0  # how long a process that is told to end may take
NOT_ITS_OWN = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)
"""What systemd says to the server in its environment."""

TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}

Died = Callable[[str], None]


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
        self.ends: deque[int] = deque()  # of sequences, which it has not been told
        started = threading.Event()
        self._waiter = threading.Thread(target=self._start_and_wait, args=(theirs, started), name="isolated", daemon=True)
        self._waiter.start()
        started.wait()
        theirs.close()
        for trouble in self._troubles:
            self._control.close()
            raise RuntimeUnavailable(f"a process for the model cannot be started: {trouble}")

    def _start_and_wait(self, theirs: socket.socket, started: threading.Event) -> None:
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
            raise wire.error_of(found)
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
        self.ends.append(number)
        if self._sending.acquire(blocking=False):
            try:
                self._tell_ends(socket.MSG_DONTWAIT)
            except OSError:
                pass  # it is told before the next order, or is gone
            finally:
                self._sending.release()

    def _tell_ends(self, flags: int = 0) -> None:
        """With `_sending` held.  Raises: OSError."""
        while self.ends:
            self._control.send(wire.encode(wire.Sequence_(self.ends[0], opens=False)), flags)
            self.ends.popleft()

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
        if threading.current_thread() is not self._waiter:
            self._waiter.join()


def _hang_up(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
