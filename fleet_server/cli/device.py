"""`edge-fleet device …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fleet_server.cli import tables
from fleet_server.cli.command import Group, agreed, connected, duration, reports_errors, segment, show, with_json

if TYPE_CHECKING:
    from fleet_server.client import Client


@click.group(cls=Group)
def device() -> None:
    """Devices: what each runs, its groups, who is shut out."""


@device.command("list")
@click.option("--group", help="Only devices in this group.")
@click.option("--model", help="Only devices that report this model.")
@click.option(
    "--certificate", type=click.Choice(["good", "ends-soon", "ended"]), help="Only devices whose certificate is like this."
)
@with_json
@click.pass_context
@reports_errors
def device_list(ctx: click.Context, group: str | None, model: str | None, certificate: str | None, *, as_json: bool) -> None:
    """Lists devices and what each runs.

    edge-fleet device list --group canary
    edge-fleet device list --certificate ended
    """
    with connected(ctx) as client:
        filters = {"group": group, "model": model, "certificate": certificate and certificate.replace("-", "_")}
        show(_all_devices(client, filters), as_json, tables.devices)


def _all_devices(client: Client, filters: dict[str, str | None]) -> list[Any]:
    found: list[Any] = []
    while page := client.get("/devices", **filters, limit=1000, after=found[-1]["id"] if found else None):
        found += page
        if len(page) < 1000:
            break
    return found


@device.command("show")
@click.argument("name", metavar="DEVICE")
@with_json
@click.pass_context
@reports_errors
def device_show(ctx: click.Context, name: str, *, as_json: bool) -> None:
    """Shows one device with its models and last answers.

    edge-fleet device show dev-1
    """
    with connected(ctx) as client:
        show(client.get(f"/devices/{segment(name)}"), as_json, tables.device)


@device.command("group")
@click.argument("name", metavar="DEVICE")
@click.argument("groups", nargs=-1)
@with_json
@click.pass_context
@reports_errors
def device_group(ctx: click.Context, name: str, groups: tuple[str, ...], *, as_json: bool) -> None:
    """Puts a device in exactly these groups; without any, in none.

    edge-fleet device group dev-1 canary warsaw
    """
    with connected(ctx) as client:
        data = client.put(f"/devices/{segment(name)}/groups", {"groups": list(groups)})
    show(data, as_json, lambda d: click.echo(f"{d['id']} is in {', '.join(d['groups']) or 'no group'}"))


@device.command("allow-renewal")
@click.argument("name", metavar="DEVICE")
@click.option(
    "--for", "ttl", default="24h", show_default=True, callback=duration, help="How long it may: 30m, 24h, 7d; at most 30d."
)
@with_json
@click.pass_context
@reports_errors
def device_allow_renewal(ctx: click.Context, name: str, ttl: float, *, as_json: bool) -> None:
    """Lets a device that was away for too long renew a certificate that has ended. It proves itself with the key that it has.

    edge-fleet device allow-renewal dev-1 --for 7d
    """
    with connected(ctx) as client:
        data = client.post(f"/devices/{segment(name)}/allow-renewal", {"ttl_s": ttl})
    show(data, as_json, lambda d: click.echo(f"{d['id']} may renew until {tables.moment(d['renewal_allowed_until'])}"))


@device.command("revoke")
@click.argument("name", metavar="DEVICE")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_json
@click.pass_context
@reports_errors
def device_revoke(ctx: click.Context, name: str, *, yes: bool, as_json: bool) -> None:
    """Shuts a device out: stolen, broken, sold. It goes on serving what it has.

    edge-fleet device revoke dev-1
    """
    agreed(f"Shut {name} out of the fleet?", yes=yes)
    with connected(ctx) as client:
        data = client.post(f"/devices/{segment(name)}/revoke")
    show(data, as_json, lambda d: click.echo(f"{d['id']} is shut out"))


@device.command("delete")
@click.argument("name", metavar="DEVICE")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_json
@click.pass_context
@reports_errors
def device_delete(ctx: click.Context, name: str, *, yes: bool, as_json: bool) -> None:
    """Shuts a device out and forgets it; its id can be enrolled again.

    edge-fleet device delete dev-1
    """
    agreed(f"Delete {name}?", yes=yes)
    with connected(ctx) as client:
        client.delete(f"/devices/{segment(name)}")
    show({"id": name, "deleted": True}, as_json, lambda d: click.echo(f"{d['id']} is deleted"))
