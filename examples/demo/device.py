"""One device of the demo: `edge-agent serve` and `edge-agent sync` in a folder of their own, and an app that never stops asking."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fleet import MODEL
from processes import Processes, command

from agent.client import Client

HERE = Path(__file__).parent
DATA = HERE.parent / "digits/data/digits-test.npz"
BATCH = 8


class Device:
    """A device with its own store, identity and socket."""

    def __init__(self, name: str, folder: Path, processes: Processes) -> None:
        self.name = name
        self.folder = folder / name
        self.socket = self.folder / "agent.sock"
        self.config = self.folder / "agent.yaml"
        self.tally: dict[str, Any] = {"requests": 0, "failed": 0, "slowest_ms": 0.0, "last_error": ""}
        self.rate = 0.0
        self._processes = processes

    def prepare(self) -> None:
        self.folder.mkdir()
        settings = {
            "store": str(self.folder / "store"),
            "serve": {"socket": str(self.socket)},
            "sync": {"identity": str(self.folder / "identity"), "heartbeat_s": 10},
        }
        self.config.write_text(yaml.safe_dump(settings))

    def enrol(self, string: str) -> None:
        self._processes.call(*command("edge-agent", "enrol", string, "--device", self.name, "--config", self.config))

    def start(self) -> None:
        for part in ("serve", "sync"):
            self.start_part(part)

    def start_part(self, part: str) -> None:
        self._processes.start(f"{self.name}-{part}", command("edge-agent", part, "--config", self.config))

    def start_app(self) -> None:
        """An app that asks for one batch after another until the demo ends."""
        line = [sys.executable, str(HERE / "app.py"), str(self.socket), MODEL, str(DATA), str(BATCH)]
        app = self._processes.start(f"{self.name}-app", line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        threading.Thread(target=self._read, args=(app,), daemon=True).start()

    def _read(self, app: subprocess.Popen[bytes]) -> None:
        assert app.stdout is not None
        last, last_requests = time.monotonic(), 0
        for line in app.stdout:
            tally = json.loads(line)
            now = time.monotonic()
            if now - last >= 1:
                self.rate = (tally["requests"] - last_requests) / (now - last)
                last, last_requests = now, tally["requests"]
            self.tally = tally

    def accuracy(self) -> float:
        """The share of the 540 test images whose most likely digit, over the socket, is the one people read."""
        with np.load(DATA) as archive:
            images = (archive["image_u8"].astype(np.float32) * archive["scale"])[:, None]
            labels = archive["label"]
        with Client(self.socket) as client:
            found = [
                client.infer(MODEL, {"image": images[i : i + BATCH]})["probs"].argmax(1) for i in range(0, len(images), BATCH)
            ]
        return float((np.concatenate(found) == labels).mean())


def accuracies(devices: list[Device]) -> str:
    """The accuracy that all devices have, or each of them."""
    found = {f"{device.accuracy():.2f}" for device in devices}
    return " / ".join(sorted(found))
