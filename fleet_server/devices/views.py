"""What operators are shown of devices."""

from __future__ import annotations

from typing import Literal

import msgspec

from agent.contract.reports import Hardware, ModelState, StateReport

CertificateState = Literal["good", "ends_soon", "ended"]


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """A device as operators see it in lists. `shared`: several machines report under its identity; times are seconds since the
    epoch.
    """

    id: str
    groups: list[str]
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


class DeviceDetail(DeviceView, frozen=True, kw_only=True):
    """Everything about one device. `state` is its last signed report; None before the first."""

    state: StateReport | None
    certificates: list[CertificateView]


class DeviceCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many devices there are, those shut out left out, and how many of them are online."""

    total: int
    online: int
