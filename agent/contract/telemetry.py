"""How models do on a device, in numbers from which nothing of a request can be told.

Signed with the device's key, as state reports are, with a counter that only grows; so none of it can be forged, and none counted twice. Each
message is about the time since the one before: one that is lost leaves a gap, and nothing has to be put right.

Everything is a count, so figures of several messages, devices or hours are added up exactly. A latency counts in one of the bins whose
bounds grow by a ninth (eight to an octave): the median of any sum of them is known to about 2 %. Classes above the number that is kept
count with the one that they are equal to modulo that number: the same everywhere, so that sums stay exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from agent.contract import names
from agent.contract.codec import FORMAT, Document, encode, require_format

TELEMETRY_PAYLOAD_TYPE = "application/vnd.edge-agent.telemetry+json"
"""The DSSE payload type of a signed Telemetry."""

MAX_TELEMETRY_BYTES = 64 * 1024
MAX_FIGURES = 128
MAX_SECONDS = 7 * 86400.0
MAX_COUNT = 2**40

BINS_PER_OCTAVE = 8
LAST_BIN = 27 * BINS_PER_OCTAVE
"""Latencies from a microsecond to two minutes; shorter ones count in the first bin, longer ones in the last."""

CLASSES = 32
CONFIDENCES = 10

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]


class Figures(Document, frozen=True, kw_only=True, omit_defaults=True):
    """What one release of a model did.

    `ok`: requests that were answered; `invalid`, `run`, `unavailable`: that failed by their own fault, in the engine, because the model was
    not there. `latency`: bin → answered requests. Of a sample of the answers: `rows`, and `unusable` of them, which have a value that is
    no number; of the others `classes`: class → rows in which it is the best one, and `confidence`: tenth → rows in which its score is
    within it. While it shadows: `compared` answers, of which `differ`.
    """

    ok: Count = 0
    invalid: Count = 0
    run: Count = 0
    unavailable: Count = 0
    latency: dict[Annotated[int, Meta(ge=0, le=LAST_BIN)], Count] = {}
    rows: Count = 0
    unusable: Count = 0
    classes: dict[Annotated[int, Meta(ge=0, lt=CLASSES)], Count] = {}
    confidence: dict[Annotated[int, Meta(ge=0, lt=CONFIDENCES)], Count] = {}
    compared: Count = 0
    differ: Count = 0

    def __post_init__(self) -> None:
        usable = self.rows - self.unusable
        if sum(self.latency.values()) != self.ok:
            raise ValueError(f"{self.ok} requests were answered, and {sum(self.latency.values())} latencies are told")
        if usable < 0 or self.differ > self.compared:
            raise ValueError("more rows are unusable, or more answers differ, than there are")
        if not {sum(self.classes.values()), sum(self.confidence.values())} <= {0, usable}:
            raise ValueError(f"classes or confidences do not add up to the {usable} usable rows")

    def __bool__(self) -> bool:
        """Whether anything was done."""
        return bool(self.requests or self.rows or self.compared)

    @property
    def requests(self) -> int:
        """All but those that failed by their own fault."""
        return self.ok + self.errors

    @property
    def errors(self) -> int:
        return self.run + self.unavailable

    def plus(self, other: Figures) -> Figures:
        found: dict[str, Any] = {}
        for name in self.__struct_fields__:
            mine, others = getattr(self, name), getattr(other, name)
            found[name] = _sum(mine, others) if isinstance(mine, dict) else mine + others
        return Figures(**found)

    def minus(self, before: Figures) -> Figures:
        """What was added since `before`, of the same counters.  Raises: ValueError when they are not."""
        found: dict[str, Any] = {}
        for name in self.__struct_fields__:
            now, then = getattr(self, name), getattr(before, name)
            found[name] = more = _difference(now, then) if isinstance(now, dict) else now - then
            if (min(more.values(), default=0) if isinstance(more, dict) else more) < 0:
                raise ValueError(f"{name} has become less")
        return Figures(**found)


class ModelFigures(Document, frozen=True, kw_only=True):
    """The figures of one release of a model."""

    model: str
    release: Annotated[int, Meta(ge=0, le=names.MAX_VERSION)]
    figures: Figures

    def __post_init__(self) -> None:
        names.check_model(self.model)


class MachineFigures(Document, frozen=True, kw_only=True, omit_defaults=True):
    """How the machine does at the moment. `throttled`: whether the kernel slows its processors down for their heat."""

    memory_bytes: Count = 0
    memory_free_bytes: Count = 0
    load: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    celsius: Annotated[float, Meta(ge=-100, le=300)] | None = None
    throttled: bool = False
    serve_restarts: Count = 0


class Telemetry(Document, frozen=True, kw_only=True):
    """What a device did in the `seconds` up to `at`."""

    device: str
    counter: int
    at: float
    seconds: Annotated[float, Meta(gt=0, le=MAX_SECONDS)]
    figures: Annotated[tuple[ModelFigures, ...], Meta(max_length=MAX_FIGURES)] = ()
    machine: MachineFigures | None = None
    kind: Literal["telemetry"] = "telemetry"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "telemetry")
        names.check(names.DEVICE_ID, self.device, "device id")
        if len({(one.model, one.release) for one in self.figures}) < len(self.figures):
            raise ValueError("telemetry tells of one release twice")


def packed(telemetry: Telemetry) -> bytes:
    """Its canonical bytes."""
    return encode(msgspec.to_builtins(telemetry, str_keys=True))


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What `serve` has counted of a release since it began to count. `begun`: a word of that beginning; another one counts from 0."""

    model: str
    release: int
    begun: str
    figures: Figures


class ServeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """All that one process of `serve` has counted."""

    instance: str
    counters: tuple[Counters, ...] = ()


def _sum(one: Mapping[int, int], other: Mapping[int, int]) -> dict[int, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in sorted({*one, *other})}


def _difference(one: Mapping[int, int], other: Mapping[int, int]) -> dict[int, int]:
    return {key: more for key in sorted({*one, *other}) if (more := one.get(key, 0) - other.get(key, 0))}


def median_ms(latency: Mapping[int, int]) -> float | None:
    """The median of latencies by their bins, as if those of a bin were evenly within it; None without any."""
    half, below = sum(latency.values()) / 2, 0
    for at in sorted(latency):
        if latency[at] and below + latency[at] >= half:
            return float(2.0 ** ((at + (half - below) / latency[at]) / BINS_PER_OCTAVE)) / 1e3
        below += latency[at]
    return None


def shares_apart(one: Mapping[int, int], other: Mapping[int, int]) -> float:
    """How far two mixes are from each other: the share that would have to change (0 to 1); 0 when one of them is empty."""
    all_one, all_other = sum(one.values()), sum(other.values())
    if not all_one or not all_other:
        return 0.0
    return sum(abs(one.get(key, 0) / all_one - other.get(key, 0) / all_other) for key in {*one, *other}) / 2
