"""HTTP/1.1 heads: from bytes to a Head, and from an Answer to bytes. httptools reads; the rules about what is refused are here."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import httptools

from agent.serving import compression
from agent.serving.access import Access, WebRules
from agent.serving.answers import BINARY, Answer, Buffer, FilledTemplate, Refusal
from agent.serving.compression import Coding
from agent.serving.routes import Kind, Match, Route, Router

MAX_HEAD_BYTES = 16 * 1024
MAX_HEADERS = 100
MAX_TRACEPARENT = 64
OK = 200
_ONCE = (b"content-length", b"host")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_ALLOWED = (
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"content-type, content-encoding, inference-header-content-length"),
)  # what a page that may ask may send
_CORS = b"access-control-allow-origin: %s\r\naccess-control-expose-headers: inference-header-content-length\r\nvary: origin\r\n"
_PREFLIGHT = Match(Route("OPTIONS", "*", Access.NONE, lambda _: Answer(headers=_ALLOWED)))
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
_STATUS_LINES = {status: b"HTTP/1.1 %d %s\r\n" % (status, reason) for status, reason in _REASONS.items()}


class Head:
    """A request's head, read. The same bytes always give the same Head, so one may stand for later requests with these bytes."""

    __slots__ = (
        "bodiless", "chunked", "coding", "expects_continue", "header_length", "keep_alive", "length", "match", "minor", "origin",
        "plain", "raw", "size", "trace",
    )  # fmt: skip

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.size = len(raw)
        self.minor = 1
        self.length = 0
        self.chunked = False
        self.header_length: int | None = None
        self.keep_alive = True
        self.expects_continue = False
        self.bodiless = False  # the answer to HEAD has no body
        self.coding: Coding | None = None
        self.trace = b""  # the caller's traceparent
        self.origin = b""  # the web page that asks and may
        self.plain = True  # the answer needs no header and no treatment because of this head
        self.match = Match(None)


class BadRequest(Exception):
    """The bytes are not a request that can be answered and followed by another one: answer `refusal`, then close."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, message)


class HeadReader:
    """Reads one head, fed in pieces: what is wrong is found out as soon as it arrives, not when the head is complete."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._fields: dict[bytes, bytes] = {}
        self._count = 0
        self._twice = b""  # a field that came twice and may not
        self.fed = 0  # bytes of the head that were given to the parser

    # httptools calls these
    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._count += 1
        if name in self._fields:
            if name in _ONCE:
                self._twice = name
            value = self._fields[name] + b", " + value
        self._fields[name] = value

    def feed(self, data: memoryview) -> None:
        """Raises: BadRequest."""
        self.fed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # an offer to speak something else; HTTP/1.1 goes on
        except httptools.HttpParserError as error:
            raise BadRequest(400, f"this is not an HTTP/1.1 request: {error}") from error
        if self._twice:
            raise BadRequest(400, f"the request has header {_shown(self._twice)} twice")
        if self._count > MAX_HEADERS:
            raise BadRequest(431, f"the request has more than {MAX_HEADERS} headers")

    def finish(self, raw: bytes, router: Router, web: WebRules | None = None) -> Head:
        """The complete head, whose bytes are `raw`; `web` are the rules of a port that browsers reach.  Raises: BadRequest."""
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise BadRequest(505, f"HTTP/{version} is not spoken here: use HTTP/1.1")
        head = Head(raw)
        head.minor = int(version[-1])
        self._framing(head)
        head.trace = self._fields.get(b"traceparent", b"")[:MAX_TRACEPARENT]
        method = self._parser.get_method()
        head.bodiless = method == b"HEAD"
        head.match = router.resolve(method, _path(self._url))
        if head.minor and b"host" not in self._fields:
            raise BadRequest(400, "the request has no Host header: HTTP/1.1 wants one, whatever it says")
        refusal = head.match.refusal or self._header_length(head) or self._coding(head) or self._expectation(head)
        if web is not None:
            blocked = web.check(self._fields)
            if blocked is None and b"origin" in self._fields:
                head.origin = self._fields[b"origin"]
                if method == b"OPTIONS":  # a browser asks whether its page may ask
                    head.match, refusal = _PREFLIGHT, None
            refusal = blocked or refusal
        if refusal is not None:
            head.match = Match(None, refusal=refusal)
        head.plain = bool(head.minor) and not head.origin and (head.coding is None or head.coding.answer is None)
        return head

    def _framing(self, head: Head) -> None:
        fields = self._fields
        connection = [option.strip() for option in fields.get(b"connection", b"").lower().split(b",")]
        head.keep_alive = b"close" not in connection and (bool(head.minor) or b"keep-alive" in connection)
        coding = fields.get(b"transfer-encoding")
        if coding is not None:
            if coding.lower() != b"chunked" or not head.minor:
                raise BadRequest(501, f"transfer encoding {_shown(coding)} is not supported: send chunked or a content length")
            head.chunked = True
        else:
            head.length = int(fields.get(b"content-length", b"0"))  # the parser has checked that it is a number
        head.expects_continue = bool(head.minor) and fields.get(b"expect", b"").lower() == b"100-continue"

    def _header_length(self, head: Head) -> Refusal | None:
        value = self._fields.get(b"inference-header-content-length")
        if value is None:
            return None
        if not value.isdigit() or len(value) > 18:
            return Refusal(400, f"Inference-Header-Content-Length is {_shown(value)}; expected a number of bytes")
        head.header_length = int(value)
        return None

    def _expectation(self, head: Head) -> Refusal | None:
        value = self._fields.get(b"expect")
        if not value or head.expects_continue or not head.minor or value.lower() == b"100-continue":
            return None
        return Refusal(417, f"expectation {_shown(value)} is not known: there is 100-continue")

    def _coding(self, head: Head) -> Refusal | None:
        try:
            body = compression.request_coding(self._fields.get(b"content-encoding"))
        except Refusal as refusal:
            return refusal
        route = head.match.route
        try:
            answer, must = compression.answer_coding(self._fields.get(b"accept-encoding"))
        except Refusal as refusal:
            return refusal
        # Of other answers none is packed unasked: tritonclient's asyncio client says that it takes them so, and cannot read
        # them.
        if route is None or (route.kind not in (Kind.PREDICT, Kind.HEAVY) and not must):
            answer = None
        if body or answer:
            head.coding = Coding(body, answer, must=must)
        return None


