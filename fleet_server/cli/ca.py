"""`edge-fleet ca …`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fleet_server.cli import tables
from fleet_server.cli.command import Group, agreed, connected, duration, profile_path, reports_errors, show, with_json
from fleet_server.errors import Invalid


@click.group(cls=Group)
def ca() -> None:
    """The fleet's certificate authority (CA), and its replacement without a visit to any device."""


@ca.command("status")
@with_json
@click.pass_context
@reports_errors
def ca_status(ctx: click.Context, *, as_json: bool) -> None:
    """Shows the CAs that are believed, how far a replacement is, and which devices have not followed.

    edge-fleet ca status
    """
    with connected(ctx) as client:
        show(client.get("/ca"), as_json, tables.authorities)


@ca.command("replace")
@click.option(
    "--switch-after", "switch_after", default="7d", show_default=True, callback=duration,
    help="When the server's own certificates are of the new CA: operators and browsers need it by then.",
)  # fmt: skip
@click.option(
    "--spread", callback=duration, help="Over how long devices renew [default: what looks_per_s makes of their number]."
)
@click.option(
    "--now", is_flag=True, help="The CA's key was stolen: no spread, and the server's own certificates switch at once."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_json
@click.pass_context
@reports_errors
def ca_replace(ctx: click.Context, switch_after: float, spread: float | None, *, now: bool, yes: bool, as_json: bool) -> None:
    """Makes a new CA and has devices follow: they believe it beside the present one and renew their certificates under it.

    edge-fleet ca replace
    edge-fleet ca replace --now
    """
    agreed("Replace the fleet's CA?", yes=yes)
    wish = {"switch_after_s": 0.0, "spread_s": 0.0} if now else {"switch_after_s": switch_after, "spread_s": spread}
    with connected(ctx) as client:
        data = client.post("/ca/replace", wish)
    show(data, as_json, tables.authorities)
    if profile_path(ctx).exists():
        _trust(profile_path(ctx), data)
    if not as_json:
        click.echo(
            "Make a backup of the server now: one of before knows nothing of the new CA. Have every other operator run `edge-fleet ca trust`."
        )


@ca.command("switch")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_json
@click.pass_context
@reports_errors
def ca_switch(ctx: click.Context, *, yes: bool, as_json: bool) -> None:
    """Has the server show certificates of the new CA before its time. Operators who did not run `edge-fleet ca trust` are cut off.

    edge-fleet ca switch
    """
    agreed("Does every operator know the new CA?", yes=yes)
    with connected(ctx) as client:
        show(client.post("/ca/switch"), as_json, tables.authorities)


@ca.command("finish")
@click.option("--yes", is_flag=True, help="Do not ask, and leave behind who has not followed.")
@with_json
@click.pass_context
@reports_errors
def ca_finish(ctx: click.Context, *, yes: bool, as_json: bool) -> None:
    """Has the old CA believed no more. Devices that have not followed are named first; they have to be enrolled anew then.

    edge-fleet ca finish
    """
    with connected(ctx) as client:
        before = client.get("/ca")
        left = [*before["here"]["devices"], *before["away"]["devices"]]
        count = before["here"]["count"] + before["away"]["count"]
        if left and not yes:
            click.echo(
                "Without a certificate of the new CA: " + ", ".join(left) + (", …" if count > len(left) else ""), err=True
            )
        agreed(f"Leave {count} devices behind, and believe the new CA alone?" if left else "Believe the new CA alone?", yes=yes)
        data = client.post("/ca/finish", {"leave_behind": bool(left)})
    if profile_path(ctx).exists():
        _trust(profile_path(ctx), data)
    show(data, as_json, tables.authorities)


@ca.command("trust")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the CAs to this file, and change no profile."
)
@click.pass_context
@reports_errors
def ca_trust(ctx: click.Context, out: Path | None) -> None:
    """Has this profile believe the CAs that the server believes: before the switch of a replacement, and after its end.

    edge-fleet ca trust
    edge-fleet ca trust --out fleet-ca.pem      # for a browser, EDGE_FLEET_CA, a monitor
    """
    from agent.common import files

    with connected(ctx) as client:
        data = client.get("/ca")
    if out is not None:
        files.write(out, _pem(data))
        click.echo(f"{out} has the CAs of the fleet")
        return
    path = profile_path(ctx)
    if not path.exists():
        raise Invalid(f"there is no profile {path}; say --out FILE, and name that file in EDGE_FLEET_CA")
    _trust(path, data)


def _trust(path: Path, data: dict[str, Any]) -> None:
    """Puts the CAs beside the profile, and into it."""
    import msgspec

    from agent.common import files
    from fleet_server.client import Profile

    profile = Profile.read(path, checked=False)
    if profile.ca is None:
        return  # the server is believed because the machine's own CAs vouch for it
    beside = path.with_name(f"{path.stem}-ca.pem").absolute()
    files.write(beside, _pem(data))
    names = tuple(one["sha256"] for one in data["authorities"])
    msgspec.structs.replace(profile, ca=str(beside), ca_sha256=names).write(path)
    click.echo(f"the profile {path} believes {', '.join(name[:16] for name in names)}", err=True)


def _pem(data: dict[str, Any]) -> bytes:
    return "".join(one["pem"] for one in data["authorities"]).encode()
