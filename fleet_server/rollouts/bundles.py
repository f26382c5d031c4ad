"""Bundles: what some devices should run, in one file for a stick. Signed documents as they are in force, and the blobs that
they name.

Nothing in it is secret from the devices it is for, and nothing is believed for being in it: they verify it as they verify the
server.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from agent.contract import bundle
from agent.contract.assignment import NO_LABELS, Assignment, ModelAssignment, wanted
from agent.contract.codec import encode
from agent.contract.names import ReleaseRef
from agent.contract.reports import hardware_class
from fleet_server.access import Actor
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.survey import Filters, Survey
from fleet_server.errors import Invalid, NotFound, Unavailable
from fleet_server.journal import Journal
from fleet_server.releases.catalogue import Catalogue
from fleet_server.releases.repository import Repository
from fleet_server.rollouts.assignment import FleetAssignment
from fleet_server.storage.blobs import Blobs
from fleet_server.storage.database import Database
from fleet_server.storage.shelves import Opened

CHUNK_BYTES = 512 * 1024
DAY_S = 86400.0
MAX_DEVICES = 10_000

_Kind = tuple[list[str], str | None, dict[str, str]]
"""The groups of a device, its hardware class if it has ever said what it is, and its labels."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A bundle about to be written: its members in order, as bytes or as files."""

    about: bundle.Bundle
    documents: dict[str, bytes]
    blobs: dict[str, int]
    """sha256 → size in bytes."""
    open: Callable[[str], Opened | None]

    @property
    def size_bytes(self) -> int:
        """The size of the whole file."""
        sizes = {name: len(data) for name, data in self.documents.items()}
        return bundle.length({**sizes, **{f"blobs/{sha256}": size for sha256, size in self.blobs.items()}})

    def chunks(self) -> Iterator[bytes]:
        """The file's bytes.  Raises: Unavailable when a blob changed meanwhile."""
        for name, data in self.documents.items():
            yield bundle.header(name, len(data), self.about.created) + data + bundle.padding(len(data))
        for sha256, size in self.blobs.items():
            yield bundle.header(f"blobs/{sha256}", size, self.about.created)
            yield from _contents(self.open(sha256), sha256, size)
            yield bundle.padding(size)
        yield bundle.END


class Bundles:
    def __init__(
        self, database: Database, repository: Repository, inventory: Inventory, survey: Survey, catalogue: Catalogue,
        assignment: FleetAssignment, blobs: Blobs, journal: Journal, fleet: str, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._database, self._repository, self._inventory, self._survey = database, repository, inventory, survey
        self._catalogue, self._assignment, self._blobs, self._journal, self._fleet, self._clock = (
            catalogue, assignment, blobs, journal, fleet, clock
        )  # fmt: skip

    def pack(
        self, actor: Actor, *, models: Sequence[str] = (), devices: Sequence[str] = (), group: str | None = None,
        valid_days: float | None = None,
    ) -> Packed:  # fmt: skip
        """A bundle for these devices (none named: for all, or all of `group`) with what they should run of these models (none
        named: of all). `valid_days`: how long it is believed; what is in force is signed anew for that.

        Raises: NotFound (no such device, no device at all, a model that nothing is assigned of), Invalid.
        """
        chosen = self._devices(devices, group)
        self._repository.renew_for(valid_days * DAY_S if valid_days is not None else 0.0)
        documents, targets, valid_until = self._repository.in_force()
        releases = self._releases(self._assignment.signed(), models, chosen)
        for ref in releases:
            documents |= targets(ref.target_path)
        records = {f"records/{device}.json": self._inventory.record(device) for device in chosen}
        blobs = self._contents(releases)
        about = bundle.Bundle(
            fleet=self._fleet, created=self._clock(), valid_until=valid_until, devices=tuple(chosen),
            releases=tuple(map(str, releases)), blobs=len(blobs), size_bytes=sum(blobs.values()),
        )  # fmt: skip
        with self._database.session() as session:
            self._journal.audit(session, actor, "bundle", self._fleet, devices=len(chosen), releases=list(about.releases))
        return Packed(about, {bundle.HEAD: encode(about), **documents, **records}, blobs, self._blobs.open)

    def _devices(self, devices: Sequence[str], group: str | None) -> dict[str, _Kind]:
        if devices and group is not None:
            raise Invalid("name devices or a group, not both")
        if devices:
            shown = [self._inventory.get(device) for device in dict.fromkeys(devices)]
            found = [
                (d.id, d.groups, hardware_class(d.hardware) if d.hardware else None, d.labels) for d in shown if not d.revoked
            ]
        else:
            found = self._survey.every(Filters(group=group), MAX_DEVICES + 1)
            if len(found) > MAX_DEVICES:
                raise Invalid(f"a bundle is for {MAX_DEVICES} devices at most; make one for each group")
        chosen = {device: (groups, kind, labels) for device, groups, kind, labels in found}
        if not chosen:
            raise NotFound("there is no device to make a bundle for")
        return chosen

    def _releases(self, assignment: Assignment, models: Sequence[str], devices: Mapping[str, _Kind]) -> list[ReleaseRef]:
        for model in models:
            if model not in assignment.models:
                raise NotFound(f"nothing is assigned of model {model!r}; start a rollout first")
        found = set()
        for model, rules in assignment.models.items():
            if not models or model in models:
                numbers = [
                    may_want(rules, device, groups, hardware, labels) for device, (groups, hardware, labels) in devices.items()
                ]
                found |= {ReleaseRef(model, number) for number in set().union(*numbers)}
        return sorted(found)

    def _contents(self, releases: Sequence[ReleaseRef]) -> dict[str, int]:
        found: dict[str, int] = {}
        for ref in releases:
            for file in self._catalogue.manifest(ref).files.values():
                if self._blobs.size(file.sha256) != file.size_bytes:
                    raise Unavailable(f"blob {file.sha256} of release {ref} is not in the blob store; restore it from a backup")
                found[file.sha256] = file.size_bytes
        return found


def may_want(
    rules: ModelAssignment, device: str, groups: Collection[str], hardware: str | None, labels: Mapping[str, str] = NO_LABELS
) -> set[int]:
    """The releases of a model that the device may want. A device without a network has never said what hardware it is
    (`hardware` None): then what it would want in each of the classes that are excluded from a release, or have a rule of their own, counts, too.
    """
    kinds = (
        [hardware] if hardware is not None else ["", *(exclusion.hardware for exclusion in rules.excluded), *_classes(rules)]
    )
    found = (wanted(rules, device, groups, kind, labels).release for kind in kinds)
    return {number for number in found if number is not None}


def _classes(rules: ModelAssignment) -> set[str]:
    """The hardware classes that rules are for."""
    conditions = [condition for rule in rules.rules for condition in rule.scope]
    return {value for condition in conditions if condition.kind == "class" for value in condition.values}


def _contents(opened: Opened | None, sha256: str, size: int) -> Iterator[bytes]:
    if opened is None:
        raise Unavailable(f"blob {sha256} was removed while the bundle was written")
    with contextlib.closing(opened) as file:
        have = 0
        while have < size:
            data = file.read(have, min(CHUNK_BYTES, size - have))
            if not data:
                raise Unavailable(f"blob {sha256} became shorter while it was read")
            have += len(data)
            yield data
