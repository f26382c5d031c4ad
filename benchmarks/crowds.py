"""What others' requests cost while somebody crowds a listener of the fleet server: `python -m benchmarks.crowds`.

Each attack comes from 127.0.0.2 and a process of its own; the others are devices and an operator at 127.0.0.1, each request on
a new connection. Prints median, p99 and failures of both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import resource
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from tests.fleet.stand import Device, Server

ATTACKER = "127.0.0.2"


async def _hold(port: int, count: int, context: ssl.SSLContext | None, said: bytes) -> None:
    """Keeps `count` connections open, and opens those anew that the server ends."""

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                opening = asyncio.open_connection("127.0.0.1", port, ssl=context, local_addr=(ATTACKER, 0))
                reader, writer = await asyncio.wait_for(opening, 30)
                if said:
                    writer.write(said)
                while await reader.read(65536):
                    pass
                writer.close()
            await asyncio.sleep(0.5)

    await asyncio.gather(*(one() for _ in range(count)))


def _attack(port: int, count: int, files: tuple[str, str, str] | None, said: bytes) -> None:
    context = None
    if files is not None:
        context = ssl.create_default_context(cafile=files[0])
        if files[1]:
            context.load_cert_chain(files[1], files[2])
    asyncio.run(_hold(port, count, context, said))


@contextlib.contextmanager
def attack(port: int, count: int, files: tuple[str, str, str] | None, said: bytes = b"") -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_attack, args=(port, count, files, said), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


class Others:
    """Requests of those who do nothing wrong, each on a new connection."""

    def __init__(self, name: str, ask: Callable[[], int]) -> None:
        self.name, self._ask, self._stop = name, ask, threading.Event()
        self.took_ms: list[float] = []
        self.failed: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            begun = time.perf_counter()
            try:
                status = self._ask()
                problem = "" if status == 200 else str(status)
            except requests.RequestException as error:
                problem = type(error).__name__
            if problem:
                self.failed[problem] = self.failed.get(problem, 0) + 1
            else:
                self.took_ms.append((time.perf_counter() - begun) * 1000)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def row(self) -> str:
        took = sorted(self.took_ms)
        p50, p99 = (statistics.median(took), took[int(len(took) * 0.99)]) if took else (float("nan"),) * 2
        return f"{self.name:9} {len(took):5} answered  p50 {p50:7.1f} ms  p99 {p99:8.1f} ms  failed {sum(self.failed.values())} {self.failed or ''}"


def measure(name: str, server: Server, victim: Device, during: contextlib.AbstractContextManager[Any], seconds: float) -> None:
    def device() -> int:
        pair = (str(victim.certificate), str(victim.key_file))
        url = f"{server.device_url}/metadata/timestamp.json"
        return requests.get(url, cert=pair, verify=str(server.ca), timeout=5).status_code

    def operator() -> int:
        headers = {"Authorization": f"Bearer {server.token}"}
        return requests.get(f"{server.url}/api/v1/status", headers=headers, verify=str(server.ca), timeout=5).status_code

    with during:
        time.sleep(4)  # until the attack stands
        devices, operators = Others("devices", device), Others("operators", operator)
        with devices.asking(), operators.asking():
            time.sleep(seconds)
    print(f"{name}\n  {devices.row()}\n  {operators.row()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--descriptors", type=int, default=1024, help="that the server may have")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (arguments.descriptors, min(hard, arguments.descriptors)))
        try:
            _rounds(server, arguments.seconds)
        finally:
            server.stop()


def _rounds(server: Server, seconds: float) -> None:
    victim, hostile = server.enrol("victim"), server.enrol("hostile")
    device = (str(server.ca), str(hostile.certificate), str(hostile.key_file))
    stranger = (str(server.ca), "", "")
    kept = b"GET /metadata/timestamp.json HTTP/1.1\r\nHost: x\r\n\r\n"
    for name, during in {
        "nothing": contextlib.nullcontext(),
        "400 connections of one device": attack(server.device, 400, device, kept),
        "410 idle ones at the operators' port": attack(server.operator, 410, stranger),
        "1100 silent ones at the devices' port": attack(server.device, 1100, None),
        "1100 silent ones at the operators' port": attack(server.operator, 1100, None),
    }.items():
        measure(name, server, victim, during, seconds)
    print(f"the server still runs: {server.process.poll() is None}; lines of its log: {len(server.log().splitlines())}")


if __name__ == "__main__":
    sys.exit(main())
