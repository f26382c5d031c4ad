"""What a publisher's machine does: adds a release to the trusted metadata and signs it with the offline key."""

from __future__ import annotations

import datetime as dt

from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, TargetFile, Targets  # type: ignore[attr-defined]

from agent.contract.codec import encode
from agent.contract.manifest import ReleaseManifest
from fleet_server.errors import Conflict, Refused
from fleet_server.releases.publication import published
from fleet_server.releases.repository import OFFLINE_EXPIRY_S, RELEASES


def verified(root: bytes, targets: bytes, releases: bytes) -> Metadata[Targets]:
    """The `releases` role the server holds, checked up to the root it shows.  Raises: Refused when it does not verify.

    A server that lies here can only get a release signed beside releases that the publisher signed before: the new version is
    built from the old one's list, and devices never go below a version they know.
    """
    try:
        top: Metadata[Root] = Metadata.from_bytes(root)
        delegator: Metadata[Targets] = Metadata.from_bytes(targets)
        role: Metadata[Targets] = Metadata.from_bytes(releases)
        top.signed.verify_delegate("root", top.signed_bytes, top.signatures)
        top.signed.verify_delegate("targets", delegator.signed_bytes, delegator.signatures)
        delegator.signed.verify_delegate(RELEASES, role.signed_bytes, role.signatures)
    except (RepositoryError, UnsignedMetadataError, VerificationError, AttributeError) as error:
        raise Refused(
            f"the metadata that the server holds does not verify; nothing was signed: {error}", code="wrong_key"
        ) from error
    return role


def add(role: Metadata[Targets], manifest: ReleaseManifest, signer: CryptoSigner, now: float) -> tuple[bytes, bytes]:
    """(manifest, signed metadata) of the role with the release added.  Raises: Conflict when its version is not larger than the newest."""
    newest = max((ref.version for ref in published(role.signed) if ref.model == manifest.model), default=0)
    if manifest.version <= newest:
        raise Conflict(
            f"version {manifest.version} of {manifest.model!r} must be larger than the newest published one, {newest}",
            code="version_not_larger",
        )
    data = encode(manifest)
    path = manifest.ref.target_path
    targets = {**role.signed.targets, path: TargetFile.from_data(path, data, ["sha256"])}
    expires = dt.datetime.fromtimestamp(now + OFFLINE_EXPIRY_S, tz=dt.timezone.utc).replace(microsecond=0)
    new = Metadata(Targets(version=role.signed.version + 1, expires=expires, targets=targets))
    new.sign(signer)
    return data, new.to_bytes()
