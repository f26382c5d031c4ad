"""The TUF repository, as devices fetch it.

What is trusted is what timestamp.json leads to: timestamp → snapshot → targets, releases, assignments. A version that nothing
leads to was left by an interrupted change; nobody ever saw it and the next change writes over it. So every change is: target
files, role metadata, snapshot, timestamp, each durable before the next. In the database a change is one transaction.

    root, targets   signed offline; targets only delegates
    releases, …     one role per publisher, signed offline, one version per publication
    assignments     signed here (online key), one target: the fleet's assignment
    snapshot, timestamp   signed here
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, TargetFile, Targets  # type: ignore[attr-defined]

from agent.contract.assignment import ASSIGNMENT_TARGET
from fleet_server.config import ExpirySettings
from fleet_server.errors import Invalid, NotFound, Unavailable
from fleet_server.releases import delegations
from fleet_server.releases.delegations import ASSIGNMENTS, RELEASES
from fleet_server.releases.key_change import OFFLINE_EXPIRY_S
from fleet_server.releases.metadata_files import MetadataFiles
from fleet_server.releases.online_keys import ONLINE, OnlineKeys
from fleet_server.releases.online_roles import OnlineRoles
from fleet_server.releases.target_files import TargetFiles
from fleet_server.storage.documents import Documents

MAX_RENEWAL_S = 90 * 86400.0  # how long a signature made online may last: it is the bound of a freeze


class Repository:
    """Reads and changes the repository. Changes are serialised; readers of the documents need no lock.

    Raises: RepositoryDamaged from every method when trusted metadata is missing or cannot be read.
    """

    def __init__(self, documents: Documents, keys: OnlineKeys, expiry: ExpirySettings, clock: Callable[[], float]) -> None:
        self.documents = documents
        self.metadata, self.targets = MetadataFiles(documents), TargetFiles(documents)
        self.online = OnlineRoles(self.metadata, self.targets, keys, expiry, clock)
        self.lock = threading.RLock()
        """For a change: one is under way at a time."""

    @classmethod
    def create(
        cls, documents: Documents, keys: OnlineKeys, expiry: ExpirySettings, clock: Callable[[], float],
        *, root: CryptoSigner, releases: CryptoSigner, assignment: bytes,
    ) -> Repository:  # fmt: skip
        """The first version of everything. `root` and `releases` sign here once and are needed offline from then on."""
        repository = cls(documents, keys, expiry, clock)
        online, ends = repository.online, repository.online.ends(OFFLINE_EXPIRY_S)
        role = Root(expires=ends, consistent_snapshot=True)
        for name, signer in (("root", root), ("targets", root), ("snapshot", keys.snapshot), ("timestamp", keys.timestamp)):
            role.add_key(signer.public_key, name)
        delegated = Delegations(
            {s.public_key.keyid: s.public_key for s in (releases, keys.assignments)},
            {
                RELEASES: DelegatedRole(RELEASES, [releases.public_key.keyid], 1, True, paths=["releases/*/*"]),
                ASSIGNMENTS: DelegatedRole(ASSIGNMENTS, [keys.assignments.public_key.keyid], 1, True, paths=["assignments/*"]),
            },
        )
        offline: tuple[tuple[str, Metadata[Root] | Metadata[Targets], CryptoSigner], ...] = (
            ("root", Metadata(role), root),
            ("targets", Metadata(Targets(expires=ends, delegations=delegated)), root),
            (RELEASES, Metadata(Targets(expires=ends)), releases),
        )
        for name, made, signer in offline:
            made.sign(signer)
            repository.metadata.write_role(name, made)
        online.write_assignment(1, assignment)
        online.write_snapshot(1, dict.fromkeys(("targets.json", f"{RELEASES}.json", f"{ASSIGNMENTS}.json"), 1))
        online.write_timestamp(1, 1)
        return repository

    # -- who is trusted, and for what --------------------------------------------------------------------------------------

    def root_role(self) -> Metadata[Root]:
        """The newest root: what a device trusts from its enrolment on."""
        return self.metadata.root()

    def root_bytes(self) -> bytes:
        return self.metadata.data(self.metadata.roots()[-1])

    def targets_role(self) -> Metadata[Targets]:
        """Who may sign releases, and with which keys."""
        return self.metadata.role("targets")

    def role_bytes(self, role: str) -> bytes:
        """The trusted bytes of targets, assignments, or a publisher's role."""
        return self.metadata.role_bytes(role)

    def releases(self, publisher: str = RELEASES) -> Metadata[Targets] | None:
        """What a publisher has signed; None when that is nothing yet."""
        if f"{publisher}.json" not in self.metadata.versions():
            return None
        return self.metadata.role(publisher)

    def publishers(self) -> dict[str, Metadata[Targets]]:
        """Every publisher that may sign and has signed something, in the order of the search."""
        found = {name: self.releases(name) for name in delegations.roles(self.targets_role().signed)}
        return {name: role for name, role in found.items() if role is not None}

    def all_publishers(self) -> dict[str, Metadata[Targets]]:
        """Every publisher's role that snapshots ever named, also of publishers that may no longer sign."""
        names = [name.removesuffix(".json") for name in self.metadata.versions()]
        return {name: self.metadata.role(name) for name in names if name not in {"targets", ASSIGNMENTS}}

    def publisher_of(self, model: str) -> str:
        """Raises: NotFound when nobody may sign releases of the model."""
        found = delegations.of(self.targets_role().signed, model)
        if found is None:
            raise NotFound(f"no publisher may sign releases of {model!r}; `edge-fleet publisher list` shows who signs what")
        return found

    def expirations(self) -> dict[str, float]:
        """When each trusted role ends, seconds since the epoch: root, targets, publishers, then the online ones."""
        found = {"root": self.root_role().signed.expires, "targets": self.targets_role().signed.expires}
        found |= {name: role.signed.expires for name, role in self.publishers().items()}
        found[ASSIGNMENTS] = self.metadata.role(ASSIGNMENTS).signed.expires
        found["snapshot"] = self.metadata.snapshot().signed.expires
        found["timestamp"] = self.metadata.timestamp().signed.expires
        return {role: at.timestamp() for role, at in found.items()}

    def versions(self) -> dict[str, int]:
        """The version of each trusted role."""
        found = {name.removesuffix(".json"): info.version for name, info in self.metadata.versions().items()}
        stamp = self.metadata.timestamp().signed
        online = {"timestamp": stamp.version, "snapshot": stamp.snapshot_meta.version}
        return {**found, "root": self.root_role().signed.version, **online}

    # -- documents ---------------------------------------------------------------------------------------------------------

    def assignment_bytes(self) -> bytes:
        """The signed assignment's document."""
        return self.online.assignment_bytes()

    def target_bytes(self, info: TargetFile) -> bytes:
        """The verified bytes of a target, such as a manifest."""
        return self.targets.read(info)

    def in_force(self) -> tuple[dict[str, bytes], Callable[[str], dict[str, bytes]], float]:
        """What a device needs to verify the current state, by the paths it asks for; what adds a target of that name; and until
        when it is believed (seconds since the epoch).
        """
        with self.lock:
            names = [*self.metadata.roots(), "timestamp.json", f"{self.metadata.snapshot().signed.version}.snapshot.json"]
            names += [f"{info.version}.{name}" for name, info in self.metadata.versions().items()]
            documents = {f"metadata/{name}": self.metadata.data(name) for name in names}
            listed = dict(self.metadata.role(ASSIGNMENTS).signed.targets)
            for role in self.publishers().values():
                listed |= role.signed.targets

            def target(path: str) -> dict[str, bytes]:
                return {self.targets.name(listed[path]): self.targets.read(listed[path])}

            online = {role: at for role, at in self.expirations().items() if role in {*ONLINE, "root", "targets"}}
            return {**documents, **target(ASSIGNMENT_TARGET)}, target, min(online.values())

    @property
    def record_keyid(self) -> str:
        """The key that device records are signed with, as devices are told."""
        keyids = self.targets_role().signed.get_delegated_role(ASSIGNMENTS).keyids
        return str(keyids[0])

    def sign_record(self, record: bytes, payload_type: str) -> dict[str, object]:
        """A device record in its envelope, signed by the online assignments key."""
        envelope = Envelope(record, payload_type, {})
        envelope.sign(self.online.keys.assignments)
        signed: dict[str, object] = envelope.to_dict()
        return signed

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """For a change: one is under way at a time, and it is stored in one step where that can be."""
        with self.lock, self.documents.together():
            yield

    # -- changing ----------------------------------------------------------------------------------------------------------

    def publish(self, target: TargetFile, manifest: bytes, metadata: bytes, version: int, publisher: str = RELEASES) -> None:
        """Makes an already verified version of a publisher's role trusted: the manifest, then the role, then snapshot and
        timestamp.
        """
        with self.changing():
            self.targets.write(target, manifest)
            self.publish_role(publisher, metadata, version)

    def publish_role(self, publisher: str, metadata: bytes, version: int) -> None:
        """Makes an already verified version of a publisher's role trusted that adds no manifest."""
        with self.changing():
            self.metadata.write(f"{version}.{publisher}.json", metadata)
            self.online.advance({f"{publisher}.json": version})

    def assign(self, document: bytes) -> None:
        """Signs the assignment and makes it trusted."""
        with self.changing():
            self.online.assign(document)

    def renew(self, *, oldest_s: float | None = None) -> list[str]:
        """Signs again what has less than half of its time left, and a timestamp older than `oldest_s`; what it renewed."""
        with self.lock:
            due = self.online.due(oldest_s)
            if due:
                with self.documents.together():
                    self.online.renew(due)
            return due

    def renew_for(self, seconds: float) -> None:
        """Signs what is signed online anew, to be believed for the usual time or for these seconds if they are more, until the
        next change.

        Raises: Invalid.
        """
        if seconds > MAX_RENEWAL_S:
            raise Invalid(f"a signature may last {MAX_RENEWAL_S / 86400:.0f} days at most")
        with self.changing():
            self.online.renew_for(seconds)

    def check(self) -> None:
        """Raises: RepositoryDamaged when what timestamp.json leads to is not complete; Unavailable when it was signed by other
        keys.
        """
        root, targets = self.root_role().signed, self.targets_role()
        timestamp, snapshot = self.metadata.timestamp(), self.metadata.snapshot()
        try:
            root.verify_delegate("timestamp", timestamp.signed_bytes, timestamp.signatures)
            root.verify_delegate("snapshot", snapshot.signed_bytes, snapshot.signatures)
            root.verify_delegate("targets", targets.signed_bytes, targets.signatures)
            for role in (*self.publishers(), ASSIGNMENTS):
                found = self.metadata.role(role)
                targets.signed.verify_delegate(role, found.signed_bytes, found.signatures)
        except (UnsignedMetadataError, VerificationError) as error:
            raise Unavailable(f"the repository's metadata does not verify: {error}; restore it from a backup") from error
        self.assignment_bytes()
        for published in self.publishers().values():
            for info in published.signed.targets.values():
                self.targets.check(info)
