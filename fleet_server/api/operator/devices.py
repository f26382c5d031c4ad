"""Routes about devices."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from fastapi import Query, Request

from agent.contract.reports import Phase
from fleet_server.access import Role
from fleet_server.api.operator.bodies import Groups, Labels, LateRenewal
from fleet_server.api.operator.routes import Done, Limit, Route, actor_of
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.survey import Filters, Survey
from fleet_server.devices.told import Told
from fleet_server.devices.views import CertificateState, DeviceDetail, DevicePage, FiguresView

Text = Annotated[str | None, Query(max_length=128)]
Version = Annotated[int | None, Query(ge=1, le=2**63 - 1)]


LENGTHS_S = {"minutes": 300, "hours": 3600, "days": 86400}
Length = Literal["minutes", "hours", "days"]


class Parts(Protocol):
    told: Told
    inventory: Inventory
    survey: Survey


def devices(
    parts: Parts, text: Text = None, prefix: Text = None, group: str | None = None, model: str | None = None,
    release: Version = None, phase: Phase | None = None, online: bool | None = None, hardware: str | None = None,
    certificate: CertificateState | None = None, trouble: bool | None = None, label: Text = None, limit: Limit = 1000, after: str = "",
) -> DevicePage:  # fmt: skip
    """Lists devices by id, with what each runs. More than `limit`: ask again with `after` set to `next`."""
    filters = Filters(
        text=text, prefix=prefix, group=group, model=model, release=release, phase=phase.value if phase else None, online=online,
        hardware=hardware, certificate=certificate, trouble=trouble, label=label,
    )  # fmt: skip
    return parts.survey.find(filters, limit=limit, after=after)


def device(parts: Parts, device: str) -> DeviceDetail:
    """Everything about one device: its last report, groups and certificates."""
    return parts.inventory.get(device)


def figures(parts: Parts, device: str, by: Length = "hours", model: str | None = None, limit: Limit = 100) -> list[FiguresView]:
    """How the models of a device did, in stretches of five minutes, hours or days, newest first."""
    return parts.told.series(device, length_s=LENGTHS_S[by], model=model, limit=limit)


def set_groups(parts: Parts, request: Request, device: str, body: Groups) -> DeviceDetail:
    """Puts a device in exactly these groups. Its record is signed again with the next serial."""
    return parts.inventory.set_groups(actor_of(request), device, list(body.groups))


def set_labels(parts: Parts, request: Request, device: str, body: Labels) -> DeviceDetail:
    """Gives a device labels, or takes some off. Its record is signed again with the next serial."""
    return parts.inventory.set_labels(actor_of(request), device, body.set, body.unset)


def revoke_device(parts: Parts, request: Request, device: str) -> DeviceDetail:
    """Shuts the device out of the broker and of the device listener."""
    return parts.inventory.revoke(actor_of(request), device)


def allow_renewal(parts: Parts, request: Request, device: str, body: LateRenewal) -> DeviceDetail:
    """Lets a device renew a certificate that has ended, with the key that it has, for so long."""
    return parts.inventory.allow_renewal(actor_of(request), device, body.ttl_s)


def delete_device(parts: Parts, request: Request, device: str) -> Done:
    """Shuts the device out and forgets it; its id can be enrolled again."""
    parts.inventory.delete(actor_of(request), device)
    return Done()


ROUTES = (
    Route("GET", "/devices", devices, Role.VIEWER),
    Route("GET", "/devices/{device}", device, Role.VIEWER),
    Route("GET", "/devices/{device}/figures", figures, Role.VIEWER),
    Route("PUT", "/devices/{device}/groups", set_groups, Role.OPERATOR),
    Route("POST", "/devices/{device}/labels", set_labels, Role.OPERATOR),
    Route("POST", "/devices/{device}/revoke", revoke_device, Role.OPERATOR),
    Route("POST", "/devices/{device}/allow-renewal", allow_renewal, Role.OPERATOR),
    Route("DELETE", "/devices/{device}", delete_device, Role.OPERATOR),
)
