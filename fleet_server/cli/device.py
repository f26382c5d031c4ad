"""`edge-fleet device …`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from agent.contract.names import ReleaseRef
from fleet_server.cli import evidence_tables, tables
from fleet_server.cli.command import Group, agreed, connected, duration, labels_in, reports_errors, segment, show, with_json

if TYPE_CHECKING:
    from fleet_server.client import Client


PHASES = (
    "steady", "fetching", "trialing", "shadowing", "waiting", "canarying", "activating", "watching", "rolling_back", "quarantined"
)  # fmt: skip


@click.group(cls=Group)
def device() -> None:
    """Devices: what each runs, its groups, who is shut out."""


@device.command("list")
@click.option("--text", help="Only devices with this in their id, a group or a model, or that serve this release.")
@click.option("--prefix", help="Only devices whose id begins with this.")
@click.option("--group", help="Only devices in this group.")
@click.option("--label", help="Only devices with this label: site=berlin, or site with any value.")
@click.option("--model", help="Only devices that report this model.")
@click.option("--release", metavar="RELEASE", help="Only devices that serve this release, such as digits:4.")
@click.option("--phase", type=click.Choice(PHASES), help="Only devices with a model in this phase of an update.")
@click.option("--online/--offline", default=None, help="Only devices that are there, or that are not.")
@click.option("--hardware", help="Only devices of this hardware class, such as aarch64/Raspberry Pi 5/-.")
@click.option("--trouble", is_flag=True, default=None, help="Only devices that somebody should look at.")
@click.option(
    "--certificate", type=click.Choice(["good", "ends-soon", "ended"]), help="Only devices whose certificate is like this."
)
@click.option("--limit", type=click.IntRange(1), help="At most so many [default: all].")
@with_json
@click.pass_context
@reports_errors
def device_list(
    ctx: click.Context, /, release: str | None, certificate: str | None, limit: int | None, *, as_json: bool, **filters: Any
) -> None:
    """Lists devices and what each runs, those that pass every filter.

    edge-fleet device list --group canary
    edge-fleet device list --release digits:4 --offline
    edge-fleet device list --trouble --prefix warsaw-
    """
    if release is not None:
        ref = ReleaseRef.parse(release)
        if filters["model"] not in {None, ref.model}:
            raise click.UsageError(f"--release {release} is none of the model {filters['model']}")
        filters |= {"model": ref.model, "release": ref.version}
    filters["certificate"] = certificate and certificate.replace("-", "_")
    with connected(ctx) as client:
        show(list(itertools.islice(_all_devices(client, filters), limit)), as_json, tables.devices)


def _all_devices(client: Client, filters: dict[str, Any]) -> Iterator[Any]:
    said = {name: str(value).lower() if isinstance(value, bool) else value for name, value in filters.items()}
    after: str | None = ""
    while after is not None:
        page = client.get("/devices", **said, limit=1000, after=after or None)
        yield from page["devices"]
        after = page["next"]


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
        show(client.get(f"/devices/{segment(name)}"), as_json, _shown)


def _shown(found: dict[str, Any]) -> None:
    tables.device(found)
    evidence_tables.telemetry(found["telemetry"])


@device.command("health")
@click.argument("name", metavar="DEVICE")
@click.option("--model", help="Only this model.")
@click.option(
    "--by",
    type=click.Choice(["minutes", "hours", "days"]),
    default="hours",
    show_default=True,
    help="In stretches of 5 minutes, hours, days.",
)
@click.option("--limit", type=click.IntRange(1, 1000), default=24, show_default=True, help="At most so many lines.")
@with_json
@click.pass_context
@reports_errors
def device_health(ctx: click.Context, name: str, model: str | None, by: str, limit: int, *, as_json: bool) -> None:
    """Shows how the models of a device did, the newest time first.

    edge-fleet device health dev-1
    edge-fleet device health dev-1 --model digits --by days
    """
    with connected(ctx) as client:
        found = client.get(f"/devices/{segment(name)}/figures", by=by, model=model, limit=limit)
    show(found, as_json, evidence_tables.series)


@device.command("group")
@click.argument("name", metavar="DEVICE")
@click.argument("groups", nargs=-1)
@with_json
@click.pass_context
@reports_errors
def device_group(ctx: click.Context, name: str, groups: tuple[str, ...], *, as_json: bool) -> None:
    """Puts a device in exactly these groups; without any, in none. Groups that it is in by their scopes are named as well.

    edge-fleet device group dev-1 canary warsaw
    """
    with connected(ctx) as client:
        data = client.put(f"/devices/{segment(name)}/groups", {"groups": list(groups)})
    show(data, as_json, lambda d: click.echo(f"{d['id']} is in {', '.join(d['groups']) or 'no group'}"))


@device.command("label")
@click.argument("name", metavar="DEVICE")
@click.argument("labels", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--unset", multiple=True, metavar="NAME", help="Take this label off. Repeatable.")
@with_json
@click.pass_context
@reports_errors
def device_label(ctx: click.Context, name: str, labels: tuple[str, ...], unset: tuple[str, ...], *, as_json: bool) -> None:
    """Gives a device labels, or takes some off; others stay. Rollouts and rules can be for the devices with a label.

    edge-fleet device label dev-1 site=berlin line=3
    edge-fleet device label dev-1 --unset line
    """
    given = labels_in(labels)
    if not labels and not unset:
        raise click.UsageError("name a label to set, such as site=berlin, or one to take off with --unset")
    with connected(ctx) as client:
        data = client.post(f"/devices/{segment(name)}/labels", {"set": given, "unset": list(unset)})
    show(data, as_json, lambda d: click.echo(f"{d['id']} has {tables.labels(d['labels']) or 'no label'}"))


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
