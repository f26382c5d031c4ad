"""What repeats while a server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import OperationalError

from agent.common.systemd import notify, watchdog_interval_s
from fleet_server.errors import Unavailable

_log = logging.getLogger(__name__)


T = TypeVar("T")


async def guarded(action: Callable[[], T], what: str) -> T | None:
    """A timer's work: what it returns, or None after a failure. That is logged, and the timer's next turn tries again, because stopping the
    server would help nobody.
    """
    try:
        return await asyncio.to_thread(action)
    except Unavailable as error:
        _log.error("%s; trying again later: %s", what, error)
    except OperationalError as error:  # the database does not answer, which says nothing of this code
        _log.error("%s; trying again later: %s", what, str(error.orig).partition("\n")[0])
    except Exception:  # noqa: BLE001 - whatever it was
        _log.exception("%s; trying again later", what)
    return None


class Steps:
    """Work of small steps, in which others have their turn between two: as long as there is more to do, and then every so many seconds, or at
    once when woken.
    """

    PAUSE_S = 0.1  # longer than whoever waits to write waits between two attempts

    def __init__(self, step: Callable[[], bool], what: str, every_s: float) -> None:
        """`step` says whether there is more to do; `what` is logged when it fails."""
        self._step, self._what, self._every_s = step, what, every_s
        self._woken: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def wake(self) -> None:
        """For any thread."""
        loop, woken = self._loop, self._woken
        if loop is not None and woken is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(woken.set)

    async def run(self) -> None:
        self._loop, self._woken = asyncio.get_running_loop(), asyncio.Event()
        while True:
            self._woken.clear()
            if await guarded(self._step, self._what):
                await asyncio.sleep(self.PAUSE_S)
                continue
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._woken.wait(), self._every_s)


async def watchdog() -> None:
    """Tells systemd again and again that this process lives, where its unit asks for that."""
    interval = watchdog_interval_s()
    while interval is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
