"""What the server signs itself, with its online keys: assignments, snapshot, timestamp.

A new version of a role is trusted once a snapshot names it and a timestamp names that snapshot, so they are written in this
order.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Sequence

import msgspec
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]

from agent.contract.assignment import ASSIGNMENT_TARGET, ISSUED_FIELD
from fleet_server.config import ExpirySettings
from fleet_server.releases.delegations import ASSIGNMENTS
from fleet_server.releases.metadata_files import MetadataFiles
from fleet_server.releases.online_keys import OnlineKeys
from fleet_server.releases.target_files import TargetFiles

OLD_AFTER_S = 86400.0  # of what publishers signed: a pipeline may publish more than that while a device refreshes
KEPT_VERSIONS = 16  # a device in the middle of a refresh still finds the versions that its timestamp names


class OnlineRoles:
    """Signs and writes the online roles. The caller sees to it that one change is under way at a time."""

    def __init__(
        self,
        metadata: MetadataFiles,
        targets: TargetFiles,
        keys: OnlineKeys,
        expiry: ExpirySettings,
        clock: Callable[[], float],
    ) -> None:
        self._metadata, self._targets, self.keys, self.expiry, self._clock = metadata, targets, keys, expiry, clock
        self._documents: dict[str, str] = {}
        """A version of assignments → the name of the target that it signs, of those that are known."""

    # -- what is in force --------------------------------------------------------------------------------------------------

    def assignment_info(self) -> TargetFile:
        """The target that the assignments role lists."""
        role = self._metadata.role(ASSIGNMENTS).signed
        info = role.targets[ASSIGNMENT_TARGET]
        self._documents[f"{role.version}.{ASSIGNMENTS}.json"] = self._targets.name(info)
        return info

    def assignment_bytes(self) -> bytes:
        """The signed assignment's document."""
        return self._targets.read(self.assignment_info())

    # -- signing -----------------------------------------------------------------------------------------------------------

    def assign(self, document: bytes) -> None:
        """Signs an assignment and makes it trusted."""
        self.advance({f"{ASSIGNMENTS}.json": self.write_assignment(self._metadata.version(ASSIGNMENTS) + 1, document)})

    def write_assignment(self, version: int, document: bytes) -> int:
        """Signs a document as this version of the role; the version. It is trusted after `advance`."""
        info = TargetFile.from_data(ASSIGNMENT_TARGET, document, ["sha256"])
        self._targets.write(info, document)
        expires = self.ends(self.expiry.assignments_s)
        self._sign(ASSIGNMENTS, Metadata(Targets(version=version, expires=expires, targets={ASSIGNMENT_TARGET: info})))
        self._documents[f"{version}.{ASSIGNMENTS}.json"] = self._targets.name(info)
        return version

    def advance(self, changed: dict[str, int]) -> None:
        """A new snapshot with the changed roles (file name → version), then the timestamp that makes it trusted."""
        old = self._metadata.snapshot().signed
        version = old.version + 1
        self.write_snapshot(version, {**{name: info.version for name, info in old.meta.items()}, **changed})
        self.write_timestamp(self._metadata.timestamp().signed.version + 1, version)
        self._prune(version)

    def write_snapshot(self, version: int, roles: dict[str, int]) -> None:
        """Names each role's version and the hash of its bytes. A number alone is not enough: after a restore the next version
        of a publisher's role has a number that devices may hold already, rightly signed and with other releases in it.
        """
        meta = {}
        for name, number in roles.items():
            data = self._metadata.data(f"{number}.{name}")
            meta[name] = MetaFile(number, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
        self._sign("snapshot", Metadata(Snapshot(version=version, expires=self.ends(self.expiry.snapshot_s), meta=meta)))

    def write_timestamp(self, version: int, snapshot_version: int) -> None:
        """Makes a snapshot trusted."""
        timestamp = Metadata(
            Timestamp(
                version=version,
                expires=self.ends(self.expiry.timestamp_s),
                snapshot_meta=MetaFile(snapshot_version),
                unrecognized_fields={ISSUED_FIELD: int(self._clock())},
            )
        )
        timestamp.sign(self.keys.timestamp)
        self._metadata.write("timestamp.json", timestamp)

    def due(self, oldest_s: float | None) -> list[str]:
        """The roles that are to be signed again: what has less than half of its time left, and a timestamp older than `oldest_s`."""
        now = self._clock()
        if self._metadata.role(ASSIGNMENTS).signed.expires.timestamp() - now < self.expiry.assignments_s / 2:
            return [ASSIGNMENTS, "snapshot", "timestamp"]
        if self._metadata.snapshot().signed.expires.timestamp() - now < self.expiry.snapshot_s / 2:
            return ["snapshot", "timestamp"]
        timestamp = self._metadata.timestamp().signed
        too_old = oldest_s is not None and now - float(timestamp.unrecognized_fields.get(ISSUED_FIELD, 0)) >= oldest_s
        return ["timestamp"] if too_old or timestamp.expires.timestamp() - now < self.expiry.timestamp_s / 2 else []

    def renew(self, roles: Sequence[str]) -> None:
        """Signs again what is due."""
        if ASSIGNMENTS in roles:
            self.assign(self.assignment_bytes())
        elif "snapshot" in roles:
            self.advance({})
        elif "timestamp" in roles:
            timestamp = self._metadata.timestamp().signed
            self.write_timestamp(timestamp.version + 1, timestamp.snapshot_meta.version)

    def jump(self, ahead: int) -> None:
        """Signs everything anew, with versions that are larger by `ahead`: after a restore devices know larger ones than are here."""
        stamp, snapshot = self._metadata.timestamp().signed, self._metadata.snapshot().signed
        roles = {name: info.version for name, info in snapshot.meta.items()}
        roles[f"{ASSIGNMENTS}.json"] = self.write_assignment(
            self._metadata.version(ASSIGNMENTS) + ahead, self.assignment_bytes()
        )
        self.write_snapshot(snapshot.version + ahead, roles)
        self.write_timestamp(stamp.version + ahead, snapshot.version + ahead)

    def renew_for(self, seconds: float) -> None:
        """Signs everything anew for the usual time, or for these seconds if they are more."""
        usual = self.expiry
        try:
            self.expiry = msgspec.structs.replace(
                usual,
                assignments_s=max(usual.assignments_s, seconds),
                snapshot_s=max(usual.snapshot_s, seconds),
                timestamp_s=max(usual.timestamp_s, seconds),
            )
            self.assign(self.assignment_bytes())
        finally:
            self.expiry = usual

    def ends(self, seconds: float) -> dt.datetime:
        """When something that is signed now for so long ends."""
        moment = dt.datetime.fromtimestamp(self._clock() + seconds, tz=dt.timezone.utc)
        return moment.replace(microsecond=0)

    def _sign(self, role: str, metadata: Metadata[Targets] | Metadata[Snapshot]) -> None:
        signers: dict[str, CryptoSigner] = {ASSIGNMENTS: self.keys.assignments, "snapshot": self.keys.snapshot}
        metadata.sign(signers[role])
        self._metadata.write_role(role, metadata)

    def _prune(self, snapshot_version: int) -> None:
        """Removes what no device in the middle of a refresh can still ask for. A device that was away needs every version of the
        root, and of all else only what is trusted now; so roots are never removed, and of what publishers signed the old versions
        are, each of which names all their releases. Manifests stay: what is trusted now names them.
        """
        self._metadata.remove_before("snapshot", snapshot_version - KEPT_VERSIONS)
        self._metadata.remove_before(ASSIGNMENTS, self._metadata.version(ASSIGNMENTS) - KEPT_VERSIONS)
        day_ago = self._clock() - OLD_AFTER_S
        for name, info in self._metadata.versions().items():
            if (role := name.removesuffix(".json")) != ASSIGNMENTS:
                self._metadata.remove_before(role, info.version - KEPT_VERSIONS, day_ago)
        kept = {name: self._document_of(name) for name in self._metadata.versions_of(ASSIGNMENTS)}
        self._documents = kept
        directory, _, base = ASSIGNMENT_TARGET.rpartition("/")
        self._targets.remove_others(directory, base, set(kept.values()))

    def _document_of(self, name: str) -> str:
        """The name of the target that a version of assignments signs. Versions that this process wrote are not read again."""
        known = self._documents.get(name)
        if known is not None:
            return known
        role = self._metadata.parse(self._metadata.unkept(name), Targets, name)
        return self._targets.name(role.signed.targets[ASSIGNMENT_TARGET])
