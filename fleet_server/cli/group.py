"""`edge-fleet group …`."""

from __future__ import annotations

from typing import Any

import click

from fleet_server.cli import tables
from fleet_server.cli.command import Group, agreed, connected, reports_errors, segment, show, with_json


@click.group(cls=Group)
def group() -> None:
    """Groups: names that devices are chosen by. A group is given by hand, or fills itself with the devices that meet its scope.

    edge-fleet group set jetsons 'class:aarch64/*/cuda'
    edge-fleet device group dev-1 canary
    """


@group.command("set")
@click.argument("name", metavar="GROUP")
@click.argument("conditions", nargs=-1, required=True, metavar="KIND:VALUES...")
@with_json
@click.pass_context
@reports_errors
def group_set(ctx: click.Context, name: str, conditions: tuple[str, ...], *, as_json: bool) -> None:
    """Lets the devices that meet all of these conditions be the group, now and later. Conditions are labels (label:site=berlin,site=paris),
    hardware classes (class:aarch64/*/cuda), versions of the devices' software (agent:0.4.*) and named devices (device:crane-1,crane-2); a
    device meets one by any of its values.

    edge-fleet group set jetsons 'class:aarch64/*/cuda'
    edge-fleet group set berlin-night label:site=berlin label:shift=night
    """
    with connected(ctx) as client:
        done = client.put(f"/groups/{segment(name)}", {"scope": list(conditions)})
    show(done, as_json, _set)


def _set(found: dict[str, Any]) -> None:
    scope, number = " and ".join(found["scope"]), found["meeting"]
    if not number:
        click.echo(f"no device meets {scope} now; the group {found['name']} fills itself when one does")
        return
    click.echo(
        f"{number} device{'s are' if number != 1 else ' is'} in {scope}, and so in the group {found['name']} as soon as told"
    )


@group.command("list")
@with_json
@click.pass_context
@reports_errors
def group_list(ctx: click.Context, *, as_json: bool) -> None:
    """Lists groups, how many devices are in each, and the scope of those that fill themselves.

    edge-fleet group list
    """
    with connected(ctx) as client:
        show(client.get("/groups"), as_json, tables.groups)


@group.command("show")
@click.argument("name", metavar="GROUP")
@with_json
@click.pass_context
@reports_errors
def group_show(ctx: click.Context, name: str, *, as_json: bool) -> None:
    """Shows one group: its scope, some of its devices, and which rollouts and rules name it.

    edge-fleet group show jetsons
    """
    with connected(ctx) as client:
        show(client.get(f"/groups/{segment(name)}"), as_json, tables.group)


@group.command("remove")
@click.argument("name", metavar="GROUP")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_json
@click.pass_context
@reports_errors
def group_remove(ctx: click.Context, name: str, *, yes: bool, as_json: bool) -> None:
    """Ends a group that fills itself; its devices leave it. Refused while a rollout or a rule names it.

    edge-fleet group remove jetsons
    """
    agreed(f"Let every device leave the group {name}?", yes=yes)
    with connected(ctx) as client:
        client.delete(f"/groups/{segment(name)}")
    show(
        {"name": name, "removed": True},
        as_json,
        lambda d: click.echo(f"the group {d['name']} is removed; its devices leave it"),
    )
