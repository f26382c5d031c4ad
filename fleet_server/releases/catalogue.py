"""The published releases: publishing one, listing them, and what is asked of one often."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterable

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.codec import ContractError
from agent.contract.manifest import Provenance, ReleaseManifest, parse_manifest
from agent.contract.names import SHA256, ReleaseRef
from fleet_server.access import SERVER, Actor
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.journal import Happening, Journal
from fleet_server.releases import publication
from fleet_server.releases.repository import Repository
from fleet_server.storage.blobs import Blobs
from fleet_server.storage.database import Database
from fleet_server.storage.models import Device, DeviceModel, ReleaseRow

SUMMARIES_KEPT = 4096
"""Some hundred bytes each; a manifest itself may have megabytes of blocks."""


class VariantView(msgspec.Struct, frozen=True):
    """A variant of a release, without what it asks of a device."""

    name: str
    runtime: str
    file: str
    data: dict[str, str]


class ReleaseView(msgspec.Struct, frozen=True, kw_only=True):
    """A published release as operators see it in lists. `signers`: the ids of the keys that signed it;
    `deleted`: its files are gone.
    """

    model: str
    version: int
    release: str
    sha256: str
    size_bytes: int
    published: float
    signers: list[str]
    withdrawn: bool
    deleted: bool
    variants: list[VariantView]
    golden_cases: int
    provenance: Provenance


class ReleaseDetail(ReleaseView, frozen=True, kw_only=True):
    """A release with its signed manifest."""

    manifest: ReleaseManifest


class Summary(msgspec.Struct, frozen=True):
    """What is asked of a release often, out of its manifest."""

    model_hashes: dict[str, str]
    """Variant → the sha256 of its model, as devices report it."""
    files: frozenset[str]
    """The sha256 of each file."""
    lease_s: float | None
    variants: list[VariantView]
    golden_cases: int
    provenance: Provenance


class Catalogue:
    """The index of what publishers signed."""

    def __init__(
        self, database: Database, repository: Repository, blobs: Blobs, journal: Journal, clock: Callable[[], float]
    ) -> None:
        self._database, self._repository, self._blobs, self._journal, self._clock = database, repository, blobs, journal, clock
        self._publishing = threading.Lock()

    def publish(self, actor: Actor, manifest: bytes, metadata: bytes) -> ReleaseView:
        """Publishes a release that a publisher signed, if everything about it holds; nothing is trusted before that.

        Raises: see publication.check; Invalid when a file of it was not uploaded or is not what the manifest says.
        """
        with self._publishing:
            if (known := self._already(manifest)) is not None:
                return known
            publisher = self._repository.publisher_of(_model_of(manifest))
            delegator, role = self._repository.targets_role().signed, self._repository.releases(publisher)
            trusted = role.signed if role is not None else None
            checked = publication.check(trusted, delegator, manifest, metadata, self._clock(), publisher)
            self._check_blobs(checked.manifest)
            with self._database.reading() as session:
                refuse_other_bytes(session, checked.manifest.ref, {file.sha256 for file in checked.manifest.files.values()})
            self._repository.publish(checked.target, manifest, metadata, checked.version, publisher)
            with self._database.session() as session:
                row = self._index(session, checked.manifest, manifest, checked.target.hashes["sha256"], list(checked.signers))
                ref = checked.manifest.ref
                self._journal.audit(session, actor, "release.publish", str(ref), sha256=row.sha256, signers=row.signers)
                happening = Happening(
                    name="release_published", message=f"{ref} was published", model=ref.model, release=ref.version
                )
                event = self._journal.record(session, happening)
                published = _view(row)
            self._blobs.pending.forget([file.sha256 for file in checked.manifest.files.values()])
        self._journal.announce([event])
        self._journal.changed("releases")
        return published

    def _already(self, manifest: bytes) -> ReleaseView | None:
        """The release, when these very bytes are published."""
        sha256 = hashlib.sha256(manifest).hexdigest()
        with self._database.reading() as session:
            row = session.scalar(select(ReleaseRow).where(ReleaseRow.sha256 == sha256))
            return _view(row) if row is not None else None

    def undelete(self, actor: Actor, ref: ReleaseRef) -> None:
        """The files of a deleted release are here again.  Raises: NotFound; Invalid when one is not."""
        with self._publishing:
            manifest = self.manifest(ref)
            self._check_blobs(manifest)
            with self._database.session() as session:
                find(session, ref).deleted = False
                self._journal.audit(session, actor, "release.undelete", str(ref))
            self._blobs.pending.forget([file.sha256 for file in manifest.files.values()])
        self._journal.changed("releases")

    def remove_unused(self, sha256s: Iterable[str]) -> list[str]:
        """Removes those of the blobs and parts of blobs that no release names; which they were."""
        with self._publishing:
            named = self.blobs()
            return [
                sha256 for sha256 in sha256s if SHA256.fullmatch(sha256) and sha256 not in named and self._blobs.remove(sha256)
            ]

    def blobs(self) -> set[str]:
        """The sha256 of every file of every release that was not deleted."""
        with self._database.reading() as session:
            return {
                sha256
                for row in session.scalars(select(ReleaseRow).where(ReleaseRow.deleted.is_(False)))
                for sha256 in summary_of(row).files
            }

    def _check_blobs(self, manifest: ReleaseManifest) -> None:
        for name, file in sorted(manifest.files.items()):
            size = self._blobs.size(file.sha256)
            if size is None:
                raise Invalid(f"file {name!r} of {manifest.ref} was not uploaded (sha256 {file.sha256})", code="missing_blob")
            if size != file.size_bytes or not self._blobs.matches(file.sha256):
                raise Invalid(
                    f"file {name!r} of {manifest.ref} is damaged on the server (sha256 {file.sha256} expected); "
                    "remove it where it is kept and publish again",
                    code="damaged_blob",
                )

    def reconcile(self) -> list[ReleaseRef]:
        """Indexes releases that are trusted but not in the database, because a crash came between; the releases it found."""
        delegator = self._repository.targets_role().signed
        found = []
        with self._database.reading() as session:
            known = {ReleaseRef(*row).target_path for row in session.execute(select(ReleaseRow.model, ReleaseRow.version))}
        for publisher, role in self._repository.publishers().items():
            result = delegator.get_verification_result(publisher, role.signed_bytes, role.signatures)
            for info in role.signed.targets.values():
                if info.path in known:
                    continue
                data = self._repository.target_bytes(info)
                manifest = parse_manifest(data)
                with self._database.session() as session:
                    if session.get(ReleaseRow, (manifest.model, manifest.version)) is None:
                        self._index(session, manifest, data, info.hashes["sha256"], sorted(result.signed))
                        self._journal.audit(session, SERVER, "release.recover", str(manifest.ref))
                        found.append(manifest.ref)
        return found

    def _index(self, session: Session, manifest: ReleaseManifest, data: bytes, sha256: str, signers: list[str]) -> ReleaseRow:
        row = ReleaseRow(
            model=manifest.model, version=manifest.version, manifest=data.decode(), sha256=sha256, size_bytes=manifest.size_bytes,
            published=self._clock(), signers=signers, withdrawn=False,
            deleted=any(self._blobs.size(file.sha256) is None for file in manifest.files.values()),
        )  # fmt: skip
        session.add(row)
        return row

    def published(self, model: str | None = None) -> list[ReleaseView]:
        """Published releases, the newest of each model first."""
        query = select(ReleaseRow).order_by(ReleaseRow.model, ReleaseRow.version.desc())
        if model is not None:
            query = query.where(ReleaseRow.model == model)
        with self._database.reading() as session:
            return [_view(row) for row in session.scalars(query)]

    def get(self, ref: ReleaseRef) -> ReleaseDetail:
        """Everything about a release, its manifest included.  Raises: NotFound."""
        with self._database.reading() as session:
            row = find(session, ref)
            return ReleaseDetail(**msgspec.structs.asdict(_view(row)), manifest=manifest_of(row))

    def manifest(self, ref: ReleaseRef) -> ReleaseManifest:
        """Raises: NotFound."""
        with self._database.reading() as session:
            return manifest_of(find(session, ref))


def _model_of(manifest: bytes) -> str:
    """The model that a manifest says it is of; which publisher must have signed it follows from this alone."""
    try:
        return parse_manifest(manifest).model
    except (ContractError, ValueError) as error:
        raise Invalid(f"the manifest cannot be accepted: {error}", code="bad_manifest") from error


def find(session: Session, ref: ReleaseRef) -> ReleaseRow:
    """Raises: NotFound."""
    row = session.get(ReleaseRow, (ref.model, ref.version))
    if row is None:
        raise NotFound(f"release {ref} was never published; `edge-fleet release list` shows what was")
    return row


def refuse_deleted(session: Session, ref: ReleaseRef) -> None:
    """Raises: NotFound; Conflict when the release has no files any more."""
    if find(session, ref).deleted:
        raise Conflict(f"the files of {ref} were deleted; publish the same release again, which uploads them", code="deleted")


def refuse_other_bytes(session: Session, ref: ReleaseRef, files: Collection[str]) -> None:
    """A server that was restored from a copy has forgotten what was published since; devices have not. `files`: the sha256 of
    each.

    Raises: Conflict when a device serves a release of this name that is another one.
    """
    query = select(DeviceModel.device).join(Device, Device.id == DeviceModel.device).where(Device.revoked.is_(False))
    query = query.where(DeviceModel.model == ref.model, DeviceModel.serving == ref.version)
    query = query.where(DeviceModel.sha256.is_not(None), DeviceModel.sha256.not_in(files))
    device = session.scalar(query.order_by(DeviceModel.device).limit(1))
    if device is not None:
        raise Conflict(
            f"device {device!r} serves a release {ref} with other bytes: it was published before this server was restored "
            "from a copy; publish this one with a larger version",
            code="version_in_use",
        )


_summaries: dict[str, Summary] = {}


def summary_of(row: ReleaseRow) -> Summary:
    """What is asked often of the release in `row`, whose session is open. Made once for each manifest, by its digest."""
    found = _summaries.get(row.sha256)
    if found is None:
        if len(_summaries) >= SUMMARIES_KEPT:
            _summaries.clear()
        found = _summaries[row.sha256] = _summary(manifest_of(row))
    return found


def _summary(manifest: ReleaseManifest) -> Summary:
    return Summary(
        model_hashes={variant.name: manifest.model_sha256(variant) for variant in manifest.variants},
        files=frozenset(file.sha256 for file in manifest.files.values()),
        lease_s=manifest.acceptance.lease_s,
        variants=[VariantView(v.name, v.runtime, v.file, dict(v.data)) for v in manifest.variants],
        golden_cases=len(manifest.acceptance.golden),
        provenance=manifest.provenance,
    )


def manifest_of(row: ReleaseRow) -> ReleaseManifest:
    """What its publisher signed."""
    return parse_manifest(row.manifest.encode())


def _view(row: ReleaseRow) -> ReleaseView:
    summary = summary_of(row)
    return ReleaseView(
        model=row.model, version=row.version, release=f"{row.model}:{row.version}", sha256=row.sha256, size_bytes=row.size_bytes,
        published=row.published, signers=row.signers, withdrawn=row.withdrawn, deleted=row.deleted, variants=summary.variants,
        golden_cases=summary.golden_cases, provenance=summary.provenance,
    )  # fmt: skip
