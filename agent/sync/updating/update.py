"""The update machine of one model: what may follow what, and where to go on after a crash. Pure; nothing here does I/O.

Rules that the table and the functions below keep:
 1. A release is activated only after it was fetched whole and passed its trial, or was committed on this device before.
 2. What serves before an update is what serves after a failed one.
 3. A refused or rolled-back release is not tried again here until its manifest changes or an operator says so.
 4. Whatever was interrupted goes on where its phase is safe to repeat; what is interrupted too often counts as bad.
 5. Rolling back cannot fail; it can only take longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Literal

import msgspec

from agent.contract import names
from agent.contract.assignment import Mode
from agent.contract.codec import FORMAT, Document, require_format
from agent.contract.reasons import Reason
from agent.contract.reports import Answer, Phase
from agent.store import Choice, Selection
from agent.sync.gates.canary import Canaried
from agent.sync.gates.shadow import Shadowed
from agent.sync.gates.watch import Watched

MAX_INTERRUPTIONS = 3
"""How often a trial or an activation may be cut off by a crash or a power cut. A device on a weak supply reboots twice in a row
now and then; a model that takes the machine down does so every time."""

RETRY_FIRST_S = 10.0
RETRY_LONGEST_S = 3600.0
UNREPORTED_FIRST_S = 300.0
UNREPORTED_LONGEST_S = 86400.0
"""A release that could not be reported is tried again: soon at first, because most outages are not its doing, and once a day in
the end, because each time may cut the device off for as long as its watch lasts."""

ANSWERS_KEPT = 20
COMMITTED_KEPT = 50


WaitsFor = Literal["retry", "window", "approval", "team"]
"""retry: for the time to try again. window: for the hours in which devices may switch. approval: for somebody on the device.
team: for the other members of its team."""

SWITCHING = frozenset({Phase.CANARYING, Phase.ACTIVATING, Phase.WATCHING, Phase.ROLLING_BACK})
"""While these go on, they judge by themselves whether what serves may serve."""

OBSERVING = frozenset({Phase.SHADOWING, Phase.CANARYING, Phase.WATCHING})
"""These count what `serve` says, in memory for a few seconds before it is saved."""


class Event(Enum):
    """What can happen to an update."""

    WANTED = "another release is wanted"
    FETCHED = "all its files are here and verified"
    FETCHED_KNOWN = "its files are here and it was committed here before"
    PUT_OFF = "a cause outside the release: try again later"
    RETRY_DUE = "the time to try again has come"
    REFUSED = "it does not pass"
    PASSED = "the trial passed"
    PASSED_EARLY = "the trial passed, but it may not serve yet"
    PASSED_AS_SHADOW = "the trial passed, and it is not to serve yet"
    WINDOW_OPEN = "nothing keeps it from serving any more"
    TO_SERVE = "the rollout lets it serve now"
    TO_CANARY = "it may serve, a share of the requests first"
    CANARY_PASSED = "it answered its share well"
    ACTIVATED = "it serves"
    BAD = "it must not stay"
    COMMITTED = "the watch ended well"
    OVERTAKEN = "something else is wanted now"
    BACK = "the release before serves again and this one is refused"
    BACK_ONLY = "the release before serves again"
    BACK_FOR_NOW = "the release before serves again, and this one is tried again later"
    IN_PLACE = "what is wanted is what serves"


S, E = Phase, Event

TRANSITIONS: Mapping[tuple[Phase, Event], Phase] = MappingProxyType({
    (S.STEADY, E.WANTED): S.FETCHING,
    (S.QUARANTINED, E.WANTED): S.FETCHING,
    (S.QUARANTINED, E.IN_PLACE): S.STEADY,

    (S.FETCHING, E.FETCHED): S.TRIALING,
    (S.FETCHING, E.FETCHED_KNOWN): S.ACTIVATING,
    (S.FETCHING, E.PUT_OFF): S.WAITING,
    (S.FETCHING, E.REFUSED): S.QUARANTINED,
    (S.FETCHING, E.OVERTAKEN): S.STEADY,

    (S.TRIALING, E.PASSED): S.ACTIVATING,
    (S.TRIALING, E.PASSED_EARLY): S.WAITING,
    (S.TRIALING, E.PASSED_AS_SHADOW): S.SHADOWING,
    (S.TRIALING, E.TO_CANARY): S.CANARYING,
    (S.TRIALING, E.PUT_OFF): S.WAITING,
    (S.TRIALING, E.REFUSED): S.QUARANTINED,
    (S.TRIALING, E.OVERTAKEN): S.STEADY,

    (S.SHADOWING, E.TO_SERVE): S.ACTIVATING,
    (S.SHADOWING, E.TO_CANARY): S.CANARYING,
    (S.SHADOWING, E.PASSED_EARLY): S.WAITING,
    (S.SHADOWING, E.PUT_OFF): S.WAITING,
    (S.SHADOWING, E.REFUSED): S.QUARANTINED,
    (S.SHADOWING, E.OVERTAKEN): S.STEADY,

    (S.WAITING, E.RETRY_DUE): S.FETCHING,  # fetching again costs nothing when all is here, and sees a manifest that changed
    (S.WAITING, E.WINDOW_OPEN): S.ACTIVATING,
    (S.WAITING, E.TO_CANARY): S.CANARYING,
    (S.WAITING, E.OVERTAKEN): S.STEADY,

    (S.CANARYING, E.CANARY_PASSED): S.ACTIVATING,
    (S.CANARYING, E.BAD): S.ROLLING_BACK,
    (S.CANARYING, E.PUT_OFF): S.WAITING,  # only before a request met it
    (S.CANARYING, E.OVERTAKEN): S.ROLLING_BACK,

    (S.ACTIVATING, E.ACTIVATED): S.WATCHING,
    (S.ACTIVATING, E.BAD): S.ROLLING_BACK,
    (S.ACTIVATING, E.PUT_OFF): S.WAITING,  # only before it is selected: `serve` is away or was short of memory
    (S.ACTIVATING, E.OVERTAKEN): S.ROLLING_BACK,

    (S.WATCHING, E.COMMITTED): S.STEADY,
    (S.WATCHING, E.BAD): S.ROLLING_BACK,
    (S.WATCHING, E.OVERTAKEN): S.ROLLING_BACK,
    (S.WATCHING, E.IN_PLACE): S.STEADY,  # overtaken with nothing to roll back to: it serves on until the next one does

    (S.ROLLING_BACK, E.BACK): S.QUARANTINED,
    (S.ROLLING_BACK, E.BACK_ONLY): S.STEADY,  # overtaken: it was not proved bad
    (S.ROLLING_BACK, E.BACK_FOR_NOW): S.WAITING,  # the device could not report: that may have been the network
})  # fmt: skip


class Resume(msgspec.Struct, frozen=True):
    """Where a persisted phase goes on after the process died in it. `counts`: the interruption is counted against the
    release.
    """

    phase: Phase
    counts: bool
    why: str


RESUME: Mapping[Phase, Resume] = MappingProxyType({
    S.STEADY: Resume(S.STEADY, False, "nothing was under way"),
    S.FETCHING: Resume(S.FETCHING, False, "what is staged is hashed again and continued; power cuts during a long download are no fault of it"),
    S.TRIALING: Resume(S.TRIALING, True, "a trial changes nothing here, so it is done again; once begun, it may be what took the machine down"),
    S.SHADOWING: Resume(S.SHADOWING, False, "copies are made again beside the stored numbers; crashes of `serve` are counted by the phase itself"),
    S.WAITING: Resume(S.WAITING, False, "its timer is a stored time of day"),
    S.CANARYING: Resume(S.CANARYING, False, "its share is set again beside the stored numbers; crashes of `serve` are counted as in a watch"),
    S.ACTIVATING: Resume(S.ACTIVATING, True, "loading, selecting and activating are each harmless to repeat; loading may be what crashed"),
    S.WATCHING: Resume(S.WATCHING, False, "the watch goes on with its stored baseline; crashes of `serve` are counted by the watch itself"),
    S.ROLLING_BACK: Resume(S.ROLLING_BACK, False, "a rollback is repeated until it is done, however often"),
    S.QUARANTINED: Resume(S.QUARANTINED, False, "nothing was under way"),
})  # fmt: skip


class IllegalTransition(Exception):
    """Our bug: an event that the phase does not know. Nothing was changed."""


class Failure(Document, frozen=True, kw_only=True):
    """Why an update is being rolled back or was put off."""

    reason: Reason
    message: str
    evidence: dict[str, float | str] = {}


class UpdateState(Document, frozen=True, kw_only=True):
    """What is persisted before each action. Times are seconds since the epoch."""

    model: str
    phase: Phase = Phase.STEADY
    since: float = 0.0
    wanted: int | None = None
    rollout: str | None = None
    attempt: int = 0
    mode: Mode = "install"
    target: int | None = None
    manifest: str | None = None
    """The sha256 of the target's manifest, once it is verified."""
    variant: str | None = None
    before: Choice | None = None
    """What serves while this update runs, and what a rollback returns to."""
    interruptions: int = 0
    trial_began: bool = False
    """Whether its turn has come, while it is on trial: before that it only waits, and nothing that happens is its doing."""
    tries: int = 0
    unreported: int = 0
    """How often it was rolled back because no report of it could be delivered."""
    waiting_for: WaitsFor | None = None
    retry_at: float | None = None
    failure: Failure | None = None
    judged_by: str | None = None
    """The metadata (`Desired.metadata`) for which the target was put off; None when it was for another reason."""
    activated: bool = False
    """Whether `serve` was told to switch, so that requests may have met the target."""
    shadowed: Shadowed | None = None
    canaried: Canaried | None = None
    watched: Watched | None = None
    team: tuple[str, ...] = ()
    """The models of its team, itself among them, from activation until the watch ends; empty when it switches alone."""
    stopped: Selection | None = None
    """What would serve if its lease had not ended."""
    committed: tuple[str, ...] = ()
    """The manifests (by sha256) of releases that passed a watch on this device, newest last."""
    answers: tuple[Answer, ...] = ()
    """The last ones, oldest first."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "update state")
        names.check_model(self.model)

    def but(self, **changes: object) -> UpdateState:
        return msgspec.structs.replace(self, **changes)


def after(state: UpdateState, event: Event, now: float, **changes: object) -> UpdateState:
    """`state` after `event`, with `changes`.  Raises: IllegalTransition."""
    phase = TRANSITIONS.get((state.phase, event))
    if phase is None:
        raise IllegalTransition(f"model {state.model!r}: {event.name} cannot happen while {state.phase.value}")
    return state.but(phase=phase, since=now, trial_began=False, **changes)


def begin(
    state: UpdateState, now: float, *, wanted: int, rollout: str | None, mode: Mode, before: Choice | None, attempt: int = 0
) -> UpdateState:
    """The start of a new update."""
    return after(
        state, Event.WANTED, now,
        wanted=wanted, rollout=rollout, attempt=attempt, mode=mode, target=wanted, before=before, manifest=None, variant=None, judged_by=None,
        interruptions=0, tries=0, unreported=0, waiting_for=None, retry_at=None, failure=None, activated=False, watched=None,
        shadowed=None, canaried=None, team=(),
    )  # fmt: skip


def rest(state: UpdateState, event: Event, now: float, *answers: Answer, **changes: object) -> UpdateState:
    """`event` into a phase of rest: what belonged to the update is forgotten, its answer is kept."""
    return after(
        state, event, now,
        target=None, manifest=None, variant=None, waiting_for=None, retry_at=None, failure=None, judged_by=None, activated=False, watched=None,
        shadowed=None, canaried=None, team=(),
        interruptions=0, tries=0, unreported=0, answers=keep_answers(state.answers, *answers), **changes,
    )  # fmt: skip


def committed(state: UpdateState, now: float, answer: Answer) -> UpdateState:
    """COMMITTED: the target's manifest is known to be good here."""
    known = tuple(manifest for manifest in state.committed if manifest != state.manifest)
    return rest(state, Event.COMMITTED, now, answer, committed=(*known, state.manifest)[-COMMITTED_KEPT:])


