"""What the shared port costs the fleet server for each device whose MQTT goes through it, beside the broker's own port.

A real `edge-fleet serve` with mosquitto, pinned to one processor, and devices with certificates of their own on the others, all connected
at once: by the broker's port and by the shared port, in turns. Each round connects them, notes the server's memory, and starts a rollout
that makes one poke to all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import yaml

from agent.contract.addresses import MQTT
from benchmarks.looks import Crowd, Light, Round, Stand, own_cost_s
from tests.ports import free_ports

NAMES = ("server ms a device and poke", "broker ms a device and poke", "poke known p50 s", "p99 s", "server ms a connection")


class WithSharedPort(Stand):
    def __init__(self, base: Path) -> None:
        super().__init__(base, None)
        self.server.stop()
        (self.shared,) = free_ports(1)
        path = self.server.data / "fleet.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "shared_port": self.shared}))
        self.server.start()
        self.pin()


def measured(
    stand: WithSharedPort, devices: list[Light], port: int, own_s: tuple[float, float], pokes: int
) -> tuple[float, tuple[float, ...]]:
    """One round by a port: by how many KB a connection made the server grow, and the rest in the order of NAMES."""
    direct, stand.server.broker = stand.server.broker, port
    memory, (before_s, _) = stand.process.memory_info().rss, stand.cpu_s()
    try:
        crowd = Crowd(devices)
        try:
            crowd.wait_ready()
            kilobytes = (stand.process.memory_info().rss - memory) / 1024 / len(devices)
            connect_ms = 1000 * (stand.cpu_s()[0] - before_s) / len(devices)
            found = [Round(stand, crowd, [], own_s) for _ in range(pokes)]
        finally:
            crowd.close()
    finally:
        stand.server.broker = direct
    means = (statistics.mean(getattr(one, name) for one in found) for name in ("server_ms", "broker_ms", "p50_s", "p99_s"))
    return kilobytes, (*means, connect_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pokes", type=int, default=8, help="pokes in each round")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        stand = WithSharedPort(Path(folder) / "stand")
        os.sched_setaffinity(0, cores[1:] or cores)
        try:
            devices = [Light(stand.server.enrol(f"device-{number}"), hears=True) for number in range(arguments.devices)]
            for light in devices:
                light.context.set_alpn_protocols([MQTT])
            own_s = own_cost_s(stand, arguments.pokes)
            ports = {"the broker's port": stand.server.broker, "the shared port": stand.shared}
            grown = {way: measured(stand, devices, port, own_s, 1)[0] for way, port in ports.items()}  # later it reuses memory
            rounds = [
                {way: measured(stand, devices, port, own_s, arguments.pokes)[1] for way, port in ports.items()}
                for _ in range(arguments.rounds)
            ]
        finally:
            stand.server.stop()
    print(f"{arguments.devices} devices, {arguments.rounds} rounds of {arguments.pokes} pokes: median (smallest, largest)")
    for way in ports:
        print(f"{way:18} {'server KB a connection':30} {grown[way]:8.1f}")
        for name, values in zip(NAMES, zip(*(one[way] for one in rounds), strict=True), strict=True):
            print(f"{way:18} {name:30} {statistics.median(values):8.3f} ({min(values):.3f}, {max(values):.3f})")


if __name__ == "__main__":
    main()
