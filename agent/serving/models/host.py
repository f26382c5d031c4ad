"""The models in memory: which versions of each, which one answers, and how one gives way to another without a failed request.

The rules:
- A request resolves its version once, at its start, and finishes on it. `enter` and `leave` count it.
- A version that is to go is first taken out of every reference, then waited for until nobody is in it, then closed. So a request
  that meets a retired version has read an old reference, and reading again gives the new one.
- Only one thread changes the host at a time (the control thread); any thread reads it.
- A version may be held: its model is not in memory and comes back, or is being replaced. Whoever enters it then waits in its lane;
  see `residency`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from agent.contract.manifest import Picture, Serving
from agent.host import priority
from agent.serving.answers import Refusal
from agent.serving.models.canary import Canary
from agent.serving.models.stats import Stats
from agent.serving.scheduling.lanes import INLINE_RUN_S, LONG_RUN_S, Job, Lane
from agent.serving.scheduling.sequences import Sequences
from runtimes.contract import Array, Growing, Model, Placement, TensorSpec, is_stateful
from runtimes.naming import Interfaces

log = logging.getLogger(__name__)


class Tap(Protocol):
    """Copies requests: see `shadowing`."""

    def copy(self, plan: Any, feeds: Mapping[str, Array], arrays: Sequence[Array], run_s: float) -> None:
        """Of a request that was answered with `arrays`.  Never raises, never waits."""


class Process(Protocol):
    """The process of an isolated model."""

    @property
    def pid(self) -> int: ...

    @property
    def memory_bytes(self) -> int: ...

    def on_death(self, died: Callable[[str], None]) -> None: ...


State = Literal["LOADING", "READY", "UNAVAILABLE"]
LABELS = ("stable", "candidate", "previous")
DRAIN_TIMEOUT_S = 60.0  # a run that takes longer keeps its model in memory instead of having it closed under it
BEYOND_INLINE_S = 2 * INLINE_RUN_S
INLINE_BODY_BYTES = 64 * 1024  # reading more takes long by itself
UNKNOWN_BODY_BYTES = 1024  # of a model whose inputs have any size: what a run takes is known for zeros of size 1, and grows with some power of it
STAYS_CHEAP_S = (
    4 * INLINE_RUN_S
)  # what was cheap is so up to here: among long runs it would meet cold caches and look dear for ever
FIRST_COST_S = 1.0  # until it was measured a run counts as long

Run = Callable[[Mapping[str, Array], Sequence[str] | None], list[Array]]


def _away(feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:  # noqa: ARG001
    raise AssertionError("the model is not in memory, and somebody is inside")


class Version:
    """One version of a model in memory, or the reason why it is not."""

    def __init__(self, name: str, number: int, variant: str, sha256: str, runtime: str) -> None:
        self.name = name
        self.number = number
        self.number_text = str(number)
        self.variant = variant
        self.sha256 = sha256
        self.runtime = runtime
        self.state: State = "LOADING"
        self.reason = ""
        self.model: Model | None = None
        self.run: Run = _away  # the model's
        self.takes_text = False  # has BYTES inputs
        self.is_cheap = False  # a run of it costs the next caller less than a switch of threads
        self.inline_bytes = INLINE_BODY_BYTES  # up to which size of a request that is so
        self.is_long = False  # a run of it gives way to whatever is shorter
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.interfaces = Interfaces((), ())  # the names that requests may use
        self.picture: Picture | None = None  # how a JPEG or PNG becomes its input
        self.labels: Mapping[str, Sequence[str]] = {}  # of the classes of some outputs
        self.serving = Serving()  # as the release wants it
        self.filename = ""
        self.source: Any = None  # where it was loaded from, to whoever loads it again
        self.is_warm = False  # a run was made and worked
        self.placement = Placement("", "")
        self.load_s = 0.0
        self.loaded_s = 0.0  # when, as perf_counter
        self.memory_bytes = 0
        self.held = False
        self.evictions = 0
        self.reloads = 0
        self.process: Process | None = None  # of an isolated model
        self.restarts = 0
        self.crashes = 0  # in a row
        self.has_crashed = False  # and was not started again yet
        self.retry_s = 0.0  # a perf_counter: not to be loaded again before
        self.cost_s = FIRST_COST_S
        self.lane = Lane(self.serving)
        self.stats = Stats()
        self.plans: dict[bytes, Any] = {}  # the protocol's: requests seen before, understood
        self.tap: Tap | None = None  # is to be given the next request that it answered
        self.canary: Canary[Version] | None = None  # of the active version: another one answers a share of its requests
        self._guests: list[None] = []  # one for each request inside: adding and removing one is one step, and needs no lock
        self._lock = threading.Lock()  # for what becomes of it
        self._empty = threading.Condition(self._lock)

    def ready(self, model: Model) -> None:
        self.model = model
        self.inputs, self.outputs, self.placement = model.inputs, model.outputs, model.placement
        self.interfaces = Interfaces.of(model)
        self.labels = self.interfaces.by_every_name(self.labels)
        self.takes_text = any(spec.datatype == "BYTES" for spec in model.inputs)
        self.is_cheap = self.cost_s <= INLINE_RUN_S
        if any(-1 in spec.shape for spec in model.inputs):
            self.inline_bytes = UNKNOWN_BODY_BYTES
        self.is_long = self.cost_s > LONG_RUN_S
        self.run = self.way(model.run)
        self.loaded_s = time.perf_counter()
        self.state, self.reason = "READY", ""

    def way(self, run: Run) -> Run:
        """How `run`, of its model, is to be called."""
        return priority.giving_way(run) if self.is_long else run

    def arrange(self, *, max_sequences: int, sequence_idle_s: float) -> None:
        """How requests wait for it. Before the first one."""
        sequences: Sequences[Job] | None = None
        if is_stateful(self.model):
            sequences = Sequences(self.name, self.number, limit=max_sequences, idle_s=sequence_idle_s)
        with self._lock:  # its process may end at any time
            self.lane = Lane(self.serving, sequences)
            self.lane.cost_s = self.cost_s
            if self.held:
                self.lane.hold()

    def failed(self, reason: str) -> None:
        self.state, self.reason = "UNAVAILABLE", reason

    def enter(self) -> bool:
        """Keeps the model open until `leave`. False when the version is not (or no longer) there."""
        self._guests.append(None)  # before the look at the state: whoever changes that counts afterwards
        if self.state == "READY":
            return True
        with self._lock:
            if self.answers:
                return True
        self.leave()
        return False

    @property
    def answers(self) -> bool:
        """Whether a prediction will be answered, if after a while."""
        return self.state == "READY" or self.held

    @property
    def inside(self) -> int:
        return len(self._guests)

    def rest(self, reason: str) -> bool:
        """Holds it, unless somebody is inside: then `take_model` gives what is to be closed. With the scheduler's lock held."""
        with self._lock:
            if self._guests or self.state != "READY":
                return False
            self._hold(reason)
            if not self._guests:
                return True
            self._resume()  # somebody came in between
            self.lane.resume()
            return False

    def hold(self, reason: str) -> bool:
        """The same while others are inside: they end, whoever comes waits. False when it is not ready."""
        with self._lock:
            if self.state != "READY":
                return False
            self._hold(reason)
            return True

    def _hold(self, reason: str) -> None:
        self.state, self.reason, self.held = "UNAVAILABLE", reason, True
        self.lane.hold()

    def take_model(self) -> Model | None:
        """Of a held version in which nobody runs."""
        model, self.model, self.process, self.run = self.model, None, None, _away
        self.plans.clear()
        return model

    def revive(self, fresh: Version) -> None:
        """Takes the model of a version that was loaded from the same file; it is still held, until its lane is resumed."""
        self.is_warm, self.load_s = fresh.is_warm, fresh.load_s
        self.memory_bytes, self.process = fresh.memory_bytes, fresh.process
        assert fresh.model is not None
        self.ready(fresh.model)

    def resume(self) -> None:
        """With its model there."""
        with self._lock:
            self._resume()

    def _resume(self) -> None:
        self.state, self.reason, self.held = "READY", "", False

    def leave(self) -> None:
        self._guests.pop()
        if self.state != "READY":
            with self._lock:
                self._empty.notify_all()

    def retire(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Waits until every request in it has ended, then closes the model. Take it out of all references before."""
        with self._lock:
            self.state, self.reason, self.held = "UNAVAILABLE", "unloaded", False
            drained = self._empty.wait_for(lambda: not self._guests, timeout_s)
            model, self.model, self.process, self.run = self.model, None, None, _away
        self.plans.clear()
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

    @property
    def now_bytes(self) -> int:
        """What its model takes: when it was loaded, and what runs have left with its engine since; or its process, as it is now."""
        if self.process is not None:
            return self.process.memory_bytes or self.memory_bytes
        model = self.model
        return self.memory_bytes + (model.grown_bytes if isinstance(model, Growing) else 0)

    def measured(self, run_s: float) -> None:
        """A moving mean; one run that the scheduler interrupted does not make a cheap model dear."""
        cost_s = self.cost_s
        if run_s > 4 * cost_s:  # noqa: PLR1730 - calling min takes as long as all the rest
            run_s = 4 * cost_s
        self.cost_s = self.lane.cost_s = cost_s = cost_s + 0.1 * (run_s - cost_s)
        self.is_cheap = cost_s <= (STAYS_CHEAP_S if self.is_cheap else INLINE_RUN_S)
        if (cost_s > LONG_RUN_S) is not self.is_long:
            self._change_way(is_long=cost_s > LONG_RUN_S)

    def learn(self, size_bytes: int) -> None:
        """A request of that size was cheap: smaller ones will be."""
        self.inline_bytes = max(self.inline_bytes, min(size_bytes, INLINE_BODY_BYTES))

    def _change_way(self, *, is_long: bool) -> None:
        with self._lock:
            self.is_long = is_long
            if self.model is not None:
                self.run = self.way(self.model.run)

    def document(self) -> dict[str, Any]:
        placement = self.placement
        return {
            "version": self.number,
            "variant": self.variant,
            "state": self.state,
            "reason": self.reason,
            "held": self.held,
            "sha256": self.sha256,
            "placement": {"requested": placement.requested, "actual": placement.actual, "fallback": placement.fallback},
            "load_ms": round(self.load_s * 1e3, 3),
            "memory_bytes": self.now_bytes,
            "pid": self.process.pid if self.process is not None else None,
            "waiting": self.lane.waiting,
            "stats": self.stats.document(),
        }


class NeverInlineVersion(Version):
    """Never run by the thread that polls: what happens to its process, or in its engine, must not keep that thread."""

    def arrange(self, *, max_sequences: int, sequence_idle_s: float) -> None:
        self.cost_s, self.is_cheap = max(self.cost_s, BEYOND_INLINE_S), False
        super().arrange(max_sequences=max_sequences, sequence_idle_s=sequence_idle_s)

    def measured(self, run_s: float) -> None:
        super().measured(run_s)
        self.cost_s = self.lane.cost_s = max(self.cost_s, BEYOND_INLINE_S)


class Served:
    """One model name: the version that answers, the one before it, and whatever else is in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: dict[int, Version] = {}
        self.active: Version | None = None
        self.previous: Version | None = None
        self.activations = 0
        self.rollbacks = 0

    @property
    def candidate(self) -> Version | None:
        """The newest version in memory that is neither active nor previous."""
        others = [v for v in self.versions.values() if v.state == "READY" and v is not self.active and v is not self.previous]
        return max(others, key=lambda v: v.number, default=None)

    def pick(self, wanted: str | None) -> Version | None:
        """By number or label; the active one when None."""
        if wanted is None or wanted == "stable":
            return self.active
        if wanted == "previous":
            return self.previous
        if wanted == "candidate":
            return self.candidate
        return self.versions.get(int(wanted))

    @property
    def canary(self) -> Canary[Version] | None:
        return self.active.canary if self.active is not None else None

    def end_canary(self) -> None:
        """The active version answers all requests; those under way on the other one finish there."""
        for version in self.versions.values():
            version.canary = None

    def document(self) -> dict[str, Any]:
        return {
            "active": self.active.number if self.active else None,
            "previous": self.previous.number if self.previous else None,
            "canary": canary.document() if (canary := self.canary) is not None else None,
            "versions": {str(number): version.document() for number, version in sorted(self.versions.items())},
        }


class ModelHost:
    """All models of this process. What a version keeps for sequences is bounded by `max_sequences` and `sequence_idle_s`."""

    def __init__(self, *, max_sequences: int = 64, sequence_idle_s: float = 60.0) -> None:
        self._max_sequences = max_sequences
        self._sequence_idle_s = sequence_idle_s
        self.on_close: Callable[[Version], None] = lambda _: None  # told of a held version before it goes for good
        self.models: dict[str, Served] = {}  # replaced as a whole, never changed: readers need no lock

    def __iter__(self) -> Iterator[Served]:
        return iter(sorted(self.models.values(), key=lambda served: served.name))

    def get(self, name: str) -> Served | None:
        return self.models.get(name)

    def served(self, name: str) -> Served:
        """Raises: Refusal (404)."""
        served = self.models.get(name)
        if served is None:
            raise unknown_model(name)
        return served

    def enter(self, name: str, wanted: str | None) -> Version:
        """The version to answer with, kept open: call `leave` on it.  Raises: Refusal (404 unknown, 503 not ready)."""
        served = self.models.get(name)
        if served is None:
            raise unknown_model(name)
        while True:
            version = served.active if wanted is None else served.pick(wanted)
            if version is None:
                raise _not_there(served, wanted)
            if version.enter():
                return version
            if served.pick(wanted) is version:
                version.stats.failed("unavailable")
                raise Refusal(503, _not_ready_text(name, version))

    def look(self, name: str, wanted: str | None) -> Version:
        """The same without keeping it open, ready or not, for questions about it.  Raises: Refusal."""
        served = self.served(name)
        version = served.pick(wanted)
        if version is None:
            raise _not_there(served, wanted)
        return version

    # -- changes: one thread at a time ---------------------------------------------------------------------------------------

    def add(self, version: Version) -> None:
        """Puts a version beside the others; nothing is answered by it yet."""
        version.arrange(max_sequences=self._max_sequences, sequence_idle_s=self._sequence_idle_s)
        served = self.models.get(version.name)
        if served is None:
            served = Served(version.name)
            served.versions[version.number] = version
            self.models = {**self.models, version.name: served}
            return
        served.versions = {**served.versions, version.number: version}

    def replace(self, version: Version) -> None:
        """Puts a version in the place of the one with its number, which is drained and closed; it answers where that one did, and
        where nothing does.
        """
        served = self.models.get(version.name)
        old = served.versions.get(version.number) if served else None
        self.add(version)
        served = self.models[version.name]
        served.end_canary()
        if served.active is None or served.active is old:
            served.active = version
        if served.previous is not None and served.previous is old:
            served.previous = None
        if old is not None:
            self._retire(old)

    def activate(self, name: str, number: int) -> Served:
        """One reference switch; the version that was active stays loaded as `previous`.  Raises: Refusal (404, 409)."""
        served = self.served(name)
        version = served.versions.get(number)
        if version is None or version.state != "READY":
            detail = f": {version.reason}" if version is not None and version.reason else ""
            raise Refusal(409, f"model {name!r} version {number} is not loaded{detail}; load it first", code="not_loaded")
        if served.active is version:
            return served
        superseded = served.previous if served.previous is not version else None
        served.active, served.previous = version, served.active
        served.end_canary()
        served.activations += 1
        if superseded is not None:
            self._drop(served, superseded)
        return served

    def keep_only(self, name: str, number: int) -> Served:
        """Makes version `number`, which must be loaded, the only one: everything else is drained and unloaded."""
        before = self.served(name).active
        served = self.activate(name, number)
        served.rollbacks += before is not None and served.active is not before
        served.previous = None
        for version in [v for v in served.versions.values() if v is not served.active]:
            self._drop(served, version)
        return served

    def commit(self, name: str) -> Served:
        """Unloads `previous`.  Raises: Refusal (404)."""
        served = self.served(name)
        previous, served.previous = served.previous, None
        if previous is not None:
            self._drop(served, previous)
        return served

    def unload(self, name: str, number: int | None) -> Served | None:
        """One version, or the whole model when None. None when the model is gone.  Raises: Refusal (404, 409)."""
        served = self.served(name)
        if number is None:
            self.models = {n: s for n, s in self.models.items() if n != name}
            versions = list(served.versions.values())
            served.end_canary()
            served.active = served.previous = None
            served.versions = {}
            for version in versions:
                self._retire(version)
            return None
        found = served.versions.get(number)
        if found is None:
            return served
        if found is served.active:
            raise Refusal(409, f"version {number} of model {name!r} is active; activate another one first", code="active")
        if found is served.previous:
            served.previous = None
        self._drop(served, found)
        if not served.versions:
            self.models = {n: s for n, s in self.models.items() if n != name}
            return None
        return served

    def close(self) -> None:
        for served in list(self):
            self.unload(served.name, None)

    def supersede(self, version: Version, old: Version) -> Served:
        """Makes a version active in place of a held one, which goes."""
        self.add(version)
        served = self.models[version.name]
        served.end_canary()
        served.active = version
        served.activations += 1
        if served.previous is old:
            served.previous = None
        self._drop(served, old)
        return served

    def _drop(self, served: Served, version: Version) -> None:
        canary = served.canary
        if canary is not None and canary.candidate is version:
            served.end_canary()
        served.versions = {number: v for number, v in served.versions.items() if v is not version}
        self._retire(version)

    def _retire(self, version: Version) -> None:
        if version.held:
            version.held = False
            self.on_close(version)
        version.retire()


def unknown_model(name: str) -> Refusal:
    return Refusal(404, f"Request for unknown model: '{name}' is not found", code="not_found")


def _not_there(served: Served, wanted: str | None) -> Refusal:
    if wanted is not None:
        return Refusal(404, f"Request for unknown model: '{served.name}' version {wanted} is not found", code="not_found")
    reasons = "; ".join(f"version {v.number}: {v.reason or v.state}" for v in served.versions.values())
    return Refusal(
        503, f"model '{served.name}' has no version at ready state ({reasons or 'none is loaded'})", code="unavailable"
    )


def _not_ready_text(name: str, version: Version) -> str:
    reason = f": {version.reason}" if version.reason else ""
    return f"Request for unknown model: '{name}' version {version.number} is not at ready state{reason}"
