"""One prediction, step by step, for whichever threads take the steps.

understand    the request is read against a version of the model: `plan`
unpack        its tensors become arrays: `feeds`
run           the engine makes `arrays` of them, unless the deadline has passed
finish        the answer is written, and all of it is counted

A prediction that is answered at once and one that waits in between take the same steps: see `dataplane` and `runner`, which call them.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agent.serving.answers import Answer, FilledTemplate, Refusal, refusal_answer
from agent.serving.models.host import Run, Version
from agent.serving.routes import Request
from agent.serving.scheduling import batching
from agent.serving.scheduling.demand import Demand, SequenceDemand
from runtimes.check import check_feeds
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
    """How one API writes a prediction over HTTP. Any thread may call it; `read`, `feeds` and `write` raise Refusal."""

    @abstractmethod
    def read(self, version: Version, call: Request) -> Any:
        """The plan of the request."""

    @abstractmethod
    def feeds(self, plan: Any, call: Request) -> Mapping[str, Array]:
        """Its inputs; they may be views into the body."""

    @abstractmethod
    def write(self, version: Version, plan: Any, call: Request, arrays: Sequence[Array]) -> Answer:
        """The answer with the outputs that the plan demands."""

    def lasts(self, plan: Any, call: Request) -> bool:  # noqa: ARG002
        """Whether plan and feeds hold for the connection's next request too, if nothing but the bytes of its tensors is different."""
        return False

    def sequence(self, version: Version, call: Request) -> SequenceDemand | None:  # noqa: ARG002
        """The place in a sequence that a request demands, before it is known which version answers it. Never raises."""
        return None


class Prediction(ABC):
    """Times are perf_counters. `input_s` is what reading it and joining it with others took so far, `run_s` the run."""

    __slots__ = (
        "alone", "arrays", "arrived_s", "ended_s", "error", "feeds", "input_s", "plan", "rows", "run_s", "version", "wanted",
    )  # fmt: skip

    def __init__(self, version: Version, arrived_s: float) -> None:
        self.version = version
        self.wanted: str | None = None  # the number or label that was asked for
        self.arrived_s = arrived_s
        self.plan: Plan | None = None
        self.feeds: Mapping[str, Array] | None = None
        self.rows = 1
        self.alone = True  # whether its run was for no other one
        self.input_s = 0.0
        self.run_s = 0.0
        self.ended_s = 0.0  # when its run ended
        self.arrays: Sequence[Array] = ()
        self.error: Exception | None = None

    # -- the steps ---------------------------------------------------------------------------------------------------------

    def understand(self) -> None:
        """Makes `plan`, once.  Raises: Refusal."""
        if self.plan is None:
            begun = time.perf_counter()
            self.plan = self._read()
            self.input_s += time.perf_counter() - begun

    def unpack(self) -> float:
        """Makes `plan` and `feeds`, once. When it was through.  Raises: Refusal, InputInvalid."""
        begun = time.perf_counter()
        if self.feeds is not None:
            return begun
        if self.plan is None:
            self.plan = self._read()
        self.feeds = feeds = self._make_feeds()
        version = self.version
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
        version, feeds, plan = self.version, self.feeds, self.plan
        assert feeds is not None
        assert plan is not None
        self.arrays = (run or version.run)(feeds, plan.outputs)
        self.ended_s = ended_s = time.perf_counter()
        self.run_s = run_s = ended_s - now_s
        version.measured(run_s)
        stats = version.stats
        stats.executions += 1
        stats.inferences += self.rows

    def ran_with_others(self, arrays: Sequence[Array], input_s: float, run_s: float) -> None:
        """In place of `run`, when one run of the engine was for several: its part of the outputs, and what joining and the run took."""
        self.arrays, self.run_s, self.alone = arrays, run_s, False
        self.input_s += input_s

    def finish(self, begun_s: float) -> Answer | None:
        """The answer, written since `begun_s`; None where the caller wants arrays alone.  Raises: Refusal, and then nothing is counted."""
        answer = self._write()
        done_s = begun_s if type(answer) is FilledTemplate else time.perf_counter()  # filling one in takes nothing
        version, stats, output_s = self.version, self.version.stats, done_s - begun_s
        if self.alone and version.lane.batches:
            stats.batched(self.rows, self.input_s, self.run_s, output_s)
        stats.succeeded(self.arrived_s, self.input_s, self.run_s, output_s, done_s)
        tap = version.tap  # once: another thread may remove it
        if tap is not None and self.feeds is not None:
            tap.copy(self.plan, self.feeds, self.arrays, self.run_s)
        self.release()
        return answer

    # -- by who has it wait --------------------------------------------------------------------------------------------------

    def conclude(self) -> Answer | None:
        """What its caller is given, once it ran or `error` says why not.  Never raises."""
        try:
            if self.error is not None:
                raise self.error  # noqa: TRY301
            return self.finish(time.perf_counter())
        except Exception as error:  # noqa: BLE001 - it is said to the caller
            answer = self._refuse(refusal(self.version, error))
            # What led to it refers to this prediction, which refers to it: see `Refusal.forget`.
            self.error = error.__traceback__ = error.__cause__ = error.__context__ = None
            self.release()
            return answer

    def move(self, version: Version) -> None:
        """Begins anew on another version."""
        self.version = version
        self.feeds = None
        self.rows = 1

    def is_short(self, json_bytes: int) -> bool:  # noqa: ARG002
        """Whether reading it takes no more than that of so much JSON."""
        return True

    # -- what kinds of predictions do otherwise --------------------------------------------------------------------------------

    @abstractmethod
    def _read(self) -> Plan: ...

    @abstractmethod
    def _make_feeds(self) -> Mapping[str, Array]: ...

    @abstractmethod
    def _write(self) -> Answer | None: ...

    @abstractmethod
    def _refuse(self, refusal: Refusal) -> Answer | None: ...

    @abstractmethod
    def release(self) -> None:
        """It is through, one way or another: what it refers to may go."""


