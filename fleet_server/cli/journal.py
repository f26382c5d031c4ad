"""`edge-fleet events` and `audit`."""

from __future__ import annotations

import json
from typing import Any

import click

from fleet_server.cli import tables
from fleet_server.cli.command import Command, connected, reports_errors, show, with_json


@click.command(cls=Command)
@click.option("--follow", is_flag=True, help="Go on as they happen.")
@click.option("--device", help="Only of this device.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@with_json
@click.pass_context
@reports_errors
def events(ctx: click.Context, *, follow: bool, device: str | None, limit: int, as_json: bool) -> None:
    """Lists what happened, oldest first.

    edge-fleet events --follow
    """
    with connected(ctx) as client:
        found = client.get("/events", limit=limit, device=device)
        if not follow:
            show(found, as_json, tables.events)
            return
        seen = found[-1]["seq"] if found else 0
        for event in found:
            _print_event(event, as_json)
        for kind, event in client.stream("/events/stream", after=seen):
            if kind == "event" and device in {None, event["device"]}:
                _print_event(event, as_json)


def _print_event(event: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(event) if as_json else tables.event_line(event))


@click.command(cls=Command)
@with_json
@click.pass_context
@reports_errors
def audit(ctx: click.Context, *, as_json: bool) -> None:
    """Lists who changed what, newest first.

    edge-fleet audit
    """
    with connected(ctx) as client:
        show(client.get("/audit"), as_json, tables.audit)
