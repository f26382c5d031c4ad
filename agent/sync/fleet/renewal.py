"""Renewing the certificate before it ends: over HTTPS, and over the broker where HTTPS leads nowhere.

Over HTTPS the connection says who asks and who answers. Over the broker neither is known: the request is signed with the
device's key, and what comes back is kept only when the fleet's CA issued it for this key and name and it lasts no shorter
(`identity.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from agent.contract.addresses import Addresses
from agent.contract.codec import ContractError, decode, encode
from agent.contract.enrolment import (
    MAX_CERTIFICATE_BYTES,
    MAX_RESPONSE_BYTES,
    RENEW_PATH,
    RENEWAL_PAYLOAD_TYPE,
    EnrolmentResponse,
    RenewalRequest,
    SignedRenewal,
)
from agent.host import clock as clocks
from agent.sync import authorities
from agent.sync import identity as identities
from agent.sync.fetching.mqtt import Transfers
from agent.sync.fleet.enrol import make_csr
from agent.sync.fleet.reports import Signer
from agent.sync.http import FleetHttp, HttpStatus
from agent.sync.identity import Identity, IdentityError
from agent.sync.ports import Clock
from agent.sync.problems import Problem

log = logging.getLogger(__name__)

RENEW_BEFORE = 1 / 3
"""A certificate is renewed when less than this share of its life is left: months of being unreachable then do no harm."""

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 3600.0
TRIES_LEFT = 8
"""Pauses never grow beyond this part of the time that is left: a certificate that lasts an hour is not lost to a long pause."""

RENEWED_WITHIN_S = 30.0
"""How long a new certificate may take over the broker: a message or two, asked for again while nothing comes."""

Broker = Callable[[str], bytes]
"""A signed request → the certificate that the fleet server answers over the broker, PEM.  Raises: Problem."""


def due(who: Identity, now: float) -> bool:
    """Whether the certificate should be renewed."""
    life = who.not_after - who.not_before
    return who.not_after - now < life * RENEW_BEFORE


def over_https(who: Identity, http: FleetHttp, told: Callable[[Addresses | None], None] = lambda _: None) -> Identity:
    """A new certificate for the same key, written and loaded; `told` gets the addresses that came with it.

    Raises: Problem, IdentityError, ContractError, OSError.
    """
    request = RenewalRequest(csr_pem=make_csr(who.key, who.device), authorities=_believed(who))
    answer = http.post(RENEW_PATH, encode(request), limit_bytes=MAX_RESPONSE_BYTES)
    response = decode(answer, EnrolmentResponse, limit_bytes=MAX_RESPONSE_BYTES)
    renewed = identities.replace_certificate(who, response.certificate_pem.encode())
    told(response.addresses)
    return renewed


def over_broker(who: Identity, broker: Broker) -> Identity:
    """A new certificate for the same key by way of the broker, written and loaded. Whoever runs the broker may answer, so only
    what the fleet's CA issued is believed.  Raises: Problem, IdentityError, OSError.
    """
    return identities.replace_certificate(who, broker(signed_request(who)))


def by_transfers(transfers: Transfers) -> Broker:
    """A new certificate, asked for as files are that come over the broker."""
    return lambda request: transfers.whole(
        "renewal",
        "",
        limit_bytes=MAX_CERTIFICATE_BYTES,
        deadline_s=RENEWED_WITHIN_S,
        what="a new certificate",
        request=request,
    )


def signed_request(who: Identity) -> str:
    """What only this device can ask: a new certificate for its own key and name, in the place of the one that it has."""
    serial = f"{who.certificate.serial_number:x}"
    request = SignedRenewal(
        device=who.device, replaces=serial, csr_pem=make_csr(who.key, who.device), authorities=_believed(who)
    )
    return Signer(who.key).envelope(encode(request), RENEWAL_PAYLOAD_TYPE).decode()


def _believed(who: Identity) -> tuple[str, ...]:
    return tuple(authorities.fingerprint(one) for one in who.authorities())


class Renewal:
    """Asks when it is time, and again after a pause while nothing good comes. For one thread."""

    def __init__(
        self,
        clock: Clock,
        https: Callable[[], FleetHttp],
        broker: Broker,
        told: Callable[[Addresses | None], None] = lambda _: None,
        superseded: Callable[[Identity], bool] = lambda _: False,
    ) -> None:
        """`told` gets the fleet server's addresses that came with a new certificate over HTTPS. `superseded` says whether a
        certificate is to be renewed because it is of a CA that is being replaced.
        """
        self._told, self._superseded = told, superseded
        self._clock, self._https, self._broker = clock, https, broker
        self._fruitless = 0
        self._rest_until = float("-inf")

    def renewed(self, who: Identity) -> Identity:
        """`who`, with a new certificate if one was due and could be had."""
        if not self._due(who) or self._clock.monotonic() < self._rest_until:
            return who
        problem: Exception | None = None
        found = who
        try:
            found = self._asked(who)
        except (Problem, IdentityError, ContractError, OSError) as error:
            problem = error
        pause_s = self._rest(found)
        if problem is not None:
            log.warning("the certificate could not be renewed (tried again after %.0f s): %s", pause_s, problem)
        elif found.certificate != who.certificate:
            log.info("the certificate was renewed: it is good until %s", clocks.text(found.not_after))
        return found

    def _asked(self, who: Identity) -> Identity:
        try:
            http = self._https()
            try:
                return over_https(who, http, self._told)
            finally:
                http.close()
        except HttpStatus:  # the fleet server itself said no
            raise
        except Problem as first:
            try:
                return over_broker(who, self._broker)
            except Problem as second:
                raise Problem(second.reason, f"{first.message}; and over the broker: {second.message}") from second

    def _due(self, who: Identity) -> bool:
        return due(who, self._clock.wall()) or self._superseded(who)

    def _rest(self, who: Identity) -> float:
        """Sets when to ask again, if what there is now is still due: lost answers, or a server whose clock is behind ours."""
        now = self._clock.wall()
        if not self._due(who):
            self._fruitless, self._rest_until = 0, float("-inf")
            return 0.0
        longest_s = min(LONGEST_PAUSE_S, (who.not_after - now) / TRIES_LEFT)
        pause_s = max(FIRST_PAUSE_S, min(longest_s, FIRST_PAUSE_S * 2.0 ** min(self._fruitless, 16)))
        self._fruitless += 1
        self._rest_until = self._clock.monotonic() + pause_s
        return pause_s
