"""The HTTPS application that the nodes of a RabbitMQ cluster ask about who connects. It answers nobody else: a node shows the certificate
that was made for it (`node_files`), and it runs on a listener of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import anyio.to_thread
from cryptography import x509
from starlette.types import Receive, Scope, Send

from fleet_server.broker.authorization import Authorization, Question
from fleet_server.devices import pki

_log = logging.getLogger(__name__)

ROOT = "/broker/"
KINDS = ("user", "vhost", "resource", "topic")
MAX_BYTES, MAX_FIELDS = 16 * 1024, 64
ALLOW, DENY = b"allow", b"deny"
_CERTIFICATE, _CONNECTION, _NODE = "client_certificate_der", "connection", "is_node"  # as the listener leaves them in the state


class Questions:
    """An ASGI application. A question about a user reads the database, in a thread; all others are answered from names alone."""

    def __init__(self, may: Authorization) -> None:
        self._answers: dict[str, tuple[Callable[[Question], bool], bool]] = {
            "user": (may.user, True), "vhost": (may.vhost, True), "resource": (may.resource, False), "topic": (may.topic, False),
        }  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        kind = scope["path"].removeprefix(ROOT)
        if not _is_node(scope.get("state", {})):
            await _say(send, 403, b"this listener answers the nodes of the broker")
        elif scope["method"] != "POST" or kind not in self._answers:
            await _say(send, 404, b"there is no such question")
        elif (body := await _body(receive)) is None:
            await _say(send, 413, b"the question is too long")
        else:
            await self._answer(kind, body, send)

    async def _answer(self, kind: str, body: bytes, send: Send) -> None:
        answer, waits = self._answers[kind]
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=True, max_num_fields=MAX_FIELDS)
            asked = dict(pairs)
            allowed = len(asked) == len(pairs) and (await anyio.to_thread.run_sync(answer, asked) if waits else answer(asked))
        except ValueError:
            await _say(send, 400, b"the question cannot be read")
        except Exception:  # noqa: BLE001 - whatever it was, nobody is let in by it
            _log.exception("a question of the broker could not be answered; whoever it was about is refused")
            await _say(send, 503, b"the server cannot tell now")
        else:
            await _say(send, 200, ALLOW if allowed else DENY)


def _is_node(state: dict[str, Any]) -> bool:
    """Whether a node's certificate that is good now made the connection; looked at once for each."""
    kept: dict[str, Any] = state.get(_CONNECTION, {})
    if _NODE not in kept:
        der = state.get(_CERTIFICATE)
        kept[_NODE] = der is not None and pki.is_broker_node(x509.load_der_x509_certificate(der))
    return bool(kept[_NODE])


async def _body(receive: Receive) -> bytes | None:
    """None when it is too long, or does not come to its end."""
    found = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        found += bytes(message.get("body", b""))
        if len(found) > MAX_BYTES:
            return None
        if not message.get("more_body"):
            return found


async def _say(send: Send, status: int, words: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(words)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words})
