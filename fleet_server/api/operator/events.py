"""Routes about what happened and who changed what: events, the live stream, the audit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response, StreamingResponse

from fleet_server.access import Access, Role
from fleet_server.api.operator.routes import Limit, Raw, Route, Seq, actor_of, authenticate
from fleet_server.errors import Denied, TooOften
from fleet_server.journal import AuditView, EventView, Journal
from fleet_server.live import Change, Hub

STREAM = "text/event-stream"
STREAM_KEEPALIVE_S = 15.0  # also how long a token that was revoked still reads


class Parts(Protocol):
    access: Access
    hub: Hub
    journal: Journal


def events(
    parts: Parts, after: Seq = None, before: Seq = None, limit: Limit = 100, device: str | None = None
) -> list[EventView]:
    """Lists what happened, in the order it was received; without `after` the newest ones."""
    return parts.journal.events(after=after, before=before, limit=limit, device=device)


async def stream(parts: Parts, request: Request, after: Seq = None) -> Response:
    """Server-sent events: `event` for what happened, `change` for what should be read again. Resumes by Last-Event-ID."""
    last = request.headers.get("last-event-id", "")
    if last.isascii() and last.isdigit() and len(last) < 19:
        after = int(last)
    if parts.hub.crowded(actor_of(request).token):
        raise TooOften(
            "this access token reads events along as often as it may; end another stream first", after_s=STREAM_KEEPALIVE_S
        )
    return StreamingResponse(_follow(parts, request, after), media_type=STREAM, headers={"X-Accel-Buffering": "no"})


def audit(parts: Parts, before: Seq = None, limit: Limit = 100) -> list[AuditView]:
    """Lists who changed what, newest first."""
    return parts.journal.audited(before=before, limit=limit)


async def _follow(parts: Parts, request: Request, after: int | None) -> AsyncIterator[str]:
    with parts.hub.reader(actor_of(request).token) as reader:
        yield "retry: 1000\n\n"
        seen = -1 if after is None else after
        while after is not None and (missed := await asyncio.to_thread(parts.journal.events, after=seen, limit=1000)):
            for event in missed:
                yield _message(event)
            seen = missed[-1].seq
        while True:
            try:
                message = await asyncio.wait_for(reader.get(), STREAM_KEEPALIVE_S)
            except asyncio.TimeoutError:
                if not await asyncio.to_thread(_still_allowed, parts.access, request):
                    return
                yield ": still here\n\n"
                continue
            if message is None:
                return
            if isinstance(message, Change) or message.seq > seen:
                yield _message(message)


def _message(message: EventView | Change) -> str:
    data = msgspec.json.encode(message).decode()
    return (
        f"event: change\ndata: {data}\n\n"
        if isinstance(message, Change)
        else f"id: {message.seq}\nevent: event\ndata: {data}\n\n"
    )


def _still_allowed(access: Access, request: Request) -> bool:
    try:
        authenticate(access, request)
    except Denied:
        return False
    return True


ROUTES = (
    Route("GET", "/events", events, Role.VIEWER),
    Route("GET", "/events/stream", stream, Role.VIEWER, answer=Raw(STREAM, {"type": "string"})),
    Route("GET", "/audit", audit, Role.OPERATOR),
)
