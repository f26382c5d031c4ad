"""What a publication must be before it is trusted. Pure: bytes in, the verified publication out.

1. the new metadata of the publisher's role is signed by enough of the keys that the trusted `targets` delegates to;
2. its version is the trusted one plus one (so that of two publishers at once one is told to start again);
3. it has every target it had, unchanged, and exactly one more;
4. that one is the manifest's path, length and hash;
5. the manifest follows the contract and is that of a larger version than every published one of its model;
6. it does not end before it could be used, and delegates to nobody.

A publisher may also sign a version that adds nothing: to renew it, or to reinstate one release (rules 1, 2 and 6, and every
target as it was but for that release's count).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from securesystemslib.exceptions import VerificationError
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, TargetFile, Targets  # type: ignore[attr-defined]

from agent.contract.assignment import REINSTATED_FIELD
from agent.contract.codec import ContractError
from agent.contract.manifest import MAX_MANIFEST_BYTES, ReleaseManifest, parse_manifest
from agent.contract.names import ReleaseRef
from fleet_server.errors import Conflict, Invalid, Refused, TooLarge
from fleet_server.releases.delegations import RELEASES

MAX_ROLE_BYTES = 5_000_000  # what a TUF client reads of a targets role at most (tuf's UpdaterConfig.targets_max_length)
MIN_VALIDITY_S = 86400.0


class Publication(msgspec.Struct, frozen=True):
    """A publication that passed every check."""

    manifest: ReleaseManifest
    target: TargetFile
    version: int
    signers: tuple[str, ...]


class Resigned(msgspec.Struct, frozen=True):
    """A version of a publisher's role that adds no release. `reinstated`: the withdrawn release that may be run again."""

    version: int
    signers: tuple[str, ...]
    reinstated: ReleaseRef | None


def listed(targets: Iterable[str]) -> list[ReleaseRef]:
    """The releases that these target paths name."""
    found = []
    for path in targets:
        model, _, name = path.removeprefix("releases/").rpartition("/")
        found.append(ReleaseRef.parse(f"{model}:{name.removesuffix('.json')}"))
    return sorted(found)


def published(role: Targets) -> list[ReleaseRef]:
    """The releases a publisher's role lists."""
    return listed(role.targets)


def reinstatements(info: TargetFile) -> int:
    """How often the publisher reinstated this release."""
    count = (info.custom or {}).get(REINSTATED_FIELD, 0)
    return count if isinstance(count, int) else 0


def check(
    trusted: Targets | None, delegator: Targets, manifest: bytes, metadata: bytes, now: float, publisher: str = RELEASES
) -> Publication:
    """The publication, if every rule above holds. `trusted` None: the publisher's first.

    Raises: Invalid (cannot be read, breaks the contract), Refused (not signed by a delegated key, changes what was published),
    Conflict (not the next version; the version exists), TooLarge.
    """
    if len(manifest) > MAX_MANIFEST_BYTES:
        raise TooLarge(f"a manifest may have at most {MAX_MANIFEST_BYTES} bytes; use larger blocks")
    new, signers = _follows(trusted, delegator, metadata, now, publisher)
    known = trusted.targets if trusted is not None else {}
    target = _the_added_one(known, new)
    try:
        document = parse_manifest(manifest)
        target.verify_length_and_hashes(manifest)
    except (ContractError, ValueError) as error:
        raise Invalid(f"the manifest cannot be accepted: {error}", code="bad_manifest") from error
    except RepositoryError as error:
        raise Refused(f"the manifest is not the one that was signed: {error}", code="hash_mismatch") from error
    if target.path != document.ref.target_path:
        raise Refused(f"the manifest of {document.ref} was signed as {target.path!r}", code="wrong_path")
    newest = max((ref.version for ref in listed(known) if ref.model == document.model), default=0)
    if document.version <= newest:
        raise Conflict(
            f"release {document.ref} must have a larger version than the newest published one, {newest}",
            code="version_not_larger",
        )
    return Publication(document, target, new.version, signers)


