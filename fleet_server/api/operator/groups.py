"""Routes about groups."""

from __future__ import annotations

from typing import Protocol

from fastapi import Request

from fleet_server.access import Role
from fleet_server.api.operator.bodies import GroupScope
from fleet_server.api.operator.routes import Done, Route, actor_of
from fleet_server.devices.groups import Groups
from fleet_server.devices.views import GroupDetail, GroupSet, GroupView


class Parts(Protocol):
    groups: Groups


def groups(parts: Parts) -> list[GroupView]:
    """Lists groups by name, those that are given by hand and those that fill themselves."""
    return parts.groups.every()


def group(parts: Parts, group: str) -> GroupDetail:
    """One group: its scope, some of its devices, and what names it."""
    return parts.groups.get(group)


def set_group(parts: Parts, request: Request, group: str, body: GroupScope) -> GroupSet:
    """Lets the devices that meet a scope be the group. Their records are signed again one after the other."""
    return parts.groups.set(actor_of(request), group, body.scope)


def remove_group(parts: Parts, request: Request, group: str) -> Done:
    """Ends a group that fills itself. Its devices leave it one after the other."""
    parts.groups.remove(actor_of(request), group)
    return Done()


ROUTES = (
    Route("GET", "/groups", groups, Role.VIEWER),
    Route("GET", "/groups/{group}", group, Role.VIEWER),
    Route("PUT", "/groups/{group}", set_group, Role.OPERATOR),
    Route("DELETE", "/groups/{group}", remove_group, Role.OPERATOR),
)
