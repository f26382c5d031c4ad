"""What the threads do that do not lead: long work, connection by connection, and predictions that waited.

The rules:
- A thread that has answered long work waits a moment for the next of the same client, if that one asks again at once and nobody
  else waits: then neither another thread nor another processor's cold cache has a part in it.
- A thread that has answered a prediction which waited, and runs the next one, keeps that connection and reads from it when this
  run is through: clients that ask again at once, while all threads are at work, wake nobody. Should the run hang, the leader
  gives them back.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from agent.serving.access import Grant
from agent.serving.answers import Answer
from agent.serving.routes import Kind, Pace, Request
from agent.serving.scheduling.lanes import Job
from agent.serving.scheduling.scheduler import Scheduler
from agent.serving.transport.admission import Admission
from agent.serving.transport.connection import END, NOTHING, Connection
from agent.serving.transport.handovers import Handovers
from agent.serving.transport.owner import LEADER, NOBODY
from agent.serving.transport.replies import Replies, Stopping

log = logging.getLogger(__name__)

PROMPT_S = 500e-6  # a client that asks again sooner than that after its answer is waited for
STAY_MS = 1  # so long, by the thread that answered it
KEEP_S = 5e-3  # a connection is kept during a run that takes no longer, if its client's last request came within two of these
SHORT_WAIT_S = (
    50e-3  # nobody listens for the end of a peer whose turn is to come sooner: that is two system calls per prediction
)
PATIENCE_MS = 2  # how long a thread waits for more of a large body before it gives the connection back to the epoll
MIN_PROGRESS_BYTES = 4096  # and how much each such wait must bring: a trickling client must not keep a thread
_QUICK, _CONTROL, _READ = Kind.QUICK, Kind.CONTROL, Pace.READ


class Service(Protocol):
    """What answers. Called from any thread."""

    def kind(self, request: Request, grant: Grant) -> Kind: ...

    def answer(self, request: Request, grant: Grant) -> Answer | None: ...

    def parks(self, request: Request) -> bool: ...

    def keeps_order(self, request: Request) -> bool: ...

    def run(self, work: list[Job]) -> None: ...

    def expire(self) -> None: ...

    def drop(self, job: Job) -> None: ...


class Seat:
    """How the scheduler, and whoever runs a prediction that waited, reach the connection it came by."""

    has_thread = False

    def __init__(self, workers: Workers, handovers: Handovers, connection: Connection) -> None:
        self.parked: Callable[[Job], None] = functools.partial(workers.park, connection)
        self.unparked: Callable[[Job], None] = functools.partial(handovers.start, connection)
        self.deliver: Callable[[Answer], None] = functools.partial(workers.deliver, connection)

    def granted(self, work: list[Job]) -> None:  # noqa: ARG002
        raise AssertionError("a connection has no thread")


class Workers:
    """Any number of threads may `work`. `to_control` gives a connection to the control thread."""

    def __init__(
        self,
        service: Service,
        scheduler: Scheduler,
        admission: Admission,
        handovers: Handovers,
        replies: Replies,
        stopping: Stopping,
        to_control: Callable[[Connection], None],
    ) -> None:
        self._service = service
        self._scheduler = scheduler
        self._handovers = handovers
        self._safely = admission.safely
        self._close = admission.close
        self._send = replies.send
        self._stopping = stopping
        self._to_control = to_control
        self.kept: dict[int, deque[Connection]] = {}  # of each thread at long work; whoever takes one out owns it

    def work(self, work: Connection | list[Job] | None) -> None:
        """Does this long work, and then what waits, until nothing waits."""
        kept = self.kept[threading.get_ident()] = deque()
        while work is not None:
            if isinstance(work, Connection) or work[0].lane.cost_s > KEEP_S:
                self._give_back(kept)
            before = len(kept)
            if isinstance(work, Connection):
                self._safely(self.finish, work)
            else:
                self._service.run(work)
            try:
                for _ in range(before):
                    self._safely(self._read_again, kept.popleft())
            except IndexError:  # a run that took long: the leader gave them back
                pass
            work = self._scheduler.next_for_thread()
        del self.kept[threading.get_ident()]
        self._give_back(kept)

    def give_all_back(self) -> None:
        """Gives the connections back that threads keep whose runs may hang."""
        for kept in list(self.kept.values()):
            self._give_back(kept)

    def _give_back(self, kept: deque[Connection]) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._safely(self._handovers.put_back, kept.popleft())

    def finish(self, connection: Connection, *, control: bool = False, waits: bool = False) -> None:
        """Serves a connection that this thread owns, and puts it back. `waits`: a prediction waits even if no other does."""
        request, connection.request = connection.request, None
        prompt = False
        while not connection.sending:
            if request is None:
                request = connection.next_request()
            if request is None:
                if connection.missing_bytes and self._receive_more(connection):
                    continue
                if prompt and self._stays(connection):
                    prompt = False
                    continue
                break
            request.seat = connection.seat
            if control:
                pass
            elif (waits or self._scheduler.waiting) and self._service.parks(request):
                request.pace = _READ
            else:
                kind = self._service.kind(request, connection.grant)
                if kind is _CONTROL:
                    connection.request = request
                    self._to_control(connection)
                    return
                prompt = kind is not _QUICK and connection.arrived_s - connection.answered_s < PROMPT_S
            answer = self._service.answer(request, connection.grant)
            if answer is None:
                return
            if not self._send(connection, answer) and not connection.sending:
                break
            connection.answered_s = time.perf_counter()
            request = None
            if connection.buffered and self._scheduler.crowded and not control:
                break
        if connection.owner is not NOBODY:  # closed
            self._handovers.put_back(connection)

    def _read_again(self, connection: Connection) -> None:
        """Reads from a connection that was kept, and answers its next request if that is there."""
        if connection.receive() > 0:
            self.finish(connection, waits=True)
        else:
            self._handovers.put_back(connection)  # whose leader will hear of an end, too

    def park(self, connection: Connection, job: Job) -> None:
        """The connection's prediction waits. With the scheduler's lock held."""
        lane = job.lane
        may_last = connection.owner is not LEADER and (lane.closed or lane.cost_s * self._scheduler.waiting > SHORT_WAIT_S)
        self._handovers.park(connection, job, may_last=may_last)

    def deliver(self, connection: Connection, answer: Answer) -> None:
        """Sends the answer of a prediction that waited. Called by the thread that ran it."""
        try:
            free = self._send(connection, answer)
            prompt = connection.arrived_s - connection.answered_s < 2 * KEEP_S
            connection.answered_s = time.perf_counter()
            if connection.owner is NOBODY:  # closed
                return
            kept = self.kept.get(threading.get_ident())
            if prompt and free and kept is not None and self._scheduler.waiting and not connection.buffered:
                kept.append(connection)
            else:
                self._handovers.put_back(connection)
        except Exception:
            log.exception("a connection failed in an unforeseen way and is closed")
            self._close(connection)

    def _stays(self, connection: Connection) -> bool:
        """Waits a moment for the next request of a prompt client. False when it does not come, others wait, or the client has
        gone.
        """
        if self._scheduler.crowded or self._stopping.begun:
            return False
        waiting = select.poll()
        waiting.register(connection.fd, select.POLLIN)
        return bool(waiting.poll(STAY_MS)) and not self._scheduler.crowded and connection.receive() > 0

    def _receive_more(self, connection: Connection) -> bool:
        """Waits a little for more of a large body. False when it does not come, or the connection was closed."""
        before = connection.missing_bytes
        count = connection.receive()
        if count == NOTHING:
            waiting = select.poll()
            waiting.register(connection.fd, select.POLLIN)
            if not waiting.poll(PATIENCE_MS):
                return False
            count = connection.receive()
        if count == END:
            self._close(connection)
            return False
        missing = connection.missing_bytes
        return missing == 0 or before - missing >= MIN_PROGRESS_BYTES
