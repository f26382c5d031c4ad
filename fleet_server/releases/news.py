"""What a poke carries: the signed documents that tell a device what it should run, from what is trusted now.

In the order of their use, as far as there is room:
    the device's own record            when the poke is for one device
    timestamp, snapshot, assignments   and the assignment's document; without these nothing is carried
    publishers' roles, manifests       of the releases that rollouts bring; and the roles that say whether a withdrawn release
                                       was reinstated, which devices look up for each new assignment
"""

from __future__ import annotations

from collections.abc import Iterator

from agent.contract.assignment import ASSIGNMENT_TARGET, Assignment, read_assignment
from agent.contract.names import ReleaseRef
from agent.contract.news import RECORD, pack_what_fits
from fleet_server.releases import delegations
from fleet_server.releases.delegations import ASSIGNMENTS
from fleet_server.releases.repository import Repository


def packed(repository: Repository, record: bytes | None = None) -> bytes:
    """The news as a poke carries it; nothing when not even the assignment fits.

    Raises: RepositoryDamaged.
    """
    with repository.lock:
        root = repository.root_role().signed.version
        needed = _needed(repository)
        if record is not None:
            needed = {RECORD: record, **needed}
        return pack_what_fits(root, needed, _useful(repository))


def _needed(repository: Repository) -> dict[str, bytes]:
    metadata = repository.metadata
    names = ["timestamp.json", f"{metadata.snapshot().signed.version}.snapshot.json"]
    names.append(f"{metadata.version(ASSIGNMENTS)}.{ASSIGNMENTS}.json")
    documents = {f"metadata/{name}": metadata.data(name) for name in names}
    info = metadata.role(ASSIGNMENTS).signed.targets[ASSIGNMENT_TARGET]
    return {**documents, repository.targets.name(info): repository.target_bytes(info)}


def _useful(repository: Repository) -> Iterator[tuple[str, bytes]]:
    assignment = read_assignment(repository.assignment_bytes())
    for model, number in _brought(assignment):
        found = delegations.of(repository.targets_role().signed, model)
        role = repository.releases(found) if found is not None else None
        if found is None or role is None:
            continue
        yield f"metadata/{role.signed.version}.{found}.json", repository.role_bytes(found)
        info = role.signed.targets.get(ReleaseRef(model, number).target_path) if number is not None else None
        if info is not None:
            yield repository.targets.name(info), repository.target_bytes(info)


def _brought(assignment: Assignment) -> Iterator[tuple[str, int | None]]:
    for model, rules in assignment.models.items():
        for rollout in rules.rollouts():
            yield model, rollout.release
    for model, rules in assignment.models.items():
        if rules.withdrawn:
            yield model, None
