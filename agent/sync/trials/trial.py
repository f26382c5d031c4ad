"""The parent's side of a trial: starts the throw-away process, listens, stops it in time, and makes a reason of however it
ended.

Where `trial_socket` exists, systemd starts the process (`edge-agent-trial@.service`, its own memory limit, no network);
elsewhere it is a child of ours in its own session, killed whole at the time limit.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from agent.common import files
from agent.contract.codec import encode
from agent.contract.manifest import ReleaseManifest, Variant
from agent.contract.reasons import Reason
from agent.host import priority
from agent.store import Store
from agent.sync.ports import Clock, Stop
from agent.sync.problems import Problem, Stopped
from agent.sync.trials.protocol import MAX_REPLY_BYTES, Case, Limits, Progress, Request, Verdict, parse_line
from agent.sync.trials.queue import TrialQueue
from agent.sync.trials.supervision import Supervisor, remove_tree

TICK_S = 0.2
"""How often a running trial asks whether it should stop."""

ENDINGS = frozenset({-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP})
ENDING_S = 1.0
"""Who ends us in order may end our children at the same moment (systemd a whole service, a shutdown everybody), and they hear
it first."""

SCRATCH_BYTES = 1 << 30
"""Room for an engine's cache."""

STDERR_TAIL_BYTES = 2000
_MEMORY_WORDS = (b"bad_alloc", b"MemoryError", b"out of memory", b"Cannot allocate memory", b"cannot allocate")

Evidence = dict[str, float | str]


class Trials(Protocol):
    """Tries a release in a process that may die."""

    def run(self, request: Request, timeout_s: float, stop: Stop, begins: Callable[[], None]) -> Evidence:
        """The numbers of a release that passed. `begins` is called when its turn has come, before anything of it runs.

        Raises: Problem with the reason it did not; Stopped; what `begins` raises, and then nothing of it ran.
        """


def make_request(
    store: Store, manifest: ReleaseManifest, variant: Variant, *, memory_bytes: int, timeout_s: float, threads: int
) -> Request:
    """What the trial of this release's variant has to do."""
    acceptance = manifest.acceptance
    return Request(
        release=str(manifest.ref),
        runtime=variant.runtime,
        model=str(store.file(manifest, variant.file).absolute()),
        data={location: str(path.absolute()) for location, path in store.data_of(manifest, variant).items()},
        libraries=tuple(str(path.absolute()) for path in store.libraries_of(manifest, variant)),
        options=variant.options,
        serving=variant.serving,
        state=variant.state,
        picture=variant.picture,
        threads=threads,
        priority=acceptance.priority,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        cases=tuple(
            Case(
                name=golden.name,
                inputs=str(store.file(manifest, golden.inputs).absolute()),
                expected=str(store.file(manifest, golden.expected).absolute()),
                compare=golden.compare,
                signature=golden.signature,
            )
            for golden in acceptance.golden
        ),
        limits=Limits(
            memory_bytes=memory_bytes,
            cpu_s=max(1, int(timeout_s * (os.cpu_count() or 1))),
            wall_s=timeout_s,
            max_p95_ms=acceptance.max_p95_ms,
            max_memory_bytes=acceptance.max_memory_bytes,
        ),
    )


