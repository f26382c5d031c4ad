"""`edge-agent models` and `status`: what a running server serves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from agent.cli.common import client_at, fail, json_option, socket_option


@click.command()
@socket_option
@json_option
def models(socket_path: Path | None, *, as_json: bool) -> None:
    """List the models that the server knows.

    \b
    Example:
      edge-agent models --json
    """
    from agent.client import ClientError

    with client_at(socket_path) as client:
        try:
            found = client.models()
        except ClientError as error:
            fail(error)
    if as_json:
        click.echo(json.dumps(found))
        return
    _table(("model", "version", "state"), [[m["name"], m["version"], m["state"]] for m in found])
    _reasons((m["name"], m["version"], m.get("reason", "")) for m in found)


@click.command()
@socket_option
@click.option("--config", type=click.Path(path_type=Path), help="agent.yaml  [default: /etc/edge-agent/agent.yaml if present]")
@json_option
def status(socket_path: Path | None, config: Path | None, *, as_json: bool) -> None:
    """Show what the server runs, on what, and how it does; where the fleet server is; and whether another device has this one's
    identity.

    \b
    Example:
      edge-agent status
    """
    from agent.client import ClientError

    with client_at(socket_path) as client:
        try:
            found = client.status()
        except ClientError as error:
            fail(error)
    shared, fleet = _identity_shared(config), _fleet_server(config)
    if as_json:
        click.echo(json.dumps({**found, "identity_shared": shared, "fleet_server": fleet}))
        return
    click.echo(f"edge-agent {found['agent_version']}, pid {found['pid']}, socket {client.socket_path}")
    rows = [_status_row(name, model, v) for name, model in found["models"].items() for v in model["versions"].values()]
    _table(("model", "version", "role", "state", "on", "requests", "failed", "mean ms", "MB"), rows)
    if fleet is not None:
        click.echo(_fleet_words(fleet))
    if shared:
        click.echo(f"! {shared}")
    _reasons(
        (name, v["version"], v["reason"] or v["placement"]["fallback"])
        for name, model in found["models"].items()
        for v in model["versions"].values()
    )


def _identity_shared(config: Path | None) -> str | None:
    """What `sync` noted; None also for who may not read its folder."""
    import time

    from agent.config import ConfigError, load
    from agent.sync.fleet import takeovers

    try:
        return takeovers.finding(load(config).store / "sync", time.time())
    except (ConfigError, OSError):
        return None


def _fleet_server(config: Path | None) -> dict[str, Any] | None:
    """Where the device finds its fleet server; None where it is not enrolled, and for who may not read its folder."""
    from agent.config import ConfigError, load
    from agent.sync.identity import IdentityError, whereabouts

    try:
        address, known = whereabouts(load(config).sync.identity)
    except (ConfigError, IdentityError, OSError):
        return None
    awaited = known.awaited
    return {
        "device_url": known.used.device_url,
        "broker": known.used.broker,
        "since": known.used_since or address.enrolled or None,
        "awaited": {"device_url": awaited.device_url, "broker": awaited.broker} if awaited is not None else None,
    }


def _fleet_words(fleet: Mapping[str, Any]) -> str:
    from agent.host.clock import text

    since = f", since {text(fleet['since'])}" if fleet["since"] else ""
    awaited = fleet["awaited"]
    named = (
        f"; it says that it is at {awaited['device_url']}, broker {awaited['broker']}, and has not answered there yet"
        if awaited
        else ""
    )
    return f"fleet server at {fleet['device_url']}, broker {fleet['broker']}{since}{named}"


def _status_row(name: str, model: Mapping[str, Any], version: Mapping[str, Any]) -> list[str]:
    number = version["version"]
    role = "active" if model["active"] == number else "previous" if model["previous"] == number else ""
    stats = version["stats"]
    count = stats["latency"]["count"]
    return [
        name,
        str(number),
        role,
        version["state"],
        version["placement"]["actual"],
        str(stats["requests"]),
        str(sum(stats["failed"].values())),
        f"{stats['latency']['sum_ms'] / count:.3f}" if count else "",
        f"{version['memory_bytes'] / 1e6:.1f}",
    ]


def _reasons(rows: Iterable[tuple[str, Any, str | None]]) -> None:
    for name, version, reason in rows:
        if reason:
            click.echo(f"\n{name}:{version}  {reason}")


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
