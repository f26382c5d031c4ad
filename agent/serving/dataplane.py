"""One prediction from request to answer, whatever transport brought it.

The short way: a version that sets no bounds but threads is read, run and answered in one go by the thread that has the request. The
long way goes through the scheduler: when the version gathers batches, keeps sequences or bounds its runs, and when no thread is free.
Then the answer may be given by another thread, to the request's `seat`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from agent.serving.answers import Answer, FilledTemplate, Refusal
from agent.serving.api import oip
from agent.serving.inference import Demand, Result, SequenceDemand
from agent.serving.models.host import INLINE_BODY_BYTES, ModelHost, Version
from agent.serving.routes import Match, Pace, Request
from agent.serving.running import Runner, demands
from agent.serving.scheduling import batching
from agent.serving.scheduling.jobs import Caller, Job
from agent.serving.scheduling.lanes import INLINE_RUN_S
from agent.serving.scheduling.scheduler import LaneClosed, Scheduler
from agent.serving.tasks import Call, Direct, Form, Task, expired, refusal
from runtimes.contract import Array

MAX_PLAN_KEY_BYTES = 2048  # JSON parts without data are far smaller
MAX_PLANS = 64  # per version; callers use a few shapes
INLINE_TEXT_BYTES = 8 * 1024  # of BYTES elements, each of which is an object
LEADER_JSON_BYTES = 16 * 1024  # the JSON that the polling thread reads
ALIVE_S = 0.1  # how often a caller that waits in a thread of its own is asked whether it is still there
SHORTEST_S = 100e-6
GONE = 499  # nobody sees this status: its caller has gone
SEQUENCE_ID = b'"sequence_id"'


class OipForm:
    """The Open Inference Protocol."""

    def read(self, version: Version, call: Request) -> oip.Plan:
        if call.plan is not None and call.plan[0] is version:
            known: oip.Plan = call.plan[1]
            return known
        plan = self._read(version, call)
        if plan.reusable:
            call.plan = (version, plan)
        return plan

    @staticmethod
    def _read(version: Version, call: Request) -> oip.Plan:
        body, length = call.body, call.header_length
        if length is not None and length > len(body):
            raise Refusal(400, f"inference header size should be in range (0, {len(body)}), got: {length}")
        key = b""
        if length and length <= MAX_PLAN_KEY_BYTES:
            key = bytes(body[:length])
            plan: oip.Plan | None = version.plans.get(key)
            if plan is not None and plan.size_bytes == len(body):
                return plan
        if call.allowance is not None and call.allowance.made:
            call.allowance.again()
        plan = oip.read_request(body, length, version.name, version.inputs, version.outputs, version.interfaces, call.allowance)
        if key and plan.reusable:
            if len(version.plans) >= MAX_PLANS:
                version.plans.clear()
            version.plans[key] = plan
        return plan

    def feeds(self, plan: oip.Plan, call: Request) -> Mapping[str, Array]:
        return plan.feeds(call.body, call.regions, strays=call.strays, allowance=call.allowance)

    def write(self, version: Version, plan: oip.Plan, call: Request, arrays: Any) -> Answer:
        return oip.write_response(plan, arrays, version.name, version.number_text, version.labels, call.regions)


OIP = OipForm()
_RUN, _READ, _PARK = Pace.RUN, Pace.READ, Pace.PARK


class Dataplane:
    """Answers predictions from the models of a host. Any number of threads may call it."""

    def __init__(self, host: ModelHost, scheduler: Scheduler | None = None) -> None:
        self._host = host
        self.scheduler = scheduler or Scheduler(0)
        self.runner = Runner(self.scheduler)
        self.summon: Callable[[Version], None] = lambda _: None  # somebody waits for a version that is held

    def is_cheap(self, call: Request) -> bool:
        """Whether the answer takes so little that the thread which polls should give it at once."""
        match = call.match
        served = self._host.models.get(match.model)  # type: ignore[arg-type]
        if served is None:
            return True
        version = served.active if match.version is None else served.pick(match.version)
        if version is None:
            return True
        canary = version.canary
        if canary is not None and not canary.candidate.is_cheap:
            return False
        return version.is_cheap and (call.known is not None or _is_soon_read(version, call))

    def keeps_order(self, match: Match) -> bool:
        """Whether requests must be admitted in the order in which they come: they may belong to sequences."""
        served = self._host.models.get(match.model)  # type: ignore[arg-type]
        version = served.pick(match.version) if served is not None else None
        if version is None:
            return False
        canary = version.canary
        return version.lane.sequences is not None or (canary is not None and canary.candidate.lane.sequences is not None)

    def infer(self, call: Request, form: Form = OIP) -> Answer | None:
        """The prediction that an HTTP request asks for; its arrays may not outlive the body. None: it waits, and `call.seat` will be
        given the answer.  Raises: Refusal.
        """
        match = call.match
        assert match.model is not None
        version = self._host.enter(match.model, match.version)
        if version.canary is not None and match.version is None:
            return self._infer_in_turn(self._divert(version, _sequence_of(version, call, form)), call, form)
        lane = version.lane
        if lane.gated or call.pace is not _RUN:
            return self._infer_in_turn(version, call, form)
        keeper: Version | None = None
        try:
            begun = time.perf_counter()
            if call.known is not None and call.known[0] is version:
                _, plan, feeds = call.known
            else:
                plan = form.read(version, call)
                feeds = form.feeds(plan, call)
                if form is OIP and plan.lasting and not call.strays:
                    call.known = (version, plan, feeds)
            if plan.sequence is not None:
                keeper = self._keeper(version, match.version, plan.sequence)
                if keeper is not None:
                    return self._infer_in_turn(keeper, call, form)
            rows = 1
            if lane.batches:
                rows = batching.rows_of(version.name, version.inputs, feeds, lane.rules.max_batch_size)
            started = time.perf_counter()
            timeout_s = plan.timeout_s or lane.timeout_s
            if timeout_s is not None and started - call.arrived_s > timeout_s:
                raise expired()  # noqa: TRY301
            arrays = version.run(feeds, plan.outputs)
            ended = time.perf_counter()
            answer = form.write(version, plan, call, arrays)
            done = ended if type(answer) is FilledTemplate else time.perf_counter()  # filling one in takes nothing
            tap = version.tap  # once: another thread may take it off
            if tap is not None:
                tap.take(plan, feeds, arrays, ended - started)
        except Exception as error:
            if keeper is not None:
                raise  # it was counted there
            raise refusal(version, error) from error
        finally:
            version.leave()
        run_s = ended - started
        version.measured(run_s)
        if run_s <= INLINE_RUN_S and version.inline_bytes < INLINE_BODY_BYTES:
            version.learn(_tensor_bytes(call))
        stats = version.stats
        stats.executions += 1
        stats.inferences += rows
        if lane.batches:
            stats.batched(rows, started - begun, run_s, done - ended)
        stats.succeeded(call.arrived_s, started - begun, run_s, done - ended, done)
        return answer

    def predict(
        self,
        model: str,
        wanted: str | None,
        feeds: Mapping[str, Array],
        demand: Demand,
        alive: Callable[[], bool] | None = None,
    ) -> Result:
        """The same for a caller that has arrays and wants arrays. Blocks until they are there, so it is for threads of one's own.

        `wanted` is a version's number or label (None: the active one). `alive` is asked while the prediction waits for its turn:
        once it says no, the prediction is dropped.  Raises: Refusal.
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
        version = self._host.enter(model, wanted)
        if version.canary is not None and wanted is None:
            version = self._divert(version, demand.sequence)
        task = Direct(version, feeds, demand)
        job, work = self._admit(task, waiter, wanted, Pace.RUN)
        while True:
            if work:
                self.runner.run(work, mine=job)
            if job in work:
                self.runner.conclude(job)
                break
            work = self._await(job, waiter, alive)
            if not work:
                break
        if task.refused is not None:
            raise task.refused
        return Result(task.version, task.arrays)

    @staticmethod
    def _divert(version: Version, sequence: SequenceDemand | None) -> Version:
        """The version that answers, entered, in place of an entered one that has a canary."""
        canary = version.canary
        chosen = canary.choose(sequence) if canary is not None else version
        if chosen is version or not chosen.enter():
            return version
        version.leave()
        return chosen

    def _infer_in_turn(self, version: Version, call: Request, form: Form) -> Answer | None:
        """The long way. It leaves `version`."""
        caller: Caller = call.seat if call.seat is not None else Waiter()
        job, work = self._admit(Call(version, call, form), caller, call.match.version, call.pace)
        if work:
            self.runner.run(work, mine=job)
        answer: Answer | None = self.runner.conclude(job) if job in work else None
        return answer

    def _admit(self, task: Task, caller: Caller, wanted: str | None, pace: Pace) -> tuple[Job, list[Job]]:
        """Its job, and the jobs to run now in this thread.  Raises: Refusal, and the task's version is left."""
        task.wanted = wanted
        try:
            if pace is not _PARK or task.version.lane.sequences is not None or task.is_short(LEADER_JSON_BYTES):
                task.understand()
                self._settle(task, wanted)
            job = Job(task.version.lane, caller, task, task.arrived_s)
            demands(job, task)
            return job, self._put(job, pace)
        except Exception as error:
            refused = refusal(task.version, error)
            task.version.leave()
            raise refused from error

    def _put(self, job: Job, pace: Pace | None) -> list[Job]:
        """`pace` None: it waits, and this thread does nothing more for it."""
        try:
            work = self.scheduler.admit(job, may_run=pace is _RUN, polls=pace is _PARK, goes_on=pace is _READ)
        except LaneClosed:
            return self._again(job, pace)
        if job.lane.held:
            self.summon(job.task.version)
        return work

    def _again(self, job: Job, pace: Pace | None) -> list[Job]:
        """Puts a job whose version has gone to the one that answers now.  Raises: Refusal, with the task's version entered."""
        task: Task = job.task
        old = task.version
        task.version = self._host.enter(old.name, task.wanted)
        old.leave()
        task.feeds = None
        job.move(task.version.lane)
        task.understand()
        self._settle(task, task.wanted)
        job.move(task.version.lane)
        demands(job, task)
        return self._put(job, pace)

    def follow(self, job: Job) -> None:
        """Of a job that was taken out of the lane of a version which has gone: it waits for the one that answers now, or is refused."""
        try:
            self._again(job, None)
        except Exception as error:  # noqa: BLE001 - it is said to the caller
            self.refuse(job, error)

    def refuse(self, job: Job, error: Exception) -> None:
        """Answers a job that was taken out of its lane."""
        job.task.error = error
        job.caller.deliver(self.runner.conclude(job))

    def _settle(self, task: Task, wanted: str | None) -> None:
        """Moves a request of a sequence to the version that the sequence began on, while that one is there."""
        assert task.plan is not None
        if task.plan.sequence is None:
            return
        keeper = self._keeper(task.version, wanted, task.plan.sequence)
        if keeper is not None:
            task.version.leave()
            task.version = keeper
            task.understand()

    def _keeper(self, version: Version, wanted: str | None, sequence: SequenceDemand) -> Version | None:
        """Another version than this one that has the sequence, entered; None when there is none, or when it begins here anew."""
        served = self._host.get(version.name)
        if served is None or wanted not in (None, "stable"):
            return None
        others = [v for v in served.versions.values() if v is not version and v.lane.sequences is not None]
        if sequence.start:
            for other in others:
                self.scheduler.forget(other.lane, sequence.id)
        elif version.lane.sequences is None or not version.lane.sequences.holds(sequence.id):
            for other in others:
                if other.lane.sequences is not None and other.lane.sequences.holds(sequence.id) and other.enter():
                    return other
        return None

    def _await(self, job: Job, waiter: Waiter, alive: Callable[[], bool] | None) -> list[Job]:
        """Until the job's own thread is granted a run; empty when the job was done by another thread, or ended without a run."""
        while not waiter.event.wait(min(ALIVE_S, max(SHORTEST_S, self.scheduler.patience_s(job)))):
            if alive is not None and not alive() and self.scheduler.cancel(job):
                self.runner.drop(job)
                raise Refusal(GONE, "the caller has gone")
            self.runner.expire()
            self.scheduler.settle()
        waiter.event.clear()
        work, waiter.work = waiter.work, []
        return work


def _sequence_of(version: Version, call: Request, form: Form) -> SequenceDemand | None:
    """The place in a sequence that a request demands, before it is known which version answers it."""
    length = len(call.body) if call.header_length is None else call.header_length
    if form is not OIP or SEQUENCE_ID not in bytes(call.body[:length]):
        return None
    try:
        return OIP.read(version, call).sequence
    except Refusal:
        return None  # whichever version answers says what is wrong with it


def _is_soon_read(version: Version, call: Request) -> bool:
    """Whether making arrays of it takes little, whatever it says: JSON and BYTES cost far more than their bytes."""
    length = len(call.body) if call.header_length is None else call.header_length
    if length > LEADER_JSON_BYTES:
        return False
    size = _tensor_bytes(call)
    return size <= version.inline_bytes and (size <= INLINE_TEXT_BYTES or not version.takes_text)


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

    def parked(self, job: Job) -> None: ...

    def taken(self, job: Job) -> None: ...

    def granted(self, work: list[Job]) -> None:
        self.work = work
        self.event.set()

    def deliver(self, answer: Any) -> None:  # noqa: ARG002 - it is in the task
        self.event.set()
