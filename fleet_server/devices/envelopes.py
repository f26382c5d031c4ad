"""What devices sign with the key of their certificate: DSSE envelopes.

Read and verified here and not by securesystemslib's Envelope, which reads the key anew from PEM for every signature: that takes
as long as the verification itself, and thousands of reports come in a second.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from agent.contract.codec import decoder
from fleet_server.errors import Refused
from fleet_server.releases import keys

_ALGORITHM = ec.ECDSA(hashes.SHA256())


class DeviceKey:
    """The public key of a device's certificate, ready to verify. `keyid` is what signatures call it."""

    def __init__(self, public: ec.EllipticCurvePublicKey) -> None:
        self._public = public
        self.keyid: str = keys.device_key(public).keyid

    def signed(self, signature: bytes, data: bytes) -> bool:
        """Whether the key's owner signed `data`."""
        try:
            self._public.verify(signature, data, _ALGORITHM)
        except InvalidSignature:
            return False
        return True


class _Signature(msgspec.Struct):
    keyid: str
    sig: bytes


class _Envelope(msgspec.Struct, rename={"payload_type": "payloadType"}):
    """msgspec reads bytes from base64 of the usual alphabet."""

    payload: bytes
    payload_type: str
    signatures: list[_Signature]


class _OtherSignature(msgspec.Struct):
    keyid: str
    sig: str


class _OtherEnvelope(msgspec.Struct, rename={"payload_type": "payloadType"}):
    """For base64 of the alphabet for addresses, which DSSE allows as well."""

    payload: str
    payload_type: str
    signatures: list[_OtherSignature]


def opened(data: bytes, payload_type: str, signers: Sequence[DeviceKey], what: str) -> bytes:
    """The payload, which one of `signers` signed; `what` it is called in messages.

    Raises: Refused (bad_envelope, bad_signature).
    """
    try:
        envelope = _read(data)
        payload = envelope.payload
        signatures = {one.keyid: one.sig for one in envelope.signatures}
        pae = b"DSSEv1 %d %b %d %b" % (len(payload_type), payload_type.encode(), len(payload), payload)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise Refused(f"{what} is not a signed envelope: {error}", code="bad_envelope") from error
    if len(signatures) < len(envelope.signatures):
        raise Refused(f"{what} is not a signed envelope: a key signed it twice", code="bad_envelope")
    if envelope.payload_type != payload_type:
        raise Refused(f"{what} has payload type {envelope.payload_type!r}, not {payload_type!r}", code="bad_envelope")
    if not signers:
        raise Refused(f"{what} comes from a device without a certificate that is still good", code="bad_signature")
    if not any(key.keyid in signatures and key.signed(signatures[key.keyid], pae) for key in signers):
        raise Refused(f"{what} is not signed by its device's key", code="bad_signature")
    return payload


def _read(data: bytes) -> _Envelope:
    """Raises: ValueError."""
    try:
        return decoder(_Envelope).decode(data)
    except msgspec.ValidationError:
        other = decoder(_OtherEnvelope).decode(data)
        signatures = [_Signature(one.keyid, _from_base64(one.sig)) for one in other.signatures]
        return _Envelope(_from_base64(other.payload), other.payload_type, signatures)


def _from_base64(text: str) -> bytes:
    """Raises: ValueError."""
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)


@functools.lru_cache(maxsize=16384)
def key_of(pem: str) -> DeviceKey:
    """The public key of a certificate, as what verifies its owner's signatures."""
    key = x509.load_pem_x509_certificate(pem.encode()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey), "the CA certifies no other keys"
    return DeviceKey(key)
