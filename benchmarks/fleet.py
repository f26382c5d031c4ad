"""A fleet of simulated devices on one `edge-fleet serve` with mosquitto and SQLite: `make bench-fleet`, `python -m benchmarks.fleet`.

For each size: the devices connect; they report for as many minutes as fit, as fast as the server stores it; a rollout in waves with 3 %
failing devices, which its gate lets pass; another one, which its gate must stop; one device is revoked. Everything shares this machine's processors. While the
rollouts run, an operator in a process of its own asks for devices, the rollout and the status. Prints a table, and draws it (--plot).
Exit status 1 when a rollout did not end as its gates say.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from agent.contract.names import ReleaseRef
from fleet_server import descriptors
from fleet_server.client import Client, Profile
from fleet_server.errors import FleetError
from fleet_server.simulation import behaviours, members
from fleet_server.simulation.crowd import Crowd
from fleet_server.simulation.expected import Plan, stages
from fleet_server.simulation.pace import Realism
from fleet_server.simulation.report import Report, lines
from fleet_server.simulation.story import Nobody, Order, Story
from fleet_server.simulation.throwaway import Throwaway

MODEL = "bench"
SHARES = (behaviours.parse("refusing=2%"), behaviours.parse("rolling-back=1%"))
ALLOWED = 0.05  # of the devices may fail in the rollout that is to pass; in the one that is to be stopped, none
BURST = 6000  # reports on their way, about; enough for the server to be busy, and little for the broker to hold
ASK_S = 0.5  # between two questions how many are stored: the answer costs the server something, too
PAUSE_S = 0.25  # an agent's reports are never closer
PROBE_S = 0.25
HOUR = 60  # reports of a device in an hour
SIZES = (1000, 3000, 10_000)
TIMEOUT_S = 1800.0
REVOKED_S = 30.0


class Used(msgspec.Struct, frozen=True):
    """Processor seconds so far."""

    server: float
    broker: float
    simulator: float

    def since(self, before: Used) -> Used:
        return Used(self.server - before.server, self.broker - before.broker, self.simulator - before.simulator)


class Result(msgspec.Struct, kw_only=True):
    """What was measured with one number of devices. Times in seconds, memory in MB (10⁶ bytes)."""

    devices: int
    enrolling_s: float = 0.0
    connecting_s: float = 0.0
    connecting_cpu: Used | None = None
    connected_mb: tuple[float, float] = (0.0, 0.0)
    """Server and broker, the proportional part of each, when all are connected and nothing happens."""
    steady_reports: int = 0
    steady_s: float = 0.0
    steady_cpu: Used | None = None
    rollout_s: float = 0.0
    last_commit_s: float | None = None
    rollout_cpu: Used | None = None
    stopped_s: float = 0.0
    reached_before_stop: int = 0
    as_expected: bool = False
    revoked_s: float = 0.0
    reconnected: int = 0
    """Connections of other devices that broke when one was revoked."""
    api_ms: dict[str, list[float]] = {}
    api_failed: int = 0
    server_mb: tuple[float, float] = (0.0, 0.0)
    """The most that was resident, and the proportional part in the end."""
    broker_mb: tuple[float, float] = (0.0, 0.0)
    simulator_mb: float = 0.0
    assignment_bytes: int = 0
    reports: list[Report] = []

    @property
    def reports_per_core_s(self) -> float:
        """Reports stored for each processor second of the server."""
        return self.steady_reports / max(0.001, self.steady_cpu.server) if self.steady_cpu else 0.0

    def api(self, quantile: float) -> float:
        took = sorted(ms for found in self.api_ms.values() for ms in found)
        return took[min(len(took) - 1, int(len(took) * quantile))] if took else float("nan")


class Watched:
    """The processes of one fleet."""

    def __init__(self, server: Throwaway) -> None:
        broker = server.broker_pid()
        assert broker is not None
        self._server, self._broker = psutil.Process(server.pid), psutil.Process(broker)

    def used(self) -> Used:
        own = resource.getrusage(resource.RUSAGE_SELF)
        return Used(_cpu_s(self._server), _cpu_s(self._broker), own.ru_utime + own.ru_stime)

    def shares_mb(self) -> tuple[float, float]:
        """Proportional, of server and broker."""
        return _memory_mb(self._server.pid)[1], _memory_mb(self._broker.pid)[1]

    def memory(self, result: Result) -> None:
        result.server_mb, result.broker_mb = _memory_mb(self._server.pid), _memory_mb(self._broker.pid)
        result.simulator_mb = _memory_mb(os.getpid())[0]


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _memory_mb(pid: int) -> tuple[float, float]:
    """(the most that was resident, the proportional set size now), from /proc."""
    high = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    pss = next(line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(high.split()[1]) * 1024 / 1e6, int(pss.split()[1]) * 1024 / 1e6


@contextlib.contextmanager
def operator(profile: Profile, result: Result) -> Iterator[None]:
    """An operator who asks again and again, in a process of its own: this one's Python is busy with the devices."""
    command = [sys.executable, "-m", "benchmarks.fleet", "--probe"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(msgspec.to_builtins(profile)) + "\n")
    process.stdin.flush()
    try:
        yield
    finally:
        said, _ = process.communicate("end\n", timeout=120)
        found = json.loads(said)
        for name, took in found["ms"].items():
            result.api_ms.setdefault(name, []).extend(took)
        result.api_failed += found["failed"]
        result.assignment_bytes = found["assignment_bytes"]


