"""`edge-fleet rabbitmq-files`: what the nodes of a RabbitMQ cluster need to be the fleet's broker."""

from __future__ import annotations

from pathlib import Path

import click

from fleet_server.cli.command import Command, reports_errors


@click.command("rabbitmq-files", cls=Command)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--place", default="/etc/rabbitmq", show_default=True, help="The folder on the nodes where their files will stand."
)
@reports_errors
def rabbitmq_files(folder: Path, out: Path, place: str) -> None:
    """Writes the certificate and the configuration of each node that fleet.yaml names, in a folder of its own below OUT. Bring each to
    its node over a way that keeps the key secret, make RabbitMQ's user its owner, and delete it here. Again once in two years, when
    the certificates end.

    edge-fleet rabbitmq-files /srv/fleet /root/nodes
    """
    from fleet_server.broker import node_files
    from fleet_server.config import Folder, load
    from fleet_server.devices.pki import Authority

    where = Folder(folder.absolute())
    for made in node_files.write(load(where), Authority(where.pki), out, place):
        click.echo(made)
