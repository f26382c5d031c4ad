"""What devices tell the fleet server.

A state report is signed with the device's key (a DSSE envelope) and carries a counter that only grows and the digest that
really serves; only such a report counts as success. Events are for people, and signed likewise: their words are the device's.
Presence comes from the broker's last will, which nobody can sign.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from agent.contract import names
from agent.contract.codec import FORMAT, Document, require_format

STATE_PAYLOAD_TYPE = "application/vnd.edge-agent.state+json"
"""The DSSE payload type of a signed StateReport."""

EVENT_PAYLOAD_TYPE = "application/vnd.edge-agent.event+json"
"""The DSSE payload type of a signed Event."""

MAX_REPORT_BYTES = 256 * 1024
MAX_EVENT_BYTES = 64 * 1024


class Phase(str, Enum):
    """Where the update machine of a model stands. The names are those of the device's state table."""

    STEADY = "steady"
    FETCHING = "fetching"
    TRIALING = "trialing"
    SHADOWING = "shadowing"
    WAITING = "waiting"
    CANARYING = "canarying"
    ACTIVATING = "activating"
    WATCHING = "watching"
    ROLLING_BACK = "rolling_back"
    QUARANTINED = "quarantined"


class Outcome(str, Enum):
    """How a device answered a release. Counted apart by the rollout gates."""

    COMMITTED = "committed"
    REFUSED = "refused"  # before it served one request here: signature, manifest, trial
    SHADOWED = "shadowed"  # kept its rules on copies of live requests; it does not serve yet
    FAILED = "failed"  # could not be fetched or stored; says nothing about the release
    ROLLED_BACK = "rolled_back"


class Answer(Document, frozen=True, kw_only=True):
    """The last answer of this device to a release of a model. `evidence` holds the numbers behind it."""

    release: int
    outcome: Outcome
    rollout: str | None = None
    reason: str | None = None
    message: str = ""
    at: float = 0.0
    evidence: dict[str, float | str] = {}
    attempt: int = 0
    """The attempt at the release that this answers."""


class Stage(Document, frozen=True, kw_only=True):
    """How a release does beside the one that serves: on copies of requests (shadow) or on a share of them (canary)."""

    name: Literal["shadow", "canary"]
    release: int
    verdict: Literal["running", "passed", "skipped"]
    message: str = ""
    evidence: dict[str, float | str] = {}


class ModelState(Document, frozen=True, kw_only=True):
    """One model on a device. `serving` and `sha256` are what `serve` itself says it runs, not what was asked of it."""

    serving: int | None
    sha256: str | None
    phase: Phase
    wanted: int | None = None
    target: int | None = None
    progress: float | None = None
    previous: int | None = None
    variant: str | None = None
    placement: str | None = None
    requests: int = 0
    failures: int = 0
    p95_ms: float | None = None
    answers: tuple[Answer, ...] = ()
    quarantined: tuple[Answer, ...] = ()
    held: bool = False
    stage: Stage | None = None
    """Of `target`, while it shadows or answers a share."""
    waiting_for: str | None = None
    """What the update waits for: retry, window, approval, team."""
    passed: bool = False
    """The watch of `target` ended well; it is committed once this report was delivered."""
    stopped: str | None = None
    """Why the model does not serve although it could, such as a lease that ended."""


class Hardware(Document, frozen=True, kw_only=True):
    """What the device is, for filters and for stratified waves."""

    arch: str
    machine: str = ""
    os: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    accelerator: str | None = None
    runtimes: dict[str, str] = {}


def hardware_class(hardware: Hardware) -> str:
    """What devices that a release suits or breaks alike have in common: `aarch64/NVIDIA Jetson Orin Nano/cuda`."""
    return "/".join((hardware.arch or "-", hardware.machine or "-", hardware.accelerator or "-"))


class StateReport(Document, frozen=True, kw_only=True):
    """Everything a device says about itself. `counter` grows with every report of this identity, across restarts and
    reboots.
    """

    device: str
    counter: int
    session: int
    at: float
    agent_version: str
    models: dict[str, ModelState]
    assignment_version: int | None = None
    record_serial: int | None = None
    hardware: Hardware | None = None
    serve_instance: str | None = None
    serve_restarts: int = 0
    problem: str | None = None
    run: str = ""
    """A word that the agent made up when it started. One device never says an earlier one again; two with one identity do."""
    kind: Literal["state"] = "state"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "state report")
        names.check(names.DEVICE_ID, self.device, "device id")


class Event(Document, frozen=True, kw_only=True):
    """Something that happened, in words. `id` is unique, so that an event delivered twice is stored once."""

    id: str
    device: str
    at: float
    name: str
    message: str
    model: str | None = None
    release: int | None = None
    reason: str | None = None
    kind: Literal["event"] = "event"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "event")
        names.check(names.DEVICE_ID, self.device, "device id")


class Presence(Document, frozen=True, kw_only=True):
    """Birth and last will. A will is believed only for the session it belongs to: an old one cannot override a new birth."""

    device: str
    session: int
    online: bool
    kind: Literal["presence"] = "presence"
    format: int = FORMAT
