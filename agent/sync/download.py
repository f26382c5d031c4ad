"""Blobs over HTTPS: resumable at any byte, verified before they get their name in the store.

A blob grows in `staging/<sha256>`. Whatever a crash left there is hashed again and continued; bytes that turn out wrong are thrown
away. Only a file whose size and hash match is synced and renamed into `blobs/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Protocol

from agent.contract import enrolment
from agent.contract.manifest import File
from agent.contract.reasons import Reason
from agent.host import files
from agent.host.priority import in_background
from agent.store import Store
from agent.sync.http import FleetHttp, HttpStatus
from agent.sync.ports import Clock, Stop
from agent.sync.problems import Problem, Stopped, store_problem

GRACE_S = 60.0
"""Added to the time a blob may take, so that a small one survives a slow handshake."""

RATE_WINDOW_S = 30.0
"""Throughput is judged over this long: mobile links stall for 10 to 20 s when they change cells."""

HASH_CHUNK_BYTES = 1 << 20
TRIES_ON_WRONG_HASH = 2
"""A proxy or a bad memory cell can damage bytes once; the same wrong bytes twice are what the server has."""

Progress = Callable[[int], None]
"""Called with the bytes that are there so far."""


class BlobSource(Protocol):
    """Somewhere untrusted that has blobs."""

    @contextlib.contextmanager
    def open(self, sha256: str, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Where the bytes begin (`offset`, or 0 from a source that cannot resume) and the bytes.  Raises: Problem."""


