"""Makes a fleet server from a backup, so that devices follow it though they have seen what came after.

Devices refuse what is older than what they know. So everything that the server signs gets numbers far above any that the lost one can
have given since. What publishers sign cannot be numbered here: if something was published since the backup, devices hold a newer list
than the backup has, and only new online keys, named by the root's offline key, make them begin anew (`signers`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import IO

import msgspec
from securesystemslib.signer import Signer  # type: ignore[attr-defined]
from sqlalchemy import delete, update

from agent.common import files
from fleet_server import config as configuration
from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.backups.archive import Description, Progress, unpack
from fleet_server.config import Folder
from fleet_server.devices import adoption
from fleet_server.errors import Conflict, Unavailable
from fleet_server.releases.metadata_files import RepositoryDamaged
from fleet_server.rollouts import steps
from fleet_server.storage.database import DatabaseError
from fleet_server.storage.models import BrowserSession, Device

AHEAD = 1_000_000
"""How far numbers jump: a server that signs once a minute needs two years for as many."""

Choose = Callable[[Fleet], Sequence[Signer]]
"""The root's offline keys, for a fleet that shall have new online keys."""


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What was made."""

    backup: Description
    at: float
    hosts: tuple[str, ...]
    missing_blobs: int
    """Files of releases that are not here: devices that need them wait until they are uploaded again."""
    changes: list[str]
    """What changed of who is trusted, in sentences."""


def restore(
    source: IO[bytes], folder: Folder, clock: Callable[[], float], *, hosts: tuple[str, ...] = (), choose: Choose | None = None,
    progress: Progress = lambda _: None,
) -> Restored:  # fmt: skip
    """Fills `folder`, which must not exist or be empty: all of it, or nothing. `hosts`: the names that the server has now.

    Raises: Conflict, Invalid, Unavailable, OSError.
    """
    if folder.root.exists() and any(folder.root.iterdir()):
        raise Conflict(f"{folder.root} is not empty; nothing was changed. Name another folder, or move that one away")
    staging = folder.root.with_name(f".{folder.root.name}.restoring")
    if staging.exists():
        shutil.rmtree(staging)  # of a restore that was interrupted
    files.make_directory(staging, mode=0o700)
    try:
        description = unpack(source, staging, progress)
        restored = _prepare(Folder(staging), description, clock, hosts, choose)
        staging.chmod(0o750)
        if folder.root.exists():
            folder.root.rmdir()
        staging.rename(folder.root)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    files.sync_directory(folder.root.parent)
    return restored


def _prepare(
    staging: Folder, description: Description, clock: Callable[[], float], hosts: tuple[str, ...], choose: Choose | None
) -> Restored:
    """Makes the unpacked folder one that devices follow."""
    for directory, mode in staging.directories():
        files.make_directory(directory, mode=mode)
        directory.chmod(mode)
    config = configuration.load(staging)
    if hosts:
        config = msgspec.structs.replace(config, hosts=hosts)
        files.write(staging.config, configuration.dump(config))
    fleet = Fleet(staging, config, clock)
    try:
        fleet.recover()
        _jump(fleet, description, clock())
        changes = fleet.key_changes.replace_online_keys(choose(fleet)) if choose is not None else []
        fleet.authority.renew_own(config.own_names, force=True)
        here = config.blobs.store is None  # else they are where they were
        missing = sum(fleet.blobs.size(sha256) is None for sha256 in fleet.catalogue.blobs()) if here else 0
    except (RepositoryDamaged, DatabaseError) as error:
        raise Unavailable(f"what the backup holds cannot be used: {error}") from error
    finally:
        fleet.close()
    return Restored(backup=description, at=clock(), hosts=config.hosts, missing_blobs=missing, changes=changes)


def _jump(fleet: Fleet, description: Description, now: float) -> None:
    with fleet.database.session() as session:
        steps.next_version(session, at_least=fleet.assignment.signed().version + AHEAD)
        session.execute(update(Device).values(serial=Device.serial + AHEAD, record=None, present=False))
        session.execute(delete(BrowserSession))
        adoption.open_window(session, taken=description.taken, restored=now)
        fleet.journal.audit(session, SERVER, "server.restore", fleet.config.fleet, taken=description.taken)
    fleet.assignment.tell(fleet.addresses(), anew=True)  # devices may know of another place that was told after the backup
    with fleet.repository.lock:
        fleet.repository.online.jump(AHEAD)
    fleet.assignment.publish()
