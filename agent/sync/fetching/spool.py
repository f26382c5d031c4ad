"""Where bundles wait for `sync`: unpacked, complete, and not believed yet.

    <store>/sync/imports/<id>/             metadata, targets, records, blobs as in the bundle; appears whole or not at all
    <store>/sync/imports/<id>/accepted     written by `sync` once the fleet's signatures were verified
    <store>/sync/imports/<id>.told         what became of it, for `edge-agent import`, which waits for it
    <store>/sync/imports/.part-<id>/       being unpacked; another `import` of the same bundle goes on with it

The id is a hash over the bundle's documents and the names of its blobs, so the same bundle is the same id.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from agent.common import files
from agent.contract import bundle, enrolment
from agent.contract.bundle import Bundle, BundleError, Member
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format
from agent.contract.reasons import Reason
from agent.store import Store, hash_file
from agent.sync.http import HttpStatus, TooLong
from agent.sync.problems import Problem

TOLD_KEPT = 20
COPY_BYTES = 1 << 20
_ID = re.compile(r"[0-9a-f]{32}")
_DOCUMENT = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)*[A-Za-z0-9_][A-Za-z0-9_.-]*")

Progress = Callable[[int, int], None]
"""Called with the bytes of blobs that are done, and of all."""


class Told(Document, frozen=True, kw_only=True):
    """What became of a bundle. `wanted`: the releases in it that this device should run now, by model."""

    accepted: bool
    message: str = ""
    reason: Reason | None = None
    wanted: dict[str, int] = {}
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "the outcome of an import")


class Spool:
    """The folder of imports. `edge-agent import` puts bundles in, `sync` uses them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.folder = store.private / "imports"

    def ids(self) -> list[str]:
        """The bundles that are here, oldest first."""
        try:
            found = [(entry.stat().st_mtime_ns, entry.name) for entry in os.scandir(self.folder) if _ID.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
        return [name for _, name in sorted(found)]

    def path(self, id_: str) -> Path:
        return self.folder / id_

    def accepted(self, id_: str) -> bool:
        return (self.path(id_) / "accepted").exists()

    def accept(self, id_: str) -> None:
        files.write(self.path(id_) / "accepted", b"")

    def about(self, id_: str) -> Bundle:
        """Raises: ContractError, OSError."""
        return decode((self.path(id_) / bundle.HEAD).read_bytes(), Bundle, limit_bytes=1 << 20)

    def tell(self, id_: str, told: Told) -> None:
        """Raises: OSError."""
        files.write(self.folder / f"{id_}.told", encode(told))
        for old in sorted(self.folder.glob("*.told"), key=lambda path: path.stat().st_mtime_ns)[:-TOLD_KEPT]:
            old.unlink(missing_ok=True)

    def told(self, id_: str) -> Told | None:
        """What became of the bundle; None while it waits."""
        try:
            return decode((self.folder / f"{id_}.told").read_bytes(), Told, limit_bytes=1 << 20)
        except (FileNotFoundError, ContractError):
            return None

    def remove(self, id_: str) -> None:
        """Removes the bundle: first from its name, then piece by piece."""
        gone = self.folder / f".gone-{id_}"
        with contextlib.suppress(FileNotFoundError):
            self.path(id_).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def remove_blobs(self, id_: str) -> None:
        shutil.rmtree(self.path(id_) / "blobs", ignore_errors=True)

    def sweep(self) -> None:
        """Removes what a killed process left half removed."""
        for path in self.folder.glob(".gone-*"):
            shutil.rmtree(path, ignore_errors=True)

    # -- putting in --------------------------------------------------------------------------------------------------------

    def unpack(self, file: IO[bytes], fleet: str, device: str, *, reserve_bytes: int, progress: Progress) -> str:
        """Copies what the bundle has for this device and the store lacks; gives its id. What an earlier attempt brought is not
        copied again.

        Raises: BundleError (not a whole bundle), Problem (of another fleet or for other devices; no space; another import is
        under way), OSError.
        """
        files.make_directory(self.folder, mode=0o700)
        members = list(bundle.members(file))
        documents = {member.name: bundle.read(file, member) for member in members if not member.is_blob}
        blobs = [member for member in members if member.is_blob]
        _check_for_us(documents, fleet, device)
        digest = hashlib.sha256()
        for name, data in sorted(documents.items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        digest.update("\0".join(sorted(member.name for member in blobs)).encode())
        id_ = digest.hexdigest()[:32]
        with self._alone():
            (self.folder / f"{id_}.told").unlink(missing_ok=True)
            if self.path(id_).exists() and not self.accepted(id_):
                return id_
            wanted = [member for member in blobs if not self._store.has_blob(member.name.removeprefix("blobs/"))]
            if self.accepted(id_):
                if not wanted:
                    (self.path(id_) / "accepted").unlink()  # verify it once more; it costs little
                    return id_
                self.remove(id_)
            part = self.folder / f".part-{id_}"
            self._forget_other_parts(part)
            if part.exists():
                files.sweep(part, older_than_s=0)  # what a killed import was writing
            self._require_space(part, wanted, reserve_bytes)
            _write_documents(part, documents)
            try:
                _copy_blobs(file, part / "blobs", wanted, progress)
            except BundleError:
                shutil.rmtree(part, ignore_errors=True)  # whatever else is in it, it will not become a bundle
                raise
            part.rename(self.path(id_))
            files.sync_directory(self.folder)
        return id_

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / "lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Problem(Reason.STORE_FAILED, "another import is under way: wait for it") from None
            yield

    def _forget_other_parts(self, mine: Path) -> None:
        for path in self.folder.glob(".part-*"):
            if path != mine:
                shutil.rmtree(path, ignore_errors=True)

    def _require_space(self, part: Path, wanted: list[Member], reserve_bytes: int) -> None:
        there = sum(_size(part / member.name) for member in wanted)
        needed = sum(member.size_bytes for member in wanted) - there
        free = shutil.disk_usage(self.folder).free
        if needed > 0 and needed + reserve_bytes > free:
            raise Problem(
                Reason.NO_SPACE,
                f"the bundle needs {needed} bytes and the disk keeps {reserve_bytes} in reserve: {needed + reserve_bytes - free} bytes are "
                "lacking",
                {"needed_bytes": needed, "short_bytes": needed + reserve_bytes - free},
            )


class BundleDocuments:
    """The documents of an unpacked bundle, for the trust client."""

    server_time: float | None = None

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = folder
        self._device = device

    def url(self, path: str) -> str:
        return f"bundle:{path}"

    def get(self, url: str, *, limit_bytes: int, deadline_s: float) -> bytes:
        del deadline_s
        path = url.removeprefix("bundle:/")
        if f"/{path}" == enrolment.RECORD_PATH:
            path = f"records/{self._device}.json"
        if not _DOCUMENT.fullmatch(path):
            raise HttpStatus(404, f"{path!r} is no name in a bundle")
        try:
            with (self._folder / path).open("rb") as file:
                data = file.read(limit_bytes + 1)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise HttpStatus(404, f"the bundle has no {path}") from None
        if len(data) > limit_bytes:
            raise TooLong(Reason.ENDLESS_DATA, f"{path} has more than the {limit_bytes} bytes allowed")
        return data

    def close(self) -> None:
        return


class NoNetwork:
    """Stands for the fleet server where nobody is to be asked: bundles are all there is."""

    server_time: float | None = None

    def url(self, path: str) -> str:
        return f"nowhere:{path}"

    def get(self, url: str, *, limit_bytes: int, deadline_s: float) -> bytes:
        del limit_bytes, deadline_s
        raise Problem(Reason.DOWNLOAD_FAILED, f"{url}: no bundle that was imported has it, and nobody else is asked")

    def close(self) -> None:
        return


def _check_for_us(documents: dict[str, bytes], fleet: str, device: str) -> None:
    """Says early, and in plain words, what the signatures would say later.  Raises: Problem, BundleError."""
    try:
        about = decode(documents.get(bundle.HEAD, b""), Bundle, limit_bytes=1 << 20)
    except ContractError as error:
        raise BundleError(f"{bundle.HEAD} cannot be read: {error}") from error
    if about.fleet != fleet:
        raise Problem(Reason.WRONG_FLEET, f"the bundle is of fleet {about.fleet!r}, this device belongs to {fleet!r}")
    if f"records/{device}.json" not in documents:
        some = ", ".join(about.devices[:5]) + (", …" if len(about.devices) > 5 else "")
        raise Problem(
            Reason.WRONG_FLEET,
            f"the bundle is for {some}, not for {device!r}: make it with `edge-fleet bundle --device {device}`",
        )


def _write_documents(part: Path, documents: dict[str, bytes]) -> None:
    for name, data in documents.items():
        path = part / name
        files.make_directory(path.parent, mode=0o700)
        files.write(path, data)


def _copy_blobs(file: IO[bytes], folder: Path, wanted: list[Member], progress: Progress) -> None:
    files.make_directory(folder, mode=0o700)
    total, done = sum(member.size_bytes for member in wanted), 0
    for member in wanted:
        sha256 = member.name.removeprefix("blobs/")
        path = folder / sha256
        if _size(path) != member.size_bytes or hash_file(path) != sha256:
            _copy(file, member, path, sha256, lambda count, base=done: progress(base + count, total))  # type: ignore[misc]
        done += member.size_bytes
        progress(done, total)
    files.sync_directory(folder)


def _copy(file: IO[bytes], member: Member, path: Path, sha256: str, progress: Callable[[int], None]) -> None:
    digest, at = hashlib.sha256(), 0
    with files.replacing(path) as out:
        while at < member.size_bytes:
            data = os.pread(file.fileno(), min(COPY_BYTES, member.size_bytes - at), member.offset + at)
            if not data:
                raise BundleError(f"it became shorter while it was read, in the middle of {member.name!r}")
            digest.update(data)
            out.write(data)
            at += len(data)
            progress(at)
        if digest.hexdigest() != sha256:
            raise BundleError(f"{member.name!r} is damaged: its bytes have the sha256 {digest.hexdigest()}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0
