"""A server of several processes, as it runs on several machines: each has a folder of its own, behind a HAProxy. The broker is a mosquitto
beside the one that ingests, or a RabbitMQ cluster.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import requests
import yaml

from tests import warm
from tests.fleet.databases import Cluster
from tests.fleet.stand import API, DEADLINE_S, Server, environment, wait_until
from tests.haproxy import HAProxy
from tests.ports import free_ports

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "run-several-servers.md"
CERTIFICATES = ("ca.crt", "server.crt", "server.key", "client.crt", "client.key")


class Process:
    """One process of the server, between `start` and its end."""

    def __init__(self, kind: str, folder: Path, *options: str) -> None:
        self.kind, self.folder, self._options = kind, folder, options
        self._log = folder.parent / f"{folder.name}.log"
        self._notify = folder.parent / f"{folder.name}.notify"
        self.process: warm.Process | None = None
        self._socket: socket.socket | None = None

    def begin(self) -> Process:
        """Starts it, and waits for nothing."""
        self._hang_up()
        self._notify.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._notify))
        self._socket.settimeout(0.1)
        with self._log.open("ab") as log:
            self.process = warm.Process(
                "fleet_server.cli", [self.kind, str(self.folder), *self._options], stdout=log, stderr=log,
                env=environment(NOTIFY_SOCKET=str(self._notify)),
            )  # fmt: skip
        return self

    def start(self) -> Process:
        """Starts it, and waits until it says that it is ready."""
        return self.begin().wait_ready()

    def wait_ready(self) -> Process:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(TimeoutError):
                if self._socket.recv(1000) == b"READY=1":
                    self._hang_up()
                    return self
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()

    def log(self) -> str:
        return self._log.read_text()

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()  # who tells nobody goes on
            self._socket = None

    def stop(self) -> int | None:
        """SIGTERM; the exit status."""
        self._hang_up()
        if self.process is None:
            return None
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        code = self.process.wait(30)
        self.process = None
        return code

    def kill(self) -> None:
        self._hang_up()
        self.process.kill()
        self.process.wait(20)
        self.process = None

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


class Several(Server):
    """Two that decide, one that ingests (with the mosquitto that it runs) or two of them (with a RabbitMQ cluster), two that answer, and a
    HAProxy before those that are several and before the nodes. `url` and `device_url` are the HAProxy's.
    """

    def __init__(self, base: Path, cluster: Cluster, blobs: dict[str, object], **settings: dict[str, object]) -> None:
        self.front, self.front_devices, mqtt, asked, *self.decide_ports = free_ports(6)
        public = {
            "operators": f"127.0.0.1:{self.front}", "enrolment": f"127.0.0.1:{self.front}", "devices": f"127.0.0.1:{self.front_devices}",
        }  # fmt: skip
        rabbit = settings.get("broker", {}).get("rabbitmq")
        if rabbit is not None:
            settings["broker"]["rabbitmq"] = {**rabbit, "authorization": f"127.0.0.1:{asked}"}
            public["broker"] = f"127.0.0.1:{mqtt}"
        settings["public"] = public
        super().__init__(
            base,
            fresh=True,
            database_url=cluster.new(),
            blobs=blobs,
            decide={"port": self.decide_ports[0]},
            **settings,
        )
        self.url, self.device_url = (f"https://127.0.0.1:{port}" for port in (self.front, self.front_devices))
        profile = yaml.safe_load(self.profile.read_text())
        self.profile.write_text(yaml.safe_dump({**profile, "url": self.url}))
        self.aside = free_ports(1)[0]
        self.deciders = [Process("decide", self.data)]
        self.deciders.append(Process("decide", self._folder("decide-2", keys=True, decide={"port": self.decide_ports[1]})))
        self.mqtt_front = mqtt if rabbit is not None else None
        self.ask_front, self.ask_ports = asked, free_ports(2)
        self.nodes = [node["mqtt"] for node in rabbit["nodes"]] if rabbit is not None else []
        self.ingests = [Process("ingest", self._ingests(1, rabbit), "--metrics", f"127.0.0.1:{self.aside}")]
        if rabbit is not None:
            self.ingests.append(Process("ingest", self._ingests(2, rabbit)))
        self.api_ports = [free_ports(2), free_ports(2)]
        self.apis = []
        for number, (operator, device) in enumerate(self.api_ports, 1):
            ports = {"operator_port": operator, "device_port": device, "loopback_port": None}
            self.apis.append(Process("api", self._folder(f"api-{number}", **ports)))
        self.balancer = HAProxy(base, self._balanced())

    def _folder(self, name: str, *, keys: bool = False, **settings: object) -> Path:
        """A folder as another machine has it."""
        made = self.base / name
        (made / "pki").mkdir(parents=True)
        if keys:
            for part in ("keys", "pki"):
                shutil.copytree(self.data / part, made / part, dirs_exist_ok=True)
        else:
            for file in CERTIFICATES:
                shutil.copy(self.data / "pki" / file, made / "pki")
        config = yaml.safe_load((self.data / "fleet.yaml").read_text())
        for section, value in settings.items():
            config[section] = {**config[section], **value} if isinstance(value, dict) else value
        (made / "fleet.yaml").write_text(yaml.safe_dump(config))
        return made

    def _ingests(self, number: int, rabbit: dict | None) -> Path:
        """The folder of one that ingests; with a cluster each has a port of its own at which it answers the nodes."""
        own = (
            {**rabbit, "authorization": f"127.0.0.1:{self.ask_front}", "authorization_port": self.ask_ports[number - 1]}
            if rabbit
            else None
        )
        return self._folder(f"ingest-{number}", **({"broker": {"rabbitmq": own}} if own else {}))

    def _balanced(self) -> str:
        """The examples of the how-to page with this test's ports."""
        return self._example("defaults", self._before_those_that_answer) + (
            self._example("listen mqtt", self._before_the_nodes) if self.nodes else ""
        )

    @staticmethod
    def _example(begins: str, change: Callable[[str], str]) -> str:
        found = re.search(rf"```haproxy\n({begins}.*?)```", HOW_TO.read_text(), re.DOTALL)
        assert found is not None, begins
        text = change(found[1])
        assert "example.org" not in text, text
        return text

    def _before_the_nodes(self, text: str) -> str:
        text = text.replace("bind :8883", f"bind 127.0.0.1:{self.mqtt_front}").replace(
            "bind :8446", f"bind 127.0.0.1:{self.ask_front}"
        )
        for number, node in enumerate(self.nodes, 1):
            text = text.replace(f"rabbit-{number}.example.org:8883", node)
        for number, port in enumerate(self.ask_ports, 1):
            text = text.replace(f"ingest-{number}.example.org:8446", f"127.0.0.1:{port}")
        return text

    def _before_those_that_answer(self, text: str) -> str:
        text = text.replace("bind :8443", f"bind 127.0.0.1:{self.front}").replace(
            "bind :8444", f"bind 127.0.0.1:{self.front_devices}"
        )
        for number, (operator, device) in enumerate(self.api_ports, 1):
            host = f"api-{number}.example.org"
            text = text.replace(f"{host}:8444 port 8443", f"127.0.0.1:{device} port {operator}").replace(
                f"{host}:8443", f"127.0.0.1:{operator}"
            )
        return text

    @property
    def ingest(self) -> Process:
        return self.ingests[0]

    @property
    def processes(self) -> list[Process]:
        return [*self.deciders, *self.ingests, *self.apis]

    def start(self, **_: str) -> Several:
        self.balancer.start()
        for process in self.processes:
            process.begin()
        for process in self.processes:
            process.wait_ready()
        wait_until(self.leader, "somebody leads")
        wait_until(self.answers, "the balancer has found out who answers")
        return self

    def stop(self) -> None:
        self._hang_up()
        for process in reversed(self.processes):
            process.stop()
        self.balancer.stop()

    def answers(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", verify=str(self.ca), timeout=5).status_code == 200
        return False

    def ask(self, number: int, method: str, path: str, **options: object) -> requests.Response:
        """A request to one of those that answer, past the balancer, as an admin."""
        url = f"https://127.0.0.1:{self.api_ports[number][0]}{API}{path}"
        headers = {"Authorization": f"Bearer {self.token}", **options.pop("headers", {})}
        return requests.request(method, url, headers=headers, verify=str(self.ca), timeout=60, **options)

    def leader(self) -> dict | None:
        """Who leads, as one of those that answer says it: number, process, since."""
        with contextlib.suppress(requests.RequestException, ValueError, KeyError):
            return self.ask(0, "GET", "/status").json()["leader"]
        return None

    def leading(self) -> Process:
        """The process that leads."""

        def found():
            pid = int((self.leader() or {"process": "nobody-0-"})["process"].split("-")[-2])
            living = (one for one in self.deciders if one.process is not None and one.process.poll() is None)
            return next((one for one in living if one.process.pid == pid), None)

        return wait_until(found, "one that lives leads")

    def waiting(self) -> Process:
        """The process that would lead."""
        leading = self.leading()
        return next(one for one in self.deciders if one is not leading)
