"""`edge-fleet bundle`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from fleet_server.cli import progress, tables
from fleet_server.cli.command import Command, connected, reports_errors, show, with_json

if TYPE_CHECKING:
    from agent.contract.bundle import Bundle


@click.command(cls=Command)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write, such as /media/usb/fleet.bundle."
)  # fmt: skip
@click.option("--model", "models", multiple=True, help="Only this model. Repeatable.")
@click.option("--device", "devices", multiple=True, help="For this device. Repeatable; without it and --group: for all.")
@click.option("--group", help="For the devices of this group.")
@click.option(
    "--valid-days", type=click.FloatRange(min=0, min_open=True, max=90), metavar="DAYS",
    help="How long devices believe it. Signs what is in force for as long, for the devices on the network too. Default: the expiry of fleet.yaml.",
)  # fmt: skip
@with_json
@click.pass_context
@reports_errors
def bundle(
    ctx: click.Context, output: Path, models: tuple[str, ...], devices: tuple[str, ...], group: str | None,
    valid_days: float | None, *, as_json: bool,
) -> None:  # fmt: skip
    """Writes what devices without a network should run into one file: signed documents and blobs. `edge-agent import` reads it.

    edge-fleet bundle --output /media/usb/fleet.bundle --group harbour --valid-days 14
    edge-fleet bundle -o crane-7.bundle --device crane-7 --model digits
    """
    body = {"models": list(models), "devices": list(devices), "group": group, "valid_days": valid_days}
    with connected(ctx) as client, progress.bar(output.name, quiet=as_json) as done:
        about, size = _write(output, lambda file: client.download("/bundles", body, file, done))
    said = {
        "file": str(output), "size_bytes": size, "fleet": about.fleet, "devices": list(about.devices),
        "releases": list(about.releases), "valid_until": about.valid_until,
    }  # fmt: skip
    show(said, as_json, _tell)


def _write(output: Path, fill: Any) -> tuple[Bundle, int]:
    """The whole file under its name, or none.  Raises: Unavailable when the server's answer is not a whole bundle; OSError."""
    from agent.contract import bundle as format_
    from agent.contract.codec import decode
    from fleet_server.errors import Unavailable

    fd, temporary = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.absolute().parent)
    try:
        with os.fdopen(fd, "r+b") as file:
            fill(file)
            file.flush()
            try:
                head = next(iter([*format_.members(file)]))
                about = decode(format_.read(file, head), format_.Bundle, limit_bytes=1024 * 1024)
            except ValueError as error:
                raise Unavailable(f"the server did not send a whole bundle: {error}; try again") from error
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
            size = _size(file)
        Path(temporary).replace(output)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return about, size


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _tell(said: dict[str, Any]) -> None:
    until = tables.moment(said["valid_until"])
    click.echo(
        f"{said['file']}: {said['size_bytes']} bytes, {', '.join(said['releases']) or 'no release'} for {len(said['devices'])} device(s) of "
        f"fleet {said['fleet']!r}; believed until {until}"
    )
    click.echo("on the device: edge-agent import FILE")
