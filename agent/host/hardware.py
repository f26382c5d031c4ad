"""What this machine is: for choosing a release's variant, and for the fleet's filters and stratified waves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import psutil

from agent.contract.reports import Hardware

PROBE_TIMEOUT_S = 60.0
"""Importing an engine took 0.3 to 4 s on the boards tried; creating a CUDA context on a cold Jetson up to 20 s."""

_ACCELERATOR_NODES = (
    ("/dev/nvidia0", "cuda"),
    ("/dev/nvhost-gpu", "cuda"),
    ("/dev/nvgpu/igpu0", "cuda"),
    ("/dev/apex_0", "edgetpu"),
    ("/dev/hailo0", "hailo"),
)


def probe() -> Hardware:
    """The machine as it is now. Engines are imported in a child, because creating some of them can kill the process."""
    return msgspec.structs.replace(machine(), runtimes=probe_runtimes())


def machine() -> Hardware:
    """The machine without its engines: known at once."""
    return Hardware(
        arch=platform.machine(),
        machine=_board(),
        os=_os_name(),
        cpus=_cpus(),
        memory_bytes=psutil.virtual_memory().total,
        accelerator=next((name for node, name in _ACCELERATOR_NODES if Path(node).exists()), None),
    )


def probe_runtimes(timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, str]:
    """Runtime name → engine and version (`onnx: onnxruntime 1.31.1`) for those that work here. Empty when the probe dies."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "agent.host.hardware"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():  # a line per engine, so that one that kills the child does not hide those before it
        try:
            name, version = json.loads(line)
        except ValueError:
            continue
        found[str(name)] = str(version)
    return found


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _board() -> str:
    for path in ("/proc/device-tree/model", "/sys/devices/virtual/dmi/id/product_name"):
        try:
            name = Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        except OSError:
            continue
        if name:
            return name[:128]
    return ""


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return platform.platform(terse=True)


def _print_runtimes() -> None:
    from runtimes import registry
    from runtimes.contract import RuntimeFailure

    for name in registry.names():
        try:
            version = registry.find(name).version()
        except RuntimeFailure:
            continue
        sys.stdout.write(json.dumps([name, version]) + "\n")
        sys.stdout.flush()


class Probed:
    """What the machine is, found out once; and again as long as no engine was found to work. Thread-safe."""

    def __init__(self) -> None:
        self.known: Hardware | None = None
        """What was found so far; None before the first probe has ended."""
        self._lock = threading.Lock()

    def get(self) -> Hardware:
        """Waits for a probe, which may take seconds, when it has to."""
        with self._lock:
            if self.known is None or not self.known.runtimes:
                self.known = probe()
            return self.known


if __name__ == "__main__":
    _print_runtimes()
