"""TUF metadata over our own HTTPS client: one verification path, used by `trust` for the fleet and by `edge-agent tuf` for any
repository.

Around python-tuf's client workflow stand four rules of ours:
 1. one process per folder, which a lock file enforces, and every session begins at the trusted root;
 2. time is the signed clock's: never before a time that was once proved, so a clock in 1970 neither blinds nor blocks the
    device;
 3. no version may be lower than the highest ever verified (`versions.py`), whatever became of python-tuf's own files;
 4. what was renamed into place is synced before anything relies on it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from securesystemslib.exceptions import StorageError
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]

from agent.common import files
from agent.contract import enrolment
from agent.contract.assignment import ISSUED_FIELD, MAX_ASSIGNMENT_BYTES
from agent.contract.codec import encode
from agent.contract.reasons import Reason
from agent.host import clock as clocks
from agent.host.clock import SignedClock
from agent.sync.http import HttpStatus, TooLong
from agent.sync.problems import Problem, store_problem
from agent.sync.trust import versions as seen_versions
from agent.sync.trust.versions import SeenVersions

log = logging.getLogger(__name__)

AWAY_S = 120.0
"""How long the other ways are asked first after the fleet server could not be reached: each attempt to reach it costs a
timeout."""

METADATA_DEADLINE_S = 60.0
"""How long one metadata file may take. The largest allowed is 5 MB; a link that needs longer than a minute for it will not
fetch a model either."""

MAX_ROOT_ROTATIONS = 64
LOOK_AGAIN_S = (0.001, 0.01, 0.1)
MIXED = re.compile(r"Expected (snapshot version |.+ v[0-9]+, got v)")
"""How python-tuf says that a rightly signed role is not the version that snapshot or timestamp name; it has no type of its own
for it."""
SOME_SIGNED = re.compile(r"signed by [1-9][0-9]*/")
"""How python-tuf says that some of a role's keys signed, but too few."""
END_OF_TIME = 253_370_764_800.0  # the year 9999: no datetime is later
_Role = TypeVar("_Role", Root, Timestamp, Snapshot, Targets)
_TOP_LEVEL = (Timestamp.type, Snapshot.type, Targets.type)


class Documents(Protocol):
    """A way to the fleet's documents. HTTPS to its server is one; what another one brings is verified just the same."""

    server_time: float | None
    """The server's clock at its last answer, if it told."""

    def url(self, path: str) -> str: ...

    def get(self, url: str, *, limit_bytes: int, deadline_s: float) -> bytes:
        """The whole document.  Raises: HttpStatus 404 when there is none of that name; TooLong; Problem."""

    def close(self) -> None: ...


