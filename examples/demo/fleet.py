"""The fleet server of the demo: driven by its command line, as an operator drives it, and read over its REST API."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml
from processes import Processes, StepFailed, command, free_ports, wait_for

MODEL = "digits"
READY_LIMIT_S = 30


class Fleet:
    """`edge-fleet` with its data below `folder`. `say` is told every command an operator would type."""

    def __init__(self, folder: Path, processes: Processes, say: Callable[[str], None], tick: Callable[[], None]) -> None:
        self.folder = folder
        self.data = folder / "fleet"
        self.keys = folder / "keys-offline"
        self._processes = processes
        self._say = say
        self._tick = tick
        self._session = requests.Session()
        self._session.trust_env = False
        self._url = ""
        self.token = ""

    def run(self, *arguments: object, quiet: bool = False) -> str:
        """Runs `edge-fleet …` to its end and returns what it printed.  Raises: StepFailed."""
        if not quiet:
            shown = " ".join(str(word).replace(f"{self.folder}/", "").replace(f"{Path.cwd()}/", "") for word in arguments)
            self._say(f"$ edge-fleet {shown}")
        return self._processes.call(*command("edge-fleet", *arguments))

    def init(self) -> None:
        """Keys, certificates, first metadata, on ports that are free here; then nothing listens but on this machine."""
        operator, device, loopback, broker = free_ports(4)
        ports = ("--operator-port", operator, "--device-port", device, "--broker-port", broker, "--loopback-port", loopback)
        line = ("init", self.data, "--fleet", "demo", "--host", "127.0.0.1", "--keys", self.keys)
        self._say("$ edge-fleet init fleet --host 127.0.0.1 --keys keys-offline")
        self.run(*line, *ports, quiet=True)
        path = self.data / "fleet.yaml"
        settings = yaml.safe_load(path.read_text())
        settings["listen"] = "127.0.0.1"
        settings["broker"]["listen"] = "127.0.0.1"
        if mosquitto := os.environ.get("EDGE_DEMO_MOSQUITTO"):
            settings["broker"]["mosquitto"] = mosquitto
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        self._url = f"http://127.0.0.1:{loopback}"
        self.token = yaml.safe_load(Path(self._processes.environment["EDGE_FLEET_PROFILE"]).read_text())["token"]
        self._session.headers["Authorization"] = f"Bearer {self.token}"

    @property
    def dashboard(self) -> str:
        return self._url

    def serve(self) -> None:
        self._say("$ edge-fleet serve fleet")
        self._processes.start("fleet", command("edge-fleet", "serve", self.data))
        wait_for("the fleet server answers", self.answers, limit_s=READY_LIMIT_S, tick=self._watch)

    def _watch(self) -> None:
        self._processes.check()
        self._tick()

    def answers(self) -> bool:
        try:
            return bool(self.get("status"))
        except (requests.RequestException, StepFailed):
            return False

    def kill(self) -> list[str]:
        """kill -9 of the server and of its broker; returns what was killed."""
        server = psutil.Process(self._processes.pid("fleet"))
        brokers = [child for child in server.children() if child.name() == "mosquitto"]
        if not brokers:
            raise StepFailed("the fleet server runs no mosquitto")
        self._processes.kill("fleet")
        for broker in brokers:
            try:
                broker.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue  # it went with its parent
        return ["edge-fleet serve", *(broker_name for broker_name in ("mosquitto",) for _ in brokers)]

    def get(self, path: str) -> Any:
        """The JSON answer of a REST route.  Raises: requests.RequestException, StepFailed."""
        answer = self._session.get(f"{self._url}/api/v1/{path}", timeout=5)
        if answer.status_code != requests.codes.ok:
            raise StepFailed(f"GET {path}: {answer.status_code} {answer.text[:200]}")
        return answer.json()

    def post(self, path: str, body: object) -> Any:
        """The JSON answer to a change.  Raises: requests.RequestException, StepFailed."""
        answer = self._session.post(f"{self._url}/api/v1/{path}", json=body, timeout=10)
        if not answer.ok:
            raise StepFailed(f"POST {path}: {answer.status_code} {answer.text[:200]}")
        return answer.json()

    def devices(self) -> dict[str, dict[str, Any]]:
        return {device["id"]: device for device in self.get("devices")["devices"]}

    def publish(self, release: Path) -> None:
        self.run("publish", release, "--key", self.keys / "releases.key", "--yes")

    def roll_out(self, version: int, *options: object) -> str:
        """Starts a rollout and returns its id."""
        self._say(" ".join(map(str, ("$ edge-fleet rollout start", f"{MODEL}:{version}", *options))))
        return str(json.loads(self.run("rollout", "start", f"{MODEL}:{version}", *options, "--json", quiet=True))["id"])

    def rollout(self, rollout: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.get(f"rollouts/{rollout}")
        return answer
