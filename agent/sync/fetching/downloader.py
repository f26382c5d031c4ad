"""Brings the files of a release into the store: what is here already is copied, what is not is asked for, nothing is believed
unhashed.

A file with blocks is put together from whatever has them: other releases in the store, what an earlier attempt staged, and one
source after the other for what is still missing. A file without is fetched from its beginning, or from where it stopped.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from agent.contract.manifest import File
from agent.contract.reasons import Reason
from agent.host.priority import in_background, rest
from agent.store import Store
from agent.sync.fetching import pieces, reuse
from agent.sync.fetching.budget import Budget
from agent.sync.fetching.pieces import Run
from agent.sync.fetching.sources import TRIES_ON_WRONG_BYTES, NotHere, Reader, Source, Sources, WrongBytes, verdict
from agent.sync.fetching.speed import MinimumSpeed
from agent.sync.fetching.staged import BLOCKS_SUFFIX, Staged, allocated_bytes, staging
from agent.sync.ports import Clock, Stop
from agent.sync.problems import Problem, Stopped, store_problem

ASK_EVERY_S = 0.05
ASK_EVERY_BYTES = 1 << 20
"""How often a download asks whether to give up: whoever answers may have to read a file."""

Progress = Callable[[int], None]
"""Called with the bytes that are there so far."""


class Downloader:
    """One for all models; each calls from its own thread."""

    def __init__(
        self,
        store: Store,
        sources: Sources | Sequence[Source],
        clock: Clock,
        *,
        reserve_bytes: int,
        min_bytes_per_s: int,
        quota_bytes: int = 0,
        budget: Budget | None = None,
    ) -> None:
        self._store = store
        self.sources = sources if isinstance(sources, Sources) else Sources(sources, clock)
        self._clock = clock
        self._reserve_bytes = reserve_bytes
        self._quota_bytes = quota_bytes
        self._min_bytes_per_s = min_bytes_per_s
        self.budget = budget or Budget(clock)

    # -- before ------------------------------------------------------------------------------------------------------------

    def missing(self, wanted: Iterable[File]) -> list[File]:
        """The distinct files that are not in the store yet."""
        by_hash = {file.sha256: file for file in wanted}
        return [file for file in by_hash.values() if not self._store.has_blob(file.sha256)]

    def needed_bytes(self, wanted: Iterable[File]) -> int:
        """What these files will take on the disk beyond what they take already."""
        return sum(
            max(0, file.size_bytes - allocated_bytes(self._store.staging / file.sha256)) for file in self.missing(wanted)
        )

    def shortage_bytes(self, wanted: Iterable[File]) -> int:
        """How many bytes the disk or the quota lacks for these files and the reserve; 0 or less when they fit."""
        needed = self.needed_bytes(wanted)
        if needed == 0:
            return 0
        short = needed + self._reserve_bytes - shutil.disk_usage(self._store.root).free
        return max(short, needed + used_bytes(self._store) - self._quota_bytes) if self._quota_bytes else short

    def require_space(self, wanted: Iterable[File]) -> None:
        """Raises: Problem NO_SPACE with the numbers."""
        short = self.shortage_bytes(wanted := list(wanted))
        if short > 0:
            needed, used = self.needed_bytes(wanted), used_bytes(self._store)
            bounds = f"the disk keeps {self._reserve_bytes} in reserve"
            if self._quota_bytes:
                bounds += f", the store has {used} of its quota of {self._quota_bytes} (disk_quota_bytes)"
            raise Problem(
                Reason.NO_SPACE,
                f"the release needs {needed} bytes and {bounds}: {short} bytes are lacking",
                {"needed_bytes": needed, "short_bytes": short, "used_bytes": used},
            )

    # -- fetching ----------------------------------------------------------------------------------------------------------

    def fetch(self, file: File, progress: Progress, stop: Stop, priority: int = 0) -> Mapping[str, int]:
        """Brings one blob into the store; nothing to do when it is there. When bytes are short, a smaller `priority` goes
        first. Gives how many bytes came from which source; the rest was here.

        Raises: Problem, Stopped.
        """
        if self._store.has_blob(file.sha256):
            return {}
        one = _Fetch(self, self._store, file, progress, stop, priority)
        try:
            in_background(one.run)  # predictions go first
        except OSError as error:
            raise store_problem(error, f"writing {file.sha256}") from error
        return one.brought

    def speed(self, bytes_to_go: int) -> MinimumSpeed:
        return MinimumSpeed(self._clock, self._min_bytes_per_s, bytes_to_go)

    def monotonic(self) -> float:
        return self._clock.monotonic()


class _Fetch:
    """One file. Everything runs in one thread."""

    def __init__(self, downloader: Downloader, store: Store, file: File, progress: Progress, stop: Stop, priority: int) -> None:
        self._downloader = downloader
        self._store = store
        self._file = file
        self._progress = progress
        self._stop = stop
        self._priority = priority
        self._asked = (float("-inf"), 0)
        self.brought: Counter[str] = Counter()

    def run(self) -> None:
        """Raises: Problem, Stopped, OSError."""
        file = self._file
        with staging(self._store.staging, file) as staged:
            if file.blocks:
                staged.check()
                reuse.copy(self._store, staged, self._stop)
            else:
                staged.check_prefix()
            self._progress(staged.have_bytes)
            if staged.have_bytes < file.size_bytes:
                self._ask_around(staged)
            if (actual := staged.sha256()) != file.sha256:
                staged.discard()
                raise Problem(
                    Reason.HASH_MISMATCH,
                    f"the blocks that the manifest lists for {file.sha256} make up {actual}: its publisher has to publish it anew",
                )
            staged.move_to(self._store.blob(file.sha256))
        (self._store.staging / (file.sha256 + BLOCKS_SUFFIX)).unlink(missing_ok=True)

    def _ask_around(self, staged: Staged) -> None:
        """Raises: Problem when nobody is left to ask and something is still missing."""
        problems: list[tuple[Source, Problem]] = []
        sources = self._downloader.sources
        for source in sources.order():
            problem = self._try(source, staged)
            if problem is None:
                sources.worked(source)
                return
            if not isinstance(problem, NotHere):
                sources.failed(source)
            problems.append((source, problem))
        raise verdict(problems, f"blob {self._file.sha256}")

    def _try(self, source: Source, staged: Staged) -> Problem | None:
        """Fetches everything that is missing from one source. None when all of it came, else why not; what came stays.  Raises:
        Stopped, OSError.
        """
        wrong: Problem | None = None
        for _ in range(TRIES_ON_WRONG_BYTES):
            wrong = self._try_once(source, staged)
            if wrong is None or wrong.reason is not Reason.HASH_MISMATCH:
                break
        return wrong

    def _try_once(self, source: Source, staged: Staged) -> Problem | None:
        try:
            self._ask(source, staged)
        except Problem as problem:
            return problem
        return None

    def _ask(self, source: Source, staged: Staged) -> None:
        """Raises: Problem, Stopped, OSError."""
        while True:
            if source.metered:
                self._downloader.budget.wait_open(self._stop)
            speed = self._downloader.speed(self._file.size_bytes - staged.have_bytes)
            try:
                with source.open(self._file.sha256) as read:
                    if self._file.blocks:
                        self._fill(source, staged, read, speed)
                    else:
                        self._grow(source, staged, read, speed)
                    return
            except _HoursOver:
                continue

    def _fill(self, source: Source, staged: Staged, read: Reader, speed: MinimumSpeed) -> None:
        """Fetches the missing pieces, stretch after stretch."""
        for run in pieces.runs(staged.missing):
            with read(run.start, run.end) as (start, chunks):
                self._cut(source, staged, run, start, self._passing(chunks, source, speed))

    def _cut(self, source: Source, staged: Staged, run: Run, start: int, chunks: Iterator[bytes]) -> None:
        """Cuts bytes that begin at `start` of the file into the pieces of a run; each is written as soon as it is whole and
        right.
        """
        at, held = start, bytearray()  # `held` begins at `at`
        for piece in run.pieces:
            while at + len(held) < piece.end:
                chunk = next(chunks, b"")
                if not chunk:
                    raise self._broke_off(staged)
                held += chunk
                if at + len(held) <= piece.start:  # a source without ranges, or a gap that was bridged
                    at += len(held)
                    held.clear()
            skip = piece.start - at
            with memoryview(held) as view, view[skip : skip + piece.size_bytes] as data:
                right = staged.add(piece, data)
            if not right:
                raise WrongBytes(
                    f"the bytes {piece.start} to {piece.end} of blob {self._file.sha256} from {source.name} are not what was signed"
                )
            del held[: skip + piece.size_bytes]
            at = piece.end
            self._progress(staged.have_bytes)

    def _grow(self, source: Source, staged: Staged, read: Reader, speed: MinimumSpeed) -> None:
        """Fetches a file without blocks, from where it stopped to its end. Only then is it known whether it is right."""
        size = self._file.size_bytes
        try:
            with read(staged.have_bytes, size) as (start, chunks):
                if start != staged.have_bytes:
                    staged.clear()
                for chunk in self._passing(chunks, source, speed):
                    staged.append(chunk[: size - staged.have_bytes])
                    self._progress(staged.have_bytes)
                    if staged.have_bytes == size:
                        break
        except NotHere:
            if source.final:
                staged.clear()  # what is staged may be why: more bytes than it has
            raise
        if staged.have_bytes < size:
            raise self._broke_off(staged)
        if (actual := staged.sha256()) != self._file.sha256:
            staged.clear()
            raise WrongBytes(f"blob {self._file.sha256} arrived from {source.name} as {actual}: thrown away")

    def _broke_off(self, staged: Staged) -> Problem:
        return Problem(
            Reason.DOWNLOAD_FAILED,
            f"blob {self._file.sha256} broke off with {staged.have_bytes} of {self._file.size_bytes} bytes; it will be resumed",
        )

    def _passing(self, chunks: Iterator[bytes], source: Source, speed: MinimumSpeed) -> Iterator[bytes]:
        """The chunks as fast as they may come.  Raises: Problem when they come too slowly; Stopped; _HoursOver."""
        budget = self._downloader.budget
        for chunk in chunks:
            self._ask_to_stop(len(chunk))
            self.brought[source.name] += len(chunk)
            if source.metered:
                speed.check(len(chunk))
                speed.excuse(budget.wait_for(len(chunk), self._priority, self._stop))
                if not budget.open():
                    raise _HoursOver
            yield chunk
            rest()

    def _ask_to_stop(self, count: int) -> None:
        at, passed = self._asked
        now = self._downloader.monotonic()
        if passed + count < ASK_EVERY_BYTES and now - at < ASK_EVERY_S:
            self._asked = (at, passed + count)
            return
        self._asked = (now, 0)
        if self._stop():
            raise Stopped


class _HoursOver(Exception):
    """The hours for downloads ended in the middle of one."""


def used_bytes(store: Store) -> int:
    """What blobs and downloads take on the disk."""
    return sum(allocated_bytes(path) for folder in (store.blobs, store.staging) for path in folder.iterdir())
