"""`edge-fleet doctor`: what the server needs of its machine, checked one by one, each with what to do when it is not there."""

from __future__ import annotations

import datetime as dt
import resource
import shutil
import socket
import sqlite3
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from agent.contract import addresses
from agent.contract.addresses import DEVICES, MQTT
from fleet_server import descriptors
from fleet_server.broker import settings as broker_settings
from fleet_server.config import ConfigError, FleetConfig, Folder, load
from fleet_server.devices.ca_replacement import WARN_BEFORE_S
from fleet_server.devices.pki import Authority
from fleet_server.errors import Unavailable
from fleet_server.sections import BrokerSettings, NodeSettings
from fleet_server.storage import leadership, processes
from fleet_server.storage.database import VERSIONS, Database, DatabaseError, newest_revision
from fleet_server.storage.documents import StoredDocuments

ANSWERS_WITHIN_S = 5.0
AMQP = "amqp"  # no node looks at the protocol that is offered
SEVERAL = 2
PUBLIC = "correct `hosts` or `public` in fleet.yaml, or what stands before the server (docs/how-to/reverse-proxy.md)"
FREE_FAILED_BYTES, FREE_WARNING_BYTES = 256 * 1024**2, 2 * 1024**3
"""The database and the broker stop storing when the disk is full; a release is often some hundred megabytes."""


class Finding(msgspec.Struct, frozen=True):
    """One check. `advice` says what to do about it; empty when all is well."""

    name: str
    level: Literal["ok", "warning", "failed"]
    message: str
    advice: str = ""


def examine(folder: Folder) -> Iterator[Finding]:
    """Every check in order. Changes nothing, and needs no server that runs."""
    try:
        config = load(folder)
    except ConfigError as error:
        yield Finding("configuration", "failed", str(error), "correct the file; every other check needs it")
        return
    yield Finding("configuration", "ok", str(folder.config))
    yield _descriptors(folder)
    if config.broker.kind == "rabbitmq":
        yield from _cluster(folder, config)
    else:
        yield _broker(config.broker)
        yield _plugin(config.broker)
    yield _disk(folder)
    yield _database(folder, config)
    yield _authority(folder)
    if config.database_url is not None:
        yield from _several(config.database_url)
    yield from _told(folder, config)


def _descriptors(folder: Folder) -> Finding:
    """Of the server that runs; of one that this user would start where none does."""
    name, pid = "descriptors", _running(folder)
    if pid is None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        count = descriptors.MOST if hard == resource.RLIM_INFINITY else min(hard, descriptors.MOST)
        message = f"a server started here may have {count} files and connections open, and its broker as many"
    else:
        count = _limit_of(pid)
        message = f"the server (process {pid}) may have {count} files and connections open, and its broker as many"
    if count < descriptors.ENOUGH:
        advice = (
            f"allow at least {descriptors.ENOUGH}, better two for each device: LimitNOFILE= in the unit, ulimit -Hn in a shell"
        )
        return Finding(name, "warning", message, advice)
    return Finding(name, "ok", message)


def _running(folder: Folder) -> int | None:
    """The process of the server that works on the folder; None when there is none, or when this system does not tell."""
    try:
        pid, inode = int(folder.lock.read_text()), folder.lock.stat().st_ino
        held = Path("/proc/locks").read_text().splitlines()
    except (OSError, ValueError):
        return None
    fields = (line.split() for line in held)
    locks = {(words[4], words[5].rpartition(":")[2]) for words in fields if words[1] == "FLOCK"}
    return pid if (str(pid), str(inode)) in locks else None


def _limit_of(pid: int) -> int:
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft = line.split()[3]
            return descriptors.MOST if soft == "unlimited" else int(soft)
    return 0


