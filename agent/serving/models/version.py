"""One version of a model: what it is, what it costs, whether it is there, and what works with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agent.contract.manifest import Picture, Serving
from agent.host import priority
from agent.serving.models.canary import Canary
from agent.serving.models.cost import Cost
from agent.serving.models.outputs import OutputSketch
from agent.serving.models.presence import READY, SAID, Presence, State, Step
from agent.serving.models.stats import Stats
from agent.serving.scheduling.lanes import Job, Lane
from agent.serving.scheduling.sequences import Sequences
from runtimes.contract import Array, Growing, Model, Placement, TensorSpec, is_stateful
from runtimes.naming import Interfaces

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 60.0  # a run that takes longer keeps its model in memory instead of having it closed under it

Run = Callable[[Mapping[str, Array], Sequence[str] | None], list[Array]]


class Tap(Protocol):
    """Copies requests: see `shadowing`."""

    def copy(self, plan: Any, feeds: Mapping[str, Array], arrays: Sequence[Array], run_s: float) -> None:
        """Copies a request that was answered with `arrays`.  Never raises, never waits."""


class Process(Protocol):
    """The process of an isolated model."""

    @property
    def pid(self) -> int: ...

    @property
    def memory_bytes(self) -> int: ...

    def on_death(self, died: Callable[[str], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading made, and what it took. `at_s` is when, as a perf_counter; `is_warm`: a run was made and worked."""

    model: Model | None = None
    process: Process | None = None  # of an isolated model
    at_s: float = 0.0
    load_s: float = 0.0
    memory_bytes: int = 0
    is_warm: bool = False

    @property
    def now_bytes(self) -> int:
        """What the model takes: when it was loaded, and what runs have left with its engine since; or its process, as it is
        now.
        """
        if self.process is not None:
            return self.process.memory_bytes or self.memory_bytes
        return self.memory_bytes + (self.model.grown_bytes if isinstance(self.model, Growing) else 0)


@dataclass(slots=True)
class History:
    """What became of it since it was first loaded; kept by `residency` and `restarts`."""

    evictions: int = 0
    reloads: int = 0
    restarts: int = 0
    crashes: int = 0  # in a row
    has_crashed: bool = False  # and was not started again yet
    retry_s: float = 0.0  # a perf_counter: not to be loaded again before


