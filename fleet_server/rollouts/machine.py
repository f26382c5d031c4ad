"""The life of a rollout as a table. Pure: nothing here reads a clock, a database or a device.

A rollout reaches its waves one after the other. Each wave adds devices; the gate of a wave decides from signed reports whether
the next may begin. A failure at any time before the end brings the whole fleet back to the previous release.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

import msgspec

from agent.contract import names
from agent.contract.assignment import EVERYONE


class State(str, Enum):
    CREATED = "created"  # written down, not assigned yet: only a crash of the server can be seen between this and running
    RUNNING = "running"
    WAITING = "waiting"  # the wave passed; a person must confirm the next one (promote)
    PAUSED = "paused"  # no further wave begins; devices already reached go on
    COMPLETED = "completed"
    ABORTED = "aborted"


class Event(str, Enum):
    START = "start"
    WAVE_PASSED = "wave_passed"
    WAIT = "wait"  # a wave passed in a rollout whose waves a person confirms
    LAST_WAVE_PASSED = "last_wave_passed"
    GATE_FAILED = "gate_failed"
    PROMOTE = "promote"
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"


TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType({
    (State.CREATED, Event.START): State.RUNNING,
    (State.CREATED, Event.ABORT): State.ABORTED,
    (State.RUNNING, Event.WAVE_PASSED): State.RUNNING,
    (State.RUNNING, Event.WAIT): State.WAITING,
    (State.RUNNING, Event.LAST_WAVE_PASSED): State.COMPLETED,
    (State.RUNNING, Event.GATE_FAILED): State.ABORTED,
    (State.RUNNING, Event.PAUSE): State.PAUSED,
    (State.RUNNING, Event.ABORT): State.ABORTED,
    (State.WAITING, Event.PROMOTE): State.RUNNING,
    (State.WAITING, Event.GATE_FAILED): State.ABORTED,  # a device that rolls back late
    (State.WAITING, Event.PAUSE): State.PAUSED,
    (State.WAITING, Event.ABORT): State.ABORTED,
    (State.PAUSED, Event.RESUME): State.RUNNING,  # its gate is judged again; one that has passed moves on at once
    (State.PAUSED, Event.GATE_FAILED): State.ABORTED,  # a pause never protects a bad release
    (State.PAUSED, Event.ABORT): State.ABORTED,
})  # fmt: skip

ACTIVE = (State.CREATED, State.RUNNING, State.WAITING, State.PAUSED)
TERMINAL = (State.COMPLETED, State.ABORTED)
NEXT_WAVE = (Event.WAVE_PASSED, Event.PROMOTE)


class IllegalTransition(Exception):
    """The rollout is in a state in which that cannot happen; nothing was changed."""

    def __init__(self, state: State, event: Event) -> None:
        possible = sorted(e.value for s, e in TRANSITIONS if s is state)
        instead = f"possible are {', '.join(possible)}" if possible else "it is over"
        super().__init__(f"a rollout that is {state.value} cannot {event.value.replace('_', ' ')}; {instead}")


class Wave(msgspec.Struct, frozen=True):
    """Devices in one of `groups`, and those whose slot is below `permille`."""

    groups: tuple[str, ...] = ()
    permille: int = 0

    def __post_init__(self) -> None:
        for group in self.groups:
            names.check(names.GROUP_NAME, group, "group")
        if not 0 <= self.permille <= EVERYONE:
            raise ValueError(f"permille {self.permille} must be from 0 to {EVERYONE}")
        if not self.groups and self.permille == 0:
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
