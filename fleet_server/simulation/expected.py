"""How a rollout must end with given devices, by what each of them is going to do. Pure.

But for the test of a share, it has no code in common with what judges rollouts, so that it can say whether that judged rightly.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import msgspec

from agent.contract.assignment import EVERYONE, Rollout, reaches, slot
from fleet_server.errors import Invalid
from fleet_server.rollouts import sequential
from fleet_server.simulation.behaviours import Behaviour
from fleet_server.simulation.members import Member

End = Literal["completed", "aborted", "waiting", "running"]
Answers = Literal["good", "bad", "claims", "held", "lost", "silent"]
"""What a device comes to count as: it commits; it refuses or rolls back; it never answers though it is there; an operator holds it; it falls
silent after it was told; it is not heard at all.
"""
KINDS = get_args(Answers)
FAILURE_SHARE, MIN_SHARE, MISSING_SHARE, CONFIDENCE = 0.03, 0.5, 0.1, 0.99  # what fleet.yaml says where nobody changed it

ANSWERS: dict[Behaviour, Answers] = {
    Behaviour.HONEST: "good",
    Behaviour.SLOW: "good",
    Behaviour.FLAPPING: "good",
    Behaviour.WRONG_CLOCK: "good",
    Behaviour.REFUSING: "bad",
    Behaviour.ROLLING_BACK: "bad",
    Behaviour.WRONG_DIGEST: "claims",  # signed by a device that is there, and no success: it keeps its wave waiting
    Behaviour.OFFLINE: "silent",
    Behaviour.SILENT: "lost",
    Behaviour.UNSIGNED: "lost",  # what is not signed was never said
    Behaviour.WRONG_KEY: "lost",
    Behaviour.CLONED: "silent",  # of two that say the same name, neither counts
}


class Stage(msgspec.Struct, frozen=True):
    """A wave as an operator names it: a group, or a share of all devices in thousandths."""

    group: str | None = None
    permille: int = 0


class Plan(msgspec.Struct, frozen=True):
    """A rollout to be made. `max_failures`: None: no number ends it. `confirm`: a person confirms what follows the first wave, and nobody
    does. `at_once`: a wave tells all of its devices in one step.
    """

    stages: tuple[Stage, ...]
    max_failures: int | None = None
    failure_share: float = FAILURE_SHARE
    confirm: bool = False
    at_once: bool = False


class Ending(msgspec.Struct, frozen=True):
    """The state in which a rollout stops changing, the wave (from 0), and what the devices that it reaches then come to count
    as. `sooner`: more fail than are allowed, too few for certainty; told in another order, they may be enough, and it is aborted before.
    """

    state: End
    wave: int
    reached: int
    counts: dict[str, int]
    sooner: bool = False

    def allows(self, ended: Ending) -> bool:
        """Whether a rollout that had to end like this may have ended like that."""
        if (ended.state, ended.wave) == (self.state, self.wave):
            return True
        return ended.state == "aborted" and ended.wave <= self.wave and self.sooner


def stages(text: str) -> tuple[Stage, ...]:
    """`1%,10%,100%` and `canary,100%`: shares, or groups. What is named last reaches everyone.

    Raises: Invalid.
    """
    found = tuple(_stage(part.strip()) for part in text.split(","))
    shares = [stage.permille for stage in found if stage.group is None]
    if not shares or found[-1].permille != EVERYONE or shares != sorted(set(shares)):
        raise Invalid(f"waves {text!r}: shares grow, and the last one is 100%; for example 10%,100% or canary,100%")
    return found


def _stage(text: str) -> Stage:
    if text.isdigit():
        raise Invalid(f"a wave of {text} devices cannot be rehearsed; say {text}% for a share")
    if not text.endswith("%"):
        return Stage(group=text)
    try:
        percent = float(text[:-1])
    except ValueError:
        raise Invalid(f"wave {text!r} is neither a share nor a group") from None
    if not 0 < percent <= 100:
        raise Invalid(f"a wave of {text}: a share is above 0 and at most 100%")
    return Stage(permille=max(1, round(10 * percent)))


def ending(members: Iterable[Member], plan: Plan, rollout: str, model: str) -> Ending:
    """How the rollout with this id must end."""
    members, sooner = list(members), False
    first = min((slot(rollout, member.id) for member in members), default=0)
    for wave in range(len(plan.stages)):
        reached = [member for member in members if _reaches(plan.stages[: wave + 1], rollout, member, first)]
        counts = collections.Counter(_answers(member, model) for member in reached)
        told = {kind: counts[kind] for kind in KINDS}
        asked = counts["good"] + counts["bad"] + counts["claims"] + counts["lost"]
        too_many = plan.max_failures is not None and counts["bad"] > plan.max_failures
        share_is_above = sequential.is_above(plan.failure_share, counts["bad"], asked, CONFIDENCE)
        sooner |= counts["bad"] > max(1, plan.failure_share * asked)
        if too_many or share_is_above or (counts["bad"] and counts["bad"] == asked):
            return Ending("aborted", wave, len(reached), told, sooner)
        too_few = not counts["good"] or counts["good"] < MIN_SHARE * asked
        if too_few or counts["claims"] or sequential.is_above(MISSING_SHARE, counts["lost"], asked, CONFIDENCE):
            return Ending("running", wave, len(reached), told, sooner)
        if wave == len(plan.stages) - 1:
            return Ending("completed", wave, len(reached), told, sooner)
        if plan.confirm:
            return Ending("waiting", wave, len(reached), told, sooner)
    raise AssertionError("a plan has stages")


def does_well(member: Member, model: str) -> bool:
    """Whether the device in the end serves what the fleet wants of it, whatever that is."""
    return ANSWERS[member.behaviour] == "good" and model not in member.held


def _answers(member: Member, model: str) -> Answers:
    answers = ANSWERS[member.behaviour]
    if model in member.held and answers in {"good", "bad"}:  # it goes on with what it has, and says so
        return "held"
    return answers


def _reaches(said: Sequence[Stage], rollout: str, member: Member, first: int) -> bool:
    """`first`: the smallest slot of all devices; a wave with a share reaches one of them at least."""
    share = max(stage.permille for stage in said)
    wave = Rollout(
        id=rollout, release=1, previous=None, groups=tuple(stage.group for stage in said if stage.group is not None),
        permille=max(share, first + 1) if share else 0,
    )  # fmt: skip
    return reaches(wave, member.id, member.groups)