def _away(feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:  # noqa: ARG001
    raise AssertionError("the model is not in memory, and somebody is inside")


class Version:
    """One version of a model in memory, or the reason why it is not."""

    def __init__(self, name: str, number: int, variant: str, sha256: str, runtime: str, cost: Cost | None = None) -> None:
        # What it is.
        self.name = name
        self.number = number
        self.number_text = str(number)
        self.variant = variant
        self.sha256 = sha256
        self.runtime = runtime
        self.source: Any = None  # where it was loaded from, to whoever loads it again
        self.filename = ""
        self.serving = Serving()  # as the release wants it
        self.picture: Picture | None = None  # how a JPEG or PNG becomes its input
        self.labels: Mapping[str, Sequence[str]] = {}  # of the classes of some outputs
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.interfaces = Interfaces((), ())  # the names that requests may use
        self.takes_text = False  # has BYTES inputs
        self.placement = Placement("", "")
        # What it costs, whether it is there, and what became of it.
        self.cost = cost or Cost()
        self.presence = Presence()
        self.loaded = Loaded()
        self.history = History()
        self.run: Run = _away  # the model's
        # What works with it.
        self.lane = Lane(self.serving)
        self.stats = Stats()
        self.plans: dict[bytes, Any] = {}  # the protocol's: requests seen before, understood
        self.sketch: OutputSketch | None = None  # of what it answers, where somebody wants to know
        self.tap: Tap | None = None  # is to be given the next request that it answered
        self.canary: Canary[Version] | None = None  # of the active version: another one answers a share of its requests
        self.enter = self.presence.enter
        self.leave = self.presence.leave

    # -- whether it is there -------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """As clients are told it."""
        return SAID[self.presence.place]

    @property
    def reason(self) -> str:
        return self.presence.reason

    @property
    def away(self) -> bool:
        """Whether its model is not in memory and comes back when it is asked for. Whoever enters waits in its lane."""
        return self.presence.is_away

    @property
    def answers(self) -> bool:
        """Whether a prediction will be answered, if after a while."""
        return self.presence.answers

    @property
    def inside(self) -> int:
        return self.presence.inside

    @property
    def model(self) -> Model | None:
        return self.loaded.model

    def say(self, reason: str) -> None:
        """Why it is not there, or what else is to be known of it."""
        self.presence.reason = reason

    def ready(self, model: Model, run_s: float | None = None) -> None:
        """It is there for the first time; a run of it took `run_s`, None when none was timed."""
        self._hold_model(Loaded(model, at_s=time.perf_counter(), is_warm=run_s is not None), run_s)
        with self.presence.lock:
            self.presence.step(Step.LOADED)

    def took(self, load_s: float, memory_bytes: int, process: Process | None = None) -> None:
        """What loading it took, and the process that it has for itself."""
        self.loaded = replace(self.loaded, load_s=load_s, memory_bytes=memory_bytes, process=process)

    def arrange(self, *, max_sequences: int, sequence_idle_s: float) -> None:
        """How requests wait for it. Before the first one."""
        sequences: Sequences[Job] | None = None
        if is_stateful(self.model):
            sequences = Sequences(self.name, self.number, limit=max_sequences, idle_s=sequence_idle_s)
        with self.presence.lock:  # its process may end at any time
            self.lane = Lane(self.serving, sequences)
            self.lane.cost_s = self.cost.run_s
            if self.away:
                self.lane.close()

    def failed(self, reason: str) -> None:
        """It cannot be loaded; or could not be loaded again."""
        with self.presence.lock:
            self.presence.step(Step.FAILED, reason)

    def send_away(self, reason: str) -> bool:
        """Its model is to leave memory: who is inside ends, whoever comes waits. False when it is not ready."""
        with self.presence.lock:
            return self._send_away(reason)

    def send_away_if_empty(self, reason: str) -> bool:
        """Its model is to leave memory if nobody is inside: then `remove_model` gives it. With the scheduler's lock held."""
        with self.presence.lock:
            if self.inside or not self._send_away(reason):
                return False
            if not self.presence.inside:
                return True
            self.presence.step(Step.CAME_BACK)  # somebody came in between
            self.lane.open()
            return False

    def _send_away(self, reason: str) -> bool:
        if self.presence.place is not READY:
            return False
        self.presence.step(Step.SENT_AWAY, reason)
        self.lane.close()
        return True

    def remove_model(self) -> Model | None:
        """The model, which the caller closes. Only while nobody runs in this version."""
        model = self.loaded.model
        self.loaded, self.run = replace(self.loaded, model=None, process=None), _away
        self.plans.clear()
        return model

    def install(self, fresh: Version) -> None:
        """The model of a version that was loaded from the same file becomes this one's, which is away still."""
        assert fresh.model is not None
        self._hold_model(fresh.loaded, fresh.cost.run_s)

    def come_back(self) -> None:
        """Its model is there; its lane is to be opened."""
        with self.presence.lock:
            self.presence.step(Step.CAME_BACK)

    def part(self) -> bool:
        """It goes for good: nobody comes in any more. Whether it was away, and somebody may wait in its lane."""
        with self.presence.lock:
            was_away = self.away
            self.presence.step(Step.RETIRED, "unloaded")
            return was_away

    def retire(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Waits until every request in it has ended, then closes the model. Take it out of all references before."""
        with self.presence.lock:
            self.presence.step(Step.RETIRED, "unloaded")
            drained = self.presence.wait_until_empty(timeout_s)
            model = self.remove_model()
        if self.lane.sequences is not None and drained:
            self.lane.sequences.close()
        if model is None:
            return
        if not drained:
            log.error(
                "model %r version %d still runs a request after %.0f s: its memory is kept", self.name, self.number, timeout_s
            )
            return
        model.close()

    def _hold_model(self, loaded: Loaded, run_s: float | None) -> None:
        model = loaded.model
        assert model is not None
        self.loaded = loaded
        self.inputs, self.outputs, self.placement = model.inputs, model.outputs, model.placement
        self.interfaces = Interfaces.of(model)
        self.labels = self.interfaces.by_every_name(self.labels)
        self.takes_text = any(spec.datatype == "BYTES" for spec in model.inputs)
        self.cost.begin(run_s, any_size=any(-1 in spec.shape for spec in model.inputs))
        self.lane.cost_s = self.cost.run_s
        self.run = self.way(model.run)

    # -- what a run costs ----------------------------------------------------------------------------------------------------

    def way(self, run: Run) -> Run:
        """How `run`, of its model, is to be called."""
        return priority.giving_way(run) if self.cost.is_long else run

    def measured(self, run_s: float) -> None:
        """A run took so long."""
        if self.cost.measured(run_s):
            self.change_way()
        self.lane.cost_s = self.cost.run_s

    def change_way(self) -> None:
        """Its runs have become long, or are so no more."""
        with self.presence.lock:
            if self.loaded.model is not None:
                self.run = self.way(self.loaded.model.run)

    def document(self) -> dict[str, Any]:
        placement, process = self.placement, self.loaded.process
        return {
            "version": self.number,
            "variant": self.variant,
            "state": self.state,
            "reason": self.reason,
            "away": self.away,
            "sha256": self.sha256,
            "placement": {"requested": placement.requested, "actual": placement.actual, "fallback": placement.fallback},
            "load_ms": round(self.loaded.load_s * 1e3, 3),
            "memory_bytes": self.loaded.now_bytes,
            "pid": process.pid if process is not None else None,
            "waiting": self.lane.waiting,
            "stats": self.stats.document(),
        }