def check_resigned(trusted: Targets, delegator: Targets, metadata: bytes, now: float, publisher: str) -> Resigned:
    """A version that adds no release, if every rule above holds.  Raises: Invalid, Refused, Conflict, TooLarge, each with what
    is wrong.
    """
    new, signers = _follows(trusted, delegator, metadata, now, publisher)
    if set(new.targets) != set(trusted.targets):
        raise Refused("this must list the same releases as before", code="changes_published")
    reinstated = [path for path, info in new.targets.items() if info.to_dict() != trusted.targets[path].to_dict()]
    for path in reinstated:
        before, after = trusted.targets[path], new.targets[path]
        same = (after.length, after.hashes) == (before.length, before.hashes)
        if not same or after.custom != {**(before.custom or {}), REINSTATED_FIELD: reinstatements(before) + 1}:
            raise Refused(f"the releases metadata changes {path!r}; published releases stay", code="changes_published")
    if len(reinstated) > 1:
        raise Refused("one signature reinstates one release", code="not_one_release")
    return Resigned(new.version, signers, listed(reinstated)[0] if reinstated else None)


def _follows(
    trusted: Targets | None, delegator: Targets, metadata: bytes, now: float, publisher: str
) -> tuple[Targets, tuple[str, ...]]:
    """The next version and who signed it: rules 1, 2 and 6."""
    if len(metadata) > MAX_ROLE_BYTES:
        raise TooLarge(f"the releases metadata may have at most {MAX_ROLE_BYTES} bytes")
    new = _read(metadata)
    signers = _verify(delegator, new, publisher)
    expected = trusted.version + 1 if trusted is not None else 1
    if new.signed.version != expected:
        raise Conflict(
            f"the releases metadata has version {new.signed.version}, expected {expected}: "
            "somebody published meanwhile; fetch it again, add the release and sign again",
            code="stale_metadata",
        )
    if new.signed.expires.timestamp() < now + MIN_VALIDITY_S:
        raise Refused("the releases metadata ends within a day; sign it with a later expiry", code="expires_soon")
    if new.signed.delegations is not None:
        raise Refused("the releases metadata must not delegate", code="delegates")
    return new.signed, signers


def _read(metadata: bytes) -> Metadata[Targets]:
    try:
        new: Metadata[Targets] = Metadata.from_bytes(metadata)
    except (RepositoryError, RecursionError) as error:
        raise Invalid(f"the releases metadata cannot be read: {error}", code="bad_metadata") from error
    if not isinstance(new.signed, Targets):
        raise Invalid(f"the releases metadata is of type {new.signed.type!r}, expected targets", code="bad_metadata")
    return new


def _verify(delegator: Targets, new: Metadata[Targets], publisher: str) -> tuple[str, ...]:
    try:
        result = delegator.get_verification_result(publisher, new.signed_bytes, new.signatures)
    except (UnsignedMetadataError, VerificationError, ValueError) as error:
        raise Refused(f"the releases metadata cannot be verified: {error}", code="wrong_key") from error
    if not result.verified:
        more = f" ({result.missing} signatures of {result.threshold} are missing)" if result.signed else ""
        raise Refused(
            f"the releases metadata is not signed with the keys this fleet trusts for publisher {publisher!r}{more}; "
            "sign with the key that `edge-fleet init` wrote for this fleet, or the one this publisher was added with",
            code="wrong_key",
        )
    return tuple(sorted(result.signed))


def _the_added_one(trusted: dict[str, TargetFile], new: Targets) -> TargetFile:
    for path, info in trusted.items():
        if path not in new.targets or new.targets[path].to_dict() != info.to_dict():
            raise Refused(
                f"the releases metadata changes or removes {path!r}; published releases stay", code="changes_published"
            )
    added = [path for path in new.targets if path not in trusted]
    if len(added) != 1:
        raise Refused(f"a publication adds exactly one release, this one adds {len(added)}", code="not_one_release")
    return new.targets[added[0]]
