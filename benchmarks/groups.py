"""What filling a group costs: a regrouping over all devices on a database on disk, while somebody else writes; and a device that changes.

In one process, without a broker. A quarter of the devices meet the scope. The writer is a thread that records an event every 20 ms, as
whoever stores reports would: what it waits is what the regrouping costs others.

`python -m benchmarks.groups [--devices 1500 10000]`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.config import FleetConfig, Folder
from fleet_server.journal import Happening
from fleet_server.setup import init
from fleet_server.storage.models import Device
from fleet_server.timers import Steps

SITES = ("berlin", "paris", "rome", "warsaw")
CHANGES = 100


class Writer:
    """Somebody who writes all the time, and how long each writing took, in ms."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._stop, self.took = fleet, threading.Event(), list[float]()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        while not self._stop.wait(0.02):
            began = time.monotonic()
            self._fleet.journal.note(Happening(name="written", message="by somebody else"))
            self.took.append(1000 * (time.monotonic() - began))

    def stop(self) -> list[float]:
        self._stop.set()
        self._thread.join()
        return self.took


def measured(devices: int, base: Path) -> None:
    """Prints what was found."""
    folder = Folder(base / "fleet")
    init(folder, FleetConfig(fleet="bench", hosts=("127.0.0.1",)), offline_keys=base / "offline", profile=base / "profile.yaml")
    fleet = Fleet(folder, FleetConfig(fleet="bench", hosts=("127.0.0.1",)))
    fleet.recover()
    with fleet.database.session() as session:
        for n in range(devices):
            labels = {"site": SITES[n % len(SITES)]}
            session.add(Device(id=f"camera-{n:06}", created=0.0, groups=["canary"], labels=labels, serial=1, record="{}" * 300))
    alone = Writer(fleet)
    time.sleep(2)
    before = alone.stop()
    writer, began = Writer(fleet), time.monotonic()
    fleet.groups.set(SERVER, "berlin", ["label:site=berlin"])
    set_s, steps = time.monotonic() - began, []
    while True:
        step = time.monotonic()
        goes_on = fleet.groups.step()
        steps.append(1000 * (time.monotonic() - step))
        if not goes_on:
            break
        time.sleep(Steps.PAUSE_S)
    whole_s, during = time.monotonic() - began, writer.stop()
    changes = []
    for n in range(CHANGES):
        change = time.monotonic()
        fleet.inventory.set_labels(SERVER, f"camera-{n:06}", {"site": SITES[(n + 1) % len(SITES)]})
        changes.append(1000 * (time.monotonic() - change))
    idle = time.monotonic()
    fleet.groups.step()
    idle_ms = 1000 * (time.monotonic() - idle)
    print(f"{devices} devices, {fleet.groups.get('berlin').devices} in the group")
    print(f"  group set answered after {set_s:.2f} s, everybody was in after {whole_s:.1f} s and {len(steps)} steps")
    print(
        f"  a step took {statistics.median(steps):.0f} ms, the longest {max(steps):.0f}; one with nothing to do {idle_ms:.1f}"
    )
    print(f"  somebody else wrote in {statistics.median(before):.1f} ms before (the longest {max(before):.0f}), ", end="")
    print(f"in {statistics.median(during):.1f} during the regrouping (the longest {max(during):.0f})")
    print(f"  a label of one device: {statistics.median(changes):.1f} ms")
    fleet.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[1500, 10000])
    for devices in parser.parse_args().devices:
        with tempfile.TemporaryDirectory() as base:
            measured(devices, Path(base))


if __name__ == "__main__":
    main()
