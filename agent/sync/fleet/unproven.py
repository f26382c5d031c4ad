"""The fleet's documents from a server that cannot prove who it is: the last way, for a device that was away while the fleet replaced
its CA and knows none of those that vouch for the server now.

The documents say the new CA, and they are verified as those of any other way: by the root that came with enrolment, and never older
than what was seen. Nothing else is asked for by this way, and nothing is sent but the names of documents. Whoever answers instead of
the fleet server learns which device asks, and can show it nothing that was not signed.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import ssl
import threading
from collections.abc import Callable, Iterator

from agent.contract.addresses import DEVICES, check_url
from agent.contract.reasons import Reason
from agent.sync import refusals
from agent.sync.http import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, FleetHttp, HttpStatus, TooLong
from agent.sync.problems import Problem
from agent.sync.proxy import Way

log = logging.getLogger(__name__)

_CHUNK_BYTES = 64 * 1024


class Unproven:
    """A way to documents (`agent.sync.trust.metadata.Documents`). A connection of its own for each. Written on http.client so that no
    pool ever holds an unverified connection.
    """

    server_time: float | None = None

    def __init__(self, proven: FleetHttp, tls: Callable[[], ssl.SSLContext], way: Way) -> None:
        """It is gone while `proven`, the first way to the same server, finds that its certificate cannot be verified. `tls` makes
        what shows this device's certificate, and verifies the server's.
        """
        self._proven, self._tls, self._way = proven, tls, way

    def url(self, path: str) -> str:
        return f"unproven:{path}"

    def get(self, url: str, *, limit_bytes: int, deadline_s: float) -> bytes:
        """Raises: HttpStatus, TooLong, Problem."""
        path = url.removeprefix("unproven:")
        shown = self._proven.url(path)
        if not self._proven.mistrusted:
            raise Problem(Reason.DOWNLOAD_FAILED, f"{shown}: who the server is, is not what keeps it from being reached")
        try:
            with self._connected() as sock, _cut_off_after(sock, deadline_s):
                return _read(sock, path, shown, limit_bytes)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Problem(Reason.DOWNLOAD_FAILED, f"{shown}: cannot be reached: {refusals.in_words(str(error))}") from error

    def close(self) -> None:
        return

    @contextlib.contextmanager
    def _connected(self) -> Iterator[ssl.SSLSocket]:
        context = self._tls()
        try:
            sock = self._connect(context)
        except ssl.SSLCertVerificationError as error:
            log.warning(
                "the fleet server cannot prove who it is (%s): asking it for signed documents all the same, because its CA may be a new one",
                error.verify_message,
            )
            context = self._tls()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            sock = self._connect(context)
        with sock:
            yield sock

    def _connect(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        context.set_alpn_protocols([DEVICES, "http/1.1"])
        host, port = check_url(self._proven.base_url)
        plain = self._way.connect(host, port, CONNECT_TIMEOUT_S)
        try:
            plain.settimeout(READ_TIMEOUT_S)
            return context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise


@contextlib.contextmanager
def _cut_off_after(sock: ssl.SSLSocket, seconds: float) -> Iterator[None]:
    """Whoever sends a byte now and then would else keep the reader for ever."""

    def cut_off() -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(2)

    timer = threading.Timer(seconds, cut_off)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(sock: ssl.SSLSocket, path: str, shown: str, limit_bytes: int) -> bytes:
    connection = http.client.HTTPConnection("fleet")
    connection.sock = sock
    connection.request("GET", path, headers={"Accept-Encoding": "identity", "Connection": "close"})
    with contextlib.closing(connection.getresponse()) as response:
        if response.status != 200:
            raise HttpStatus(response.status, f"{shown}: the server answered {response.status}")
        body = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            body += chunk
            if len(body) > limit_bytes:
                raise TooLong(Reason.ENDLESS_DATA, f"{shown}: more than the {limit_bytes} bytes allowed")
        if response.length:
            raise Problem(Reason.DOWNLOAD_FAILED, f"{shown}: broke off after {len(body)} bytes")
        return bytes(body)
