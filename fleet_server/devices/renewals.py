"""New certificates for devices that ask over the broker, where no connection proves who asks; the signature of the request
does.

Rules, in order:
 1. a key of a certificate of this device that is still good signed the request; so a device that was shut out gets nothing;
 2. it is of the device that the broker's access list says asks, and names the certificate to be replaced, which is that
 device's and
    is still good: a request that somebody kept is worth nothing once that certificate has ended;
 3. the new certificate is for the same key and name.
What is then issued is what the device listener issues (`Enrolment.renew`), and the same again while it is new.
"""

from __future__ import annotations

from agent.contract.codec import ContractError, decode
from agent.contract.enrolment import RENEWAL_PAYLOAD_TYPE, RenewalRequest, SignedRenewal
from agent.contract.transfers import MAX_ASK_BYTES
from fleet_server.devices import envelopes, pki
from fleet_server.devices.enrolment import Enrolment
from fleet_server.devices.inventory import Inventory
from fleet_server.errors import Invalid, Refused


class Renewals:
    def __init__(self, inventory: Inventory, enrolment: Enrolment) -> None:
        self._inventory, self._enrolment = inventory, enrolment

    def certificate(self, device: str, request: str) -> bytes:
        """The device's new certificate, PEM.  Raises: Refused, Invalid."""
        wanted = self._read(device, request)
        present = self._inventory.issued(wanted.replaces)
        if present is None or self._inventory.authenticate(present) != device or wanted.device != device:
            raise Refused(f"the request of {device!r} is for a certificate of another device", code="wrong_device")
        csr = pki.read_csr(wanted.csr_pem)
        if csr.public_key() != present.public_key() or pki.common_name(csr) != device:
            raise Refused(f"the request of {device!r} is for another key or name than it has", code="wrong_key")
        renewal = RenewalRequest(csr_pem=wanted.csr_pem, authorities=wanted.authorities)
        return self._enrolment.renew(device, renewal).certificate_pem.encode()

    def _read(self, device: str, request: str) -> SignedRenewal:
        signers = self._inventory.signers(device)
        payload = envelopes.opened(request.encode(), RENEWAL_PAYLOAD_TYPE, signers, f"the request of {device!r}")
        try:
            return decode(payload, SignedRenewal, limit_bytes=MAX_ASK_BYTES)
        except ContractError as error:
            raise Invalid(str(error)) from error
