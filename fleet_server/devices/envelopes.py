"""What devices sign with the key of their certificate: DSSE envelopes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec
from cryptography import x509
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import FormatError, VerificationError
from securesystemslib.signer import Key  # type: ignore[attr-defined]

from fleet_server.errors import Refused
from fleet_server.releases import keys


def opened(data: bytes, payload_type: str, signers: Sequence[Key], what: str) -> bytes:
    """The payload, which one of `signers` signed; `what` it is called in messages.

    Raises: Refused (bad_envelope, bad_signature).
    """
    try:
        envelope = Envelope.from_dict(msgspec.json.decode(data))
    except (KeyError, TypeError, AttributeError, ValueError, FormatError, RecursionError) as error:
        raise Refused(f"{what} is not a signed envelope: {error}", code="bad_envelope") from error
    if envelope.payload_type != payload_type:
        raise Refused(f"{what} has payload type {envelope.payload_type!r}, not {payload_type!r}", code="bad_envelope")
    if not signers:
        raise Refused(f"{what} comes from a device without a certificate that is still good", code="bad_signature")
    try:
        envelope.verify(list(signers), 1)
    except (VerificationError, ValueError) as error:
        raise Refused(f"{what} is not signed by its device's key: {error}", code="bad_signature") from error
    payload: bytes = envelope.payload
    return payload


@functools.lru_cache(maxsize=16384)
def key_of(pem: str) -> Key:
    """The public key of a certificate, as what verifies its owner's signatures."""
    return keys.device_key(x509.load_pem_x509_certificate(pem.encode()).public_key())