def put_off(
    state: UpdateState,
    now: float,
    failure: Failure,
    jitter: float,
    *answers: Answer,
    judged_by: str | None = None,
    wait_s: float = 0.0,
) -> UpdateState:
    """PUT_OFF until a time that doubles with every try, or until there is other metadata than `judged_by`; never before `wait_s`
    have passed. `jitter` (0 to 1) spreads a fleet that failed together.
    """
    delay_s = min(RETRY_LONGEST_S, RETRY_FIRST_S * 2.0 ** min(state.tries, 20)) * (0.5 + 0.5 * jitter)
    delay_s = min(RETRY_LONGEST_S, max(delay_s, wait_s * (1.0 + 0.5 * jitter)))
    return after(
        state, Event.PUT_OFF, now,
        waiting_for="retry", retry_at=now + delay_s, tries=state.tries + 1, failure=failure, judged_by=judged_by,
        answers=keep_answers(state.answers, *answers),
    )  # fmt: skip


def back_for_now(state: UpdateState, now: float, jitter: float, answer: Answer) -> UpdateState:
    """BACK_FOR_NOW until a time that doubles with every try. Its failure is kept, because it says how the wait ends."""
    delay_s = min(UNREPORTED_LONGEST_S, UNREPORTED_FIRST_S * 2.0 ** min(state.unreported, 20)) * (0.5 + 0.5 * jitter)
    return after(
        state, Event.BACK_FOR_NOW, now,
        waiting_for="retry", retry_at=now + delay_s, unreported=state.unreported + 1, interruptions=0, activated=False, watched=None, team=(),
        answers=keep_answers(state.answers, answer),
    )  # fmt: skip


