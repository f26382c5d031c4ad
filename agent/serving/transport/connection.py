"""One client's connection: bytes in, complete requests out; answers in, bytes out. Never blocks.

A connection belongs to one thread at a time. Its buffer holds what arrived and was not used yet, from `_start` to `_end`; a
body that does not fit goes straight into a buffer of its own. A request's body stays valid until `finished` is called.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import time
from collections.abc import Sequence

from agent.serving.access import Grant
from agent.serving.allowance import Allowance
from agent.serving.answers import Buffer
from agent.serving.buffers import ALIGNMENT, TOO_MANY, BufferPool, Bytes, Exhausted
from agent.serving.routes import Match, Pace, Request, Router
from agent.serving.scheduling.lanes import Caller, Job
from agent.serving.shared.memory import ClientMemory
from agent.serving.transport import http
from agent.serving.transport.chunked import ChunkedBody
from agent.serving.transport.http import MAX_HEAD_BYTES, BadRequest, Head, HeadReader
from agent.serving.transport.owner import LEADER, NOBODY, Move, Owner, after

BUFFER_BYTES = MAX_HEAD_BYTES + 4096
JOIN_BYTES = 16 * 1024  # copying an answer up to here into one buffer is cheaper than sending its parts
END_OF_HEAD = b"\r\n\r\n"
CR = 0x0D
MAX_REPEATED_BYTES = 2048  # of the JSON before tensors that is compared with that of the last request
_RUN = Pace.RUN
NOTHING = -1  # what `receive` gives when it would block
END = 0  # and when the peer closed, or the connection broke


class Connection:
    """One client. `sock` is non-blocking. `grant` is what the peer may do; `memory` what it shares, None where it cannot."""

    def __init__(
        self,
        sock: socket.socket,
        grant: Grant,
        router: Router,
        pool: BufferPool,
        max_body_bytes: int,
        memory: ClientMemory | None = None,
    ) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.grant = grant
        self.seen_s = self.arrived_s = self._received_s = time.perf_counter()
        self.owner: Owner = NOBODY
        self.request: Request | None = None  # complete and waiting for its thread
        self.seat: Caller | None = None  # the loop's: where its predictions that wait are answered
        self.job: Job | None = None  # such a prediction, while the queue has the connection
        self.answered_s = 0.0  # when a thread other than the leader last answered it
        self.closing = False  # no further request is read; only what was asked is answered
        self.draining = False  # the answer is sent: what still comes is thrown away so that the peer can read it
        self._router = router
        self._pool = pool
        self._max_body = max_body_bytes
        self._memory = memory
        self._allowance = Allowance(pool)  # of the request under way
        self._buffer = bytearray(BUFFER_BYTES + ALIGNMENT)
        self._view = memoryview(self._buffer)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        # Where the next request is to begin so that its tensors are aligned, if its head is that of the last one.
        self._empty = 0
        self._room = self._view
        self._start = self._end = 0
        self._memo: Head | None = None  # the last head: the next one mostly has the same bytes
        self._last: Request | None = None  # the last request, when only the tensors of the next one may differ
        self._last_bytes = b""  # of it, up to its tensors
        self._last_start = -1  # where it began; -1: nowhere
        self._last_size = 0
        self.head: Head | None = None  # of the request under way, until `finished`
        self._reader: HeadReader | None = None
        self._chunks: ChunkedBody | None = None
        self._large: Bytes | None = None
        self._body = memoryview(b"")
        self._body_have = 0
        self.sending: list[memoryview] = []  # parts of an answer that wait for the peer to read

    # -- in ----------------------------------------------------------------------------------------------------------------

    @property
    def missing_bytes(self) -> int:
        """How much is still to come of a body that got a buffer of its own."""
        return len(self._body) - self._body_have if self._large is not None else 0

    @property
    def buffered(self) -> bool:
        """Whether bytes of a further request are here already."""
        return self._end > self._start

    @property
    def idle(self) -> bool:
        """Whether it is between two requests, with nothing of either under way."""
        return self.owner is LEADER and self.unoccupied

    @property
    def fresh(self) -> bool:
        """Whether it has asked for nothing yet: whoever connects is about to."""
        return self._memo is None

    @property
    def unoccupied(self) -> bool:
        return not (self._end > self._start or self.head or self.sending or self.draining)

    def move(self, move: Move) -> None:
        """Gives it to its next owner. Called by the owner, or by who becomes it in this step.  Raises: IllegalMove."""
        self.owner = after(self.owner, move)

    def receive(self) -> int:
        """Reads once what is there, into the place where it belongs. How many bytes, or NOTHING, or END."""
        if self._large is not None:
            room = self._body[self._body_have :]
        elif self._end == self._empty:
            room = self._room
        else:
            room = self._view[self._end :]
            if not room:  # full of requests that wait for their turn
                return NOTHING
        try:
            if self._memory is not None and self._memory.attentive and self._large is None:
                count = self._memory.receive(self.sock, room)
            else:
                count = self.sock.recv_into(room)  # the kernel closes descriptors that come with these bytes
        except BlockingIOError:
            return NOTHING
        except OSError:
            return END
        self.seen_s = self._received_s = time.perf_counter()
        if self._large is not None:
            self._body_have += count
            return count
        if self._end == self._start and self.head is None:
            self.arrived_s = self.seen_s
        self._end += count
        return count

    def discard(self) -> bool:
        """Throws away what arrived. False once the peer has closed."""
        try:
            return self.sock.recv_into(self._view) > 0
        except BlockingIOError:
            return True
        except OSError:
            return False

    def next_request(self) -> Request | None:
        """The next complete request, None while there is none. Call `finished` before asking for another one."""
        if self.closing:
            return None
        begin = self._start
        if (
            begin == self._last_start
            and self._end - begin >= self._last_size
            and self.head is None
            and self._buffer.startswith(self._last_bytes, begin)
        ):
            return self._repeat()
        try:
            head = self.head or self._next_head()
            if head is None:
                return None
            body = self._next_body(head)
        except BadRequest as error:
            self.closing = True
            return Request(Match(None, refusal=error.refusal), memoryview(b""), None, self.arrived_s)
        if body is None:
            return None
        if not head.keep_alive:
            self.closing = True
        request = Request(head.match, body, head.header_length, self.arrived_s, self._memory, head.coding)
        request.allowance = self._allowance
        self._allowance.body_bytes = len(body)
        if head.chunked:
            request.strays = True
        if head.trace:
            request.trace = head.trace
        if begin == self._empty and head.header_length and self._start == begin + head.size + head.length:
            self._remember(request, head, begin)
        return request

    def _remember(self, request: Request, head: Head, begin: int) -> None:
        """The next request may be the same but for its tensors, and then comes to lie in the same place."""
        if self.closing or head.coding is not None or not 0 < (head.header_length or 0) <= min(MAX_REPEATED_BYTES, head.length):
            return
        self._last = request
        self._last_start, self._last_size = begin, self._start - begin
        self._last_bytes = bytes(self._view[begin : begin + head.size + (head.header_length or 0)])

    def _repeat(self) -> Request:
        """The last request once more, with the tensors that lie there now."""
        assert self._last is not None
        self._reader = None  # it may have been fed the first bytes
        self._start += self._last_size
        self.head = self._memo
        last = self._last
        last.arrived_s, last.pace = self.arrived_s, _RUN
        return last

    def _next_head(self) -> Head | None:
        """The head at the start of the buffer once it is complete; it is then `_head`.  Raises: BadRequest."""
        start, end = self._start, self._end
        memo = self._memo
        if memo is not None and end - start >= memo.size and self._buffer.startswith(memo.raw, start):
            head = memo
            self._reader = None  # it may have been fed the first bytes
        else:
            found = self._read_head()
            if found is None:
                return None
            head = self._memo = found
            self._last_start = -1
            self._empty = -(self._base + head.size + (head.header_length or 0)) % ALIGNMENT
            self._room = self._view[self._empty :]
        self._start += head.size
        self.head = head
        if head.length or head.chunked:
            self._begin_body(head)
        return head

    def _read_head(self) -> Head | None:
        while self._reader is None and self._buffer.startswith(b"\r\n", self._start, self._end):
            self._start += 2  # RFC 9112, section 2.2: empty lines before a request are to be ignored
        left = self._end - self._start
        if left == 0:
            self._start = self._end = self._empty
            return None
        if left == 1 and self._reader is None and self._buffer[self._start] == CR:
            self._move(0)  # half an empty line is not the beginning of a head
            return None
        if self._reader is None:
            self._reader = HeadReader()
        fed = self._start + self._reader.fed
        at = self._buffer.find(END_OF_HEAD, max(self._start, fed - len(END_OF_HEAD) + 1), self._end)
        stop = self._end if at < 0 else at + len(END_OF_HEAD)
        if fed < stop:
            self._reader.feed(self._view[fed:stop])
        if stop - self._start > MAX_HEAD_BYTES:
            raise BadRequest(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")
        if at < 0:
            self._move(0)
            return None
        head = self._reader.finish(bytes(self._view[self._start : stop]), self._router, self.grant.web)
        self._reader = None
        return head

    def _begin_body(self, head: Head) -> None:
        """Makes room for the body, and tells a client that waits for it to go on.  Raises: BadRequest."""
        if head.length > self._max_body:
            raise BadRequest(
                413, f"the body has {head.length} bytes, larger than the {self._max_body} bytes allowed (serve.max_body_bytes)"
            )
        if head.expects_continue and self._start == self._end:
            with contextlib.suppress(OSError):  # a peer that cannot take 25 bytes does not wait for them
                self.sock.send(http.CONTINUE)
        if head.chunked:
            self._chunks = ChunkedBody(self._max_body, self._pool)
        elif head.length > BUFFER_BYTES - self._start:
            if head.length <= BUFFER_BYTES:
                self._move(-(self._base + (head.header_length or 0)) % ALIGNMENT)
            else:
                self._begin_large(head)

    def _begin_large(self, head: Head) -> None:
        """A buffer of exactly this body, placed so that the tensors after its JSON are aligned."""
        try:
            self._large = self._pool.lend(head.length + ALIGNMENT)
        except Exhausted:
            raise BadRequest(503, TOO_MANY) from None
        offset = -(head.header_length or 0) % ALIGNMENT
        self._body = self._large.data[offset : offset + head.length]
        have = self._end - self._start
        self._body[:have] = self._view[self._start : self._end]
        self._body_have = have
        self._start = self._end = 0

    def _next_body(self, head: Head) -> memoryview | None:
        if head.chunked:
            return self._next_chunks()
        if self._large is not None:
            return self._body if self._body_have == len(self._body) else None
        if self._end - self._start < head.length:
            return None
        if (
            head.length
            and head.header_length is not None
            and (stray := (self._base + self._start + head.header_length) % ALIGNMENT)
        ):
            self._move(self._start - stray)
        body = self._view[self._start : self._start + head.length]
        self._start += head.length
        return body

    def _next_chunks(self) -> memoryview | None:
        assert self._chunks is not None
        try:
            self._start += self._chunks.feed(self._view[self._start : self._end])
        except Exhausted:
            raise BadRequest(503, TOO_MANY) from None
        if not self._chunks.done:
            self._move(0)
            return None
        return memoryview(self._chunks.body)

    def _move(self, to: int) -> None:
        """Moves what is unused to where it is to begin, so that there is room behind it."""
        if self._start == to:
            return
        count = self._end - self._start
        self._view[to : to + count] = self._view[self._start : self._end]
        self._start, self._end = to, to + count

    def finished(self) -> None:
        """The request was answered and its answer sent or dropped: its body may go."""
        self.head = None
        if self._chunks is not None:
            self._pool.refund(self._chunks.charged)
            self._chunks = None
        if self._large is not None:
            self._body = memoryview(b"")
            large, self._large = self._large, None
            self._pool.give_back(large)
        if self._allowance.charged:
            self._allowance.end()
        if self._memory is not None and self._memory.attentive:
            self._memory.request_ended(nothing_buffered=self._start == self._end)
        if self._start == self._end:
            self._start = self._end = self._empty
        else:
            # The request that was just answered was not complete before that, so the next came with it.
            self.arrived_s = self._received_s

    # -- out ---------------------------------------------------------------------------------------------------------------

    def send(self, parts: Sequence[Buffer], size: int) -> bool:
        """Sends as much as the peer takes; the rest waits for `flush`. False when the connection is broken."""
        try:
            if size <= JOIN_BYTES:
                parts = (b"".join(parts),)
                sent = self.sock.send(parts[0])
            else:
                sent = self.sock.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent < size:
            self._keep(parts, sent)
        return True

    def _keep(self, parts: Sequence[Buffer], sent: int) -> None:
        for part in parts:
            view = memoryview(part)
            if view.nbytes == 0:
                continue
            view = view.cast("B")
            if sent >= len(view):
                sent -= len(view)
                continue
            self.sending.append(view[sent:])
            sent = 0

    def flush(self) -> bool:
        """Sends what the peer did not take before. False when the connection is broken."""
        self.seen_s = time.perf_counter()
        while self.sending:
            try:
                sent = self.sock.send(self.sending[0])
            except BlockingIOError:
                return True
            except OSError:
                return False
            view = self.sending.pop(0)
            if sent < len(view):
                self.sending.insert(0, view[sent:])
        return True

    def end_output(self) -> None:
        """No more will be sent; the peer reads the answer to its end."""
        self.draining = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.move(Move.CLOSE)
        self.sending.clear()
        self.finished()
        self.seat = self.request = self._last = None  # which refer to it: its buffer goes now, not with the next collection
        self._last_start = -1
        if self._memory is not None:
            self._memory.close()
        self.sock.close()