def _shown(value: bytes) -> str:
    return repr(value[:64].decode("ascii", "replace"))


def _path(target: bytes) -> bytes:
    """The path and query of a request target, which a proxy's client may send as a whole URL."""
    if target.startswith(b"/") or target == b"*":
        return target
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError as error:
        raise BadRequest(400, f"the request target {_shown(target)} is not a path") from error
    path: bytes = url.path or b"/"
    return path + b"?" + url.query if url.query else path


def encode(answer: Answer, head: Head | None, *, keep_alive: bool) -> tuple[Sequence[Buffer], int]:
    """The buffers to send for `answer` and their size in bytes. `head` is None when the request's own could not be read."""
    if type(answer) is FilledTemplate and keep_alive and head is not None and head.plain:
        template = answer.template
        wire = template.wire
        if wire is None:
            wire = template.wire = _head_bytes(answer, template.size_bytes, b"") + template.json
        return [wire, *answer.arrays], len(wire) + template.size_bytes - len(template.json)
    parts = answer.parts
    size = sum([_size(part) for part in parts])
    more = b"" if keep_alive and (head is None or head.minor) else _connection(keep_alive=keep_alive)
    if head is not None and not head.plain:
        if head.origin:
            more += _CORS % head.origin
        coding = head.coding
        if (
            coding is not None
            and coding.answer is not None
            and size
            and (coding.must or (size >= compression.USEFUL_BYTES and answer.status == OK))
        ):
            packed = compression.deflate(parts, coding.answer)
            if coding.must or len(packed) < size:
                parts, size = (packed,), len(packed)
                more += b"content-encoding: %s\r\nvary: accept-encoding\r\n" % coding.answer
    start = _head_bytes(answer, size, more)
    if head is not None and head.bodiless:
        return (start,), len(start)
    return (start, *parts), len(start) + size


def _head_bytes(answer: Answer, size: int, more: bytes) -> bytes:
    lines = [_STATUS_LINES[answer.status]]
    if size:
        lines.append(b"content-type: %s\r\n" % answer.content_type)
    if answer.json_bytes is not None and answer.content_type == BINARY:
        lines.append(b"inference-header-content-length: %d\r\n" % answer.json_bytes)
    lines.extend(b"%s: %s\r\n" % header for header in answer.headers)
    lines.append(b"%scontent-length: %d\r\n\r\n" % (more, size))
    return b"".join(lines)


def _connection(*, keep_alive: bool) -> bytes:
    return b"connection: keep-alive\r\n" if keep_alive else b"connection: close\r\n"


def _size(part: Any) -> int:
    return len(part) if isinstance(part, bytes) else int(part.nbytes)
