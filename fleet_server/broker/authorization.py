"""What RabbitMQ asks of this server about everybody who connects to it, and what it is told (`rabbitmq_auth_backend_http`).

A user is known by the certificate that the node has verified, so a question with a password is somebody's who wants to be another, and
is answered no. A device is let in by MQTT alone and under its own client id: AMQP has none. Only this server may declare queues and
exchanges, read what devices report, and take a client id that is not its name, with which it throws a device off (`eviction`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent.contract import names
from fleet_server.broker import rules
from fleet_server.devices import pki
from fleet_server.ingest import routing

Question = Mapping[str, str]
"""The fields of one, as the node sends them."""


class Authorization:
    """For any thread. Each method answers one kind of question."""

    def __init__(self, admitted: Callable[[str], bool], ready: Callable[[], bool], vhost: str) -> None:
        """`admitted`: whether a device of this name is in the fleet and not shut out; reads the database. `ready`: whether there are
        queues for what devices report; without them the broker would acknowledge it and throw it away.
        """
        self._admitted, self._ready, self._vhost = admitted, ready, vhost

    def user(self, asked: Question) -> bool:
        """Who may log in."""
        if "password" in asked:
            return False
        name = asked.get("username", "")
        return name == pki.SERVER_CN or self._is_admitted(name)

    def vhost(self, asked: Question) -> bool:
        """Who may come into a virtual host."""
        name = asked.get("username", "")
        if asked.get("vhost") != self._vhost:
            return False
        return name == pki.SERVER_CN or (asked.get("client_id") == name and self._is_admitted(name))

    def resource(self, asked: Question) -> bool:
        """Who may configure, write and read queues and exchanges."""
        name, kind, what = asked.get("username", ""), asked.get("resource"), asked.get("name")
        if asked.get("vhost") != self._vhost:
            return False
        if name == pki.SERVER_CN:
            return True
        if not is_device(name):
            return False
        if kind == "exchange":
            return what == routing.TOPICS and asked.get("permission") in {"read", "write"}
        return kind == "queue" and what in {f"mqtt-subscription-{name}qos{qos}" for qos in (0, 1)}

    def topic(self, asked: Question) -> bool:
        """Who may publish and subscribe to which topics."""
        name, permission = asked.get("username", ""), asked.get("permission")
        if asked.get("vhost") != self._vhost or asked.get("name") != routing.TOPICS:
            return False
        if name == pki.SERVER_CN:
            return True
        if not is_device(name):
            return False
        topic = routing.topic_of(asked.get("routing_key", ""))
        return rules.may_write(name, topic) if permission == "write" else permission == "read" and topic in rules.filters(name)

    def _is_admitted(self, name: str) -> bool:
        return is_device(name) and self._ready() and self._admitted(name)


def is_device(name: str) -> bool:
    """Whether a device may be called so."""
    return names.DEVICE_ID.fullmatch(name) is not None and name not in pki.RESERVED_IDS
