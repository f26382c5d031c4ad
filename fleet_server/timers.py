"""What repeats while a server runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sqlalchemy.exc import OperationalError

from agent.common.systemd import notify, watchdog_interval_s
from fleet_server.errors import Unavailable

_log = logging.getLogger(__name__)


async def guarded(action: Callable[[], object], what: str) -> None:
    """A timer's work: a failure is logged, and the timer's next turn tries again, because stopping the server would help
    nobody.
    """
    try:
        await asyncio.to_thread(action)
    except Unavailable as error:
        _log.error("%s; trying again later: %s", what, error)
    except OperationalError as error:  # the database does not answer, which says nothing of this code
        _log.error("%s; trying again later: %s", what, str(error.orig).partition("\n")[0])
    except Exception:  # noqa: BLE001 - whatever it was
        _log.exception("%s; trying again later", what)


async def watchdog() -> None:
    """Tells systemd again and again that this process lives, where its unit asks for that."""
    interval = watchdog_interval_s()
    while interval is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
