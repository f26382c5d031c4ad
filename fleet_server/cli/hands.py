"""`edge-fleet rollout supersede`, `complete` and `retry`: what an operator can do about a rollout besides letting it go on or back."""

from __future__ import annotations

import click

from fleet_server.cli import rollout_tables
from fleet_server.cli.command import Command, agreed, connected, reports_errors, segment, show, with_json


@click.command(cls=Command)
@click.argument("rollout_id")
@click.argument("release")
@click.option("--waves", help="The waves before everyone, as `rollout start` takes them [default: those of the first].")
@click.option(
    "--confirm/--no-confirm",
    default=None,
    help="Whether to wait for `rollout promote` between waves [default: as the first did].",
)
@with_json
@click.pass_context
@reports_errors
def supersede(
    ctx: click.Context, rollout_id: str, release: str, waves: str | None, *, confirm: bool | None, as_json: bool
) -> None:
    """Lets a newer release take the place of a rollout that is under way.

    Nobody goes back first: a device that has the first release keeps it until the newer one's waves reach it, and goes straight on.

    edge-fleet rollout supersede r3-9f1c digits:5
    edge-fleet rollout supersede r3-9f1c digits:5 --waves 1,10% --confirm
    """
    body = {"release": release, "waves": waves.split(",") if waves else [], "confirm": confirm}
    with connected(ctx) as client:
        show(client.post(f"/rollouts/{segment(rollout_id)}/supersede", body), as_json, rollout_tables.rollout)


@click.command(cls=Command)
@click.argument("rollout_id")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_json
@click.pass_context
@reports_errors
def complete(ctx: click.Context, rollout_id: str, *, yes: bool, as_json: bool) -> None:
    """Ends a rollout as if its last wave had passed: every device is assigned the release now, and no gate is asked any more.

    edge-fleet rollout complete r3-9f1c
    """
    agreed(f"Assign the release of {rollout_id} to every device now?", yes=yes)
    with connected(ctx) as client:
        show(client.post(f"/rollouts/{segment(rollout_id)}/complete"), as_json, rollout_tables.rollout)


@click.command(cls=Command)
@click.argument("rollout_id")
@click.argument("device", required=False)
@with_json
@click.pass_context
@reports_errors
def retry(ctx: click.Context, rollout_id: str, device: str | None, *, as_json: bool) -> None:
    """Lets a device that refused a rollout's release, rolled it back or failed try it again; without a device, all of them.

    Also after the rollout's end. What a device answered before counts no more; it stays in the verdicts.

    edge-fleet rollout retry r3-9f1c crane-7
    edge-fleet rollout retry r3-9f1c
    """
    one = f"/devices/{segment(device)}" if device is not None else ""
    with connected(ctx) as client:
        show(client.post(f"/rollouts/{segment(rollout_id)}{one}/retry"), as_json, rollout_tables.rollout)
