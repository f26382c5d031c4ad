"""A fleet server's device side in memory: a CA, a TUF repository made with the Metadata API, and real HTTPS with client certificates.

It signs whatever a test asks it to sign, also what no honest server would.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from agent.contract.acceptance import Acceptance, Close, GoldenCase, WatchRules
from agent.contract.assignment import (
    ASSIGNMENT_TARGET,
    ISSUED_FIELD,
    RECORD_PAYLOAD_TYPE,
    REINSTATED_FIELD,
    Assignment,
    DeviceRecord,
    ModelAssignment,
    Rollout,
)
from agent.contract.codec import encode
from agent.contract.enrolment import EnrolmentResponse
from agent.contract.manifest import File, ReleaseManifest, Tensor, Variant
from agent.sync import identity as identities

UTC = dt.timezone.utc
FLEET, DEVICE = "harbour", "crane-7"
DAY = 86400.0


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Authority:
    """A CA that issues anything."""

    def __init__(self, name: str = "test fleet CA") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.cert = self._sign(name, self.key.public_key(), name, ca=True)

    @property
    def pem(self) -> str:
        return self.cert.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def fingerprint(self) -> str:
        return self.cert.fingerprint(hashes.SHA256()).hex()

    def issue(self, name: str, public, *, server: bool = False, begins: dt.datetime | None = None) -> str:
        cert = self._sign(name, public, self.cert.subject.rfc4514_string(), server=server, begins=begins)
        return cert.public_bytes(serialization.Encoding.PEM).decode()

    def server_context(self, folder: Path) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / "server.pem").write_text(self.issue("localhost", key.public_key(), server=True))
        (folder / "server.key").write_bytes(pem_key(key))
        (folder / "ca.pem").write_text(self.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        context.load_verify_locations(folder / "ca.pem")
        return context

    def _sign(self, name, public, issuer, *, ca=False, server=False, begins=None) -> x509.Certificate:
        begins = begins or dt.datetime.now(UTC) - dt.timedelta(days=1)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if ca else self.cert.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(begins + dt.timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if ca:
            usage = x509.KeyUsage(
                digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
                data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
            )  # fmt: skip
            builder = builder.add_extension(usage, critical=True)
        else:
            use = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if server:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())


def pem_key(key) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Repository:
    """The signed side of the fleet. Change what you like, then `sign()`."""

    def __init__(self) -> None:
        self.keys = {
            name: CryptoSigner.generate_ed25519() for name in ("root", "releases", "assignments", "snapshot", "timestamp")
        }
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.versions = dict.fromkeys(("targets", "releases", "assignments", "snapshot", "timestamp"), 0)
        self.expires: dict[str, float] = {}
        self.manifests: dict[str, bytes] = {}
        self.assignment = Assignment(fleet=FLEET, version=1, models={})
        self.serial = 1
        self.record_expires: float | None = None
        self.groups: tuple[str, ...] = ()
        self.issued: float | None = None
        self.reinstated: dict[str, int] = {}
        self.record_signer = self.keys["assignments"]
        root = Root(version=1, expires=self._when("root"), consistent_snapshot=True)
        for role in ("root", "snapshot", "timestamp"):
            root.add_key(self.keys[role].public_key, role)
        root.add_key(self.keys["root"].public_key, "targets")
        self.root = Metadata(root)
        self.root.sign(self.keys["root"])
        self.files["metadata/1.root.json"] = self.root.to_bytes()
        self.first_root = self.root.to_bytes()
        self.sign()

    def _when(self, role: str) -> dt.datetime:
        moment = self.expires.get(role, time.time() + 7 * DAY)
        return dt.datetime.fromtimestamp(moment, UTC).replace(microsecond=0)

    def publish(self, manifest: ReleaseManifest, contents: dict[str, bytes]) -> ReleaseManifest:
        """A release whose files are `contents`."""
        self.manifests[manifest.ref.target_path] = encode(manifest)
        for data in contents.values():
            self.blobs[sha(data)] = data
        self.sign()
        return manifest

    def assign(
        self, model: str, release: int | None, *, rollout: Rollout | None = None, withdrawn: tuple[int, ...] = ()
    ) -> None:
        models = {**self.assignment.models, model: ModelAssignment(release=release, rollout=rollout, withdrawn=withdrawn)}
        self.assignment = Assignment(fleet=FLEET, version=self.assignment.version + 1, models=models)
        self.sign()

    def sign(self, *, signers: dict[str, CryptoSigner] | None = None, bump: bool = True) -> None:
        """Signs everything anew, one version higher. `signers` replaces keys, to play an attacker."""
        keys = {**self.keys, **(signers or {})}
        if bump:
            self.versions = {role: version + 1 for role, version in self.versions.items()}
        v = self.versions
        releases = Targets(v["releases"], expires=self._when("releases"))
        for path, data in self.manifests.items():
            self._target(releases, path, data)
        assignments = Targets(v["assignments"], expires=self._when("assignments"))
        self._target(assignments, ASSIGNMENT_TARGET, encode(self.assignment))
        targets = Targets(v["targets"], expires=self._when("targets"), delegations=self._delegations())
        self._store("releases", releases, keys["releases"])
        self._store("assignments", assignments, keys["assignments"])
        self._store("targets", targets, keys["root"])
        meta = {f"{role}.json": MetaFile(v[role]) for role in ("targets", "releases", "assignments")}
        self._store("snapshot", Snapshot(v["snapshot"], expires=self._when("snapshot"), meta=meta), keys["snapshot"])
        stamp = Timestamp(
            v["timestamp"],
            expires=self._when("timestamp"),
            snapshot_meta=MetaFile(v["snapshot"]),
            unrecognized_fields={ISSUED_FIELD: int(time.time() if self.issued is None else self.issued)},
        )
        self._store("timestamp", stamp, keys["timestamp"])
        self.files["record"] = self.record()

    def rotate_root(self, role: str) -> None:
        """A new key for an online role, announced by the next root."""
        old, new = self.keys[role], CryptoSigner.generate_ed25519()
        self.root.signed.revoke_key(old.public_key.keyid, role)
        self.root.signed.add_key(new.public_key, role)
        self.root.signed.version += 1
        self.root.sign(self.keys["root"])
        self.keys[role] = new
        self.files[f"metadata/{self.root.signed.version}.root.json"] = self.root.to_bytes()

    def rotate_assignments(self) -> None:
        """A new key for assignments and device records, named by the next targets."""
        self.keys["assignments"] = self.record_signer = CryptoSigner.generate_ed25519()

    def record(self, *, device: str = DEVICE, fleet: str = FLEET) -> bytes:
        now = time.time()
        record = DeviceRecord(
            fleet=fleet,
            device=device,
            serial=self.serial,
            groups=self.groups,
            issued=now,
            expires=self.record_expires or now + DAY,
        )
        envelope = Envelope(encode(record), RECORD_PAYLOAD_TYPE, {})
        envelope.sign(self.record_signer)
        return json.dumps(envelope.to_dict()).encode()

    def _delegations(self) -> Delegations:
        names = {"releases": ["releases/*/*"], "assignments": ["assignments/*"]}
        roles = {
            name: DelegatedRole(name, [self.keys[name].public_key.keyid], 1, terminating=True, paths=paths)
            for name, paths in names.items()
        }
        keys = {self.keys[name].public_key.keyid: self.keys[name].public_key for name in names}
        return Delegations(keys, roles)

    def _target(self, role: Targets, path: str, data: bytes) -> None:
        role.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        if path in self.reinstated:
            role.targets[path].unrecognized_fields["custom"] = {REINSTATED_FIELD: self.reinstated[path]}
        folder, _, name = path.rpartition("/")
        self.files[f"targets/{folder}/{sha(data)}.{name}"] = data

    def _store(self, role: str, signed, signer: CryptoSigner) -> None:
        metadata = Metadata(signed)
        metadata.sign(signer)
        name = "timestamp.json" if role == "timestamp" else f"{self.versions[role]}.{role}.json"
        self.files[f"metadata/{name}"] = metadata.to_bytes()


Fault = Callable[["_Handler"], bool]
"""Gets the request's handler; true when it answered in its own way."""


