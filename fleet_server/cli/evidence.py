"""`edge-fleet rollout evidence`: what a rollout was judged by, judged once more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from agent.contract.codec import convert
from fleet_server.cli import evidence_tables
from fleet_server.cli.command import EXIT_FAILED, Command, connected, reports_errors, segment, show, with_json

if TYPE_CHECKING:
    from fleet_server.client import Client


@click.command("evidence", cls=Command)
@click.argument("name", metavar="ROLLOUT")
@with_json
@click.pass_context
@reports_errors
def rollout_evidence(ctx: click.Context, name: str, *, as_json: bool) -> None:
    """Shows what each verdict of a rollout was made from, and makes them again: exit code 1 when one comes out otherwise.

    edge-fleet rollout evidence r12-a1b2
    edge-fleet rollout evidence r12-a1b2 --json > r12.json
    """
    from fleet_server.rollouts.evidence import Evidence, differences  # the database's library comes with it

    with connected(ctx) as client:
        whole = _whole(client, f"/rollouts/{segment(name)}/evidence")
    found = differences(convert(whole, Evidence))
    show(whole, as_json, lambda data: evidence_tables.evidence(data, found))
    if found:
        ctx.exit(EXIT_FAILED)


def _whole(client: Client, path: str) -> Any:
    """With all its samples."""
    whole = client.get(path)
    while whole["next"] is not None:
        page = client.get(path, after=whole["next"])
        whole["samples"] += page["samples"]
        whole["next"] = page["next"]
    return whole
