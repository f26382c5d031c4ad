"""A real `edge-fleet serve` in a folder that is thrown away: with mosquitto, SQLite and TUF, on free ports of this machine, and with
all simulated devices enrolled before it starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from agent.common import files
from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from fleet_server import setup
from fleet_server.app import Fleet
from fleet_server.client import Client, Profile
from fleet_server.config import ConnectionSettings, FleetConfig, Folder
from fleet_server.devices import pki
from fleet_server.errors import Unavailable
from fleet_server.releases import keys
from fleet_server.sections import BrokerSettings, RolloutSettings
from fleet_server.simulation import papers, releases
from fleet_server.simulation.members import Member
from fleet_server.simulation.papers import Address, Papers

FLEET = "rehearsal"
HOST = "127.0.0.1"
READY_S = 60.0
ENDS_S = 20.0
BATCH = 500  # devices in a transaction


class Prepared(msgspec.Struct, frozen=True):
    """Device → its papers, and the manifests of what was published."""

    papers: dict[str, Papers]
    manifests: list[ReleaseManifest]


class Throwaway:
    """Between `prepare` and `stop`. The folder is the caller's, who removes it."""

    def __init__(self, folder: Path, *, silence_s: float, tick_s: float = 1.0) -> None:
        """`silence_s`: after how long a device that is silent counts as offline; `tick_s`: how often rollouts are judged anyway."""
        self.folder = folder
        self._where = Folder(folder / "fleet")
        self._offline = folder / "offline"
        self._profile = folder / "profile.yaml"
        operator, device, broker = _free_ports(3)
        connections = ConnectionSettings(devices_per_address=1000, operators=200, operators_per_address=200)
        self.config = FleetConfig(
            fleet=FLEET, hosts=(HOST,), listen=HOST, operator_port=operator, device_port=device,
            broker=BrokerSettings(listen=HOST, port=broker), connections=connections,
            # Classes are not excluded: devices that misbehave are drawn from all of them.
            rollouts=RolloutSettings(tick_s=tick_s, silence_s=silence_s, exclude_after=0),
        )  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def profile(self) -> Profile:
        """What an operator needs."""
        return Profile.read(self._profile)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def broker_pid(self) -> int | None:
        try:
            return int((self._where.broker / "mosquitto.pid").read_text())
        except (OSError, ValueError):
            return None

    def address(self) -> Address:
        root = max(self._where.metadata.glob("*.root.json"), key=lambda path: int(path.name.split(".")[0]))
        return Address(
            fleet=FLEET, device_url=self.config.device_url, broker_host=HOST, broker_port=self.config.broker.port,
            ca=self._where.pki / "ca.crt", root=root.read_bytes(),
        )  # fmt: skip

    def prepare(
        self, members: Sequence[Member], published: Sequence[ReleaseRef], assigned: Mapping[str, int],
        progress: Callable[[int], None] = lambda _done: None,
    ) -> Prepared:  # fmt: skip
        """Makes the fleet, publishes releases, assigns some to every device, and enrols the devices, all without a server.
        `progress` gets the number of devices that are enrolled.  Raises: OSError, FleetError.
        """
        setup.init(self._where, self.config, offline_keys=self._offline, profile=self._profile)
        fleet = Fleet(self._where, self.config)
        found: dict[str, Papers] = {}
        files.make_directory(self.folder / "devices", mode=0o700)
        try:
            fleet.recover()
            manifests = releases.publish(fleet, published, keys.load(self._offline / "releases.key"))
            releases.assign(fleet, assigned)
            for first in range(0, len(members), BATCH):
                batch = members[first : first + BATCH]
                found |= {member.id: one for member, one in zip(batch, self._enrol(fleet, batch), strict=True)}
                progress(len(found))
        finally:
            fleet.close()
        return Prepared(found, manifests)

    def _enrol(self, fleet: Fleet, members: Sequence[Member]) -> list[Papers]:
        """In one transaction for all of them."""
        made = []
        with fleet.database.session() as session:
            for member in members:
                pki.check_device_id(member.id)
                key = ec.generate_private_key(ec.SECP256R1())
                csr = papers.request(key, member.id)
                certificate = fleet.enrolment.add(session, member.id, csr, sorted(set(member.groups)), member.hardware)
                file = self.folder / "devices" / f"{member.id}.pem"
                file.touch(mode=0o600)
                file.write_bytes(pki.pem_of(certificate) + pki.key_pem(key))
                made.append(Papers(member.id, key, file))
        return made

    def start(self) -> None:
        """Starts the server and waits until it is ready.  Raises: Unavailable with its last words."""
        address = f"\0edge-fleet-simulation-{os.getpid()}-{id(self)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as log:
            notify.bind(address)
            notify.settimeout(0.1)
            command = [sys.executable, "-m", "fleet_server.cli", "serve", str(self._where.root)]
            if setpriv := shutil.which("setpriv"):  # it ends with this process, however that ends
                command = [setpriv, "--pdeathsig", "TERM", *command]
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "NOTIFY_SOCKET": f"@{address[1:]}"},
            )  # fmt: skip
            deadline = time.monotonic() + READY_S
            while True:
                with contextlib.suppress(TimeoutError):
                    if notify.recv(1000) == b"READY=1":
                        return
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise Unavailable(f"the throw-away server did not start; it said: {self.last_words()}")

    def last_words(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return "nothing"
        return " | ".join(lines[-3:]) or "nothing"

    def ended(self) -> bool:
        """Whether the server is gone although nobody stopped it."""
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """Ends the server and its broker."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """An operator's requests, as `admin`."""
        client = Client(self.profile)
        try:
            yield client
        finally:
            client.close()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind((HOST, 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