NOTHING: Sequence[Array] = ()


class Call(Prediction):
    """A prediction that came as an HTTP request. The connection's next request may take it over: see `Form.lasts`."""

    __slots__ = ("form", "request")

    def __init__(self, version: Version, request: Request, form: Form) -> None:
        super().__init__(version, request.arrived_s)
        self.request: Request | None = request
        self.form = form

    def again(self, request: Request) -> None:
        """It stands for this request now, of which all but the bytes of the tensors is as it was."""
        self.request = request
        self.arrived_s = request.arrived_s
        self.input_s = 0.0
        self.alone = True

    def move(self, version: Version) -> None:
        super().move(version)
        self.plan = None
        if self.request is not None:
            self.request.known = None

    def is_short(self, json_bytes: int) -> bool:
        request = self.request
        assert request is not None
        length = request.header_length
        return length == 0 or (len(request.body) if length is None else length) <= json_bytes

    def release(self) -> None:
        self.request = None  # which may know this prediction, for the next request
        self.arrays = NOTHING

    def _read(self) -> Plan:
        assert self.request is not None
        plan: Plan = self.form.read(self.version, self.request)
        return plan

    def _make_feeds(self) -> Mapping[str, Array]:
        request = self.request
        assert request is not None
        feeds = self.form.feeds(self.plan, request)
        request.known = self if self.form.lasts(self.plan, request) else None
        return feeds

    def _write(self) -> Answer:
        assert self.request is not None
        return self.form.write(self.version, self.plan, self.request, self.arrays)

    def _refuse(self, refusal: Refusal) -> Answer:
        return refusal_answer(refusal)


class Direct(Prediction):
    """A prediction of a caller that has arrays and wants arrays: `arrays`, or why it was refused."""

    __slots__ = ("_given", "refused")

    def __init__(self, version: Version, feeds: Mapping[str, Array], demand: Demand) -> None:
        super().__init__(version, demand.arrived_s)
        self.plan = demand
        self.refused: Refusal | None = None
        self._given = feeds

    def release(self) -> None:
        """Its arrays are the caller's."""

    def _read(self) -> Plan:
        raise AssertionError("what it demands was known from the beginning")

    def _make_feeds(self) -> Mapping[str, Array]:
        check_feeds(self.version.interfaces.inputs_for(self._given), self._given)
        return self._given

    def _write(self) -> None:
        return None

    def _refuse(self, refusal: Refusal) -> None:
        self.refused = refusal


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
