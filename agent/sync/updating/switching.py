"""ACTIVATING: a team's releases are loaded, selected and made the ones that answer. Each step persists, then acts, and may be
repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agent.config import SyncSettings
from agent.contract.manifest import ReleaseManifest
from agent.contract.reasons import Reason
from agent.lives import crashed
from agent.store import Choice, Selection, StoreError
from agent.sync.gates import watch
from agent.sync.ports import Clock, Deliveries
from agent.sync.problems import Problem
from agent.sync.serving import ModelStatus, ServeAway, ServeRefused, ServeStatus, ServingPort, VersionStatus
from agent.sync.updating import update
from agent.sync.updating.admission import Admission
from agent.sync.updating.device import Device
from agent.sync.updating.manifests import Manifests, missing
from agent.sync.updating.model import AGAIN_S, AT_ONCE, ModelUpdate
from agent.sync.updating.team import Team, Teams
from agent.sync.updating.update import Event, Failure, UpdateState
from agent.sync.updating.wanted import WantedReleases

SERVE_AWAY_S = 120.0
"""How long an activation waits for a `serve` that is away before it is put off."""

HEARD_BEATS = 3
"""So many missed reports are silence, as the fleet server counts them."""

HEARD_LATELY_S = 180.0
"""A device that was heard within this time before a release began to serve could report then."""


class AnotherFile(Exception):
    """`serve` loaded another file than the manifest names."""


class MemberFailed(Exception):
    """What went wrong with one member of a team."""

    def __init__(self, member: ModelUpdate, cause: ServeRefused | StoreError | AnotherFile) -> None:
        super().__init__(f"{member.model}: {cause}")
        self.member = member
        self.cause = cause


class Switching:
    """Loads the targets beside what serves, remembers what that did so far, selects the targets, and switches."""

    def __init__(
        self,
        wanted: WantedReleases,
        admission: Admission,
        teams: Teams,
        manifests: Manifests,
        serving: ServingPort,
        deliveries: Deliveries,
        settings: SyncSettings,
        clock: Clock,
        device: Device,
    ) -> None:
        self._wanted = wanted
        self._admission = admission
        self._teams = teams
        self._manifests = manifests
        self._serving = serving
        self._deliveries = deliveries
        self._settings = settings
        self._clock = clock
        self._device = device

    def step(self, one: ModelUpdate) -> float:
        team = self._teams.led_by(one)
        if team is None:
            return AGAIN_S
        if gone := {
            member.model: self._wanted.overtaken_by(member) for member in team.members if self._wanted.overtaken(member)
        }:
            return team.leave(Event.OVERTAKEN, gone)
        if any(update.interrupted_too_often(member.state) for member in team.members):
            return team.leave(Event.BAD, {member.model: _cut_off(member.state.interruptions) for member in team.members})
        if not one.state.activated and (why_not := self._why_not_now(team)) is not None:
            return team.put_off(why_not)
        try:
            self._switch(team)
        except ServeAway as away:
            return self._serve_away(team, away)
        except MemberFailed as failed:
            return self._member_failed(team, failed)
        except ServeRefused as refused:
            return self._switch_refused(team, refused)
        except StoreError as error:
            return self._member_failed(team, MemberFailed(one, error))
        return AT_ONCE

    def _why_not_now(self, team: Team) -> Problem | None:
        for one in team.members:
            if (expired := self._wanted.expired(one.model)) is not None:
                return expired
            if (over := self._admission.lease_over(one, one.version)) is not None:
                return Problem(over.reason, over.message)
        return None

    # -- the switch --------------------------------------------------------------------------------------------------------

    def _switch(self, team: Team) -> None:
        """Each part may be repeated. Without room for both, what serves goes first.

        Raises: MemberFailed for what concerns one release; ServeAway; ServeRefused when the switch itself is refused; OSError.
        """
        status = self._serving.status()
        self._forgive_restart(team, status.instance)
        team.leader.memory.asked_instance = status.instance
        loaded = [self._load(one, alone=team.alone) for one in team.members]
        if any(one.state.watched is None for one in team.members):
            team.apply(lambda one: self._with_watch(one, status), quietly=True)
        team.select(lambda one: Selection(model=one.model, active=one.choice, previous=one.state.before))
        self._activate(team, swap=loaded[0] is None)
        for one, version in zip(team.members, loaded, strict=True):
            one.memory.observed_at = one.memory.report_asked_at = None
            one.note("activation", "passed", _in_place_of(one, team), evidence=_numbers(one, version))
        now = self._clock.wall()
        team.apply(lambda one: update.after(one.state, Event.ACTIVATED, now, interruptions=0))

    def _load(self, one: ModelUpdate, *, alone: bool) -> VersionStatus | None:
        """None when `serve` has no memory for it beside what serves, which then has to make room for it. A team needs room for
        all.

        Raises: MemberFailed, ServeAway.
        """
        with _naming(one):
            loaded = self._load_beside(one, alone=alone)
            require_signed(self._manifests.get(one.ref), one.choice, loaded)
        return loaded

    def _load_beside(self, one: ModelUpdate, *, alone: bool) -> VersionStatus | None:
        """Raises: ServeAway, ServeRefused."""
        target = one.choice
        try:
            return self._serving.load(one.model, target.version, target.variant)
        except ServeRefused as refused:
            if refused.code != "no_memory" or one.state.before is None or not alone:
                raise
        message = f"there is no memory for two: release {one.state.before.version} makes room"
        one.say("swapping", message, release=target.version)
        return None

    def _activate(self, team: Team, *, swap: bool) -> None:
        """Raises: ServeAway; ServeRefused, which concerns the only member when there is one, and the switch as a whole
        otherwise.
        """
        one = team.leader
        if not team.alone:
            self._serving.activate_team({member.model: member.version for member in team.members})
        elif swap:
            self._serving.swap(one.model, one.version, one.choice.variant)
        else:
            self._serving.activate(one.model, one.version)

    def _with_watch(self, one: ModelUpdate, status: ServeStatus) -> UpdateState:
        if one.state.watched is not None:
            return one.state
        watched = watch.Watched(
            baseline=_baseline(one, status.model(one.model)),
            instance=status.instance,
            agent_version=status.agent_version,
            boot=self._device.boot,
            could_report=self._deliveries.lately(max(HEARD_BEATS * self._settings.heartbeat_s, HEARD_LATELY_S)),
        )
        return one.state.but(watched=watched, activated=True, stopped=None)

    # -- what goes wrong ---------------------------------------------------------------------------------------------------

    def _serve_away(self, team: Team, away: ServeAway) -> float:
        one = team.leader
        if away.sent:
            self._count_interruption(team)
        elif not one.state.activated and self._clock.wall() - one.state.since > SERVE_AWAY_S:
            return team.put_off(Problem(Reason.ACTIVATION_FAILED, str(away)))
        return AGAIN_S

    def _count_interruption(self, team: Team) -> None:
        team.leader.memory.lost_instance = team.leader.memory.asked_instance
        team.apply(lambda one: one.state.but(interruptions=one.state.interruptions + 1))

    def _forgive_restart(self, team: Team, instance: str) -> None:
        """A `serve` that went away in the middle is counted at once, and taken back when it turns out that it was told to
        end.
        """
        memory = team.leader.memory
        lost, memory.lost_instance = memory.lost_instance, None
        if lost is not None and crashed(self._device.lives(), lost, instance) == ():
            team.apply(lambda one: one.state.but(interruptions=max(0, one.state.interruptions - 1)))

    def _member_failed(self, team: Team, failed: MemberFailed) -> float:
        """One of them could not be loaded, or is not whole in the store."""
        one, cause = failed.member, failed.cause
        if isinstance(cause, StoreError):
            problem = Problem(Reason.STORE_FAILED, missing(one.ref, cause))
            if not team.leader.state.activated:
                return team.put_off(problem)
            return team.leave(Event.BAD, {one.model: Failure(reason=problem.reason, message=problem.message)})
        if isinstance(cause, AnotherFile):
            return team.leave(Event.BAD, {one.model: Failure(reason=Reason.HASH_MISMATCH, message=str(cause))})
        return self._refused(team, cause, one)

    def _switch_refused(self, team: Team, refused: ServeRefused) -> float:
        """The switch itself. Where several switch, it says nothing about any of them: the team tries again later."""
        if refused.code == "not_loaded":  # serve was restarted between load and activate
            self._count_interruption(team)
            return AGAIN_S
        if team.alone:
            return self._refused(team, refused, team.leader)
        if team.leader.state.activated:
            self._unselect(team)
        return team.put_off(_no_room(refused))

    def _refused(self, team: Team, refused: ServeRefused, one: ModelUpdate) -> float:
        """`serve` refuses one of them: for now, because of how this agent is set up, or for good."""
        if refused.code == "not_loaded":
            self._count_interruption(team)
            return AGAIN_S
        if refused.code in ("no_memory", "busy"):
            if team.leader.state.activated and team.leader.state.before is not None:
                self._unselect(team)
            if not team.leader.state.activated:
                return team.put_off(_no_room(refused))
        if not team.leader.state.activated:
            if refused.code == "not_in_store":
                return team.put_off(Problem(Reason.STORE_FAILED, str(refused)))
            if refused.code in ("forbidden", "protocol"):  # how this agent is set up
                return team.put_off(Problem(Reason.ACTIVATION_FAILED, str(refused)))
        reason = Reason.LOAD_FAILED if refused.code == "model_invalid" else Reason.ACTIVATION_FAILED
        return team.leave(Event.BAD, {one.model: Failure(reason=reason, message=str(refused))})

    def _unselect(self, team: Team) -> None:
        """A switch was refused, and what served before serves again: nothing of the targets was met by a request."""
        team.select(lambda one: one.selection_before)
        team.apply(lambda one: one.state.but(watched=None, activated=False))


@contextmanager
def _naming(member: ModelUpdate) -> Iterator[None]:
    """Says of which member of a team an error is.  Raises: MemberFailed."""
    try:
        yield
    except (ServeRefused, StoreError, AnotherFile) as error:
        raise MemberFailed(member, error) from error


def require_signed(manifest: ReleaseManifest, target: Choice, loaded: VersionStatus | None) -> None:
    """Raises: AnotherFile when `serve` has loaded another file than the manifest names. It need not say which one it has."""
    signed = manifest.model_sha256(manifest.variant(target.variant))
    if loaded is not None and loaded.sha256 not in (None, "", signed):
        raise AnotherFile(f"serve loaded {loaded.sha256}, the manifest says {signed}")


def named(choice: Choice | None) -> str:
    return f"release {choice.version}" if choice else "nothing"


def _no_room(refused: ServeRefused) -> Problem:
    reason = Reason.TOO_MUCH_MEMORY if refused.code == "no_memory" else Reason.ACTIVATION_FAILED
    return Problem(reason, f"serve has no room for it: {refused}")


def _in_place_of(one: ModelUpdate, team: Team) -> str:
    others = ", ".join(f"{other.model}:{other.state.target}" for other in team.members if other is not one)
    return f"serves in place of {named(one.state.before)}" + (f", together with {others}" if others else "")


def _numbers(one: ModelUpdate, loaded: VersionStatus | None) -> dict[str, float | str]:
    watched = one.state.watched
    found: dict[str, float | str] = {"could_report": "yes" if watched and watched.could_report else "no"}
    if loaded is not None and loaded.memory_bytes:
        found["memory_bytes"] = loaded.memory_bytes
    return found


def _baseline(one: ModelUpdate, model: ModelStatus) -> watch.Stats | None:
    before = model.version(one.state.before.version) if one.state.before else None
    return before.stats.for_watch() if before else None


def _cut_off(times: int) -> Failure:
    message = f"serve did not survive its activation, or the machine did not: cut off {times} times"
    return Failure(reason=Reason.INTERRUPTED_TOO_OFTEN, message=message)
