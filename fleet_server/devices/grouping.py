"""Which groups a device is in: those that it was given by hand, and those whose scopes it meets. A name is one or the other, never both.

Whoever changes what scopes ask about brings the device's groups along in the same transaction (`regroup`), or marks the row as stale where
nothing can be signed: `devices.groups` does it then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract import names
from fleet_server.devices import group_scopes
from fleet_server.devices.group_scopes import GroupScope, Known
from fleet_server.errors import Conflict, Invalid
from fleet_server.storage.group_models import GroupRow
from fleet_server.storage.models import Device

MAX_LABELS = 32
MAX_GROUPS = 64

Scopes = Mapping[str, GroupScope]
"""Group → its scope, of the groups that have one."""


def scopes(session: Session) -> Scopes:
    return {row.name: group_scopes.read(row.scope) for row in session.execute(select(GroupRow.name, GroupRow.scope))}


def groups_of(row: Any, found: Scopes) -> tuple[list[str], list[str]]:
    """All groups of the device of a row, and those among them that it is in by their scopes. What it was given by hand stays."""
    known = Known(row.id, row.labels or {}, row.hardware_class or "", row.agent_version or "")
    met = sorted(name for name, scope in found.items() if scope.is_met_by(known))
    by_hand = set(row.groups) - set(row.groups_by_scope or ()) - found.keys()
    return sorted(by_hand.union(met)), met


def differs(row: Any, found: Scopes) -> bool:
    """Whether the device of a row is in other groups, or in one for another cause, than it is to be."""
    groups, met = groups_of(row, found)
    return set(groups) != set(row.groups) or met != sorted(row.groups_by_scope or ())


def regroup(row: Device, found: Scopes) -> bool:
    """Brings a device's groups along; whether they are others than before. If so, its record is to be signed again."""
    if row.stale_groups:
        row.stale_groups = False
    if not differs(row, found):
        return False
    before = set(row.groups)
    row.groups, row.groups_by_scope = groups_of(row, found)
    return set(row.groups) != before


def give(row: Device, wanted: Iterable[str], found: Scopes) -> None:
    """Puts the device in exactly these groups, those included that it is in by their scopes.

    Raises: Conflict when one of those is left out, or one is named that fills itself and is not for this device.
    """
    asked = set(wanted)
    _, met = groups_of(row, found)
    if left_out := [name for name in met if name not in asked]:
        raise Conflict(
            f"{row.id} is in the group {left_out[0]!r} because it meets the group's scope ({found[left_out[0]]}), and stays in it: name it as "
            f"well, or change what the scope asks about (`edge-fleet device label`) or the scope (`edge-fleet group set {left_out[0]}`)",
            code="by_scope",
        )
    if foreign := sorted(name for name in asked & found.keys() if name not in met):
        raise Conflict(
            f"the group {foreign[0]!r} fills itself with the devices that meet its scope ({found[foreign[0]]}), and {row.id} does not: leave it "
            f"out, or change what the scope asks about (`edge-fleet device label`) or the scope (`edge-fleet group set {foreign[0]}`)",
            code="by_scope",
        )
    row.groups, row.groups_by_scope = sorted(asked), met


def refuse_filled(session: Session, groups: Iterable[str]) -> None:
    """Raises: Conflict when one of these groups, which are to be given by hand, fills itself."""
    found = scopes(session)
    if filled := sorted(set(groups) & found.keys()):
        raise Conflict(
            f"the group {filled[0]!r} fills itself with the devices that meet its scope ({found[filled[0]]}); leave it out, or choose another name",
            code="by_scope",
        )


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises: Invalid that names the first label that may not be like that, or says that there are too many."""
    if len(labels) > MAX_LABELS:
        raise Invalid(f"a device may have at most {MAX_LABELS} labels")
    for name, value in labels.items():
        try:
            names.check(names.LABEL_NAME, name, "label name")
            names.check(names.LABEL_VALUE, value, f"value of the label {name!r}")
        except ValueError as error:  # noqa: PERF203 - a handful
            raise Invalid(str(error), code="bad_label") from error


def check_groups(groups: list[str]) -> None:
    """Raises: Invalid that names the first group that may not be called so, or says that there are too many."""
    if len(groups) > MAX_GROUPS:
        raise Invalid(f"a device may be in at most {MAX_GROUPS} groups by hand")
    for group in groups:
        try:
            names.check(names.GROUP_NAME, group, "group")
        except ValueError as error:  # noqa: PERF203 - a handful
            raise Invalid(str(error), code="bad_group") from error
