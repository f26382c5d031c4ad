"""The highest versions this device ever verified, kept beside python-tuf's own files.

python-tuf renames its metadata into place without fsync, so a power cut can leave them empty, and with them goes the memory
that makes a rollback visible. This record is written durably after every refresh and checked against every refresh. Pure but
for load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from agent.contract.codec import FORMAT, ContractError, Document, decode, require_format
from agent.contract.reasons import Reason
from agent.sync.problems import Problem

MAX_BYTES = 16 * 1024 * 1024
"""Grows with the withdrawn releases that publishers signed: a few bytes each."""


class SeenVersions(Document, frozen=True, kw_only=True):
    """`versions` by role; `keys` the key ids that each role had when its version was noted; `withdrawn` per model the releases
    that were ever withdrawn, with how often their publisher had reinstated them by then.
    """

    versions: dict[str, int] = {}
    keys: dict[str, tuple[str, ...]] = {}
    assignment: int = 0
    assignment_sha256: str = ""
    record: int = 0
    withdrawn: dict[str, dict[str, int]] = {}
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "seen versions")


def load(path: Path) -> SeenVersions:
    """The stored record; an empty one before the first refresh.

    Raises: Problem when it is there and damaged: forgetting it silently would forgive a rollback.
    """
    try:
        return decode(path.read_bytes(), SeenVersions, limit_bytes=MAX_BYTES)
    except FileNotFoundError:
        return SeenVersions()
    except ContractError as error:
        raise Problem(Reason.STORE_FAILED, f"{path} is damaged ({error}): delete it after a look at the disk") from error


VOUCHED_BY: Mapping[str, tuple[str, ...]] = {
    "root": (),
    "timestamp": ("timestamp",),
    "snapshot": ("timestamp", "snapshot"),
    "targets": ("timestamp", "snapshot", "targets"),
}
"""Whose signatures a role's version number rests on. When the root gave one of them other keys, the numbers may start again: a
thief of the old ones may have signed version one million (the specification's fast-forward recovery, section 5.3.11)."""


def advance(seen: SeenVersions, versions: Mapping[str, int], keys: Mapping[str, tuple[str, ...]]) -> SeenVersions:
    """`seen` with the verified `versions` of roles and their `keys` added.

    Raises: Problem METADATA_ROLLBACK.
    """
    changed = {role for role in keys if role in seen.keys and seen.keys[role] != keys[role]}
    for role, version in versions.items():
        before = seen.versions.get(role, 0)
        if version < before and not changed.intersection(VOUCHED_BY[role]):
            raise Problem(Reason.METADATA_ROLLBACK, f"{role} metadata went back from version {before} to {version}")
    again = "assignments" in changed
    return msgspec.structs.replace(
        seen,
        versions={**seen.versions, **versions},
        keys={**seen.keys, **keys},
        assignment=0 if again else seen.assignment,
        assignment_sha256="" if again else seen.assignment_sha256,
        record=0 if again else seen.record,
    )


def advance_documents(seen: SeenVersions, assignment: int, sha256: str, record: int) -> SeenVersions:
    """`seen` with this assignment, whose bytes have this sha256, and this record.

    Raises: Problem REPLAYED_ASSIGNMENT when one of them is older than before, or the assignment says something else under a
    number that was seen: then two servers speak for the fleet, or one that forgot what it said.
    """
    if assignment < seen.assignment:
        raise Problem(Reason.REPLAYED_ASSIGNMENT, f"the assignment went back from version {seen.assignment} to {assignment}")
    if assignment == seen.assignment and seen.assignment_sha256 not in ("", sha256):
        raise Problem(
            Reason.REPLAYED_ASSIGNMENT,
            f"assignment {assignment} says something else than before: the fleet server has to sign a higher version",
        )
    if record < seen.record:
        raise Problem(Reason.REPLAYED_ASSIGNMENT, f"the device record went back from serial {seen.record} to {record}")
    return msgspec.structs.replace(seen, assignment=assignment, assignment_sha256=sha256, record=record)
