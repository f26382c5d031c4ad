"""Connections to the fleet server and its broker as this device: its certificate, its clock, its way out."""

from __future__ import annotations

import ssl

from agent.contract import enrolment
from agent.contract.addresses import Addresses, join
from agent.contract.assignment import MAX_RECORD_BYTES
from agent.host.clock import SignedClock
from agent.sync.addresses import Ways
from agent.sync.fleet import link
from agent.sync.fleet.unproven import Unproven
from agent.sync.http import NO_CHECK_TIME, FleetHttp, HttpStatus
from agent.sync.identity import Identity
from agent.sync.problems import Problem
from agent.sync.proxy import Way

ANSWER_S = 15.0
NO_SUCH_MQTT = b"\x10\x0c\x00\x04MQTT\x7f\x02\x00\x05\x00\x00"
"""A CONNECT of MQTT version 127, which every broker refuses in words. One of a real version would take the place of the agent's
own connection."""

CONNACK = 0x20


class NoBroker(ConnectionError):
    """What listens there takes no certificate of this device, or is no broker."""


class Connector:
    """For any thread; every call makes connections of its own."""

    def __init__(self, who: Identity, clock: SignedClock, way: Way) -> None:
        self._who, self._clock, self.way = who, clock, way

    def http(self, device_url: str) -> FleetHttp:
        """The devices' listener of a fleet server. The certificate is read for each connection, so a renewed one is used."""
        who = self._who
        return FleetHttp(
            device_url, self._clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file, unset=self._clock.unset,
            way=self.way,
        )  # fmt: skip

    def tls(self) -> ssl.SSLContext:
        """For a connection to the broker.  Raises: OSError."""
        who = self._who
        context = link.tls_context(str(who.ca_file), str(who.certificate_file), str(who.key_file))
        if self._clock.unset():
            context.verify_flags |= NO_CHECK_TIME
        return context

    def unproven(self, proven: FleetHttp) -> Unproven:
        """The way to documents that is left while `proven` meets a certificate of a CA that this device does not know."""
        return Unproven(proven, self.tls, self.way)

    def greet_broker(self, host: str, port: int) -> str:
        """The version of TLS that a broker of this fleet speaks there.  Raises: OSError."""
        with self.way.connect(host, port) as plain, self.tls().wrap_socket(plain, server_hostname=host) as secured:
            secured.settimeout(ANSWER_S)
            secured.sendall(NO_SUCH_MQTT)
            said = secured.recv(64)  # with TLS 1.3 a refused certificate shows itself only here
            if not said:
                raise NoBroker(f"{join(host, port)} ({secured.version()}) closes the connection without a word")
            if said[0] != CONNACK:
                raise NoBroker(f"{join(host, port)} ({secured.version()}) does not answer as a broker does")
            return secured.version() or "TLS"

    def answers(self, one: Addresses) -> Ways:
        """By which ways the fleet server answers this device at an address. Takes up to a minute when nobody does."""
        found = set()
        http = self.http(one.device_url)
        try:
            http.get(http.url(enrolment.RECORD_PATH), limit_bytes=MAX_RECORD_BYTES, deadline_s=ANSWER_S)
            found.add("https")
        except HttpStatus as status:
            if status.wait_s:  # busy, and itself
                found.add("https")
        except Problem:
            pass
        finally:
            http.close()
        try:
            self.greet_broker(one.broker_host, one.broker_port)
            found.add("mqtt")
        except OSError:
            pass
        return frozenset(found)
