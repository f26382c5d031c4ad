"""Writes mosquitto's configuration: mutual TLS, the certificate's CN as user name, and an access list by that name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from agent.common import files
from agent.contract import topics
from fleet_server.config import BrokerSettings, Folder
from fleet_server.devices import pki
from fleet_server.errors import Unavailable

PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/local/opt/mosquitto/sbin")

# No device can subscribe for another: reads are filtered by the same list. Shared subscriptions are not used anywhere,
# because mosquitto's access list does not cover joining one and messages given to a member it may not read are lost.
ACL = f"""\
user {pki.SERVER_CN}
topic readwrite {topics.ROOT}/#

pattern write {topics.ROOT}/d/%u/up/#
pattern read {topics.ROOT}/d/%u/down/#
pattern read {topics.ROOT}/all/#
"""


def find_mosquitto(settings: BrokerSettings) -> str:
    """The broker's executable.  Raises: Unavailable that says how to install it."""
    wanted = settings.mosquitto or "mosquitto"
    found = shutil.which(wanted) or next(
        (str(Path(place) / wanted) for place in PLACES if os.access(Path(place) / wanted, os.X_OK)), None
    )
    if found is None:
        raise Unavailable(
            f"{wanted!r} was not found: install the mosquitto broker (Debian, Ubuntu: apt install mosquitto; Fedora: dnf install "
            "mosquitto; Alpine: apk add mosquitto), or name the executable in fleet.yaml under broker: mosquitto:",
            code="no_mosquitto",
        )
    return found


def write(folder: Folder, settings: BrokerSettings) -> Path:
    """Writes the configuration; paths in it are relative to the data folder, where mosquitto runs."""
    lines = [
        "# Written by edge-fleet at every start; change fleet.yaml instead.",
        "per_listener_settings false",
        "allow_anonymous false",
        "acl_file broker/acl",
        "persistence true",
        "persistence_location broker/",
        "persistence_file mosquitto.db",
        "autosave_interval 60",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "connection_messages false",
        f"max_packet_size {settings.max_packet_bytes}",
        f"max_queued_messages {settings.max_queued_messages}",
        "max_inflight_messages 1000",
        "max_keepalive 600",
        "persistent_client_expiration 14d",
        f"listener {settings.port} {settings.listen}",
        f"max_connections {settings.max_connections}",
        "cafile pki/ca.crt",
        "certfile pki/server.crt",
        "keyfile pki/server.key",
        "crlfile pki/crl.pem",
        "tls_version tlsv1.2",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
    ]
    if os.geteuid() == 0:
        lines.insert(1, "user root")  # otherwise it becomes another user that may not read the data folder
    path = folder.broker / "mosquitto.conf"
    files.write(folder.broker / "acl", ACL.encode(), mode=0o600)
    files.write(path, ("\n".join(lines) + "\n").encode(), mode=0o600)
    return path
