"""What is counted of the broker."""

from __future__ import annotations

from fleet_server.broker.broker import Broker
from fleet_server.metrics import Metrics, Sample


def count(metrics: Metrics, broker: Broker) -> None:
    """Adds what there is of a cluster; a mosquitto of the server's own has no samples."""
    connected = broker.link.connected
    metrics.add("edge_fleet_broker_connected", "1 while messages of devices arrive", lambda: [Sample(connected.is_set())])
    metrics.add(
        "edge_fleet_broker_node_up",
        "1 when a node of the broker cluster answered lately",
        lambda: [Sample(not node.problem, {"node": node.name}) for node in broker.view().nodes],
    )
    metrics.add(
        "edge_fleet_broker_queue_messages",
        "messages that wait in a queue of the broker cluster",
        lambda: [Sample(queue.messages, {"queue": queue.name}) for queue in broker.view().queues],
    )
    metrics.add(
        "edge_fleet_broker_queue_consumers",
        "processes that read a queue of the broker cluster now",
        lambda: [Sample(queue.consumers, {"queue": queue.name}) for queue in broker.view().queues],
    )
