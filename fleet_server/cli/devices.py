"""`edge-fleet devices …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fleet_server import display
from fleet_server.cli.common import Group, connected, reports_errors, segment, show, with_json

if TYPE_CHECKING:
    from fleet_server.client import Client


@click.group(cls=Group, invoke_without_command=True)
@click.option("--group", help="Only devices in this group.")
@click.option("--model", help="Only devices that report this model.")
@with_json
@click.pass_context
@reports_errors
def devices(ctx: click.Context, group: str | None, model: str | None, *, as_json: bool) -> None:
    """Lists devices and what each runs.

    edge-fleet devices --group canary
    edge-fleet devices show dev-1
    """
    if ctx.invoked_subcommand is None:
        with connected(ctx) as client:
            show(_all_devices(client, group, model), as_json, display.devices)


def _all_devices(client: Client, group: str | None, model: str | None) -> list[Any]:
    found: list[Any] = []
    while page := client.get("/devices", group=group, model=model, limit=1000, after=found[-1]["id"] if found else None):
        found += page
        if len(page) < 1000:
            break
    return found


@devices.command("show")
@click.argument("device")
@with_json
@click.pass_context
@reports_errors
def devices_show(ctx: click.Context, device: str, *, as_json: bool) -> None:
    """Shows one device with its models and last answers.

    edge-fleet devices show dev-1
    """
    with connected(ctx) as client:
        show(client.get(f"/devices/{segment(device)}"), as_json, display.device)


@devices.command("group")
@click.argument("device")
@click.argument("groups", nargs=-1)
@with_json
@click.pass_context
@reports_errors
def devices_group(ctx: click.Context, device: str, groups: tuple[str, ...], *, as_json: bool) -> None:
    """Puts a device in exactly these groups; without any, in none.

    edge-fleet devices group dev-1 canary warsaw
    """
    with connected(ctx) as client:
        data = client.put(f"/devices/{segment(device)}/groups", {"groups": list(groups)})
    show(data, as_json, lambda d: click.echo(f"{d['id']} is in {', '.join(d['groups']) or 'no group'}"))


@devices.command("revoke")
@click.argument("device")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
@reports_errors
def devices_revoke(ctx: click.Context, device: str, *, yes: bool) -> None:
    """Shuts a device out: stolen, broken, sold. It goes on serving what it has.

    edge-fleet devices revoke dev-1
    """
    if not yes and not click.confirm(f"Shut {device} out of the fleet?", err=True):
        raise click.Abort
    with connected(ctx) as client:
        client.post(f"/devices/{segment(device)}/revoke")
    click.echo(f"{device} is shut out")


@devices.command("delete")
@click.argument("device")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
@reports_errors
def devices_delete(ctx: click.Context, device: str, *, yes: bool) -> None:
    """Shuts a device out and forgets it; its id can be enrolled again.

    edge-fleet devices delete dev-1
    """
    if not yes and not click.confirm(f"Delete {device}?", err=True):
        raise click.Abort
    with connected(ctx) as client:
        client.delete(f"/devices/{segment(device)}")
    click.echo(f"{device} is deleted")
