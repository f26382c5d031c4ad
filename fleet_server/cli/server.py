"""`edge-fleet init`, `serve`, `doctor`, `renew-root`, `status`: the server itself."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from fleet_server.cli import tables
from fleet_server.cli.command import EXIT_FAILED, Command, connected, profile_path, reports_errors, show, with_json
from fleet_server.cli.signing import new_secret, signer
from fleet_server.errors import Unavailable

log_level = click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)


def _checked(_ctx: click.Context, _param: click.Parameter, hosts: tuple[str, ...]) -> tuple[str, ...]:
    from agent.contract.addresses import check_host

    try:
        return tuple(check_host(host, "it") for host in hosts)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _warn_of_unknown(hosts: tuple[str, ...]) -> None:
    """What is told to devices and cannot be looked up here is often misspelt; a name may also exist only where the devices are."""
    for host in hosts:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:  # noqa: PERF203 - a few names
            click.echo(
                f"warning: {host} cannot be looked up on this machine ({error.strerror or error}); devices must be able to. "
                "Correct `hosts` in fleet.yaml if it is misspelt", err=True,
            )  # fmt: skip


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--fleet", default="fleet", show_default=True, help="The fleet's name; devices remember it.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME_OR_IP",
    callback=_checked,
    help="How devices and operators reach this machine. Repeatable; the first one is what devices are told. Default: this machine's name.",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the offline keys are written [default: FOLDER/keys-offline].",
)
@click.option(
    "--passphrase/--no-passphrase",
    default=False,
    help="Encrypt the offline keys with a passphrase: $EDGE_FLEET_KEY_SECRET, the file $EDGE_FLEET_KEY_SECRET_FILE, or asked for.",
)
@click.option("--operator-port", type=click.IntRange(1, 65535), default=8443, show_default=True)
@click.option("--device-port", type=click.IntRange(1, 65535), default=8444, show_default=True)
@click.option("--broker-port", type=click.IntRange(1, 65535), default=8883, show_default=True)
@click.option(
    "--shared-port",
    type=click.IntRange(1, 65535),
    help="One port where all of it is reached, such as 443, for networks that let nothing else out.",
)
@click.option(
    "--loopback-port", type=click.IntRange(1, 65535), help="Plain HTTP for this machine only: a local browser, a reverse proxy."
)
@click.option(
    "--database-url", metavar="URL",
    help="An empty database for it instead of SQLite in the folder: postgresql://USER@HOST/NAME (the password in ~/.pgpass).",
)  # fmt: skip
@click.pass_context
@reports_errors
def init(
    ctx: click.Context, folder: Path, fleet: str, hosts: tuple[str, ...], keys: Path | None, *, passphrase: bool, operator_port: int,
    device_port: int, broker_port: int, shared_port: int | None, loopback_port: int | None, database_url: str | None,
) -> None:  # fmt: skip
    """Makes the data folder of a new fleet: CA, keys, signed metadata, database, first admin token.

    edge-fleet init /srv/fleet --fleet demo --host fleet.example.com --host 192.0.2.10
    """
    from fleet_server import setup
    from fleet_server.config import FleetConfig, Folder
    from fleet_server.sections import BrokerSettings

    config = FleetConfig(
        fleet=fleet, hosts=hosts or (socket.getfqdn(),), operator_port=operator_port, device_port=device_port,
        shared_port=shared_port, loopback_port=loopback_port, broker=BrokerSettings(port=broker_port), database_url=database_url,
    )  # fmt: skip
    _warn_of_unknown(config.hosts)
    secret = new_secret("Passphrase for the offline keys") if passphrase else None
    made = setup.init(
        Folder(folder), config, offline_keys=keys or folder / "keys-offline",
        profile=profile_path(ctx), passphrase=secret,
    )  # fmt: skip
    click.echo(tables.made(made, folder))


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@log_level
@reports_errors
def serve(folder: Path, log_level: str) -> None:
    """Runs the fleet server: operators' and devices' listeners, broker, dashboard. Ends cleanly on SIGTERM or Ctrl-C.

    edge-fleet serve /srv/fleet
    """
    from fleet_server import running
    from fleet_server.config import Folder

    log_to_stderr(log_level)
    with servers_errors():
        running.serve(Folder(folder.absolute()))


def log_to_stderr(level: str) -> None:
    """As a process of the server logs."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.root.level))
    logging.getLogger("tuf").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextlib.contextmanager
def servers_errors() -> Iterator[None]:
    """Raises: Unavailable for what a process of the server cannot work with."""
    from fleet_server.releases.metadata_files import RepositoryDamaged
    from fleet_server.storage.database import DatabaseError

    try:
        yield
    except (RepositoryDamaged, DatabaseError) as error:
        raise Unavailable(str(error)) from error


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@with_json
@reports_errors
def doctor(folder: Path, *, as_json: bool) -> None:
    """Checks what the server needs of its machine: descriptors, broker, plug-in, disk, database; and whether it is reached where
    devices are told to find it. Exit status 1 when something is missing.

    edge-fleet doctor /srv/fleet
    """
    import msgspec

    from fleet_server.config import Folder
    from fleet_server.doctor import examine

    findings = list(examine(Folder(folder.absolute())))
    show([msgspec.structs.asdict(finding) for finding in findings], as_json, tables.findings)
    if any(finding.level == "failed" for finding in findings):
        sys.exit(EXIT_FAILED)


@click.command("renew-root", cls=Command)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--root-key", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The offline root key.")
@click.option(
    "--releases-key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Renew the releases role too; publishing does that by itself.",
)
@reports_errors
def renew_root(folder: Path, root_key: Path, releases_key: Path | None) -> None:
    """Signs root and targets for another year. Once a year, with the server stopped and the offline keys at hand.

    edge-fleet renew-root /srv/fleet --root-key /media/usb/root.key
    """
    from fleet_server import app
    from fleet_server.config import Folder, load

    where = Folder(folder.absolute())
    with servers_errors(), app.locked(where):
        fleet = app.Fleet(where, load(where))
        try:
            renewed = fleet.key_changes.renew_offline(signer(root_key), signer(releases_key) if releases_key else None)
        finally:
            fleet.close()
    click.echo(f"signed for another year: {', '.join(renewed)}")


@click.command(cls=Command)
@with_json
@click.pass_context
@reports_errors
def status(ctx: click.Context, *, as_json: bool) -> None:
    """Shows how the server is.

    edge-fleet status
    """
    with connected(ctx) as client:
        show(client.get("/status"), as_json, tables.status)
