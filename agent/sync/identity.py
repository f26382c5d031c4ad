"""The identity folder: who this device is, to which fleet it belongs, and what it trusted when it joined.

    key.pem          the private key (ECDSA P-256), made here, mode 0600
    certificate.pem  what the fleet's CA issued for it; replaced on renewal
    ca.pem           the fleet's CAs, the newest first; one, but while the fleet replaces its CA (`authorities.py`)
    fleet.json       FleetAddress: names and addresses, as they were at enrolment
    addresses.json   which addresses the fleet named since, and which of them is used (`addresses.py`); absent until it named one
    root.json        the first TUF root, as it was received at enrolment; never replaced (TUF keeps newer ones itself)

The folder appears whole or not at all, so a crash in the middle of enrolment leaves nothing half-made.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.common import files
from agent.contract import names
from agent.contract.addresses import Addresses, join
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format
from agent.contract.enrolment import EnrolmentResponse
from agent.sync import addresses
from agent.sync.addresses import Known
from agent.sync.authorities import Certificates, issuer_of
from agent.sync.authorities import read as read_authorities

_MAX_FILE_BYTES = 1024 * 1024
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class IdentityError(Exception):
    """The identity cannot be used; the message names the file and what to do."""


class FleetAddress(Document, frozen=True, kw_only=True):
    """The names and addresses that came with enrolment."""

    fleet: str
    device: str
    device_url: str
    broker_host: str
    broker_port: int
    since: float = 0.0
    enrolled: float = 0.0
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "fleet.json")
        names.check(names.DEVICE_ID, self.device, "device id")

    @property
    def addresses(self) -> Addresses:
        """Raises: ValueError."""
        return Addresses(device_url=self.device_url, broker=join(self.broker_host, self.broker_port), since=self.since)


class Identity(msgspec.Struct, frozen=True):
    """An enrolled device, read and checked."""

    folder: Path
    address: FleetAddress
    """As it came with enrolment."""
    known: Known
    """Where the fleet server is now, and where else it may be."""
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    root: bytes

    @property
    def device(self) -> str:
        return self.address.device

    @property
    def key_file(self) -> Path:
        return self.folder / "key.pem"

    @property
    def certificate_file(self) -> Path:
        return self.folder / "certificate.pem"

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    def authorities(self) -> Certificates:
        """The CAs that this device believes, the newest first, as they stand on the disk.  Raises: IdentityError."""
        return _load_authorities(self.folder)

    @property
    def not_before(self) -> float:
        return self.certificate.not_valid_before_utc.timestamp()

    @property
    def not_after(self) -> float:
        return self.certificate.not_valid_after_utc.timestamp()


def load(folder: Path) -> Identity:
    """The identity in `folder`.  Raises: IdentityError."""
    address, known = whereabouts(folder)
    key, certificate = _load_key(folder), _load_certificate(folder)
    _load_authorities(folder)
    if certificate.public_key() != key.public_key():
        raise IdentityError(f"{folder}: certificate.pem does not belong to key.pem; enrol again with --force")
    if (name := common_name(certificate)) != address.device:
        raise IdentityError(
            f"{folder}: certificate.pem is for {name!r}, fleet.json for {address.device!r}; enrol again with --force"
        )
    return Identity(folder, address, known, key, certificate, _read(folder, "root.json"))


def whereabouts(folder: Path) -> tuple[FleetAddress, Known]:
    """What the identity in `folder` says of its fleet, for who may not read its key.  Raises: IdentityError."""
    if not folder.is_dir():
        raise IdentityError(f"this device is not enrolled: {folder} does not exist; run `edge-agent enrol STRING`")
    try:
        address = decode(_read(folder, "fleet.json"), FleetAddress, limit_bytes=_MAX_FILE_BYTES)
    except ContractError as error:
        raise IdentityError(f"{folder / 'fleet.json'}: {error}; enrol again with --force") from error
    try:
        known = addresses.read(folder, address.addresses)
    except ValueError as error:
        raise IdentityError(f"{folder / 'fleet.json'}: {error}; enrol again with --force") from error
    return address, known


def common_name(certificate: x509.Certificate) -> str:
    """The certificate's CN, or an empty string."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def write(folder: Path, response: EnrolmentResponse, key: ec.EllipticCurvePrivateKey, enrolled: float) -> None:
    """Makes `folder` hold this identity, in one step. An identity that was there before is replaced.  Raises: OSError."""
    files.make_directory(folder.parent)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _fill(fresh, response, key, enrolled)
        _swap_in(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def replace_certificate(identity: Identity, pem: bytes) -> Identity:
    """Keeps a renewed certificate, which may come from anybody: what is kept is the certificate alone, whatever stood around
    it.

    Raises: IdentityError when no CA of this device's fleet issued it, or an older one than issued the one there is; when it is not
    for this key and device, or ends before one of the same CA; OSError.
    """
    known = identity.authorities()
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        ours = certificate.public_key() == identity.key.public_key() and common_name(certificate) == identity.device
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"what came instead of a renewed certificate cannot be read ({error}): kept the old one") from error
    issuer, before = issuer_of(certificate, known), issuer_of(identity.certificate, known)
    if issuer is None:
        raise IdentityError(
            "the renewed certificate is not one that this fleet's CA issued (wrong signature): kept the old one"
        )
    if not ours:
        raise IdentityError("the renewed certificate is not for this device's key and name: kept the old one")
    if before is not None and issuer > before:
        raise IdentityError("the renewed certificate is of an older CA than the one there is: kept the old one")
    if issuer == before and certificate.not_valid_after_utc < identity.certificate.not_valid_after_utc:
        raise IdentityError(
            f"the renewed certificate ends at {certificate.not_valid_after_utc}, before the one there is: kept the old one"
        )
    if certificate != identity.certificate:
        files.write(identity.certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
    return load(identity.folder)


def _fill(folder: Path, response: EnrolmentResponse, key: ec.EllipticCurvePrivateKey, enrolled: float) -> None:
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    said = response.addresses
    host, port = (response.broker_host, response.broker_port) if said is None else (said.broker_host, said.broker_port)
    address = FleetAddress(
        fleet=response.fleet,
        device=response.device,
        device_url=response.device_url if said is None else said.device_url,
        broker_host=host,
        broker_port=port,
        since=0.0 if said is None else said.since,
        enrolled=enrolled,
    )
    files.write(folder / "key.pem", private, mode=0o600)
    files.write(folder / "certificate.pem", response.certificate_pem.encode())
    files.write(folder / "ca.pem", response.ca_pem.encode())
    files.write(folder / "root.json", response.tuf_root.encode())
    files.write(folder / "fleet.json", encode(address))


def _swap_in(fresh: Path, folder: Path) -> None:
    """Puts `fresh` in the place of `folder`. Where both exist they change places in one step, then the old one goes."""
    if folder.is_dir() and any(folder.iterdir()):
        _exchange(fresh, folder)
        files.sync_directory(folder.parent)
        shutil.rmtree(fresh)
    else:
        fresh.replace(folder)
    files.sync_directory(folder.parent)


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    # A file system without exchange: for a moment there is none, and the old one stands beside under a name that says so.
    aside = other.with_name(f"{other.name}.replaced")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(aside)
    other.replace(aside)
    one.replace(other)
    aside.replace(one)


def _load_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(folder, "key.pem"), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{folder / 'key.pem'} is not a private key ({error}); enrol again with --force") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{folder / 'key.pem'} is not an elliptic-curve key; enrol again with --force")
    return key


def _load_authorities(folder: Path) -> Certificates:
    try:
        return read_authorities(_read(folder, "ca.pem"))
    except ValueError as error:
        raise IdentityError(f"{folder / 'ca.pem'} is not a certificate ({error}); enrol again with --force") from error


def _load_certificate(folder: Path) -> x509.Certificate:
    return _parse_certificate(_read(folder, "certificate.pem"), str(folder / "certificate.pem"))


def _parse_certificate(pem: bytes, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise IdentityError(f"{what} is not a certificate ({error}); enrol again with --force") from error


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise IdentityError(f"{path} is missing: the identity is incomplete; enrol again with --force") from None
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror}; run as the user of `edge-agent sync`") from error
    if not data:
        raise IdentityError(f"{path} is empty; enrol again with --force")
    return data
