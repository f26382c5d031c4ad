"""What the two ends of a trial say to each other: a request as one JSON line, then JSON lines of progress and one verdict.

The same bytes go through a child's pipes and through the socket of `edge-agent-trial@.service`. Small imports only.
"""

from __future__ import annotations

import msgspec

from agent.contract.acceptance import Close, Top1
from agent.contract.codec import Document
from agent.contract.manifest import Picture, Scalar, Serving, Tensor
from agent.contract.reasons import Reason

MAX_REQUEST_BYTES = 4 * 1024 * 1024
MAX_REPLY_BYTES = 1024 * 1024


class Case(Document, frozen=True, kw_only=True):
    """A golden case with its files found."""

    name: str
    inputs: str
    expected: str
    compare: dict[str, Close | Top1]
    signature: str = ""


class Limits(Document, frozen=True, kw_only=True):
    """`max_*` are the publisher's acceptance; the others are what the process may take before it is stopped."""

    memory_bytes: int
    cpu_s: int
    wall_s: float | None = None
    max_p95_ms: float | None = None
    max_memory_bytes: int | None = None


class Request(Document, frozen=True, kw_only=True):
    """A trial to do. Paths are absolute."""

    release: str
    runtime: str
    model: str
    limits: Limits
    data: dict[str, str] = {}
    """The other files of the model, by the name that it has for each."""
    libraries: tuple[str, ...] = ()
    """With operators for the engine."""
    options: dict[str, Scalar] = {}
    serving: Serving = Serving()
    state: dict[str, str] = {}
    picture: Picture | None = None
    threads: int = 1
    priority: int = 100
    """Of the trials that wait, the smallest number goes first."""
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    cases: tuple[Case, ...] = ()


class Progress(Document, frozen=True, kw_only=True, tag_field="kind", tag="progress"):
    """What the trial is doing now; the last one before a death says where it died."""

    step: str


class Verdict(Document, frozen=True, kw_only=True, tag_field="kind", tag="verdict"):
    """The end. `reason` is None when the release passed."""

    reason: Reason | None = None
    message: str = ""
    evidence: dict[str, float | str] = {}


Line = Progress | Verdict
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Progress | Verdict)


def parse_line(data: bytes) -> Line:
    """Raises: ValueError when the line is neither progress nor a verdict."""
    return _decoder.decode(data)
