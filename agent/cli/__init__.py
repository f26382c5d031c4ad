"""`edge-agent`: everything a device does, from the command line.

Exit status: 0 done, 1 it failed (the reason is on stderr), 2 the command was not understood.
Commands that belong to the fleet link live in `agent.sync.cli` and are imported only when one of them is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import click

from agent.cli import bench, inspect, predict, serve, status

SYNC_MODULE = "agent.sync.cli"
SYNC_COMMANDS: Mapping[str, str] = {
    "approve": "Let the release that waits for approval serve.",
    "doctor": "Check this device: store, identity, engines, clock, reachability.",
    "enrol": "Join a fleet with an enrolment string.",
    "hold": "Keep a model on the release it runs now.",
    "import": "Update this device from a bundle on a stick.",
    "quarantine": "List or clear the releases that this device refuses.",
    "rollback": "Roll back to a model's previous release.",
    "sync": "Follow the fleet: updates, trials, reports.",
    "trial": "Try one release (started by sync or systemd).",
    "tuf": "Verify any TUF repository as this device verifies its fleet's.",
    "unhold": "Let a model follow the fleet again.",
    "updates": "Show each model's update, answers and refused releases.",
    "why": "Explain why a model runs what it runs.",
}
RENAMED: Mapping[str, str] = {"enroll": "enrol"}
"""Commands that had another name in version 0.1.0, and what they are called now."""

HIDDEN_SYNC_COMMANDS = frozenset({"trial"})


class LazyGroup(click.Group):
    """Knows the names and one-line helps of the commands in SYNC_MODULE without importing it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *SYNC_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in RENAMED:
            ctx.fail(f"{cmd_name!r} is now called {RENAMED[cmd_name]!r}: edge-agent {RENAMED[cmd_name]} …")
        command = super().get_command(ctx, cmd_name)
        if command is not None or cmd_name not in SYNC_COMMANDS:
            return command
        from importlib import import_module

        commands: Mapping[str | None, click.Command] = {one.name: one for one in import_module(SYNC_MODULE).COMMANDS}
        return commands[cmd_name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Like click's, but without importing a command to say what it does."""
        rows = []
        for name in self.list_commands(ctx):
            own = super().get_command(ctx, name)
            if name not in HIDDEN_SYNC_COMMANDS and (own is None or not own.hidden):
                rows.append((name, SYNC_COMMANDS[name] if own is None else own.get_short_help_str(limit=90)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
First steps:
  edge-agent run model.onnx
  edge-agent predict model --input x.npy
Completion of commands and options:
  eval "$(edge-agent completion bash)"
""",
)
@click.version_option(package_name="edge-inference-agent", prog_name="edge-agent")
def cli() -> None:
    """Serves models on a Unix socket of this machine, and keeps them up to date from a fleet server."""


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    Example:
      eval "$(edge-agent completion bash)"
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "edge-agent", "_EDGE_AGENT_COMPLETE").source())


for _command in (serve.serve, serve.run, inspect.inspect, predict.predict, bench.bench, status.models, status.status):
    cli.add_command(_command)


def main() -> None:
    cli(prog_name="edge-agent")
