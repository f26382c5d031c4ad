"""What a crowded listener says: come again, and when. The more were sent away lately, the later, so that they come spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from fleet_server.api import http

FIRST_S, LONGEST_S = 5, 300
WINDOW_S = 30.0
PER_S = 50.0
"""How many are asked to come again in each second. A look costs some milliseconds of one processor."""


class Busy:
    """An ASGI application that answers 503 with Retry-After, and ends the connection."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lately, self._since = 0.0, 0.0

    def retry_after_s(self) -> int:
        """For how long the one who is sent away now should stay away."""
        now = self._clock()
        self._lately = self._lately * math.exp((self._since - now) / WINDOW_S) + 1
        self._since = now
        return min(LONGEST_S, FIRST_S + int(self._lately / PER_S))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wait_s = self.retry_after_s()
        response = http.answer(503, f"too many are asking now; come again in {wait_s} s", "busy")
        response.headers["Retry-After"] = str(wait_s)
        response.headers["Connection"] = "close"
        await response(scope, receive, send)
