"""Leader/followers: a few threads take turns at one epoll.

One thread leads: it polls, reads what is there, and answers at once every request whose answer takes little. Before anything long
it makes another thread the leader and finishes that one connection alone. So short requests never meet another thread, long ones
run in parallel because engines release the interpreter's lock, and nobody waits for a slow client: sockets never block.

The rules that keep it correct:
- Whoever holds `_lead` leads; only the leader polls, accepts, and touches connections that are registered at the epoll.
- Who leads sleeps while there is nothing to do, but for a client that asks again at once it stays awake a moment (`spinning`).
- A connection that is handed over leaves the epoll first and comes back last, so exactly one thread owns it at any time.
- A thread that has answered long work waits a moment for the next of the same client, if that one asks again at once and nobody else
  waits: then neither another thread nor another processor's cold cache has a part in it.
- A thread that has answered a prediction which waited, and takes the next one, keeps that connection and looks at it when this run is
  through: clients that ask again at once, while all threads are at work, wake nobody. Should the run hang, the leader takes them back.
- All threads but one may be at long work. What comes beyond that waits, and the next thread that is through takes the best of it
  (`scheduling` has the rules); the leader goes on leading, so a prediction that takes long never delays one that does not.
- The connection of a prediction that waits is parked: it is at the epoll only so that the leader hears when its peer has gone, and
  not even that while the wait is to be short. Whoever takes the prediction takes the connection out of the epoll in the same step.
- Control work has a thread of its own: loading a model takes no thread from predictions. Others may give it work with `defer`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from agent.serving.access import Grant
from agent.serving.answers import Answer
from agent.serving.buffers import LARGE_BODIES_AT_ONCE, BufferPool
from agent.serving.routes import Kind, Pace, Request, Router
from agent.serving.scheduling.lanes import Job
from agent.serving.scheduling.scheduler import Scheduler, busy_threads, loop_threads
from agent.serving.shared.memory import ClientMemory
from agent.serving.transport import http
from agent.serving.transport.admission import Admission
from agent.serving.transport.connection import END, NOTHING, Connection
from agent.serving.transport.control_thread import ControlThread
from agent.serving.transport.spinning import Spinner

log = logging.getLogger(__name__)

HAND_OVER_BYTES = 16 * 1024  # a body of which this much came in one read goes on coming: let another thread lead meanwhile
PROMPT_S = 500e-6  # a client that asks again sooner than that after its answer is waited for
STAY_MS = 1  # so long, by the thread that answered it
KEEP_S = 5e-3  # a connection is kept during a run that takes no longer, if its client's last request came within two of these
SHORT_WAIT_S = (
    50e-3  # nobody listens for the end of a peer whose turn is to come sooner: that is two system calls for each prediction
)
PATIENCE_MS = 2  # how long a thread waits for more of such a body before it gives the connection back to the epoll
MIN_PROGRESS_BYTES = 4096  # and how much each such wait must bring: a trickling client must not hold a thread
REQUESTS_IN_A_ROW = 32  # pipelined requests of one connection before others have their turn
SWEEP_S = 5.0
STOPPING_POLL_S = 0.05
FINE_POLL_S = 2e-3
STOP_PATIENCE_S = 1.0  # on the way out: how long a half-sent request, or an answer that is not read, may rest
STOP_LONGEST_S = 5.0  # and how long a request may go on coming; an answer may be read for as long as the end is waited for
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

    def __init__(self, loop: Loop, connection: Connection) -> None:
        self.parked: Callable[[Job], None] = functools.partial(loop.park, connection)
        self.taken: Callable[[Job], None] = functools.partial(loop.unpark, connection)
        self.deliver: Callable[[Answer], None] = functools.partial(loop.deliver, connection)

    def granted(self, work: list[Job]) -> None:  # noqa: ARG002
        raise AssertionError("a connection has no thread")


class Loop:
    """Serves connections from `listeners` until `stop`. `grant_of` says what a new connection's peer may do, `memory_of` makes what
    holds the memory it shares.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        service: Service,
        router: Router,
        grant_of: Callable[[socket.socket], Grant],
        *,
        threads: int,
        max_body_bytes: int,
        max_connections: int,
        memory_of: Callable[[Grant], ClientMemory | None] = lambda _: None,
        scheduler: Scheduler | None = None,
        pool: BufferPool | None = None,
    ) -> None:
        self._service = service
        self._router = router
        self._grant_of = grant_of
        self._memory_of = memory_of
        self._max_body = max_body_bytes
        self._pool = pool or BufferPool(LARGE_BODIES_AT_ONCE * max_body_bytes)
        self._epoll = select.epoll()
        self._admission = Admission(listeners, self._epoll, self._connection, max_connections)
        self._connections = self._admission.open
        self._close = self._admission.close
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lead = threading.Lock()
        self._kept: dict[int, deque[Connection]] = {}  # of each thread at long work; whoever takes one out owns it
        self._ready: deque[tuple[int, int]] = deque()
        self._spinner = Spinner()
        self._swept_s = time.perf_counter()
        self._scheduler = scheduler or Scheduler(busy_threads(threads))
        self._control = ControlThread(functools.partial(self._safely, functools.partial(self._finish, control=True)))
        self.defer = self._control.defer
        self._stopping_s = 0.0
        self._stopping = False
        self._stopped = False
        self._drained = threading.Event()
        self._threads = [threading.Thread(target=self._serve, name=f"serve-{n}") for n in range(loop_threads(threads))]
        self._threads.append(threading.Thread(target=self._control.work, name="control"))

    def start(self) -> None:
        self._admission.unlock()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._scheduler.wake = self._wake_up
        for thread in self._threads:
            thread.start()

    def stop(self, grace_s: float) -> bool:
        """Accepts nothing more, finishes what was asked, then ends all threads. False when `grace_s` was not enough for all of it."""
        self._stopping_s = time.perf_counter()
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        clean = self._drained.wait(grace_s)
        self._stopped = True
        os.eventfd_write(self._wake, 1)
        self._control.end()
        deadline = time.monotonic() + grace_s + 1
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            clean = clean and not thread.is_alive()
        if clean:
            self._scheduler.wake = lambda: None
            for connection in list(self._connections.values()):
                self._close(connection)
            self._epoll.close()
            os.close(self._wake)
        return clean

    def stuck(self, patience_s: float) -> bool:
        """Whether requests wait and no thread has come free for so long: engines hang, and nothing in this process can end them."""
        return self._scheduler.stuck(patience_s)

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)

    # -- threads -------------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._lead:
                work = self._lead_until_long()
            if work is None:
                return
            self._work(work)

    def _work(self, work: Connection | list[Job] | None) -> None:
        """Does long work, and then what waits, until nothing does."""
        kept = self._kept[threading.get_ident()] = deque()
        while work is not None:
            if isinstance(work, Connection) or work[0].lane.cost_s > KEEP_S:
                self._let_all_go(kept)
            before = len(kept)
            if isinstance(work, Connection):
                self._safely(self._finish, work)
            else:
                self._service.run(work)
            try:
                for _ in range(before):
                    self._safely(self._hear, kept.popleft())
            except IndexError:  # a run that took long: the leader let them go
                pass
            work = self._scheduler.next_for_thread()
        del self._kept[threading.get_ident()]
        self._let_all_go(kept)

    def _let_all_go(self, kept: deque[Connection]) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._safely(self._put_back, kept.popleft())

    def _safely(self, act: Callable[[Connection], None], connection: Connection) -> None:
        """A fault of ours, or memory that is not there, ends one connection and not the thread."""
        try:
            act(connection)
        except Exception:
            log.exception("a connection failed in an unforeseen way and is closed")
            if self._connections.get(connection.fd) is connection:
                self._close(connection)

    # -- the leader ------------------------------------------------------------------------------------------------------------

    def _lead_until_long(self) -> Connection | list[Job] | None:
        """Leads until there is long work for this thread. None when the loop ends."""
        ready = self._ready
        connections = self._connections
        while not self._stopped:
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
                if self._attend(connection, event):
                    return connection
            except Exception:
                log.exception("a connection failed in an unforeseen way and is closed")
                if connections.get(fd) is connection:
                    self._close(connection)
        return None

    def _poll(self) -> list[Job]:
        """Polls, or gives long work that waits for a thread and can have this one."""
        longest_s = STOPPING_POLL_S if self._stopping else SWEEP_S
        if self._scheduler.waiting:
            work = self._look(longest_s)
            if work:
                return work
        elif self._kept:  # threads at long work, which want the processors
            self._ready.extend(self._epoll.poll(longest_s))
        else:
            self._ready.extend(self._spinner.poll(self._epoll.poll, longest_s))
        if self._stopping:
            self._drain()
        elif time.perf_counter() - self._swept_s > SWEEP_S:
            self._sweep()
        return []

    def _look(self, longest_s: float) -> list[Job]:
        """The same while predictions wait: what time alone changes for them ends the poll."""
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
        if fd != self._wake:
            self._admission.accept(fd)
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _attend(self, connection: Connection, event: int) -> bool:
        """Does what can be done now. True when this thread is to finish the connection without leading."""
        if connection.busy and self._is_busy(connection):
            self._attend_parked(connection, event)
            return False
        if connection.sending:
            if not self._flush(connection):
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
                    return self._let_go(connection)
                request.pace = Pace.PARK
            answer = self._service.answer(request, connection.grant)
            if answer is None:
                return False
            if not self._send(connection, answer):
                if connection.sending:
                    self._epoll.modify(connection.fd, select.EPOLLOUT)
                return False
            if not connection.buffered:
                return False
        self._ready.append((connection.fd, 0))
        return False

    def _flush(self, connection: Connection) -> bool:
        """Sends on. True when all is sent and the connection may be read from again."""
        if not connection.flush():
            self._close(connection)
            return False
        if connection.sending:
            return False
        self._epoll.modify(connection.fd, select.EPOLLIN)
        return self._sent(connection)

    def _is_busy(self, connection: Connection) -> bool:
        """Whether another thread still works for it. The one that puts it back may not have come to say so yet: looking at the epoll
        until it has would take the processor that it needs.
        """
        with self._admission.lock:
            return connection.busy

    def _attend_parked(self, connection: Connection, event: int) -> None:
        """Of a busy connection only those are at the epoll whose prediction waits, and all it tells is that the peer has gone."""
        job = connection.parked
        if job is not None and event & (select.EPOLLHUP | select.EPOLLERR) and self._scheduler.cancel(job):
            self._service.drop(job)
            self._close(connection)

    def _hand_over(self, connection: Connection, *, control: bool = False) -> bool:
        """Takes the connection out of the epoll. True when this thread is to finish it, False when another one will."""
        self._let_go(connection)
        if control:
            self._control.put(connection)
            return False
        return self._scheduler.begin(connection)

    def _let_go(self, connection: Connection) -> bool:
        self._epoll.unregister(connection.fd)
        connection.busy = True
        return True

    # -- any thread ------------------------------------------------------------------------------------------------------------

    def _finish(self, connection: Connection, *, control: bool = False, waits: bool = False) -> None:
        """Serves a connection that is not in the epoll, and puts it back. `waits`: a prediction waits even if no other does."""
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
                    self._control.put(connection)
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
        if self._connections.get(connection.fd) is connection:  # not closed
            self._put_back(connection)

    def _hear(self, connection: Connection) -> None:
        """Of a connection that was kept: its next request, if it is there."""
        if connection.receive() > 0:
            self._finish(connection, waits=True)
        else:
            self._put_back(connection)  # whose leader will hear of an end, too

    def deliver(self, connection: Connection, answer: Answer) -> None:
        """The answer of a prediction that waited, by the thread that ran it."""
        try:
            free = self._send(connection, answer)
            prompt = connection.arrived_s - connection.answered_s < 2 * KEEP_S
            connection.answered_s = time.perf_counter()
            if self._connections.get(connection.fd) is not connection:  # closed
                return
            kept = self._kept.get(threading.get_ident())
            if prompt and free and kept is not None and self._scheduler.waiting and not connection.buffered:
                kept.append(connection)
            else:
                self._put_back(connection)
        except Exception:
            log.exception("a connection failed in an unforeseen way and is closed")
            self._close(connection)

    def park(self, connection: Connection, job: Job) -> None:
        """With the scheduler's lock held, as the next two."""
        if not connection.busy:
            self._epoll.modify(connection.fd, 0)
            connection.busy = connection.watched = True
        elif job.lane.closed or job.lane.cost_s * self._scheduler.waiting > SHORT_WAIT_S:
            self._watch(connection)
        connection.parked = job

    def unpark(self, connection: Connection, job: Job) -> None:  # noqa: ARG002
        connection.parked = None
        if connection.watched:
            connection.watched = False
            self._epoll.unregister(connection.fd)

    def _watch(self, connection: Connection) -> None:
        if not connection.watched:
            connection.watched = True
            self._epoll.register(connection.fd, 0)

    def _put_back(self, connection: Connection) -> None:
        connection.seen_s = time.perf_counter()
        buffered = connection.buffered and not connection.sending
        with self._admission.lock:  # to whoever closes idle connections it is either busy or back
            self._epoll.register(connection.fd, select.EPOLLOUT if connection.sending else select.EPOLLIN)
            connection.busy = False
        if buffered:  # the epoll does not know of what was received already
            self._ready.append((connection.fd, 0))
            self._wake_up()

    def _stays(self, connection: Connection) -> bool:
        """Waits a moment for the next request of a prompt client. False when it does not come, others wait, or the client has gone."""
        if self._scheduler.crowded or self._stopping:
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

    def _send(self, connection: Connection, answer: Answer) -> bool:
        """Answers. True when the connection may be read from again; otherwise it is sending, draining, or closed."""
        if self._stopping:
            connection.closing = True
        parts, size = http.encode(answer, connection.head, keep_alive=not connection.closing)
        if not connection.send(parts, size):
            self._close(connection)
            return False
        if connection.sending:
            return False
        connection.finished()
        if connection.closing:
            connection.end_output()
            return False
        return True

    @staticmethod
    def _sent(connection: Connection) -> bool:
        """All of an answer is sent: whether the connection may be read from again."""
        connection.finished()
        if connection.closing:
            connection.end_output()
            return False
        return True

    # -- accepting and ending connections ----------------------------------------------------------------------------------------

    def _connection(self, sock: socket.socket) -> Connection:
        """Raises: OSError."""
        grant = self._grant_of(sock)
        connection = Connection(sock, grant, self._router, self._pool, self._max_body, self._memory_of(grant))
        connection.seat = Seat(self, connection)
        return connection

    def _sweep(self) -> None:
        self._swept_s = time.perf_counter()
        for kept in list(self._kept.values()):  # by threads whose runs may hang
            self._let_all_go(kept)
        for connection in list(self._connections.values()):  # whose wait was not as short as it was to be
            job = connection.parked
            if job is not None:
                self._scheduler.while_it_waits(job, functools.partial(self._watch, connection))
        self._scheduler.sweep()
        self._admission.sweep()

    def _drain(self) -> None:
        """On the way out: nobody comes in, connections that are idle or do not move are closed, and when all have gone it is done."""
        self._admission.shut()
        late = time.perf_counter() - self._stopping_s > STOP_LONGEST_S
        if self._admission.clear(STOP_PATIENCE_S, spared={fd for fd, _ in self._ready}, late=late):
            self._drained.set()
