"""The life of a rollout as a table. Pure: nothing here reads a clock, a database or a device.

A rollout reaches its waves one after the other. Each wave adds devices; the gate of a wave decides from signed reports whether
the next may begin. A failure at any time before the end brings the whole fleet back to the previous release.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from types import MappingProxyType

import msgspec

from agent.contract import names
from agent.contract.assignment import EVERYONE


class State(str, Enum):
    CREATED = "created"  # written down, not assigned yet: only a crash of the server can be seen between this and what follows
    PROPOSED = "proposed"  # another person must approve it
    SCHEDULED = "scheduled"  # begins at its time, or when the fleet is no longer frozen
    RUNNING = "running"
    WAITING = "waiting"  # the wave passed; a person must confirm the next one (promote)
    PAUSED = "paused"  # no further wave begins; devices already reached go on
    COMPLETED = "completed"
    SUPERSEDED = "superseded"  # a newer release took its place; nobody went back for it
    ABORTED = "aborted"


class Event(str, Enum):
    PROPOSE = "propose"
    APPROVE = "approve"
    SCHEDULE = "schedule"
    START = "start"
    WAVE_PASSED = "wave_passed"
    WAIT = "wait"  # a wave passed in a rollout whose waves a person confirms
    LAST_WAVE_PASSED = "last_wave_passed"
    GATE_FAILED = "gate_failed"
    PROMOTE = "promote"
    PAUSE = "pause"
    RESUME = "resume"
    COMPLETE = "complete"  # an operator ends it as if its last wave had passed
    SUPERSEDE = "supersede"
    ABORT = "abort"


TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType({
    (State.CREATED, Event.PROPOSE): State.PROPOSED,
    (State.CREATED, Event.SCHEDULE): State.SCHEDULED,
    (State.CREATED, Event.START): State.RUNNING,
    (State.CREATED, Event.ABORT): State.ABORTED,
    (State.PROPOSED, Event.APPROVE): State.SCHEDULED,  # and on to running at once, unless its time has not come
    (State.PROPOSED, Event.ABORT): State.ABORTED,
    (State.SCHEDULED, Event.START): State.RUNNING,
    (State.SCHEDULED, Event.ABORT): State.ABORTED,
    (State.RUNNING, Event.WAVE_PASSED): State.RUNNING,
    (State.RUNNING, Event.WAIT): State.WAITING,
    (State.RUNNING, Event.LAST_WAVE_PASSED): State.COMPLETED,
    (State.RUNNING, Event.GATE_FAILED): State.ABORTED,
    (State.RUNNING, Event.PAUSE): State.PAUSED,
    (State.RUNNING, Event.COMPLETE): State.COMPLETED,
    (State.RUNNING, Event.SUPERSEDE): State.SUPERSEDED,
    (State.RUNNING, Event.ABORT): State.ABORTED,
    (State.WAITING, Event.PROMOTE): State.RUNNING,
    (State.WAITING, Event.GATE_FAILED): State.ABORTED,  # a device that rolls back late
    (State.WAITING, Event.PAUSE): State.PAUSED,
    (State.WAITING, Event.COMPLETE): State.COMPLETED,
    (State.WAITING, Event.SUPERSEDE): State.SUPERSEDED,
    (State.WAITING, Event.ABORT): State.ABORTED,
    (State.PAUSED, Event.RESUME): State.RUNNING,  # its gate is judged again; one that has passed moves on at once
    (State.PAUSED, Event.GATE_FAILED): State.ABORTED,  # a pause never protects a bad release
    (State.PAUSED, Event.COMPLETE): State.COMPLETED,
    (State.PAUSED, Event.SUPERSEDE): State.SUPERSEDED,
    (State.PAUSED, Event.ABORT): State.ABORTED,
})  # fmt: skip

NOT_BEGUN = (State.CREATED, State.PROPOSED, State.SCHEDULED)
"""No device was told of it yet."""
BEGUN = (State.RUNNING, State.WAITING, State.PAUSED)
ACTIVE = (*NOT_BEGUN, *BEGUN)
TERMINAL = (State.COMPLETED, State.SUPERSEDED, State.ABORTED)
NEXT_WAVE = (Event.WAVE_PASSED, Event.PROMOTE)
BEGINS_WAVE = (Event.START, *NEXT_WAVE)


HANDS: Mapping[Event, str] = MappingProxyType({
    Event.APPROVE: "approved",
    Event.PROMOTE: "promoted",
    Event.PAUSE: "paused",
    Event.RESUME: "resumed",
    Event.COMPLETE: "completed",
    Event.SUPERSEDE: "superseded",
    Event.ABORT: "aborted",
})  # fmt: skip
"""What operators can do to a rollout, as they say it."""


def instead_of(state: State) -> str:
    """What an operator can do to a rollout in this state, in words."""
    possible = [event.value for event in HANDS if (state, event) in TRANSITIONS]
    if possible:
        return f"what can be done: {', '.join(possible)}"
    return "it is over: begin another one with `edge-fleet rollout start`, or go back with `edge-fleet rollback`"


class IllegalTransition(Exception):
    """The rollout is in a state in which that cannot happen; nothing was changed."""

    def __init__(self, state: State, event: Event) -> None:
        done = HANDS.get(event, event.value.replace("_", " "))
        super().__init__(f"it is {state.value} and cannot be {done}; {instead_of(state)}")


class Wave(msgspec.Struct, frozen=True):
    """Devices in one of `groups`, and those whose slot is below `permille`. `count`: what was asked for is so many devices; `permille` is
    then what reaches as many (`resolved`). `devices`: how many it and the waves before it reached when the rollout began.
    """

    groups: tuple[str, ...] = ()
    permille: int = 0
    count: int = 0
    devices: int = 0

    def __post_init__(self) -> None:
        for group in self.groups:
            names.check(names.GROUP_NAME, group, "group")
        if not 0 <= self.permille <= EVERYONE:
            raise ValueError(f"permille {self.permille} must be from 0 to {EVERYONE}")
        if self.count < 0:
            raise ValueError(f"a wave of {self.count} devices: a number of devices is at least 1")
        if not self.groups and self.permille == 0 and self.count == 0:
            raise ValueError("a wave that names no group and has 0 percent reaches nobody")

    @property
    def everyone(self) -> bool:
        return self.permille >= EVERYONE


class Plan(msgspec.Struct, frozen=True):
    """Where a rollout stands in its waves."""

    state: State
    waves: tuple[Wave, ...]
    wave: int = 0
    confirm: bool = False
    """Whether a person confirms each further wave."""

    def __post_init__(self) -> None:
        if not self.waves or not self.waves[-1].everyone:
            raise ValueError("the last wave of a rollout reaches everyone")
        if not 0 <= self.wave < len(self.waves):
            raise ValueError(f"wave {self.wave} is not one of {len(self.waves)}")

    @property
    def last_wave(self) -> bool:
        return self.wave == len(self.waves) - 1


def waves(groups: tuple[str, ...], permille: int | None) -> tuple[Wave, ...]:
    """The waves of `rollout start`: what was named first, then everyone. Nothing named means everyone at once."""
    if not groups and permille is None:
        return (Wave(permille=EVERYONE),)
    first = Wave(groups, permille or 0)
    return (first,) if first.everyone else (first, Wave(permille=EVERYONE))


def read_waves(texts: Sequence[str]) -> tuple[Wave, ...]:
    """`1`, `5%`, `canary`, `25%`: so many devices, a share of all, a group. What follows the last one that is named reaches everyone.

    Raises: ValueError.
    """
    found = [_read_wave(text.strip()) for text in texts]
    for what, sizes in (("shares", [wave.permille for wave in found]), ("numbers of devices", [wave.count for wave in found])):
        named = [size for size in sizes if size]
        if named != sorted(set(named)):
            raise ValueError(f"waves {', '.join(texts)}: {what} grow from wave to wave")
    if any(wave.everyone for wave in found[:-1]):
        raise ValueError(f"waves {', '.join(texts)}: nothing can follow a wave of 100%")
    return tuple(found) if found and found[-1].everyone else (*found, Wave(permille=EVERYONE))


def _read_wave(text: str) -> Wave:
    if text.isdigit():
        if not int(text):
            raise ValueError("a wave of 0 devices reaches nobody")
        return Wave(count=int(text))
    if not text.endswith("%"):
        return Wave(groups=(text,))
    try:
        percent = float(text[:-1])
    except ValueError:
        raise ValueError(f"wave {text!r} is not a number of devices, a share such as 5%, or a group") from None
    if not 0 < percent <= 100:
        raise ValueError(f"a wave of {text}: a share is above 0 and at most 100%")
    return Wave(permille=max(1, round(10 * percent)))


def resolved(waves: Sequence[Wave], devices: Sequence[tuple[int, Collection[str]]]) -> tuple[Wave, ...]:
    """The waves with the share that each of them takes to reach as many devices as it names, and one at least. `devices`: the slot and the
    groups of each device that may be reached.
    """
    slots, found, groups = sorted(slot for slot, _ in devices), list[Wave](), set[str]()
    for wave in waves:
        groups |= set(wave.groups)
        permille = wave.permille
        if wave.count:
            others = sorted(slot for slot, mine in devices if not groups & set(mine))
            more = wave.count - (len(slots) - len(others))
            permille = 0 if more <= 0 else EVERYONE if more > len(others) else others[more - 1] + 1
        elif permille and slots:
            permille = max(permille, slots[0] + 1)
        share = max(permille, *(earlier.permille for earlier in found), 0)
        reached = sum(slot < share or not groups.isdisjoint(mine) for slot, mine in devices)
        found.append(msgspec.structs.replace(wave, permille=permille, devices=reached))
    return tuple(found)


def step(plan: Plan, event: Event) -> Plan:
    """The plan after the event.  Raises: IllegalTransition; the plan itself never changes."""
    state = TRANSITIONS.get((plan.state, event))
    if state is None or (event in NEXT_WAVE and plan.last_wave) or (event is Event.LAST_WAVE_PASSED and not plan.last_wave):
        raise IllegalTransition(plan.state, event)
    return msgspec.structs.replace(plan, state=state, wave=plan.wave + (event in NEXT_WAVE))


def on_pass(plan: Plan) -> Event | None:
    """What a passed gate means for the plan now; None when it must wait for a person."""
    if plan.state is not State.RUNNING:
        return None
    if plan.last_wave:
        return Event.LAST_WAVE_PASSED
    return Event.WAIT if plan.confirm else Event.WAVE_PASSED
