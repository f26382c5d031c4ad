"""Keeps mosquitto running: starts it, forwards what it says, starts it again with growing delays when it dies."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

_log = logging.getLogger(__name__)

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.2, 30.0
LIVED_WELL_S = 30.0  # after this long the next failure starts with the shortest delay again
STOP_S = 5.0
KEPT_LINES = 20


class Supervisor:
    """Runs one broker between `run` and `stop`. Everything here belongs to the event loop that called `run`."""

    def __init__(self, executable: str, config: Path, folder: Path) -> None:
        self._executable, self._config, self._folder = executable, config, folder
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._again = asyncio.Event()
        self.restarts = 0
        self.reads: Callable[[str], bool] = lambda _line: False
        """Given each line that the broker says; whether it needs no logging."""
        self.last_lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    def memory_bytes(self) -> int:
        """How much memory the broker has; 0 when it does not run, or when this system does not tell."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def run(self) -> None:
        """Keeps the broker running until `stop`."""
        delay = BACKOFF_FIRST_S
        self._end_orphan()
        while not self._stopping:
            self._again.clear()
            began = time.monotonic()
            try:
                await self._run_once()
            except OSError as error:  # no memory, no descriptor, an executable that is being replaced: it may pass
                self.last_lines.append(f"it could not be started: {error}")
            if self._ended():
                break
            self.restarts += 1
            if self._again.is_set():
                delay = BACKOFF_FIRST_S
                continue
            if time.monotonic() - began > LIVED_WELL_S:
                delay = BACKOFF_FIRST_S
            _log.error("the broker ended; starting it again in %.1f s. Its last words: %s", delay, " | ".join(self.last_lines))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._again.wait(), delay)
            delay = min(delay * 2, BACKOFF_MAX_S)

    async def _run_once(self) -> None:
        command = [self._executable, "-c", str(self._config.relative_to(self._folder))]
        # mosquitto must not outlive a server that is killed: the kernel ends it then. Without setpriv the next start does.
        if setpriv := shutil.which("setpriv"):
            command = [setpriv, "--pdeathsig", "TERM", *command]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self._folder, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, start_new_session=True,
            env=_environment(),
        )  # fmt: skip
        self._process = process
        with contextlib.suppress(OSError):  # a full disk; it only helps to find a broker whose server was killed
            self._pid_file.write_text(str(process.pid))
        if self._stopping:
            self._terminate()
        assert process.stderr is not None
        while line := await _line(process.stderr):
            text = line.decode(errors="replace").rstrip().partition(": ")
            said = text[2] or text[0]
            if self.reads(said):
                continue
            self.last_lines.append(said)
            _log.log(logging.ERROR if said.startswith("Error") else logging.INFO, "%s", said)
        await process.wait()
        with contextlib.suppress(OSError):
            self._pid_file.unlink()

    def _ended(self) -> bool:
        return self._stopping

    def restart(self) -> None:
        """Ends the broker and starts it at once: it reads its revocation list again and everybody has to connect anew."""
        self._again.set()
        self._terminate()

    def reload(self) -> None:
        """Has the broker read its certificate and revocation list again; whoever is connected stays so."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGHUP)

    async def stop(self) -> None:
        """Ends the broker, and kills it when it does not end by itself."""
        self._stopping = True
        self._again.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def _terminate(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    @property
    def _pid_file(self) -> Path:
        return self._folder / "broker" / "mosquitto.pid"

    def _end_orphan(self) -> None:
        """Ends the broker that a killed server left behind; nobody else's process."""
        try:
            pid = int(self._pid_file.read_text())
            command = _command(pid)
            where = Path(f"/proc/{pid}/cwd").resolve()
        except (OSError, ValueError):
            return
        if b"mosquitto" not in command or where != self._folder.resolve():
            return
        _log.warning("ending the broker that an earlier server left behind (pid %d)", pid)
        deadline = time.monotonic() + STOP_S
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            while time.monotonic() < deadline and _command(pid):
                time.sleep(0.02)  # before anything else runs: nothing waits behind this
            if _command(pid):
                os.kill(pid, signal.SIGKILL)


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line; one that is too long is left out. Empty at the end."""
    while True:
        try:
            return await stream.readline()
        except ValueError:  # noqa: PERF203 - the reader has thrown the long line away
            continue


def _environment() -> dict[str, str]:
    """Our environment without what systemd told us: a mosquitto built for systemd would say in our name that everything is
    ready.
    """
    return {name: value for name, value in os.environ.items() if name not in {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}}


def _command(pid: int) -> bytes:
    """The process's command line; empty when it ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
