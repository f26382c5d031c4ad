"""Signing keys in files: PEM, PKCS#8, ed25519, with or without a passphrase."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from securesystemslib.signer import CryptoSigner, Key, SSlibKey  # type: ignore[attr-defined]

from fleet_server import files
from fleet_server.errors import Invalid, NotFound


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
