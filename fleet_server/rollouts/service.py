"""Feeds the rollout machine from the database and signs what it decides.

Order: the decision is committed first, together with the number of the assignment it makes necessary; then the assignment is
signed; then devices are poked. A crash in between is made good at the next start, because the document follows from the database.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from agent.contract.assignment import MAX_ASSIGNMENT_BYTES, Assignment, ModelAssignment, parse_window
from agent.contract.codec import decode, encode
from agent.contract.names import ReleaseRef
from fleet_server.access import SERVER, Actor
from fleet_server.config import FleetConfig
from fleet_server.devices.inventory import Inventory
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.journal import Happening, Journal
from fleet_server.releases import catalogue
from fleet_server.releases.repository import Repository
from fleet_server.rollouts import classes, gates, heard, machine, reading, teams
from fleet_server.rollouts.gates import Ruling, Verdict
from fleet_server.rollouts.machine import Event, IllegalTransition, State, Wave
from fleet_server.storage.database import Database
from fleet_server.storage.models import ExclusionRow, ModelRow, ReleaseRow, RolloutRow, Setting, VerdictRow

_log = logging.getLogger(__name__)

CLASSES_LOOKED_AT_S = 60.0
"""Between two looks at the refusals of what every device runs already: devices report as often, and nobody waits for it."""

STOPPED_SHOWN = 200
ACTIVE = [state.value for state in machine.ACTIVE]


Mode = Literal["install", "shadow"]


class Poker(Protocol):
    def poke_all(self, assignment_version: int) -> None: ...


class Rollouts:
    def __init__(
        self, database: Database, repository: Repository, inventory: Inventory, journal: Journal, config: FleetConfig,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._database, self._repository, self._inventory, self._journal = database, repository, inventory, journal
        self._config, self._clock = config, clock
        self._lock = threading.RLock()  # one decision at a time
        self._leases: dict[tuple[str, int], float | None] = {}
        self._looked_at = 0.0
        self.poker: Poker | None = None

    # -- the assignment ----------------------------------------------------------------------------------------------------

    def assignment(self) -> dict[str, Any]:
        """The signed assignment, as devices read it."""
        document: dict[str, Any] = msgspec.json.decode(self._repository.assignment_bytes())
        return document

    def publish_assignment(self) -> None:
        """Signs the assignment when the database wants a newer one than is signed, and pokes every device."""
        with self._lock:
            signed = decode(self._repository.assignment_bytes(), Assignment, limit_bytes=MAX_ASSIGNMENT_BYTES)
            with self._database.reading() as session:
                wanted = reading.assignment_version(session)
                document = self._document(session, wanted)
            if wanted <= signed.version:
                return
            self._repository.assign(encode(document))
        if self.poker:
            self.poker.poke_all(wanted)

    def catch_up(self) -> bool:
        """Brings a database that is older than the signed assignment (restored from a backup) to what devices were told last.

        Otherwise every decision would get a version that devices have seen already, and be signed for nobody. What is signed wins,
        above all what was withdrawn; a rollout of which only one side knows is over. Whether anything was to be done.
        """
        with self._lock, self._database.session() as session:
            signed = decode(self._repository.assignment_bytes(), Assignment, limit_bytes=MAX_ASSIGNMENT_BYTES)
            if signed.version <= reading.assignment_version(session):
                return False
            for model, said in signed.models.items():
                self._adopt(session, model, said)
            self._next_version(session, at_least=signed.version + 1)
            self._journal.audit(session, SERVER, "database.caught_up", self._config.fleet, assignment=signed.version)
            return True

    def _adopt(self, session: Session, model: str, said: ModelAssignment) -> None:
        row = session.get(ModelRow, model)
        if row is None:
            row = ModelRow(model=model, release=None, previous=None)
            session.add(row)
        if row.release != said.release:
            older = row.release is not None and said.release is not None and row.release < said.release
            row.release, row.previous = said.release, row.release if older else None
        for number in said.withdrawn:
            if (release := session.get(ReleaseRow, (model, number))) is not None:
                release.withdrawn = True
        if row.previous in said.withdrawn:
            row.previous = None
        known = said.rollout.id if said.rollout is not None else None
        for active in session.scalars(select(RolloutRow).where(RolloutRow.model == model, RolloutRow.state.in_(ACTIVE))):
            if active.id != known:
                self._apply(session, active, Event.ABORT, reason="the database was restored from an older backup")

    def _document(self, session: Session, version: int) -> Assignment:
        models = {row.model: row for row in session.scalars(select(ModelRow))}
        active = {row.model: row for row in session.scalars(select(RolloutRow).where(RolloutRow.state.in_(ACTIVE)))}
        withdrawn: dict[str, list[int]] = {}
        for model, number in session.execute(
            select(ReleaseRow.model, ReleaseRow.version).where(ReleaseRow.withdrawn.is_(True))
        ):
            withdrawn.setdefault(model, []).append(number)
        releases = {model: {row.release} for model, row in models.items() if row.release is not None}
        for model, rollout in active.items():
            releases.setdefault(model, set()).add(rollout.release)
        excluded = classes.in_force(session, releases)
        return Assignment(
            fleet=self._config.fleet,
            version=version,
            together=teams.groups(session, models),
            models={
                model: ModelAssignment(
                    release=models[model].release if model in models else None,
                    rollout=reading.as_devices_read_it(active[model]) if model in active else None,
                    withdrawn=tuple(sorted(withdrawn.get(model, []))),
                    excluded=excluded.get(model, ()),
                )
                for model in sorted({*models, *active})
            },
        )

    # -- what people ask ---------------------------------------------------------------------------------------------------

    def start(
        self, actor: Actor, ref: ReleaseRef, *, groups: Iterable[str] = (), permille: int | None = None, hold: bool = False,
        max_failures: int = 0, together: Iterable[ReleaseRef] = (), window: str | None = None, mode: Mode = "install",
    ) -> dict[str, Any]:  # fmt: skip
        """Begins a rollout; with `together`, of releases of other models that switch with it on each device, all or none. In mode shadow
        devices run it on copies of live requests and install nothing.

        Raises: NotFound, Conflict (another one is under way, withdrawn, not signed any more, already what everyone runs), Invalid.
        """
        if max_failures < 0:
            raise Invalid("max_failures must not be negative")
        refs = [ref, *together]
        if mode == "shadow" and len(refs) > 1:
            raise Invalid("releases that switch together cannot be rolled out in mode shadow, in which nothing switches")
        if len({one.model for one in refs}) < len(refs):
            raise Invalid("releases that switch together are of different models")
        try:
            waves = machine.waves(tuple(dict.fromkeys(groups)), permille)
            if window is not None:
                parse_window(window)
        except ValueError as error:
            raise Invalid(str(error)) from error
        with self._lock:
            with self._database.session() as session:
                rows = [
                    self._create(session, actor, one, waves, hold=hold, max_failures=max_failures, mode=mode) for one in refs
                ]
                for row in rows:
                    row.together, row.window = rows[0].id if len(rows) > 1 else None, window
                    row.state = machine.step(reading.plan_of(row), Event.START).state.value
                self._next_version(session)
                reached = reading.reach(waves[0])
                goes = "runs beside what serves on" if mode == "shadow" else "goes to"
                events = [
                    self._note(session, rows[0], "rollout_started", f"{rows[0].id}: {reading.named(rows)} {goes} {reached}")
                ]
            self._after(events)
            self._evaluate(rows[0].id)
            return self.get(rows[0].id)

    def _create(
        self,
        session: Session,
        actor: Actor,
        ref: ReleaseRef,
        waves: tuple[Wave, ...],
        *,
        hold: bool,
        max_failures: int,
        mode: Mode,
    ) -> RolloutRow:
        if catalogue.find(session, ref).withdrawn:
            raise Conflict(f"release {ref} was withdrawn; publish a new version", code="withdrawn")
        self._refuse_unsigned(session, ref)
        if mode == "install":
            catalogue.refuse_other_bytes(session, catalogue.manifest_of(catalogue.find(session, ref)))
        other = session.scalar(select(RolloutRow).where(RolloutRow.model == ref.model, RolloutRow.state.in_(ACTIVE)))
        if other is not None:
            raise Conflict(
                f"rollout {other.id} of {other.model}:{other.release} is {other.state}; "
                f"wait for its end or abort it (`edge-fleet rollout abort {other.id}`)",
                code="rollout_active",
            )
        model = session.get(ModelRow, ref.model)
        if model is None:
            model = ModelRow(model=ref.model, release=None, previous=None)
            session.add(model)
        if model.release is None and mode == "shadow":
            raise Conflict(
                f"no release of {ref.model} serves yet, so there are no requests to look at {ref} with; roll it out without --shadow",
                code="nothing_serves",
            )
        if model.release == ref.version:
            raise Conflict(f"every device is assigned {ref} already", code="already_assigned")
        number = (session.scalar(select(func.max(RolloutRow.number))) or 0) + 1
        now = self._clock()
        row = RolloutRow(
            id=f"r{number}-{secrets.token_hex(2)}", number=number, model=ref.model, release=ref.version, previous=model.release,
            waves=[msgspec.to_builtins(wave) for wave in waves], wave=0, state=State.CREATED.value, hold=hold,
            max_failures=max_failures, mode=mode, created=now, created_by=actor.name, updated=now, reason="",
        )  # fmt: skip
        session.add(row)
        session.flush()
        self._journal.audit(
            session,
            actor,
            "rollout.start",
            row.id,
            release=str(ref),
            waves=row.waves,
            hold=hold,
            max_failures=max_failures,
            mode=mode,
        )
        return row

    def _refuse_unsigned(self, session: Session, ref: ReleaseRef) -> None:
        """Raises: Conflict when no publisher vouches for the release any more, so that every device would refuse it."""
        sha256 = catalogue.find(session, ref).sha256
        for publisher in self._repository.publishers().values():
            target = publisher.signed.targets.get(ref.target_path)
            if target is not None and target.hashes.get("sha256") == sha256:
                return
        raise Conflict(
            f"release {ref} is not signed by any publisher that the fleet trusts now, so every device would refuse it: "
            f"its publisher was removed (`edge-fleet publisher list`); publish a new version",
            code="not_signed",
        )

    def promote(self, actor: Actor, rollout_id: str) -> dict[str, Any]:
        """Begins the next wave of a rollout that waits for it."""
        return self._ask(actor, rollout_id, Event.PROMOTE, "rollout_promoted", "goes on to {wave}")

    def pause(self, actor: Actor, rollout_id: str) -> dict[str, Any]:
        return self._ask(actor, rollout_id, Event.PAUSE, "rollout_paused", "is paused; devices already reached go on")

    def resume(self, actor: Actor, rollout_id: str) -> dict[str, Any]:
        return self._ask(actor, rollout_id, Event.RESUME, "rollout_resumed", "goes on with {wave}")

    def abort(self, actor: Actor, rollout_id: str) -> dict[str, Any]:
        """Takes every device back to the release before."""
        return self._ask(actor, rollout_id, Event.ABORT, "rollout_aborted", "was aborted; back to {previous}")

    def _ask(self, actor: Actor, rollout_id: str, event: Event, name: str, text: str) -> dict[str, Any]:
        with self._lock:
            with self._database.session() as session:
                rows = teams.of(session, reading.find(session, rollout_id))
                row = rows[0]
                self._apply_all(session, rows, event, reason=f"by {actor.name}" if event is Event.ABORT else "")
                self._journal.audit(session, actor, f"rollout.{event.value}", row.id)
                wave = reading.reach(reading.plan_of(row).waves[row.wave])
                message = f"{row.id} ({reading.named(rows)}) {text.format(wave=wave, previous=reading.previous(rows))}"
                events = [self._note(session, row, name, message)]
            self._after(events)
            self._evaluate(rollout_id)
            return self.get(rollout_id)

    def roll_back(self, actor: Actor, model: str, to: int | None) -> dict[str, Any]:
        """Takes every device to an earlier release of the model at once, ending a rollout that is under way."""
        with self._lock:
            with self._database.session() as session:
                row = session.get(ModelRow, model)
                if row is None:
                    raise NotFound(f"nothing of model {model!r} was ever rolled out")
                active = session.scalar(select(RolloutRow).where(RolloutRow.model == model, RolloutRow.state.in_(ACTIVE)))
                target = to if to is not None else (row.release if active else row.previous)
                reading.refuse_forward(session, row, to)
                if target is None:
                    raise Conflict(
                        f"there is no earlier release of {model!r} to go back to; name one with --to", code="no_previous"
                    )
                if catalogue.find(session, ReleaseRef(model, target)).withdrawn:
                    raise Conflict(f"release {model}:{target} was withdrawn; name another with --to", code="withdrawn")
                self._refuse_unsigned(session, ReleaseRef(model, target))
                if target == row.release and active is None:
                    raise Conflict(f"every device is assigned {model}:{target} already", code="already_assigned")
                if active is not None:
                    self._apply_all(session, teams.of(session, active), Event.ABORT, reason=f"rolled back by {actor.name}")
                left = active.release if active is not None else row.release
                if target != row.release:
                    row.release, row.previous = target, reading.before(session, model, target)
                self._next_version(session)
                self._journal.audit(session, actor, "model.rollback", model, to=target, left=left)
                message = f"{model} goes back to version {target} everywhere"
                happening = Happening(name="model_rolled_back", message=message, model=model, release=target)
                events = [self._journal.record(session, happening)]
            self._after(events)
            return {"model": model, "release": target, "left": left}

    def withdraw(self, actor: Actor, ref: ReleaseRef) -> dict[str, Any]:
        """Nobody may run the release any more, in this fleet, ever. Devices that do go back to the one before."""
        with self._lock:
            with self._database.session() as session:
                release = catalogue.find(session, ref)
                if release.withdrawn:
                    raise Conflict(f"release {ref} was withdrawn already", code="withdrawn")
                release.withdrawn = True
                active = session.scalar(select(RolloutRow).where(RolloutRow.model == ref.model, RolloutRow.state.in_(ACTIVE)))
                if active is not None and active.release == ref.version:
                    reason = f"{ref} was withdrawn by {actor.name}"
                    self._apply_all(session, teams.of(session, active), Event.ABORT, reason=reason)
                self._leave_withdrawn(session, ref)
                self._next_version(session)
                self._journal.audit(session, actor, "release.withdraw", str(ref))
                happening = Happening(
                    name="release_withdrawn",
                    message=f"{ref} was withdrawn: no device may run it",
                    model=ref.model,
                    release=ref.version,
                )
                events = [self._journal.record(session, happening)]
            self._after(events)
            self._journal.changed("releases")
            return {"release": str(ref), "withdrawn": True}

    def reinstate(self, actor: Actor, ref: ReleaseRef) -> dict[str, Any]:
        """The release may be rolled out again: its publisher signed so. Nothing is rolled out by this alone."""
        with self._lock:
            with self._database.session() as session:
                catalogue.find(session, ref).withdrawn = False
                self._next_version(session)
                happening = Happening(
                    name="release_reinstated",
                    message=f"{ref} may be run again: its publisher signed so, at the request of {actor.name}",
                    model=ref.model,
                    release=ref.version,
                )
                events = [self._journal.record(session, happening)]
            self._after(events)
            self._journal.changed("releases")
            return {"release": str(ref), "withdrawn": False}

    def _leave_withdrawn(self, session: Session, ref: ReleaseRef) -> None:
        model = session.get(ModelRow, ref.model)
        if model is None:
            return
        if model.previous == ref.version:
            model.previous = None
        if model.release == ref.version:
            model.release = model.previous
            model.previous = reading.before(session, ref.model, model.release) if model.release is not None else None

    # -- gates -------------------------------------------------------------------------------------------------------------

    def evaluate(self, models: Iterable[str] | None = None) -> None:
        """Judges the running rollouts (of `models`, or all) on what devices have said by now, and acts on it."""
        with self._lock:
            query = select(RolloutRow.id).where(RolloutRow.state.in_(ACTIVE))
            if models is not None:
                query = query.where(RolloutRow.model.in_(list(models)))
            with self._database.reading() as session:
                found = list(session.scalars(query))
            for rollout_id in found:
                self._evaluate(rollout_id)
            if models is None:  # the tick: a decision whose signing failed (a full disk) is signed now
                self._look_at_what_runs()
                self.publish_assignment()

    def _look_at_what_runs(self) -> None:
        """Devices that were away refuse what every device runs after its rollout is over: it may be stopped for their class, too."""
        if self._clock() - self._looked_at < CLASSES_LOOKED_AT_S:
            return
        self._looked_at = self._clock()
        with self._database.session() as session:
            events: list[dict[str, Any]] = []
            for model in session.scalars(select(ModelRow).where(ModelRow.release.is_not(None))):
                row = reading.came_to_all(session, model.model, model.release or 0)
                if row is not None:
                    rows = teams.of(session, row)
                    events += self._stop_classes(session, [(one, heard.refusals(session, one)) for one in rows]) or []
        if events:
            self._after(events)

    def _evaluate(self, rollout_id: str) -> None:
        """Goes on as long as gates pass: a wave whose devices all serve the release already takes no time."""
        while True:
            with self._database.session() as session:
                rows = teams.of(session, reading.find(session, rollout_id))
                if State(rows[0].state) in machine.TERMINAL:
                    return
                facts = [(row, heard.of_wave(session, row, self._inventory, self._clock())) for row in rows]
                verdict = teams.joint([(row, self._judge(session, row, found)) for row, found in facts])
                # What is bad for too many ends for everybody; only what may go on is stopped for a class.
                events = self._stop_classes(session, facts) if verdict.ruling is not Ruling.FAIL else None
                changed = events is not None
                if events is None:
                    changed = any([self._keep_verdict(session, row, verdict) for row in rows])  # noqa: C419 - of all of them
                    events = self._follow(session, rows, verdict)
            if events is None:
                if changed:
                    self._journal.changed("rollouts")
                return
            self._after(events)

    def _stop_classes(self, session: Session, facts: list[tuple[RolloutRow, list[gates.Fact]]]) -> list[dict[str, Any]] | None:
        """Leaves out the hardware classes of which enough devices refuse a release; the events of it, None when there is none."""
        least, share = self._config.rollouts.class_stop, self._config.rollouts.class_stop_share
        events = []
        for row, found in facts:
            refused = [fact for fact in found if classes.quarantined(fact)]
            if not least or len(refused) < least or row.state == State.CREATED.value:
                continue
            kinds = classes.classes_of(session, [fact.device for fact in refused])
            decided = classes.known(session, row.model, row.release)
            serving = classes.serving(session, row.model, row.release)
            for kind, devices in classes.to_stop(refused, kinds, serving, least, share).items():
                if kind in decided:
                    continue
                because = (
                    f"{len(devices)} devices quarantined {row.model}:{row.release}, the first of them for {devices[0].reason}"
                )
                for member, _ in facts:  # none of a team switches where one of it may not
                    if kind not in classes.known(session, member.model, member.release):
                        classes.stop(session, member, kind, devices, self._clock(), because)
                message = f"{row.id}: {row.model}:{row.release} is stopped for {kind}: {because}"
                events.append(self._note(session, row, "release_stopped_for_class", message, reason="class_stopped"))
        if events:
            self._next_version(session)
        return events or None

    def lift(self, actor: Actor, number: int) -> dict[str, Any]:
        """Lets a stopped hardware class have the release after all; it is not stopped again.  Raises: NotFound, Conflict."""
        with self._lock:
            with self._database.session() as session:
                row = classes.lift(session, number, actor.name, self._clock())
                self._next_version(session)
                self._journal.audit(
                    session, actor, "class.lift", str(number), release=f"{row.model}:{row.release}", hardware=row.hardware
                )
                message = f"{row.model}:{row.release} may go to {row.hardware} after all, says {actor.name}"
                happening = Happening(name="class_lifted", message=message, model=row.model, release=row.release)
                events = [self._journal.record(session, happening)]
                found = classes.view(row)
            self._after(events)
            return found

    def stopped(self, *, model: str | None = None) -> list[dict[str, Any]]:
        """The hardware classes for which releases were stopped, newest first, lifted ones included."""
        query = select(ExclusionRow).order_by(ExclusionRow.id.desc()).limit(STOPPED_SHOWN)
        if model is not None:
            query = query.where(ExclusionRow.model == model)
        with self._database.reading() as session:
            return [classes.view(row) for row in session.scalars(query)]

    def shortest_lease_s(self) -> float | None:
        """The shortest lease of a release that some device may be told to run; None when none has one."""
        with self._database.reading() as session:
            refs = [(row.model, number) for row in session.scalars(select(ModelRow)) for number in (row.release, row.previous)]
            refs += [(r.model, r.release) for r in session.scalars(select(RolloutRow).where(RolloutRow.state.in_(ACTIVE)))]
            leases = [self._lease(session, model, number) for model, number in refs if number is not None]
        return min((lease for lease in leases if lease is not None), default=None)

    def _lease(self, session: Session, model: str, number: int) -> float | None:
        if (model, number) not in self._leases:  # a release never changes, and its manifest may be large
            row = session.get(ReleaseRow, (model, number))
            self._leases[model, number] = catalogue.manifest_of(row).acceptance.lease_s if row is not None else None
        return self._leases[model, number]

    def _judge(self, session: Session, row: RolloutRow, facts: list[gates.Fact]) -> Verdict:
        if not facts and any(one.lifted is None for one in classes.known(session, row.model, row.release).values()):
            return Verdict(Ruling.FAIL, "it is stopped for every kind of hardware in the wave", gates.Counts())
        return gates.judge(
            facts, max_failures=row.max_failures, min_devices=self._config.rollouts.min_devices, only_looks=row.mode == "shadow"
        )

    def _keep_verdict(self, session: Session, row: RolloutRow, verdict: Verdict) -> bool:
        """Stores the verdict unless it says what the last one of this wave said. Whether it did."""
        last = session.scalar(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq.desc()).limit(1))
        counts = msgspec.to_builtins(verdict.counts)
        if last is not None and (last.wave, last.verdict, last.counts) == (row.wave, verdict.ruling.value, counts):
            return False
        session.add(
            VerdictRow(
                rollout=row.id, wave=row.wave, at=self._clock(), verdict=verdict.ruling.value, why=verdict.why, counts=counts,
                evidence=msgspec.to_builtins(verdict.evidence),
            )
        )  # fmt: skip
        return True

    def _follow(self, session: Session, rows: list[RolloutRow], verdict: Verdict) -> list[dict[str, Any]] | None:
        """Does what the verdict asks for; the events of it, or None when nothing changed."""
        row, ref = rows[0], reading.named(rows)
        if row.state == State.CREATED.value:
            return None
        if verdict.ruling is Ruling.FAIL:
            self._apply_all(session, rows, Event.GATE_FAILED, reason=verdict.why)
            message = f"{row.id} ({ref}) was aborted: {verdict.why}; back to {reading.previous(rows)}"
            return [self._note(session, row, "rollout_aborted", message, reason="gate_failed")]
        event = machine.on_pass(reading.plan_of(row)) if verdict.ruling is Ruling.PASS else None
        if event is None:
            return None
        self._apply_all(session, rows, event)
        if event is Event.LAST_WAVE_PASSED and row.mode == "shadow":
            said = f"{ref} kept its rules beside what serves ({verdict.why}); nothing was installed"
            return [self._note(session, row, "rollout_completed", f"{row.id}: {said}")]
        if event is Event.LAST_WAVE_PASSED:
            return [self._note(session, row, "rollout_completed", f"{row.id}: every device is assigned {ref} ({verdict.why})")]
        if event is Event.HOLD:
            return [
                self._note(session, row, "rollout_holding", f"{row.id} ({ref}): wave {row.wave + 1} passed; waits for promote")
            ]
        wave = reading.reach(reading.plan_of(row).waves[row.wave])
        return [self._note(session, row, "rollout_wave", f"{row.id} ({ref}): wave {row.wave} passed; goes on to {wave}")]

    # -- pieces ------------------------------------------------------------------------------------------------------------

    def _apply_all(self, session: Session, rows: list[RolloutRow], event: Event, *, reason: str = "") -> None:
        for row in rows:
            self._apply(session, row, event, reason=reason)

    def _apply(self, session: Session, row: RolloutRow, event: Event, *, reason: str = "") -> None:
        """One step of the machine, written down with what it makes of the model and the assignment.  Raises: Conflict."""
        try:
            plan = machine.step(reading.plan_of(row), event)
        except IllegalTransition as error:
            raise Conflict(f"rollout {row.id}: {error}", code="illegal_transition") from error
        row.state, row.wave, row.updated = plan.state.value, plan.wave, self._clock()
        row.reason = reason or row.reason
        if plan.state is State.COMPLETED and row.mode == "install":
            model = session.get(ModelRow, row.model)
            assert model is not None
            model.release, model.previous = row.release, model.release
        if plan.state in machine.TERMINAL or event in machine.NEXT_WAVE:
            self._next_version(session)

    def _next_version(self, session: Session, *, at_least: int = 2) -> None:
        setting = session.get(Setting, reading.VERSION_SETTING)
        if setting is None:
            session.add(
                Setting(name=reading.VERSION_SETTING, value=str(at_least))
            )  # 1 is the empty assignment that `init` signed
        else:
            setting.value = str(max(int(setting.value) + 1, at_least))
        session.flush()

    def _note(self, session: Session, row: RolloutRow, name: str, message: str, *, reason: str | None = None) -> dict[str, Any]:
        happening = Happening(name=name, message=message, model=row.model, release=row.release, reason=reason)
        return self._journal.record(session, happening)

    def _after(self, events: list[dict[str, Any]]) -> None:
        """After the commit: sign, poke, tell."""
        self.publish_assignment()
        self._journal.announce(events)
        self._journal.changed("rollouts")

    # -- looking -----------------------------------------------------------------------------------------------------------

    def recent(self, *, model: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        query = select(RolloutRow).order_by(RolloutRow.number.desc()).limit(limit)
        if model is not None:
            query = query.where(RolloutRow.model == model)
        with self._database.reading() as session:
            return [reading.view(session, row) for row in session.scalars(query)]

    def get(self, rollout_id: str) -> dict[str, Any]:
        """Everything about a rollout, with every verdict.  Raises: NotFound."""
        with self._database.reading() as session:
            row = reading.find(session, rollout_id)
            rows = session.scalars(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq))
            return {**reading.view(session, row), "verdicts": [reading.verdict_view(verdict) for verdict in rows]}

    def models(self) -> list[dict[str, Any]]:
        """What the fleet runs of each model."""
        with self._database.reading() as session:
            rows = session.scalars(select(ModelRow).order_by(ModelRow.model))
            return [{"model": row.model, "release": row.release, "previous": row.previous} for row in rows]
