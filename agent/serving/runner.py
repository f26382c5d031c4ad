"""Runs what the scheduler says may run, and gives every caller its answer.

The rules:
- Whoever takes jobs runs them here, and by that gives their instance back and their sequence's turn on.
- A batch that fails is run again one by one, so that a bad request fails nobody but its caller.
- The deadline is checked once more right before the run.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from agent.serving.models.version import Version
from agent.serving.prediction import Prediction, expired
from agent.serving.scheduling import batching
from agent.serving.scheduling.lanes import Job
from agent.serving.scheduling.scheduler import Scheduler
from runtimes.contract import Array, InputInvalid


def demands(job: Job, task: Prediction) -> None:
    """Tells the job what its prediction demands, as far as that was read.  Raises: Refusal, InputInvalid."""
    plan, lane = task.plan, job.lane
    if plan is None:
        return
    if plan.priority or plan.timeout_s is not None or plan.sequence is not None:
        job.wants(plan.priority, plan.timeout_s, plan.sequence)
    if lane.batches:
        task.unpack()
        assert task.feeds is not None
        job.rows = task.rows
        if job.rows:
            job.key = batching.key_of(task.version.inputs, task.feeds, plan.outputs)


class Runner:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def run(self, work: list[Job], *, mine: Job | None = None, goes_on: bool = False) -> None:
        """Runs the jobs and answers their callers, but not that of `mine`: `conclude` it. `goes_on`: this thread asks the
        scheduler for more when it is through.  Never raises.
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
        task: Prediction = job.task
        try:
            return task.conclude()
        finally:
            task.version.leave()

    def expire(self) -> None:
        """Answers those that have waited until their deadline."""
        for job in self._scheduler.expired():
            job.task.error = expired(job.task.version if job.lane.closed else None)
            job.caller.deliver(self.conclude(job))

    @staticmethod
    def drop(job: Job) -> None:
        """Counts a job that was cancelled: nobody waits for an answer."""
        task: Prediction = job.task
        task.version.stats.cancelled += 1
        task.version.leave()
        task.release()

    def _batch(self, work: list[Job]) -> None:
        now = time.perf_counter()
        timely = [job for job in work if job.deadline_s >= now]
        as_one = len(timely) > 1 and self._run_as_one(timely)
        for job in work:
            if not as_one or job.deadline_s < now:
                self._alone(job)

    def _run_as_one(self, work: list[Job]) -> bool:
        """One run for all of them. False when it failed."""
        version: Version = work[0].task.version
        tasks: list[Prediction] = [job.task for job in work]
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
            task.ran_with_others(part, started - begun, ended - started)
        return True

    @staticmethod
    def _alone(job: Job) -> None:
        task: Prediction = job.task
        try:
            if task.plan is None:
                task.understand()
                demands(job, task)
            now_s = task.unpack()
            task.run(job.deadline_s, now_s, None if job.sequence is None else functools.partial(_run_in_sequence, job))
        except Exception as error:  # noqa: BLE001 - it is said to the caller
            task.error = error


def _run_in_sequence(job: Job, feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
    """One step of a sequence, whose turn it is.  Raises: as the model, and Refusal (400) when the sequence is not under way."""
    sequence, demand, version = job.sequence, job.demand, job.task.version
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
        arrays: list[Array] = version.way(sequence.state.run)(feeds, outputs)
    except InputInvalid:
        raise
    except BaseException:
        sequence.end()
        raise
    sequence.started = True
    if demand.end:
        sequence.end()
    return arrays
