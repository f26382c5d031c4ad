"""Runs what the scheduler says may run, and gives every caller its answer.

The rules:
- Whoever takes jobs runs them here, and by that gives their instance back and their sequence's turn on.
- A batch that fails is run again one by one, so that a bad request fails nobody but its caller.
- The deadline is looked at once more right before the run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from agent.serving.models.host import Version
from agent.serving.scheduling import batching
from agent.serving.scheduling.jobs import Job
from agent.serving.scheduling.scheduler import Scheduler
from agent.serving.tasks import Task, expired
from runtimes.contract import Array, InputInvalid


def demands(job: Job, task: Task) -> None:
    """Tells the job what its task demands, as far as that was read.  Raises: Refusal, InputInvalid."""
    plan, lane = task.plan, job.lane
    if plan is None:
        return
    if plan.priority or plan.timeout_s is not None or plan.sequence is not None:
        job.wants(plan.priority, plan.timeout_s, plan.sequence)
    if lane.batches:
        if task.feeds is None:
            task.unpack()
        assert task.feeds is not None
        specs = task.version.inputs
        job.rows = batching.rows_of(task.version.name, specs, task.feeds, lane.rules.max_batch_size)
        if job.rows:
            job.key = batching.key_of(specs, task.feeds, plan.outputs)


class Runner:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def run(self, work: list[Job], *, mine: Job | None = None, goes_on: bool = False) -> None:
        """Runs the jobs and answers their callers, but not that of `mine`: `conclude` it. `goes_on`: this thread asks the scheduler for
        more when it is through.  Never raises.
        """
        try:
            if len(work) == 1:
                self._alone(work[0])
            else:
                self._batch(work)
        finally:
            self._scheduler.finished(work, goes_on=goes_on)
        for job in work:
            if job is not mine:
                job.caller.deliver(self.conclude(job))

    @staticmethod
    def conclude(job: Job) -> Any:
        """The answer of a job that ran or failed; its version is left. Once for each job."""
        task: Task = job.task
        try:
            return task.answer()
        finally:
            task.version.leave()

    def expire(self) -> None:
        """Answers those that have waited until their deadline."""
        for job in self._scheduler.expired():
            job.task.error = expired(job.task.version if job.lane.held else None)
            job.caller.deliver(self.conclude(job))

    @staticmethod
    def drop(job: Job) -> None:
        """Of a job that was cancelled: nobody waits for an answer."""
        job.task.version.stats.cancelled += 1
        job.task.version.leave()

    def _batch(self, work: list[Job]) -> None:
        now = time.perf_counter()
        timely = [job for job in work if job.deadline_s >= now]
        together = len(timely) > 1 and self._together(timely)
        for job in work:
            if not together or job.deadline_s < now:
                self._alone(job)

    def _together(self, work: list[Job]) -> bool:
        """One run for all of them. False when it failed."""
        version: Version = work[0].task.version
        tasks: list[Task] = [job.task for job in work]
        rows = [job.rows for job in work]
        begun = time.perf_counter()
        try:
            feeds = batching.join([task.feeds for task in tasks if task.feeds is not None])
            started = time.perf_counter()
            arrays = version.run(feeds, tasks[0].plan.outputs if tasks[0].plan else None)
            ended = time.perf_counter()
            parts = batching.split(arrays, rows)
        except Exception:  # noqa: BLE001 - whatever it is, each hears about its own alone
            return False
        version.measured(ended - started)
        version.stats.executed(sum(rows))
        version.stats.batched(sum(rows), started - begun, ended - started, time.perf_counter() - ended)
        for task, part in zip(tasks, parts, strict=True):
            task.arrays, task.run_s = part, ended - started
            task.input_s += started - begun
        return True

    def _alone(self, job: Job) -> None:
        task: Task = job.task
        version = task.version
        try:
            if task.plan is None:
                task.understand()
                demands(job, task)
            if task.feeds is None:
                task.unpack()
            started = time.perf_counter()
            if started > job.deadline_s:
                raise expired()  # noqa: TRY301
            assert task.feeds is not None
            outputs = task.plan.outputs if task.plan is not None else None
            if job.sequence is None:
                task.arrays = version.run(task.feeds, outputs)
            else:
                task.arrays = _in_sequence(job, version, outputs)
            task.run_s = time.perf_counter() - started
        except Exception as error:  # noqa: BLE001 - it is said to the caller
            task.error = error
            return
        version.measured(task.run_s)
        stats = version.stats
        stats.executions += 1
        stats.inferences += job.rows
        if job.lane.batches:
            stats.batched(job.rows, task.input_s, task.run_s, 0.0)


def _in_sequence(job: Job, version: Version, outputs: Sequence[str] | None) -> list[Array]:
    """One step of a sequence, whose turn it is.  Raises: as the model, and Refusal (400) when the sequence is not under way."""
    sequence, demand = job.sequence, job.demand
    assert sequence is not None
    assert demand is not None
    if demand.start:
        sequence.end()
        model: Any = version.model
        sequence.state = model.sequence()
    elif sequence.state is None or not sequence.started:
        assert job.lane.sequences is not None
        raise job.lane.sequences.unknown(sequence.id)
    assert sequence.state is not None
    try:
        arrays: list[Array] = version.way(sequence.state.run)(job.task.feeds, outputs)
    except InputInvalid:
        raise
    except BaseException:
        sequence.end()
        raise
    sequence.started = True
    if demand.end:
        sequence.end()
    return arrays
