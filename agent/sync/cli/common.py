"""What the commands of the fleet link share: their options, how they fail, and the completion of names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from agent.config import AgentConfig

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="agent.yaml (default: /etc/edge-agent/agent.yaml).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def fail(message: str) -> NoReturn:
    click.echo(f"edge-agent: {message}", err=True)
    sys.exit(1)


def load(config_path: Path | None) -> AgentConfig:
    from agent import config

    try:
        return config.load(config_path)
    except config.ConfigError as error:
        fail(str(error))


def complete_model(ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """The models that were ever updated on this device; none when they cannot be read."""
    from agent import config
    from agent.store import Store
    from agent.sync.updating.states import States

    try:
        store = Store(config.load(ctx.params.get("config_path")).store)
        return [model for model in States(store.private / "updates").models() if model.startswith(begun)]
    except (config.ConfigError, OSError):
        return []


model_argument = click.argument("model", shell_complete=complete_model)
