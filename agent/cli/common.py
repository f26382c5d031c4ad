"""What commands share: how they fail, and how they find the server and ask it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from agent.client import Client

DEFAULT_SOCKET = Path("/run/edge-agent/agent.sock")


def default_run_socket() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "edge-agent.sock" if runtime else Path(f"/tmp/edge-agent-{os.getuid()}.sock")  # noqa: S108 - mode 0600


def fail(message: object) -> NoReturn:
    """Ends the command with status 1."""
    click.echo(f"edge-agent: {message}", err=True)
    sys.exit(1)


socket_option = click.option(
    "--socket", "socket_path", type=click.Path(path_type=Path), envvar="EDGE_AGENT_SOCKET", show_envvar=True,
    help=f"The server's socket  [default: {DEFAULT_SOCKET}, or that of `edge-agent run`]",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def server_socket(socket_path: Path | None) -> Path:
    """The one that was named; else the daemon's, or that of `edge-agent run`, whichever is there."""
    if socket_path is not None:
        return socket_path
    return next((p for p in (DEFAULT_SOCKET, default_run_socket()) if p.exists()), DEFAULT_SOCKET)


def client_at(socket_path: Path | None) -> Client:
    from agent.client import Client

    return Client(server_socket(socket_path))
