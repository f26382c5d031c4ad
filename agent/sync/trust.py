"""The trust client: bytes from the network become trusted documents here and nowhere else.

Rules, in the order they are applied:
 1. a clock that is behind what is known to be past proves nothing: refuse before asking;
 2. metadata is verified by the TUF client workflow, always from the root received at enrolment;
 3. no role's version may be lower than the highest this device ever verified (`seen.py`);
 4. the assignment comes from the role `assignments`, is of this fleet, and its version never goes down;
 5. the device record is signed by the keys that the trusted `targets` gives to `assignments`, is for this device, has not expired,
    and its serial never goes down;
 6. a manifest comes from the delegated `releases` role, has the length and hash listed there, and describes the release asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]

from agent.contract import enrolment
from agent.contract.assignment import (
    ASSIGNMENT_TARGET,
    MAX_ASSIGNMENT_BYTES,
    MAX_RECORD_BYTES,
    RECORD_PAYLOAD_TYPE,
    Assignment,
    DeviceRecord,
)
from agent.contract.codec import ContractError, decode, encode
from agent.contract.manifest import MAX_MANIFEST_BYTES, parse_manifest
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.host import clock as clocks
from agent.host import files
from agent.sync import seen as seen_versions
from agent.sync.desired import Desired
from agent.sync.http import FleetHttp, HttpStatus, TooLong
from agent.sync.identity import Identity
from agent.sync.ports import Clock, Signed
from agent.sync.problems import Problem, store_problem

METADATA_DEADLINE_S = 60.0
"""For one metadata file. The largest allowed is 5 MB; a link that needs longer than a minute for it will not fetch a model either."""

MAX_ROOT_ROTATIONS = 64
ASSIGNMENTS_ROLE = "assignments"
_Role = TypeVar("_Role", Root, Timestamp, Snapshot, Targets)
_TOP_LEVEL = (Timestamp.type, Snapshot.type, Targets.type)


class Fetcher(FetcherInterface):
    """python-tuf's transport over our own HTTPS client: its deadlines, its client certificate, its words for errors."""

    def __init__(self, http: FleetHttp) -> None:
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


