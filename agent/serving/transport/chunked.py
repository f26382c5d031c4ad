"""A chunked body (RFC 9112, section 7.1) as it arrives. It knows exactly where the body ends, so that a request behind it is
not lost.
"""

from __future__ import annotations

from agent.serving.buffers import BufferPool
from agent.serving.transport.http import BadRequest

MAX_LINE_BYTES = 1024  # a chunk's size line with its extensions, and each trailer line


class ChunkedBody:
    """Collects the chunks. `done` once the last one and the trailers were read; `body` has the bytes.

    What it holds is charged to `pool`, in sum `charged` bytes: refund them when the body goes.
    """

    def __init__(self, limit_bytes: int, pool: BufferPool) -> None:
        self.body = bytearray()
        self.done = False
        self.charged = 0
        self._limit = limit_bytes
        self._pool = pool
        self._left = 0  # bytes of the current chunk that are still to come, with the line end after it
        self._trailers = False

    def feed(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes of `data` belong to this body. What is left over is the beginning of a line or the next request.

        Raises: BadRequest (400 malformed, 413 too large), Exhausted.
        """
        view, at = memoryview(data), 0
        while not self.done:
            if self._left:
                taken = self._take(view[at:])
                if not taken:
                    return at
                at += taken
                continue
            line = _line(view, at)
            if line is None:
                return at
            at += len(line) + 2
            self._read_line(line)
        return at

    def _take(self, data: memoryview) -> int:
        """Bytes of the current chunk; its line end is taken whole or not at all."""
        content = self._left - 2
        if content > 0:
            piece = data[:content]
            self.body += piece
            self._left -= len(piece)
            return len(piece)
        if len(data) < 2:
            return 0
        if bytes(data[:2]) != b"\r\n":
            raise BadRequest(400, "a chunk is longer than its size says")
        self._left = 0
        return 2

    def _read_line(self, line: bytes) -> None:
        if self._trailers:
            self.done = not line
            return
        digits = line.split(b";", 1)[0].strip(b" \t")
        try:
            size = int(digits, 16) if digits.isalnum() and len(digits) <= 16 else -1
        except ValueError:
            size = -1
        if size < 0:
            raise BadRequest(400, "a chunk does not begin with its size in hexadecimal digits")
        if len(self.body) + size > self._limit:
            raise BadRequest(413, f"the body is larger than the {self._limit} bytes allowed (serve.max_body_bytes)")
        if size == 0:
            self._trailers = True
        else:
            self._pool.charge(size)
            self.charged += size
            self._left = size + 2


def _line(view: memoryview, at: int) -> bytes | None:
    window = bytes(view[at : at + MAX_LINE_BYTES + 2])
    end = window.find(b"\r\n")
    if end >= 0:
        return window[:end]
    if len(window) >= MAX_LINE_BYTES + 2:
        raise BadRequest(400, f"a line of the chunked body is longer than {MAX_LINE_BYTES} bytes")
    return None