class Server:
    """The device listener. `faults` maps the beginning of a path to a Fault; `asked` has every path that was requested."""

    def __init__(self, authority: Authority, repository: Repository, folder: Path) -> None:
        self.repository = repository
        self.faults: dict[str, Fault] = {}
        self.asked: list[str] = []
        self.posts: dict[str, Callable[[bytes], tuple[int, bytes]]] = {}
        self.released = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._context = authority.server_context(folder)
        self._context.verify_mode = ssl.CERT_REQUIRED
        outer = self

        class Handler(_Handler):
            server_double = outer

        self._httpd = _Httpd(("127.0.0.1", 0), Handler)
        self._httpd.context = self._context
        self.port = self._httpd.server_address[1]
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def anonymous(self) -> None:
        """Without client certificates: the operator listener."""
        self._context.verify_mode = ssl.CERT_NONE

    def close(self) -> None:
        self.released.set()
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()


class _Httpd(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True
    context: ssl.SSLContext

    def finish_request(self, request, client_address) -> None:
        request.settimeout(10)
        try:
            with self.context.wrap_socket(request, server_side=True) as secured:
                super().finish_request(secured, client_address)
        except OSError:  # a client that went away or has no certificate
            return

    def shutdown_request(self, request) -> None:
        with contextlib.suppress(OSError):
            super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        return


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_double: Server

    def log_message(self, *args) -> None:
        return

    def do_GET(self) -> None:
        double = self.server_double
        path = self.path.lstrip("/")
        double.asked.append(path)
        for prefix, fault in list(double.faults.items()):
            if path.startswith(prefix) and fault(self):
                return
        data = double.repository.blobs.get(path[6:]) if path.startswith("blobs/") else double.repository.files.get(path)
        if data is None:
            self.answer(404, b'{"error": "there is no such thing", "code": "not_found"}')
        else:
            self.ranged(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(*self.server_double.posts[self.path](body))

    def finish(self) -> None:
        for stream in (self.wfile, self.rfile):
            with contextlib.suppress(OSError):  # the client is gone
                stream.close()

    def hang_up(self) -> None:
        """Ends the connection in the middle of whatever was said."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def ranged(self, data: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            self.answer(200, data)
            return
        start = int(match[1])
        end = min(len(data), int(match[2]) + 1) if match[2] else len(data)
        if start >= len(data):
            self.answer(416, b"{}")
        else:
            self.answer(206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


# -- ready-made parts -------------------------------------------------------------------------------------------------------------


def enrolled(folder: Path, authority: Authority, root: bytes, *, url: str, broker_port: int = 1) -> identities.Identity:
    """An identity as enrolment leaves it."""
    key = ec.generate_private_key(ec.SECP256R1())
    response = EnrolmentResponse(
        fleet=FLEET,
        device=DEVICE,
        certificate_pem=authority.issue(DEVICE, key.public_key()),
        ca_pem=authority.pem,
        device_url=url,
        broker_host="127.0.0.1",
        broker_port=broker_port,
        tuf_root=root.decode(),
    )
    identities.write(folder, response, key, time.time())
    return identities.load(folder)


def npz(folder: Path, name: str, **arrays) -> bytes:
    path = folder / name
    np.savez(path, **arrays)
    return path.read_bytes()


def script_release(
    folder: Path,
    version: int,
    script: str,
    *,
    model: str = "crane",
    expect: float | None = None,
    watch: WatchRules | None = None,
    padding: int = 0,
    **acceptance,
) -> tuple[ReleaseManifest, dict[str, bytes]]:
    """A release for the runtime `script`; with `expect`, a golden case that demands y = expect * x."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"model.script": script.encode() + b" " * padding + b"\n"}
    golden: tuple[GoldenCase, ...] = ()
    if expect is not None:
        x = np.array([[1.0, 2.0]], np.float32)
        contents["in.npz"] = npz(folder, f"{model}-{version}-in.npz", x=x)
        contents["out.npz"] = npz(folder, f"{model}-{version}-out.npz", y=x * np.float32(expect))
        golden = (GoldenCase(name="truth", inputs="in.npz", expected="out.npz", compare={"y": Close(atol=1e-6)}),)
    manifest = ReleaseManifest(
        model=model,
        version=version,
        files={name: File(sha256=sha(data), size_bytes=len(data)) for name, data in contents.items()},
        variants=(Variant(name="cpu", runtime="script", file="model.script"),),
        inputs=(Tensor(name="x", datatype="FP32", shape=(-1, 2)),),
        outputs=(Tensor(name="y", datatype="FP32", shape=(-1, 2)),),
        acceptance=Acceptance(
            golden=golden, watch=watch or WatchRules(duration_s=0.2, max_duration_s=5.0), **{"max_trial_s": 30.0, **acceptance}
        ),
    )
    return manifest, contents


def onnx_release(
    folder: Path, version: int, factor: float, *, width: int = 2, model: str = "crane", **changes
) -> tuple[ReleaseManifest, dict[str, bytes]]:
    """A real ONNX release: y = factor * x for x of shape [n, width], with a golden case that says so."""
    from tests.serving.onnx_models import scale

    folder.mkdir(parents=True, exist_ok=True)
    x = np.arange(width, dtype=np.float32).reshape(1, width)
    contents = {
        "model.onnx": scale(folder / f"{version}.onnx", factor, width).read_bytes(),
        "in.npz": npz(folder, f"{version}-in.npz", x=x),
        "out.npz": npz(folder, f"{version}-out.npz", y=x * np.float32(changes.pop("expect", factor))),
    }
    tensor = {"datatype": "FP32", "shape": (-1, width)}
    manifest = ReleaseManifest(
        model=model,
        version=version,
        files={name: File(sha256=sha(data), size_bytes=len(data)) for name, data in contents.items()},
        variants=(Variant(name="cpu", runtime="onnx", file="model.onnx"),),
        inputs=(Tensor(name="x", **tensor),),
        outputs=(Tensor(name="y", **tensor),),
        acceptance=Acceptance(
            golden=(GoldenCase(name="truth", inputs="in.npz", expected="out.npz", compare={"y": Close(rtol=1e-5)}),),
            watch=changes.pop(
                "watch",
                # How fast it is says nothing of it here: the tests share the processor with whatever else runs.
                WatchRules(duration_s=1.0, max_duration_s=20.0, min_requests=20, min_requests_to_judge=10, max_p95_ratio=1e6),
            ),
            **changes,
        ),
    )
    return manifest, contents
