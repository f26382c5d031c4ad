"""HTTP as the clients speak it: a message to send, an answer that arrives in pieces. No I/O here, so both clients share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_HEAD_BYTES = 64 * 1024
FIRST_BYTES = 16 * 1024
END_OF_HEAD = b"\r\n\r\n"


class NotHttp(Exception):
    """What answers does not speak HTTP."""


class Ended(Exception):
    """The connection ended. `started` tells whether a part of an answer had come."""

    def __init__(self, message: str, *, started: bool) -> None:
        super().__init__(message)
        self.started = started


@dataclass(frozen=True, slots=True)
class Message:
    """One request: its bytes in parts, and a descriptor that goes with the first of them."""

    parts: Sequence[bytes | memoryview]
    descriptor: int | None = None


class Answer:
    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], body: memoryview) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class AnswerReader:
    """Collects one answer: fill `room()`, say how much came with `came`, until that gives the Answer."""

    def __init__(self) -> None:
        self._first = bytearray(FIRST_BYTES)
        self._have = 0
        self._answer: Answer | None = None
        self._got = 0
        # The last head: the next one mostly has the same bytes.
        self._memo: tuple[bytes, int, dict[str, str], int] = (b"", 0, {}, 0)

    def room(self) -> memoryview:
        if self._answer is not None:
            return self._answer.body[self._got :]
        return memoryview(self._first)[self._have :]

    def came(self, count: int) -> Answer | None:
        """Raises: Ended (nothing came any more), NotHttp."""
        if count == 0:
            started = bool(self._have)
            raise Ended("the connection ended within an answer" if started else "it ended before an answer", started=started)
        if self._answer is None:
            self._have += count
            self._read_head()
        else:
            self._got += count
        answer = self._answer
        if answer is None or self._got < len(answer.body):
            return None
        self._have = self._got = 0
        self._answer = None
        return answer

    def _read_head(self) -> None:
        first = self._first
        raw, status, headers, size = self._memo
        if not raw or not first.startswith(raw):
            end = first.find(END_OF_HEAD, 0, self._have)
            if end < 0:
                if self._have == len(first):
                    if self._have >= MAX_HEAD_BYTES:
                        raise NotHttp("the answer's head does not end")
                    self._first = first + bytes(len(first))
                return
            raw = bytes(first[: end + len(END_OF_HEAD)])
            status, headers = _head(first[:end].decode("latin-1"))
            size = int(headers.get("content-length", "0"))
            self._memo = raw, status, headers, size
        elif self._have < len(raw):  # what stands there is of the answer before
            return
        at = len(raw)
        body = bytearray(size)
        self._got = min(self._have - at, size)
        body[: self._got] = memoryview(first)[at : at + self._got]
        self._answer = Answer(status, headers, memoryview(body))


def _head(text: str) -> tuple[int, dict[str, str]]:
    lines = text.split("\r\n")
    try:
        status = int(lines[0].split(" ", 2)[1])
    except (IndexError, ValueError):
        raise NotHttp(f"what answers at this socket does not speak HTTP: {lines[0][:40]!r}") from None
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return status, headers


def request(method: str, path: str, payload: bytes = b"", more: str = "") -> bytes:
    """A whole request; `more` are header lines."""
    return f"{method} {path} HTTP/1.1\r\nhost: edge-agent\r\n{more}content-length: {len(payload)}\r\n\r\n".encode() + payload


def unsent(parts: Sequence[bytes | memoryview], sent: int) -> list[memoryview]:
    """What is left of `parts` after the first `sent` bytes."""
    left = []
    for part in parts:
        if sent >= len(part):
            sent -= len(part)
            continue
        left.append(memoryview(part)[sent:])
        sent = 0
    return left
