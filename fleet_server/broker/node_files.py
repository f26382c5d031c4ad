"""Writes what a node of a RabbitMQ cluster needs to be this fleet's broker: its certificate, rabbitmq.conf, advanced.config, the plug-ins."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from agent.common import files
from agent.contract.addresses import split
from fleet_server.broker import questions
from fleet_server.config import FleetConfig, is_loopback
from fleet_server.devices.pki import Authority
from fleet_server.errors import Invalid
from fleet_server.ingest import routing
from fleet_server.sections import NodeSettings

PLUGINS = (
    "rabbitmq_auth_backend_cache", "rabbitmq_auth_backend_http", "rabbitmq_auth_mechanism_ssl",
    "rabbitmq_consistent_hash_exchange", "rabbitmq_mqtt", "rabbitmq_prometheus",
)  # fmt: skip
CACHED_MS = 5 * 60 * 1000
"""For so long a node keeps an answer about topics and queues, which follow from names alone. Who may log in is asked anew each time."""


def write(config: FleetConfig, authority: Authority, out: Path, place: str) -> list[Path]:
    """Writes a folder for each node below `out`, for the folder `place` on the node; the folders. A node that had files gets a new
    certificate, and the old one stays good.

    Raises: Invalid when fleet.yaml names no cluster; OSError.
    """
    if config.broker.kind != "rabbitmq":
        raise Invalid("fleet.yaml names no cluster: set broker.kind to rabbitmq and broker.rabbitmq.nodes", code="no_cluster")
    return [_write_node(config, authority, node, out / node.name, place) for node in config.broker.rabbitmq.nodes]


def _write_node(config: FleetConfig, authority: Authority, node: NodeSettings, out: Path, place: str) -> Path:
    told = (split(config.broker_address)[0], split(node.amqp)[0], split(node.mqtt)[0])
    certificate, key = authority.issue_broker_node(tuple(dict.fromkeys(told)))
    files.make_directory(out, mode=0o700)
    files.write(out / "ca.crt", authority.trusted_path.read_bytes())
    files.write(out / "node.crt", certificate)
    files.write(out / "node.key", key, mode=0o600)
    files.write(out / "rabbitmq.conf", conf(config, node, place).encode())
    files.write(out / "advanced.config", advanced(config, place).encode())
    files.write(out / "enabled_plugins", f"[{','.join(PLUGINS)}].\n".encode())
    return out


def conf(config: FleetConfig, node: NodeSettings, place: str) -> str:
    """rabbitmq.conf of a node."""
    settings, asked = config.broker.rabbitmq, f"https://{config.authorization}{questions.ROOT}"
    lines = [
        "# Written by `edge-fleet rabbitmq-files`. RabbitMQ 3.10 or newer.",
        "",
        "# Everybody shows a certificate of the fleet's CA, and is who it says.",
        "listeners.tcp = none",
        f"listeners.ssl.1 = {_listen(node.amqp)}",
        f"ssl_options.cacertfile = {place}/ca.crt",
        f"ssl_options.certfile = {place}/node.crt",
        f"ssl_options.keyfile = {place}/node.key",
        "ssl_options.verify = verify_peer",
        "ssl_options.fail_if_no_peer_cert = true",
        "ssl_options.versions.1 = tlsv1.3",
        "ssl_options.versions.2 = tlsv1.2",
        "ssl_cert_login_from = common_name",
        "auth_mechanisms.1 = EXTERNAL",
        "mqtt.listeners.tcp = none",
        f"mqtt.listeners.ssl.1 = {_listen(node.mqtt)}",
        "mqtt.ssl_cert_login = true",
        "mqtt.allow_anonymous = false",
        f"mqtt.vhost = {settings.vhost}",
        f"mqtt.exchange = {routing.TOPICS}",
        f"max_message_size = {config.broker.max_packet_bytes}",
        "prometheus.tcp.ip = 127.0.0.1",
        "",
        "# Who may do what is asked of the fleet server: who logs in each time, the rest once in a while.",
        "auth_backends.1.authn = http",
        "auth_backends.1.authz = cache",
        "auth_cache.cached_backend = http",
        f"auth_cache.cache_ttl = {CACHED_MS}",
        "auth_http.http_method = post",
        *(f"auth_http.{kind}_path = {asked}{kind}" for kind in questions.KINDS),
        "",
        "# A node that cannot see most of the others stops, so that nothing is acknowledged twice.",
        "cluster_partition_handling = pause_minority",
        "cluster_formation.peer_discovery_backend = classic_config",
        *(f"cluster_formation.classic_config.nodes.{number} = {one.name}" for number, one in enumerate(settings.nodes, 1)),
    ]
    return "\n".join([*lines, ""])


def advanced(config: FleetConfig, place: str) -> str:
    """advanced.config of a node: what rabbitmq.conf cannot say."""
    asks: tuple[str, ...] = (
        f'{{cacertfile,"{place}/ca.crt"}}', f'{{certfile,"{place}/node.crt"}}', f'{{keyfile,"{place}/node.key"}}',
        "{verify,verify_peer}", "{versions,['tlsv1.3','tlsv1.2']}",
    )  # fmt: skip
    if _is_address(
        split(config.authorization)[0]
    ):  # Erlang compares no addresses; the server's certificate always says this name too
        asks = (*asks, '{server_name_indication,"localhost"}')
    parts = [f"{{rabbitmq_auth_backend_http,[{{ssl_options,[{','.join(asks)}]}}]}}"]
    if all(is_loopback(split(node.amqp)[0]) for node in config.broker.rabbitmq.nodes):
        parts.append("{kernel,[{inet_dist_use_interface,{127,0,0,1}}]}")
    return "[" + ",\n ".join(parts) + "].\n"


def _listen(place: str) -> str:
    """Where a node listens that is reached at HOST:PORT: at that address, or everywhere where HOST is a name."""
    host, port = split(place)
    return place if _is_address(host) else str(port)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
