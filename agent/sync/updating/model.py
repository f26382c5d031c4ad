"""One model's update: its state, which is on disk before anything is done about it, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.contract.reports import Answer, Outcome, Phase
from agent.store import Choice, Selection
from agent.sync.ports import Clock, Stop, Teller
from agent.sync.problems import store_problem
from agent.sync.serving import ServeAway, ServeRefused
from agent.sync.updating import update
from agent.sync.updating.journal import Entry, Gate, Verdict
from agent.sync.updating.records import Records
from agent.sync.updating.update import Event, Failure, UpdateState

AT_ONCE = 0.0

REST_S = 5.0
"""How often a model at rest is compared with what `serve` says, when nothing else wakes it."""

AGAIN_S = 1.0
"""How soon to ask a `serve` that did not answer again: systemd needs about a second to restart it."""

_T = TypeVar("_T")


@dataclass
class Memory:
    """What this process knows of an update beside its state. After a restart it is found out anew."""

    observed_at: float | None = None
    """When `serve` was last asked about the target, by the monotonic clock."""
    saved_s: float = 0.0
    """How much of the time of a shadow, a canary or a watch is on disk."""
    condemned: Failure | None = None
    """Why the target must not stay, while that cannot be written. What is seen of it after it was stopped changes nothing."""
    report_asked_at: float | None = None
    """When the report was asked for that says that the watch ended well, by the monotonic clock."""
    asked_instance: str = ""
    """The instance of `serve` that was asked to switch."""
    lost_instance: str | None = None
    """The instance that went away in the middle of the switch, and was counted as an interruption."""
    rollback_refusals: int = 0
    lease_stop: bool = False
    """Whether the model was told to stop because its lease ended."""


class ModelUpdate:
    """The update of one model. One thread works on it; `state`, `progress`, `problem`, `stopped` and `lease_s` may be read by
    others.
    """

    def __init__(self, model: str, records: Records, teller: Teller, clock: Clock) -> None:
        """Goes on where the stored state says.  Raises: OSError."""
        self.model = model
        self.progress: float | None = None
        """The share of the target's files that is here, while they are fetched."""
        self.problem: str | None = None
        """What an operator should know of it first."""
        self.stopped: str | None = None
        """Why it does not serve although it could."""
        self.lease_s: float | None = None
        """Within how many seconds the fleet has to be heard, for what serves or is to serve."""
        self.selected_lease_s: float | None = None
        """The lease of what was selected when this step began."""
        self.busy = False
        """Whether `serve` is being asked for something that a switch must not overtake. Changes under the lock of the teams."""
        self.ending: Stop = lambda: False
        """Whether the process ends. Asked in the middle of long work."""
        self.memory = Memory()
        self._records = records
        self._teller = teller
        self._clock = clock
        stored = records.states.load(model)
        self.state = update.resumed(stored)
        if self.state != stored:
            records.states.save(self.state)

    # -- its target --------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The release that is being brought to serve, or was just taken away again."""
        assert self.state.target is not None
        return self.state.target

    @property
    def ref(self) -> ReleaseRef:
        return ReleaseRef(self.model, self.version)

    @property
    def choice(self) -> Choice:
        """The target, with the variant that was chosen for this device."""
        assert self.state.variant is not None
        return Choice(version=self.version, variant=self.state.variant)

    @property
    def selection_before(self) -> Selection | None:
        """What a rollback selects."""
        before = self.state.before
        return Selection(model=self.model, active=before) if before is not None else None

    # -- its state ---------------------------------------------------------------------------------------------------------

    def apply(self, state: UpdateState) -> None:
        """Goes on to another phase, or to another stage of this one: on disk first, then everybody is told.  Raises:
        OSError.
        """
        self._records.states.save(state)
        self.adopt(state)
        self._teller.changed()

    def adopt(self, state: UpdateState) -> None:
        """Goes on with a state that is on disk already, as those of a team are before any of its members has them."""
        self.progress = None
        self.memory.saved_s = 0.0
        self.memory.condemned = None
        self.state = state

    def to(self, event: Event, **changes: object) -> None:
        """Applies `event`, with `changes` of the state.  Raises: OSError."""
        self.apply(update.after(self.state, event, self._clock.wall(), **changes))

    def rest(self, event: Event, *answers: Answer) -> None:
        """Applies an `event` that ends the update, with the answers to keep.  Raises: OSError."""
        self.apply(update.rest(self.state, event, self._clock.wall(), *answers))

    def save(self, state: UpdateState, *, quietly: bool = False) -> None:
        """Keeps the state, on disk and then here. `quietly`: nobody is told.  Raises: OSError, and then it is the one
        before.
        """
        self._records.states.save(state)
        self.state = state
        if not quietly:
            self._teller.changed()

    def passed_s(self) -> float:
        """The seconds since this was last asked; 0 at the first time."""
        now, before = self._clock.monotonic(), self.memory.observed_at
        self.memory.observed_at = now
        return 0.0 if before is None else now - before

    # -- what is told ------------------------------------------------------------------------------------------------------

    def answer(
        self,
        outcome: Outcome,
        reason: Reason | None,
        message: str,
        evidence: dict[str, float | str] | None = None,
        *,
        rollout: str | None = None,
        release: int | None = None,
    ) -> Answer:
        """What this device says to the release and rollout; without those two, to the target and the rollout that wants it."""
        return Answer(
            release=release if release is not None else self.version,
            outcome=outcome,
            rollout=rollout or self.state.rollout,
            reason=reason.value if reason else None,
            message=message,
            at=self._clock.wall(),
            evidence=evidence or {},
            attempt=self.state.attempt,
        )

    @property
    def gate(self) -> Gate:
        """The gate that the phase is."""
        return _GATES.get(self.state.phase, "fetch")

    def note(
        self,
        gate: Gate,
        verdict: Verdict,
        message: str,
        *,
        reason: Reason | None = None,
        evidence: Mapping[str, float | str] | None = None,
        release: int | None = None,
    ) -> None:
        """Adds a line for `edge-agent why`. A journal that cannot be written never stands in the way."""
        state = self.state
        entry = Entry(
            at=self._clock.wall(),
            release=release if release is not None else state.target,
            gate=gate,
            verdict=verdict,
            message=message,
            reason=reason.value if reason else None,
            rollout=state.rollout,
            evidence=dict(evidence or {}),
        )
        try:
            self._records.journal.add(self.model, entry)
        except OSError as error:
            self.problem = store_problem(error, f"writing the journal of model {self.model!r}").message

    def say(self, name: str, message: str, *, release: int | None = None, reason: str | None = None) -> None:
        """Sends an event for people."""
        self._teller.say(name, message, model=self.model, release=release, reason=reason)

    def asked(self, question: Callable[[], _T]) -> _T | None:
        """The answer of `serve`; None when it is away or refuses, and then `problem` says why. What it was asked to do is asked
        again at rest.
        """
        try:
            return question()
        except (ServeAway, ServeRefused) as error:
            self.problem = str(error)
            return None


_GATES: Mapping[Phase, Gate] = MappingProxyType({
    Phase.FETCHING: "fetch",
    Phase.TRIALING: "trial",
    Phase.SHADOWING: "shadow",
    Phase.CANARYING: "canary",
    Phase.ACTIVATING: "activation",
    Phase.WATCHING: "watch",
    Phase.ROLLING_BACK: "watch",
})  # fmt: skip
