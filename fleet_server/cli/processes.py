"""`edge-fleet api`, `ingest`, `decide`, `gather`: the server as several processes."""

from __future__ import annotations

from pathlib import Path

import click

from fleet_server.cli.command import Command, reports_errors
from fleet_server.cli.server import log_level, log_to_stderr, servers_errors

_folder = click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))


def _place(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    from agent.contract.addresses import split

    if value is not None:
        try:
            split(value, "it")
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    return value


_metrics = click.option(
    "--metrics", metavar="HOST:PORT", callback=_place,
    help="Answer /metrics and /health there, in plain HTTP: numbers only, to anybody.",
)  # fmt: skip


@click.command(cls=Command)
@_folder
@log_level
@reports_errors
def api(folder: Path, log_level: str) -> None:
    """Runs a process that answers operators and devices; several may run, behind a balancer. Changes it hands on to the one that decides.

    Its folder needs fleet.yaml and pki/ca.crt, server.crt, server.key, client.crt, client.key; no other key.

    edge-fleet api /srv/fleet
    """
    from fleet_server.config import Folder
    from fleet_server.processes import api as process

    log_to_stderr(log_level)
    with servers_errors():
        process.api(Folder(folder.absolute()))


@click.command(cls=Command)
@_folder
@_metrics
@log_level
@reports_errors
def ingest(folder: Path, metrics: str | None, log_level: str) -> None:
    """Runs a process that stores what devices send, with the broker.

    Its folder needs what that of `edge-fleet api` needs.

    edge-fleet ingest /srv/fleet
    """
    from fleet_server.config import Folder
    from fleet_server.processes import ingest as process

    log_to_stderr(log_level)
    with servers_errors():
        process.ingest(Folder(folder.absolute()), metrics=metrics)


@click.command(cls=Command)
@_folder
@_metrics
@log_level
@reports_errors
def decide(folder: Path, metrics: str | None, log_level: str) -> None:
    """Runs a process that judges rollouts, signs and certifies; of several that run one leads, and another takes over when it ends.

    Its folder has the keys: make it with `edge-fleet init`, and copy `keys` and `pki` to the others.

    edge-fleet decide /srv/fleet
    """
    from fleet_server.config import Folder
    from fleet_server.processes import decide as process

    log_to_stderr(log_level)
    with servers_errors():
        process.decide(Folder(folder.absolute()), metrics=metrics)


@click.command(cls=Command)
@_folder
@reports_errors
def gather(folder: Path) -> None:
    """Makes of a server of several processes one again: what is signed comes from the database into the folder, for `edge-fleet serve`.
    Stop all of them first.

    edge-fleet gather /srv/fleet
    """
    from fleet_server.config import Folder
    from fleet_server.processes.gather import gather as bring

    with servers_errors():
        count = bring(Folder(folder.absolute()))
    click.echo(f"{count} signed documents are in {folder} again; start `edge-fleet serve {folder}`")
