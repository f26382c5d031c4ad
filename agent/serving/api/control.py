"""The control routes: what is served, and changing it. Changes run one at a time, on the control thread."""

from __future__ import annotations

import logging
import os
import secrets
import time
from typing import Annotated, Any, TypeVar

import msgspec

from agent.contract.names import MAX_VERSION, check_model
from agent.serving.access import Access
from agent.serving.answers import Answer, Refusal, json_answer
from agent.serving.api.descriptions import agent_version
from agent.serving.api.json_body import read_body
from agent.serving.candidates.comparing import Tolerance
from agent.serving.candidates.shadowing import Shadows, pair
from agent.serving.models import loading
from agent.serving.models.canary import Canary
from agent.serving.models.host import ModelHost, Served
from agent.serving.models.residency import Residency
from agent.serving.models.swapping import SwapLost, Swapper
from agent.serving.models.version import Version
from agent.serving.routes import Handler, Kind, Request, Route
from agent.store import Choice, Selection, Store, StoreError
from runtimes.contract import ModelInvalid, RuntimeUnavailable
from runtimes.messages import without_paths

log = logging.getLogger(__name__)

T = TypeVar("T")


class LoadRequest(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    variant: str


class VersionRequest(msgspec.Struct, forbid_unknown_fields=True):
    version: int


class TogetherRequest(msgspec.Struct, forbid_unknown_fields=True):
    versions: dict[str, int]


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
    """The handlers over a host, and over the store that models are loaded from (None when files were named instead)."""

    def __init__(self, host: ModelHost, store: Store | None, residency: Residency, swapper: Swapper, shadows: Shadows) -> None:
        self._host = host
        self._store = store
        self._residency = residency
        self._swapper = swapper
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
            Route("GET", model, Access.OBSERVE, self.model),
            Route("GET", model + "/shadow", Access.OBSERVE, self.shadow_numbers),
            Route("POST", "/control/v1/activate", Access.CONTROL, self._alone(self.activate_together), Kind.CONTROL),
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

    def model(self, call: Request) -> Answer:
        return json_answer(self._host.served(call.params["model"]).document())

    def load(self, call: Request) -> Answer:
        name = _model_name(call)
        request = _body(call, LoadRequest)
        return json_answer(self._load(name, Choice(version=request.version, variant=request.variant)).document())

    def activate(self, call: Request) -> Answer:
        name = _model_name(call)
        served = self._host.activate(name, _body(call, VersionRequest).version)
        log.info("model %r: version %s is active", name, served.active.number if served.active else None)
        return _active(served)

    def activate_together(self, call: Request) -> Answer:
        """Models that belong together switch one right after the other, all of them or none."""
        wanted = _body(call, TogetherRequest).versions
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
        log.info("switched together: %s", ", ".join(f"{name} to {number}" for name, number in wanted.items()))
        return json_answer({name: {"active": number} for name, number in wanted.items()})

    def rollback(self, call: Request) -> Answer:
        name, number = _model_name(call), _body(call, VersionRequest).version
        served = self._host.get(name)
        loaded = served.versions.get(number) if served else None
        if loaded is None or loaded.state != "READY":
            self._bring(name, self._selected(name, number))
        served = self._host.keep_only(name, number)
        log.warning("model %r was rolled back to version %d", name, number)
        return _active(served)

    def swap(self, call: Request) -> Answer:
        name = _model_name(call)
        request = _body(call, LoadRequest)
        served = self._swap(name, Choice(version=request.version, variant=request.variant))
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

    # -- as the repository extension has it --------------------------------------------------------------------------------------

    def load_selected(self, name: str) -> None:
        """Makes serve what the store selects; on files, loads the file again when it changed.  Raises: Refusal."""
        with self._changing:
            if self._store is None:
                self._load_file_again(name)
                return
            selection = self._selection(name)
            if selection is None:
                raise Refusal(404, f"failed to load '{name}': the store selects no release of it", code="not_found")
            self._bring(name, selection.active)
            self._host.activate(name, selection.active.version)

    def unload_all(self, name: str) -> None:
        """Every version is drained and closed; they stay listed as unloaded.  Raises: Refusal (404)."""
        with self._changing:
            sources = [v.source for v in self._host.served(name).versions.values() if v.source is not None]
            self._host.unload(name, None)
            for source in sources:
                self._host.add(loading.failed(source, "unloaded"))

    def _load_file_again(self, name: str) -> None:
        for old in list(self._host.served(name).versions.values()):
            source: loading.Source = old.source
            try:
                source = loading.of_file(source)
            except (StoreError, OSError) as error:
                raise Refusal(404, f"failed to load '{name}': {loading.reason(source, error)}", code="not_found") from error
            if old.answers and old.sha256 == source.sha256:
                self._bring_back(old)
                continue
            self._host.replace(self._loaded(source, untried=True))

    def _load(self, name: str, choice: Choice) -> Version:
        """The version, READY, beside whatever is there.  Raises: Refusal."""
        served = self._host.get(name)
        present = served.versions.get(choice.version) if served else None
        if present is not None and present.answers:
            if present.variant == choice.variant:
                self._bring_back(present)
                return present
            raise Refusal(
                409,
                f"model {name!r} version {choice.version} is loaded as variant {present.variant!r}; unload it first",
                code="other_variant",
            )
        source = self._source(name, choice)
        try:
            version = self._loaded(source)
        except Refusal as refusal:
            self._host.add(loading.failed(source, str(refusal)))
            raise
        self._host.add(version)
        return version

    def _bring(self, name: str, choice: Choice) -> None:
        """Loads it, in place of what is active if there is no room for both.  Raises: Refusal."""
        try:
            self._load(name, choice)
        except Refusal as refusal:
            served = self._host.get(name)
            if refusal.code != "no_memory" or served is None or served.active is None:
                raise
            before = served.active
            self._swap(name, choice)
            served.rollbacks += before.number > choice.version

    def _swap(self, name: str, choice: Choice) -> Served:
        """The version, active, in place of the one that is, for which it needs no room beside it.  Raises: Refusal."""
        served = self._host.get(name)
        old = served.active if served else None
        present = served.versions.get(choice.version) if served else None
        if served is None or old is None or old.state != "READY" or (present is not None and present.answers):
            self._load(name, choice)
            return self._host.activate(name, choice.version)
        source = self._source(name, choice)
        try:
            served = self._swapper.swap(served, old, source)
        except Refusal:
            raise
        except SwapLost as lost:
            raise self._not_swapped(source, _load_refusal(source, lost.refused), str(lost)) from lost
        except Exception as error:
            raise self._not_swapped(source, _load_refusal(source, error), f"version {old.number} serves again") from error
        log.info("model %r: version %d took the place of version %d", name, source.version, old.number)
        return served

    def _not_swapped(self, source: loading.Source, refusal: Refusal, outcome: str) -> Refusal:
        text = f"{refusal}; {outcome}"
        self._host.add(loading.failed(source, text))
        return Refusal(refusal.status, text, code=refusal.code)

    def _loaded(self, source: loading.Source, *, untried: bool = False) -> Version:
        try:
            if untried:
                self._residency.try_apart(source)
            return self._residency.load(source)
        except Exception as error:
            raise _load_refusal(source, error) from error

    def _bring_back(self, version: Version) -> None:
        try:
            self._residency.bring_back(version)
        except Exception as error:
            raise _load_refusal(version.source, error) from error

    def _source(self, name: str, choice: Choice) -> loading.Source:
        if self._store is None:
            raise Refusal(409, "this server was started on files and has no store to load from", code="not_in_store")
        try:
            return loading.source_of(self._store.release(name, choice))
        except (StoreError, ValueError, OSError) as error:
            raise Refusal(409, without_paths(str(error)), code="not_in_store") from error

    def _selected(self, name: str, number: int) -> Choice:
        """The choice of variant that the model's Selection holds for this version.  Raises: Refusal."""
        selection = self._selection(name)
        for choice in (selection.active, selection.previous) if selection else ():
            if choice is not None and choice.version == number:
                return choice
        raise Refusal(409, f"model {name!r} version {number} is neither loaded nor selected in the store", code="not_in_store")

    def _selection(self, name: str) -> Selection | None:
        try:
            return self._store.selection(name) if self._store else None
        except (StoreError, OSError) as error:
            raise Refusal(409, without_paths(str(error)), code="not_in_store") from error


def _divert(active: Version, candidate: Version, share: float) -> None:
    """Of a canary that is there already only the share changes."""
    if active.canary is not None and active.canary.candidate is candidate:
        active.canary.change(share)
    else:
        active.canary = Canary(active, candidate, share)


def _load_refusal(source: loading.Source, error: Exception) -> Refusal:
    what = f"cannot load model {source.name!r} version {source.version}: {loading.reason(source, error)}"
    if isinstance(error, RuntimeUnavailable):
        return Refusal(503, what, code="runtime_unavailable")
    if isinstance(error, ModelInvalid):
        return Refusal(422, what, code="model_invalid")
    if isinstance(error, MemoryError):
        return Refusal(507, what, code="no_memory")
    log.error("%s", what, exc_info=error)
    return Refusal(500, f"{what} ({type(error).__name__})", code="load_failed")


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
