"""The test stand: a real `edge-fleet serve` in its own process, and devices and publishers that talk to it as strangers would."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import ssl
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import paho.mqtt.client as mqtt
import requests
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey
from sqlalchemy import text
from tuf.api.metadata import Metadata

from agent.contract import topics
from agent.contract.codec import encode
from agent.contract.enrolment import EnrolmentString
from agent.contract.manifest import File, ReleaseManifest, Variant
from agent.contract.reports import (
    EVENT_PAYLOAD_TYPE,
    STATE_PAYLOAD_TYPE,
    Answer,
    ModelState,
    Outcome,
    Phase,
    Presence,
    StateReport,
)
from fleet_server.config import Folder, load
from fleet_server.releases import keys, publisher
from fleet_server.storage.database import Database
from tests import warm
from tests.fleet import databases
from tests.ports import free_ports

DEADLINE_S = 30.0
API = "/api/v1"
_made: list[tuple[Path, str | None]] = []
"""What `edge-fleet init` made: the folder, and its database where that is elsewhere."""


def wait_until(condition, what, *, within=DEADLINE_S):
    """The first true value of `condition`; fails the test when there is none in time."""
    deadline = time.monotonic() + within
    tick = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        tick.wait(0.02)
    return value


def environment(**extra):
    return {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1", "COLUMNS": "200", **extra}


class Server:
    """One data folder and, between `start` and `stop`, the server on it."""

    def __init__(self, base: Path, *, fresh=False, database_url=None, **settings):
        self.base, self.data, self.profile = base, base / "fleet", base / "profile.yaml"
        self.offline = base / "offline"
        self.releases_key = self.offline / "releases.key"
        self.operator, self.device, self.loopback, self.broker = free_ports(4)
        self.mqtt_front = None
        self._make(fresh, database_url)
        config = yaml.safe_load((self.data / "fleet.yaml").read_text())
        ports = {"operator_port": self.operator, "device_port": self.device, "loopback_port": self.loopback}
        config.update(ports, listen="127.0.0.1")
        config["broker"]["port"] = self.broker
        config["broker"]["listen"] = "127.0.0.1"
        config["rollouts"]["tick_s"] = 0.5
        (self.data / "fleet.yaml").write_text(yaml.safe_dump(config))
        self.set(**settings)
        self.ca = self.data / "pki" / "ca.crt"
        profile = yaml.safe_load(self.profile.read_text())
        profile.update(url=f"https://127.0.0.1:{self.operator}", ca=str(self.ca))
        self.profile.write_text(yaml.safe_dump(profile))
        self.token = yaml.safe_load(self.profile.read_text())["token"]
        self.process = None
        self._session = None
        self.url = f"https://127.0.0.1:{self.operator}"
        self.device_url = f"https://127.0.0.1:{self.device}"

    def set(self, **settings):
        """Changes values in sections of fleet.yaml: `set(broker={"port": 1})`. They count from the next start."""
        path = self.data / "fleet.yaml"
        config = yaml.safe_load(path.read_text())
        for section, values in settings.items():
            config[section].update(values)
        path.write_text(yaml.safe_dump(config))

    def _make(self, fresh, database_url):
        """`edge-fleet init`; done once and copied, unless the test needs keys of its own, or a database of its own."""
        fresh = fresh or database_url is not None
        if not fresh and _made:
            folder, database = _made[0]
            shutil.copytree(folder, self.base, dirs_exist_ok=True)
            self._use(databases.new(database))
            return
        url = database_url or databases.new()
        elsewhere = ["--database-url", url] if url else []
        done = self.cli("init", self.data, "--fleet", "test", "--host", "127.0.0.1", "--keys", self.offline, *elsewhere)
        assert done.returncode == 0, done.stderr
        if not fresh:
            folder = Path(tempfile.mkdtemp(prefix="fleet-made-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            for name in ("fleet", "offline"):
                shutil.copytree(self.base / name, folder / name)
            shutil.copy(self.profile, folder)
            _made.append((folder, url))
            self._use(databases.new(url))

    def _use(self, database_url):
        """The server's database is there; None: in its folder."""
        path = self.data / "fleet.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "database_url": database_url}))

    def execute(self, statement):
        """Runs SQL on the server's database."""
        database = Database(Folder(self.data).database_url(load(Folder(self.data))))
        with database.session() as session:
            session.execute(text(statement))
        database.close()

    def cli(self, *arguments, stdin=""):
        """`edge-fleet …` run to its end."""
        words = ["--profile", str(self.profile), *map(str, arguments)]
        return warm.run("fleet_server.cli", words, stdin=stdin, env=environment())

    def start(self, **extra_environment):
        """Starts the server and waits for what systemd would wait for: READY=1."""
        path = self.base / "notify"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, (self.base / "log").open("ab") as log:
            notify.bind(str(path))
            notify.settimeout(0.1)
            self.process = warm.Process(
                "fleet_server.cli", ["serve", str(self.data)], stdout=log, stderr=log,
                env=environment(NOTIFY_SOCKET=str(path), **extra_environment),
            )  # fmt: skip
            deadline = time.monotonic() + DEADLINE_S
            while True:
                with contextlib.suppress(TimeoutError):
                    if notify.recv(1000) == b"READY=1":
                        return self
                assert self.process.poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()

    def log(self):
        return (self.base / "log").read_text()

    def stop(self):
        """SIGTERM; the exit code."""
        self._hang_up()
        if self.process is None:
            return None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        self.process = None
        return code

    def kill(self):
        self._hang_up()
        self.process.kill()
        self.process.wait(20)
        self.process = None

    def broker_pid(self):
        with contextlib.suppress(OSError, ValueError):
            return int((self.data / "broker" / "mosquitto.pid").read_text())
        return None

    def request(self, method, path, *, token=None, **options):
        """A REST request with the admin token (or another); the response whatever its status."""
        headers = {"Authorization": f"Bearer {token or self.token}", **options.pop("headers", {})}
        options.setdefault("timeout", 20)
        url = self.url + API + path
        if options.get("stream") or threading.current_thread() is not threading.main_thread():
            return requests.request(method, url, headers=headers, verify=str(self.ca), **options)
        return self.session.request(method, url, headers=headers, verify=str(self.ca), **options)

    @property
    def session(self):
        """Kept connections: a TLS handshake for every request would be most of the tests' time."""
        if self._session is None:
            self._session = requests.Session()
            self._session.trust_env = False
        return self._session

    def _hang_up(self):
        if self._session is not None:
            self._session.close()
            self._session = None

    def get(self, path, **options):
        answer = self.request("GET", path, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path, body=None, **options):
        answer = self.request("POST", path, json=body or {}, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def enrolment_string(self, **body):
        return EnrolmentString.parse(self.post("/enrolment-tokens", body)["string"])

    def enrol(self, device=None, groups=()):
        """A new device of the fleet."""
        return Device.join(self, self.enrolment_string(groups=list(groups)), device)

    def begin(self, release):
        """A rollout of which the first wave is a device that is never there."""
        self.enrol(groups=["nobody"])
        return self.post("/rollouts", {"release": release, "groups": ["nobody"]})

    def make_token(self, role):
        return self.post("/access-tokens", {"name": f"a {role}", "role": role})["token"]

    # -- publishing --------------------------------------------------------------------------------------------------------

    def publish(self, manifest, files, *, key=None):
        """Publishes as `edge-fleet publish` does; the response."""
        self.upload(*files)
        body = self.signed(manifest, key=key)
        return self.request("POST", "/releases", json=body)

    def upload(self, *files):
        for data in files:
            answer = self.request("PUT", f"/blobs/{sha256(data)}", data=data)
            assert answer.status_code == 200, answer.text

    def signed(self, manifest, *, key=None):
        role = Metadata.from_bytes(self.get("/publishing")["releases"].encode())
        data, metadata = publisher.add(role, manifest, keys.load(key or self.releases_key), time.time())
        return {"manifest": data.decode(), "metadata": metadata.decode()}

    def publish_simple(self, model, version, data=None):
        """A release of one small file; its manifest."""
        data = data or f"{model} {version}".encode()
        manifest = simple_manifest(model, version, data)
        answer = self.publish(manifest, [data])
        assert answer.status_code == 200, answer.text
        return manifest


def sha256(data):
    import hashlib

    return hashlib.sha256(data).hexdigest()


def simple_manifest(model, version, data):
    return ReleaseManifest(
        model=model, version=version, files={"model.onnx": File(sha256=sha256(data), size_bytes=len(data))},
        variants=(Variant(name="cpu", runtime="onnx", file="model.onnx"),),
    )  # fmt: skip


def make_csr(key, cn="ignored"):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM).decode()


def pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )  # fmt: skip


def signed_report(report, key):
    """The bytes of a state report in its envelope."""
    return signed(report, STATE_PAYLOAD_TYPE, key)


def signed_event(event, key):
    return signed(event, EVENT_PAYLOAD_TYPE, key)


def signed(document, payload_type, key):
    """A document in an envelope, as devices send it."""
    envelope = Envelope(encode(document), payload_type, {})
    envelope.sign(CryptoSigner(key, SSlibKey.from_crypto(key.public_key())))
    return msgspec.json.encode(envelope.to_dict())


def model_state(manifest, **fields):
    """A device that serves the release."""
    sha = manifest.files["model.onnx"].sha256
    base = {"serving": manifest.version, "sha256": sha, "variant": "cpu", "phase": Phase.STEADY}
    return ModelState(**{**base, **fields})


def answer(manifest, outcome=Outcome.COMMITTED, **fields):
    return Answer(release=manifest.version, outcome=outcome, at=time.time(), **fields)


class Device:
    """An enrolled device: mutual TLS, MQTT, signed reports."""

    def __init__(self, server, response, key, folder):
        self.server, self.id, self.key, self.response = server, response["device"], key, response
        self.certificate, self.key_file = folder / f"{self.id}.crt", folder / f"{self.id}.key"
        self.certificate.write_text(response["certificate_pem"])
        self.key_file.write_bytes(pem(key))
        self.counter = 0
        self.session = 1
        self.mqtt = None
        self.received = queue.Queue()

    @classmethod
    def join(cls, server, string, device=None):
        key = ec.generate_private_key(ec.SECP256R1())
        body = {"token": string.token, "csr_pem": make_csr(key), "device": device, "hardware": {"arch": "x86_64"}}
        done = requests.post(f"{string.base_url}/enrolment", json=body, verify=str(server.ca), timeout=20)
        assert done.status_code == 200, done.text
        return cls(server, done.json(), key, server.base)

    def get(self, path, **options):
        """From the device listener; the response whatever its status."""
        cert = (str(self.certificate), str(self.key_file))
        return requests.get(self.server.device_url + path, cert=cert, verify=str(self.server.ca), timeout=20, **options)

    def connect(self, *, presence=True, protocol=mqtt.MQTTv5, port=None):
        """To the broker, as a device does: will, birth, subscriptions."""
        client = mqtt.Client(CallbackAPIVersion.VERSION2, self.id, protocol=protocol)
        context = ssl.create_default_context(cafile=str(self.server.ca))
        context.load_cert_chain(self.certificate, self.key_file)
        client.tls_set_context(context)
        ready = threading.Event()
        client.on_connect = lambda c, *_: c.subscribe([(f"v1/d/{self.id}/down/#", 1), ("v1/all/#", 1)])
        client.on_subscribe = lambda *_: ready.set()
        # What the broker kept (the last poke to all) comes with every subscription and is no news.
        client.on_message = lambda _c, _u, message: message.retain or self.received.put((message.topic, message.payload))
        if presence:
            will = Presence(device=self.id, session=self.session, online=False)
            client.will_set(topics.up(self.id, "presence"), encode(will), qos=1, retain=True)
        client.connect("127.0.0.1", port or self.server.broker, keepalive=5)
        client.loop_start()
        self.mqtt = client
        assert ready.wait(DEADLINE_S), "the broker did not take the device"
        if presence:
            self.send("presence", Presence(device=self.id, session=self.session, online=True), retain=True)
        return self

    def send(self, what, document, *, retain=False):
        data = document if isinstance(document, bytes) else encode(document)
        self.mqtt.publish(topics.up(self.id, what), data, qos=1, retain=retain).wait_for_publish(DEADLINE_S)

    def report(self, models, **fields):
        self.counter += 1
        report = StateReport(
            device=self.id, counter=self.counter, session=self.session, at=time.time(), agent_version="test", models=models, **fields
        )  # fmt: skip
        self.send("state", signed_report(report, self.key))
        return report

    def wait_for_poke(self):
        while True:
            topic, payload = self.received.get(timeout=DEADLINE_S)
            if topic.endswith("poke"):
                return json.loads(payload)

    def disconnect(self):
        if self.mqtt is not None:
            self.mqtt.disconnect()
            self.mqtt.loop_stop()
            self.mqtt = None