def probe() -> None:
    """What the operator's process does, until its standard input has a second line."""
    import select

    client = Client(msgspec.convert(json.loads(sys.stdin.readline()), Profile))
    took: dict[str, list[float]] = {"devices": [], "rollout": [], "status": [], "assignment": []}
    failed = largest = 0
    while not select.select([sys.stdin], [], [], PROBE_S)[0]:
        for name, mine in took.items():
            began = time.perf_counter()
            try:
                if name == "rollout":
                    if newest := client.get("/rollouts", limit=1):
                        began = time.perf_counter()
                        client.get(f"/rollouts/{newest[0]['id']}")
                else:
                    said = client.get(f"/{name}", **({"limit": 100} if name == "devices" else {}))
                    largest = max(largest, len(json.dumps(said, separators=(",", ":"))) if name == "assignment" else 0)
            except FleetError:
                failed += 1
            else:
                mine.append((time.perf_counter() - began) * 1000)
    print(json.dumps({"ms": took, "failed": failed, "assignment_bytes": largest}))


async def steady(crowd: Crowd, client: Client, watched: Watched, result: Result, rounds: int) -> None:
    """Every device reports `rounds` times, as fast as the server stores it."""

    async def stored() -> int:
        said = (await asyncio.to_thread(client.get, "/status"))["messages"]
        return int(said["accepted"]) + sum(said["dropped"].values())

    async def behind(most: int) -> None:
        """Returns when no more than so many reports are not stored yet."""
        while crowd.counted.reports - sent - (await stored() - first) > most:  # noqa: ASYNC110 - another process
            await asyncio.sleep(ASK_S)

    await asyncio.sleep(1.0)
    before, began, first = watched.used(), time.monotonic(), await stored()
    loop, sent = asyncio.get_running_loop(), crowd.counted.reports
    ahead = sent
    for _ in range(rounds):
        for number, one in enumerate(crowd.devices):
            one.device.beat(loop.time())
            if number % 50 == 49:
                await asyncio.sleep(0)  # the loop has other things to do
            if crowd.counted.reports - ahead > BURST:
                await behind(BURST // 2)
                ahead = crowd.counted.reports - BURST // 2
        await asyncio.sleep(PAUSE_S)
    await behind(0)
    result.steady_reports, result.steady_s = crowd.counted.reports - sent, time.monotonic() - began
    result.steady_cpu = watched.used().since(before)


async def revoke(crowd: Crowd, client: Client, result: Result) -> None:
    """One device is revoked while all others are connected."""
    victim, *others = [one for one in crowd.devices if one.link.connected]
    before = sum(one.link.connections for one in others)
    began = time.monotonic()
    asked = asyncio.create_task(asyncio.to_thread(client.post, f"/devices/{victim.member.id}/revoke"))
    while victim.link.connected and time.monotonic() - began < REVOKED_S:  # noqa: ASYNC110 - the link has no event
        await asyncio.sleep(0.005)
    result.revoked_s = time.monotonic() - began
    await asked
    await asyncio.sleep(2.0)  # whoever was thrown off is back by then
    result.reconnected = sum(one.link.connections for one in others) - before + sum(not one.link.connected for one in others)


async def measure(server: Throwaway, client: Client, order: Order, prepared: Any, result: Result, rounds: int) -> None:
    releases = [order.release, ReleaseRef(MODEL, 3)]
    known = [manifest for manifest in prepared.manifests if manifest.ref not in releases]
    crowd = Crowd(
        server.address(), order.members, prepared.papers, server.folder, realism=order.realism, seed=order.seed,
        bad=releases, manifests=known,
    )  # fmt: skip
    watched = Watched(server)
    try:
        before = watched.used()
        story = Story(client, crowd, order, Nobody(), server.ended)
        result.connecting_s = await story.connect()
        result.connecting_cpu = watched.used().since(before)
        result.connected_mb = watched.shares_mb()
        _say(f"connected {crowd.connected()} in {result.connecting_s:.1f} s")
        await steady(crowd, client, watched, result, rounds)
        _say(f"stored {result.steady_reports} reports in {result.steady_s:.1f} s")
        with operator(server.profile, result):
            before = watched.used()
            passed = await story.roll_out(result.connecting_s)
            result.rollout_cpu = watched.used().since(before)
            result.rollout_s, result.last_commit_s = passed.over_s, passed.last_commit_s
            _say(f"{passed.ended.state} after {passed.over_s:.1f} s, the last commit after {passed.last_commit_s} s")
            bad = msgspec.structs.replace(order, release=releases[1], plan=Plan(order.plan.stages, max_failures=0))
            stopped = await Story(client, crowd, bad, Nobody(), server.ended).roll_out()
            result.stopped_s, result.reached_before_stop = stopped.over_s, stopped.ended.reached
            _say(f"{stopped.ended.state} in wave {stopped.ended.wave + 1} after {stopped.over_s:.1f} s")
        result.as_expected = passed.as_expected and stopped.as_expected
        for report in (passed, stopped):
            if not report.as_expected:
                _say("\n  ".join(lines(report)))
        result.reports = [passed, stopped]
        await revoke(crowd, client, result)
        _say(f"one revoked: out after {result.revoked_s:.2f} s, {result.reconnected} other connections broke")
        watched.memory(result)
    finally:
        await crowd.close()


def run(devices: int, arguments: argparse.Namespace) -> Result:
    """One size, from nothing to nothing."""
    result = Result(devices=devices)
    found = members.made_up(devices, MODEL, 1, SHARES, arguments.seed)
    realism = Realism(verify=arguments.verify, speed=arguments.speed, beats_s=60.0)
    order = Order(
        members=found, release=ReleaseRef(MODEL, 2), plan=Plan(stages(arguments.waves), round(ALLOWED * devices)),
        seed=arguments.seed, realism=realism, silence_s=realism.silence_s, timeout_s=TIMEOUT_S,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as folder:
        server = Throwaway(Path(folder), silence_s=realism.silence_s, tick_s=5.0)
        began = time.monotonic()
        prepared = server.prepare(found, [ReleaseRef(MODEL, version) for version in (1, 2, 3)], {MODEL: 1})
        result.enrolling_s = time.monotonic() - began
        try:
            server.start()
            rounds = min(HOUR, max(3, arguments.reports // devices))
            with server.client() as client:
                asyncio.run(measure(server, client, order, prepared, result, rounds))
        finally:
            server.stop()
    return result


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def table(results: list[Result]) -> Iterator[str]:
    def row(name: str, *cells: str) -> str:
        return f"{name:46}" + "".join(f"{cell:>20}" for cell in cells)

    def cpu(used: Used | None, devices: int) -> str:
        if used is None:
            return "-"
        return " / ".join(f"{1000 * part / devices:.1f}" for part in (used.server, used.broker, used.simulator))

    yield row("devices", *(f"{r.devices}" for r in results))
    yield row("all connected, s", *(f"{r.connecting_s:.1f}" for r in results))
    yield row("  CPU ms/device: server / broker / simulator", *(cpu(r.connecting_cpu, r.devices) for r in results))
    yield row("reports stored, s", *(f"{r.steady_reports} in {r.steady_s:.0f}" for r in results))
    yield row("  per second of the server's CPU", *(f"{r.reports_per_core_s:.0f}" for r in results))
    yield row(
        "  an hour's, s of the server's CPU", *(f"{HOUR * r.devices / max(1, r.reports_per_core_s):.0f}" for r in results)
    )
    yield row("rollout: start to its end, s", *(f"{r.rollout_s:.1f}" for r in results))
    yield row(
        "  to the last commit of a device, s", *(f"{r.last_commit_s:.1f}" if r.last_commit_s else "never" for r in results)
    )
    yield row("  CPU ms/device: server / broker / simulator", *(cpu(r.rollout_cpu, r.devices) for r in results))
    yield row("bad rollout: stopped after, s", *(f"{r.stopped_s:.1f}" for r in results))
    yield row("  devices that it had reached", *(f"{r.reached_before_stop}" for r in results))
    yield row("both ended as their gates say", *("yes" if r.as_expected else "NO" for r in results))
    yield row("one revoked: out after, s; others that broke", *(f"{r.revoked_s:.2f}; {r.reconnected}" for r in results))
    yield row("API meanwhile: p50 / p99, ms", *(f"{r.api(0.5):.0f} / {r.api(0.99):.0f}" for r in results))
    for name in ("devices", "rollout", "status", "assignment"):
        yield row(f"  {name}: p50, ms", *(f"{statistics.median(r.api_ms.get(name) or [float('nan')]):.0f}" for r in results))
    yield row("  requests, failed", *(f"{sum(map(len, r.api_ms.values()))}, {r.api_failed}" for r in results))
    yield row(
        "all connected: server / broker, PSS MB", *(f"{r.connected_mb[0]:.0f} / {r.connected_mb[1]:.0f}" for r in results)
    )
    yield row("server: most RSS / PSS, MB", *(f"{r.server_mb[0]:.0f} / {r.server_mb[1]:.0f}" for r in results))
    yield row("broker: most RSS / PSS, MB", *(f"{r.broker_mb[0]:.0f} / {r.broker_mb[1]:.0f}" for r in results))
    yield row("simulator: most RSS, MB", *(f"{r.simulator_mb:.0f}" for r in results))
    yield row("assignment, bytes", *(f"{r.assignment_bytes}" for r in results))


def goals(result: Result) -> Iterator[str]:
    """What was to be reached with 10 000 devices, and whether this run did."""
    reached = {
        "a rollout in 10 minutes": result.rollout_s <= 600,
        "the server in 400 MB": result.server_mb[0] <= 400,
        "the broker in 300 MB": result.broker_mb[0] <= 300,
        "API p99 within 250 ms": result.api(0.99) <= 250,
        "5 000 reports per second of the server's CPU": result.reports_per_core_s >= 5000,
        "nobody else's connection when one is revoked": result.reconnected == 0,
    }
    yield f"{result.devices} devices: " + "; ".join(f"{goal}: {'yes' if met else 'NO'}" for goal, met in reached.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--devices", type=int, action="append", help=f"one size; repeatable (default: {', '.join(map(str, SIZES))})"
    )
    parser.add_argument("--waves", default="1%,10%,100%", help="of both rollouts")
    parser.add_argument("--speed", type=float, default=10.0, help="how many times as fast as real ones devices try and watch")
    parser.add_argument("--reports", type=int, default=120_000, help="that are stored at most before the rollouts")
    parser.add_argument("--verify", type=float, default=0.01, help="share of devices that verify with TUF")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where everything measured is written")
    parser.add_argument("--plot", type=Path, help="where it is drawn (SVG or PNG)")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        probe()
        return 0
    descriptors.raise_limit()
    print(
        f"{os.cpu_count()} processors, shared by server, broker and devices; at most {descriptors.allowed()} open files",
        flush=True,
    )
    results = []
    for devices in arguments.devices or SIZES:
        _say(f"{devices} devices:")
        results.append(run(devices, arguments))
    print("\n".join(table(results)))
    for result in results:
        if result.devices >= max(SIZES):
            print("\n".join(goals(result)))
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    if arguments.plot:
        from benchmarks.fleet_plot import draw

        draw(results, arguments.plot)
    return int(not all(result.as_expected for result in results))


if __name__ == "__main__":
    sys.exit(main())
