"""`edge-fleet backup` and `restore`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from fleet_server.cli import progress, tables
from fleet_server.cli.command import Command, reports_errors, show, with_json
from fleet_server.cli.signing import signer_among
from fleet_server.errors import Conflict, Invalid

if TYPE_CHECKING:
    from fleet_server.app import Fleet


STANDARD = Path("-")


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--without-blobs",
    is_flag=True,
    help="Leave out the files of releases, which are most of it: they never change, so copy them with a tool of your own.",
)
@click.option(
    "--encrypt-to", "recipients", multiple=True, metavar="KEY",
    help="Encrypt it for this public key: age1… as age-keygen prints it, or the line of an SSH key. Repeatable.",
)  # fmt: skip
@with_json
@reports_errors
def backup(folder: Path, file: Path, recipients: tuple[str, ...], *, without_blobs: bool, as_json: bool) -> None:
    """Copies a whole fleet server into FILE (-: standard output), while it runs or not. The copy holds its secret keys.

    edge-fleet backup /srv/fleet /backup/fleet-monday.backup
    edge-fleet backup /srv/fleet - --encrypt-to age1qy… | ssh backup 'cat > fleet.backup'
    """
    import msgspec

    from fleet_server.backups.backup import Backup, scratch_beside
    from fleet_server.backups.encryption import encrypting
    from fleet_server.config import Folder

    if file != STANDARD and file.exists():
        raise Conflict(f"{file} exists already; name another file")
    with scratch_beside(file.absolute() if file != STANDARD else folder.absolute()) as scratch:
        made = Backup(Folder(folder.absolute()), Path(scratch), time.time, blobs=not without_blobs)
        with (
            _written(file) as out,
            encrypting(out, recipients) as plain,
            _bar(folder.name, made.size_bytes, quiet=as_json) as done,
        ):
            made.write(plain, done)
    said = {**msgspec.structs.asdict(made.description), "file": str(file), "encrypted": bool(recipients)}
    if file != STANDARD:
        show(said, as_json, _tell_backup)


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option(
    "--host", "hosts", multiple=True, metavar="NAME_OR_IP",
    help="How devices and operators reach this machine, if not as the lost one. Repeatable; the first one is what devices are told.",
)  # fmt: skip
@click.option(
    "--key", "keys", multiple=True, metavar="KEY",
    help="The offline root key (a file or a URI): makes new online keys. Needed when something was published after the backup was taken, or the lost machine may be in somebody's hands. Repeatable.",
)  # fmt: skip
@click.option(
    "--identity", "identities", multiple=True, type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="KEY_FILE",
    help="The secret key that opens an encrypted backup. Repeatable.",
)  # fmt: skip
@with_json
@reports_errors
def restore(
    file: Path,
    folder: Path | None,
    hosts: tuple[str, ...],
    keys: tuple[str, ...],
    identities: tuple[Path, ...],
    *,
    as_json: bool,
) -> None:
    """Makes the fleet server in FOLDER from a backup, so that its devices follow. Without FOLDER: says what the backup is of.

    edge-fleet restore fleet-monday.backup
    edge-fleet restore fleet-monday.backup /srv/fleet --key /media/usb/root.key
    ssh backup 'cat fleet.backup' | edge-fleet restore - /srv/fleet --identity backup.key --host fleet-2.example.com
    """
    import msgspec

    from fleet_server.backups import archive
    from fleet_server.backups.encryption import decrypted
    from fleet_server.backups.restore import restore as make
    from fleet_server.config import Folder

    with _read(file) as source, decrypted(source, identities) as plain:
        if folder is None:
            show(msgspec.structs.asdict(archive.describe(plain)), as_json, _tell_description)
            return
        size = file.stat().st_size if file != STANDARD else None
        with _bar(file.name, size, quiet=as_json) as done:
            made = make(
                plain, Folder(folder.absolute()), time.time, hosts=hosts, choose=_chooser(keys) if keys else None, progress=done
            )
    show({**msgspec.to_builtins(made), "folder": str(folder), "new_online_keys": bool(keys)}, as_json, _tell_restored)


def _chooser(keys: Sequence[str]) -> Callable[[Fleet], Sequence[Any]]:
    def choose(fleet: Fleet) -> Sequence[Any]:
        candidates = list(fleet.repository.root_role().signed.keys.values())
        return [signer_among(key, candidates) for key in keys]

    return choose


@contextlib.contextmanager
def _written(file: Path) -> Iterator[IO[bytes]]:
    """The whole file under its name, for its owner alone, or none."""
    from agent.common import files

    if file == STANDARD:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with files.replacing(file.absolute(), mode=0o600) as out:
        yield out


@contextlib.contextmanager
def _read(file: Path) -> Iterator[IO[bytes]]:
    if file == STANDARD:
        yield sys.stdin.buffer
        return
    if not file.is_file():
        raise Invalid(f"{file} is no file")
    with file.open("rb") as source:
        yield source


@contextlib.contextmanager
def _bar(what: str, size: int | None, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    with progress.bars(quiet=quiet) as shown:
        task = shown.add_task(tables.safe(what), total=size)
        yield lambda count: shown.advance(task, count)


def _what(said: Any) -> str:
    blobs = "without the files of releases" if said["blobs"] is None else f"{said['blobs']} files of releases"
    when = tables.moment(said["taken"])
    return f"fleet {tables.safe(said['fleet'])} of {when}: {said['devices']} devices, {said['releases']} releases, {blobs}"


def _tell_backup(said: Any) -> None:
    click.echo(f"{said['file']}: {_what(said)}")
    if not said["encrypted"]:
        click.echo("It holds the server's secret keys: keep it where nobody else reads it, or encrypt it (--encrypt-to).")


def _tell_description(said: Any) -> None:
    click.echo(_what(said))
    click.echo(f"CA {said['ca_sha256']}; taken by edge-fleet {tables.safe(said['software'])}")


def _tell_restored(said: Any) -> None:
    click.echo(f"{said['folder']}: {_what(said['backup'])}")
    for line in said["changes"]:
        click.echo(f"  {line}")
    if said["missing_blobs"]:
        click.echo(
            f"{said['missing_blobs']} files of releases are not here: copy them to {said['folder']}/blobs before you start the server"
        )
    if not said["new_online_keys"]:
        click.echo(
            "If something was published after the backup was taken, devices hold a newer list of it than this server: `edge-fleet status` will "
            f"say so; then stop it and run `edge-fleet keys recover {said['folder']} --key ROOT.key`"
        )
    click.echo(f"start it with `edge-fleet serve {said['folder']}`; devices reach it as {said['hosts'][0]}")
