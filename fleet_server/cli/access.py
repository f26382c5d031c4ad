"""`edge-fleet access …`: access tokens of people and programs."""

from __future__ import annotations

import click

from fleet_server.cli import tables
from fleet_server.cli.command import Group, connected, reports_errors, segment, show, with_json


@click.group(cls=Group)
def access() -> None:
    """Access tokens of people and programs (admin)."""


@access.command("create")
@click.option("--role", type=click.Choice(["viewer", "publisher", "operator", "admin"]), required=True)
@click.argument("name")
@with_json
@click.pass_context
@reports_errors
def access_create(ctx: click.Context, role: str, name: str, *, as_json: bool) -> None:
    """Prints a new access token, alone on stdout. It is shown this once.

    edge-fleet access create --role viewer wall-display
    """
    with connected(ctx) as client:
        made = client.post("/access-tokens", {"name": name, "role": role})
    show(made, as_json, lambda data: click.echo(data["token"]))


@access.command("list")
@with_json
@click.pass_context
@reports_errors
def access_list(ctx: click.Context, *, as_json: bool) -> None:
    """Lists access tokens.

    edge-fleet access list
    """
    with connected(ctx) as client:
        show(client.get("/access-tokens"), as_json, tables.access_tokens)


@access.command("revoke")
@click.argument("token_id")
@with_json
@click.pass_context
@reports_errors
def access_revoke(ctx: click.Context, token_id: str, *, as_json: bool) -> None:
    """Makes an access token useless and ends its browser sessions.

    edge-fleet access revoke 1f2e3d4c
    """
    with connected(ctx) as client:
        data = client.delete(f"/access-tokens/{segment(token_id)}")
    show(data, as_json, lambda t: click.echo(f"access token {t['id']} is revoked"))
