"""A fleet of one device on this machine, and what a test asks of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import yaml
from device import Device
from fleet import MODEL, Fleet
from processes import processes

from agent.client import Client, ClientError
from runtimes import registry
from runtimes.contract import LoadOptions

DIGITS = Path(__file__).parents[2] / "examples/digits"
GOOD, WEAK, TREACHEROUS = "digits-v2-int8-qdq.onnx", "digits-v1-int8-qdq.onnx", "digits-v4-fixed-batch.onnx"
with np.load(DIGITS / "data/digits-test.npz") as _archive:
    IMAGES = (_archive["image_u8"][:8, None] * _archive["scale"]).astype(np.float32)
LIMIT_S = 45.0
WATCH = {"duration_s": 1.5, "max_duration_s": 30, "min_requests_to_judge": 20, "max_p95_ratio": 1000}
BESIDE = {
    "shadow": {"required": True, "share": 0.5, "max_rate": 50, "min_samples": 10, "duration_s": 0.5, "max_duration_s": 5},
    "canary": {"share": 0.2, "min_requests": 10, "duration_s": 0.5, "max_duration_s": 5},
}
"""What a careful release is put through before it is activated."""

BALLAST_BYTES = 40_000_000  # makes fetching last long enough to be met


class World:
    """Starts with release 1 serving. `update` publishes the next one and rolls it out. What the device keeps is below `home`.

    `serve` and `sync` are settings of the device's agent.yaml, `server` of fleet.yaml.
    """

    def __init__(
        self,
        folder: Path,
        home: Path | None = None,
        *,
        serve: Mapping[str, float] | None = None,
        sync: Mapping[str, object] | None = None,
        server: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = folder
        self.home = home or folder
        self._serve, self._sync, self._server = dict(serve or {}), dict(sync or {}), dict(server or {})
        self.version = 1
        self.models: dict[int, str] = {}
        """The model file of each release."""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> World:  # noqa: PYI034 - typing.Self came with Python 3.11
        try:
            self.begin()
        except BaseException:
            self._stack.close()
            raise
        return self

    def begin(self) -> None:
        environment = {"EDGE_FLEET_PROFILE": str(self.folder / "profile.yaml")}
        self.processes = self._stack.enter_context(processes(self.folder / "logs", environment))
        self.fleet = Fleet(self.folder, self.processes, lambda _: None, lambda: None)
        self.fleet.init()
        self.configure(**self._server)
        self.fleet.serve()
        self.device = Device("device", self.home, self.processes)
        self.device.prepare()
        settings = yaml.safe_load(self.device.config.read_text())
        settings["serve"] |= self._serve
        settings["sync"] |= self._sync
        self.device.config.write_text(yaml.safe_dump(settings))
        self.device.enrol(self.fleet.run("token", "create", "--device", "device").strip())
        self.device.start()
        self.until("the device is online", lambda: bool(self.fleet.devices()["device"]["online"]))
        self.publish()
        self.fleet.roll_out(1)
        self.until("release 1 is committed", lambda: self.committed(1))
        self.traffic = Traffic(self.device.socket, self.models)
        self._stack.callback(self.traffic.stop)

    def configure(self, **settings: object) -> dict[str, Any]:
        """Changes fleet.yaml, from the server's next start on; what stands in it now."""
        path = self.fleet.data / "fleet.yaml"
        found: dict[str, Any] = {**yaml.safe_load(path.read_text()), **settings}
        path.write_text(yaml.safe_dump(found))
        return found

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- what a test does --------------------------------------------------------------------------------------------------

    def publish(self, model: str = GOOD, *, ballast: bool = False, careful: bool = False, **watch: float) -> None:
        self.models[self.version] = model
        folder = self.folder / f"release-{self.version}"
        folder.mkdir()
        shutil.copy(DIGITS / "models" / model, folder / "model.onnx")
        files = {}
        if ballast:
            files["ballast.bin"] = "ballast.bin"
            (folder / "ballast.bin").write_bytes(np.random.default_rng(self.version).bytes(BALLAST_BYTES))
        release = {
            "model": MODEL,
            "version": self.version,
            "files": files,
            "variants": [{"name": "cpu", "runtime": "onnx", "file": "model.onnx"}],
            "acceptance": {"watch": {**WATCH, **watch}, **(BESIDE if careful else {})},
        }
        (folder / "release.yaml").write_text(yaml.safe_dump(release))
        self.fleet.publish(folder / "release.yaml")

    def update(self, model: str = GOOD, *, ballast: bool = False, careful: bool = False, **watch: float) -> int:
        """Publishes the next release and starts its rollout, once the one before is over; returns its version."""
        self.until("the last rollout ends", lambda: self.fleet.get("rollouts")[0]["state"] in {"completed", "aborted"})
        self.version += 1
        self.publish(model, ballast=ballast, careful=careful, **watch)
        self.fleet.roll_out(self.version)
        return self.version

    def kill(self, part: str) -> None:
        """kill -9 of `serve`, `sync` or the trial under way."""
        if part == "trial":
            for child in self.trial_processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        elif part == "fleet":
            self.fleet.kill()
        else:
            self.processes.kill(f"device-{part}")

    def device_is_connected(self) -> bool:
        """Whether the device's agent was the last one to reach the broker, by its own log."""
        said = (self.folder / "logs" / "device-sync.log").read_text().splitlines()
        lines = [line for line in said if "the broker" in line and ("connected to" in line or "lost" in line)]
        return bool(lines) and "connected to" in lines[-1]

    def end(self, *parts: str) -> None:
        """SIGTERM, as `systemctl restart` sends it, to all of them at once; returns when they have ended."""
        self.processes.terminate(*(f"device-{part}" for part in parts))

    def trial_processes(self) -> list[psutil.Process]:
        return psutil.Process(self.processes.pid("device-sync")).children(recursive=True)

    def restart(self, part: str) -> None:
        if part == "fleet":
            self.fleet.serve()
        elif part != "trial":
            self.device.start_part(part)

    # -- what a test sees --------------------------------------------------------------------------------------------------

    def until(self, what: str, condition: Callable[[], object], limit_s: float = LIMIT_S, every_s: float = 0.02) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                self.processes.check()  # says which part died, if one did
                raise AssertionError(f"not within {limit_s} s: {what}; the device's state: {self.state()}")
            threading.Event().wait(every_s)

    def state(self) -> dict[str, Any]:
        """What `sync` has on disk about the update."""
        try:
            state: dict[str, Any] = json.loads((self.device.folder / f"store/sync/updates/{MODEL}.json").read_bytes())
        except FileNotFoundError:
            return {"phase": None, "target": None, "answers": []}
        return state

    def reaches(self, phase: str, release: int) -> None:
        def there() -> bool:
            state = self.state()
            assert not any(a["release"] == release for a in state["answers"]), f"{phase} was passed before it was seen: {state}"
            return state["phase"] == phase and state["target"] == release

        self.until(f"{phase} of release {release}", there, every_s=0.0005)

    def committed(self, release: int) -> bool:
        """The device has committed the release, and serves it, and nothing is under way."""
        last = self.answer(release)
        return bool(last) and last["outcome"] == "committed" and self.state()["phase"] == "steady" and self.serving() == release

    def at_rest(self) -> bool:
        return self.state()["phase"] in {"steady", "quarantined"}

    def answer(self, release: int) -> dict[str, Any]:
        return next((a for a in reversed(self.state()["answers"]) if a["release"] == release), {})

    def serving(self) -> int | None:
        """What `serve` itself says."""
        try:
            with Client(self.device.socket) as client:
                status, _, body = client.request("GET", f"/control/v1/models/{MODEL}")
        except ClientError:
            return None
        return json.loads(bytes(body))["active"] if status == 200 else None


