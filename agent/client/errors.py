"""What a client raises, by whose fault it is."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from agent.client.wire import Answer


class ClientError(Exception):
    """Root of what a client raises. `status` is the HTTP status, None when no answer came."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ModelNotFound(ClientError):
    """No such model, or no such version of it."""


class InputRejected(ClientError):
    """The inputs do not fit the model; the message names the input and says what was expected."""


class Forbidden(ClientError):
    """The peer may not do that; the message says where it is granted."""


class Unavailable(ClientError):
    """Not now: no server at the socket, the model is not ready, or it is overloaded. Trying again later may work."""


class TimedOut(Unavailable):
    """The answer did not come in time. Where no status is set, the request may still be running."""


class ServerFailed(ClientError):
    """The server or the model's engine failed on a request that it accepted."""


_EXPIRED = "Request timeout expired"
_KINDS: dict[int, type[ClientError]] = {403: Forbidden, 404: ModelNotFound, 503: Unavailable}


class _Said(msgspec.Struct):
    error: str
    code: str = ""


_said = msgspec.json.Decoder(_Said)


def said(answer: Answer) -> tuple[str, str]:
    """What an answer that is not 200 says, and the code it says it with."""
    try:
        document = _said.decode(answer.body)
    except msgspec.DecodeError:
        return f"status {answer.status}", ""
    return document.error, document.code


def error_of(answer: Answer) -> ClientError:
    text, _ = said(answer)
    kind = _KINDS.get(answer.status) or (ServerFailed if answer.status >= 500 else InputRejected)
    if kind is Unavailable and text.startswith(_EXPIRED):
        kind = TimedOut
    return kind(text, answer.status)


def document(answer: Answer) -> object:
    """The JSON of an answer that is 200.  Raises: ClientError."""
    if answer.status != 200:
        raise error_of(answer)
    return loads(answer.body)


def loads(text: bytes | memoryview) -> Any:
    """JSON, and what Triton and TensorFlow Serving write besides: NaN, Infinity and -Infinity.  Raises: ServerFailed for
    anything else.
    """
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        try:
            return json.loads(bytes(text))
        except ValueError:
            raise ServerFailed(f"the answer is not JSON: {error}") from error
