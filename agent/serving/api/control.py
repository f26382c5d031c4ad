"""The control routes: what is served, and changing it. Changes run one at a time, on the control thread."""

from __future__ import annotations

import logging
import os
import secrets
import time
from typing import Annotated, Any, TypeVar

import msgspec

from agent.contract.names import MAX_VERSION, check_model
from agent.contract.telemetry import ServeFigures
from agent.serving.access import Access
from agent.serving.answers import Answer, Refusal, json_answer
from agent.serving.api import figures
from agent.serving.api.changes import Changes
from agent.serving.api.descriptions import agent_version
from agent.serving.api.json_body import read_body
from agent.serving.candidates.comparing import Tolerance
from agent.serving.candidates.shadowing import Shadows, pair
from agent.serving.models.canary import Canary
from agent.serving.models.host import ModelHost, Served
from agent.serving.models.residency import Residency
from agent.serving.models.version import Version
from agent.serving.routes import Handler, Kind, Request, Route
from agent.store import Choice

log = logging.getLogger(__name__)

T = TypeVar("T")


class LoadRequest(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    variant: str


class VersionRequest(msgspec.Struct, forbid_unknown_fields=True):
    version: int


class TeamRequest(msgspec.Struct, forbid_unknown_fields=True):
    versions: dict[str, int | None]


class UnloadRequest(msgspec.Struct, forbid_unknown_fields=True):
    version: int | None = None


class ShadowRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`tolerance` by output; `*` is every other one."""

    version: int
    share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    max_rate: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 5.0
    tolerance: dict[str, Tolerance] = {}


class CanaryRequest(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    share: Annotated[float, msgspec.Meta(ge=0, le=1)]


class Empty(msgspec.Struct, forbid_unknown_fields=True):
    pass


class Control:
    """The handlers of the control routes."""

    def __init__(self, host: ModelHost, residency: Residency, changes: Changes, shadows: Shadows) -> None:
        self._host = host
        self._residency = residency
        self._changes = changes
        self._shadows = shadows
        self._changing = residency.changing  # other transports than HTTP bring threads of their own
        self.instance = secrets.token_hex(8)
        self._started = time.time()

    def routes(self) -> list[Route]:
        model = "/control/v1/models/{model}"
        changes = [
            ("/load", self.load),
            ("/activate", self.activate),
            ("/rollback", self.rollback),
            ("/commit", self.commit),
            ("/unload", self.unload),
            ("/swap", self.swap),
            ("/shadow", self.shadow),
            ("/canary", self.canary),
        ]
        return [
            Route("GET", "/control/v1/status", Access.OBSERVE, self.status),
            Route("GET", "/control/v1/telemetry", Access.OBSERVE, self.telemetry),
            Route("GET", model, Access.OBSERVE, self.model),
            Route("GET", model + "/shadow", Access.OBSERVE, self.shadow_numbers),
            Route("POST", "/control/v1/activate", Access.CONTROL, self._alone(self.activate_team), Kind.CONTROL),
            *(Route("POST", model + path, Access.CONTROL, self._alone(handler), Kind.CONTROL) for path, handler in changes),
        ]

    def _alone(self, handler: Handler) -> Handler:
        def handle(call: Request) -> Answer:
            with self._changing:
                try:
                    return handler(call)
                finally:
                    self._shadows.check()

        return handle

    def status(self, _request: Request) -> Answer:
        return json_answer({
            "instance": self.instance,
            "pid": os.getpid(),
            "started": self._started,
            "agent_version": agent_version(),
            "memory": {"budget_bytes": self._residency.room.budget_bytes, "used_bytes": self._residency.room.used_bytes},
            "models": {served.name: served.document() for served in self._host},
        })  # fmt: skip

    def telemetry(self, _request: Request) -> Answer:
        """What was counted of each version since it was loaded, for `sync` to tell the fleet."""
        return json_answer(ServeFigures(instance=self.instance, counters=tuple(figures.of(self._host, self._shadows))))

    def model(self, call: Request) -> Answer:
        return json_answer(self._host.served(call.params["model"]).document())

    def load(self, call: Request) -> Answer:
        name = _model_name(call)
        request = _body(call, LoadRequest)
        return json_answer(self._changes.load(name, Choice(version=request.version, variant=request.variant)).document())

    def activate(self, call: Request) -> Answer:
        name = _model_name(call)
        served = self._host.activate(name, _body(call, VersionRequest).version)
        log.info("model %r: version %s is active", name, served.active.number if served.active else None)
        return _active(served)

    def activate_team(self, call: Request) -> Answer:
        """Switches a team: its members one right after the other, all of them or none. Models with null are unloaded."""
        request = _body(call, TeamRequest).versions
        wanted = {name: number for name, number in request.items() if number is not None}
        for name, number in wanted.items():
            version = self._host.served(name).versions.get(number)
            if version is None or version.state != "READY":
                raise Refusal(409, f"model {name!r} version {number} is not loaded: none was switched", code="not_loaded")
        for name, number in wanted.items():  # what takes its time first: the versions that two releases ago were active
            previous = self._host.served(name).previous
            if previous is not None and previous.number != number:
                self._host.commit(name)
        for name, number in wanted.items():
            self._host.activate(name, number)
        self._host.unload_models(request.keys() - wanted.keys())
        log.info("switched as a team: %s", ", ".join(f"{name} to {number or 'nothing'}" for name, number in request.items()))
        return json_answer({name: {"active": number} for name, number in request.items()})

    def rollback(self, call: Request) -> Answer:
        name, number = _model_name(call), _body(call, VersionRequest).version
        served = self._host.get(name)
        loaded = served.versions.get(number) if served else None
        if loaded is None or loaded.state != "READY":
            self._changes.bring(name, self._changes.selected(name, number))
        served = self._host.keep_only(name, number)
        log.warning("model %r was rolled back to version %d", name, number)
        return _active(served)

    def swap(self, call: Request) -> Answer:
        name = _model_name(call)
        request = _body(call, LoadRequest)
        served = self._changes.swap(name, Choice(version=request.version, variant=request.variant))
        return _active(served)

    def shadow(self, call: Request) -> Answer:
        name = _model_name(call)
        request = _body(call, ShadowRequest)
        if request.share == 0:
            self._shadows.end(name, "it was asked to end")
            return self.shadow_numbers(call)
        tolerances = dict(request.tolerance)
        shadow = self._shadows.begin(name, request.version, request.share, request.max_rate, tolerances)
        return json_answer(shadow.document())

    def shadow_numbers(self, call: Request) -> Answer:
        self._host.served(call.params["model"])
        shadow = self._shadows.get(call.params["model"])
        return json_answer(shadow.document() if shadow is not None else {"state": "none"})

    def canary(self, call: Request) -> Answer:
        name = _model_name(call)
        request = _body(call, CanaryRequest)
        served = self._host.served(name)
        if request.share == 0:
            served.end_canary()
        else:
            active, candidate = pair(served, request.version, "answered beside")
            _divert(active, candidate, request.share)
        canary = served.canary
        log.info("model %r: version %d answers %g of the requests", name, request.version, canary.share if canary else 0)
        return json_answer({"canary": canary.document() if canary else None})

    def commit(self, call: Request) -> Answer:
        _body(call, Empty)
        return _active(self._host.commit(_model_name(call)))

    def unload(self, call: Request) -> Answer:
        name, number = _model_name(call), _body(call, UnloadRequest).version
        if self._host.get(name) is None:
            return json_answer({"active": None, "previous": None})
        served = self._host.unload(name, number)
        return _active(served) if served is not None else json_answer({"active": None, "previous": None})


def _divert(active: Version, candidate: Version, share: float) -> None:
    """Begins a canary; where this one is under way already, only its share changes."""
    if active.canary is not None and active.canary.candidate is candidate:
        active.canary.change(share)
    else:
        active.canary = Canary(active, candidate, share)


def _active(served: Served) -> Answer:
    document: dict[str, Any] = {
        "active": served.active.number if served.active else None,
        "previous": served.previous.number if served.previous else None,
    }
    return json_answer(document)


def _model_name(call: Request) -> str:
    try:
        return check_model(call.params["model"])
    except ValueError as error:
        raise Refusal(400, str(error), code="bad_request") from error


def _body(call: Request, kind: type[T]) -> T:
    request = read_body(call.body, kind, code="bad_request")
    number = getattr(request, "version", None)
    if number is not None and not 1 <= number <= MAX_VERSION:
        raise Refusal(400, f"version {number} must be from 1 to {MAX_VERSION}", code="bad_request")
    return request