class Traffic:
    """An app that asks all the time and checks every answer. `failed` are the requests that got an error from a `serve` that was
    there to give one; `wrong` the answers that are not what the release gives that they name.
    """

    def __init__(self, socket: Path, models: dict[int, str]) -> None:
        self._socket = socket
        self._models = models
        self._right: dict[str, list[float]] = {}
        self._stopping = threading.Event()
        self.answered = 0
        self.by_release: Counter[int] = Counter()
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self.away = 0
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        image = {"name": "image", "shape": IMAGES.shape, "datatype": "FP32", "data": IMAGES.ravel().tolist()}
        body = msgspec.json.encode({"inputs": [image]})
        with Client(self._socket) as client:
            while not self._stopping.wait(0.005):
                try:
                    status, _, answer = client.request("POST", f"/v2/models/{MODEL}/infer", body)
                    if status != 200:
                        self.failed.append(f"{status}: {bytes(answer)[:200]!r}")
                        continue
                except ClientError:
                    self.away += 1
                    continue
                self.answered += 1
                self._check(msgspec.json.decode(answer))

    def _check(self, answer: dict[str, Any]) -> None:
        release, found = int(answer["model_version"]), answer["outputs"][0]["data"]
        self.by_release[release] += 1
        if not np.allclose(found, self._expected(self._models[release]), atol=1e-6):
            self.wrong.append(f"release {release} ({self._models[release]}) answered {found}")

    def _expected(self, model: str) -> list[float]:
        """What the file of the release gives when it is asked here."""
        if model not in self._right:
            path = DIGITS / "models" / model
            loaded = registry.for_file(path).load(path, LoadOptions())
            self._right[model] = loaded.run({"image": IMAGES})[0].ravel().tolist()
            loaded.close()
        return self._right[model]

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(30)
