"""`edge-fleet openapi` and `completion`: the program about itself."""

from __future__ import annotations

import json

import click

from fleet_server.cli.command import Command


@click.command(cls=Command)
def openapi() -> None:
    """Prints the OpenAPI description of the REST API.

    edge-fleet openapi > openapi.json
    """
    from fleet_server.api.operator.app import described_api

    click.echo(json.dumps(described_api(), indent=2, sort_keys=True))


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Prints a completion script.

    edge-fleet completion bash > /etc/bash_completion.d/edge-fleet
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "edge-fleet", "_EDGE_FLEET_COMPLETE").source())
