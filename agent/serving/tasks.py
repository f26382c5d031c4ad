"""What one prediction computes, and what becomes of it: the data that a job takes through the queue."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agent.serving.answers import Answer, Refusal, refusal_answer
from agent.serving.inference import Demand, SequenceDemand
from agent.serving.models.host import Version
from agent.serving.routes import Request
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


class Form(Protocol):
    """How one API writes a prediction over HTTP. `read` and `write` may run in any thread, and raise Refusal."""

    def read(self, version: Version, call: Request) -> Any:
        """The plan of the request."""

    def feeds(self, plan: Any, call: Request) -> Mapping[str, Array]:
        """Its inputs; they may be views into the body."""

    def write(self, version: Version, plan: Any, call: Request, arrays: Sequence[Array]) -> Answer:
        """The answer with the outputs that the plan demands."""


class Task:
    """One prediction. Times are perf_counters; `input_s` is what reading it and joining it with others took so far."""

    __slots__ = ("arrays", "arrived_s", "error", "feeds", "input_s", "plan", "run_s", "version", "wanted")

    def __init__(self, version: Version, arrived_s: float) -> None:
        self.version = version
        self.wanted: str | None = None  # the number or label that was asked for
        self.arrived_s = arrived_s
        self.plan: Plan | None = None
        self.feeds: Mapping[str, Array] | None = None
        self.input_s = 0.0
        self.run_s = 0.0
        self.arrays: list[Array] = []
        self.error: Exception | None = None

    def understand(self) -> None:
        """Makes `plan`.  Raises: Refusal."""
        raise NotImplementedError

    def unpack(self) -> None:
        """Makes `feeds`, after `plan`.  Raises: Refusal, InputInvalid."""
        raise NotImplementedError

    def is_short(self, json_bytes: int) -> bool:  # noqa: ARG002
        """Whether reading it takes no more than that of so much JSON."""
        return True

    def answer(self) -> Answer | None:
        """What its caller is given, once it ran or failed.  Never raises."""
        raise NotImplementedError

    def _forget(self, error: Exception) -> None:
        """What led to it refers to this task, which refers to it: see `Refusal.forget`."""
        self.error = error.__traceback__ = error.__cause__ = error.__context__ = None

    def succeeded(self, ended_s: float, now_s: float) -> None:
        """Its answer is ready; what came behind the run is output."""
        version = self.version
        version.stats.succeeded(self.arrived_s, self.input_s, self.run_s, now_s - ended_s, now_s)
        tap = version.tap
        if tap is not None and self.feeds is not None:
            tap.take(self.plan, self.feeds, self.arrays, self.run_s)


class Call(Task):
    """A prediction that came as an HTTP request."""

    __slots__ = ("form", "request")

    def __init__(self, version: Version, request: Request, form: Form) -> None:
        super().__init__(version, request.arrived_s)
        self.request = request
        self.form = form

    def understand(self) -> None:
        begun = time.perf_counter()
        self.plan = self.form.read(self.version, self.request)
        self.input_s += time.perf_counter() - begun

    def unpack(self) -> None:
        begun = time.perf_counter()
        self.feeds = self.form.feeds(self.plan, self.request)
        self.input_s += time.perf_counter() - begun

    def is_short(self, json_bytes: int) -> bool:
        length = self.request.header_length
        return length == 0 or (len(self.request.body) if length is None else length) <= json_bytes

    def answer(self) -> Answer:
        try:
            if self.error is not None:
                raise self.error  # noqa: TRY301
            begun = time.perf_counter()
            answer = self.form.write(self.version, self.plan, self.request, self.arrays)
            self.succeeded(begun, time.perf_counter())
            return answer
        except Exception as error:  # noqa: BLE001 - it is said to the caller
            answer = refusal_answer(refusal(self.version, error))
            self._forget(error)
            return answer


class Direct(Task):
    """A prediction of a caller that has arrays and wants arrays."""

    __slots__ = ("_given", "refused")

    def __init__(self, version: Version, feeds: Mapping[str, Array], demand: Demand) -> None:
        super().__init__(version, demand.arrived_s)
        self.plan = demand
        self.refused: Refusal | None = None
        self._given = feeds

    def understand(self) -> None:
        pass

    def unpack(self) -> None:
        check_feeds(self.version.interfaces.inputs_for(self._given), self._given)
        self.feeds = self._given

    def answer(self) -> None:
        """None: the task itself has the arrays, or why it was refused."""
        error = self.error
        if error is not None:
            self.refused = refusal(self.version, error)
            self._forget(error)
            return
        now = time.perf_counter()
        self.succeeded(now, now)


def expired(held: Version | None = None) -> Refusal:
    """`held`: the version whose model was waited for."""
    why = f" while model '{held.name}' version {held.number} was not in memory" if held is not None else ""
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
