"""What is to be rehearsed, from what an operator asks for. Pure, but for the group's name."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec

from agent.contract.assignment import EVERYONE
from agent.contract.names import ReleaseRef
from fleet_server.errors import Invalid
from fleet_server.simulation import members as members_of
from fleet_server.simulation.behaviours import Share
from fleet_server.simulation.expected import Plan, Stage
from fleet_server.simulation.members import Member, most_run
from fleet_server.simulation.pace import Realism
from fleet_server.simulation.story import GROUP, Order

MODEL, RELEASE = "model", 1
"""What made-up devices run."""

SERVER_SILENCE_S = 180.0
"""`rollouts.silence_s` of a server that was set up as most are."""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator says. `release` None: a next version of what most devices run."""

    release: ReleaseRef | None
    plan: Plan
    shares: tuple[Share, ...]
    realism: Realism
    seed: int
    timeout_s: float


def of_made_up(count: int, wish: Wish) -> Order:
    """With devices that are made up.  Raises: Invalid."""
    return _order(members_of.made_up(count, MODEL, RELEASE, wish.shares, wish.seed), wish)


def of_inventory(data: bytes, wish: Wish) -> Order:
    """With the devices of `edge-fleet device list --json`.  Raises: Invalid."""
    members = members_of.from_inventory(data, wish.shares, wish.seed)
    if not members:
        raise Invalid("the inventory has no device that is not shut out")
    return _order(members, wish)


def _order(members: list[Member], wish: Wish) -> Order:
    runs = most_run(members)
    if wish.release is None and not runs:
        raise Invalid("no device runs a model yet: name what is to be brought out with --release")
    model = wish.release.model if wish.release is not None else _most(members)
    newest = max((member.runs[model] for member in members if model in member.runs), default=0)
    release = wish.release or ReleaseRef(model, newest + 1)
    if release.version <= newest:
        raise Invalid(f"--release {release} is not new: devices run version {newest} of it; the rehearsal needs a larger one")
    groups = {group for member in members for group in member.groups}
    unknown = [stage.group for stage in wish.plan.stages if stage.group is not None and stage.group not in groups]
    if unknown:
        known = ", ".join(sorted(groups)[:10]) or "none"
        raise Invalid(f"no device is in the group {unknown[0]!r}; there are {known}")
    return Order(
        members=members, release=release, plan=wish.plan, seed=wish.seed, realism=wish.realism, timeout_s=wish.timeout_s,
        silence_s=wish.realism.silence_s,
    )  # fmt: skip


def _most(members: Sequence[Member]) -> str:
    """The model that most devices run."""
    counts = {model: sum(model in member.runs for member in members) for member in members for model in member.runs}
    return max(counts, key=lambda model: (counts[model], model))


def on_a_server(count: int, wish: Wish) -> Order:
    """With devices of a group of their own, which the rollout's first wave reaches and no other wave follows.  Raises: Invalid."""
    if wish.release is None:
        raise Invalid("on a running server the release must be named: one that was published there")
    name = secrets.token_hex(3)
    group = f"{GROUP}-{name}"
    made = members_of.made_up(count, wish.release.model, 1, wish.shares, wish.seed)
    members = [msgspec.structs.replace(one, id=f"sim-{name}-{one.id[4:]}", groups=(group,), runs={}) for one in made]
    plan = Plan(
        (Stage(group=group), Stage(permille=EVERYONE)),
        wish.plan.max_failures,
        wish.plan.failure_share,
        confirm=True,
        at_once=wish.plan.at_once,
    )
    return Order(
        members=members, release=wish.release, plan=plan, seed=wish.seed, realism=wish.realism, timeout_s=wish.timeout_s,
        silence_s=SERVER_SILENCE_S,
    )  # fmt: skip
