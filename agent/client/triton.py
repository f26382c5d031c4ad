"""One line that lets tritonclient's HTTP clients, as they are, speak to a Unix socket.

    client = tritonclient_http("/run/edge-agent/agent.sock")          # a tritonclient.http.InferenceServerClient
    client = tritonclient_aio("/run/edge-agent/agent.sock")           # a tritonclient.http.aio.InferenceServerClient

tritonclient.grpc needs nothing: InferenceServerClient("unix:///run/edge-agent/grpc.sock").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.client.blocking import DEFAULT_SOCKET

HOST = "localhost"  # what stands in the requests; nothing is looked up


def tritonclient_http(socket_path: str | Path = DEFAULT_SOCKET, **options: Any) -> Any:
    """A tritonclient.http client over `socket_path`; `options` are its own (concurrency, connection_timeout, ...).

    Raises: ImportError without tritonclient[http].
    """
    import gevent.socket  # type: ignore[import-untyped,import-not-found,unused-ignore]
    import tritonclient.http  # type: ignore[import-untyped,import-not-found,unused-ignore]

    client = tritonclient.http.InferenceServerClient(HOST, **options)
    pool = client._client_stub._connection_pool  # noqa: SLF001 - it offers no other way to say how to connect
    path = str(socket_path)

    def connect() -> Any:
        sock = gevent.socket.socket(gevent.socket.AF_UNIX, gevent.socket.SOCK_STREAM)
        try:
            sock.settimeout(pool.connection_timeout)
            sock.connect(path)
            sock.settimeout(pool.network_timeout)
        except BaseException:
            sock.close()
            raise
        return sock

    pool._create_socket = connect  # noqa: SLF001
    return client


def tritonclient_aio(socket_path: str | Path = DEFAULT_SOCKET, **options: Any) -> Any:
    """A tritonclient.http.aio client over `socket_path`. To be called in the event loop that it is used in.

    Raises: ImportError without tritonclient[http].
    """
    import aiohttp
    import tritonclient.http.aio  # type: ignore[import-untyped,import-not-found,unused-ignore]

    client = tritonclient.http.aio.InferenceServerClient(HOST, **options)
    session = client._stub  # noqa: SLF001 - it offers no other way to say how to connect
    session._connector = aiohttp.UnixConnector(path=str(socket_path), limit=session.connector.limit)  # noqa: SLF001
    return client  # which closes both connectors
