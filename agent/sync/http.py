"""HTTPS to the fleet server with this device's certificate. The one place where errors of `requests` are translated."""

from __future__ import annotations

import contextlib
import email.utils
import functools
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from agent.contract.addresses import DEVICES
from agent.contract.codec import ContractError, decode
from agent.contract.reasons import Reason
from agent.sync import refusals
from agent.sync.ports import Clock
from agent.sync.problems import Problem
from agent.sync.proxy import DIRECT, ProxyFailed, Way

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0
"""The longest silence between two packets. How long a whole answer may take is the caller's deadline."""

HEAD_S = 60.0
"""How long the head of an answer may take altogether."""

CHUNK_BYTES = 256 * 1024
FAST_BYTES_PER_S = 4 * 1024 * 1024
"""Chunks of an answer that arrives at least this fast are gathered: even a large one then takes only some hundredths of a
second."""

_MAX_ERROR_BYTES = 8 * 1024

LONGEST_WAIT_S = 600.0
"""How long a server may ask to be left alone (Retry-After); it is obeyed up to here."""

NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME; Python's ssl has no name for it."""


class HttpStatus(Problem):
    """The server answered with an error. `code` is its stable word for it, empty when it gave none."""

    def __init__(self, status: int, message: str, code: str = "", *, wait_s: float = 0.0) -> None:
        super().__init__(Reason.DOWNLOAD_FAILED, message, wait_s=wait_s)
        self.status = status
        self.code = code


class TooLong(Problem):
    """The body is larger than it may be; the rest was not read."""


class _Context(ssl.SSLContext):
    """Offers the protocols it was made with, also when urllib3 names its own."""

    protocols: list[str] | None = None

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        super().set_alpn_protocols(self.protocols or alpn_protocols)


class _Adapter(HTTPAdapter):
    """Verifies the chain and the name; `untimed`: not the dates, which cannot be judged with a clock that stands in 1970. `ca`:
    the authority that is believed, `public` when the machine's are too. `protocols`: what is offered instead of HTTP/1.1 alone.
    """

    def __init__(self, *, untimed: bool, ca: Path | None, public: bool, protocols: list[str] | None) -> None:
        self.untimed, self._ca, self._public, self._protocols = untimed, ca, public, protocols
        self.stamp = _stamp(ca)
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        context = _Context(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.protocols = self._protocols
        if self.untimed:
            context.verify_flags |= NO_CHECK_TIME
        if self._public or self._ca is None:
            context.load_default_certs()
        if self._ca is not None:
            context.load_verify_locations(cafile=str(self._ca))
        super().init_poolmanager(*args, **kwargs, ssl_context=context)


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """Changes when the file is replaced."""
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _hurried(kind: type[HTTPConnection], way: Way) -> type[HTTPConnection]:
    """Connections by `way` whose answers' heads come within HEAD_S: a limit on the silence between two packets lets a byte every
    19 s pass.
    """

    class Hurried(kind):  # type: ignore[misc, valid-type]
        def _new_conn(self) -> socket.socket:
            if not way.proxy_for(self._dns_host):
                return super()._new_conn()  # type: ignore[no-any-return]
            try:
                sock = way.connect(self._dns_host, self.port, self.timeout)
            except OSError as error:
                raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
            for option in self.socket_options or ():
                sock.setsockopt(*option)
            return sock

        def getresponse(self) -> Any:
            def cut_off(sock: socket.socket | None = self.sock) -> None:
                if sock is not None:
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)

            timer = threading.Timer(HEAD_S, cut_off)
            timer.daemon = True
            timer.start()
            try:
                return super().getresponse()
            finally:
                timer.cancel()

    return Hurried


@functools.lru_cache(maxsize=8)
def _pools(way: Way) -> dict[str, type[HTTPConnectionPool]]:
    class Http(HTTPConnectionPool):
        ConnectionCls = _hurried(HTTPConnection, way)

    class Https(HTTPSConnectionPool):
        ConnectionCls = _hurried(HTTPSConnection, way)  # type: ignore[assignment]

    return {"http": Http, "https": Https}


