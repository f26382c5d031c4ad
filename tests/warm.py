"""Commands of the product in processes of their own that need not import it first: they are forked from one that has.

Half of what the fleet server's tests took was the importing of FastAPI, SQLAlchemy and TUF, a second for each server and each command.
What is started here is a process like any other, with its own arguments, environment, files and signals; only its `/proc/…/cmdline`
is that of the process it was forked from, and its parent is that process. What a test asks of the interpreter's own start (options,
`PYTHON…`, `LD_PRELOAD`, a command line to be seen) needs `subprocess`.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

LOADED = (
    "fleet_server.running",
    "fleet_server.processes.api",
    "fleet_server.processes.decide",
    "fleet_server.setup",
    "fleet_server.cli",
    "agent.cli",
    "agent.sync.app",
)
"""What the process has imported. No inference engine: they start threads, which a fork does not take along."""

MAX_BYTES = 1024 * 1024
"""Of one request: arguments and environment."""


class Process:
    """`python -m MODULE ARGUMENTS…`, as far as tests use `subprocess.Popen`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: IO | None = None,
        stdout: IO | None = None,
        stderr: IO | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_BYTES)
        self._link.connect(_forker())
        request = {"module": module, "arguments": list(arguments), "env": dict(env), "cwd": str(Path.cwd())}
        with Path(os.devnull).open("r+") as nowhere:
            files = array.array("i", [(given or nowhere).fileno() for given in (stdin, stdout, stderr)])
            self._link.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        self.pid = int(self._link.recv(64))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal.  Raises: subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._link.settimeout(timeout)
            try:
                self.returncode = int(self._link.recv(64))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
            self._link.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    module: str, arguments: Sequence[str], *, env: Mapping[str, str], stdin: str = "", timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE ARGUMENTS…` to its end.  Raises: subprocess.TimeoutExpired, and then it was killed."""
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        given.write(stdin)
        given.seek(0)
        process = Process(module, arguments, env=env, stdin=given, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([module, *arguments], code, out.read(), err.read())


@functools.cache
def _forker() -> str:
    """The address of this test process's own forker, which goes when this process does."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = f"{folder.name}/s"
    ours, its = socket.socketpair()
    with its:
        child = subprocess.Popen([sys.executable, "-m", "tests.warm", address], stdin=its, cwd=Path(__file__).parents[1])
    assert ours.recv(1) == b"!", "the process that is to fork others did not start"
    # In this order at the end: it sees that nobody needs it any more, ends, and its folder goes.
    atexit.register(folder.cleanup)
    atexit.register(child.wait)
    atexit.register(ours.close)
    return address


# -- the process that forks ------------------------------------------------------------------------------------------------


class _Asked(Exception):
    """In the new process: what it is to become, from here out through every frame of the one that forked it."""

    def __init__(self, request: dict, files: Sequence[int]) -> None:
        self.request = request
        self.files = files


def _serve(address: str) -> None:
    """Forks whatever is asked for, and tells how it ended, until standard input ends.  Raises: _Asked, in the new process."""
    for name in LOADED:
        importlib.import_module(name)
    gc.freeze()  # a collection in the new processes would copy every page
    wake, wakes = socket.socketpair()
    for end in (wake, wakes):
        end.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this one
    links: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, selectors.DefaultSelector() as waits:
        listener.bind(address)
        listener.listen()
        os.write(0, b"!")
        for file in (0, wake, listener):
            waits.register(file, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in waits.select()}
            if 0 in ready:
                return
            if wake.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    wake.recv(4096)
                _tell(links)
            if listener.fileno() in ready:
                link, _ = listener.accept()
                request, files = _received(link)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    for file in (wake, wakes, link, *links.values()):
                        file.close()
                    raise _Asked(request, files)
                for file in files:
                    os.close(file)
                links[pid] = link
                link.send(str(pid).encode())
                _tell(links)


def _received(link: socket.socket) -> tuple[dict, list[int]]:
    data, extra, _, _ = link.recvmsg(MAX_BYTES, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    files = array.array("i")
    files.frombytes(extra[0][2])
    return json.loads(data), list(files)


def _tell(links: dict[int, socket.socket]) -> None:
    """Tells whoever asked for them how processes ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with links.pop(ended[0]) as link, contextlib.suppress(OSError):
                link.send(str(os.waitstatus_to_exitcode(ended[1])).encode())


def _become(asked: _Asked) -> None:
    for number, file in enumerate(asked.files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked.request["cwd"])
    os.environ.clear()
    os.environ.update(asked.request["env"])
    time.tzset()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - these three are for good
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [asked.request["module"], *asked.request["arguments"]]
    code: object = 0
    try:
        runpy.run_module(asked.request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - threads that are to end by themselves
    _end(code)


def _end(code: object) -> None:
    """As the interpreter ends, but for the taking apart of everything that was imported: that takes longer than most commands."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()  # type: ignore[attr-defined]  # noqa: SLF001
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    try:
        _serve(sys.argv[1])
    except _Asked as asked:
        wanted = asked
    else:
        sys.exit()
    _become(wanted)
