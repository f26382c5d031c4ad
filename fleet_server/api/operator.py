"""The operators' application: REST under /api/v1, the page, and the two routes by which a device joins.

`ROUTES` is the whole list: what is not in it does not exist, and each entry says the least role that may use it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import Depends, FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.security import HTTPBearer
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from agent.contract import names
from agent.contract.codec import decode
from agent.contract.enrolment import CA_PATH, ENROL_PATH, EnrolmentRequest
from fleet_server.access import Access, Actor, Role
from fleet_server.api import http, schemas
from fleet_server.devices.enrolment import Enrolment
from fleet_server.devices.inventory import CertificateState, Inventory
from fleet_server.devices.pki import Authority
from fleet_server.errors import Denied, Invalid, Refused
from fleet_server.journal import Journal
from fleet_server.live import Hub
from fleet_server.releases.bundles import Bundles
from fleet_server.releases.catalogue import Catalogue
from fleet_server.releases.ceremonies import Ceremonies, Wish
from fleet_server.releases.publishers import RELEASES
from fleet_server.releases.repository import Repository
from fleet_server.rollouts.service import Rollouts
from fleet_server.storage.blobs import Blobs
from fleet_server.storage.database import Database

API = "/api/v1"
COOKIE = "edge_fleet_session"
PROOF = "x-edge-fleet"  # a header no other site can make a browser send; asked of changes that a cookie authorises
MAX_ENROLMENT_BYTES = 64 * 1024
STREAM_KEEPALIVE_S = 15.0
STATIC = Path(__file__).parent.parent / "web" / "static"

Limit = Annotated[int, Query(ge=1, le=1000)]
Seq = Annotated[int | None, Query(ge=0, le=2**63 - 1)]
VersionInPath = Annotated[int, InPath(ge=1, le=2**53 - 1)]


class Parts(Protocol):
    """What this application needs of the server."""

    access: Access
    authority: Authority
    blobs: Blobs
    bundles: Bundles
    catalogue: Catalogue
    ceremonies: Ceremonies
    database: Database
    enrolment: Enrolment
    hub: Hub
    inventory: Inventory
    journal: Journal
    repository: Repository
    rollouts: Rollouts

    def status(self) -> dict[str, Any]: ...


class Api:
    """The routes' bodies. `actor` comes from the guard that ROUTES puts before each."""

    def __init__(self, fleet: Parts) -> None:
        self._fleet = fleet

    # -- about the server and the caller -----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """How the server is: devices, broker, when what is signed ends, and what a person should see to."""
        return self._fleet.status()

    def me(self, request: Request) -> dict[str, Any]:
        """Whose access token or session this is, and its role."""
        actor = _actor(request)
        return {"name": actor.name, "role": actor.role.value}

    def sign_in(self, request: Request, body: schemas.SignIn) -> Response:
        """Opens a browser session for whoever shows an access token."""
        actor = self._fleet.access.by_token(body.token)
        cookie = self._fleet.access.open_session(actor)
        response = JSONResponse({"name": actor.name, "role": actor.role.value})
        response.set_cookie(COOKIE, cookie, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/")
        return response

    def sign_out(self, request: Request) -> Response:
        """Ends the browser session."""
        self._fleet.access.close_session(request.cookies.get(COOKIE, ""))
        response = JSONResponse({})
        response.delete_cookie(COOKIE, path="/")
        return response

    # -- devices -----------------------------------------------------------------------------------------------------------

    def devices(
        self, group: str | None = None, model: str | None = None, online: bool | None = None, text: str | None = None,
        certificate: CertificateState | None = None, limit: Limit = 1000, after: str = "",
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Lists devices by id, with what each runs. More than `limit`: ask again with `after` set to the last id."""
        return self._fleet.inventory.find(
            group=group, model=model, online=online, text=text, certificate=certificate, limit=limit, after=after
        )

    def device(self, device: str) -> dict[str, Any]:
        """Everything about one device: its last report, groups and certificates."""
        return self._fleet.inventory.get(device)

    def set_groups(self, request: Request, device: str, body: schemas.Groups) -> dict[str, Any]:
        """Puts a device in exactly these groups. Its record is signed again with the next serial."""
        return self._fleet.inventory.set_groups(_actor(request), device, list(body.groups))

    def revoke_device(self, request: Request, device: str) -> dict[str, Any]:
        """Shuts the device out of the broker and of the device listener."""
        return self._fleet.inventory.revoke(_actor(request), device)

    def allow_renewal(self, request: Request, device: str, body: schemas.LateRenewal) -> dict[str, Any]:
        """Lets a device renew a certificate that has ended, with the key that it has, for so long."""
        return self._fleet.inventory.allow_renewal(_actor(request), device, body.ttl_s)

    def delete_device(self, request: Request, device: str) -> dict[str, Any]:
        """Shuts the device out and forgets it; its id can be enrolled again."""
        self._fleet.inventory.delete(_actor(request), device)
        return {}

    def create_enrolment_token(self, request: Request, body: schemas.NewEnrolmentToken) -> dict[str, Any]:
        """Makes an enrolment token. `string` is what the device is given; it is shown this once."""
        view, string = self._fleet.enrolment.create_token(
            _actor(request), device=body.device, groups=list(body.groups), uses=body.uses, ttl_s=body.ttl_s
        )
        return {**view, "string": str(string)}

    def enrolment_tokens(self) -> list[dict[str, Any]]:
        """Lists enrolment tokens, newest first, without what devices are given."""
        return self._fleet.enrolment.tokens()

    def revoke_enrolment_token(self, request: Request, token: str) -> dict[str, Any]:
        """Makes an enrolment token useless."""
        return self._fleet.enrolment.revoke_token(_actor(request), token)

    # -- access ------------------------------------------------------------------------------------------------------------

    def create_access_token(self, request: Request, body: schemas.NewAccessToken) -> dict[str, Any]:
        """Makes an access token with a role. `token` is shown this once."""
        view, token = self._fleet.access.create(body.name, body.role)
        with self._fleet.database.session() as session:
            self._fleet.journal.audit(session, _actor(request), "access.create", view["id"], name=body.name, of=body.role.value)
        return {**view, "token": token}

    def access_tokens(self) -> list[dict[str, Any]]:
        """Lists access tokens, without the tokens themselves."""
        return self._fleet.access.tokens()

    def revoke_access_token(self, request: Request, token: str) -> dict[str, Any]:
        """Makes an access token useless and ends its browser sessions."""
        view = self._fleet.access.revoke(token)
        with self._fleet.database.session() as session:
            self._fleet.journal.audit(session, _actor(request), "access.revoke", token)
        return view

    # -- releases ----------------------------------------------------------------------------------------------------------

    def releases(self, model: str | None = None) -> list[dict[str, Any]]:
        """Lists published releases, the newest of each model first."""
        return self._fleet.catalogue.published(model)

    def release(self, model: str, version: VersionInPath) -> dict[str, Any]:
        """One release with its signed manifest."""
        return self._fleet.catalogue.get(_ref(f"{model}:{version}"))

    def publishing(self, model: str | None = None, publisher: str | None = None) -> dict[str, Any]:
        """What a publisher adds to and signs: the trusted metadata, as text. Which publisher: the one who signs `model`."""
        repository = self._fleet.repository
        if publisher is None:
            publisher = repository.publisher_of(model) if model is not None else RELEASES
        role = repository.releases(publisher)
        return {
            "root": repository.root_bytes().decode(),
            "targets": repository.role_bytes("targets").decode(),
            "publisher": publisher,
            "releases": repository.role_bytes(publisher).decode() if role is not None else None,
        }

    def resign(self, request: Request, publisher: str, body: schemas.Metadata) -> dict[str, Any]:
        """Takes in a publisher's metadata that adds no release: renewed, or lifting the withdrawal of one release."""
        actor = _actor(request)
        done = self._fleet.ceremonies.resign(actor, publisher, body.metadata.encode())
        if done.reinstated is not None:
            self._fleet.rollouts.reinstate(actor, done.reinstated)
        reinstated = str(done.reinstated) if done.reinstated is not None else None
        return {"publisher": publisher, "version": done.version, "signers": list(done.signers), "reinstated": reinstated}

    # -- keys --------------------------------------------------------------------------------------------------------------

    def keys(self) -> dict[str, Any]:
        """Who is trusted: every role with its keys, threshold, version and end."""
        return self._fleet.ceremonies.status()

    def propose_change(self, request: Request, body: schemas.KeyWish) -> dict[str, Any]:
        """Makes a change of keys for the offline keys to sign. Nothing changes by this alone."""
        wish = Wish(body.action, body.role, tuple(body.add), tuple(body.remove), body.threshold, tuple(body.patterns))
        return {"change": self._fleet.ceremonies.propose(_actor(request), wish).decode()}

    def apply_change(self, request: Request, body: schemas.SignedChange) -> dict[str, Any]:
        """Makes a signed change of keys trusted, when it has every signature it needs."""
        return {"done": self._fleet.ceremonies.apply(_actor(request), body.change.encode())}

    def blob(self, sha256: str) -> Response:
        """Whether a file is here: 200, or 404 with `Upload-Offset` saying how much of it is."""
        size = self._fleet.blobs.size(sha256)
        if size is not None:
            return JSONResponse({"sha256": sha256, "size_bytes": size}, headers={"Upload-Offset": str(size)})
        response = http.answer(404, f"blob {sha256} is not here; upload it", "not_found")
        response.headers["Upload-Offset"] = str(self._fleet.blobs.partial_size(sha256))
        return response

    async def upload(self, request: Request, sha256: str) -> dict[str, Any]:
        """Takes a file's bytes from `Upload-Offset` (0 without one) on. An upload that broke off goes on where HEAD says."""
        offset = request.headers.get("upload-offset", "0")
        if not offset.isascii() or not offset.isdigit() or len(offset) > 16:
            raise Invalid("Upload-Offset must be a number of bytes")
        size = await self._fleet.blobs.receive(sha256, int(offset), request.stream())
        return {"sha256": sha256, "size_bytes": size}

    def publish(self, request: Request, body: schemas.Publication) -> dict[str, Any]:
        """Takes in a signed release, when everything about it holds."""
        return self._fleet.catalogue.publish(_actor(request), body.manifest.encode(), body.metadata.encode())

    def withdraw(self, request: Request, model: str, version: VersionInPath) -> dict[str, Any]:
        """Forbids a release: no device may run it any more, unless its publisher signs otherwise."""
        return self._fleet.rollouts.withdraw(_actor(request), _ref(f"{model}:{version}"))

    # -- rollouts ----------------------------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """Lists models with the release that every device runs and the one before."""
        return self._fleet.rollouts.models()

    def roll_back(self, request: Request, model: str, body: schemas.Rollback) -> dict[str, Any]:
        """Takes every device to an earlier release of the model at once."""
        return self._fleet.rollouts.roll_back(_actor(request), model, body.to)

    def rollouts(self, model: str | None = None, limit: Limit = 100) -> list[dict[str, Any]]:
        """Lists rollouts, newest first."""
        return self._fleet.rollouts.recent(model=model, limit=limit)

    def rollout(self, rollout: str) -> dict[str, Any]:
        """One rollout with its waves and the last verdict of its gate."""
        return self._fleet.rollouts.get(rollout)

    def start_rollout(self, request: Request, body: schemas.NewRollout) -> dict[str, Any]:
        """Begins a rollout: the first wave is what is named, then every device."""
        permille = None if body.percent is None else max(1, round(body.percent * 10))
        return self._fleet.rollouts.start(
            _actor(request), _ref(body.release), groups=body.groups, permille=permille, hold=body.hold,
            max_failures=body.max_failures, together=[_ref(text) for text in body.together], window=body.window,
            mode=body.mode,
        )  # fmt: skip

    def stopped_classes(self, model: str | None = None) -> list[dict[str, Any]]:
        """Lists hardware classes for which a release was stopped, with the devices that refused it."""
        return self._fleet.rollouts.stopped(model=model)

    def lift_class(self, request: Request, number: VersionInPath) -> dict[str, Any]:
        """Lets a hardware class have a release that was stopped for it; it is not stopped again."""
        return self._fleet.rollouts.lift(_actor(request), number)

    def promote(self, request: Request, rollout: str) -> dict[str, Any]:
        """Begins the next wave of a rollout that waits for it."""
        return self._fleet.rollouts.promote(_actor(request), rollout)

    def pause(self, request: Request, rollout: str) -> dict[str, Any]:
        """Begins no further wave; devices already reached go on."""
        return self._fleet.rollouts.pause(_actor(request), rollout)

    def resume(self, request: Request, rollout: str) -> dict[str, Any]:
        """Lets a paused rollout go on."""
        return self._fleet.rollouts.resume(_actor(request), rollout)

    def abort(self, request: Request, rollout: str) -> dict[str, Any]:
        """Ends a rollout: every device goes back to the release before."""
        return self._fleet.rollouts.abort(_actor(request), rollout)

    def bundle(self, request: Request, body: schemas.NewBundle) -> Response:
        """What devices without a network should run, in one file that `edge-agent import` takes. A tar of signed documents and blobs."""
        packed = self._fleet.bundles.pack(
            _actor(request), models=body.models, devices=body.devices, group=body.group, valid_days=body.valid_days
        )
        headers = {"Content-Length": str(packed.size_bytes)}
        return StreamingResponse(packed.chunks(), media_type="application/x-tar", headers=headers)

    def assignment(self) -> dict[str, Any]:
        """The document devices read, as it is signed now."""
        return self._fleet.rollouts.assignment()

    # -- what happened -----------------------------------------------------------------------------------------------------

    def events(
        self, after: Seq = None, before: Seq = None, limit: Limit = 100, device: str | None = None
    ) -> list[dict[str, Any]]:
        """Lists what happened, in the order it was received; without `after` the newest ones."""
        return self._fleet.journal.events(after=after, before=before, limit=limit, device=device)

    async def stream(self, request: Request, after: Seq = None) -> Response:
        """Server-sent events: `event` for what happened, `change` for what should be read again. Resumes by Last-Event-ID."""
        last = request.headers.get("last-event-id", "")
        if last.isascii() and last.isdigit() and len(last) < 19:
            after = int(last)
        return StreamingResponse(
            self._follow(request, after), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )

    async def _follow(self, request: Request, after: int | None) -> AsyncIterator[str]:
        with self._fleet.hub.watch() as watcher:
            yield "retry: 1000\n\n"
            seen = -1 if after is None else after
            while after is not None and (missed := await asyncio.to_thread(self._fleet.journal.events, after=seen, limit=1000)):
                for event in missed:
                    yield _message("event", event)
                seen = int(missed[-1]["seq"])
            while True:
                try:
                    message = await asyncio.wait_for(watcher.get(), STREAM_KEEPALIVE_S)
                except asyncio.TimeoutError:
                    if not await asyncio.to_thread(_still_allowed, self._fleet.access, request):
                        return
                    yield ": still here\n\n"
                    continue
                if message is None:
                    return
                if message["type"] != "event":
                    yield _message(message["type"], message["data"])
                elif int(message["data"]["seq"]) > seen:
                    yield _message("event", message["data"])

    def audit(self, before: Seq = None, limit: Limit = 100) -> list[dict[str, Any]]:
        """Lists who changed what, newest first."""
        return self._fleet.journal.audited(before=before, limit=limit)


class Route(msgspec.Struct, frozen=True):
    method: str
    path: str
    handler: Callable[..., Any]
    role: Role | None
    """The least role that may use it; None: the handler asks for a token itself."""
    tag: str


ROUTES: tuple[Route, ...] = (
    Route("GET", "/status", Api.status, Role.VIEWER, "server"),
    Route("GET", "/me", Api.me, Role.VIEWER, "server"),
    Route("POST", "/session", Api.sign_in, None, "server"),
    Route("DELETE", "/session", Api.sign_out, None, "server"),
    Route("GET", "/devices", Api.devices, Role.VIEWER, "devices"),
    Route("GET", "/devices/{device}", Api.device, Role.VIEWER, "devices"),
    Route("PUT", "/devices/{device}/groups", Api.set_groups, Role.OPERATOR, "devices"),
    Route("POST", "/devices/{device}/revoke", Api.revoke_device, Role.OPERATOR, "devices"),
    Route("POST", "/devices/{device}/allow-renewal", Api.allow_renewal, Role.OPERATOR, "devices"),
    Route("DELETE", "/devices/{device}", Api.delete_device, Role.OPERATOR, "devices"),
    Route("POST", "/enrolment-tokens", Api.create_enrolment_token, Role.OPERATOR, "enrolment"),
    Route("GET", "/enrolment-tokens", Api.enrolment_tokens, Role.OPERATOR, "enrolment"),
    Route("DELETE", "/enrolment-tokens/{token}", Api.revoke_enrolment_token, Role.OPERATOR, "enrolment"),
    Route("POST", "/access-tokens", Api.create_access_token, Role.ADMIN, "access"),
    Route("GET", "/access-tokens", Api.access_tokens, Role.ADMIN, "access"),
    Route("DELETE", "/access-tokens/{token}", Api.revoke_access_token, Role.ADMIN, "access"),
    Route("GET", "/releases", Api.releases, Role.VIEWER, "releases"),
    Route("GET", "/releases/{model}/{version}", Api.release, Role.VIEWER, "releases"),
    Route("POST", "/releases", Api.publish, Role.PUBLISHER, "releases"),
    Route("POST", "/releases/{model}/{version}/withdraw", Api.withdraw, Role.OPERATOR, "releases"),
    Route("POST", "/publishers/{publisher}/metadata", Api.resign, Role.PUBLISHER, "releases"),
    Route("GET", "/keys", Api.keys, Role.VIEWER, "keys"),
    Route("POST", "/keys/changes", Api.propose_change, Role.ADMIN, "keys"),
    Route("POST", "/keys/apply", Api.apply_change, Role.ADMIN, "keys"),
    Route("GET", "/publishing", Api.publishing, Role.PUBLISHER, "releases"),
    Route("GET", "/blobs/{sha256}", Api.blob, Role.PUBLISHER, "releases"),
    Route("PUT", "/blobs/{sha256}", Api.upload, Role.PUBLISHER, "releases"),
    Route("GET", "/models", Api.models, Role.VIEWER, "rollouts"),
    Route("POST", "/models/{model}/rollback", Api.roll_back, Role.OPERATOR, "rollouts"),
    Route("GET", "/rollouts", Api.rollouts, Role.VIEWER, "rollouts"),
    Route("GET", "/rollouts/{rollout}", Api.rollout, Role.VIEWER, "rollouts"),
    Route("POST", "/rollouts", Api.start_rollout, Role.OPERATOR, "rollouts"),
    Route("POST", "/rollouts/{rollout}/promote", Api.promote, Role.OPERATOR, "rollouts"),
    Route("POST", "/rollouts/{rollout}/pause", Api.pause, Role.OPERATOR, "rollouts"),
    Route("POST", "/rollouts/{rollout}/resume", Api.resume, Role.OPERATOR, "rollouts"),
    Route("POST", "/rollouts/{rollout}/abort", Api.abort, Role.OPERATOR, "rollouts"),
    Route("POST", "/bundles", Api.bundle, Role.OPERATOR, "rollouts"),
    Route("GET", "/stopped-classes", Api.stopped_classes, Role.VIEWER, "rollouts"),
    Route("POST", "/stopped-classes/{number}/lift", Api.lift_class, Role.OPERATOR, "rollouts"),
    Route("GET", "/assignment", Api.assignment, Role.VIEWER, "rollouts"),
    Route("GET", "/events", Api.events, Role.VIEWER, "events"),
    Route("GET", "/events/stream", Api.stream, Role.VIEWER, "events"),
    Route("GET", "/audit", Api.audit, Role.OPERATOR, "events"),
)


def build(fleet: Parts, *, title: str = "edge-fleet", version: str = "0") -> FastAPI:
    """The application of the operator and loopback listeners."""
    app = FastAPI(
        title=title, version=version, docs_url=None, redoc_url=None, openapi_url=f"{API}/openapi.json",
        description="Devices, releases and rollouts of one fleet. Errors are `{error, code}`.",
        responses={status: {"model": schemas.ErrorAnswer} for status in (400, 401, 403, 404, 409)},
    )  # fmt: skip
    api = Api(fleet)
    bearer = HTTPBearer(auto_error=False, description="an access token")
    for route in ROUTES:
        guard = [Depends(bearer), Depends(_guard(fleet, route.role))] if route.role else []
        methods = ["GET", "HEAD"] if route.path.startswith("/blobs") and route.method == "GET" else [route.method]
        for method in methods:
            name = route.handler.__name__ if method != "HEAD" else f"{route.handler.__name__}_head"
            app.add_api_route(
                API + route.path, getattr(api, route.handler.__name__), methods=[method], dependencies=guard, tags=[route.tag],
                operation_id=name, name=name, summary=_first_sentence(route.handler), response_model=None,
                openapi_extra={"x-role": route.role.value if route.role else ""},
            )  # fmt: skip
    _add_enrolment(app, fleet)
    _add_page(app)
    http.install(app, unlimited=f"{API}/blobs/")
    return app


def _first_sentence(handler: Callable[..., Any]) -> str:
    """What a route says about itself; every one does."""
    assert handler.__doc__, f"{handler.__name__} has no docstring"
    return handler.__doc__.strip().splitlines()[0].split(". ")[0].rstrip(".")


def _add_enrolment(app: FastAPI, fleet: Parts) -> None:
    def ca() -> Response:
        """The fleet's CA certificate. A device compares its hash with its enrolment string before it trusts it."""
        return Response(fleet.authority.ca_pem, media_type="application/x-pem-file")

    async def enrol(request: Request) -> Response:
        """A device joins: an EnrolmentRequest for an EnrolmentResponse (agent.contract.enrolment)."""
        body = await request.body()
        wanted = decode(body, EnrolmentRequest, limit_bytes=MAX_ENROLMENT_BYTES)
        given = await asyncio.to_thread(fleet.enrolment.enrol, wanted)
        return Response(msgspec.json.encode(given), media_type="application/json")

    app.add_api_route(CA_PATH, ca, summary=_first_sentence(ca), methods=["GET"], tags=["enrolment"], response_model=None)
    app.add_api_route(
        ENROL_PATH, enrol, summary=_first_sentence(enrol), methods=["POST"], tags=["enrolment"], response_model=None
    )


def _add_page(app: FastAPI) -> None:
    kinds = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}  # fmt: skip

    def serve(path: Path) -> Callable[[], FileResponse]:
        def page() -> FileResponse:
            return FileResponse(path, media_type=kinds[path.suffix], headers={"Cache-Control": "no-cache"})

        return page

    for path in sorted(STATIC.iterdir()):
        if path.suffix in kinds:
            where = "/" if path.name == "index.html" else f"/static/{path.name}"
            app.add_api_route(where, serve(path), methods=["GET"], include_in_schema=False, response_model=None)


def _guard(fleet: Parts, role: Role) -> Callable[[Request], None]:
    def allowed(request: Request) -> None:
        actor = _authenticate(fleet.access, request)
        if actor.by_cookie and request.method not in {"GET", "HEAD"} and PROOF not in request.headers:
            raise Refused(f"changes from a browser need the header {PROOF}", code="no_proof")
        if actor.role.rank < role.rank:
            raise Refused(
                f"this needs the role {role.value}; the token {actor.name!r} has {actor.role.value}", code="role_too_low"
            )
        request.state.actor = actor

    return allowed


def _authenticate(access: Access, request: Request) -> Actor:
    """Raises: Denied."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return access.by_token(token.strip())
    if cookie := request.cookies.get(COOKIE):
        return access.by_session(cookie)
    raise Denied("send an access token as `Authorization: Bearer …`", code="no_token")


def _still_allowed(access: Access, request: Request) -> bool:
    try:
        _authenticate(access, request)
    except Denied:
        return False
    return True


def _actor(request: Request) -> Actor:
    actor: Actor = request.state.actor
    return actor


def _ref(text: str) -> names.ReleaseRef:
    try:
        return names.ReleaseRef.parse(text)
    except ValueError as error:
        raise Invalid(str(error)) from error


def _message(kind: str, data: dict[str, Any]) -> str:
    number = f"id: {data['seq']}\n" if "seq" in data else ""
    return f"{number}event: {kind}\ndata: {json.dumps(data)}\n\n"