class HttpBlobs:
    """The fleet server's device listener. A connection per blob, since several models may download at once."""

    def __init__(self, connect: Callable[[], FleetHttp]) -> None:
        self._connect = connect

    @contextlib.contextmanager
    def open(self, sha256: str, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        http = self._connect()
        url = http.url(enrolment.BLOBS_PATH + sha256)
        try:
            with http.open(url, headers=headers, accept=(200, 206)) as response:
                resumed = response.status_code == 206
                if resumed and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {offset}-"):
                    raise Problem(Reason.DOWNLOAD_FAILED, f"{url}: the server sent another range than was asked for")
                yield (offset if resumed else 0), http.chunks(response, deadline_s=float("inf"))
        finally:
            http.close()


class Downloader:
    """Brings the files of a release into the store."""

    def __init__(self, store: Store, source: BlobSource, clock: Clock, *, reserve_bytes: int, min_bytes_per_s: int) -> None:
        self._store = store
        self._source = source
        self._clock = clock
        self._reserve_bytes = reserve_bytes
        self._min_bytes_per_s = min_bytes_per_s

    def missing(self, wanted: Iterable[File]) -> list[File]:
        """The distinct files that are not in the store yet."""
        by_hash = {file.sha256: file for file in wanted}
        return [file for file in by_hash.values() if not self._store.has_blob(file.sha256)]

    def shortage_bytes(self, wanted: Iterable[File]) -> int:
        """How many bytes the disk lacks for these files and the reserve; 0 or less when they fit."""
        needed = sum(max(0, file.size_bytes - self._staged_bytes(file.sha256)) for file in self.missing(wanted))
        if needed == 0:
            return 0
        return needed + self._reserve_bytes - shutil.disk_usage(self._store.root).free

    def require_space(self, wanted: Iterable[File]) -> None:
        """Raises: Problem NO_SPACE with the numbers."""
        short = self.shortage_bytes(wanted := list(wanted))
        if short > 0:
            needed = sum(file.size_bytes for file in self.missing(wanted))
            raise Problem(
                Reason.NO_SPACE,
                f"the release needs {needed} bytes and the disk keeps {self._reserve_bytes} in reserve: {short} bytes are lacking",
                {"needed_bytes": needed, "short_bytes": short},
            )

    def fetch(self, file: File, progress: Progress, stop: Stop) -> None:
        """Brings one blob into the store; nothing to do when it is there.  Raises: Problem, Stopped."""
        for last in (n == TRIES_ON_WRONG_HASH - 1 for n in range(TRIES_ON_WRONG_HASH)):
            if self._store.has_blob(file.sha256):
                return
            try:
                in_background(lambda: self._fetch(file, progress, stop))  # predictions go first
            except OSError as error:
                raise store_problem(error, f"writing {file.sha256}") from error
            except Problem as problem:
                if last or problem.reason is not Reason.HASH_MISMATCH:
                    raise

    def _fetch(self, file: File, progress: Progress, stop: Stop) -> None:
        staged = self._store.staging / file.sha256
        with _appending(staged) as out:
            digest, have = _rehash(out, file.size_bytes)
            if have < file.size_bytes:
                try:
                    digest = self._receive(file, out, digest, have, progress, stop)
                except HttpStatus as problem:
                    if problem.status == 416:  # the server has fewer bytes than are staged: these cannot be the right ones
                        staged.unlink()
                    raise
            if (actual := digest.hexdigest()) != file.sha256:
                staged.unlink()
                raise Problem(Reason.HASH_MISMATCH, f"blob {file.sha256} arrived as {actual}: thrown away")
            out.flush()
            os.fsync(out.fileno())
        staged.replace(self._store.blob(file.sha256))
        files.sync_directory(self._store.blobs)

    def _receive(
        self, file: File, out: IO[bytes], digest: hashlib._Hash, have: int, progress: Progress, stop: Stop
    ) -> hashlib._Hash:
        pace = _Pace(self._clock, self._min_bytes_per_s, file.size_bytes - have)
        progress(have)
        with self._source.open(file.sha256, have) as (start, chunks):
            if start != have:
                out.seek(0)
                out.truncate()
                digest, have = hashlib.sha256(), 0
            for chunk in chunks:
                if stop():
                    raise Stopped
                have += len(chunk)
                if have > file.size_bytes:
                    out.truncate(0)
                    raise Problem(
                        Reason.HASH_MISMATCH, f"blob {file.sha256} is longer than the {file.size_bytes} bytes in the manifest"
                    )
                digest.update(chunk)
                out.write(chunk)
                pace.check(have)
                progress(have)
        if have < file.size_bytes:
            raise Problem(
                Reason.DOWNLOAD_FAILED,
                f"blob {file.sha256} broke off after {have} of {file.size_bytes} bytes; it will be resumed",
            )
        return digest

    def _staged_bytes(self, sha256: str) -> int:
        try:
            return (self._store.staging / sha256).stat().st_size
        except FileNotFoundError:
            return 0


class _Pace:
    """Ends a download that trickles. A limit on the silence between two packets does not: a byte every 19 s passes it."""

    def __init__(self, clock: Clock, min_bytes_per_s: int, bytes_to_go: int) -> None:
        self._clock = clock
        self._min = min_bytes_per_s
        self._end = clock.monotonic() + GRACE_S + bytes_to_go / min_bytes_per_s
        self._window = (clock.monotonic(), -1)

    def check(self, have: int) -> None:
        """Raises: Problem when the last window was slower than allowed, or the whole takes too long."""
        now = self._clock.monotonic()
        since, before = self._window
        if before < 0:
            self._window = (now, have)
        elif now - since >= RATE_WINDOW_S:
            rate = (have - before) / (now - since)
            if rate < self._min:
                raise Problem(
                    Reason.SLOW_RETRIEVAL, f"the download runs at {rate:.0f} bytes/s, at least {self._min} are demanded"
                )
            self._window = (now, have)
        if now > self._end:
            raise Problem(Reason.SLOW_RETRIEVAL, "the download took longer than its size allows")


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[IO[bytes]]:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as out:
        yield out


def _rehash(out: IO[bytes], size_bytes: int) -> tuple[hashlib._Hash, int]:
    """The hash and number of the bytes that are staged already; a file longer than it may be begins again."""
    digest, have = hashlib.sha256(), 0
    while chunk := out.read(HASH_CHUNK_BYTES):
        digest.update(chunk)
        have += len(chunk)
    if have <= size_bytes:
        return digest, have
    out.seek(0)
    out.truncate()
    return hashlib.sha256(), 0
