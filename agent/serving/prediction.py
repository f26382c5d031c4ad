"""One prediction, step by step, for whichever threads take the steps.

understand    the request is read against a version of the model: `plan`
unpack        its tensors become arrays: `feeds`
run           the engine makes `arrays` of them, unless the deadline has passed
finish        the answer is written, and all of it is counted

A prediction that is answered at once and one that waits in between take the same steps: see `dataplane` and `runner`, which
call them.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agent.serving.answers import FilledTemplate, Refusal, refusal_answer
from agent.serving.models.version import Run, Version
from agent.serving.routes import Request
from agent.serving.scheduling import batching
from agent.serving.scheduling.demand import SequenceDemand
from runtimes.contract import Array, InputInvalid, RunFailed

log = logging.getLogger(__name__)


class Plan(Protocol):
    """A request, understood against the inputs of one version."""

    @property
    def outputs(self) -> Sequence[str] | None: ...

    @property
    def priority(self) -> int: ...

    @property
    def timeout_s(self) -> float | None: ...

    @property
    def sequence(self) -> SequenceDemand | None: ...


class Form(ABC):
    """How one API writes a prediction. Any thread may call it; `read`, `feeds` and `write` raise Refusal. A request is whatever
    the API's callers bring: over HTTP, a `Request`.
    """

    @abstractmethod
    def read(self, version: Version, request: Any) -> Any:
        """The plan of the request."""

    @abstractmethod
    def feeds(self, version: Version, plan: Any, request: Any) -> Mapping[str, Array]:
        """Its inputs; they may be views into a body."""

    @abstractmethod
    def write(self, version: Version, plan: Any, request: Any, arrays: Sequence[Array]) -> Any:
        """The answer with the outputs that the plan demands."""

    def refuse(self, refusal: Refusal) -> Any:
        """The answer that says why there is no other."""
        return refusal_answer(refusal)

    def lasts(self, plan: Any, request: Any) -> bool:  # noqa: ARG002
        """Whether plan and feeds hold for the connection's next request too, if nothing but the bytes of its tensors is
        different.
        """
        return False

    def is_short(self, request: Any, json_bytes: int) -> bool:
        """Whether reading it takes no more than reading so much JSON."""
        length: int | None = request.header_length
        return length == 0 or (len(request.body) if length is None else length) <= json_bytes

    def sequence(self, version: Version, request: Any) -> SequenceDemand | None:  # noqa: ARG002
        """The place in a sequence that a request demands, before it is known which version answers it. Never raises."""
        return None


NOTHING: Sequence[Array] = ()


class Prediction:
    """Times are perf_counters. `input_s` is what reading it and joining it with others took so far, `run_s` the run.

    When plan and feeds last (see `Form.lasts`) the request knows this prediction, and the connection's next request takes it
    over.
    """

    __slots__ = (
        "alone", "arrays", "arrived_s", "ended_s", "error", "feeds", "form", "input_s", "lasts", "plan", "request", "rows", "run_s",
        "version", "wanted",
    )  # fmt: skip

    def __init__(self, version: Version, request: Any, form: Form, arrived_s: float) -> None:
        self.version = version
        self.request = request
        self.form = form
        self.arrived_s = arrived_s
        self.wanted: str | None = None  # the number or label that was asked for
        self.plan: Plan | None = None
        self.feeds: Mapping[str, Array] | None = None
        self.lasts = False
        self.rows = 1
        self.alone = True  # whether its run was for no other one
        self.input_s = 0.0
        self.run_s = 0.0
        self.ended_s = 0.0  # when its run ended
        self.arrays = NOTHING
        self.error: Exception | None = None

    def again(self, request: Request) -> float:
        """It stands for this request now, of which all but the bytes of the tensors is as it was. When it was ready to run."""
        self.request = request
        self.arrived_s = request.arrived_s
        self.input_s = 0.0
        self.alone = True
        return time.perf_counter()

    # -- the steps ---------------------------------------------------------------------------------------------------------

    def understand(self) -> None:
        """Makes `plan`, once.  Raises: Refusal."""
        if self.plan is None:
            begun = time.perf_counter()
            self.plan = self.form.read(self.version, self.request)
            self.input_s += time.perf_counter() - begun

    def unpack(self) -> float:
        """Makes `plan` and `feeds`, once. When it was through.  Raises: Refusal, InputInvalid."""
        begun = time.perf_counter()
        if self.feeds is not None:
            return begun
        version, request, form = self.version, self.request, self.form
        plan = self.plan
        if plan is None:
            plan = self.plan = form.read(version, request)
        self.feeds = feeds = form.feeds(version, plan, request)
        if form.lasts(plan, request):
            self.lasts, request.known = True, self
        if version.lane.batches:
            self.rows = batching.rows_of(version.name, version.inputs, feeds, version.lane.rules.max_batch_size)
        ended = time.perf_counter()
        self.input_s += ended - begun
        return ended

    def run(self, deadline_s: float, now_s: float, run: Run | None = None) -> None:
        """Makes `arrays`, by `run` where it is not the version's own that does it.

        Raises: Refusal when the deadline has passed, and whatever the model raises.
        """
        if now_s > deadline_s:
            raise expired()
        version = self.version
        self.arrays = (run or version.run)(self.feeds, self.plan.outputs)  # type: ignore[arg-type, union-attr]
        self.ended_s = ended_s = time.perf_counter()
        self.run_s = run_s = ended_s - now_s
        cost = version.cost  # what `Version.measured` does, without the call
        if cost.measured(run_s):
            version.change_way()
        version.lane.cost_s = cost.run_s
        stats = version.stats
        stats.executions += 1
        stats.inferences += self.rows

    def ran_with_others(self, arrays: Sequence[Array], input_s: float, run_s: float) -> None:
        """In place of `run`, when one run of the engine was for several: its part of the outputs, and what joining and the run
        took.
        """
        self.arrays, self.run_s, self.alone = arrays, run_s, False
        self.input_s += input_s

    def finish(self, begun_s: float) -> Any:
        """The answer, written since `begun_s`, with everything counted.  Raises: Refusal, and then the answer is not counted."""
        version, plan, arrays = self.version, self.plan, self.arrays
        answer = self.form.write(version, plan, self.request, arrays)
        done_s = begun_s if type(answer) is FilledTemplate else time.perf_counter()  # filling one in takes nothing
        stats, output_s = version.stats, done_s - begun_s
        if self.alone and version.lane.batches:
            stats.batched(self.rows, self.input_s, self.run_s, output_s)
        stats.succeeded(self.arrived_s, self.input_s, self.run_s, output_s, done_s)
        tap = version.tap  # once: another thread may remove it
        if tap is not None and self.feeds is not None:
            tap.copy(plan, self.feeds, arrays, self.run_s)
        sketch = version.sketch
        if sketch is not None and done_s >= sketch.next_s:
            sketch.take(version.outputs, plan.outputs, arrays, done_s)  # type: ignore[union-attr]
        self.request, self.arrays = None, NOTHING  # as `release` does
        return answer

    # -- by who has it wait --------------------------------------------------------------------------------------------------

    def conclude(self) -> Any:
        """What its caller is given, once it ran or `error` says why not.  Never raises."""
        try:
            if self.error is not None:
                raise self.error  # noqa: TRY301
            return self.finish(time.perf_counter())
        except Exception as error:  # noqa: BLE001 - it is said to the caller
            answer = self.form.refuse(refusal(self.version, error))
            # What led to it refers to this prediction, which refers to it: see `Refusal.forget`.
            self.error = error.__traceback__ = error.__cause__ = error.__context__ = None
            self.release()
            return answer

    def move(self, version: Version) -> None:
        """Begins anew on another version."""
        if self.lasts:
            self.lasts, self.request.known = False, None
        self.version = version
        self.plan = self.feeds = None
        self.rows = 1

    def release(self) -> None:
        """It is through, one way or another: its request may know it, and is not to be known by it."""
        self.request, self.arrays = None, NOTHING


def expired(away: Version | None = None) -> Refusal:
    """`away`: the version whose model was waited for."""
    why = f" while model '{away.name}' version {away.number} was not in memory" if away is not None else ""
    return Refusal(503, f"Request timeout expired{why}", headers=((b"retry-after", b"1"),))


def refusal(version: Version, error: Exception) -> Refusal:
    """Counts the failure, and says it so that the caller understands."""
    if isinstance(error, Refusal):
        # What the model made could not be written: nobody's fault but the model's, and a watch is to see it.
        version.stats.failed("unavailable" if error.status == 503 else "run" if error.status == 500 else "invalid")
        return error
    if isinstance(error, InputInvalid):
        version.stats.failed("invalid")
        return Refusal(400, f"model '{version.name}': {error}")
    version.stats.failed("run")
    if not isinstance(error, RunFailed):
        log.error("model %r version %d failed in an unforeseen way", version.name, version.number, exc_info=error)
    return Refusal(500, f"model '{version.name}' version {version.number} failed: {error}")
