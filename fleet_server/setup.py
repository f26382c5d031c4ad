"""`edge-fleet init`: makes the data folder with everything a fleet needs, once."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from agent.common import files
from agent.contract import names
from agent.contract.addresses import Addresses
from agent.contract.assignment import Assignment
from agent.contract.codec import encode
from fleet_server.access import Access, Role
from fleet_server.client import Profile
from fleet_server.config import FleetConfig, Folder, dump
from fleet_server.devices.pki import Authority
from fleet_server.errors import Invalid
from fleet_server.releases import keys
from fleet_server.releases.online_keys import OnlineKeys
from fleet_server.releases.repository import Repository
from fleet_server.storage.database import Database, DatabaseError
from fleet_server.storage.documents import FolderDocuments


class Made(msgspec.Struct, frozen=True):
    """What `init` made and the operator must know of."""

    config: FleetConfig
    root_key: Path
    releases_key: Path
    profile: Path
    ca_sha256: str
    token: str


def init(folder: Folder, config: FleetConfig, *, offline_keys: Path, profile: Path, passphrase: str | None = None) -> Made:
    """Makes the folder, the offline keys and the operator's profile.  Raises: Invalid when any of them is there already;
    OSError.
    """
    names.check(names.GROUP_NAME, config.fleet, "fleet")
    root_path, releases_path = offline_keys / "root.key", offline_keys / "releases.key"
    _refuse_existing(folder, (root_path, releases_path), profile)
    if config.database_url is not None:
        _refuse_used(config.database_url)
    for directory, mode in folder.directories():
        files.make_directory(directory, mode=mode)
    authority = Authority.create(folder.pki, config.fleet, config.own_names)
    online = OnlineKeys.create(folder.keys)
    files.make_directory(offline_keys, mode=0o700)
    root, releases = (keys.generate(path, passphrase=passphrase) for path in (root_path, releases_path))
    addresses = Addresses(device_url=config.device_url, broker=config.broker_address, since=time.time())
    empty = Assignment(fleet=config.fleet, version=1, models={}, addresses=addresses)
    Repository.create(
        FolderDocuments(folder.repository),
        online,
        config.expiry,
        time.time,
        root=root,
        releases=releases,
        assignment=encode(empty),
    )
    database = Database(folder.database_url(config))
    try:
        database.migrate()
        token = Access(database, time.time, session_s=config.session_s).create("init", Role.ADMIN).token
    finally:
        database.close()
    Profile(url=config.operator_url, ca=str(authority.ca_path.absolute()), ca_sha256=authority.fingerprint, token=token).write(
        profile
    )
    files.write(folder.config, dump(config))  # last: without it the folder is not a fleet's, and `serve` says so
    return Made(config, root_path, releases_path, profile, authority.fingerprint, token)


def _refuse_used(url: str) -> None:
    """Raises: Invalid when the database cannot be used, or is somebody's."""
    try:
        database = Database(url)
        try:
            tables = database.tables()
        finally:
            database.close()
    except DatabaseError as error:
        raise Invalid(f"{error}; nothing was changed", code="no_database") from error
    if tables:
        raise Invalid(
            f"the database of --database-url is not empty (it has a table {tables[0]!r}); nothing was changed. Make one for this fleet",
            code="exists",
        )


def _refuse_existing(folder: Folder, offline: tuple[Path, ...], profile: Path) -> None:
    if folder.root.exists() and any(folder.root.iterdir()):
        raise Invalid(f"{folder.root} is not empty; nothing was changed. Name another folder", code="exists")
    for path in offline:
        if path.exists():
            raise Invalid(f"{path} exists already; nothing was changed. Name another folder with --keys", code="exists")
    if profile.exists():
        raise Invalid(f"profile {profile} exists already; nothing was changed. Name another one with --profile", code="exists")
