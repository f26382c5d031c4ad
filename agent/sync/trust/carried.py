"""The documents that a poke carried, as one more way to the fleet's documents: verified like those of any other way."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from agent.contract import enrolment
from agent.contract.news import News
from agent.contract.reasons import Reason
from agent.sync.http import HttpStatus, TooLong
from agent.sync.trust.metadata import Documents

_ROOT = re.compile(rf"{enrolment.METADATA_PATH}([1-9][0-9]{{0,15}})\.root\.json")


class NotCarried(Exception):
    """A document that is needed did not come along, so the server has to be asked. Says which."""


class Carried:
    """`kept` are documents that this device verified before and that may still be right. `beside` is asked for what is neither
    carried nor kept; without it nothing is.

    Whether there is a newer root is what the poke says: whoever has the broker can conceal one, until the next look that no
    poke caused.
    """

    server_time: float | None = None

    def __init__(self, news: News, kept: Mapping[str, Callable[[], bytes | None]], beside: Documents | None = None) -> None:
        self.news = news
        self._kept = kept
        self._beside = beside

    def url(self, path: str) -> str:
        return f"poke:{path}"

    def get(self, url: str, *, limit_bytes: int, deadline_s: float) -> bytes:
        """Raises: HttpStatus, TooLong, Problem; NotCarried when it would have to be asked for and nobody may be."""
        path = url.removeprefix("poke:")
        data = self._here(path)
        if data is not None:
            if len(data) > limit_bytes:
                raise TooLong(Reason.ENDLESS_DATA, f"{url}: more than the {limit_bytes} bytes allowed")
            return data
        root = _ROOT.fullmatch(path)
        if root is not None and int(root[1]) > self.news.root:
            raise HttpStatus(404, f"the poke knows of no {path}")
        if self._beside is None:
            raise NotCarried(path)
        return self._beside.get(self._beside.url(path), limit_bytes=limit_bytes, deadline_s=deadline_s)

    def _here(self, path: str) -> bytes | None:
        carried = self.news.documents.get(path.removeprefix("/"))
        if carried is not None:
            return carried.encode()
        return self._kept[path]() if path in self._kept else None

    def close(self) -> None:
        return
