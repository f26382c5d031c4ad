"""What every command shares: how it fails, where it finds the server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

DEFAULT_SOCKET = Path("/run/edge-agent/agent.sock")


def default_run_socket() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "edge-agent.sock" if runtime else Path(f"/tmp/edge-agent-{os.getuid()}.sock")  # noqa: S108 - mode 0600


def fail(message: object) -> NoReturn:
    """Ends the command with status 1."""
    click.echo(f"edge-agent: {message}", err=True)
    sys.exit(1)
