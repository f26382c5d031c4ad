"""Whoever wants to see each request: an access log, traces. Nobody wants it by default, and then nothing of this is called.

An observer is told of a request once, with its answer, when that is ready to be sent. It must not wait for anything: the thread
that tells it may be the one that polls.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from agent.serving.access import Grant
from agent.serving.answers import Answer
from agent.serving.dataplane import Dataplane
from agent.serving.routes import Kind, Request
from agent.serving.scheduling.lanes import Caller, Job
from agent.serving.service import Service

MAX_ID_JSON_BYTES = 64 * 1024  # a request's id is looked for in JSON up to this


class Seen:
    """One request and its answer. Times are perf_counters."""

    __slots__ = ("answer", "answered_s", "bytes_in", "id", "request", "who")

    def __init__(self, request: Request, who: str, answer: Answer) -> None:
        self.request = request
        self.who = who
        self.answer = answer
        self.answered_s = time.perf_counter()
        self.bytes_in = len(request.body)
        self.id = _id_of(request)

    @property
    def route(self) -> str:
        """Method and pattern; a path that leads nowhere has none."""
        route = self.request.match.route
        return f"{route.method} {route.pattern}" if route is not None else ""

    @property
    def bytes_out(self) -> int:
        return sum(memoryview(part).nbytes for part in self.answer.parts)


class Observer(Protocol):
    def see(self, seen: Seen) -> None:
        """Never raises, never waits. Any thread calls it; the request's body is gone afterwards."""

    def close(self) -> None:
        """What was seen is to be on its way before this returns."""


class ObservedService(Service):
    """Tells its observers of every answer."""

    def __init__(self, dataplane: Dataplane, max_body_bytes: int, observers: Sequence[Observer]) -> None:
        super().__init__(dataplane, max_body_bytes)
        self._observers = observers

    def answer(self, request: Request, grant: Grant) -> Answer | None:
        seat = request.seat
        if seat is not None:
            request.seat = _ObservedSeat(seat, self, request, grant)
        answer = super().answer(request, grant)
        if answer is not None:
            self.tell(request, grant, answer)
            request.seat = seat  # the other one refers to the request, whose body would be kept until the next collection
        return answer

    def tell(self, request: Request, grant: Grant, answer: Answer) -> None:
        seen = Seen(request, grant.who, answer)
        for observer in self._observers:
            observer.see(seen)


class _ObservedSeat:
    """Stands for the caller of a prediction that waits, to see its answer too."""

    def __init__(self, caller: Caller, service: ObservedService, request: Request, grant: Grant) -> None:
        self._caller = caller
        self._service = service
        self._request = request
        self._grant = grant

    @property
    def has_thread(self) -> bool:
        return self._caller.has_thread

    def parked(self, job: Job) -> None:
        self._request.seat = self._caller  # as above; from now on the job refers to this one
        self._caller.parked(job)

    def unparked(self, job: Job) -> None:
        self._caller.unparked(job)

    def granted(self, work: list[Job]) -> None:
        self._caller.granted(work)

    def deliver(self, answer: Any) -> None:
        if answer is not None:
            self._service.tell(self._request, self._grant, answer)
        self._caller.deliver(answer)


class _WithId(msgspec.Struct):
    id: str = ""


_ids = msgspec.json.Decoder(_WithId)


def _id_of(request: Request) -> str:
    """The id that a prediction was given by its caller; empty when it has none, or is no such request."""
    route = request.match.route
    size = len(request.body) if request.header_length is None else request.header_length
    if route is None or route.kind is not Kind.PREDICT or not 0 < size <= MAX_ID_JSON_BYTES:
        return ""
    try:
        return _ids.decode(request.body[:size]).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
