"""How connections go from one owner to the next, and what the epoll knows of them meanwhile."""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from agent.serving.scheduling.lanes import Job
from agent.serving.transport.connection import Connection
from agent.serving.transport.owner import HEARD_QUEUE, LEADER, QUEUE, Move


class Epoll(Protocol):
    """What is used of `select.epoll`."""

    def register(self, fd: int, events: int) -> None: ...

    def modify(self, fd: int, events: int) -> None: ...

    def unregister(self, fd: int) -> None: ...

    def poll(self, timeout: float) -> list[tuple[int, int]]: ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class Handovers:
    """`ready` are descriptors, with their events, that the leader attends next; `wake` gets it out of its poll.

    `lock` is held while a connection goes back to the leader, so that it is either another's or back at the epoll to whoever
    looks for one to close.
    """

    def __init__(self, epoll: Epoll, wake: Callable[[], None]) -> None:
        self._epoll = epoll
        self._wake = wake
        self.ready: deque[tuple[int, int]] = deque()
        self.lock = threading.Lock()

    def admit(self, connection: Connection) -> None:
        """A new connection becomes the leader's."""
        connection.move(Move.ADMIT)
        self._epoll.register(connection.fd, select.EPOLLIN)

    def hand_over(self, connection: Connection) -> None:
        """A connection of the leader becomes a thread's."""
        self._epoll.unregister(connection.fd)
        connection.move(Move.HAND_OVER)

    def put_back(self, connection: Connection) -> None:
        """A connection of a thread becomes the leader's, who reads from it again."""
        connection.seen_s = time.perf_counter()
        buffered = connection.buffered and not connection.sending
        with self.lock:
            self._epoll.register(connection.fd, select.EPOLLOUT if connection.sending else select.EPOLLIN)
            connection.move(Move.PUT_BACK)
        if buffered:  # the epoll does not know of what was received already
            self.ready.append((connection.fd, 0))
            self._wake()

    def park(self, connection: Connection, job: Job, *, may_last: bool) -> None:
        """The connection's prediction waits; if that `may_last`, the leader is to hear when the peer goes. With the scheduler's
        lock held.
        """
        if connection.owner is LEADER:
            self._epoll.modify(connection.fd, 0)
        connection.move(Move.PARK)
        connection.job = job
        if may_last:
            self.hear(connection)

    def hear(self, connection: Connection) -> None:
        """From now on the leader hears when the peer of a connection goes whose prediction waits. With the scheduler's lock
        held.
        """
        if connection.owner is QUEUE:
            connection.move(Move.HEAR)
            self._epoll.register(connection.fd, 0)

    def start(self, connection: Connection, job: Job) -> None:  # noqa: ARG002 - it is the one that waits
        """The prediction waits no more: who took it out of the queue has the connection. With the scheduler's lock held."""
        connection.job = None
        heard = connection.owner is HEARD_QUEUE
        connection.move(Move.START)
        if heard:
            self._epoll.unregister(connection.fd)

    def is_leaders(self, connection: Connection) -> bool:
        """Whether no other thread works for it. The one that puts it back may not have come to say so yet: asking the epoll
        until it has would take the processor that it needs.
        """
        if connection.owner is LEADER:
            return True
        with self.lock:
            return connection.owner is LEADER

    def listen_for(self, connection: Connection, events: int) -> None:
        """Says what the leader wants to hear of a connection of its own."""
        self._epoll.modify(connection.fd, events)
