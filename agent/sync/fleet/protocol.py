"""Which MQTT a broker is spoken to with: 5, or 3.1.1 where a broker knows no other."""

from __future__ import annotations

import logging
import math

from paho.mqtt.enums import MQTTProtocolVersion

log = logging.getLogger(__name__)

FIVE, THREE = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
STAYS_FOR = 8
"""After a broker has taken one, so many refusals in a row make the device try the other once: the broker may have been replaced.
Fewer are about something else: it is starting, or the device is shut out."""


ASKED_AGAIN_S, EVER_AGAIN_S = (5.0, 15.0, 40.0), 600.0


def asks_again_after_s(protocol: MQTTProtocolVersion, times: int) -> float:
    """How long after it asked for pokes for the `times`-th time on a connection a device asks once more; inf: never.

    A cluster that speaks MQTT 3.1.1 (RabbitMQ before 3.13) keeps a subscription by the device's name, and deletes those of a node that died by
    name, too: also the one that the device has made at another node since. Its connection stays, and it would hear nothing for good. Asked
    again, the cluster restores the subscription or ends the connection, and the device makes a new one.
    """
    if protocol == FIVE:
        return math.inf
    return ASKED_AGAIN_S[times - 1] if times <= len(ASKED_AGAIN_S) else EVER_AGAIN_S


def poke_qos(protocol: MQTTProtocolVersion) -> int:
    """The quality of service with which pokes are asked for. A cluster that speaks MQTT 3.1.1 (RabbitMQ before 3.13) keeps what is asked for
    with 1 in a queue of one node, and while that is down it ends the device's connections to every other node.
    """
    return 1 if protocol == FIVE else 0


class ProtocolChoice:
    """Goes by what one broker does. For one thread."""

    def __init__(self) -> None:
        self.present = FIVE
        self._taken: MQTTProtocolVersion | None = None
        self._refusals = 0

    def refused(self) -> None:
        """After a refusal that may be about the protocol: brokers of MQTT 3.1.1 answer a CONNECT of MQTT 5 in many ways, or not at
        all. What the broker has taken before is tried again first.
        """
        self._refusals += 1
        if self._taken is not None and self._refusals % STAYS_FOR:
            self.present = self._taken
        else:
            self.present = THREE if self.present == FIVE else FIVE

    def accepted(self) -> None:
        """The broker accepted a connection of the present protocol."""
        self._refusals = 0
        if self._taken != self.present and self.present == THREE:
            log.info("the broker speaks MQTT 3.1.1: going on with that")
        self._taken = self.present