def longest_wait_s(state: UpdateState) -> float:
    """A stored time further away than this means that the clock was set back meanwhile."""
    return UNREPORTED_LONGEST_S if state.unreported else RETRY_LONGEST_S


def keep_answers(known: tuple[Answer, ...], *new: Answer) -> tuple[Answer, ...]:
    """`known` with `new`, the newest answer to a release and rollout in place of older ones, and not more than ANSWERS_KEPT."""
    for answer in new:
        known = (*(old for old in known if (old.release, old.rollout) != (answer.release, answer.rollout)), answer)
    return known[-ANSWERS_KEPT:]


def counts(state: UpdateState) -> bool:
    """Whether an interruption now is put down to the release."""
    return RESUME[state.phase].counts and (state.phase is not Phase.TRIALING or state.trial_began)


def resumed(state: UpdateState) -> UpdateState:
    """The state to go on with after the process died: RESUME, with the interruption counted where it counts."""
    interruptions = state.interruptions + (1 if counts(state) else 0)
    return state.but(phase=RESUME[state.phase].phase, trial_began=False, interruptions=interruptions)


def interrupted_too_often(state: UpdateState) -> bool:
    return state.interruptions > MAX_INTERRUPTIONS


def mermaid() -> str:
    """The table as a Mermaid state diagram, for the documentation."""
    lines = ["stateDiagram-v2", "    [*] --> steady"]
    lines += [f"    {source.value} --> {target.value}: {event.value}" for (source, event), target in TRANSITIONS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(mermaid())
