"""Writes mosquitto's configuration: mutual TLS, the certificate's CN as user name, and an access list by that name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from agent.common import files
from fleet_server.broker import rules
from fleet_server.config import Folder
from fleet_server.descriptors import for_clients
from fleet_server.devices.pki import Authority
from fleet_server.errors import Unavailable
from fleet_server.ingest.mqtt_link import CONTROL, WINDOW
from fleet_server.sections import BrokerSettings

PLUGIN = "mosquitto_dynamic_security.so"
PLUGIN_PLACES = (
    "/usr/lib/*-linux-*", "/usr/lib64", "/usr/lib", "/usr/lib/mosquitto", "/usr/lib64/mosquitto", "/usr/local/lib", "/opt/homebrew/lib",
)  # fmt: skip
PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/local/opt/mosquitto/sbin")

MAX_INFLIGHT_BYTES = MAX_QUEUED_BYTES = 128 * 1024 * 1024
QUEUED_MESSAGES = 400_000
"""Of one client, the server's own included: what the broker holds at most of a flood until the flooder is off. What comes beyond is
dropped, whosever it is. Measured: 90 000 to 250 000 messages of 200 bytes until a flooder is off, 0.9 s after it began; 0.8 KB of memory for each.
"""

SHUT_OUT = "shut-out"
"""The plug-in's role that may do nothing."""

# A device that the plug-in does not know, and the server itself, are judged by the access list. With `false` here the same holds for
# what the role's patterns do not cover ($SYS): nobody gets more than the list gives. The file is new at every start of the server,
# because the revocation list then holds out who was revoked.
NOBODY_SHUT_OUT = {
    "defaultACLAccess": {"publishClientSend": False, "publishClientReceive": False, "subscribe": False, "unsubscribe": False},
    "roles": [
        {
            "rolename": SHUT_OUT,
            "acls": [
                {"acltype": kind, "topic": "#", "priority": 10, "allow": False}
                for kind in ("publishClientSend", "publishClientReceive", "subscribePattern", "unsubscribePattern")
            ],
        }
    ],
}


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


def find_plugin(settings: BrokerSettings) -> Path | None:
    """The broker's plug-in that shuts single devices out while it runs; None when it is not on this machine.

    Raises: Unavailable when the one that fleet.yaml names is not there.
    """
    if settings.dynamic_security == "":
        return None
    if settings.dynamic_security is not None:
        named = Path(settings.dynamic_security)
        if not named.is_file():
            raise Unavailable(f"broker.dynamic_security in fleet.yaml names {str(named)!r}, which does not exist")
        return named
    places = (place for pattern in PLUGIN_PLACES for place in sorted(Path("/").glob(pattern.lstrip("/"))))
    return next((place / PLUGIN for place in places if (place / PLUGIN).is_file()), None)


def write(folder: Folder, settings: BrokerSettings, plugin: Path | None) -> Path:
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
        "log_type subscribe",
        "connection_messages false",
        f"max_packet_size {settings.max_packet_bytes}",
        f"max_queued_messages {max(settings.max_queued_messages, QUEUED_MESSAGES)}",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        f"max_inflight_messages {WINDOW}",
        f"max_inflight_bytes {MAX_INFLIGHT_BYTES}",
        "max_keepalive 600",
        "persistent_client_expiration 14d",
        f"listener {settings.port} {'' if settings.listen == '::' else settings.listen}".rstrip(),  # at "::" IPv4 would be left out
        f"max_connections {settings.max_connections if settings.max_connections >= 0 else for_clients()}",
        "max_qos 1",
        f"cafile {Authority(folder.pki).trusted_path.relative_to(folder.root)}",
        "certfile pki/server.crt",
        "keyfile pki/server.key",
        "crlfile pki/crl.pem",
        "tls_version tlsv1.2",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
    ]
    if plugin is not None:
        lines += [f"plugin {plugin}", "plugin_opt_config_file broker/dynamic-security.json"]
        files.write(folder.broker / "dynamic-security.json", msgspec.json.encode(NOBODY_SHUT_OUT), mode=0o600)
    if os.geteuid() == 0:
        lines.insert(1, "user root")  # otherwise it becomes another user that may not read the data folder
    path = folder.broker / "mosquitto.conf"
    files.write(folder.broker / "acl", rules.mosquitto_acl(CONTROL).encode(), mode=0o600)
    files.write(path, ("\n".join(lines) + "\n").encode(), mode=0o600)
    return path
