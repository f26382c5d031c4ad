"""Who comes in, and who has to go: accepting connections, and ending those that are idle, stalled or too many.

`open` holds the connections by descriptor. Only the thread that polls calls what is here, but for `close`, which is for
whichever thread owns a connection.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import time
from collections.abc import Callable, Container, Sequence

from agent.serving.answers import Refusal, refusal_answer
from agent.serving.transport import http
from agent.serving.transport.connection import Connection
from agent.serving.transport.handovers import Epoll, Handovers
from agent.serving.transport.owner import LEADER, THREAD

log = logging.getLogger(__name__)

STALLED_S = 60.0  # a request or an answer that makes no progress for this long ends its connection
LINGER_S = 5.0  # how long a connection that is to be closed is read from, so that its peer can read the answer
ACCEPTS_IN_A_ROW = 64


class Admission:
    """The open connections. `make` gives the connection of a new, non-blocking socket; it may raise OSError when its peer
    cannot be known.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        epoll: Epoll,
        handovers: Handovers,
        make: Callable[[socket.socket], Connection],
        max_connections: int,
    ) -> None:
        self.open: dict[int, Connection] = {}
        self._handovers = handovers
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._epoll = epoll
        self._make = make
        self._max_connections = max_connections

    def unlock(self) -> None:
        for fd, listener in self._listeners.items():
            listener.setblocking(False)
            self._epoll.register(fd, select.EPOLLIN)

    def shut(self) -> None:
        """Stops listening: nobody comes in any more."""
        for fd in list(self._listeners):
            self._epoll.unregister(fd)
            del self._listeners[fd]

    def accept(self, fd: int) -> None:
        """Lets in who waits at the listener `fd`; nothing when it is none."""
        listener = self._listeners.get(fd)
        if listener is None:
            return
        for _ in range(ACCEPTS_IN_A_ROW):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._evict():
                    continue
                log.error("cannot accept a connection: %s", error)  # noqa: TRY400 - the loop goes on, a trace says no more
                return
            self.admit(sock)

    def admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            connection = self._make(sock)
        except OSError as error:
            log.warning("a connection's peer cannot be known, it is closed: %s", error)
            sock.close()
            return
        if len(self.open) >= self._max_connections and not self._evict():
            refusal = Refusal(503, f"all {self._max_connections} connections are in use (serve.max_connections)")
            parts, _ = http.encode(refusal_answer(refusal), None, keep_alive=False)
            with contextlib.suppress(OSError):
                sock.sendmsg(parts)
            connection.close()
            return
        self.open[connection.fd] = connection
        self._handovers.admit(connection)

    def close(self, connection: Connection) -> None:
        if self.open.get(connection.fd) is connection:  # not yet closed, and its number another one's
            del self.open[connection.fd]  # before the number can be given to a new connection
        connection.close()  # which also takes it out of the epoll

    def close_own(self, connection: Connection) -> None:
        """Closes a connection after a fault of ours. One that another thread owns by now is left to that thread."""
        if connection.owner is LEADER or connection.owner is THREAD:
            self.close(connection)

    def safely(self, act: Callable[[Connection], None], connection: Connection) -> None:
        """Calls `act`. A fault of ours, or memory that is not there, ends this connection and not the thread."""
        try:
            act(connection)
        except Exception:
            log.exception("a connection failed in an unforeseen way and is closed")
            self.close_own(connection)

    def _evict(self) -> bool:
        """Closes the connection that has been between two requests for longest. False when there is none."""
        with self._handovers.lock:
            idle = [c for c in list(self.open.values()) if c.idle]
            if not idle:
                return False
            self.close(min(idle, key=lambda c: c.seen_s))
            return True

    def sweep(self) -> None:
        """Ends connections that stalled within a request or an answer, and those that were only waited for to be read."""
        now = time.perf_counter()
        with self._handovers.lock:
            for connection in list(self.open.values()):
                if connection.owner is not LEADER or connection.idle:
                    continue
                if now - connection.seen_s > (LINGER_S if connection.draining else STALLED_S):
                    self.close(connection)

    def clear(self, patience_s: float, spared: Container[int], *, late: bool) -> bool:
        """Ends those between two requests that are not `spared` (of which something was heard and not yet read), and whoever
        was not heard of for `patience_s`; when it is `late`, also those whose requests are still coming. True when the others
        only wait for their peers to read.
        """
        stalled = time.perf_counter() - patience_s
        with self._handovers.lock:
            for connection in list(self.open.values()):
                idle = connection.idle and not connection.fresh and connection.fd not in spared
                own = connection.owner is LEADER
                coming = own and not (connection.sending or connection.draining)
                if idle or (own and connection.seen_s < stalled) or (late and coming):
                    self.close(connection)
        return all(c.draining and c.owner is LEADER for c in list(self.open.values()))
