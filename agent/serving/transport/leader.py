"""What the thread that leads does: it polls, reads what is there, and answers at once every request whose answer takes little.

The rules:
- It sleeps while there is nothing to do, but for a client that asks again at once it stays awake a moment (`spinning`).
- Before anything long it hands the connection over, and another thread leads; all threads but one may be at long work. What
  comes beyond that waits, and the next thread that is through has the best of it (`scheduling` has the rules); the leader goes
  on leading, so a prediction that takes long never delays one that does not.
"""

from __future__ import annotations

import functools
import logging
import select
import time
from collections.abc import Callable

from agent.serving.routes import Kind, Pace
from agent.serving.scheduling.lanes import Job
from agent.serving.scheduling.scheduler import Scheduler
from agent.serving.transport.admission import Admission
from agent.serving.transport.connection import END, NOTHING, Connection
from agent.serving.transport.handovers import Epoll, Handovers
from agent.serving.transport.owner import LEADER, NOBODY
from agent.serving.transport.replies import Replies, Stopping
from agent.serving.transport.spinning import Spinner
from agent.serving.transport.workers import Service, Workers

log = logging.getLogger(__name__)

HAND_OVER_BYTES = 16 * 1024  # a body of which this much came in one read goes on coming: let another thread lead meanwhile
REQUESTS_IN_A_ROW = 32  # pipelined requests of one connection before others have their turn
SWEEP_S = 5.0
STOPPING_POLL_S = 0.05
FINE_POLL_S = 2e-3
STOP_PATIENCE_S = 1.0  # on the way out: how long a half-sent request, or an answer that is not read, may rest
STOP_LONGEST_S = 5.0  # and how long a request may go on coming; an answer may be read for as long as the end is waited for
_QUICK = Kind.QUICK


