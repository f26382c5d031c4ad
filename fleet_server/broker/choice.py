"""Which broker fleet.yaml names, made."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from fleet_server.broker import settings
from fleet_server.broker.broker import Broker
from fleet_server.broker.mosquitto import Mosquitto
from fleet_server.config import FleetConfig, Folder
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.pki import Authority
from fleet_server.errors import Unavailable
from fleet_server.ingest.intake import Intake
from fleet_server.ingest.transfers import TransferAnswers


def check(config: FleetConfig) -> None:
    """Raises: Unavailable that says what is missing on this machine."""
    if config.broker.kind == "mosquitto":
        settings.find_mosquitto(config.broker)
        settings.find_plugin(config.broker)
    elif find_spec("pika") is None:
        raise Unavailable(
            "the library for RabbitMQ is not installed: pip install 'edge-inference-agent[rabbitmq]'", code="no_library"
        )


def make(
    folder: Folder, config: FleetConfig, authority: Authority, inventory: Inventory, intake: Intake,
    on_models: Callable[[set[str]], None], transfers: TransferAnswers, on_pause: Callable[[str, float], None],
    *, stores: bool = True,
) -> Broker:  # fmt: skip
    """The broker, not started. Without `stores` the process publishes to devices, lets them in and throws them off, and leaves what they
    report to others; a mosquitto has one process, which does all.

    Raises: Unavailable that says what is missing on this machine.
    """
    if config.broker.kind == "rabbitmq":
        from fleet_server.broker.cluster import Cluster

        return Cluster(
            config, authority, intake, on_models, transfers if stores else None, on_pause, inventory.is_admitted, stores=stores
        )
    return Mosquitto(folder, config, authority, intake, on_models, transfers, on_pause)
