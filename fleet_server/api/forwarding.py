"""What an API process does not do itself: it hands changes on to the leader, whole, and the leader's answer back.

Read here, done there: who asks is looked up here first, so that strangers are answered here and reach nobody; the leader looks again.
What needs neither a key nor a decision stays here: files of releases, which go to the object store, and browser sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.contract.codec import ContractError, decode
from agent.contract.enrolment import ENROL_PATH, RENEW_PATH, RenewalRequest
from fleet_server.access import Access
from fleet_server.api import http
from fleet_server.api.device import MAX_RENEWAL_BYTES
from fleet_server.api.leader import KEY, NoLeader, ToLeader, Unanswered
from fleet_server.api.operator.routes import API, authenticate
from fleet_server.api.tls import CERTIFICATE
from fleet_server.errors import Denied, FleetError

HERE = (f"{API}/blobs/", f"{API}/session")
"""Changes that this process makes itself."""

T = TypeVar("T")


class Forwarding:
    """An ASGI application before the operators'."""

    def __init__(self, app: ASGIApp, access: Access, leader: ToLeader) -> None:
        self._app, self._access, self._leader = app, access, leader
        self._framed = http.Frame(self._forward, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and await self._is_for_leader(scope):
            await self._framed(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _is_for_leader(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if scope["method"] in {"GET", "HEAD", "OPTIONS"} or path.startswith(HERE):
            return False
        if path == ENROL_PATH:
            return True
        if not path.startswith(f"{API}/"):
            return False
        try:
            await asyncio.to_thread(authenticate, self._access, Request(scope))
        except Denied:
            return False  # told so here
        except Exception:  # noqa: BLE001 - the database does not answer, perhaps: told so here
            return False
        return True

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except HTTPException as slow:
            await http.answer(slow.status_code, str(slow.detail), "too_slow")(scope, receive, send)
            return
        target = scope["raw_path"].decode("ascii")
        if scope["query_string"]:
            target += f"?{scope['query_string'].decode('ascii')}"
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        client = scope.get("client")
        headers["x-forwarded-for"] = client[0] if client else ""
        headers["x-forwarded-proto"] = scope["scheme"]
        try:
            answer = await self._in_thread(self._leader.ask, scope["method"], target, headers, body)
        except (NoLeader, Unanswered) as error:
            told = http.answer(503, str(error), error.code)
            if isinstance(error, Unanswered):
                told.headers[KEY] = error.key
            await told(scope, receive, send)
            return
        try:
            fields = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
            await send({"type": "http.response.start", "status": answer.status, "headers": fields})
            chunks = answer.chunks()
            while (chunk := await self._in_thread(_next, chunks)) is not None:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            answer.close()

    async def _in_thread(self, action: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._leader.threads, action, *given)


class RenewalsForwarded:
    """An ASGI application before the devices': a new certificate is the leader's to give."""

    def __init__(self, app: ASGIApp, leader: ToLeader) -> None:
        self._app, self._leader = app, leader
        self._framed = http.Frame(self._forward, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        mine = scope["type"] == "http" and scope["path"] == RENEW_PATH and scope["method"] == "POST"
        await (self._framed if mine else self._app)(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        shown = scope["state"].get(CERTIFICATE)
        try:
            wanted = decode(await Request(scope, receive).body(), RenewalRequest, limit_bytes=MAX_RENEWAL_BYTES)
            loop = asyncio.get_running_loop()
            data = await loop.run_in_executor(self._leader.threads, self._leader.renewed, shown or b"", wanted)
        except ContractError as error:
            told = http.answer(400, str(error), "invalid")
        except HTTPException as slow:
            told = http.answer(slow.status_code, str(slow.detail), "too_slow")
        except FleetError as error:
            status = next((status for kind, status in http.STATUS.items() if isinstance(error, kind)), 500)
            told = http.answer(status, str(error), error.code)
        else:
            told = http.json(data)
        await told(scope, receive, send)


def _next(chunks: Iterator[bytes]) -> bytes | None:
    return next(chunks, None)
