"""What a request may become. A body is charged to the pool by its bytes; what is made of it can be many times as much."""

from __future__ import annotations

from agent.serving.answers import Refusal
from agent.serving.buffers import TOO_MANY, BufferPool, Exhausted

RATIO = 3  # of what is made of a body to its bytes: with the body itself that is four times as much
SMALL_BYTES = 16 * 1024 * 1024  # what may be made of any body, however small: many short texts take more than they say
ELEMENT_BYTES = (
    144  # of a BYTES element besides its text: our object and its place in the array, the runtime's and the engine's own
)


class Allowance:
    """What one request may become, or the requests of one connection, one after another. `body_bytes` is the size of its body.

    What was reserved is charged to `pool` until `end`. Without a pool nothing is charged, and the bound is the same.
    """

    __slots__ = ("_pool", "body_bytes", "charged", "made")

    def __init__(self, pool: BufferPool | None = None, body_bytes: int = 0) -> None:
        self._pool = pool
        self.body_bytes = body_bytes
        self.made = 0  # what tensors take
        self.charged = 0  # and with it what else was charged

    def reserve(self, size: int, what: str) -> None:
        """Reserves `size` bytes more, which are about to be made, of `what`.  Raises: Refusal (413 too much for its body, 503
        others have so much).
        """
        limit = max(RATIO * self.body_bytes, SMALL_BYTES)
        if self.made + size > limit:
            raise Refusal(
                413,
                f"{what} would take {self.made + size} bytes of memory, of which {limit} are allowed for a body of {self.body_bytes}: "
                "send less at once, and numbers as binary data",
            )
        self.charge(size)
        self.made += size

    def elements(self, count: int, size: int, what: str) -> None:
        """Reserves what `count` BYTES elements of `size` bytes in sum take.  Raises: Refusal (413, 503)."""
        self.reserve(count * ELEMENT_BYTES + size, f"{what} with {count} BYTES elements")

    def charge(self, size: int) -> None:
        """Charges `size` bytes to the pool, of something that has a bound of its own.  Raises: Refusal (503)."""
        if self._pool is not None:
            try:
                self._pool.charge(size)
            except Exhausted:
                raise Refusal(503, TOO_MANY, headers=((b"retry-after", b"1"),)) from None
        self.charged += size

    def again(self) -> None:
        """Refunds the tensors: they are gone and are made anew, because another version answers."""
        self._refund(self.made)

    def end(self) -> None:
        """Refunds everything: all that was made is gone, or about to go."""
        self._refund(self.charged)

    def _refund(self, size: int) -> None:
        self.made = 0
        self.charged -= size
        if size and self._pool is not None:
            self._pool.refund(size)