class FleetHttp:
    """One connection pool. Not for two threads at once: each user makes its own.

    `unset` says whether the machine's clock is known to be wrong; while it is, certificates are verified but for their dates.
    `server_time` is the server's clock at its last answer, if it told.
    """

    def __init__(
        self,
        base_url: str,
        clock: Clock,
        *,
        ca: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        unset: Callable[[], bool] = lambda: False,
        public: bool = False,
        way: Way = DIRECT,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """`public`: whoever the machine's own certificate authorities vouch for is believed too, as mirrors on the internet
        need.
        """
        self._way, self._public = way, public
        self._protocols = [DEVICES, "http/1.1"] if certificate else None
        self.base_url = base_url.rstrip("/")
        self.server_time: float | None = None
        self.mistrusted = False
        """Whether the last connection that was tried met a certificate that cannot be verified."""
        self._clock = clock
        self._unset = unset
        self._ca = ca
        self._timeouts = (connect_timeout_s, READ_TIMEOUT_S)
        self._session = requests.Session()
        self._hurry()
        self._session.trust_env = False  # neither proxies nor .netrc of whoever started the process
        if ca is not None and not public:
            self._session.verify = str(ca)
        if certificate and key:
            self._session.cert = (str(certificate), str(key))

    def close(self) -> None:
        self._session.close()

    def point_at(self, base_url: str) -> None:
        """From the next request on the server is at another address. For any thread."""
        self.base_url = base_url.rstrip("/")

    def url(self, path: str) -> str:
        return self.base_url + path

    @contextlib.contextmanager
    def open(
        self, url: str, *, headers: dict[str, str] | None = None, accept: tuple[int, ...] = (200,)
    ) -> Iterator[requests.Response]:
        """The answer to GET, its body not yet read.  Raises: HttpStatus; Problem when the server cannot be reached."""
        self._suit()
        shown = url.partition("?")[0]  # what follows may be a signature that lets everybody in
        with self._judging(), translated(shown):
            response = self._session.get(
                url,
                headers={"Accept-Encoding": "identity", **(headers or {})},
                stream=True,
                timeout=self._timeouts,
                allow_redirects=False,
            )
        self._note_time(response)
        with response:
            if response.status_code not in accept:
                text, code = _error(response)
                raise HttpStatus(response.status_code, f"{shown}: {text}", code, wait_s=_asked_to_wait_s(response))
            yield response
            if response.raw.length_remaining == 0:
                response.raw.release_conn()  # read to its end: the next request needs no handshake

    def chunks(self, response: requests.Response, *, deadline_s: float, gather_bytes: int = 0) -> Iterator[bytes]:
        """The body as it arrives, or while it arrives fast in chunks of `gather_bytes`: with TLS no read brings more than 16
        KiB, and the way to each through Python costs more than its bytes.

        Raises: Problem when it breaks off or takes longer than `deadline_s`.
        """
        shown = str(response.url).partition("?")[0]
        now = self._clock.monotonic()
        end, fast = now + deadline_s, False
        while True:
            began = now
            with translated(shown):
                chunk = response.raw.read(gather_bytes) if fast else response.raw.read1(CHUNK_BYTES)
            if not chunk:
                return
            now = self._clock.monotonic()
            fast = len(chunk) > FAST_BYTES_PER_S * (now - began) and gather_bytes > 0
            if now > end:
                raise Problem(Reason.SLOW_RETRIEVAL, f"{shown}: not finished after {deadline_s:.0f} s")
            yield chunk

    def get(self, url: str, *, limit_bytes: int, deadline_s: float) -> bytes:
        """The whole body.  Raises: HttpStatus, TooLong, Problem."""
        with self.open(url) as response:
            body = bytearray()
            for chunk in self.chunks(response, deadline_s=deadline_s):
                body += chunk
                if len(body) > limit_bytes:
                    raise TooLong(Reason.ENDLESS_DATA, f"{url}: more than the {limit_bytes} bytes allowed")
            return bytes(body)

    def post(self, path: str, data: bytes, *, limit_bytes: int) -> bytes:
        """The body of the answer.  Raises: HttpStatus with the server's own text; Problem."""
        url = self.url(path)
        self._suit()
        with self._judging(), translated(url):
            response = self._session.post(
                url,
                data=data,
                headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
                stream=True,
                timeout=self._timeouts,
                allow_redirects=False,
            )
        with response:
            if response.status_code not in (200, 201):
                raise HttpStatus(response.status_code, *_error(response))
            with translated(url):
                body: bytes = response.raw.read(limit_bytes + 1)
        if len(body) > limit_bytes:
            raise TooLong(Reason.ENDLESS_DATA, f"{url}: more than the {limit_bytes} bytes allowed")
        return body

    @contextlib.contextmanager
    def _judging(self) -> Iterator[None]:
        try:
            yield
        except Problem as problem:
            self.mistrusted = isinstance(_innermost(problem), ssl.SSLCertVerificationError)
            raise
        self.mistrusted = False

    def _suit(self) -> None:
        """Connects anew after the clock was set, or other CAs are believed than before."""
        adapter, untimed = self._session.get_adapter("https://"), self._unset()
        if isinstance(adapter, _Adapter):
            suits = adapter.untimed is untimed and adapter.stamp == _stamp(self._ca)
        else:
            suits = not untimed and self._ca is None
        if not suits:
            adapter.close()
            made = _Adapter(untimed=untimed, ca=self._ca, public=self._public, protocols=self._protocols)
            self._session.mount("https://", made)
            self._hurry()

    def _hurry(self) -> None:
        for adapter in self._session.adapters.values():
            adapter.poolmanager.pool_classes_by_scheme = _pools(self._way)  # type: ignore[attr-defined]

    def _note_time(self, response: requests.Response) -> None:
        with contextlib.suppress(KeyError, ValueError, TypeError, OverflowError):
            self.server_time = email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp()


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Turns what `requests` and urllib3 raise inside into a Problem that says what to look at."""
    try:
        yield
    except (requests.exceptions.SSLError, urllib3.exceptions.SSLError) as error:
        raise Problem(Reason.DOWNLOAD_FAILED, f"{url}: TLS failed: {refusals.in_words(_root(error))}") from error
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise Problem(Reason.DOWNLOAD_FAILED, f"{url}: no answer within {READ_TIMEOUT_S:.0f} s") from error
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise Problem(Reason.DOWNLOAD_FAILED, f"{url}: cannot be reached: {refusals.in_words(_root(error))}") from error


def _error(response: requests.Response) -> tuple[str, str]:
    """The server's own words for its error, bounded, else the status; and its code."""
    fallback = f"the server answered {response.status_code} {response.reason or ''}".rstrip()
    try:
        body = response.raw.read(_MAX_ERROR_BYTES)
        said = decode(body, dict[str, object], limit_bytes=_MAX_ERROR_BYTES)
    except (ContractError, urllib3.exceptions.HTTPError, OSError):
        return fallback, ""
    text, code = said.get("error"), said.get("code")
    return f"{fallback}: {text}" if isinstance(text, str) and text else fallback, code if isinstance(code, str) else ""


def _asked_to_wait_s(response: requests.Response) -> float:
    said = response.headers.get("Retry-After", "")
    if response.status_code not in (429, 503) or not (said.isascii() and said.isdigit()):
        return 0.0
    return min(LONGEST_WAIT_S, float(said[:9]))


def _root(error: BaseException) -> str:
    """The innermost message: urllib3 wraps the sentence that matters three layers deep."""
    found = _innermost(error)
    return str(found) or type(found).__name__


def _innermost(error: BaseException) -> BaseException:
    while not isinstance(error, ProxyFailed):
        inner = error.__cause__ or error.__context__
        if inner is None and error.args and isinstance(error.args[0], BaseException):
            inner = error.args[0]
        if inner is None and isinstance(getattr(error, "reason", None), BaseException):
            inner = error.reason  # type: ignore[attr-defined]
        if inner is None or inner is error:
            break
        error = inner
    return error
