"""A whole update beside predictions: fleet server, broker and a device as the demo runs them, busy clients on the device.

Each update rolls out the next release of a model with ballast, so that there is something to download, hash and try. Reported are the
p99 before and in the windows that the update touches, and what failed. Windows in which the host of this machine took its processors
away are left out; an update that has fewer than two others before it or during it does not count, and another is made. The device's
processes have the weights of their systemd units where control groups can be made; the fleet server and its broker, which would be
elsewhere, let everything else go first.
"""

import os
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/demo"))

from device import Device
from fleet import Fleet
from processes import processes, wait_for

from benchmarks import models
from benchmarks import processes as programs
from benchmarks.calm import LIMIT, Watch
from benchmarks.under_load import meanwhile
from benchmarks.weights import weights

DIGITS = Path(__file__).parents[1] / "examples/digits"
BALLAST_BYTES = 50_000_000
CLIENTS = (1, 4)
WEIGHT = re.search(
    r"^CPUWeight=(\d+)$", (Path(__file__).parents[1] / "systemd/edge-agent-sync.service").read_text(), re.MULTILINE
)
WINDOW_S = 0.5
QUIET_WINDOWS = 6
ENOUGH_WINDOWS = 2
LIMIT_S = 120
BETWEEN_LOOKS_S = 0.2  # predictions wait behind each look, and there are none in the quiet windows
REPEATS = 11
AT_MOST = 4  # times as many updates, on a machine whose host disturbs it


def measure(folder: Path, load: list[str], repeats: int) -> dict[str, Any]:
    """p99 in microseconds of quiet windows and of those during an update, a number per repeat; failures; seconds per update."""

    def ask(count: int) -> dict[str, Any]:
        watch = Watch()
        return {**programs.drive(load, device.socket, request, "http", count, WINDOW_S), "stolen": watch.stolen()}

    environment = {"EDGE_FLEET_PROFILE": str(folder / "profile.yaml"), "PYTHONUNBUFFERED": "1"}
    found: dict[str, Any] = {
        "p99_before_us": {count: [] for count in CLIENTS}, "p99_during_us": {count: [] for count in CLIENTS}, "update_s": [],
        "failures": 0, "bytes": BALLAST_BYTES, "windows": 0, "disturbed": 0,
    }  # fmt: skip
    with weights() as weighed, processes(folder / "logs", environment) as running:
        fleet, device = Fleet(folder, running, lambda _: None, lambda: None), Device("press-1", folder, running)
        fleet.init()
        fleet.serve()
        for process in (server := psutil.Process(running.pid("fleet")), *server.children()):
            process.nice(19)
            weighed.put("fleet", process.pid, idle=True)
        device.prepare()
        device.enrol(fleet.run("token", "create", "--device", device.name, quiet=True).strip())
        device.start()
        found["weighed"] = weighed.work
        assert WEIGHT is not None
        weighed.put("sync", running.pid(f"{device.name}-sync"), int(WEIGHT[1]))
        weighed.put("serve", running.pid(f"{device.name}-serve"))
        weighed.put("app", os.getpid())
        request = folder / "digits.request"
        request.write_bytes(models.request("digits", np.zeros((8, 1, 8, 8), np.float32), name="image"))
        update(fleet, device, folder, 1)
        for version in range(2, repeats * len(CLIENTS) * AT_MOST + 2):
            count = CLIENTS[version % len(CLIENTS)]
            if len(found["p99_during_us"][count]) == repeats:
                continue
            publish(fleet, folder, version)
            quiet = [ask(count) for _ in range(QUIET_WINDOWS)]
            windows: list[dict[str, Any]] = []

            def keep_asking(end: threading.Event, windows: list[dict[str, Any]] = windows, count: int = count) -> None:
                while not end.is_set():
                    windows.append(ask(count))

            with meanwhile(keep_asking):
                found["update_s"].append(roll_out(fleet, device, version))
            before, during = _undisturbed(quiet), _undisturbed(windows)
            found["windows"] += len(quiet) + len(windows)
            found["disturbed"] += len(quiet) + len(windows) - len(before) - len(during)
            found["failures"] += sum(window["failures"] for window in (*quiet, *windows))
            if min(len(before), len(during)) >= ENOUGH_WINDOWS:
                found["p99_before_us"][count].append(statistics.median(before))
                found["p99_during_us"][count].append(statistics.median(during))
    return found


def _undisturbed(windows: list[dict[str, Any]]) -> list[float]:
    """Their p99 in microseconds."""
    return [window["p99_us"] for window in windows if window["stolen"] <= LIMIT]


def update(fleet: Fleet, device: Device, folder: Path, version: int) -> None:
    publish(fleet, folder, version)
    roll_out(fleet, device, version)


def publish(fleet: Fleet, folder: Path, version: int) -> None:
    """The good digits model with bytes of its own that mean nothing: an unknown field of the protobuf."""
    document = yaml.safe_load((DIGITS / "releases/2.yaml").read_text())
    ballast = np.random.default_rng(version).bytes(BALLAST_BYTES)
    model = folder / f"model-{version}.onnx"
    model.write_bytes((DIGITS / "models/digits-v2-int8-qdq.onnx").read_bytes() + b"\xaa\x06" + varint(len(ballast)) + ballast)
    document["version"] = version
    document["files"] = {name: str((DIGITS / "releases" / path).resolve()) for name, path in document["files"].items()}
    document["files"]["model.onnx"] = str(model)
    release = folder / f"{version}.yaml"
    release.write_text(yaml.safe_dump(document))
    fleet.publish(release)
    model.unlink()


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def roll_out(fleet: Fleet, device: Device, version: int) -> float:
    """Seconds until the device serves it."""
    body = {"release": f"digits:{version}", "groups": [], "percent": None, "confirm": False}
    fleet.post("rollouts", body)
    return wait_for(
        f"release {version} on the device",
        lambda: _active(device) == version and fleet.devices()[device.name]["models"],
        limit_s=LIMIT_S,
        tick=lambda: time.sleep(BETWEEN_LOOKS_S),
    )


def _active(device: Device) -> int | None:
    from agent.client import Client, ClientError

    try:
        with Client(device.socket) as client:
            active: int | None = client.status()["models"]["digits"]["active"]
            return active
    except (ClientError, KeyError):
        return None


def main() -> None:
    from benchmarks.__main__ import spread

    with tempfile.TemporaryDirectory(prefix="edge-update-") as name:
        folder = Path(name)
        found = measure(folder, programs.load_program(folder), REPEATS)
    for count in CLIENTS:
        before, during = found["p99_before_us"][count], found["p99_during_us"][count]
        if not during:
            sys.exit(
                f"this machine's host took more than {LIMIT:.0%} of its processors' time in nearly every window: try later"
            )
        ratio = spread([d / b for b, d in zip(before, during, strict=True)], 2)
        print(f"{count} clients, p99: {spread(before, 0)} µs before, {spread(during, 0)} µs while a release comes: {ratio} ×")
    weighed = "with the weights of their units" if found["weighed"] else "all processes of one weight: no control groups here"
    print(
        f"a release of {found['bytes'] / 1e6:.0f} MB is downloaded, tried and switched to in {spread(found['update_s'], 1)} s, "
        f"{found['failures']} requests failed; {weighed}; the host disturbed {found['disturbed']} of {found['windows']} windows, "
        f"which leaves {', '.join(str(len(found['p99_during_us'][count])) for count in CLIENTS)} updates"
    )


if __name__ == "__main__":
    main()
