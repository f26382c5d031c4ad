"""The highest versions this device ever verified, kept beside python-tuf's own files.

python-tuf renames its metadata into place without fsync, so a power cut can leave them empty, and with them goes the memory that
makes a rollback visible. This record is written durably after every refresh and checked against every refresh. Pure but for load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agent.contract.codec import FORMAT, ContractError, Document, decode, require_format
from agent.contract.reasons import Reason
from agent.sync.problems import Problem


class Seen(Document, frozen=True, kw_only=True):
    """`versions` by role; `keys` the key ids that the root gave each online role when its version was noted."""

    versions: dict[str, int] = {}
    keys: dict[str, tuple[str, ...]] = {}
    assignment: int = 0
    record: int = 0
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "seen versions")


def load(path: Path) -> Seen:
    """The stored record; an empty one before the first refresh.

    Raises: Problem when it is there and damaged: forgetting it silently would forgive a rollback.
    """
    try:
        return decode(path.read_bytes(), Seen, limit_bytes=64 * 1024)
    except FileNotFoundError:
        return Seen()
    except ContractError as error:
        raise Problem(Reason.STORE_FAILED, f"{path} is damaged ({error}): delete it after a look at the disk") from error


def advance(seen: Seen, versions: Mapping[str, int], keys: Mapping[str, tuple[str, ...]]) -> Seen:
    """`seen` with the verified `versions` added.

    A lower version is accepted only for a role whose keys the root has changed since: after the theft of an online key that had
    signed a huge version number, the number starts again (the specification's fast-forward recovery, section 5.3.11).

    Raises: Problem METADATA_ROLLBACK.
    """
    for role, version in versions.items():
        before = seen.versions.get(role, 0)
        same_keys = seen.keys.get(role, ()) == keys.get(role, ())
        if version < before and same_keys:
            raise Problem(Reason.METADATA_ROLLBACK, f"{role} metadata went back from version {before} to {version}")
    return Seen(
        versions={**seen.versions, **versions}, keys={**seen.keys, **keys}, assignment=seen.assignment, record=seen.record
    )


def advance_documents(seen: Seen, assignment: int, record: int) -> Seen:
    """`seen` with this assignment and record.  Raises: Problem METADATA_ROLLBACK when one of them is older than before."""
    if assignment < seen.assignment:
        raise Problem(Reason.METADATA_ROLLBACK, f"the assignment went back from version {seen.assignment} to {assignment}")
    if record < seen.record:
        raise Problem(Reason.METADATA_ROLLBACK, f"the device record went back from serial {seen.record} to {record}")
    return Seen(versions=seen.versions, keys=seen.keys, assignment=assignment, record=record)