def _told(folder: Folder, config: FleetConfig) -> Iterator[Finding]:
    """What devices are told, and whether this server is what answers there, as seen from this machine."""
    places = (
        ("enrolment", config.enrolment, "http/1.1"),
        ("devices", config.device_url.removeprefix("https://"), DEVICES),
        ("broker address", config.broker_address, MQTT),
    )
    running = _running(folder) is not None
    for name, place, protocol in places:
        said = f"devices are told {place}"
        if not running:
            yield Finding(name, "ok", f"{said}; no server runs here, so whether it answers was not tried")
            continue
        try:
            _greet(folder, *addresses.split(place), protocol)
        except ssl.SSLCertVerificationError as error:
            advice = f"restart the server if fleet.yaml was just changed; else something else answers there, or TLS is not handed through: {PUBLIC}"
            yield Finding(
                name, "failed", f"{said}, and what answers has no certificate of this fleet: {error.verify_message}", advice
            )
        except OSError as error:
            advice = f"if it is reached from elsewhere only (NAT), ask a device: edge-agent doctor. Otherwise {PUBLIC}"
            yield Finding(name, "warning", f"{said}, and it is not reached from here: {error.strerror or error}", advice)
        else:
            yield Finding(name, "ok", f"{said}, and this fleet answers")


def _greet(folder: Folder, host: str, port: int, protocol: str) -> None:
    """A TLS handshake as far as the server's certificate.  Raises: OSError; its kind ssl.SSLCertVerificationError."""
    context = ssl.create_default_context(cafile=str(Authority(folder.pki).trusted_path))
    context.set_alpn_protocols([protocol])
    with (
        socket.create_connection((host, port), timeout=ANSWERS_WITHIN_S) as sock,
        context.wrap_socket(sock, server_hostname=host),
    ):
        pass


def _authority(folder: Folder) -> Finding:
    name = "CA"
    try:
        authority = Authority(folder.pki)
    except PermissionError as error:
        return Finding(name, "warning", f"it may not be read: {error}", "ask as the server's user")
    except (OSError, ValueError, Unavailable) as error:
        return Finding(
            name,
            "failed",
            f"it cannot be read: {error}",
            "restore the folder from a backup",
        )
    step, days = authority.replacement.step, (authority.present.ends - time.time()) / 86400
    message = f"{authority.present.fingerprint[:16]}, ends in {days:.0f} days"
    if authority.next is not None:
        message = f"{message}; being replaced by {authority.next.fingerprint[:16]}: {step.value}"
        return Finding(
            name,
            "warning",
            message,
            "edge-fleet ca status says which devices are left, and docs/how-to/replace-the-ca.md how to go on",
        )
    if days < WARN_BEFORE_S / 86400:
        return Finding(
            name, "failed" if days < 30 else "warning", message, "edge-fleet ca replace, while devices still come in"
        )
    return Finding(name, "ok", message)


def _broker(settings: BrokerSettings) -> Finding:
    name = "broker"
    try:
        path = broker_settings.find_mosquitto(settings)
        said = subprocess.run([path, "-h"], capture_output=True, text=True, timeout=10, check=False).stdout  # noqa: S603 - what fleet.yaml names
    except Unavailable as error:
        return Finding(name, "failed", str(error), "without a broker the server does not start")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, "failed", f"{path} cannot be run: {error}", "install the mosquitto broker anew")
    return Finding(name, "ok", f"{path}, {said.partition(chr(10))[0] or 'which does not say its version'}")


def _cluster(folder: Folder, config: FleetConfig) -> Iterator[Finding]:
    """Every node, and the queues. Those are made when the server first starts."""
    from fleet_server.broker import cluster

    if _running(folder) is None:  # the nodes ask the server who may log in, also about itself
        for one in config.broker.rabbitmq.nodes:
            yield _node(folder, one)
        return
    found = cluster.look(config.broker.rabbitmq, Authority(folder.pki))
    silent = [node for node in found.nodes if node.problem]
    for node in silent:
        level: Literal["warning", "failed"] = "failed" if 2 * len(silent) >= len(found.nodes) else "warning"
        advice = "see its log, and whether its files are those of `edge-fleet rabbitmq-files` (docs/how-to/use-rabbitmq.md)"
        yield Finding(f"node {node.name}", level, f"it cannot be used: {node.problem}", advice)
    answer = f"RabbitMQ, {len(found.nodes) - len(silent)} of {len(found.nodes)} nodes answer"
    if 2 * len(silent) >= len(found.nodes):
        yield Finding("broker", "failed", answer, "more than half of the nodes must be there for anything to be stored")
        return
    waiting = sum(queue.messages for queue in found.queues)
    queues = f"{len(found.queues)} queues, {waiting} messages wait" if found.queues else "no queues yet: the server makes them"
    yield Finding("broker", "ok", f"{answer}; {queues}")


