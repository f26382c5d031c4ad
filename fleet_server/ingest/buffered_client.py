"""paho's MQTT client with a buffer on either side of its socket.

paho asks the socket three times for each packet, and gives each acknowledgement a TLS record of its own. mosquitto reads one record
of every client in turn: beside a client that fills its records the acknowledgements would fall ever further behind, however fast
this side reads, and with them whatever is to be told to the broker.
"""

from __future__ import annotations

import contextlib
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import MQTTErrorCode

RECORD_BYTES = 16 * 1024  # the most that a TLS record holds
WAITING_BYTES = 4 * RECORD_BYTES  # more is left with paho, which knows what was sent and what was not
DISCONNECT = 0xE0


class BufferedClient(mqtt.Client):
    """For a loop that calls `loop_read` while `has_more`, and `loop_write` while `want_write`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._come, self._read_to = b"", 0
        self._go = bytearray()

    def reconnect(self) -> MQTTErrorCode:
        self._come, self._read_to = b"", 0
        self._go.clear()
        return super().reconnect()

    @property
    def has_more(self) -> bool:
        """Whether something came that was not read yet."""
        return self._read_to < len(self._come)

    def want_write(self) -> bool:
        return bool(self._go) or super().want_write()

    def loop_write(self) -> MQTTErrorCode:
        result = super().loop_write()
        try:
            self._flush()
        except BlockingIOError:
            return result
        except OSError:
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        if not self.want_write():
            self._call_socket_unregister_write()
        return result

    def _sock_recv(self, bufsize: int) -> bytes:
        if not self.has_more:
            self._come, self._read_to = super()._sock_recv(RECORD_BYTES), 0
        found = self._come[self._read_to : self._read_to + bufsize]
        self._read_to += len(found)
        return found

    def _sock_send(self, buf: bytes | bytearray) -> int:
        if len(self._go) > WAITING_BYTES:
            self._flush()
        self._go += buf
        if buf[0] == DISCONNECT:  # paho closes the socket behind it
            with contextlib.suppress(BlockingIOError):
                self._flush()
        return len(buf)

    def _flush(self) -> None:
        """Raises: BlockingIOError when the socket takes no more now."""
        while self._go and self._sock is not None:
            del self._go[: super()._sock_send(self._go[:RECORD_BYTES])]
