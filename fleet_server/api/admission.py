"""Who a connection belongs to: looked up when it is made, and again when that may have changed.

A device asks for several things on one connection, and the look-up in the database costs more than most answers. So it holds for
AGAIN_AFTER_S, or until this process shuts a device out. A change by another process is seen after AGAIN_AFTER_S at the latest.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import msgspec
from cryptography import x509

from fleet_server.api.tls import CERTIFICATE, CONNECTION
from fleet_server.devices.inventory import Inventory
from fleet_server.errors import Refused

AGAIN_AFTER_S = 10.0


class Admitted(msgspec.Struct, frozen=True):
    """The device of a connection. `shut_out`: how often devices had been shut out by then."""

    device: str
    shut_out: int
    until: float


def known(state: dict[str, Any], inventory: Inventory) -> str | None:
    """The device of the connection, if that need not be looked up. `state` is the connection's (`scope["state"]`)."""
    admitted = state.get(CONNECTION, {}).get("admitted")
    if admitted is None or admitted.shut_out != inventory.shut_out or time.monotonic() > admitted.until:
        return None
    device: str = admitted.device
    return device


def look_up(state: dict[str, Any], inventory: Inventory) -> str:
    """The device of the connection.  Raises: Refused."""
    shut_out = inventory.shut_out  # before the look-up: whoever is shut out during it is looked up again
    device = inventory.authenticate(presented(state))
    if CONNECTION in state:
        state[CONNECTION]["admitted"] = Admitted(device, shut_out, time.monotonic() + AGAIN_AFTER_S)
    return device


def presented(state: dict[str, Any]) -> x509.Certificate:
    """The certificate of the connection.  Raises: Refused."""
    der = state.get(CERTIFICATE)
    if not der:
        raise Refused("this listener needs a client certificate", code="no_certificate")
    return _certificate(der)


@functools.lru_cache(maxsize=16384)
def _certificate(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)