class Fetcher(FetcherInterface):
    """python-tuf's transport over our own ways to documents: their deadlines, their words for errors."""

    def __init__(self, http: Documents) -> None:
        self._http = http

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Overridden because the inherited one leaves a connection to the garbage collector when a body is too long."""
        try:
            return self._http.get(url, limit_bytes=max_length, deadline_s=METADATA_DEADLINE_S)
        except HttpStatus as error:
            raise tuf_errors.DownloadHTTPError(error.message, error.status) from error
        except TooLong as error:
            raise tuf_errors.DownloadLengthMismatchError(error.message) from error
        except Problem as error:
            raise tuf_errors.DownloadError(error.message) from error

    def _fetch(self, url: str) -> Iterator[bytes]:
        yield self.download_bytes(url, MAX_ASSIGNMENT_BYTES)


class MetadataClient:
    """Metadata in `metadata` (python-tuf's files), what must never be forgotten in `memory`. Thread-safe."""

    def __init__(
        self,
        *,
        memory: Path,
        metadata: Path,
        root: bytes,
        http: Documents,
        clock: SignedClock,
        max_delegations: int = 4,
        url: str = "",
        others: Callable[[], Sequence[Documents]] = tuple,
    ) -> None:
        """`url` is where `http` has the metadata, where that is not where a fleet server has it; `others` are asked, in order,
        while it cannot be reached.
        """
        self._memory = memory
        self._metadata = metadata
        self._root = root
        self._url = url
        self._http = http
        self._others = others
        self._away_until = float("-inf")
        self._clock = clock
        self._config = UpdaterConfig(max_root_rotations=MAX_ROOT_ROTATIONS, max_delegations=max_delegations)
        self._mutex = threading.Lock()
        files.make_directory(memory, mode=0o700)
        files.make_directory(metadata, mode=0o700)

    @contextlib.contextmanager
    def session(self, only: Documents | None = None) -> Iterator[Session]:
        """A refreshed state of the repository, its own until the block ends; with `only`, by that way alone.  Raises:
        Problem.
        """
        with self._mutex, self._file_lock(), as_problems("the metadata"):
            yield self._reached() if only is None else self._refreshed(only, only.url(enrolment.METADATA_PATH))

    def _reached(self) -> Session:
        """By the first way that leads there. What goes wrong on another than the first is told of nobody's release or fleet:
        the first one's problem is the one to see to.
        """
        others = list(self._others())
        if others and self._clock.monotonic() < self._away_until and (found := self._by_others(others)) is not None:
            return found
        try:
            session = self._refreshed(self._http, self._url or self._http.url(enrolment.METADATA_PATH))
        except tuf_errors.DownloadLengthMismatchError:
            raise
        except tuf_errors.DownloadError as error:
            busy = isinstance(error.__cause__, Problem) and error.__cause__.wait_s > 0  # nor has it time for other ways
            if busy or (found := self._by_others(others)) is None:
                raise
            self._away_until = self._clock.monotonic() + AWAY_S
            return found
        self._away_until = float("-inf")
        return session

    def _by_others(self, others: Sequence[Documents]) -> Session | None:
        for other in others:
            try:
                return self._refreshed(other, other.url(enrolment.METADATA_PATH))
            except (Problem, tuf_errors.RepositoryError, tuf_errors.DownloadError) as error:  # noqa: PERF203
                log.debug("no way to the fleet's documents by %s: %s", other.url(""), error)
        return None

    def keep(self, seen: SeenVersions) -> None:
        """Makes `seen` durable.  Raises: OSError."""
        keep(self._memory / "seen.json", encode(seen))

    @contextlib.contextmanager
    def _file_lock(self) -> Iterator[None]:
        fd = os.open(self._memory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise Problem(Reason.STORE_FAILED, f"another process is using {self._memory}") from error
        finally:
            os.close(fd)

    def _refreshed(self, http: Documents, url: str) -> Session:
        seen = seen_versions.load(self._memory / "seen.json")
        updater = self._updater(http, url)
        try:
            self._refresh(updater)
        except tuf_errors.ExpiredMetadataError as error:
            if not self._online_keys_changed(seen):
                raise self._expired(str(error), http) from error
            # The time that seemed to be past was signed with keys that a newer root took away: perhaps by their thief.
            self._clock.forget()
            updater = self._updater(http, url)
            try:
                self._refresh(updater)
            except tuf_errors.ExpiredMetadataError as again:
                raise self._expired(str(again), http) from again
        seen = self._advanced(seen)
        self._learn_time(updater, http)
        self._sync()
        return Session(updater, seen, self._metadata, http)

    def _updater(self, http: Documents, url: str) -> Updater:
        return Updater(
            metadata_dir=str(self._metadata),
            metadata_base_url=url,
            fetcher=Fetcher(http),
            config=self._config,
            bootstrap=self._root,
        )

    def _refresh(self, updater: Updater) -> None:
        self._set_time(updater)
        with contextlib.ExitStack() as always:
            always.callback(self._sync)  # also the root that a later failure leaves behind
            updater.refresh()

    def _set_time(self, updater: Updater) -> None:
        """python-tuf asks the machine's clock once, when it is made; there is no other way to tell it the time."""
        now = min(self._clock.wall(), END_OF_TIME)
        updater._trusted_set.reference_time = dt.datetime.fromtimestamp(now, dt.timezone.utc)  # noqa: SLF001

    def _learn_time(self, updater: Updater, http: Documents) -> None:
        """When the timestamp was signed is past. It is believed up to the root's own end: no online key can say more than
        the offline keys allow. What has ended by then is refused.
        """
        root, timestamp = load(self._metadata, Root.type, Root), load(self._metadata, Timestamp.type, Timestamp)
        issued = timestamp.unrecognized_fields.get(ISSUED_FIELD)
        if isinstance(issued, int):
            self._clock.learn(min(float(issued), root.expires.timestamp()))
        self._set_time(updater)
        for role in (
            root,
            timestamp,
            load(self._metadata, Snapshot.type, Snapshot),
            load(self._metadata, Targets.type, Targets),
        ):
            if role.expires.timestamp() <= self._clock.wall():
                raise self._expired(f"{role.type} metadata ended at {clocks.text(role.expires.timestamp())}", http)

    def _online_keys_changed(self, seen: SeenVersions) -> bool:
        try:
            root = load(self._metadata, Root.type, Root)
        except (OSError, tuf_errors.RepositoryError):
            return False
        before = seen.keys.get(Timestamp.type)
        return before is not None and before != _keys(root)[Timestamp.type] and self._clock.known > 0

    def _advanced(self, seen: SeenVersions) -> SeenVersions:
        root, targets = load(self._metadata, Root.type, Root), load(self._metadata, Targets.type, Targets)
        versions = {
            Timestamp.type: load(self._metadata, Timestamp.type, Timestamp).version,
            Snapshot.type: load(self._metadata, Snapshot.type, Snapshot).version,
            Targets.type: targets.version,
            Root.type: root.version,
        }
        return seen_versions.advance(seen, versions, {**_keys(root), **_delegated_keys(targets)})

    def _expired(self, what: str, http: Documents) -> Problem:
        """Old metadata and a clock that is ahead show the same error; the server's own clock says which is likelier."""
        now, server = self._clock.wall(), http.server_time
        if server is not None and now - server > clocks.STEP_BACK_S:
            return Problem(
                Reason.CLOCK_UNTRUSTED,
                f"this device's clock says {clocks.text(now)}, the fleet server's {clocks.text(server)}, and what it signed has expired "
                "by ours: set the clock (NTP, or a real-time clock with a battery)",
            )
        return Problem(
            Reason.EXPIRED_METADATA, f"the metadata has expired ({what}): the fleet server must renew it, or the clock is wrong"
        )

    def _sync(self) -> None:
        """python-tuf renames without fsync: make what it wrote durable before anything relies on it."""
        sync_metadata(self._metadata)


class Session:
    """The repository as it was verified at one moment. Only inside `MetadataClient.session`."""

    def __init__(self, updater: Updater, seen: SeenVersions, metadata: Path, http: Documents) -> None:
        self._updater = updater
        self._metadata = metadata
        self.http = http
        self.seen = seen

    def info(self, path: str, what: str) -> TargetFile | None:
        """What the signed metadata says of a target; None when nobody signed one of that name.  Raises: Problem."""
        before = self._loaded()
        with as_problems(what):
            found = self._updater.get_targetinfo(path)
        if self._loaded() != before:
            sync_metadata(self._metadata)
        return found

    def _loaded(self) -> int:
        """How many roles were read so far: no file can have been written while it stays the same."""
        return len(self._updater._trusted_set)  # noqa: SLF001

    def fetch(self, target: TargetFile, base_url: str, what: str) -> bytes:
        """The target's bytes, size first, then its hashes (specification section 5.7).  Raises: Problem."""
        path = target.path
        if self.role(Root.type, Root).consistent_snapshot:
            directory, slash, name = path.rpartition("/")
            path = f"{directory}{slash}{next(iter(target.hashes.values()))}.{name}"
        data = self.http.get(base_url + path, limit_bytes=target.length, deadline_s=METADATA_DEADLINE_S)
        with as_problems(what):
            target.verify_length_and_hashes(data)
        return data

    def role(self, name: str, kind: type[_Role]) -> _Role:
        """A role as it was just verified and stored."""
        return load(self._metadata, name, kind)


def load(folder: Path, role: str, kind: type[_Role]) -> _Role:
    """A role that python-tuf verified and stored below `folder`.  Raises: OSError, tuf's RepositoryError."""
    loaded = stored(folder, role).signed
    assert isinstance(loaded, kind)
    return loaded


def stored(folder: Path, role: str) -> Metadata[Any]:
    """A role that python-tuf stored, with its signatures; for any process. python-tuf takes root.json away for a moment
    whenever it looks for a newer one.
    """
    path = folder / f"{role}.json"
    for pause_s in LOOK_AGAIN_S:
        try:
            return Metadata.from_file(str(path))
        except StorageError:  # noqa: PERF203 - it is no RepositoryError, and no OSError
            time.sleep(pause_s)
    try:
        return Metadata.from_file(str(path))
    except StorageError as error:
        raise FileNotFoundError(errno.ENOENT, "it is not there, or cannot be read", str(path)) from error


def keep(path: Path, data: bytes) -> None:
    """Writes durably, and not at all when the file holds this already: flash wears.  Raises: OSError."""
    try:
        unchanged = path.read_bytes() == data
    except FileNotFoundError:
        unchanged = False
    if not unchanged:
        files.write(path, data, mode=0o600)


def sync_metadata(metadata: Path) -> None:
    for folder in (metadata / "root_history", metadata):
        for path in folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # a link to nothing, where the first root was refused
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        if folder.is_dir():
            files.sync_directory(folder)


@contextlib.contextmanager
def as_problems(what: str) -> Iterator[None]:
    """What python-tuf raises, by whose fault it is. The order matters: special errors before the general ones they derive
    from.
    """
    try:
        yield
    except tuf_errors.ExpiredMetadataError as error:
        raise Problem(
            Reason.EXPIRED_METADATA, f"{what} has expired ({error}): the fleet server must renew it, or the clock is wrong"
        ) from error
    except tuf_errors.BadVersionNumberError as error:
        reason = Reason.MIX_AND_MATCH if MIXED.match(str(error)) else Reason.METADATA_ROLLBACK
        raise Problem(reason, f"{what} does not follow from what was verified before: {error}") from error
    except tuf_errors.LengthOrHashMismatchError as error:
        raise Problem(Reason.HASH_MISMATCH, f"{what} is not what its metadata lists: {error}") from error
    except tuf_errors.UnsignedMetadataError as error:
        some = SOME_SIGNED.search(str(error))
        raise Problem(Reason.BELOW_THRESHOLD if some else Reason.BAD_SIGNATURE, f"{what} cannot be trusted: {error}") from error
    except tuf_errors.RepositoryError as error:
        reason = Reason.UNREADABLE if isinstance(error, DeserializationError) else Reason.BAD_SIGNATURE
        raise Problem(reason, f"{what} cannot be trusted: {error}") from error
    except RecursionError as error:
        raise Problem(Reason.UNREADABLE, f"{what} is nested too deeply") from error
    except tuf_errors.DownloadError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Problem) else Problem(Reason.DOWNLOAD_FAILED, "")
        raise Problem(cause.reason, f"{what}: {error}", wait_s=cause.wait_s) from error
    except OSError as error:
        raise store_problem(error, f"keeping {what}") from error


def _keys(root: Root) -> dict[str, tuple[str, ...]]:
    return {role: tuple(sorted(root.roles[role].keyids)) for role in _TOP_LEVEL}


def _delegated_keys(targets: Targets) -> dict[str, tuple[str, ...]]:
    roles = (targets.delegations.roles if targets.delegations else None) or {}
    return {name: tuple(sorted(role.keyids)) for name, role in roles.items()}
