"""From a complete request to its answer: access, routing, errors. The seam between the transport and everything behind it."""

from __future__ import annotations

import logging

from agent.serving.access import Grant
from agent.serving.answers import Answer, Refusal, refusal_answer
from agent.serving.connection import Request
from agent.serving.dataplane import Dataplane
from agent.serving.routes import Call, Kind, Router

log = logging.getLogger(__name__)


class Service:
    """Any number of threads may call it."""

    def __init__(self, router: Router, dataplane: Dataplane) -> None:
        self._router = router
        self._dataplane = dataplane

    def kind(self, request: Request, grant: Grant) -> Kind:
        """QUICK when the answer is there at once, whatever it will be; PREDICT when it takes long; CONTROL for the control thread."""
        if request.refusal is not None or request.head is None:
            return Kind.QUICK
        match = request.head.match
        route = match.route
        if route is None or route.kind is Kind.QUICK:
            return Kind.QUICK
        if route.kind is Kind.PREDICT:
            assert match.model is not None
            return Kind.QUICK if self._dataplane.is_cheap(match.model, len(request.body)) else Kind.PREDICT
        return route.kind if grant.access >= route.access else Kind.QUICK

    def answer(self, request: Request, grant: Grant) -> Answer:
        """Never raises: whatever goes wrong becomes an answer."""
        try:
            return self._answer(request, grant)
        except Refusal as refusal:
            return refusal_answer(refusal)
        except Exception:
            log.exception("a request failed in an unforeseen way")
            return refusal_answer(Refusal(500, "internal error; the server's log says more"))

    @staticmethod
    def _answer(request: Request, grant: Grant) -> Answer:
        if request.refusal is not None:
            raise request.refusal
        head = request.head
        assert head is not None
        match = head.match
        route = match.route
        assert route is not None
        if grant.access < route.access or (grant.models is not None and route.access):
            grant.check(route.access, match.model)
        return route.handler(Call(match.params, match.query, request.body, head.header_length, request.arrived_s))
