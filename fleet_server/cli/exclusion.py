"""`edge-fleet exclusion …`."""

from __future__ import annotations

import click

from fleet_server.cli import rollout_tables
from fleet_server.cli.command import Group, connected, reports_errors, show, with_json


@click.group(cls=Group)
def exclusion() -> None:
    """Hardware classes that do not run a release, because devices of the class refused it."""


@exclusion.command("list")
@click.option("--model", help="Only this model.")
@with_json
@click.pass_context
@reports_errors
def exclusion_list(ctx: click.Context, model: str | None, *, as_json: bool) -> None:
    """Lists hardware classes that are excluded from a release, with the devices that refused it.

    edge-fleet exclusion list
    """
    with connected(ctx) as client:
        show(client.get("/exclusions", model=model), as_json, rollout_tables.exclusions)


@exclusion.command("end")
@click.argument("number", type=click.IntRange(1))
@with_json
@click.pass_context
@reports_errors
def exclusion_end(ctx: click.Context, number: int, *, as_json: bool) -> None:
    """Lets an excluded hardware class have the release after all. It is not excluded from it again.

    Devices that refused the release keep refusing it, until `edge-agent quarantine clear` on them.

    edge-fleet exclusion end 1
    """
    with connected(ctx) as client:
        data = client.post(f"/exclusions/{number}/end")
    show(data, as_json, lambda one: click.echo(f"{one['model']}:{one['release']} may go to {one['hardware']}"))