class Trust:
    """Verifies the fleet's documents. Thread-safe; one process per folder, which a lock file enforces."""

    def __init__(self, folder: Path, identity: Identity, http: FleetHttp, clock: Clock) -> None:
        self._folder = folder
        self._metadata = folder / "metadata"
        self._identity = identity
        self._http = http
        self._clock = clock
        self._mutex = threading.Lock()
        files.make_directory(self._metadata, mode=0o700)
        self._known_time = clocks.LastKnownGood(folder / "clock.json", floor=identity.not_before)

    def close(self) -> None:
        self._http.close()

    def remembered(self) -> Desired | None:
        """What was last verified, perhaps by an earlier process; None before the first time or when it cannot be read."""
        try:
            return decode((self._folder / "desired.json").read_bytes(), Desired, limit_bytes=2 * MAX_ASSIGNMENT_BYTES)
        except (FileNotFoundError, ContractError):
            return None

    def refresh(self) -> Desired:
        """The fleet's current word, verified and remembered.  Raises: Problem; what was remembered before stays as it is."""
        with self._session() as updater:
            seen = self._refresh(updater)
            assignment = self._assignment(updater)
            trusted = self._load(Targets.type, Targets)
            record = self._record(trusted)
            seen = seen_versions.advance_documents(seen, assignment.version, record.serial)
            now = self._clock.wall()
            desired = Desired(
                assignment=assignment, record=record, verified_at=now, valid_until=min(record.expires, self._expiry())
            )
            self._keep("seen.json", encode(seen))
            self._keep("desired.json", encode(desired))
            self._known_time.advance(now)
            return desired

    def manifest(self, ref: ReleaseRef) -> Signed:
        """The manifest of `ref` as its publisher signed it.  Raises: Problem."""
        with self._session() as updater:
            self._keep("seen.json", encode(self._refresh(updater)))
            with _as_problems(f"release {ref}"):
                target = updater.get_targetinfo(ref.target_path)
            if target is None:
                raise Problem(Reason.WRONG_RELEASE, f"release {ref} is not among the releases that publishers signed")
            data = self._target(target, MAX_MANIFEST_BYTES, f"the manifest of release {ref}")
            self._sync_metadata()
        try:
            manifest = parse_manifest(data, expected=ref)
        except ContractError as error:
            raise Problem(Reason.BAD_MANIFEST, f"release {ref}: {error}") from error
        except ValueError as error:
            raise Problem(Reason.WRONG_RELEASE, str(error)) from error
        return Signed(data, hashlib.sha256(data).hexdigest(), manifest)

    # -- one session: one lock, one Updater (python-tuf refreshes once per Updater) -----------------------------------------

    @contextlib.contextmanager
    def _session(self) -> Iterator[Updater]:
        self._check_clock()
        with self._mutex, self._file_lock(), _as_problems("the fleet's metadata"):
            config = UpdaterConfig(max_root_rotations=MAX_ROOT_ROTATIONS, max_delegations=4)
            yield Updater(
                metadata_dir=str(self._metadata),
                metadata_base_url=self._http.url(enrolment.METADATA_PATH),
                fetcher=Fetcher(self._http),
                config=config,
                bootstrap=self._identity.root,
            )

    def _check_clock(self) -> None:
        now = self._clock.wall()
        if not self._known_time.believable(now):
            raise Problem(
                Reason.CLOCK_UNTRUSTED,
                f"the clock says {clocks.text(now)}, but it was {clocks.text(self._known_time.time)} already: "
                "set the clock (NTP, or a real-time clock with a battery)",
            )

    @contextlib.contextmanager
    def _file_lock(self) -> Iterator[None]:
        fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise Problem(Reason.STORE_FAILED, f"another process is using {self._folder}") from error
        finally:
            os.close(fd)

    def _refresh(self, updater: Updater) -> seen_versions.Seen:
        with _as_problems("the fleet's metadata"):
            updater.refresh()
        root = self._load(Root.type, Root)
        keys = {role: tuple(sorted(root.roles[role].keyids)) for role in _TOP_LEVEL}
        versions = {
            Timestamp.type: self._load(Timestamp.type, Timestamp).version,
            Snapshot.type: self._load(Snapshot.type, Snapshot).version,
            Targets.type: self._load(Targets.type, Targets).version,
            Root.type: root.version,
        }
        advanced = seen_versions.advance(seen_versions.load(self._folder / "seen.json"), versions, keys)
        self._sync_metadata()
        return advanced

    def _assignment(self, updater: Updater) -> Assignment:
        with _as_problems("the assignment"):
            target = updater.get_targetinfo(ASSIGNMENT_TARGET)
        if target is None:
            raise Problem(Reason.WRONG_RELEASE, "the fleet has no assignment yet: nothing to install")
        data = self._target(target, MAX_ASSIGNMENT_BYTES, "the assignment")
        self._sync_metadata()
        try:
            assignment = decode(data, Assignment, limit_bytes=MAX_ASSIGNMENT_BYTES)
        except ContractError as error:
            raise Problem(Reason.BAD_MANIFEST, f"the assignment: {error}") from error
        if assignment.fleet != self._identity.address.fleet:
            raise Problem(
                Reason.WRONG_RELEASE,
                f"the assignment is of fleet {assignment.fleet!r}, this device belongs to {self._identity.address.fleet!r}",
            )
        return assignment

    def _target(self, target: TargetFile, limit_bytes: int, what: str) -> bytes:
        """Bytes of a small target, size first, then its hash (specification section 5.7)."""
        if target.length > limit_bytes:
            raise Problem(Reason.BAD_MANIFEST, f"{what} has {target.length} bytes, more than the {limit_bytes} allowed")
        directory, slash, name = target.path.rpartition("/")
        path = f"{directory}{slash}{target.hashes['sha256']}.{name}" if "sha256" in target.hashes else target.path
        data = self._http.get(
            self._http.url(enrolment.TARGETS_PATH + path), limit_bytes=target.length, deadline_s=METADATA_DEADLINE_S
        )
        with _as_problems(what):
            target.verify_length_and_hashes(data)
        return data

    def _record(self, trusted: Targets) -> DeviceRecord:
        data = self._http.get(
            self._http.url(enrolment.RECORD_PATH), limit_bytes=MAX_RECORD_BYTES, deadline_s=METADATA_DEADLINE_S
        )
        record = verify_record(data, trusted)
        mine = self._identity.address
        if (record.fleet, record.device) != (mine.fleet, mine.device):
            raise Problem(
                Reason.WRONG_RELEASE,
                f"the device record is for {record.device!r} of fleet {record.fleet!r}, this is {mine.device!r} of {mine.fleet!r}",
            )
        if record.expires <= self._clock.wall():
            raise Problem(Reason.EXPIRED_METADATA, f"the device record expired at {clocks.text(record.expires)}")
        return record

    # -- what python-tuf keeps on disk --------------------------------------------------------------------------------------

    def _load(self, role: str, kind: type[_Role]) -> _Role:
        """A role as the refresh that just ended verified and stored it."""
        loaded = Metadata[kind].from_file(str(self._metadata / f"{role}.json")).signed  # type: ignore[valid-type]
        assert isinstance(loaded, kind)
        return loaded

    def _expiry(self) -> float:
        """When the first of the signatures behind an assignment expires."""
        moments = [
            self._load(Timestamp.type, Timestamp).expires,
            self._load(Snapshot.type, Snapshot).expires,
            self._load(Targets.type, Targets).expires,
            self._load(ASSIGNMENTS_ROLE, Targets).expires,
        ]
        return min(moments).timestamp()

    def _sync_metadata(self) -> None:
        """python-tuf renames without fsync: make what it wrote durable before anything relies on it."""
        for folder in (self._metadata / "root_history", self._metadata):
            for path in folder.glob("*.json"):
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            files.sync_directory(folder)

    def _keep(self, name: str, data: bytes) -> None:
        path = self._folder / name
        try:
            unchanged = path.read_bytes() == data
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            files.write(path, data, mode=0o600)


