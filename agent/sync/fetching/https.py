"""Blobs over HTTP: the fleet server's device listener, mirrors of it, and neighbours on the local network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import requests

from agent.contract import enrolment
from agent.contract.reasons import Reason
from agent.sync.fetching.sources import NotHere, Reader
from agent.sync.http import FleetHttp, HttpStatus
from agent.sync.problems import Problem

NEIGHBOUR_PLACE, WEB_PLACE = 20, 30
"""Neighbours before the internet."""

LARGE_BYTES = 16 * 1024 * 1024
SENT = 307
"""The status of a server that sends us elsewhere for this file, this once."""

GATHER_BYTES = 64 * 1024
"""Of stretches from LARGE_BYTES on, whose blocks are about as large: what is read and not yet written when the power goes is
fetched again."""


class HttpBlobs:
    """Blobs of a server that answers `GET /blobs/<sha256>` with Range. A connection for each blob, since several models may
    download at once.
    """

    metered = True

    def __init__(
        self, connect: Callable[[], FleetHttp], *, name: str = "the fleet server", place: int = WEB_PLACE, final: bool = True,
        elsewhere: Callable[[str], FleetHttp] | None = None,
    ) -> None:  # fmt: skip
        """`elsewhere`: a connection to where the server may send us for a file, such as an object store; without it, it may not."""
        self._connect, self._elsewhere = connect, elsewhere
        self.name = name
        self.place = place
        self.final = final

    @contextlib.contextmanager
    def open(self, sha256: str) -> Iterator[Reader]:
        with contextlib.ExitStack() as stack:
            http = self._connect()
            stack.callback(http.close)
            url = http.url(enrolment.BLOBS_PATH + sha256)
            others: dict[str, FleetHttp] = {}
            """Connections to elsewhere, by their beginnings: the server names the place anew for each stretch."""

            @contextlib.contextmanager
            def answer(headers: dict[str, str]) -> Iterator[tuple[FleetHttp, requests.Response]]:
                with http.open(
                    url, headers=headers, accept=(200, 206) if self._elsewhere is None else (200, 206, SENT)
                ) as response:
                    if response.status_code != SENT:
                        yield http, response
                        return
                    place = str(response.headers.get("Location", ""))
                if not place.startswith("https://"):  # bytes are judged by their hash, but nobody else need see them
                    raise Problem(Reason.DOWNLOAD_FAILED, f"{url}: the server sends us to {place[:200]!r}, which is not https")
                base = "/".join(place.split("/", 3)[:3])
                if base not in others:
                    assert self._elsewhere is not None
                    others[base] = self._elsewhere(base)
                    stack.callback(others[base].close)
                with others[base].open(place, headers=headers, accept=(200, 206)) as response:
                    yield others[base], response

            @contextlib.contextmanager
            def read(start: int, end: int) -> Iterator[tuple[int, Iterator[bytes]]]:
                try:
                    with answer({"Range": f"bytes={start}-{end - 1}"}) as (used, response):
                        if response.raw.length_remaining is None:  # a length that comes piece by piece may never have come
                            raise Problem(Reason.DOWNLOAD_FAILED, f"{url}: the server does not say how long its answer is")
                        resumed = response.status_code == 206
                        if resumed and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
                            raise Problem(Reason.DOWNLOAD_FAILED, f"{url}: the server sent another range than was asked for")
                        gather = GATHER_BYTES if end - start >= LARGE_BYTES else 0
                        yield (start if resumed else 0), used.chunks(response, deadline_s=float("inf"), gather_bytes=gather)
                except HttpStatus as problem:
                    if problem.status in (404, 416):  # 416: it has fewer bytes, so they are not this blob's
                        raise NotHere(problem.message) from problem
                    raise

            yield read
