"""What operators are shown of devices."""

from __future__ import annotations

from typing import Literal

import msgspec

from agent.contract.reports import Hardware, ModelState, Outcome, Phase, StateReport
from agent.contract.telemetry import Figures, Telemetry

CertificateState = Literal["good", "ends_soon", "ended"]
GOOD = (Outcome.COMMITTED, Outcome.SHADOWED)


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """A device as operators see it in lists. `groups_by_scope`: those of its groups that it is in because it meets their scopes; `shared`: several machines report under its identity; `trouble`: it has a problem,
    or a model that does not serve or was answered badly; times are seconds since the epoch.
    """

    id: str
    groups: list[str]
    groups_by_scope: list[str]
    labels: dict[str, str]
    online: bool
    revoked: bool
    last_seen: float | None
    created: float
    record_serial: int
    hardware: Hardware | None
    agent_version: str | None
    assignment_version: int | None
    problem: str | None
    trouble: bool
    shared: bool
    certificate: CertificateState
    certificate_expires: float | None
    renewal_allowed_until: float | None
    models: dict[str, ModelState]


class CertificateView(msgspec.Struct, frozen=True):
    """A certificate that a device was given. `serial` is its serial number in hex; `revoked`: when, None while it is not."""

    serial: str
    issued: float
    expires: float
    revoked: float | None


class TelemetryView(msgspec.Struct, frozen=True):
    """What a device told last of how its models do, and when that arrived. `medians_ms`: release (`digits:4`) → the median of its
    latencies.
    """

    received: float
    told: Telemetry
    medians_ms: dict[str, float | None]


class FiguresView(msgspec.Struct, frozen=True, kw_only=True):
    """What a release did on a device in the `length_s` seconds from `start` on."""

    model: str
    release: int
    start: int
    length_s: int
    requests: int
    errors: int
    median_ms: float | None
    figures: Figures


class DeviceDetail(DeviceView, frozen=True, kw_only=True):
    """Everything about one device. `state` is its last signed report, `telemetry` what it told last of how its models do; None before the
    first.
    """

    state: StateReport | None
    telemetry: TelemetryView | None
    certificates: list[CertificateView]


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """A group as operators see it in lists. `scope`: the conditions that its devices meet; empty where devices are given the group by hand.
    `devices`: how many are in it. `settled`: whether every device was looked at since scopes changed last.
    """

    name: str
    scope: list[str]
    devices: int
    settled: bool
    updated: float | None
    updated_by: str | None


class GroupDetail(GroupView, frozen=True, kw_only=True):
    """Everything about one group. `first`: some of its devices; `named_by`: the rollouts under way and the rules that name it."""

    first: list[str]
    named_by: list[str]


class GroupSet(GroupView, frozen=True, kw_only=True):
    """A group whose scope was set. `meeting`: how many devices meet it now, which come into the group one after the other."""

    meeting: int


class DevicePage(msgspec.Struct, frozen=True, kw_only=True):
    """Devices in the order of their ids. `next`: what to give as `after` for those behind them; None when there are none."""

    devices: list[DeviceView]
    next: str | None


class DeviceCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many devices there are, those shut out left out, and how many of them are online, and in trouble."""

    total: int
    online: int
    trouble: int = 0


def in_trouble(report: StateReport) -> bool:
    """Whether a person should look at the device that says this."""
    return bool(report.problem) or any(_is_bad(model) for model in report.models.values())


def _is_bad(model: ModelState) -> bool:
    if model.serving is None or model.phase is Phase.QUARANTINED:
        return True
    last = max(model.answers, key=lambda answer: answer.at, default=None)
    return last is not None and last.outcome not in GOOD and model.wanted in {None, last.release}