class TrialProcesses:
    """Trials on this machine, in turns: those of a smaller priority number first, and several at once only where they cannot
    disturb each other.
    """

    def __init__(
        self,
        clock: Clock,
        socket_path: Path,
        queue: TrialQueue | None = None,
        *,
        scratch: Path | None = None,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        """Children of ours write in folders below `scratch` (None: the system's), `scratch_bytes` each, which go with them."""
        self._clock = clock
        self._socket_path = socket_path
        self._scratch = scratch
        self._scratch_bytes = scratch_bytes
        if scratch is not None:
            remove_tree(scratch)  # of trials that a power cut ended
        self._queue = queue or TrialQueue()

    def run(self, request: Request, timeout_s: float, stop: Stop, begins: Callable[[], None] = lambda: None) -> Evidence:
        with self._queue.turn(request.priority, request.limits.memory_bytes, request.threads, stop):
            begins()
            return self._run(request, timeout_s, stop)

    def _run(self, request: Request, timeout_s: float, stop: Stop) -> Evidence:
        conversation = _Conversation(self._clock, timeout_s, stop)
        channel = self._connect()
        if channel is not None:
            with channel:
                return self._over_socket(channel, request, conversation)
        return self._as_child(request, conversation)

    def _connect(self) -> socket.socket | None:
        """A connection that systemd answers with a fresh process; None where no such socket is."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            channel.connect(str(self._socket_path))
        except (FileNotFoundError, ConnectionRefusedError):
            channel.close()
            return None
        except OSError as error:
            channel.close()
            raise Problem(
                Reason.STORE_FAILED, f"the trial socket {self._socket_path} cannot be used: {error.strerror}"
            ) from error
        return channel

    def _over_socket(self, channel: socket.socket, request: Request, conversation: _Conversation) -> Evidence:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died at once; the missing verdict will say so
            channel.sendall(encode(request) + b"\n")
            channel.shutdown(socket.SHUT_WR)
        conversation.listen(channel.fileno(), None)
        return conversation.result("its unit's log has more (journalctl -u 'edge-agent-trial@*')", None)

    def _as_child(self, request: Request, conversation: _Conversation) -> Evidence:
        if self._scratch is not None:
            files.make_directory(self._scratch, mode=0o700)
        scratch = Path(tempfile.mkdtemp(prefix="trial-", dir=self._scratch))
        try:
            return self._in_folder(scratch, request, conversation)
        finally:
            remove_tree(scratch)

    def _in_folder(self, scratch: Path, request: Request, conversation: _Conversation) -> Evidence:
        own = dict.fromkeys(("TMPDIR", "HOME", "XDG_CACHE_HOME"), str(scratch))
        telemetry = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}
        environment = {**os.environ, **telemetry, **own, "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(
            [sys.executable, "-m", "agent.sync.trials.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )
        assert child.stdin
        assert child.stdout
        assert child.stderr
        priority.lower_process(child.pid)  # as the unit does: what it competes with answers requests
        supervisor = Supervisor(child.pid, scratch, self._scratch_bytes)
        conversation.check, conversation.gone = supervisor.check, supervisor.gone
        with child:
            try:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(encode(request) + b"\n")
                    child.stdin.close()
                conversation.listen(child.stdout.fileno(), child.stderr.fileno())
                if conversation.problem is None and (conversation.timed_out or conversation.verdict is None):
                    conversation.wait(child)
            finally:
                supervisor.end(child)
        return conversation.result("", child.returncode)


class _Conversation:
    """Everything the process said, and when to stop listening."""

    def __init__(self, clock: Clock, timeout_s: float, stop: Stop) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._end = clock.monotonic() + timeout_s
        self._stop = stop
        self._said = 0
        self._buffer = b""
        self._stderr = b""
        self.step = "starting"
        self.verdict: Verdict | None = None
        self.timed_out = False
        self.garbage: str | None = None
        self.gone: Callable[[], bool] = lambda: False
        self.check: Callable[[], Problem | None] = lambda: None
        self.problem: Problem | None = None

    def listen(self, out: int, err: int | None) -> None:
        """Reads until the verdict, the end of the output, garbage, or the time limit.  Raises: Stopped."""
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            if err is not None:
                selector.register(err, selectors.EVENT_READ)
            while not self._finished():
                gone = self.gone()  # what it started may hold its end of the pipe
                ready = selector.select(0.0 if gone else TICK_S)
                if gone and not ready:
                    return
                for key, _ in ready:
                    data = _read(key.fd)
                    if key.fd == err:
                        self._stderr = (self._stderr + data)[-STDERR_TAIL_BYTES:]
                    else:
                        self._take(data)
                    if not data:
                        selector.unregister(key.fd)
                        if key.fd == out:
                            return

    def _finished(self) -> bool:
        if self._stop():
            raise Stopped
        self.timed_out = self._clock.monotonic() >= self._end
        self.problem = self.check()
        return self.problem is not None or self.timed_out or self.verdict is not None or self.garbage is not None

    def _take(self, data: bytes) -> None:
        self._said += len(data)
        if self._said > MAX_REPLY_BYTES:
            self.garbage = f"it sent more than {MAX_REPLY_BYTES} bytes"
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for text in lines:
            try:
                line = parse_line(text)
            except ValueError:
                self.garbage = f"it sent {text[:80]!r} instead of a verdict"
                return
            if isinstance(line, Progress):
                self.step = line.step
            else:
                self.verdict = line

    def wait(self, child: subprocess.Popen[bytes]) -> None:
        """Lets a child that closed its output end by itself, so that how it ended is known."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.0 if self.timed_out else 2.0)
        if child.stderr:
            os.set_blocking(child.stderr.fileno(), False)
            with contextlib.suppress(BlockingIOError):
                while data := _read(child.stderr.fileno()):
                    self._stderr = (self._stderr + data)[-STDERR_TAIL_BYTES:]

    def result(self, hint: str, returncode: int | None) -> Evidence:
        """The verdict as a value or a Problem."""
        if self.problem is not None:
            raise self.problem
        if self.verdict is not None and self.garbage is None:
            if self.verdict.reason is None:
                return dict(self.verdict.evidence)
            raise Problem(self.verdict.reason, self.verdict.message, self.verdict.evidence)
        if self.garbage is not None:
            raise Problem(Reason.TRIAL_CRASHED, f"the trial spoke nonsense while {self.step}: {self.garbage}")
        if self.timed_out:
            raise Problem(
                Reason.TRIAL_TIMED_OUT,
                f"the trial was still {self.step} after {self._timeout_s:g} s, the time it may take; "
                "a release that needs longer says so (acceptance: {max_trial_s: SECONDS})",
            )
        if returncode in ENDINGS:
            self._stop_with_us()
        raise self._death(hint, returncode)

    def _stop_with_us(self) -> None:
        """Raises: Stopped when we are to stop too: then the trial was ended with us, and nothing is known about the release."""
        for _ in range(int(ENDING_S / TICK_S)):
            if self._stop():
                raise Stopped
            select.select([], [], [], TICK_S)

    def _death(self, hint: str, returncode: int | None) -> Problem:
        where = f"while {self.step}"
        last = self._stderr.decode(errors="replace").strip().splitlines()
        tail = hint or (last[-1][:300] if last else "it said nothing")
        evidence: Evidence = {"step": self.step}
        if returncode is not None and returncode < 0:
            name = _signal_name(-returncode)
            evidence["signal"] = name
            if returncode == -signal.SIGKILL:
                return Problem(
                    Reason.TOO_MUCH_MEMORY,
                    f"the trial was killed by SIGKILL {where}: most likely the kernel ran out of memory",
                    evidence,
                )
            if returncode == -signal.SIGALRM:
                return Problem(Reason.TRIAL_TIMED_OUT, f"the trial was ended by its own clock {where}", evidence)
            if returncode == -signal.SIGXCPU:
                return Problem(Reason.TRIAL_TIMED_OUT, f"the trial used up its processor time {where}", evidence)
            if any(word in self._stderr for word in _MEMORY_WORDS):
                return Problem(
                    Reason.TOO_MUCH_MEMORY, f"the trial ran out of the memory it may take {where} ({name}): {tail}", evidence
                )
            return Problem(Reason.TRIAL_CRASHED, f"the trial was killed by {name} {where}: {tail}", evidence)
        if any(word in self._stderr for word in _MEMORY_WORDS):
            return Problem(Reason.TOO_MUCH_MEMORY, f"the trial ran out of the memory it may take {where}: {tail}", evidence)
        status = "without a verdict" if returncode in (None, 0) else f"with exit status {returncode}"
        return Problem(Reason.TRIAL_CRASHED, f"the trial ended {status} {where}: {tail}", evidence)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except ConnectionResetError:
        return b""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