def _node(folder: Folder, node: NodeSettings) -> Finding:
    """As far as it can be told while no server runs."""
    name = f"node {node.name}"
    try:
        _greet(folder, *addresses.split(node.amqp), AMQP)
    except OSError as error:
        return Finding(
            name,
            "failed",
            f"{node.amqp} is not a broker of this fleet: {error}",
            "start it, with the files of `edge-fleet rabbitmq-files`",
        )
    return Finding(name, "ok", f"{node.amqp} answers; no server runs here, so nothing was asked of it")


def _plugin(settings: BrokerSettings) -> Finding:
    name = "plug-in"
    try:
        path = broker_settings.find_plugin(settings)
    except Unavailable as error:
        return Finding(name, "failed", str(error), "correct the name; without it the server does not start")
    if path is None:
        message = "mosquitto's dynamic-security plug-in was not found: revoking a device restarts the broker for everybody"
        return Finding(name, "warning", message, "install it, or name the file in fleet.yaml under broker: dynamic_security:")
    return Finding(name, "ok", str(path))


def _disk(folder: Folder) -> Finding:
    free = shutil.disk_usage(folder.root).free
    message = f"{free // 1024**2} MiB free on the disk of {folder.root}"
    if free < FREE_FAILED_BYTES:
        return Finding("disk", "failed", message, "make room: what devices report is stored nowhere when it is full")
    if free < FREE_WARNING_BYTES:
        return Finding("disk", "warning", message, "make room before the next release")
    return Finding("disk", "ok", message)


def _database(folder: Folder, config: FleetConfig) -> Finding:
    name = "database"
    try:
        found = _revision_in_file(folder.database) if config.database_url is None else _revision_elsewhere(config.database_url)
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
        advice = "restore it from a copy, or correct database_url; ask as the server's user if it may not be read"
        return Finding(name, "failed", f"it cannot be read: {error}", advice)
    where = "SQLite in the data folder" if config.database_url is None else "as database_url says"
    if found is not None and found > newest_revision():
        return Finding(name, "failed", f"{where}, written by a newer version (schema {found})", "install that version")
    if found != newest_revision():
        return Finding(name, "ok", f"{where}, of an earlier version (schema {found}); the next start brings it along")
    return Finding(name, "ok", f"{where}, schema {found}")


def _several(url: str) -> Iterator[Finding]:
    """The processes, where the server is several."""
    database = Database(url)
    try:
        if not database.is_shared or not database.is_current() or not StoredDocuments.are_in(database):
            return
        with database.reading() as session:
            leader = leadership.current(session)
            living = [one.process for one in processes.known(session) if not one.process.missing]
    except (SQLAlchemyError, DatabaseError):
        return  # said above
    finally:
        database.close()
    if leader is None:
        yield Finding(
            "leader",
            "failed",
            "no process leads",
            "start `edge-fleet decide` where the keys are; its log says why it does not lead",
        )
    else:
        since = dt.datetime.fromtimestamp(leader.since).astimezone().isoformat(" ", "seconds")
        yield Finding("leader", "ok", f"{leader.holder} leads with number {leader.number} since {since}, at {leader.address}")
    kinds = {kind: sum(one.kind == kind for one in living) for kind in ("api", "ingest", "decide")}
    message = "; ".join(f"{count} × {kind}" for kind, count in kinds.items())
    missing = [kind for kind, count in kinds.items() if not count]
    if missing:
        yield Finding("processes", "failed", message, "start " + ", ".join(f"`edge-fleet {kind}`" for kind in missing))
    elif kinds["api"] < SEVERAL or kinds["decide"] < SEVERAL:
        yield Finding("processes", "warning", message, "run two of api and two of decide, so that one may end")
    else:
        yield Finding("processes", "ok", message)


def _revision_in_file(path: Path) -> str | None:
    """Without writing beside it, as whoever asks may be another user than the server's."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    in_use = path.with_name(f"{path.name}-wal").exists()  # otherwise nobody writes, and SQLite would make files even to read
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?{'mode=ro' if in_use else 'immutable=1'}", uri=True, timeout=5)
    try:
        row = connection.execute(f"SELECT version_num FROM {VERSIONS}").fetchone()  # noqa: S608 - a constant
    finally:
        connection.close()
    return str(row[0]) if row else None


def _revision_elsewhere(url: str) -> str | None:
    database = Database(url)
    try:
        return database.revision()
    finally:
        database.close()
