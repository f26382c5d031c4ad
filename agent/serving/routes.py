"""Which request goes where: method and path → route, and what a peer needs to use it. Knows no transport and no handler's work."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from urllib.parse import unquote_to_bytes

from agent.serving.access import Access
from agent.serving.allowance import Allowance
from agent.serving.answers import Answer, Refusal
from agent.serving.compression import Coding
from agent.serving.scheduling.lanes import Caller
from agent.serving.shared.regions import ConnectionRegions

MAX_CACHED_URLS = 1024
WHOLE_SERVER = (b"*", b"/")  # what OPTIONS may name besides a resource
_PLACEHOLDER = re.compile(r"\{(\w+)(?::(.+))?\}(:\w+)?")


class Kind(Enum):
    """Who answers. QUICK: the thread that polls. PREDICT: it or another one, as the model costs. HEAVY: never the one that
    polls. CONTROL: the control thread.
    """

    QUICK = "quick"
    PREDICT = "predict"
    HEAVY = "heavy"
    CONTROL = "control"


class Pace(Enum):
    """How far the thread that has a prediction's request may go with it at once."""

    RUN = "run"
    READ = "read"  # others wait: it is read and then waits with them
    PARK = "park"  # this thread has others to attend: it waits, and no more of it is read than takes nothing


_RUN = Pace.RUN  # looking a member up at its class takes as long as all else that a Request does


class Request:
    """A complete request. `body` is valid until its answer is sent; `arrived_s` is a perf_counter.

    It may come to stand for the connection's next request, when all bytes but those of the tensors are the same and lie in the
    same place.
    """

    __slots__ = (
        "allowance", "arrived_s", "body", "coding", "header_length", "known", "match", "pace", "plan", "regions", "seat", "strays", "trace",
    )  # fmt: skip

    def __init__(
        self,
        match: Match,
        body: memoryview,
        header_length: int | None,
        arrived_s: float,
        regions: ConnectionRegions | None = None,
        coding: Coding | None = None,
    ) -> None:
        self.match = match
        self.body = body
        self.header_length = header_length
        self.arrived_s = arrived_s
        self.regions = regions  # memory that the client shares; None where it cannot
        self.coding = coding  # of a body that is still compressed, or of the answer; None for neither
        self.allowance: Allowance | None = None  # what may be made of the body
        self.pace = _RUN
        self.trace = b""  # the caller's traceparent
        self.strays = False  # the tensors in the body do not begin where vector instructions like it
        # What whoever answers made of all but the tensors, if it holds for any tensors in this place.
        self.known: Any = None
        self.plan: Any = None  # the same of its JSON alone, which holds wherever the tensors are
        self.seat: Caller | None = None  # who is given the answer of a prediction that waits; None: the thread waits for it

    @property
    def params(self) -> Mapping[str, str]:
        return self.match.params


Handler = Callable[[Request], Answer]
Parking = Callable[[Request], Answer | None]  # None: the answer comes later, to the request's seat


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table. A pattern's `{name}` is one path segment, percent-decoded; `{name:regex}` restricts it. A route for
    GET answers HEAD, too.

    A verb, as in `{name}:predict`, is not part of the value, and the name of a model has no colon: `{model}` alone takes no
    verb.
    """

    method: str
    pattern: str
    access: Access
    handler: Handler | Parking
    kind: Kind = Kind.QUICK
    parks: bool = False  # whether the handler minds the request's pace
    _segments: tuple[tuple[str, re.Pattern[str] | None], ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_segments", tuple(_segment(s) for s in self.pattern.split("/")))

    def match(self, segments: Sequence[str]) -> dict[str, str] | None:
        """The values of the placeholders, None when the path is another one."""
        if len(segments) != len(self._segments):
            return None
        params: dict[str, str] = {}
        for (name, pattern), segment in zip(self._segments, segments, strict=True):
            if pattern is None:
                if name != segment:
                    return None
                continue
            found = pattern.fullmatch(segment)
            if found is None:
                return None
            params[name] = found["value"]
        return params


def _segment(text: str) -> tuple[str, re.Pattern[str] | None]:
    placeholder = _PLACEHOLDER.fullmatch(text)
    if placeholder is None:
        return text, None
    end = re.escape(placeholder[3] or "")
    usual = "[^:]+" if placeholder[1] == "model" else ".+"
    return placeholder[1], re.compile(f"(?P<value>{placeholder[2] or usual}){end}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Match:
    """A route with the values of its placeholders, or the refusal that the request is answered with."""

    route: Route | None
    params: Mapping[str, str] = field(default_factory=dict)
    query: str = ""
    refusal: Refusal | None = None
    model: str | None = None
    version: str | None = None


class Router:
    """Looks routes up by the bytes of the request line; what was found once is remembered."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._found: dict[tuple[bytes, bytes], Match] = {}

    def resolve(self, method: bytes, target: bytes) -> Match:
        """`target` is a path with an optional query, percent-encoded."""
        key = (method, target)
        found = self._found.get(key)
        if found is None:
            found = self._search(method.decode("ascii", "replace"), target)
            if len(self._found) >= MAX_CACHED_URLS:
                self._found.clear()
            self._found[key] = found
        return found

    def _search(self, method: str, target: bytes) -> Match:
        path, _, query = target.partition(b"?")
        try:
            segments = [unquote_to_bytes(segment).decode() for segment in path.split(b"/")]
        except UnicodeDecodeError:
            return Match(None, refusal=Refusal(400, "the path is not UTF-8 after percent-decoding"))
        wanted = "GET" if method == "HEAD" else method  # whose answer goes without its body
        allowed: set[str] = set()
        for route in self.routes:
            params = route.match(segments)
            if params is None:
                continue
            if route.method == wanted:
                query_text = query.decode("ascii", "replace")
                return Match(route, params, query_text, model=params.get("model"), version=params.get("version"))
            allowed.add(route.method)
        if method == "OPTIONS" and path in WHOLE_SERVER:
            allowed = {route.method for route in self.routes}
        if allowed:
            allow = (b"allow", ", ".join(sorted(allowed | {"OPTIONS"} | ({"HEAD"} if "GET" in allowed else set()))).encode())
            if method == "OPTIONS":
                return Match(
                    Route("OPTIONS", target.decode("ascii", "replace"), Access.NONE, lambda _: Answer(headers=(allow,)))
                )
            return Match(None, refusal=Refusal(405, "Method Not Allowed", headers=(allow,)))
        return Match(None, refusal=Refusal(404, "Not Found"))