def verify_record(envelope: bytes, trusted: Targets) -> DeviceRecord:
    """The record inside a DSSE envelope that enough keys of the role `assignments` signed, as the trusted `targets` lists them.

    Raises: Problem BAD_SIGNATURE, BAD_MANIFEST.
    """
    if trusted.delegations is None or ASSIGNMENTS_ROLE not in (trusted.delegations.roles or {}):
        raise Problem(
            Reason.BAD_SIGNATURE, "the trusted metadata gives no key to assignments, so no device record can be verified"
        )
    role = (trusted.delegations.roles or {})[ASSIGNMENTS_ROLE]
    keys = [trusted.delegations.keys[keyid] for keyid in role.keyids if keyid in trusted.delegations.keys]
    try:
        parsed = Envelope.from_dict(json.loads(envelope))
    except Exception as error:  # securesystemslib raises KeyError, TypeError, FormatError… for a malformed envelope
        raise Problem(Reason.BAD_SIGNATURE, f"the device record is not a signed envelope: {error}") from error
    if parsed.payload_type != RECORD_PAYLOAD_TYPE:
        raise Problem(
            Reason.BAD_SIGNATURE,
            f"the device record has payload type {parsed.payload_type!r}, expected {RECORD_PAYLOAD_TYPE!r}",
        )
    try:
        parsed.verify(keys, role.threshold)
    except (VerificationError, ValueError) as error:
        raise Problem(
            Reason.BAD_SIGNATURE, f"the device record is not signed by the fleet's assignments key: {error}"
        ) from error
    try:
        return decode(parsed.payload, DeviceRecord, limit_bytes=MAX_RECORD_BYTES)
    except ContractError as error:
        raise Problem(Reason.BAD_MANIFEST, f"the device record: {error}") from error


@contextlib.contextmanager
def _as_problems(what: str) -> Iterator[None]:
    """What python-tuf raises, by whose fault it is. The order matters: special errors before the general ones they derive from."""
    try:
        yield
    except tuf_errors.ExpiredMetadataError as error:
        raise Problem(
            Reason.EXPIRED_METADATA, f"{what} has expired ({error}): the fleet server must renew it, or the clock is wrong"
        ) from error
    except tuf_errors.BadVersionNumberError as error:
        raise Problem(Reason.METADATA_ROLLBACK, f"{what} does not follow from what was verified before: {error}") from error
    except tuf_errors.LengthOrHashMismatchError as error:
        raise Problem(Reason.HASH_MISMATCH, f"{what} is not what its metadata lists: {error}") from error
    except tuf_errors.RepositoryError as error:  # includes UnsignedMetadataError
        raise Problem(Reason.BAD_SIGNATURE, f"{what} cannot be trusted: {error}") from error
    except tuf_errors.DownloadError as error:
        raise Problem(Reason.DOWNLOAD_FAILED, f"{what}: {error}") from error
    except OSError as error:
        raise store_problem(error, f"keeping {what}") from error
