"""Answers with what is read piece by piece from elsewhere: the whole, or the one stretch that a Range header asks for (RFC 9110)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fleet_server.storage.shelves import Opened

PIECE = 1024 * 1024
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def answer(request: Request, opened: Opened, headers: Mapping[str, str]) -> Response:
    """Closes `opened` when it was sent. Several stretches at once are not given; then the whole comes, as RFC 9110 allows."""
    wanted = stretch(request.headers.get("range", ""), opened.size)
    told = {**headers, "Accept-Ranges": "bytes"}
    if wanted is None:
        opened.close()
        return Response(status_code=416, headers={**told, "Content-Range": f"bytes */{opened.size}"})
    start, end = wanted
    told["Content-Length"] = str(end - start)
    whole = (start, end) == (0, opened.size)
    if not whole:
        told["Content-Range"] = f"bytes {start}-{end - 1}/{opened.size}"
    return StreamingResponse(_pieces(opened, start, end), 200 if whole else 206, told, "application/octet-stream")


def stretch(asked: str, size: int) -> tuple[int, int] | None:
    """From where to before where, of `size` bytes; None when there is nothing of what is asked for."""
    match = _RANGE.fullmatch(asked.replace(" ", ""))
    if match is None or match[1] == match[2] == "":
        return 0, size
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    if match[1] and match[2] and int(match[1]) > int(match[2]):
        return 0, size  # no range at all
    return (start, end) if start < end else None


def _pieces(opened: Opened, start: int, end: int) -> Iterator[bytes]:
    try:
        while start < end:
            data = opened.read(start, min(PIECE, end - start))
            if not data:
                raise OSError("what is sent became shorter meanwhile")
            start += len(data)
            yield data
    finally:
        opened.close()
