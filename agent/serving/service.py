"""From a complete request to its answer: access, routing, errors. The seam between the transport and everything behind it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from agent.serving import compression
from agent.serving.access import Grant
from agent.serving.answers import Answer, Refusal, refusal_answer
from agent.serving.dataplane import Dataplane
from agent.serving.routes import Kind, Request
from agent.serving.scheduling.lanes import Job

log = logging.getLogger(__name__)

_QUICK, _PREDICT = Kind.QUICK, Kind.PREDICT  # looking a member up at its class takes longer than the comparison


class Service:
    """Any number of threads may call it."""

    def __init__(self, dataplane: Dataplane, max_body_bytes: int) -> None:
        self._dataplane = dataplane
        self._max_body = max_body_bytes
        # Runs predictions that waited, for a thread that then asks the scheduler for more.  Never raises.
        self.run: Callable[[list[Job]], None] = functools.partial(dataplane.runner.run, goes_on=True)

    def kind(self, request: Request, grant: Grant) -> Kind:
        """QUICK when the answer is there at once, whatever it will be; PREDICT when it takes long; CONTROL for the control
        thread.
        """
        match = request.match
        route = match.route
        if request.coding is not None and route is not None and grant.access >= route.access:
            return Kind.CONTROL if route.kind is Kind.CONTROL else Kind.PREDICT  # compressing takes long, both ways
        if route is None or route.kind is _QUICK or grant.access < route.access:
            return _QUICK
        kind = route.kind
        return _QUICK if kind is _PREDICT and self._dataplane.is_cheap(request) else kind

    def parks(self, request: Request) -> bool:
        """Whether a long request can wait without a thread: `answer` gives None then, and its seat the answer later."""
        route = request.match.route
        return route is not None and route.parks and request.coding is None

    def keeps_order(self, request: Request) -> bool:
        """Whether such a request is to be admitted by the thread that polls, so that it stays in the order of arrival."""
        return self._dataplane.keeps_order(request.match)

    def expire(self) -> None:
        """Answers those that have waited until their deadline."""
        self._dataplane.runner.expire()

    def drop(self, job: Job) -> None:
        """The caller of a prediction has gone while it waited."""
        self._dataplane.runner.drop(job)

    def answer(self, request: Request, grant: Grant) -> Answer | None:
        """None: a prediction waits. Never raises: whatever goes wrong becomes an answer."""
        try:
            route = request.match.route
            if route is None:
                return refusal_answer(request.match.refusal or Refusal(404, "Not Found"))
            if grant.access < route.access or grant.models is not None:
                grant.check(route.access, request.match.model)
            if request.coding is not None and request.coding.body is not None:
                request.body = compression.inflate(request.body, request.coding.body, self._max_body, request.allowance)
                request.strays = True
                if request.allowance is not None:
                    request.allowance.body_bytes = len(request.body)
            return route.handler(request)
        except Refusal as refusal:
            return refusal_answer(refusal.forget())
        except Exception:
            log.exception("a request failed in an unforeseen way")
            return refusal_answer(Refusal(500, "internal error; the server's log says more"))
