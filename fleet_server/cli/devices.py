"""`edge-fleet devices …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fleet_server import display
from fleet_server.cli.common import Group, agreed, connected, duration, reports_errors, segment, show, with_json

if TYPE_CHECKING:
    from fleet_server.client import Client


@click.group(cls=Group, invoke_without_command=True)
@click.option("--group", help="Only devices in this group.")
@click.option("--model", help="Only devices that report this model.")
@click.option(
    "--certificate", type=click.Choice(["good", "ends-soon", "ended"]), help="Only devices whose certificate is like this."
)
@with_json
@click.pass_context
@reports_errors
def devices(ctx: click.Context, group: str | None, model: str | None, certificate: str | None, *, as_json: bool) -> None:
    """Lists devices and what each runs.

    edge-fleet devices --group canary
    edge-fleet devices --certificate ended
    edge-fleet devices show dev-1
    """
    if ctx.invoked_subcommand is None:
        with connected(ctx) as client:
            filters = {"group": group, "model": model, "certificate": certificate and certificate.replace("-", "_")}
            show(_all_devices(client, filters), as_json, display.devices)


def _all_devices(client: Client, filters: dict[str, str | None]) -> list[Any]:
    found: list[Any] = []
    while page := client.get("/devices", **filters, limit=1000, after=found[-1]["id"] if found else None):
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


@devices.command("allow-renewal")
@click.argument("device")
@click.option(
    "--for", "ttl", default="24h", show_default=True, callback=duration, help="How long it may: 30m, 24h, 7d; at most 30d."
)
@with_json
@click.pass_context
@reports_errors
def devices_allow_renewal(ctx: click.Context, device: str, ttl: float, *, as_json: bool) -> None:
    """Lets a device that was away for too long renew a certificate that has ended. It proves itself with the key that it has.

    edge-fleet devices allow-renewal dev-1 --for 7d
    """
    with connected(ctx) as client:
        data = client.post(f"/devices/{segment(device)}/allow-renewal", {"ttl_s": ttl})
    show(data, as_json, lambda d: click.echo(f"{d['id']} may renew until {display.moment(d['renewal_allowed_until'])}"))


@devices.command("revoke")
@click.argument("device")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
@reports_errors
def devices_revoke(ctx: click.Context, device: str, *, yes: bool) -> None:
    """Shuts a device out: stolen, broken, sold. It goes on serving what it has.

    edge-fleet devices revoke dev-1
    """
    agreed(f"Shut {device} out of the fleet?", yes=yes)
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
    agreed(f"Delete {device}?", yes=yes)
    with connected(ctx) as client:
        client.delete(f"/devices/{segment(device)}")
    click.echo(f"{device} is deleted")