class Leader:
    """One thread at a time leads. `drain_wake_ups` makes the descriptor `wake` silent again, by which others end a poll."""

    def __init__(
        self,
        service: Service,
        scheduler: Scheduler,
        epoll: Epoll,
        admission: Admission,
        handovers: Handovers,
        replies: Replies,
        workers: Workers,
        stopping: Stopping,
        wake: int,
        drain_wake_ups: Callable[[], None],
        to_control: Callable[[Connection], None],
    ) -> None:
        self._service = service
        self._scheduler = scheduler
        self._epoll = epoll
        self._admission = admission
        self._connections = admission.open
        self._close = admission.close
        self._handovers = handovers
        self._ready = handovers.ready
        self._replies = replies
        self._send = replies.send
        self._workers = workers
        self._kept = workers.kept
        self._stopping = stopping
        self._wake = wake
        self._drain_wake_ups = drain_wake_ups
        self._to_control = to_control
        self._spinner = Spinner()
        self._swept_s = time.perf_counter()

    def lead(self) -> Connection | list[Job] | None:
        """Leads until there is long work for this thread, which then leads no more. None when the loop ends."""
        ready = self._ready
        connections = self._connections
        while not self._stopping.over:
            if not ready:
                work = self._poll()
                if work:
                    return work
                continue
            fd, event = ready.popleft()
            connection = connections.get(fd)
            if connection is None:
                self._attend_other(fd)
                continue
            try:
                if self.attend(connection, event):
                    return connection
            except Exception:
                log.exception("a connection failed in an unforeseen way and is closed")
                self._admission.close_own(connection)
        return None

    def _poll(self) -> list[Job]:
        """Polls, or gives long work that waits for a thread and can have this one."""
        longest_s = STOPPING_POLL_S if self._stopping.begun else SWEEP_S
        if self._scheduler.waiting:
            work = self._poll_among_jobs(longest_s)
            if work:
                return work
        elif self._kept:  # threads at long work, which want the processors
            self._ready.extend(self._epoll.poll(longest_s))
        else:
            self._ready.extend(self._spinner.poll(self._epoll.poll, longest_s))
        if self._stopping.begun:
            self._drain()
        elif time.perf_counter() - self._swept_s > SWEEP_S:
            self._sweep()
        return []

    def _poll_among_jobs(self, longest_s: float) -> list[Job]:
        """Polls while predictions wait: what time alone changes for them ends the poll."""
        scheduler = self._scheduler
        self._service.expire()
        work, is_long = scheduler.next_for_poller()
        if is_long:
            return work
        if work:
            self._service.run(work)
            longest_s = 0.0
        longest_s = scheduler.poll_s(longest_s)
        if 0.0 < longest_s < FINE_POLL_S:
            select.select((self._epoll,), (), (), longest_s)  # which counts microseconds, where epoll counts milliseconds
            longest_s = 0.0
        self._ready.extend(self._epoll.poll(longest_s))
        scheduler.polled()
        return []

    def _attend_other(self, fd: int) -> None:
        if fd == self._wake:
            self._drain_wake_ups()
        else:
            self._admission.accept(fd)

    def attend(self, connection: Connection, event: int) -> bool:
        """Does what can be done now. True when this thread is to finish the connection without leading."""
        if connection.owner is not LEADER and not self._handovers.is_leaders(connection):
            self._attend_parked(connection, event)
            return False
        if connection.sending:
            if not self._go_on(connection):
                return False
        elif connection.draining:
            if not connection.discard():
                self._close(connection)
            return False
        count = connection.receive() if event else NOTHING
        if count == END:
            self._close(connection)
            return False
        if count == NOTHING and not connection.buffered:
            return False
        for _ in range(REQUESTS_IN_A_ROW):
            request = connection.next_request()
            if request is None:
                return count >= HAND_OVER_BYTES and connection.missing_bytes > 0 and self._hand_over(connection)
            request.seat = connection.seat
            kind = self._service.kind(request, connection.grant)
            if kind is not _QUICK:
                if kind is Kind.CONTROL or not self._service.parks(request):
                    connection.request = request
                    return self._hand_over(connection, control=kind is Kind.CONTROL)
                if not self._service.keeps_order(request) and self._scheduler.begin():
                    connection.request = request
                    self._handovers.hand_over(connection)
                    return True
                request.pace = Pace.PARK
            answer = self._service.answer(request, connection.grant)
            if answer is None:
                return False
            if not self._send(connection, answer):
                if connection.sending:
                    self._handovers.listen_for(connection, select.EPOLLOUT)
                return False
            if not connection.buffered:
                return False
        self._ready.append((connection.fd, 0))
        return False

    def _go_on(self, connection: Connection) -> bool:
        """Sends what the peer did not take before. True when the connection may be read from again."""
        free = self._replies.go_on(connection)
        if connection.owner is not NOBODY and not connection.sending:
            self._handovers.listen_for(connection, select.EPOLLIN)
        return free

    def _attend_parked(self, connection: Connection, event: int) -> None:
        """The epoll told of a connection that is not the leader's: its prediction waits, and its peer has gone."""
        job = connection.job
        if job is not None and event & (select.EPOLLHUP | select.EPOLLERR) and self._scheduler.cancel(job):
            self._service.drop(job)
            self._close(connection)

    def _hand_over(self, connection: Connection, *, control: bool = False) -> bool:
        """Hands the connection over. True when this thread is to finish it without leading, False when another one will."""
        self._handovers.hand_over(connection)
        if control:
            self._to_control(connection)
            return False
        return self._scheduler.begin(connection)

    def _sweep(self) -> None:
        self._swept_s = time.perf_counter()
        self._workers.give_all_back()
        for connection in list(self._connections.values()):  # whose wait was not as short as it was to be
            job = connection.job
            if job is not None:
                self._scheduler.while_it_waits(job, functools.partial(self._handovers.hear, connection))
        self._scheduler.sweep()
        self._admission.sweep()

    def _drain(self) -> None:
        """On the way out: nobody comes in, connections that are idle or do not move are closed, and when all have gone it is
        done.
        """
        self._admission.shut()
        late = time.perf_counter() - self._stopping.begun_s > STOP_LONGEST_S
        if self._admission.clear(STOP_PATIENCE_S, spared={fd for fd, _ in self._ready}, late=late):
            self._stopping.drained.set()
