"""What a request is answered with. Nothing here knows a transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

JSON = b"application/json"
BINARY = b"application/octet-stream"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"

Buffer = Any  # bytes, memoryview or a C-contiguous NumPy array: whatever sendmsg takes


class Refusal(Exception):
    """A request that cannot be answered as asked. `status` is the HTTP status; `code` is for programs, the message for people."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = tuple(headers)

    def forget(self) -> Refusal:
        """Itself, without what led to it: that refers to bodies, tensors and clients' memory, and may to itself. So they go
        now, and not with the next collection.
        """
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


class Template:
    """The JSON part of an answer that is the same whenever its tensors have the same shapes. `wire` belongs to the transport."""

    __slots__ = ("json", "size_bytes", "wire")

    def __init__(self, json: bytes, size_bytes: int) -> None:
        self.json = json
        self.size_bytes = size_bytes
        self.wire: bytes | None = None


class Answer:
    """Parts are sent one after another. `json_bytes` is set when tensors follow a JSON part of that many bytes."""

    __slots__ = ("content_type", "headers", "json_bytes", "parts", "status")

    def __init__(
        self,
        parts: Sequence[Buffer] = (),
        *,
        status: int = 200,
        content_type: bytes = JSON,
        json_bytes: int | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self.parts = parts
        self.status = status
        self.content_type = content_type
        self.json_bytes = json_bytes
        self.headers = headers


class FilledTemplate(Answer):
    """A template with the tensors of one answer. Made for every prediction, so it computes the rest only when asked."""

    __slots__ = ("arrays", "template")
    status = 200
    content_type = BINARY
    headers = ()

    def __init__(self, template: Template, arrays: Sequence[Buffer]) -> None:
        self.template = template
        self.arrays = arrays

    @property
    def parts(self) -> Sequence[Buffer]:  # type: ignore[override]
        return (self.template.json, *self.arrays)

    @property
    def json_bytes(self) -> int:  # type: ignore[override]
        return len(self.template.json)


def json_answer(value: object, status: int = 200) -> Answer:
    return Answer((msgspec.json.encode(value),), status=status)


def refusal_answer(refusal: Refusal) -> Answer:
    body = {"error": str(refusal)}
    if refusal.code is not None:
        body["code"] = refusal.code
    return Answer((msgspec.json.encode(body),), status=refusal.status, headers=refusal.headers)
