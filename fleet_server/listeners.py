"""The server's HTTPS listeners: who is answered where, and how many connections each may have."""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import uvicorn
from starlette.types import ASGIApp

from fleet_server import descriptors
from fleet_server.api.connections import Connections, Limits
from fleet_server.api.shared_port import SharedPort
from fleet_server.api.tls import CIPHERS, HEAD_WITHIN_S, ClientCertificateProtocol, Listener, OperatorProtocol
from fleet_server.config import ConnectionSettings, FleetConfig
from fleet_server.devices.pki import Authority
from fleet_server.errors import Unavailable
from fleet_server.metrics import Metrics, Sample

_log = logging.getLogger(__name__)

GRACE_S = 3  # for requests under way when the server stops
OTHER_DESCRIPTORS = 320
"""For everything but connections: three for each thread that reads the database, files that are sent, the broker, the log."""
SHARED_PART = 4
"""One in so many descriptors is left to the shared port, however few there are."""
OF_NODES = 128
"""Connections of a broker cluster's nodes; a node has two, and more for a moment while many devices connect."""
BACKLOG = 2048


def make(
    config: FleetConfig, authority: Authority, operators: ASGIApp, devices: ASGIApp, questions: ASGIApp | None = None
) -> list[Listener | SharedPort]:
    """The listeners of operators, of devices, and where there is one that of this machine, the shared port, and that of the broker's
    `questions`. They are not run yet.
    """
    allowed = descriptors.allowed()
    room = fitted(config.connections, allowed if config.shared_port is None else allowed * (SHARED_PART - 1) // SHARED_PART)
    tls: dict[str, Any] = {"ssl_certfile": authority.server_cert, "ssl_keyfile": authority.server_key, "ssl_ciphers": CIPHERS}
    device_tls = {**tls, "ssl_ca_certs": str(authority.trusted_path), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    proxies: dict[str, Any] = {
        "proxy_headers": bool(config.trusted_proxies),
        "forwarded_allow_ips": as_seen(config.trusted_proxies),
    }
    by_operators = Limits(total=room.operators, per_address=room.operators_per_address, per_device=room.operators)
    by_devices = Limits(total=room.devices, per_address=room.devices_per_address, per_device=room.per_device)
    found: list[Listener | SharedPort] = [
        by_operators_port := listener(
            operators, config.listen, config.operator_port, by_operators, "operators", **tls, **proxies
        ),
        by_devices_port := listener(
            devices, config.listen, config.device_port, by_devices, "devices", http=ClientCertificateProtocol, **device_tls
        ),
    ]
    if config.loopback_port is not None:  # one address, that of the reverse proxy
        here = Limits(total=room.loopback, per_address=room.loopback, per_device=room.loopback)
        found.append(listener(operators, config.loopback_address, config.loopback_port, here, "loopback", **proxies))
    if questions is not None:
        found.append(by_nodes(questions, config, authority))
    if config.shared_port is not None:
        left = allowed - OTHER_DESCRIPTORS - room.operators - room.devices - room.loopback
        most = min(left // 2, descriptors.for_clients())  # two each: the client's, and the broker's
        where = (config.broker_here, config.broker.port)
        found.append(SharedPort(config.listen, config.shared_port, by_operators_port, by_devices_port, where, most))
    return found


def by_nodes(questions: ASGIApp, config: FleetConfig, authority: Authority) -> Listener:
    """Where the nodes of a broker cluster ask. They have one name, and few addresses."""
    limits = Limits(total=OF_NODES, per_address=OF_NODES, per_device=OF_NODES)
    asked = config.broker.rabbitmq
    tls: dict[str, Any] = {
        "ssl_certfile": authority.server_cert, "ssl_keyfile": authority.server_key, "ssl_ciphers": CIPHERS,
        "ssl_ca_certs": str(authority.trusted_path), "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }  # fmt: skip
    where = (asked.authorization_listen, asked.authorization_port)
    return listener(questions, *where, limits, "broker", http=ClientCertificateProtocol, **tls)


def as_seen(networks: Sequence[str]) -> list[str]:
    """Addresses and networks as listeners see who comes from them: one that listens at `::` sees ::ffff:192.0.2.7 for 192.0.2.7."""
    old = (one for one in map(ipaddress.ip_network, networks) if one.version == 4)
    return [*networks, *(f"::ffff:{one.network_address}/{96 + one.prefixlen}" for one in old)]


def fitted(wanted: ConnectionSettings, allowed: int) -> ConnectionSettings:
    """As many connections as the process has descriptors for, each listener its part."""
    together = wanted.devices + wanted.operators + wanted.loopback
    part = max(0.1, (allowed - OTHER_DESCRIPTORS) / together)
    if part >= 1:
        return wanted
    _log.warning(
        "this process may have %d open files, so its listeners share %d connections instead of %d; raise the limit (LimitNOFILE)",
        allowed, together * part, together,
    )  # fmt: skip
    numbers = {
        name: max(1, int(number * part)) for name, number in msgspec.structs.asdict(wanted).items() if name != "per_device"
    }
    return msgspec.structs.replace(wanted, **numbers)


def count(metrics: Metrics, listening: Sequence[Listener | SharedPort]) -> None:
    """Tells what becomes of connections."""
    found = [one for one in listening if isinstance(one, Listener)]
    shared = [one for one in listening if isinstance(one, SharedPort)]
    metrics.add(
        "edge_fleet_shared_port_connections_total",
        "connections at the shared port by where they went; silent: they said nothing; full: no room to the broker",
        lambda: [Sample(number, {"to": goal}) for one in shared for goal, number in sorted(dict(one.routed).items())],
    )
    metrics.add(
        "edge_fleet_shared_port_broker_connections",
        "connections to the broker that go through the shared port",
        lambda: [Sample(one.to_broker) for one in shared],
    )

    def by_cause(counted: Callable[[Connections], Mapping[str, int]]) -> Callable[[], list[Sample]]:
        return lambda: [
            Sample(number, {"listener": one.name, "full": cause})
            for one in found
            for cause, number in sorted(counted(one.room).items())
        ]

    def of(number: Callable[[Connections], int]) -> Callable[[], list[Sample]]:
        return lambda: [Sample(number(one.room), {"listener": one.name}) for one in found]

    metrics.add("edge_fleet_connections", "HTTPS connections that are open", of(len))
    metrics.add("edge_fleet_connections_limit", "how many there may be at once", of(lambda room: room.limits.total))
    metrics.add("edge_fleet_connections_accepted_total", "connections that were let in", of(lambda room: room.accepted))
    metrics.add(
        "edge_fleet_connections_ended_total",
        "silent connections that made room, by what was full; handshake: the first bytes or TLS took too long",
        by_cause(lambda room: dict(room.ended)),
    )
    metrics.add(
        "edge_fleet_connections_refused_total",
        "connections that were not let in, by what was full",
        by_cause(lambda room: dict(room.refused)),
    )


def listener(app: ASGIApp, host: str, port: int, limits: Limits, name: str, **options: Any) -> Listener:
    """A listener that serves the application once it is run. `options` are uvicorn's."""
    config = uvicorn.Config(
        app, host=host, port=port, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=GRACE_S, timeout_keep_alive=int(HEAD_WITHIN_S),
        **{"http": OperatorProtocol, "proxy_headers": False, **options},
    )  # fmt: skip
    return Listener(config, Connections(limits, time.monotonic), name)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; at `::` one that IPv4 reaches too.  Raises: Unavailable when another program has the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host} port {port}: {error.strerror or error}; change it in fleet.yaml") from error
