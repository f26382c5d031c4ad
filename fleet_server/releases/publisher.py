"""What a publisher's machine does: adds a release to the trusted metadata and signs it with the offline key."""

from __future__ import annotations

import copy
import datetime as dt
from collections.abc import Sequence

from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Signer  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, TargetFile, Targets  # type: ignore[attr-defined]

from agent.contract.assignment import REINSTATED_FIELD
from agent.contract.codec import encode
from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from fleet_server.errors import Conflict, NotFound, Refused
from fleet_server.releases.delegations import RELEASES
from fleet_server.releases.key_change import OFFLINE_EXPIRY_S
from fleet_server.releases.publication import listed, reinstatements


def verified(root: bytes, targets: bytes, releases: bytes | None, publisher: str = RELEASES) -> Metadata[Targets] | None:
    """A publisher's role as the server holds it, checked up to the root it shows; None before the first publication.

    Raises: Refused when it does not verify.

    A server that lies here can only get a release signed beside releases that the publisher signed before: the new version is
    built from the old one's list, and devices never go below a version they know.
    """
    try:
        top: Metadata[Root] = Metadata.from_bytes(root)
        delegator: Metadata[Targets] = Metadata.from_bytes(targets)
        role: Metadata[Targets] | None = Metadata.from_bytes(releases) if releases is not None else None
        top.signed.verify_delegate("root", top.signed_bytes, top.signatures)
        top.signed.verify_delegate("targets", delegator.signed_bytes, delegator.signatures)
        if role is not None:
            delegator.signed.verify_delegate(publisher, role.signed_bytes, role.signatures)
    except (RepositoryError, UnsignedMetadataError, VerificationError, AttributeError) as error:
        raise Refused(
            f"the metadata that the server holds does not verify; nothing was signed: {error}", code="wrong_key"
        ) from error
    return role


def add(
    role: Metadata[Targets] | None, manifest: ReleaseManifest, signers: Signer | Sequence[Signer], now: float
) -> tuple[bytes, bytes]:
    """(manifest, signed metadata) of the role with the release added.  Raises: Conflict when its version is not larger than the
    newest.
    """
    targets = dict(role.signed.targets) if role is not None else {}
    newest = max((ref.version for ref in listed(targets) if ref.model == manifest.model), default=0)
    if manifest.version <= newest:
        raise Conflict(
            f"version {manifest.version} of {manifest.model!r} must be larger than the newest published one, {newest}",
            code="version_not_larger",
        )
    data = encode(manifest)
    path = manifest.ref.target_path
    targets[path] = TargetFile.from_data(path, data, ["sha256"])
    return data, _signed(role, targets, signers, now)


def reinstate(role: Metadata[Targets], ref: ReleaseRef, signers: Signer | Sequence[Signer], now: float) -> bytes:
    """Signed metadata that reinstates a withdrawn release: the offline signature that devices ask for.  Raises: NotFound."""
    info = role.signed.targets.get(ref.target_path)
    if info is None:
        raise NotFound(f"release {ref} was never published by this publisher")
    reinstated = TargetFile.from_dict(copy.deepcopy(info.to_dict()), ref.target_path)
    reinstated.unrecognized_fields["custom"] = {**(info.custom or {}), REINSTATED_FIELD: reinstatements(info) + 1}
    return _signed(role, {**role.signed.targets, ref.target_path: reinstated}, signers, now)


def renewed(role: Metadata[Targets], signers: Signer | Sequence[Signer], now: float) -> bytes:
    """The role as it is, signed for another year."""
    return _signed(role, dict(role.signed.targets), signers, now)


def _signed(
    role: Metadata[Targets] | None, targets: dict[str, TargetFile], signers: Signer | Sequence[Signer], now: float
) -> bytes:
    expires = dt.datetime.fromtimestamp(now + OFFLINE_EXPIRY_S, tz=dt.timezone.utc).replace(microsecond=0)
    version = role.signed.version + 1 if role is not None else 1
    new = Metadata(Targets(version=version, expires=expires, targets=targets))
    for signer in [signers] if isinstance(signers, Signer) else signers:
        new.sign(signer, append=True)
    return new.to_bytes()
