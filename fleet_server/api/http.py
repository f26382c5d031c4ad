"""What every response has in common: errors as JSON that say what to do, limits before bytes are read, safe headers."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError, OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.contract.codec import ContractError
from fleet_server import errors
from fleet_server.releases.metadata_files import RepositoryDamaged

_log = logging.getLogger(__name__)

BODY_WITHIN_S = 60.0  # for a whole body to come
STALL_S = 60.0  # for the next piece of an upload: a sleeping laptop must not keep the next uploader out
MAX_BODY_BYTES = 16 * 1024 * 1024  # a publication: a manifest and the releases role, both as JSON strings
AGAIN_S = 5  # a database or a disk that does not answer may do so soon
STATUS: dict[type[errors.FleetError], int] = {
    errors.Invalid: 400,
    errors.Denied: 401,
    errors.Refused: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.TooOften: 429,
    errors.Unavailable: 503,
}
HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
}


class TooSlow(HTTPException):
    """The body did not come in time."""

    def __init__(self) -> None:
        super().__init__(408, "the body of the request did not come in time; send it again")


NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class ErrorAnswer(msgspec.Struct, frozen=True):
    """`error` says what to do; `code` is a stable word."""

    error: str
    code: str


def answer(status: int, text: str, code: str) -> Response:
    """`text` says what to do. Whoever is told that the server cannot do it now (503) is told when to come again, too."""
    headers = {"Retry-After": str(AGAIN_S)} if status == STATUS[errors.Unavailable] else None
    return Response(msgspec.json.encode(ErrorAnswer(text, code)), status, headers, media_type="application/json")


def json(data: bytes) -> Response:
    """What is JSON already."""
    return Response(data, media_type="application/json")


def install(app: FastAPI, *, unlimited: str | None = None, renamed: Mapping[str, str] | None = None) -> None:
    """Error answers, limits and headers. Paths that begin with `unlimited` may receive bodies of any length. `renamed`:
    beginnings of paths that were called otherwise → what they are called now.
    """

    @app.exception_handler(errors.FleetError)
    def _ours(_request: Request, error: errors.FleetError) -> Response:
        told = answer(next((s for kind, s in STATUS.items() if isinstance(error, kind)), 500), str(error), error.code)
        if isinstance(error, errors.TooOften):
            told.headers["Retry-After"] = str(math.ceil(error.after_s))
        return told

    @app.exception_handler(ContractError)
    def _contract(_request: Request, error: ContractError) -> Response:
        return answer(400, str(error), "invalid")

    @app.exception_handler(RequestValidationError)
    def _schema(_request: Request, error: RequestValidationError) -> Response:
        where = "; ".join(f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:10])
        return answer(400, f"the request does not fit this route: {where}", "invalid")

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> Response:
        for former, present in (renamed or {}).items():
            if error.status_code == 404 and request.url.path.startswith(former):
                return answer(404, f"{former} is called {present} now", "not_found")
        word = {404: "not_found", 405: "wrong_method", 408: "too_slow"}.get(error.status_code, "invalid")
        return answer(error.status_code, str(error.detail).lower(), word)

    @app.exception_handler(RepositoryDamaged)
    def _damaged(_request: Request, error: RepositoryDamaged) -> Response:
        _log.error("%s", error)
        return answer(503, str(error), "repository_damaged")

    @app.exception_handler(OperationalError)
    def _database(request: Request, error: OperationalError) -> Response:
        _log.error("%s %s: the database does not answer now: %s", request.method, request.url.path, error.orig)
        return answer(503, f"the database does not answer now ({error.orig}); try again later", "unavailable")

    @app.exception_handler(DataError)
    def _data(request: Request, error: DataError) -> Response:
        _log.info("%s %s: %s", request.method, request.url.path, error.orig)
        return answer(400, f"the database takes no such value: {error.orig}", "invalid")

    @app.exception_handler(OSError)
    def _disk(request: Request, error: OSError) -> Response:
        _log.error("%s %s: %s", request.method, request.url.path, error)
        if error.errno in NO_SPACE:
            return answer(507, "the server's disk is full; make space there and try again", "no_space")
        return answer(503, f"the server's disk refuses: {error.strerror}; its log says more", "unavailable")

    @app.exception_handler(Exception)
    def _bug(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed: %r", request.method, request.url.path, error)
        return answer(500, "the server failed at this request; its log says more", "internal")

    app.add_middleware(Frame, unlimited=unlimited)


class Frame:
    """Refuses bodies that are too large or of unknown length before it reads them, and those that do not come; adds headers."""

    def __init__(self, app: ASGIApp, unlimited: str | None) -> None:
        self._app, self._unlimited = app, unlimited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_headers(message, scope["path"])
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, _patient(receive, whole=not self._is_unlimited(scope)), framed)

    def _is_unlimited(self, scope: Scope) -> bool:
        return self._unlimited is not None and scope["path"].startswith(self._unlimited)

    def _refusal(self, scope: Scope) -> Response | None:
        if self._is_unlimited(scope):
            return None
        headers = dict(scope["headers"])
        if b"transfer-encoding" in headers:
            return answer(411, "say the length of the body (Content-Length)", "length_required")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > MAX_BODY_BYTES:
            return answer(413, f"a request here may have at most {MAX_BODY_BYTES} bytes", "too_large")
        return None


def _patient(receive: Receive, *, whole: bool) -> Receive:
    """`receive` that raises TooSlow while the body does not come: all of it in time, or of an upload each next piece."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + BODY_WITHIN_S
    complete = False

    async def received() -> Message:
        nonlocal complete
        if complete:
            return await receive()  # waits for the client to go, as long as it stays
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - clock()) if whole else STALL_S)
        except asyncio.TimeoutError:
            raise TooSlow from None
        complete = not message.get("more_body", False)
        return message

    return received


def _add_headers(message: MutableMapping[str, Any], path: str) -> None:
    present = {name.lower() for name, _ in message["headers"]}
    extra = dict(HEADERS)
    if path.startswith(("/api/", "/enrolment")) or path == "/record":
        extra[b"cache-control"] = b"no-store"
    message["headers"] = [*message["headers"], *((name, value) for name, value in extra.items() if name not in present)]
