"""The TUF repository on disk, as devices fetch it.

What is trusted is what timestamp.json leads to: timestamp → snapshot → targets, releases, assignments. A version that nothing leads
to was left by an interrupted change; nobody ever saw it and the next change writes over it. So every change is: target files,
role metadata, snapshot, timestamp, each durable before the next.

    root, targets   signed offline; targets only delegates
    releases, …     one role per publisher, signed offline, one version per publication
    assignments     signed here (online key), one target: the fleet's assignment
    snapshot, timestamp   signed here
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Key, Signer  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]

from agent.common import files
from agent.contract.assignment import ASSIGNMENT_TARGET, ISSUED_FIELD
from fleet_server.config import ExpirySettings
from fleet_server.errors import Invalid, NotFound, Refused, Unavailable
from fleet_server.releases import change as changes
from fleet_server.releases import publishers
from fleet_server.releases.change import OFFLINE_EXPIRY_S, Change, Draft, Opened
from fleet_server.releases.online import ONLINE, OnlineKeys
from fleet_server.releases.publishers import ASSIGNMENTS, RELEASES

MAX_RENEWAL_S = 90 * 86400.0  # how long a signature made online may last: it is the bound of a freeze
KEPT_VERSIONS = 16  # a device in the middle of a refresh still finds the versions its timestamp names
METADATA_NAME = re.compile(r"(timestamp|[1-9][0-9]{0,15}\.[A-Za-z0-9][A-Za-z0-9._-]{0,63})\.json")

MAX_PARTS, MAX_PART_CHARS = (
    8,
    200,
)  # no target has more; a longer name is an error to the filesystem, not a file that is missing

T = TypeVar("T", Timestamp, Snapshot, Targets, Root)


class RepositoryDamaged(Exception):
    """The repository on disk does not hold together; the message says which file."""


class Repository:
    """Reads and changes the repository. Changes are serialised; readers of the files need no lock.

    Raises: RepositoryDamaged from every method when trusted metadata is missing or cannot be read.
    """

    def __init__(
        self, metadata: Path, targets: Path, keys: OnlineKeys, expiry: ExpirySettings, clock: Callable[[], float]
    ) -> None:
        self._metadata, self._targets, self._keys, self._expiry, self._clock = metadata, targets, keys, expiry, clock
        self._lock = threading.RLock()
        self._pending = metadata.parent / "change-under-way.json"

    # -- making one --------------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, metadata: Path, targets: Path, keys: OnlineKeys, expiry: ExpirySettings, clock: Callable[[], float],
        *, root: CryptoSigner, releases: CryptoSigner, assignment: bytes,
    ) -> Repository:  # fmt: skip
        """The first version of everything. `root` and `releases` sign here once and are needed offline from then on."""
        repository = cls(metadata, targets, keys, expiry, clock)
        role = Root(expires=repository._in(OFFLINE_EXPIRY_S), consistent_snapshot=True)
        for name, signer in (("root", root), ("targets", root), ("snapshot", keys.snapshot), ("timestamp", keys.timestamp)):
            role.add_key(signer.public_key, name)
        repository._write_role("root", Metadata(role), root)
        delegations = Delegations(
            {s.public_key.keyid: s.public_key for s in (releases, keys.assignments)},
            {
                RELEASES: DelegatedRole(RELEASES, [releases.public_key.keyid], 1, True, paths=["releases/*/*"]),
                ASSIGNMENTS: DelegatedRole(ASSIGNMENTS, [keys.assignments.public_key.keyid], 1, True, paths=["assignments/*"]),
            },
        )
        top = Targets(expires=repository._in(OFFLINE_EXPIRY_S), delegations=delegations)
        repository._write_role("targets", Metadata(top), root)
        repository._write_role(RELEASES, Metadata(Targets(expires=repository._in(OFFLINE_EXPIRY_S))), releases)
        assigned = repository._assignments(1, assignment)
        repository._write_role(ASSIGNMENTS, assigned, keys.assignments)
        repository._write_snapshot(1, dict.fromkeys(("targets.json", f"{RELEASES}.json", f"{ASSIGNMENTS}.json"), 1))
        repository._write_timestamp(1, 1)
        return repository

    # -- reading -----------------------------------------------------------------------------------------------------------

    def root_bytes(self) -> bytes:
        """The newest root: what a device pins when it enrols."""
        versions = [int(path.name.split(".")[0]) for path in self._metadata.glob("*.root.json")]
        if not versions:
            raise RepositoryDamaged(f"{self._metadata} has no root metadata")
        return self._read_bytes(f"{max(versions)}.root.json")

    def role_bytes(self, role: str) -> bytes:
        """The trusted bytes of targets, releases or assignments."""
        return self._read_bytes(f"{self._versions()[f'{role}.json'].version}.{role}.json")

    def releases(self, publisher: str = RELEASES) -> Metadata[Targets] | None:
        """What a publisher has signed; None when that is nothing yet."""
        if f"{publisher}.json" not in self._versions():
            return None
        return self._parse(self.role_bytes(publisher), Targets, publisher)

    def publishers(self) -> dict[str, Metadata[Targets]]:
        """Every publisher that may sign and has signed something, in the order of the search."""
        found = {name: self.releases(name) for name in publishers.roles(self.targets_role().signed)}
        return {name: role for name, role in found.items() if role is not None}

    def publisher_of(self, model: str) -> str:
        """Raises: NotFound when nobody may sign releases of the model."""
        found = publishers.of(self.targets_role().signed, model)
        if found is None:
            raise NotFound(f"no publisher may sign releases of {model!r}; `edge-fleet publisher list` shows who signs what")
        return found

    def root_role(self) -> Metadata[Root]:
        return self._parse(self.root_bytes(), Root, "root")

    def targets_role(self) -> Metadata[Targets]:
        return self._parse(self.role_bytes("targets"), Targets, "targets")

    def assignment_bytes(self) -> bytes:
        """The signed assignment's document."""
        info = self._parse(self.role_bytes(ASSIGNMENTS), Targets, ASSIGNMENTS).signed.targets[ASSIGNMENT_TARGET]
        return self.target_bytes(info)

    def target_bytes(self, info: TargetFile) -> bytes:
        path = self.target_path(info.path, info.hashes["sha256"])
        try:
            data = path.read_bytes()
            info.verify_length_and_hashes(data)
        except (OSError, RepositoryError) as error:
            raise RepositoryDamaged(f"{path} is missing or damaged: {error}") from error
        return data

    def target_path(self, name: str, sha256: str) -> Path:
        """Where a target stands: consistent-snapshot names, `dir/<sha256>.<file>`."""
        directory, _, base = name.rpartition("/")
        return self._targets / directory / f"{sha256}.{base}"

    def metadata_path(self, name: str) -> Path | None:
        """The file a device asks for; None when no metadata can have that name."""
        return self._metadata / name if METADATA_NAME.fullmatch(name) else None

    def served_target(self, name: str) -> Path | None:
        """The target file a device asks for, by its consistent-snapshot name; None when there is none of that name."""
        parts = name.split("/")
        if any(not part or part.startswith(".") or len(part) > MAX_PART_CHARS for part in parts) or len(parts) > MAX_PARTS:
            return None
        path = self._targets.joinpath(*parts)
        return path if path.is_file() else None

    def expirations(self) -> dict[str, float]:
        """When each trusted role ends, seconds since the epoch: root, targets, publishers, then the online ones."""
        found = {"root": self.root_role().signed.expires, "targets": self.targets_role().signed.expires}
        found |= {name: role.signed.expires for name, role in self.publishers().items()}
        found[ASSIGNMENTS] = self._parse(self.role_bytes(ASSIGNMENTS), Targets, ASSIGNMENTS).signed.expires
        found["snapshot"], found["timestamp"] = self._snapshot().signed.expires, self._timestamp().signed.expires
        return {role: at.timestamp() for role, at in found.items()}

    def versions(self) -> dict[str, int]:
        """The version of each trusted role."""
        found = {name.removesuffix(".json"): info.version for name, info in self._versions().items()}
        stamp = self._timestamp().signed
        return {
            **found,
            "root": self.root_role().signed.version,
            "timestamp": stamp.version,
            "snapshot": stamp.snapshot_meta.version,
        }

    # -- changing ----------------------------------------------------------------------------------------------------------

    def publish(self, target: TargetFile, manifest: bytes, metadata: bytes, version: int, publisher: str = RELEASES) -> None:
        """Makes an already verified version of a publisher's role trusted: the manifest, then the role, then snapshot and timestamp."""
        with self._lock:
            self._write_target(target.path, target.hashes["sha256"], manifest)
            self.publish_role(publisher, metadata, version)

    def publish_role(self, publisher: str, metadata: bytes, version: int) -> None:
        """The same for a version that adds no manifest."""
        with self._lock:
            files.write(self._metadata / f"{version}.{publisher}.json", metadata)
            self._advance({f"{publisher}.json": version})

    def assign(self, document: bytes) -> None:
        """Signs the assignment and makes it trusted."""
        with self._lock:
            version = self._versions()[f"{ASSIGNMENTS}.json"].version + 1
            self._write_role(ASSIGNMENTS, self._assignments(version, document), self._keys.assignments)
            self._advance({f"{ASSIGNMENTS}.json": version})

    def renew(self, *, oldest_s: float | None = None) -> list[str]:
        """Signs again what has less than half of its time left, and a timestamp that is older than `oldest_s`; what it renewed."""
        with self._lock:
            now, renewed = self._clock(), []
            assignments = self._parse(self.role_bytes(ASSIGNMENTS), Targets, ASSIGNMENTS)
            if assignments.signed.expires.timestamp() - now < self._expiry.assignments_s / 2:
                self.assign(self.assignment_bytes())
                return [ASSIGNMENTS, "snapshot", "timestamp"]
            if self._snapshot().signed.expires.timestamp() - now < self._expiry.snapshot_s / 2:
                self._advance({})
                renewed = ["snapshot", "timestamp"]
            elif self._timestamp_due(now, oldest_s):
                timestamp = self._timestamp().signed
                self._write_timestamp(timestamp.version + 1, timestamp.snapshot_meta.version)
                renewed = ["timestamp"]
            return renewed

    def renew_for(self, seconds: float) -> None:
        """Signs what is signed online anew, to be believed for the usual time or for these seconds if they are more, until the next change.

        Raises: Invalid.
        """
        if seconds > MAX_RENEWAL_S:
            raise Invalid(f"a signature may last {MAX_RENEWAL_S / 86400:.0f} days at most")
        with self._lock:
            usual = self._expiry
            try:
                self._expiry = msgspec.structs.replace(
                    usual,
                    assignments_s=max(usual.assignments_s, seconds),
                    snapshot_s=max(usual.snapshot_s, seconds),
                    timestamp_s=max(usual.timestamp_s, seconds),
                )
                self.assign(self.assignment_bytes())
            finally:
                self._expiry = usual

    def in_force(self) -> tuple[dict[str, bytes], Callable[[str], dict[str, bytes]], float]:
        """What a device needs to verify the current state, by the paths it asks for; what adds a target of that name; and until when it
        is believed (seconds since the epoch).
        """
        with self._lock:
            names = [path.name for path in sorted(self._metadata.glob("*.root.json"), key=lambda p: int(p.name.split(".")[0]))]
            names += ["timestamp.json", f"{self._timestamp().signed.snapshot_meta.version}.snapshot.json"]
            names += [f"{info.version}.{name}" for name, info in self._versions().items()]
            documents = {f"metadata/{name}": self._read_bytes(name) for name in names}
            listed = dict(self._parse(self.role_bytes(ASSIGNMENTS), Targets, ASSIGNMENTS).signed.targets)
            for role in self.publishers().values():
                listed |= role.signed.targets

            def target(path: str) -> dict[str, bytes]:
                where = self.target_path(path, listed[path].hashes["sha256"])
                return {f"targets/{where.relative_to(self._targets)}": where.read_bytes()}

            online = {role: at for role, at in self.expirations().items() if role in {*ONLINE, "root", "targets"}}
            return {**documents, **target(ASSIGNMENT_TARGET)}, target, min(online.values())

    def _timestamp_due(self, now: float, oldest_s: float | None) -> bool:
        timestamp = self._timestamp().signed
        issued = timestamp.unrecognized_fields.get(ISSUED_FIELD, 0)
        too_old = oldest_s is not None and now - float(issued) >= oldest_s
        return too_old or timestamp.expires.timestamp() - now < self._expiry.timestamp_s / 2

    # -- who is trusted ----------------------------------------------------------------------------------------------------

    def draft(self) -> Draft:
        """What is in force, to be changed and signed offline."""
        with self._lock:
            return Draft(self.root_role(), self.targets_role(), self._all_roles(), self._clock())

    def propose_online_keys(self, roles: list[str]) -> dict[str, Key]:
        """New keys of the server's own, used once a root names them."""
        with self._lock:
            return self._keys.propose(roles)

    def apply(self, change: Change) -> Opened:
        """Makes a signed change of keys trusted, and signs everything online anew.  Raises: see change.check; Refused."""
        with self._lock:
            opened = changes.check(change, self.root_role(), self.targets_role(), self._all_roles(), self._clock())
            for role, keyids in _online_keyids(opened.next_root, opened.next_targets).items():
                if not self._keys.holds(role, keyids):
                    raise Refused(
                        f"the server holds no key that this change names for {role}: it was made elsewhere, or a later proposal "
                        "replaced it; propose the change anew",
                        code="unknown_online_key",
                    )
            files.write(self._pending, changes.write(change))
            self._carry_out(opened)
            return opened

    def renew_offline(self, root: Signer, releases: Signer | None) -> list[str]:
        """Signs root and targets for another year, with its own key the role `releases` too; what it renewed.  Raises: see `apply`."""
        renewed = ["root", "targets", *([RELEASES] if releases else [])]
        draft = self.draft()
        for role in renewed:
            draft.renew(role)
        opened = Opened(draft.change())
        for signer in (root, releases):
            if signer is not None:
                opened.sign(signer)
        self.apply(opened.closed())
        return renewed

    def replace_online_keys(self, signers: Sequence[Signer]) -> list[str]:
        """New keys for everything that the server signs; what changed, in sentences.  Raises: see `apply`."""
        draft = self.draft()
        draft.use_online(self.propose_online_keys(list(ONLINE)))
        opened = Opened(draft.change())
        for signer in signers:
            opened.sign(signer)
        return self.apply(opened.closed()).differences()

    def finish_change(self) -> bool:
        """Carries out a change that an interrupted server had begun. Whether there was one."""
        with self._lock:
            try:
                data = self._pending.read_bytes()
            except FileNotFoundError:
                return False
            self._carry_out(Opened(changes.read(data)))
            return True

    def _carry_out(self, opened: Opened) -> None:
        """Every step can be done again. A device that asks between two of them is told to try later by a signature that does not fit."""
        changed: dict[str, int] = {}
        documents = {**opened.roles, **({"targets": opened.targets} if opened.targets is not None else {})}
        for name, metadata in documents.items():
            files.write(self._metadata / f"{metadata.signed.version}.{name}.json", metadata.to_bytes())
            changed[f"{name}.json"] = metadata.signed.version
        self._keys.adopt(_online_keyids(opened.next_root, opened.next_targets))
        document = self.assignment_bytes()
        version = self._versions()[f"{ASSIGNMENTS}.json"].version + 1
        self._write_role(ASSIGNMENTS, self._assignments(version, document), self._keys.assignments)
        if opened.root is not None:
            files.write(self._metadata / f"{opened.root.signed.version}.root.json", opened.root.to_bytes())
        self._advance({**changed, f"{ASSIGNMENTS}.json": version})
        self._keys.settle()
        self._pending.unlink(missing_ok=True)
        files.sync_directory(self._pending.parent)

    def _all_roles(self) -> dict[str, Metadata[Targets]]:
        """Every publisher's role that snapshots ever named, also of publishers that may no longer sign."""
        names = [name.removesuffix(".json") for name in self._versions()]
        found = {name: self.releases(name) for name in names if name not in {"targets", ASSIGNMENTS}}
        return {name: role for name, role in found.items() if role is not None}

    @property
    def record_keyid(self) -> str:
        """The key that device records are signed with."""
        return str(self._keys.assignments.public_key.keyid)

    def sign_record(self, record: bytes, payload_type: str) -> dict[str, object]:
        """A device record in its envelope, signed by the online assignments key."""
        envelope = Envelope(record, payload_type, {})
        envelope.sign(self._keys.assignments)
        signed: dict[str, object] = envelope.to_dict()
        return signed

    def check(self) -> None:
        """Raises: RepositoryDamaged when what timestamp.json leads to is not complete; Unavailable when it was signed by other keys."""
        root = self._parse(self.root_bytes(), Root, "root")
        targets = self.targets_role()
        try:
            root.signed.verify_delegate("timestamp", self._timestamp().signed_bytes, self._timestamp().signatures)
            root.signed.verify_delegate("snapshot", self._snapshot().signed_bytes, self._snapshot().signatures)
            root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
            for role in (*self.publishers(), ASSIGNMENTS):
                found = self._parse(self.role_bytes(role), Targets, role)
                targets.signed.verify_delegate(role, found.signed_bytes, found.signatures)
        except (UnsignedMetadataError, VerificationError) as error:
            raise Unavailable(f"the repository's metadata does not verify: {error}; restore it from a backup") from error
        self.assignment_bytes()
        for published in self.publishers().values():
            for info in published.signed.targets.values():
                self.target_bytes(info)

    # -- pieces ------------------------------------------------------------------------------------------------------------

    def _advance(self, changed: dict[str, int]) -> None:
        """A new snapshot with the changed roles, then the timestamp that makes it trusted."""
        old = self._snapshot().signed
        version = old.version + 1
        self._write_snapshot(version, {**{name: info.version for name, info in old.meta.items()}, **changed})
        self._write_timestamp(self._timestamp().signed.version + 1, version)
        self._prune(version)

    def _assignments(self, version: int, document: bytes) -> Metadata[Targets]:
        info = TargetFile.from_data(ASSIGNMENT_TARGET, document, ["sha256"])
        self._write_target(ASSIGNMENT_TARGET, info.hashes["sha256"], document)
        return Metadata(
            Targets(version=version, expires=self._in(self._expiry.assignments_s), targets={ASSIGNMENT_TARGET: info})
        )

    def _write_target(self, name: str, sha256: str, data: bytes) -> None:
        path = self.target_path(name, sha256)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return
        files.make_directory(path.parent)
        files.write(path, data)

    def _write_role(self, name: str, metadata: Metadata[T], signer: CryptoSigner) -> None:
        metadata.sign(signer)
        files.write(self._metadata / f"{metadata.signed.version}.{name}.json", metadata.to_bytes())

    def _write_snapshot(self, version: int, roles: dict[str, int]) -> None:
        """Names each role's version and the hash of its bytes. A number alone is not enough: after a restore the next version of a
        publisher's role has a number that devices may hold already, rightly signed and with other releases in it.
        """
        meta = {}
        for name, number in roles.items():
            data = self._read_bytes(f"{number}.{name}")
            meta[name] = MetaFile(number, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
        snapshot = Metadata(Snapshot(version=version, expires=self._in(self._expiry.snapshot_s), meta=meta))
        self._write_role("snapshot", snapshot, self._keys.snapshot)

    def _write_timestamp(self, version: int, snapshot_version: int) -> None:
        timestamp = Metadata(
            Timestamp(
                version=version,
                expires=self._in(self._expiry.timestamp_s),
                snapshot_meta=MetaFile(snapshot_version),
                unrecognized_fields={ISSUED_FIELD: int(self._clock())},
            )
        )
        timestamp.sign(self._keys.timestamp)
        files.write(self._metadata / "timestamp.json", timestamp.to_bytes())

    def _prune(self, snapshot_version: int) -> None:
        """Removes what no device in the middle of a refresh can still ask for. Root versions and releases are never removed."""
        current = {"snapshot": snapshot_version, ASSIGNMENTS: self._versions()[f"{ASSIGNMENTS}.json"].version}
        for role, version in current.items():
            for path in self._metadata.glob(f"*.{role}.json"):
                if int(path.name.split(".")[0]) <= version - KEPT_VERSIONS:
                    path.unlink(missing_ok=True)
        kept = set()
        for path in self._metadata.glob(f"*.{ASSIGNMENTS}.json"):
            info = self._parse(path.read_bytes(), Targets, ASSIGNMENTS).signed.targets[ASSIGNMENT_TARGET]
            kept.add(self.target_path(ASSIGNMENT_TARGET, info.hashes["sha256"]))
        for path in (self._targets / "assignments").glob("*.fleet.json"):
            if path not in kept and not path.name.startswith("."):
                path.unlink(missing_ok=True)

    def _versions(self) -> dict[str, MetaFile]:
        return self._snapshot().signed.meta

    def _timestamp(self) -> Metadata[Timestamp]:
        return self._parse(self._read_bytes("timestamp.json"), Timestamp, "timestamp")

    def _snapshot(self) -> Metadata[Snapshot]:
        version = self._timestamp().signed.snapshot_meta.version
        return self._parse(self._read_bytes(f"{version}.snapshot.json"), Snapshot, "snapshot")

    def _parse(self, data: bytes, kind: type[T], name: str) -> Metadata[T]:
        try:
            metadata = Metadata[T].from_bytes(data)
        except RepositoryError as error:
            raise RepositoryDamaged(f"{name} metadata below {self._metadata} cannot be read: {error}") from error
        if not isinstance(metadata.signed, kind):
            raise RepositoryDamaged(f"{name} metadata below {self._metadata} is of type {metadata.signed.type!r}")
        return metadata

    def _read_bytes(self, name: str) -> bytes:
        path = self._metadata / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise RepositoryDamaged(f"{path} cannot be read: {error}; restore the repository from a backup") from error

    def _in(self, seconds: float) -> dt.datetime:
        moment = dt.datetime.fromtimestamp(self._clock() + seconds, tz=dt.timezone.utc)
        return moment.replace(microsecond=0)


def _online_keyids(root: Root, targets: Targets) -> dict[str, list[str]]:
    """The keys that may sign what the server signs."""
    assignments = targets.get_delegated_role(ASSIGNMENTS)
    return {role: assignments.keyids if role == ASSIGNMENTS else root.roles[role].keyids for role in ONLINE}
