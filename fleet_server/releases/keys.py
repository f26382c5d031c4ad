"""Signing keys: in files (PEM, PKCS#8, with or without a passphrase), or wherever securesystemslib's signers reach: a hardware
module, a cloud's key service.

A key is named by a path, or by a URI of securesystemslib: `hsm:2?label=fleet`, `awskms:ARN`, `gcpkms:…`, `azurekms:…`,
`hv:NAME`, `file2:PATH`. What needs a library of its own says so when it is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signer, SSlibKey  # type: ignore[attr-defined]

from agent.common import files
from fleet_server.errors import Invalid, NotFound
from fleet_server.releases.signing_process import ProcessSigner, imported


def generate(path: Path, *, passphrase: str | None = None) -> CryptoSigner:
    """A new key in a new file that only its owner can read.  Raises: Invalid when the file is already there."""
    if path.exists():
        raise Invalid(f"{path} exists already; a signing key is never overwritten")
    key = ed25519.Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    files.write(path, pem, mode=0o600)
    return CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))


def is_encrypted(path: Path) -> bool:
    """Whether the key file asks for a passphrase.  Raises: NotFound."""
    return b"ENCRYPTED" in _read(path)


def load(path: Path, *, passphrase: str | None = None) -> CryptoSigner:
    """The signer in a key file.  Raises: NotFound; Invalid (not a key, wrong or missing passphrase)."""
    data = _read(path)
    try:
        key = serialization.load_pem_private_key(data, passphrase.encode() if passphrase else None)
    except TypeError:
        raise Invalid(f"{path} needs a passphrase" if not passphrase else f"{path} has no passphrase") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Invalid(f"{path} is not a private key in PEM, or the passphrase is wrong: {error}") from error
    if not isinstance(key, (ed25519.Ed25519PrivateKey, ec.EllipticCurvePrivateKey)):
        raise Invalid(f"{path} must hold an ed25519 or ECDSA key")
    return CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))


def is_uri(name: str) -> bool:
    """Whether `name` says where a key is that is not a file of ours."""
    return name.partition(":")[0] in SIGNER_FOR_URI_SCHEME and not Path(name).exists()


def open_uri(uri: str, candidates: Iterable[Key], secret: Callable[[str], str]) -> Signer:
    """The signer behind a URI. A URI does not tell its public key, so it is the one of `candidates` that verifies what it
    signs.

    Raises: Invalid (cannot be reached, or is none of the keys that would count here).
    """
    return ProcessSigner(uri, candidates, secret)


def public(name: str, *, passphrase: str | None = None) -> Key:
    """The public half of the key in a file (private or public, PEM or our JSON) or behind a URI.  Raises: NotFound, Invalid."""
    if is_uri(name):
        return imported(name)
    data = _read(Path(name))
    if data.lstrip().startswith(b"{"):
        return _parsed(data, name)
    if b"PRIVATE KEY" in data:
        return load(Path(name), passphrase=passphrase).public_key
    try:
        found = serialization.load_pem_public_key(data)
        return SSlibKey.from_crypto(found)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Invalid(f"{name} is not a key in PEM: {error}") from error


def _parsed(data: bytes, name: str) -> Key:
    try:
        document = json.loads(data)
        return Key.from_dict(document.pop("keyid"), document)
    except Exception as error:  # securesystemslib raises KeyError, ValueError, TypeError… for a malformed key
        raise Invalid(f"{name} is not a public key: {error}") from error


def device_key(certificate_key: object) -> Key:
    """The verifying key of a device's certificate."""
    return SSlibKey.from_crypto(certificate_key)  # type: ignore[arg-type]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"key file {path} does not exist") from None
    except OSError as error:
        raise Invalid(f"key file {path} cannot be read: {error}") from error
