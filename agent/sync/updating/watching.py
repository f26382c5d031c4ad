"""WATCHING: a team's releases answer requests, and are judged by how they do. They stay, or what served before serves again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from agent.config import SyncSettings
from agent.contract.acceptance import WatchRules
from agent.contract.reasons import Reason
from agent.contract.reports import Outcome
from agent.store import StoreError
from agent.sync.gates import watch
from agent.sync.gates.watch import Commit, RollBack, Watched
from agent.sync.ports import Clock, Deliveries, Teller
from agent.sync.problems import store_problem
from agent.sync.serving import ServeStatus, ServingPort
from agent.sync.updating import update
from agent.sync.updating.admission import Admission
from agent.sync.updating.device import Device
from agent.sync.updating.manifests import Manifests
from agent.sync.updating.model import AT_ONCE, ModelUpdate
from agent.sync.updating.retention import Housekeeping
from agent.sync.updating.rollingback import RollingBack
from agent.sync.updating.team import Team, Teams
from agent.sync.updating.update import Event, Failure
from agent.sync.updating.wanted import WantedReleases

SAVE_S = 5.0
"""How much of a watch a crash of `sync` may make it repeat. Each save is a write to flash."""


class Watching:
    """Reads how `serve` does, and commits or condemns the whole team."""

    def __init__(
        self,
        wanted: WantedReleases,
        admission: Admission,
        teams: Teams,
        rolling_back: RollingBack,
        manifests: Manifests,
        housekeeping: Housekeeping,
        serving: ServingPort,
        deliveries: Deliveries,
        teller: Teller,
        settings: SyncSettings,
        clock: Clock,
        device: Device,
    ) -> None:
        self._wanted = wanted
        self._admission = admission
        self._teams = teams
        self._rolling_back = rolling_back
        self._manifests = manifests
        self._housekeeping = housekeeping
        self._serving = serving
        self._deliveries = deliveries
        self._teller = teller
        self._settings = settings
        self._clock = clock
        self._device = device

    def step(self, one: ModelUpdate) -> float:
        team = self._teams.led_by(one)
        if team is None:
            return self._settings.watch_poll_s
        members = team.members
        if condemned := {m.model: m.memory.condemned for m in members if m.memory.condemned is not None}:
            return self._condemn(team, condemned)
        if gone := {m.model: self._wanted.overtaken_by(m) for m in members if self._wanted.overtaken(m)}:
            return self._overtaken(team, gone)
        status = one.asked(self._serving.status)
        verdicts = [(member, self._verdict(member, status)) for member in members]
        bad = {member.model: _failure(verdict) for member, verdict in verdicts if isinstance(verdict, RollBack)}
        if bad:
            return self._condemn(team, bad)
        good = [(member, verdict) for member, verdict in verdicts if isinstance(verdict, Commit)]
        if len(good) < len(members):
            for member in members:
                _not_yet(member)
            return self._settings.watch_poll_s
        told = [self._told(member, verdict) for member, verdict in good]
        if untold := next((answer for answer in told if isinstance(answer, Failure)), None):
            return self._condemn(team, {member.model: untold for member in members})
        return self._commit(team, [verdict for _, verdict in good]) if all(told) else self._settings.watch_poll_s

    # -- judging -----------------------------------------------------------------------------------------------------------

    def _verdict(self, one: ModelUpdate, status: ServeStatus | None) -> watch.Verdict:
        """What `serve` says now is added to what the watch knows, and judged."""
        state, known = one.state, one.state.watched
        assert known is not None
        rebooted, lives = known.boot != self._device.boot, self._device.lives()
        torn_away = watch.torn_away(known, self._device.boot, lives)
        watched = watch.observe(known, one.version, _sample(one, status), one.passed_s(), self._device.boot, lives)
        one.state = state = state.but(watched=watched, interruptions=state.interruptions + torn_away)
        if update.interrupted_too_often(state):
            message = f"the machine was restarted {state.interruptions} times during its watch"
            return RollBack(Reason.INTERRUPTED_TOO_OFTEN, message, {})
        if (over := self._admission.lease_over(one, one.version)) is not None:
            return RollBack(over.reason, over.message, {})
        if rebooted or watched.elapsed_s - one.memory.saved_s >= SAVE_S:
            _keep(one, watched)
        serving = status.model(one.model).serving if status else None
        return watch.judge(watched, self._rules(one), serving is not None and serving.version == state.target)

    def _rules(self, one: ModelUpdate) -> WatchRules:
        """The publisher's; the default ones when the manifest was damaged on disk meanwhile: a watch without rules would never
        end.
        """
        return self._admission.acceptance(one).watch

    # -- telling the fleet -------------------------------------------------------------------------------------------------

    def _told(self, one: ModelUpdate, verdict: Commit) -> bool | Failure:
        """The watch ended well. It goes on while the report that says so is on its way: whom a release cut off from the fleet,
        nobody could help from there. True: the fleet knows, or need not; a Failure: it could not be told in time.
        """
        watched = one.state.watched
        assert watched is not None
        if not self._has_to_report(one, watched):
            return True
        if watched.passed_s is None:
            watched = msgspec.structs.replace(watched, passed_s=watched.elapsed_s)
            one.save(one.state.but(watched=watched))
            one.note("watch", "passed", verdict.message, evidence=verdict.evidence)
        if one.memory.report_asked_at is None:
            one.memory.report_asked_at = self._clock.monotonic()
            self._teller.changed()
        waited_s = watched.elapsed_s - (watched.passed_s or 0.0)
        if self._deliveries.since(one.memory.report_asked_at):
            return True
        if waited_s <= self._rules(one).report_within_s:
            return False
        if one.state.before is None:  # with nothing to roll back to, a model that serves is better than none
            return True
        message = f"its watch ended well, but no report of it reached the fleet in {waited_s:.0f} s: it may be what cut this device off"
        evidence = {**verdict.evidence, "waited_s": round(waited_s, 1)}
        return Failure(reason=Reason.CANNOT_REPORT, message=message, evidence=evidence)

    def _has_to_report(self, one: ModelUpdate, watched: Watched) -> bool:
        """Whether the fleet must hear of it before it stays. What an operator holds the model on is the operator's own word."""
        try:
            offline = self._manifests.get(one.ref).acceptance.offline_commit
        except StoreError:
            offline = None
        held = self._wanted.held(one.model)
        if offline is None:
            return watched.could_report and not held
        return not offline and not held

    # -- the ends of a watch -----------------------------------------------------------------------------------------------

    def _commit(self, team: Team, verdicts: Sequence[Commit]) -> float:
        now, answers = self._clock.wall(), {}
        for one, verdict in zip(team.members, verdicts, strict=True):
            told = "; the fleet has heard of it" if one.memory.report_asked_at is not None else ""
            answers[one.model] = one.answer(Outcome.COMMITTED, None, verdict.message, verdict.evidence)
            one.note("watch", "committed", verdict.message + told, evidence=verdict.evidence)
        team.apply(lambda one: update.committed(one.state, now, answers[one.model]))
        for one in team.members:
            answer = answers[one.model]
            one.say("committed", f"release {answer.release} stays: {answer.message}", release=answer.release)
            team.leader.asked(lambda model=one.model: self._serving.commit(model))  # type: ignore[misc]
            self._housekeeping.need_selected(one.model)
        self._housekeeping.collect()
        return AT_ONCE

    def _condemn(self, team: Team, failures: Mapping[str, Failure]) -> float:
        """BAD, persisted. When nothing can be persisted the callers come first: `serve` rolls back all the same, and what is
        selected on disk follows as soon as it can be written.
        """
        try:
            return team.leave(Event.BAD, failures)
        except OSError:
            for one in team.members:
                one.memory.condemned = failures.get(one.model)
            self._rolling_back.protect_callers(team)
            raise

    def _overtaken(self, team: Team, gone: Mapping[str, Failure]) -> float:
        """Something else is wanted. The release before serves first, so that the next one is compared with a proved one. With
        nothing to roll back to, it serves on uncommitted until the next one serves, unless nobody may run it.
        """
        one = team.leader
        wanted = self._wanted.of(one.model)
        nothing = wanted is None or wanted.release is None
        withdrawn = self._wanted.withdrawn(one.model, one.version)
        if team.alone and one.state.before is None and not nothing and not withdrawn:
            one.rest(Event.IN_PLACE)
            return AT_ONCE
        return team.leave(Event.OVERTAKEN, gone)


def _sample(one: ModelUpdate, status: ServeStatus | None) -> watch.Sample | None:
    if status is None:
        return None
    model = status.model(one.model)
    version = model.version(one.state.target)
    stats = version.stats.for_watch() if version else None
    return watch.Sample(status.instance, status.agent_version, model.active, stats)


def _keep(one: ModelUpdate, watched: Watched) -> None:
    """Saves how far the watch is. A disk that is full must not blind it."""
    one.memory.saved_s = watched.elapsed_s
    try:
        one.save(one.state, quietly=True)
    except OSError as error:
        one.problem = store_problem(error, f"watching model {one.model!r}").message


def _not_yet(one: ModelUpdate) -> None:
    """What was said of the end of the watch is said again when it comes."""
    watched = one.state.watched
    if watched is not None and watched.passed_s is not None:
        one.state = one.state.but(watched=msgspec.structs.replace(watched, passed_s=None))
        one.memory.report_asked_at = None


def _failure(verdict: RollBack) -> Failure:
    return Failure(reason=verdict.reason, message=verdict.message, evidence=verdict.evidence)
