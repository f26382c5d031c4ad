"""A newer release takes the place of a rollout that is under way, and nobody goes back for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from agent.contract.assignment import MAX_KEPT, Mode, Reach
from agent.contract.codec import convert
from agent.contract.names import ReleaseRef
from agent.contract.scopes import EVERYBODY, Scope
from fleet_server.errors import Conflict, Invalid
from fleet_server.rollouts import machine, rows, rules
from fleet_server.rollouts.gates import Rules
from fleet_server.rollouts.machine import State, Wave
from fleet_server.storage.models import RolloutRow


class Plans(msgspec.Struct, frozen=True):
    """What the members of a team have in common when they begin. `retry`: devices that refused a release before try it again."""

    waves: tuple[Wave, ...]
    confirm: bool
    rules: Rules
    mode: Mode
    window: str | None
    retry: bool = False
    scope: Scope = EVERYBODY


def refuse_unfit(row: RolloutRow, ref: ReleaseRef, *, approval: bool) -> RolloutRow:
    """The rollout itself. `approval`: another person must approve what one starts.  Raises: Invalid, Conflict when the release cannot take
    its place.
    """
    named = f"rollout {row.id} ({row.model}:{row.release})"
    if ref.model != row.model:
        raise Invalid(f"{named} is of the model {row.model}; {ref} is of another one: begin a rollout of its own")
    if State(row.state) in machine.TERMINAL:
        raise Conflict(
            f"{named} is {row.state}: begin another one with `edge-fleet rollout start {ref}`", code="illegal_transition"
        )
    if State(row.state) in machine.NOT_BEGUN:
        raise Conflict(f"{named} is {row.state} and no device has it yet: abort it, and begin {ref}", code="illegal_transition")
    if approval:
        raise Conflict(
            f"here another person must approve what one starts (rollouts.approval in fleet.yaml), and devices would have to wait for that "
            f"without either release; complete {row.id} or abort it, and begin {ref}",
            code="approval",
        )
    if row.team is not None:
        raise Conflict(
            f"{named} is of a team, whose releases only switch together; complete it or abort it, and begin the next one",
            code="of_a_team",
        )
    if row.mode == "shadow":
        raise Conflict(
            f"{named} only tries the release and installs nothing; complete it or abort it, and begin the next one",
            code="shadow",
        )
    if ref.version <= row.release:
        raise Conflict(
            f"{ref} is not newer than what {named} brings; abort that one, which takes its devices back, and begin {ref}",
            code="not_newer",
        )
    if len(row.kept or ()) >= MAX_KEPT:
        raise Conflict(
            f"{named} superseded {MAX_KEPT} others already, and devices may still have any of their releases; complete it or abort it first",
            code="too_many",
        )
    return row


def plans_of(row: RolloutRow, waves: Sequence[Wave] | None, confirm: bool | None) -> Plans:
    """What the rollout was begun with, with other waves where they are given."""
    return Plans(
        waves=tuple(waves) if waves is not None else tuple(convert(wave, Wave) for wave in row.waves),
        confirm=row.confirm if confirm is None else confirm, rules=rows.rules_of(row), mode="install", window=row.window,
        scope=rules.scope_of(row),
    )  # fmt: skip


def kept(row: RolloutRow) -> list[Any]:
    """Whom the rollout had reached, and those that it superseded itself: as the row of the next one has it."""
    told = rows.as_assigned(row)
    mine = Reach(
        id=told.id,
        release=told.release,
        groups=told.groups,
        permille=told.permille,
        group_permille=told.group_permille,
        team=told.team,
    )
    return msgspec.to_builtins([mine, *told.kept])  # type: ignore[no-any-return]
