"""Asks the leader, from a process that cannot do itself what is wanted.

Each request is a connection of its own, so that it is known whether anything of it arrived. What did not arrive was not done. What
arrived and was not answered may have been done: it is sent again with the same Idempotency-Key, to the next leader if need be, which
does it or says that it was done.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import logging
import secrets
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from agent.contract import addresses
from agent.contract.codec import decoder
from agent.contract.enrolment import RenewalRequest
from fleet_server.api import internal
from fleet_server.api.http import STATUS
from fleet_server.devices.pki import Authority
from fleet_server.errors import FleetError, Unavailable
from fleet_server.storage.leadership import Fenced, Leader

_log = logging.getLogger(__name__)
_SAID = decoder(dict[str, str])

CONNECT_WITHIN_S = 3.0
ANSWER_WITHIN_S = 60.0
WAIT_FOR_S = 2.0
"""For so long a request waits for a leader: after a clean stop there is another one by then."""
RETRY_FOR_S = 15.0
"""For so long a request that may have been done is sent again: longer than a leader takes to be replaced."""
AGAIN_S = 0.3
CHUNK = 256 * 1024
THREADS = 32
KEY = "idempotency-key"
HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "host",
    "te",
    "trailer",
    "upgrade",
    "proxy-connection",
    "date",
    "server",
}
"""Headers that are about one connection."""


class NoLeader(Unavailable):
    """Nobody decides now. Nothing was done."""

    code = "no_leader"


class Unanswered(Unavailable):
    """The request may have been done. `key`: sent again with this Idempotency-Key, it is not done twice."""

    code = "unanswered"

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class Answer:
    """What the leader answered. Read it, or close it."""

    def __init__(self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection) -> None:
        self._response, self._connection = response, connection
        self.status, self._read = response.status, b""
        self.headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP]

    def leads_no_more(self) -> bool:
        """Whether it says that it was somebody else's to answer."""
        if self.status != http.client.SERVICE_UNAVAILABLE:
            return False
        with contextlib.suppress(OSError, http.client.HTTPException):
            self._read = self._response.read(CHUNK)
        return f'"{Fenced.code}"'.encode() in self._read

    def chunks(self) -> Iterator[bytes]:
        """Raises: Unavailable when it breaks off."""
        if self._read:
            yield self._read
        with contextlib.closing(self._connection):
            while True:
                try:
                    chunk = self._response.read1(CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise Unavailable(f"the leader's answer broke off: {error}") from error
                if not chunk:
                    return
                yield chunk

    def close(self) -> None:
        """Whether it was read or not."""
        self._connection.close()

    def whole(self) -> bytes:
        return b"".join(self.chunks())


class ToLeader:
    """For any thread."""

    def __init__(self, authority: Authority, leader: Callable[[], Leader | None], forget: Callable[[], None]) -> None:
        """`leader` says who leads, `forget` makes it look again."""
        self._authority, self._leader, self._forget = authority, leader, forget
        self.threads = ThreadPoolExecutor(THREADS, "leader")
        """For asking: whoever waits for the leader keeps nobody else from being answered."""
        self.outcomes: Counter[str] = Counter()
        """How many requests were `answered`, met `no_leader`, stayed `unanswered`, or were sent `again`."""

    def ask(self, method: str, target: str, headers: Mapping[str, str] = {}, body: bytes = b"") -> Answer:
        """Raises: NoLeader, Unanswered."""
        named = {name.lower(): value for name, value in headers.items() if name.lower() not in HOP}
        key = named.setdefault(KEY, secrets.token_urlsafe(24))
        named["content-length"] = str(len(body))
        began, arrived, why = time.monotonic(), False, ""
        while True:
            leader = self._leader()
            if leader is not None:
                connection = self._connection(leader)
                try:
                    connection.connect()
                except OSError as error:
                    why = f"the leader {leader.holder} cannot be reached: {error}"
                else:
                    try:
                        arrived = True
                        connection.request(method, target, body, named)
                        answer = Answer(connection.getresponse(), connection)
                    except (OSError, http.client.HTTPException) as error:
                        why = f"the leader {leader.holder} did not answer: {error!r}"
                    else:
                        if not answer.leads_no_more():
                            self.outcomes["answered"] += 1
                            return answer
                        why = f"{leader.holder} leads no more"
                connection.close()
                _log.log(logging.WARNING if arrived else logging.DEBUG, "%s", why)
            self._forget()
            waited_s = time.monotonic() - began
            if not arrived and waited_s > WAIT_FOR_S:
                self.outcomes["no_leader"] += 1
                raise NoLeader(f"no process decides now{f' ({why})' if why else ''}; nothing was changed, try again")
            if waited_s > RETRY_FOR_S:
                self.outcomes["unanswered"] += 1
                raise Unanswered(
                    f"{why}, and no other one does; whether the change was made is not known. Send it again with the same Idempotency-Key",
                    key,
                )
            self.outcomes["again"] += arrived
            time.sleep(AGAIN_S)

    # -- what devices want -------------------------------------------------------------------------------------------------

    def record(self, device: str) -> bytes:
        """The device's record, signed anew.  Raises: FleetError."""
        return _checked(self.ask("GET", internal.RECORD + device))

    def renewed(self, certificate: bytes, wanted: RenewalRequest) -> bytes:
        """An EnrolmentResponse with a new certificate, for whoever showed this one (DER).  Raises: FleetError."""
        shown = base64.b64encode(certificate).decode()
        return _checked(self.ask("POST", internal.RENEWAL, {internal.CERTIFICATE: shown}, msgspec.json.encode(wanted)))

    def certificate(self, device: str, request: str) -> bytes:
        """A new certificate, PEM, for a device that signed this request.  Raises: FleetError."""
        return _checked(self.ask("POST", internal.SIGNED_RENEWAL + device, {}, request.encode()))

    def _connection(self, leader: Leader) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self._authority.ca_path))
        context.check_hostname = (
            False  # whoever shows a server's certificate of the fleet's CA is the fleet's; devices have none
        )
        context.load_cert_chain(self._authority.client_cert, self._authority.client_key)
        host, port = addresses.split(leader.address)
        return _Connection(host.strip("[]"), port, timeout=CONNECT_WITHIN_S, context=context)


class _Connection(http.client.HTTPSConnection):
    """Connects within CONNECT_WITHIN_S, and then waits longer for the answer."""

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(ANSWER_WITHIN_S)


def _checked(answer: Answer) -> bytes:
    """Raises: FleetError of the kind that the leader said."""
    data = answer.whole()
    if answer.status == 200:
        return data
    try:
        said = _SAID.decode(data)
    except msgspec.MsgspecError:
        said = {}
    kind = next(
        (kind for kind, status in STATUS.items() if status == answer.status and kind.__init__ is FleetError.__init__),
        Unavailable,
    )
    raise kind(said.get("error", f"the leader answers {answer.status}"), code=said.get("code"))
