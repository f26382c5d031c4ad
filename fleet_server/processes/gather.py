"""`edge-fleet gather`: makes of a server of several processes one again, for `edge-fleet serve`."""

from __future__ import annotations

from sqlalchemy import delete

from fleet_server.app import locked
from fleet_server.config import FleetConfig, Folder, load
from fleet_server.errors import Conflict, Unavailable
from fleet_server.processes.common import CRL
from fleet_server.releases.online_keys import OnlineKeys
from fleet_server.releases.repository import Repository
from fleet_server.storage.database import Database
from fleet_server.storage.documents import FolderDocuments, StoredDocuments, copy
from fleet_server.storage.leadership import Leadership
from fleet_server.storage.models import DocumentRow
from fleet_server.storage.processes import new_id


def gather(folder: Folder) -> int:
    """Brings what is signed from the database into the folder; how many documents. Every other process must have been stopped.

    Raises: ConfigError; Conflict when a process leads or nothing is in the database; Unavailable.
    """
    config = load(folder)
    with locked(folder):
        name = new_id("gather")
        database = Database(folder.database_url(config), name=name)
        leadership = Leadership(database, name, "")
        try:
            if not database.is_shared or not database.is_current() or not StoredDocuments.are_in(database):
                raise Conflict("the server of this fleet is one process already", code="one_process")
            if not leadership.take():
                raise Conflict("a process leads; stop every edge-fleet decide, ingest and api first", code="leads")
            return _gather(folder, config, database, leadership)
        finally:
            leadership.give_back()
            database.close()


def _gather(folder: Folder, config: FleetConfig, database: Database, leadership: Leadership) -> int:
    here, stored = FolderDocuments(folder.repository), StoredDocuments(database)
    database.at_beginning.append(leadership.check)
    for name in set(here.all()) - set(stored.all()):
        here.remove(name)
    copied = copy(stored, here)
    here.remove(CRL)
    repository = Repository(here, OnlineKeys.read(folder.keys), config.expiry, lambda: 0.0)
    repository.check()
    if repository.versions() != Repository(stored, OnlineKeys.read(folder.keys), config.expiry, lambda: 0.0).versions():
        raise Unavailable("what was copied is not what is in the database; nothing was changed there")
    with database.session() as session:
        session.execute(delete(DocumentRow))
    return copied
