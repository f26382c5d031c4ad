"""uvicorn, with the client's certificate handed to the application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CERTIFICATE = "client_certificate_der"


class ClientCertificateProtocol(HttpToolsProtocol):
    """Puts the DER bytes of the verified client certificate into `scope["state"]`. From the transport, never from a header."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        connection = transport.get_extra_info("ssl_object")
        certificate = connection.getpeercert(True) if connection is not None else None
        self.app_state = {**self.app_state, CERTIFICATE: certificate}
        super().connection_made(transport)


class Listener(uvicorn.Server):
    """A uvicorn server that leaves signals to the program it runs in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
