"""One prediction from request to answer, whatever transport brought it.

Every prediction takes the same steps: `prediction` has them. Where its version sets no bounds but threads, the thread that has
the request takes them all in one go. Where the version gathers batches, keeps sequences or bounds its runs, and where no thread
is free, the scheduler says when it runs; then another thread may take the rest, and gives the answer to the request's `seat`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.serving.answers import Answer, Refusal
from agent.serving.models.cost import INLINE_BODY_BYTES
from agent.serving.models.host import ModelHost
from agent.serving.models.version import Version
from agent.serving.prediction import Form, Prediction, refusal
from agent.serving.routes import Match, Pace, Request
from agent.serving.runner import Runner, demands
from agent.serving.scheduling.demand import Demand, SequenceDemand
from agent.serving.scheduling.lanes import INLINE_RUN_S, NEVER, Caller, Job
from agent.serving.scheduling.scheduler import LaneRetired, Scheduler
from runtimes.check import check_feeds
from runtimes.contract import Array

INLINE_TEXT_BYTES = 8 * 1024  # of BYTES elements, each of which is an object
LEADER_JSON_BYTES = 16 * 1024  # the JSON that the polling thread reads
ALIVE_S = 0.1  # how often a caller that waits in a thread of its own is asked whether it is still there
SHORTEST_S = 100e-6
GONE = 499  # nobody sees this status: its caller has gone


_RUN, _READ, _PARK = Pace.RUN, Pace.READ, Pace.PARK


@dataclass(frozen=True, slots=True)
class Result:
    """`arrays` are in the order of the outputs demanded (None: all, in the model's order) and belong to the caller."""

    version: Version
    arrays: Sequence[Array]


@dataclass(frozen=True, slots=True)
class Given:
    """The request of a caller that has arrays and wants arrays."""

    feeds: Mapping[str, Array]
    demand: Demand


class ArraysForm(Form):
    """Its answers are a Result, or the Refusal."""

    def read(self, _version: Version, request: Given) -> Demand:
        return request.demand

    def feeds(self, version: Version, _plan: Demand, request: Given) -> Mapping[str, Array]:
        check_feeds(version.interfaces.inputs_for(request.feeds), request.feeds)
        return request.feeds

    def write(self, version: Version, _plan: Demand, _request: Given, arrays: Sequence[Array]) -> Result:
        return Result(version, arrays)

    def refuse(self, refusal: Refusal) -> Refusal:
        return refusal

    def is_short(self, _request: Given, _json_bytes: int) -> bool:
        return True


ARRAYS = ArraysForm()


class Dataplane:
    """Answers predictions from the models of a host. Any number of threads may call it."""

    def __init__(self, host: ModelHost, scheduler: Scheduler | None = None) -> None:
        self.host = host
        self.scheduler = scheduler or Scheduler(0)
        self.runner = Runner(self.scheduler)
        self.summon: Callable[[Version], None] = lambda _: None  # somebody waits for a version that is away

    def is_cheap(self, call: Request) -> bool:
        """Whether the answer takes so little that the thread which polls should give it at once."""
        match = call.match
        served = self.host.models.get(match.model)  # type: ignore[arg-type]
        if served is None:
            return True
        version = served.active if match.version is None else served.pick(match.version)
        if version is None:
            return True
        canary = version.canary
        if canary is not None and not canary.candidate.cost.is_cheap:
            return False
        return version.cost.is_cheap and (call.known is not None or _is_soon_read(version, call))

    def keeps_order(self, match: Match) -> bool:
        """Whether requests must be admitted in the order in which they come: they may belong to sequences."""
        served = self.host.models.get(match.model)  # type: ignore[arg-type]
        version = served.pick(match.version) if served is not None else None
        if version is None:
            return False
        canary = version.canary
        return version.lane.sequences is not None or (canary is not None and canary.candidate.lane.sequences is not None)

    def infer(self, form: Form, call: Request) -> Answer | None:
        """The prediction that an HTTP request asks for; its arrays may not outlive the body. None: it waits, and `call.seat`
        will be given the answer.  Raises: Refusal.
        """
        match = call.match
        assert match.model is not None
        version = self.host.enter(match.model, match.version)
        if version.canary is not None and match.version is None:
            version = self._divert(version, form.sequence(version, call))
            return self._infer_in_turn(self._prediction(version, call, form), call)
        lane = version.lane
        if lane.gated or call.pace is not _RUN:
            return self._infer_in_turn(self._prediction(version, call, form), call)
        waits = False
        task: Prediction | None = call.known
        try:
            if task is not None and task.version is version:
                now_s = task.again(call)
            else:
                task = Prediction(version, call, form, call.arrived_s)
                now_s = task.unpack()
            plan: Any = task.plan
            if plan.sequence is not None:  # which may have begun on another version
                waits = True
                return self._infer_in_turn(task, call)
            limited = plan.timeout_s is not None or lane.timeout_s is not None
            task.run(lane.deadline_s(call.arrived_s, plan.timeout_s) if limited else NEVER, now_s)
            answer: Answer = task.finish(task.ended_s)
        except Exception as error:
            if waits:
                raise  # it was counted there
            if task is not None:
                task.release()
            raise refusal(version, error) from error
        finally:
            if not waits:
                version.leave()
        if task.run_s <= INLINE_RUN_S and version.cost.inline_bytes < INLINE_BODY_BYTES:
            version.cost.learn(_tensor_bytes(call))
        return answer

    def predict(
        self,
        model: str,
        wanted: str | None,
        feeds: Mapping[str, Array],
        demand: Demand,
        alive: Callable[[], bool] | None = None,
    ) -> Result:
        """The prediction of a caller that has arrays and wants arrays. It blocks until they are there.

        `wanted` is a version's number or label (None: the active one). `alive` is asked while the prediction waits for its
        turn: once it says no, the prediction is dropped.  Raises: Refusal.
        """
        try:
            return self._predict(model, wanted, feeds, demand, alive)
        except Refusal as refused:
            refused.forget()
            raise

    def _predict(
        self, model: str, wanted: str | None, feeds: Mapping[str, Array], demand: Demand, alive: Callable[[], bool] | None
    ) -> Result:
        waiter = Waiter()
        version = self.host.enter(model, wanted)
        if version.canary is not None and wanted is None:
            version = self._divert(version, demand.sequence)
        task = Prediction(version, Given(feeds, demand), ARRAYS, demand.arrived_s)
        job, work = self._admit(task, waiter, wanted, Pace.RUN)
        while True:
            if work:
                self.runner.run(work, mine=job)
            if job in work:
                waiter.answer = self.runner.conclude(job)
                break
            work = self._await(job, waiter, alive)
            if not work:
                break
        if isinstance(waiter.answer, Refusal):
            raise waiter.answer
        assert isinstance(waiter.answer, Result)
        return waiter.answer

    @staticmethod
    def _divert(version: Version, sequence: SequenceDemand | None) -> Version:
        """The version that answers, entered, in place of an entered one that has a canary."""
        canary = version.canary
        chosen = canary.choose(sequence) if canary is not None else version
        if chosen is version or not chosen.enter():
            return version
        version.leave()
        return chosen

    @staticmethod
    def _prediction(version: Version, call: Request, form: Form) -> Prediction:
        """The prediction of this request: where it differs from the connection's last one in the bytes of its tensors only,
        that one's.
        """
        known: Prediction | None = call.known
        if known is None or known.version is not version:
            return Prediction(version, call, form, call.arrived_s)
        known.again(call)
        return known

    def _infer_in_turn(self, task: Prediction, call: Request) -> Answer | None:
        """When the scheduler says so. Its version is left."""
        caller: Caller = call.seat if call.seat is not None else Waiter()
        job, work = self._admit(task, caller, call.match.version, call.pace)
        if work:
            self.runner.run(work, mine=job)
        answer: Answer | None = self.runner.conclude(job) if job in work else None
        return answer

    def _admit(self, task: Prediction, caller: Caller, wanted: str | None, pace: Pace) -> tuple[Job, list[Job]]:
        """Its job, and the jobs to run now in this thread.  Raises: Refusal, and the prediction's version is left."""
        task.wanted = wanted
        try:
            if (
                pace is not _PARK
                or task.version.lane.sequences is not None
                or task.form.is_short(task.request, LEADER_JSON_BYTES)
            ):
                task.understand()
                self._follow_sequence(task)
            job = Job(task.version.lane, caller, task, task.arrived_s)
            demands(job, task)
            return job, self._put(job, pace)
        except Exception as error:
            refused = refusal(task.version, error)
            task.version.leave()
            task.release()
            raise refused from error

    def _put(self, job: Job, pace: Pace | None) -> list[Job]:
        """`pace` None: it waits, and this thread does nothing more for it."""
        try:
            work = self.scheduler.admit(job, may_run=pace is _RUN, polls=pace is _PARK, goes_on=pace is _READ)
        except LaneRetired:
            return self._again(job, pace)
        if job.lane.closed:
            self.summon(job.task.version)
        return work

    def _again(self, job: Job, pace: Pace | None) -> list[Job]:
        """Puts a job whose version has gone to the one that answers now.  Raises: Refusal, with the prediction's version
        entered.
        """
        task: Prediction = job.task
        old = task.version
        task.move(self.host.enter(old.name, task.wanted))
        old.leave()
        job.move(task.version.lane)
        task.understand()
        self._follow_sequence(task)
        job.move(task.version.lane)
        demands(job, task)
        return self._put(job, pace)

    def follow(self, job: Job) -> None:
        """Has a job that was removed from the lane of a version which has gone wait for the one that answers now, or refuses
        it.
        """
        try:
            self._again(job, None)
        except Exception as error:  # noqa: BLE001 - it is said to the caller
            self.refuse(job, error)

    def refuse(self, job: Job, error: Exception) -> None:
        """Answers a job that was removed from its lane, with the error."""
        job.task.error = error
        job.caller.deliver(self.runner.conclude(job))

    def _follow_sequence(self, task: Prediction) -> None:
        """Moves a request of a sequence to the version that the sequence began on, while that one is there.  Raises: Refusal."""
        assert task.plan is not None
        if task.plan.sequence is None:
            return
        owner = self._owner_of(task.version, task.wanted, task.plan.sequence)
        if owner is not None:
            task.version.leave()
            task.move(owner)
            task.understand()

    def _owner_of(self, version: Version, wanted: str | None, sequence: SequenceDemand) -> Version | None:
        """Another version than this one that has the sequence, entered; None when there is none, or when it begins here anew."""
        served = self.host.get(version.name)
        if served is None or wanted not in (None, "stable"):
            return None
        others = [v for v in served.versions.values() if v is not version and v.lane.sequences is not None]
        if sequence.start:
            for other in others:
                self.scheduler.forget(other.lane, sequence.id)
        elif version.lane.sequences is None or not version.lane.sequences.knows(sequence.id):
            for other in others:
                if other.lane.sequences is not None and other.lane.sequences.knows(sequence.id) and other.enter():
                    return other
        return None

    def _await(self, job: Job, waiter: Waiter, alive: Callable[[], bool] | None) -> list[Job]:
        """Until the job's own thread is granted a run; empty when the job was done by another thread, or ended without a run."""
        while not waiter.event.wait(min(ALIVE_S, max(SHORTEST_S, self.scheduler.patience_s(job)))):
            if alive is not None and not alive() and self.scheduler.cancel(job):
                self.runner.drop(job)
                raise Refusal(GONE, "the caller has gone")
            self.runner.expire()
            self.scheduler.grant_ready()
        waiter.event.clear()
        work, waiter.work = waiter.work, []
        return work


def _is_soon_read(version: Version, call: Request) -> bool:
    """Whether making arrays of it takes little, whatever it says: JSON and BYTES cost far more than their bytes."""
    length = len(call.body) if call.header_length is None else call.header_length
    if length > LEADER_JSON_BYTES:
        return False
    size = _tensor_bytes(call)
    return size <= version.cost.inline_bytes and (size <= INLINE_TEXT_BYTES or not version.takes_text)


def _tensor_bytes(call: Request) -> int:
    """How large its tensors can be."""
    size = len(call.body)
    return size if call.regions is None else size + call.regions.reach_bytes


class Waiter:
    """A caller that waits in a thread of its own."""

    has_thread = True

    def __init__(self) -> None:
        self.event = threading.Event()
        self.work: list[Job] = []
        self.answer: Any = None

    def parked(self, job: Job) -> None: ...

    def unparked(self, job: Job) -> None: ...

    def granted(self, work: list[Job]) -> None:
        self.work = work
        self.event.set()

    def deliver(self, answer: Any) -> None:
        self.answer = answer
        self.event.set()
