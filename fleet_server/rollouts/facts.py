"""What devices say of a release, from their last signed reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from agent.contract.assignment import EVERYONE, Rollout, Rule, reaches, slot
from agent.contract.names import ReleaseRef
from agent.contract.reports import Outcome, Phase
from agent.contract.scopes import EVERYBODY, Scope
from fleet_server.devices import shared_identity
from fleet_server.releases import catalogue
from fleet_server.rollouts import exclusions, rows, rules
from fleet_server.rollouts.gates import Fact
from fleet_server.rollouts.tally import NOT_QUARANTINED, Entry, quarantined
from fleet_server.storage.models import Device, DeviceModel, RolloutRow, SkippedDevice, ToldDevice

DELETED, SHUT_OUT = "it was deleted", "it is shut out"
MOVED = "by its groups and labels it follows another rule now, or is in none of the rollout's waves so far"
"""Why a device that was told is none of the rollout's devices any more."""

MESSAGE_CHARS, REASON_CHARS = 500, 128  # of what a device says; verdicts and views repeat it
ROWS_AT_ONCE = 500


class Hearing(Protocol):
    """Who knows when a device that says nothing counts as silent: the inventory."""

    heard_since: Any
    """A function without arguments: since when devices could be heard without a break; now while they cannot."""

    def silent_at(self, last_seen: float) -> float: ...


class Said(Protocol):
    """What a device says of a model; a row of `device_models`."""

    serving: Any
    sha256: Any
    variant: Any
    phase: Any
    answers: Any
    held: Any


class About(msgspec.Struct, frozen=True):
    """What the facts of a rollout depend on besides the devices. `wave`: the rollout as devices read it, of whose wave the devices are told
    whose slot is below `reach`; `goal`: as they read it when all of them are; `hashes`: variant → the sha256 of its model; `excluded`: the
    hardware classes that do not run the release; `over`: the rollout has ended, and only who refuses the release from now on counts;
    `time_limit_s`: how long a device may take from when it was told. `scope`: whom the rollout is for; `ahead`: the rules that its devices
    look at before its own.
    """

    wave: Rollout
    goal: Rollout
    reach: int
    model: str
    hashes: Mapping[str, str]
    excluded: frozenset[str]
    over: bool = False
    time_limit_s: float = math.inf
    scope: Scope = EVERYBODY
    ahead: tuple[Rule, ...] = ()


class Seen(msgspec.Struct, frozen=True):
    """What is known of one device at a moment. `until`: when it must be read again although nothing changed; `silent`: it counts
    as not there only because nobody heard it; `told_now`: nobody had seen before that it was told.
    """

    device: str
    entry: Entry
    until: float = math.inf
    silent: bool = False
    told_now: bool = False


def about(session: Session, row: RolloutRow, *, over: bool = False) -> About:
    hashes = catalogue.summary_of(catalogue.find(session, ReleaseRef(row.model, row.release))).model_hashes
    known = exclusions.known(session, row.model, row.release)
    excluded = frozenset(kind for kind, one in known.items() if one.ended is None)
    limit_s = rows.rules_of(row).time_limit_s
    scope, ahead = rules.scope_of(row), rules.ahead_of(session, row)
    wave, goal, reach = rows.as_assigned(row), rows.goal_of(row), rows.reach_of(row)
    return About(wave, goal, reach, row.model, hashes, excluded, over, limit_s, scope, ahead)


def is_wider(about: About, before: About) -> bool:
    """Whether the one differs from the other only in that its wave tells more of its devices."""
    return about.reach >= before.reach and about == msgspec.structs.replace(before, wave=about.wave, reach=about.reach)


def of_devices(about: About) -> Select[Any]:
    """The query of the rows that `seen` reads: every device, with what it says of the model if it does, and what the rollout knows
    of it.
    """
    rollout = about.wave.id
    columns = (Device.id, Device.groups, Device.present, Device.last_seen, Device.shared, Device.revoked, Device.hardware_class)
    said = (
        DeviceModel.serving, DeviceModel.sha256, DeviceModel.variant, DeviceModel.phase, DeviceModel.answers, DeviceModel.held,
    )  # fmt: skip
    known = (ToldDevice.at.label("told"), SkippedDevice.at.label("skipped"))
    return (
        select(*columns, Device.retries, Device.labels, *said, *known)
        .outerjoin(DeviceModel, (DeviceModel.device == Device.id) & (DeviceModel.model == about.model))
        .outerjoin(ToldDevice, (ToldDevice.device == Device.id) & (ToldDevice.rollout == rollout))
        .outerjoin(SkippedDevice, (SkippedDevice.device == Device.id) & (SkippedDevice.rollout == rollout))
    )


def of_some(session: Session, about: About, devices: Iterable[str]) -> Iterable[Any]:
    """The rows of these devices; of those that are there."""
    wanted = list(devices)
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        yield from session.execute(of_devices(about).where(Device.id.in_(wanted[start : start + ROWS_AT_ONCE])))


