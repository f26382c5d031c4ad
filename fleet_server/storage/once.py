"""Requests that are done once, however often they are sent: each has a key, which is stored with the first thing that it changes.

Who sends the same request again with the same key, because it got no answer, is told that it was done (Conflict `already_done`), and
nothing is done. Answers are not kept: some hold what is shown only once.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from contextvars import ContextVar

from sqlalchemy import delete, event
from sqlalchemy.orm import Session

from fleet_server.errors import Conflict, Invalid
from fleet_server.storage.models import DoneRequest

KEPT_S = 86400.0
MAX_KEY_CHARS = 256

_now: ContextVar[_Request | None] = ContextVar("request", default=None)


class _Request:
    def __init__(self, digest: str) -> None:
        self.digest, self.stored = digest, False


@contextlib.contextmanager
def only(key: str | None, whose: str) -> Iterator[None]:
    """What is changed in the block is changed once for this key of that caller.  Raises: Invalid."""
    if key is None:
        yield
        return
    if not 0 < len(key) <= MAX_KEY_CHARS:
        raise Invalid(f"an Idempotency-Key has 1 to {MAX_KEY_CHARS} characters")
    token = _now.set(_Request(hashlib.sha256(f"{whose}\0{key}".encode()).hexdigest()))
    try:
        yield
    finally:
        _now.reset(token)


def check(session: Session) -> None:
    """For the beginning of each writing transaction.  Raises: Conflict."""
    request = _now.get()
    if request is None or request.stored:
        return
    if session.get(DoneRequest, request.digest) is not None:
        raise Conflict(
            "this change was made already, and its answer was lost or given before (the same Idempotency-Key): see what is there; with another "
            "key it is made once more",
            code="already_done",
        )
    session.add(DoneRequest(key=request.digest, at=time.time()))
    session.flush()

    def stored(_session: Session) -> None:
        request.stored = True

    event.listen(session, "after_commit", stored, once=True)


def forget(session: Session, now: float) -> None:
    """Forgets requests that nobody sends again any more."""
    session.execute(delete(DoneRequest).where(DoneRequest.at < now - KEPT_S))
