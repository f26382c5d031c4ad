"""`edge-fleet token …`: enrolment tokens."""

from __future__ import annotations

import click

from fleet_server.cli import tables
from fleet_server.cli.command import Group, connected, duration, labels_in, reports_errors, segment, show, with_json


@click.group(cls=Group)
def token() -> None:
    """Enrolment tokens: what lets devices join."""


@token.command("create")
@click.option("--device", help="Only this device id may join with it.")
@click.option("--group", "groups", multiple=True, help="Put devices that join with it in this group. Repeatable.")
@click.option(
    "--label", "labels", multiple=True, metavar="NAME=VALUE", help="Give devices that join with it this label. Repeatable."
)
@click.option("--uses", type=click.IntRange(1), default=1, show_default=True, help="How many devices may join with it.")
@click.option("--ttl", default="24h", show_default=True, callback=duration, help="How long it is good for: 30m, 24h, 7d.")
@with_json
@click.pass_context
@reports_errors
def token_create(
    ctx: click.Context,
    device: str | None,
    groups: tuple[str, ...],
    labels: tuple[str, ...],
    uses: int,
    ttl: float,
    *,
    as_json: bool,
) -> None:
    """Prints the string a device enrols with, alone on stdout. It is shown this once.

    edge-fleet token create --group canary | ssh dev-1 edge-agent enrol -
    edge-fleet token create --label site=berlin --label shift=night --uses 40
    """
    wishes = {"device": device, "groups": list(groups), "labels": labels_in(labels), "uses": uses, "ttl_s": ttl}
    with connected(ctx) as client:
        made = client.post("/enrolment-tokens", wishes)
    show(made, as_json, lambda data: click.echo(data["string"]))


@token.command("list")
@with_json
@click.pass_context
@reports_errors
def token_list(ctx: click.Context, *, as_json: bool) -> None:
    """Lists enrolment tokens.

    edge-fleet token list
    """
    with connected(ctx) as client:
        show(client.get("/enrolment-tokens"), as_json, tables.tokens)


@token.command("revoke")
@click.argument("token_id")
@with_json
@click.pass_context
@reports_errors
def token_revoke(ctx: click.Context, token_id: str, *, as_json: bool) -> None:
    """Makes an enrolment token useless.

    edge-fleet token revoke 1f2e3d4c
    """
    with connected(ctx) as client:
        data = client.delete(f"/enrolment-tokens/{segment(token_id)}")
    show(data, as_json, lambda t: click.echo(f"token {t['id']} is revoked"))
