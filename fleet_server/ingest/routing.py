"""How MQTT topics and the names in a RabbitMQ cluster go together. Pure.

RabbitMQ's MQTT is a topic exchange: what devices publish is there with dots where the topic has slashes, and what is published there
by AMQP reaches the devices that subscribed to it. From it, what devices report goes to an exchange that shares it out:

    amq.topic ── v1.d.*.up.{state,events,telemetry,presence} ──> edge.reports (x-consistent-hash) ──> edge.reports.0, .1, …
              └─ v1.d.*.up.blocks ──────────────────────────────────────────────────────────────────> edge.asks

All that a device says on one topic is in one queue, in its order.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from agent.contract import topics

TOPICS = "amq.topic"
REPORTS = "edge.reports"
ASKS = "edge.asks"
"""What devices ask for over MQTT. Whoever answers takes it; a device asks again."""

ASK_MS, MAX_ASKS = 30_000, 20_000
ASKING: topics.Upward = "blocks"
_UPWARD: tuple[topics.Upward, ...] = get_args(topics.Upward)
_TO_KEY = str.maketrans("/.+", "./*")
_TO_TOPIC = str.maketrans("./*", "/.+")


class Queue(msgspec.Struct, frozen=True):
    """A queue as it is declared, and what is bound to it: (exchange, routing key)."""

    name: str
    arguments: dict[str, Any]
    bound: tuple[tuple[str, str], ...]


def key_of(topic: str) -> str:
    """The routing key of an MQTT topic or filter."""
    return topic.translate(_TO_KEY)


def topic_of(key: str) -> str:
    """The MQTT topic or filter of a routing key."""
    return key.translate(_TO_TOPIC)


def report_keys() -> tuple[str, ...]:
    """The routing keys of what devices report."""
    return tuple(key_of(topics.up("+", what)) for what in _UPWARD if what != ASKING)


def partition(number: int) -> str:
    return f"{REPORTS}.{number}"


def queues(partitions: int, *, messages: int, size_bytes: int) -> tuple[Queue, ...]:
    """Every queue. Each report queue has one consumer at a time, so that what it holds is stored in order; who finds it full is
    refused, and so are devices, which keep what they wanted to say.
    """
    quorum = {"x-queue-type": "quorum", "x-queue-leader-locator": "balanced"}
    report = {
        **quorum, "x-single-active-consumer": True, "x-overflow": "reject-publish", "x-max-length": messages,
        "x-max-length-bytes": size_bytes,
    }  # fmt: skip
    ask = {**quorum, "x-message-ttl": ASK_MS, "x-max-length": MAX_ASKS}
    reports = [Queue(partition(number), report, ((REPORTS, "1"),)) for number in range(partitions)]
    return (*reports, Queue(ASKS, ask, ((TOPICS, key_of(topics.up("+", ASKING))),)))
