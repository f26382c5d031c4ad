"""Reports through a RabbitMQ node beside the same reports through mosquitto, in one run: `python -m benchmarks.brokers [--devices 60]`.

Every device sends signed reports as fast as its broker takes them; the time counts until the server has stored all. The server stores in
SQLite; everything is on this machine. What the processes of a run used of the processor is told too, per report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from agent.contract import topics
from agent.contract.reports import StateReport
from tests.fleet.rabbit import Rabbits
from tests.fleet.stand import Device, Server, signed_report, wait_until
from tests.fleet.test_rabbitmq import hello, publish

ACK_BYTES = 4
WINDOW = 100
AT_ONCE = 4  # devices that send at the same time


def reports(device: Device, count: int) -> list[bytes]:
    """As many signed reports that say the same, each newer than the one before, with a packet identifier of its own."""
    made = []
    for number in range(1, count + 1):
        report = StateReport(device=device.id, counter=number, session=1, at=time.time(), agent_version="bench", models={})
        made.append(publish(topics.up(device.id, "state"), signed_report(report, device.key), number=number))
    return made


def send(server: Server, device: Device, packets: list[bytes]) -> None:
    """Returns when all of them are acknowledged; WINDOW at a time are not."""
    with hello(server, device) as tls:
        for first in range(0, len(packets), WINDOW):
            some = packets[first : first + WINDOW]
            tls.sendall(b"".join(some))
            missing = len(some) * ACK_BYTES
            while missing > 0:
                said = tls.recv(1 << 16)
                if not said:
                    raise ConnectionError("the broker hung up")
                missing -= len(said)


def processor_s(*, below: list[int]) -> float:
    """Seconds of processor time of these processes and all they started."""
    total = 0.0
    for pid in below:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def measure(server: Server, brokers: list[int], devices: int, each: int) -> dict[str, float]:
    joined = [server.enrol(f"b{number}") for number in range(devices)]
    packets = {device.id: reports(device, each) for device in joined}
    total, server_pid = devices * each, server.process.pid
    before, used = server.get("/status")["messages"]["accepted"], processor_s(below=[server_pid, *brokers])
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda device: send(server, device, packets[device.id]), joined))
    acknowledged_s = time.monotonic() - began
    wait_until(lambda: server.get("/status")["messages"]["accepted"] - before >= total, "all is stored", within=300)
    took_s = time.monotonic() - began
    used = processor_s(below=[server_pid, *brokers]) - used
    return {"reports_per_s": total / took_s, "acknowledged_per_s": total / acknowledged_s, "cpu_ms": 1000 * used / total}


@contextlib.contextmanager
def mosquitto(folder: Path) -> Iterator[tuple[Server, list[int]]]:
    server = Server(folder).start()
    try:
        yield server, []
    finally:
        server.stop()


@contextlib.contextmanager
def rabbitmq(folder: Path) -> Iterator[tuple[Server, list[int]]]:
    made = Rabbits(folder, 1)
    try:
        made.start()
        yield made.server, [node.process.pid for node in made.nodes]
    finally:
        made.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=60)
    parser.add_argument("--each", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=2)
    wanted = parser.parse_args()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    ways: dict[str, Any] = {"mosquitto": mosquitto, "rabbitmq": rabbitmq}
    for turn in range(wanted.rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder, way(Path(folder)) as (server, brokers):
                found = measure(server, brokers, wanted.devices, wanted.each)
                said = f"{found['reports_per_s']:6.0f} stored/s, {found['acknowledged_per_s']:6.0f} acknowledged/s"
                print(f"round {turn + 1}  {name:10} {said}, {found['cpu_ms']:.2f} ms of processor for each report", flush=True)


if __name__ == "__main__":
    main()
