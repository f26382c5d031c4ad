"""A RabbitMQ cluster that others run: the link to it, who is let in, and how its nodes and queues are."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import Callable

import pika
from pika.exceptions import AMQPError
from starlette.types import ASGIApp

from agent.contract.addresses import split
from fleet_server.broker.authorization import Authorization
from fleet_server.broker.eviction import ClusterDoor, evict
from fleet_server.broker.questions import Questions
from fleet_server.config import FleetConfig
from fleet_server.devices.pki import Authority
from fleet_server.ingest import topology
from fleet_server.ingest.amqp_connection import parameters
from fleet_server.ingest.amqp_link import AmqpLink
from fleet_server.ingest.broker_views import BrokerView, NodeView, QueueView
from fleet_server.ingest.intake import Intake
from fleet_server.ingest.transfers import TransferAnswers
from fleet_server.sections import RabbitSettings

_log = logging.getLogger(__name__)

LOOK_S, LOOK_SOON_S = 15.0, 3.0  # while all is well, and while it is not


class Cluster:
    """See `Broker`."""

    def __init__(
        self, config: FleetConfig, authority: Authority, intake: Intake, on_models: Callable[[set[str]], None],
        transfers: TransferAnswers | None, on_pause: Callable[[str, float], None], admitted: Callable[[str], bool], *,
        stores: bool = True,
    ) -> None:  # fmt: skip
        """`on_pause` is told of each device that is shut out for a while, and for how many seconds; `admitted` says whether a device of
        this name is in the fleet and not revoked. Without `stores` what devices report is left to another process.
        """
        self._settings = config.broker.rabbitmq
        nodes = [split(node.mqtt) for node in self._settings.nodes]
        self.link = AmqpLink(self._settings, authority, intake, on_models, transfers, stores=stores)
        self._door = ClusterDoor(lambda device: evict(device, authority, nodes), on_pause)
        self.link.on_flood, self.link.on_paused = self._door.pause, self._door.again
        may = Authorization(
            lambda device: not self._door.is_paused(device) and admitted(device),
            self.link.connected.is_set,
            self._settings.vhost,
        )
        self.questions: ASGIApp | None = Questions(may)
        self._context = ssl.create_default_context(cafile=str(authority.trusted_path))
        self._authority, self._stores = authority, stores
        self._view = BrokerView("rabbitmq", [NodeView(node.name, "not asked yet") for node in self._settings.nodes])
        self._stopping = threading.Event()
        self._ended = asyncio.Event()
        self._looks = threading.Thread(target=self._look, name="cluster", daemon=True)

    async def run(self) -> None:
        await self._ended.wait()

    async def end(self) -> None:
        self._ended.set()

    def start(self) -> None:
        self._door.start()
        self.link.start()
        if self._stores:
            self._looks.start()

    def stop(self) -> None:
        self._stopping.set()
        self._door.stop()
        self.link.stop()

    def hopeless(self) -> bool:
        return self.link.hopeless

    def missing(self) -> str:
        return (
            "" if self.link.connected.is_set() else f"the RabbitMQ cluster cannot be used: {self.link.problem or 'no answer'}"
        )

    def shut_out(self, device: str) -> None:
        self._door.shut_out(device)

    def admit(self, device: str) -> None:
        self._door.admit(device)

    def keep_out(self, device: str, seconds: float) -> None:
        self._door.keep_out(device, seconds)

    def paused(self) -> list[str]:
        return self.link.flood.paused()

    def warnings(self) -> list[str]:
        silent = [f"{node.name} ({node.problem})" for node in self._view.nodes if node.problem]
        found = [self._door.problem] if self._door.problem else []
        if silent:
            found.append(f"{len(silent)} of {len(self._view.nodes)} nodes of the broker do not answer: {', '.join(silent)}")
        return found

    def restart(self) -> None:
        _log.warning(
            "a CA is believed no more: write the nodes' files anew (edge-fleet rabbitmq-files) and restart them one by one"
        )

    def renew(self) -> None:
        self.link.renew()

    def reload(self) -> None:
        """The nodes read no list of revoked certificates: they ask about each who logs in."""

    def view(self) -> BrokerView:
        return self._view

    def _look(self) -> None:
        while not self._stopping.is_set():
            try:
                self._view = look(self._settings, self._authority)
            except Exception:  # noqa: BLE001 - the thread must go on
                _log.exception("the cluster could not be looked at")
            well = self._view.queues and not any(node.problem for node in self._view.nodes)
            self._stopping.wait(LOOK_S if well else LOOK_SOON_S)


def look(settings: RabbitSettings, authority: Authority) -> BrokerView:
    """Asks every node whether it is there, and one how full the queues are. Takes some seconds when nodes do not answer."""
    context = ssl.create_default_context(cafile=str(authority.trusted_path))
    context.load_cert_chain(authority.client_cert, authority.client_key)
    nodes, queues = [], list[QueueView]()
    for node in settings.nodes:
        try:
            where = parameters(split(node.amqp), settings.vhost, context, "edge-fleet-look")
            with pika.BlockingConnection(where) as connection:
                queues = queues or _depths(connection, settings)
        except (AMQPError, OSError) as error:  # noqa: PERF203 - a few nodes
            nodes.append(NodeView(node.name, topology.error_text(error)))
        else:
            nodes.append(NodeView(node.name, ""))
    return BrokerView("rabbitmq", nodes, queues)


def _depths(connection: pika.BlockingConnection, settings: RabbitSettings) -> list[QueueView]:
    wanted = topology.queues_of(settings)
    depths = ((queue.name, topology.depth_of(connection, queue.name)) for queue in wanted)
    return [QueueView(name, depth.messages, depth.consumers) for name, depth in depths if depth is not None]