def seen(about: About, row: Any, hearing: Hearing, now: float, told: float | None = None) -> Seen:
    """What a row of `of_devices` means for the rollout. `told`: when the device was told, where that is not written down yet."""
    said = row if row.phase is not None else None
    release = about.wave.release
    serves = said is not None and said.serving == release and not row.revoked
    nothing = Entry(None, row.hardware_class, serves)
    told_at = told if row.told is None else row.told
    if told_at is not None and not about.over:
        nothing = msgspec.structs.replace(nothing, fact=left(row.id, SHUT_OUT if row.revoked else MOVED))
    if row.revoked:
        return Seen(row.id, nothing)
    if row.hardware_class in about.excluded:
        return Seen(row.id, Entry(None, row.hardware_class, serves))
    if not is_in_scope(about, row):
        return Seen(row.id, nothing)
    if not reaches(about.wave, row.id, row.groups):
        return Seen(row.id, _not_reached(about, row, nothing))
    attempt = attempt_of(about, row.retries)
    if about.over:
        fact = fact_of(row.id, True, said, release, {}, about.wave.id, attempt)
        return Seen(row.id, Entry(fact if quarantined(fact) else None, row.hardware_class, serves))
    there = row.present and row.last_seen is not None
    silent_at = hearing.silent_at(row.last_seen) if there else math.inf
    online = there and now < silent_at
    several = shared_identity.are_several(row.shared, now)
    told_now = online and told_at is None
    late_at = (now if told_at is None else told_at) + about.time_limit_s
    fact = msgspec.structs.replace(
        fact_of(row.id, online, said, release, about.hashes, about.wave.id, attempt), told=told_now or told_at is not None,
        overdue=late_at <= now, skipped=row.skipped is not None,
    )  # fmt: skip
    until = min(
        silent_at if online else math.inf,
        late_at if online and late_at > now else math.inf,
        row.shared + shared_identity.SHARED_S if several else math.inf,
    )
    entry = Entry(of_one(fact, several=several), row.hardware_class, serves)
    return Seen(row.id, entry, until, silent=there and not online, told_now=told_now)


def _not_reached(about: About, row: Any, nothing: Entry) -> Entry:
    """Of a device in the scope, which the rollout has not come to. `nothing`: what it is where the rollout never will."""
    if about.over:
        return nothing
    waits = msgspec.structs.replace(nothing, not_reached=nothing.fact is None)
    if about.reach >= EVERYONE or not reaches(about.goal, row.id, row.groups):
        return waits
    there = row.present and row.last_seen is not None
    return msgspec.structs.replace(waits, ahead=slot(about.wave.team or about.wave.id, row.id), there=there)


def left(device: str, why: str) -> Fact:
    """What is left of a device that was told, and is none of the rollout's devices any more."""
    return Fact(device, online=False, serving_it=False, message=why, told=True, left=True)


def deleted(about: About) -> Select[Any]:
    """The query of the devices (`id`) that were told of the rollout and deleted since."""
    query = select(ToldDevice.device.label("id")).where(ToldDevice.rollout == about.wave.id)
    return query.where(~select(Device.id).where(Device.id == ToldDevice.device).exists())


def of_one(fact: Fact, *, several: bool) -> Fact:
    """What is left of a fact when `several` machines report under one identity: only what is bad. What one of them does well
    says nothing of the others, so it is no success, and it keeps no wave waiting.
    """
    if not several or fact.outcome in (Outcome.REFUSED, Outcome.ROLLED_BACK):
        return fact
    return Fact(fact.device, online=False, serving_it=False, message="several machines report under this identity")


def is_in_scope(about: About, row: Any) -> bool:
    """Whether the device of a row of `of_devices` follows the rule that the rollout is about."""
    return not (about.scope or about.ahead) or rules.follows(about.scope, about.ahead, rules.identity_of(row))


def is_reached(about: About, row: Any) -> bool:
    """Whether the rollout has come to the device of a row of `of_devices`."""
    return is_in_scope(about, row) and reaches(about.wave, row.id, row.groups)


def attempt_of(about: About, retries: Sequence[Mapping[str, Any]] | None) -> int:
    """The attempt at the release that a device is to make, by the rollout and by its own record."""
    own = [one["attempt"] for one in retries or () if (one["model"], one["release"]) == (about.model, about.wave.release)]
    return int(max([about.wave.attempt, *own]))


def fact_of(
    device: str, online: bool, said: Said | None, release: int, hashes: Mapping[str, str], rollout: str, attempt: int = 0
) -> Fact:
    """What a device's last signed report says about the release. `hashes`: variant → the sha256 of its model. A bad answer for a cause that
    makes no device refuse the release for good counts only in the `rollout` that it was given to, and one to an attempt before `attempt` not
    at all: the device tries again, and is judged by that.
    """
    if said is None:
        return Fact(device, online, serving_it=False)
    serving = said.serving == release and said.sha256 is not None and hashes.get(said.variant or "") == said.sha256
    phase = Phase(said.phase) if said.phase in _PHASES else None
    last = _last_answer(said.answers, release, rollout, attempt)
    if last is None:
        return Fact(device, online, serving_it=serving, phase=phase, held=bool(said.held))
    reason = last["reason"]
    return Fact(
        device, online, serving_it=serving, phase=phase, outcome=Outcome(last["outcome"]),
        reason=reason and reason[:REASON_CHARS], message=last["message"][:MESSAGE_CHARS], held=bool(said.held),
    )  # fmt: skip


_GOOD = frozenset({Outcome.COMMITTED.value, Outcome.SHADOWED.value})
_PHASES = frozenset(phase.value for phase in Phase)


def _last_answer(answers: Sequence[Mapping[str, Any]], release: int, rollout: str, attempt: int) -> Mapping[str, Any] | None:
    counted = [
        answer
        for answer in answers
        if answer["release"] == release
        and (answer["reason"] not in NOT_QUARANTINED or answer["rollout"] == rollout)
        and (answer["outcome"] in _GOOD or answer.get("attempt", 0) >= attempt)
    ]
    return max(counted, key=lambda answer: float(answer["at"]), default=None)
