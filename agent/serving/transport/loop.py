"""Leader/followers: a few threads take turns at one epoll.

One thread leads: it polls, reads what is there, and answers at once every request whose answer takes little. Before anything
long it makes another thread the leader and finishes that one connection alone. So short requests never meet another thread,
long ones run in parallel because engines release the interpreter's lock, and nobody waits for a slow client: sockets never
block.

The rules that keep it correct:
- Whoever has `_lead` leads; only the leader polls, accepts, and touches connections that are registered at the epoll.
- Exactly one thread owns a connection at any time: `owner` has the table of who may follow whom.
- The connection of a prediction that waits is parked: it is at the epoll only so that the leader hears when its peer has gone,
  and not even that while the wait is to be short. Whoever takes the prediction out of the queue has the connection in the same
  step.
- Control work has a thread of its own: loading a model takes no thread from predictions. Others may give it work with `defer`.

`leader` and `workers` say what the two kinds of threads do.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from agent.serving.access import Grant
from agent.serving.buffers import LARGE_BODIES_AT_ONCE, BufferPool
from agent.serving.routes import Router
from agent.serving.scheduling.scheduler import Scheduler
from agent.serving.scheduling.threads import busy_threads, loop_threads
from agent.serving.shared.memory import ClientMemory
from agent.serving.transport.admission import Admission
from agent.serving.transport.connection import Connection
from agent.serving.transport.control_thread import ControlThread
from agent.serving.transport.handovers import Epoll, Handovers
from agent.serving.transport.leader import Leader
from agent.serving.transport.replies import Replies, Stopping
from agent.serving.transport.workers import Seat, Service, Workers


class Loop:
    """Serves connections from `listeners` until `stop`. `grant_of` says what a new connection's peer may do, `memory_of` makes
    what keeps the memory it shares. `epoll` is for tests that count.
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
        epoll: Epoll | None = None,
    ) -> None:
        self._router = router
        self._grant_of = grant_of
        self._memory_of = memory_of
        self._max_body = max_body_bytes
        self._pool = pool or BufferPool(LARGE_BODIES_AT_ONCE * max_body_bytes)
        self._scheduler = scheduler or Scheduler(busy_threads(threads))
        self._epoll = epoll or select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lead = threading.Lock()
        self.stopping = Stopping()
        self._handovers = Handovers(self._epoll, self.wake_up)
        self.admission = Admission(listeners, self._epoll, self._handovers, self._connection, max_connections)
        replies = Replies(self.admission.close, self.stopping)
        self._control = ControlThread(lambda connection: self.admission.safely(self._finish_control, connection))
        self._workers = Workers(
            service, self._scheduler, self.admission, self._handovers, replies, self.stopping, self._control.put
        )
        self._finish_control = functools.partial(self._workers.finish, control=True)
        self.leader = Leader(
            service, self._scheduler, self._epoll, self.admission, self._handovers, replies, self._workers, self.stopping,
            self._wake, self._drain_wake_ups, self._control.put,
        )  # fmt: skip
        self.defer = self._control.defer
        self._threads = [threading.Thread(target=self._serve, name=f"serve-{n}") for n in range(loop_threads(threads))]
        self._threads.append(threading.Thread(target=self._control.work, name="control"))

    def start(self) -> None:
        self.admission.unlock()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._scheduler.wake = self.wake_up
        for thread in self._threads:
            thread.start()

    def stop(self, grace_s: float) -> bool:
        """Accepts nothing more, finishes what was asked, then ends all threads. False when `grace_s` was not enough for all of
        it.
        """
        self.stopping.begin()
        self.wake_up()
        clean = self.stopping.drained.wait(grace_s)
        self.stopping.over = True
        self.wake_up()
        self._control.end()
        deadline = time.monotonic() + grace_s + 1
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            clean = clean and not thread.is_alive()
        if clean:
            self._scheduler.wake = lambda: None
            for connection in list(self.admission.open.values()):
                self.admission.close(connection)
            self._epoll.close()
            os.close(self._wake)
        return clean

    def stuck(self, patience_s: float) -> bool:
        """Whether requests wait and no thread has come free for so long: engines hang, and nothing in this process can end
        them.
        """
        return self._scheduler.stuck(patience_s)

    def wake_up(self) -> None:
        """Ends the poll that goes on. Any thread may call it."""
        os.eventfd_write(self._wake, 1)

    def _drain_wake_ups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _serve(self) -> None:
        while True:
            with self._lead:
                work = self.leader.lead()
            if work is None:
                return
            self._workers.work(work)

    def _connection(self, sock: socket.socket) -> Connection:
        """Raises: OSError."""
        grant = self._grant_of(sock)
        connection = Connection(sock, grant, self._router, self._pool, self._max_body, self._memory_of(grant))
        connection.seat = Seat(self._workers, self._handovers, connection)
        return connection
