"""The trust client: bytes from the network become trusted documents here and nowhere else.

Rules, in the order they are applied:
 1. the time is the signed clock's: the machine's, but never before what something signed proved to be past;
 2. metadata is verified by the TUF client workflow (`metadata.py`), always from the root received at enrolment;
 3. no role's version may be lower than the highest this device ever verified (`versions.py`);
 4. the assignment comes from the role `assignments`, is of this fleet, and its version never goes down;
 5. the device record is signed by the keys that the trusted `targets` gives to `assignments`, is for this device, has not
    expired, and its serial never goes down;
 6. what an assignment once withdrew stays withdrawn, until the publisher signs otherwise (`withdrawals.py`);
 7. a manifest comes from the role of the publisher that may sign its model, has the length and hash listed there, and describes
    the release asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]

from agent.contract import enrolment
from agent.contract.assignment import (
    ASSIGNMENT_TARGET,
    ISSUED_FIELD,
    MAX_ASSIGNMENT_BYTES,
    MAX_RECORD_BYTES,
    RECORD_PAYLOAD_TYPE,
    Assignment,
    DeviceRecord,
    read_assignment,
)
from agent.contract.codec import ContractError, Unreadable, decode, encode
from agent.contract.manifest import MAX_MANIFEST_BYTES, parse_manifest
from agent.contract.names import ReleaseRef
from agent.contract.news import RECORD, TIMESTAMP, News
from agent.contract.reasons import Reason
from agent.host import clock as clocks
from agent.host.clock import SignedClock
from agent.sync.identity import Identity
from agent.sync.ports import Signed
from agent.sync.problems import Problem
from agent.sync.trust import versions, withdrawals
from agent.sync.trust.carried import Carried, NotCarried
from agent.sync.trust.desired import Desired, read_desired
from agent.sync.trust.metadata import METADATA_DEADLINE_S, Documents, MetadataClient, Session, as_problems, keep

log = logging.getLogger(__name__)

ASSIGNMENTS_ROLE = "assignments"


class Trust:
    """Verifies the fleet's documents. Thread-safe; one process per folder."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        http: Documents,
        clock: SignedClock,
        others: Callable[[], Sequence[Documents]] = tuple,
    ) -> None:
        """`others` are ways to the documents that are asked while the fleet server (`http`) cannot be reached."""
        self._folder = folder
        self._identity = identity
        self._http = http
        self._clock = clock
        self._client = MetadataClient(
            memory=folder,
            metadata=folder / "metadata",
            root=identity.root,
            http=http,
            clock=clock,
            others=others,
        )
        self._settled = False
        """Whether the last word was verified to its end."""
        self._news: News | None = None
        """What a poke said last, if nothing newer is known: it may have the manifest that is wanted next."""

    def close(self) -> None:
        self._http.close()

    def remembered(self) -> Desired | None:
        """What was last verified, perhaps by an earlier process; None before the first time or when it cannot be read."""
        try:
            return read_desired((self._folder / "desired.json").read_bytes())
        except (FileNotFoundError, ContractError):
            return None

    def refresh(self, only: Documents | None = None) -> Desired:
        """The fleet's current word, verified and remembered; with `only`, as it is told there.

        Raises: Problem; what was remembered before stays as it is.
        """
        desired = self._refreshed(only)
        self._news = None
        return desired

    def hear(self, news: News) -> Desired | None:
        """The fleet's word as a poke carries it, verified and remembered like any other, without asking anybody; None when it
        is what is known already.

        Raises: NotCarried; Problem. What was remembered before stays as it is.
        """
        told, record = news.documents.get(TIMESTAMP), news.documents.get(RECORD)
        if told is None:
            raise NotCarried(TIMESTAMP)
        known = self._kept("metadata/timestamp.json") == told.encode()
        if known and (record is None or self._kept("record.json") == record.encode()) and self._settled:
            return None
        desired = self._refreshed(Carried(news, self._kept_documents()))
        self._news = news
        return desired

    def _kept_documents(self) -> dict[str, Callable[[], bytes | None]]:
        return {enrolment.RECORD_PATH: lambda: self._kept("record.json")}

    def _kept(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None

    def _refreshed(self, only: Documents | None) -> Desired:
        self._settled = False
        with self._client.session(only) as session, as_problems("the fleet's word"):
            assignment, sha256 = self._assignment(session)
            trusted = session.role(Targets.type, Targets)
            envelope, record = self._record(session, trusted)
            seen = self._advanced(session, assignment, sha256, record)
            issued, before, now = _issued(session), self.remembered(), self._clock.wall()
            desired = Desired(
                issued=issued,
                heard_at=before.heard_at if before is not None and issued == before.issued else now,
                assignment=assignment,
                record=record,
                withdrawn_before=withdrawals.refused(seen.withdrawn),
                verified_at=now,
                valid_until=min(record.expires, _expiry(session)),
                metadata=_identity(session),
            )
            self._client.keep(seen)
            keep(self._folder / "desired.json", encode(desired))
            keep(self._folder / "record.json", envelope)
            self._settled = True
            return desired

    def manifest(self, ref: ReleaseRef) -> Signed:
        """The manifest of `ref` as its publisher signed it.  Raises: Problem."""
        if (news := self._news) is not None:
            try:
                return self._manifest(ref, Carried(news, self._kept_documents(), beside=self._http))
            except Problem as problem:
                if problem.wait_s:
                    raise
                log.debug("the manifest of %s cannot be had by what a poke carried: %s", ref, problem)
        return self._manifest(ref, None)

    def _manifest(self, ref: ReleaseRef, only: Documents | None) -> Signed:
        what = f"the manifest of release {ref}"
        with self._client.session(only) as session, as_problems(what):
            self._client.keep(session.seen)
            target = session.info(ref.target_path, f"release {ref}")
            if target is None:
                raise Problem(Reason.WRONG_RELEASE, f"release {ref} is not among the releases that publishers signed")
            data = self._fetch(session, target, MAX_MANIFEST_BYTES, what)
        try:
            manifest = parse_manifest(data, expected=ref)
        except ContractError as error:
            raise _broken(f"release {ref}", error) from error
        except ValueError as error:
            raise Problem(Reason.WRONG_RELEASE, str(error)) from error
        return Signed(data, hashlib.sha256(data).hexdigest(), manifest)

    def _advanced(self, session: Session, assignment: Assignment, sha256: str, record: DeviceRecord) -> versions.SeenVersions:
        """What this device knows from now on of versions and withdrawals."""
        before = session.seen
        seen = versions.advance_documents(before, assignment.version, sha256, record.serial)
        if assignment.version == before.assignment:
            return seen

        def count(ref: ReleaseRef) -> int | None:
            try:
                info = session.info(ref.target_path, f"release {ref}")
            except Problem as error:
                raise LookupError(str(error)) from error
            return withdrawals.reinstatements(info.custom) if info is not None else None

        return msgspec.structs.replace(seen, withdrawn=withdrawals.remember(seen.withdrawn, assignment, count))

    def _assignment(self, session: Session) -> tuple[Assignment, str]:
        """The assignment, and the sha256 of its bytes."""
        target = session.info(ASSIGNMENT_TARGET, "the assignment")
        if target is None:
            raise Problem(Reason.WRONG_RELEASE, "the fleet has no assignment yet: nothing to install")
        data = self._kept_assignment(target) or self._fetch(session, target, MAX_ASSIGNMENT_BYTES, "the assignment")
        try:
            assignment = read_assignment(data)
        except ContractError as error:
            raise _broken("the assignment", error) from error
        if assignment.fleet != self._identity.address.fleet:
            raise Problem(
                Reason.WRONG_FLEET,
                f"the assignment is of fleet {assignment.fleet!r}, this device belongs to {self._identity.address.fleet!r}",
            )
        keep(self._folder / "assignment.json", data)
        return assignment, hashlib.sha256(data).hexdigest()

    def _kept_assignment(self, target: TargetFile) -> bytes | None:
        """The document that was verified last, when it is the one that is listed now."""
        data = self._kept("assignment.json")
        try:
            target.verify_length_and_hashes(data or b"")
        except LengthOrHashMismatchError:
            return None
        return data

    def _fetch(self, session: Session, target: TargetFile, limit_bytes: int, what: str) -> bytes:
        if target.length > limit_bytes:
            raise Problem(Reason.UNREADABLE, f"{what} has {target.length} bytes, more than the {limit_bytes} allowed")
        return session.fetch(target, session.http.url(enrolment.TARGETS_PATH), what)

    def _record(self, session: Session, trusted: Targets) -> tuple[bytes, DeviceRecord]:
        """The device record, in its envelope and out of it."""
        data = session.http.get(
            session.http.url(enrolment.RECORD_PATH), limit_bytes=MAX_RECORD_BYTES, deadline_s=METADATA_DEADLINE_S
        )
        record = verify_record(data, trusted)
        mine = self._identity.address
        if (record.fleet, record.device) != (mine.fleet, mine.device):
            raise Problem(
                Reason.WRONG_FLEET,
                f"the device record is for {record.device!r} of fleet {record.fleet!r}, this is {mine.device!r} of {mine.fleet!r}",
            )
        if record.expires <= self._clock.wall():
            raise Problem(Reason.EXPIRED_METADATA, f"the device record expired at {clocks.text(record.expires)}")
        return data, record


def _identity(session: Session) -> str:
    """Changes with whatever is signed about releases and keys, and not with each renewal of the timestamp or of the
    assignment.
    """
    snapshot, root = session.role(Snapshot.type, Snapshot), session.role(Root.type, Root)
    roles = {name: (info.version, info.hashes) for name, info in snapshot.meta.items() if name != f"{ASSIGNMENTS_ROLE}.json"}
    said = json.dumps([root.version, sorted(roles.items())], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _expiry(session: Session) -> float:
    """When the first of the signatures behind an assignment expires."""
    moments = [
        session.role(Timestamp.type, Timestamp).expires,
        session.role(Snapshot.type, Snapshot).expires,
        session.role(Targets.type, Targets).expires,
        session.role(ASSIGNMENTS_ROLE, Targets).expires,
    ]
    return min(moments).timestamp()


def _issued(session: Session) -> float:
    """When the server signed the timestamp; 0 for a server that does not say."""
    issued = session.role(Timestamp.type, Timestamp).unrecognized_fields.get(ISSUED_FIELD)
    return float(issued) if isinstance(issued, int) else 0.0


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
        raise _broken("the device record", error) from error


def _broken(what: str, error: ContractError) -> Problem:
    reason = Reason.UNREADABLE if isinstance(error, Unreadable) else Reason.BAD_MANIFEST
    return Problem(reason, f"{what}: {error}")
