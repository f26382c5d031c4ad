"""The two real processes, `edge-agent serve` and `edge-agent sync`, with real ONNX models and an app that never stops asking."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from agent.client import Client, ClientError, InputRejected
from agent.contract.acceptance import WatchRules
from tests.serving.server import Server as ServeProcess
from tests.sync.conftest import eventually
from tests.sync.fleet import Repository, Server, onnx_release
from tests.sync.test_process import MODEL, Device

X = np.array([[1.0, 2.0]], np.float32)


class Real(Device):
    """A device whose `serve` is the real one."""

    def __init__(self, folder: Path, identity, repository: Repository, server: Server) -> None:
        super().__init__(folder, identity, repository, server)
        self.serve.stop()
        self.socket = folder / "agent.sock"
        self.socket.unlink(missing_ok=True)
        self.real = ServeProcess(folder, "serve", "--config", self.config)
        self.real.start()

    def close(self) -> None:
        if self.process is not None:
            self.kill()
        self.real.stop()

    @property
    def active(self) -> int | None:
        try:
            with Client(self.socket) as client:
                return client.status()["models"].get(MODEL, {}).get("active")
        except ClientError:
            return None

    def offer(self, version: int, factor: float, **options) -> None:
        manifest, contents = onnx_release(self.folder / "onnx", version, factor, **options)
        self.repository.publish(manifest, contents)
        self.repository.assign(MODEL, version)

    def begin(self) -> None:
        self.offer(1, 1.0, watch=WatchRules(duration_s=0.2))
        self.start()
        eventually(lambda: self.serves_at_rest(1), "release 1", 30)


class App:
    """Asks all the time; keeps what it got."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.factors: list[float] = []
        self.rejected = 0
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with Client(self.socket, timeout_s=10) as client:
            while not self._stop.wait(0.005):
                try:
                    answer = client.infer(MODEL, {"x": X})
                except InputRejected:
                    self.rejected += 1
                except ClientError as error:
                    self.errors.append(str(error))
                else:
                    self.factors.append(float(answer["y"][0, 0]))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def device(tmp_path: Path, identity, repository: Repository, server: Server):
    device = Real(tmp_path, identity, repository, server)
    yield device
    print(json.dumps(device.state(), indent=1), device.log(), device.real.output(), sep="\n")  # shown of a test that failed
    device.close()


@pytest.fixture
def app(device: Real):
    device.begin()
    app = App(device.socket)
    yield app
    app.stop()
