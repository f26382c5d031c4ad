"""Runs inside the booted machine, as root, and prints one JSON object of what it saw."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

SOCKET = "/run/edge-agent/agent.sock"
LIMIT_S = 20.0
CAP_SYS_RESOURCE = 24


def show(unit: str, *properties: str) -> dict[str, str]:
    line = ["systemctl", "show", unit, *(f"--property={name}" for name in properties)]
    return dict(row.split("=", 1) for row in subprocess.check_output(line, text=True).splitlines())


class UnixConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(SOCKET)


def ask(method: str, path: str, body: str | None = None) -> tuple[int, str]:
    connection = UnixConnection("edge")
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def ask_port(port: int) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("GET", "/v2/models/digits")
        answer = connection.getresponse()
        return answer.status, str(json.loads(answer.read()).get("name"))
    finally:
        connection.close()


def predict() -> tuple[int, str]:
    data = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.0] * 64}
    return ask("POST", "/v2/models/digits/infer", json.dumps({"inputs": [data]}))


def until(condition: object, what: str) -> float:
    start = time.monotonic()
    while not condition():  # type: ignore[operator]
        if time.monotonic() - start > LIMIT_S:
            raise TimeoutError(what)
        time.sleep(0.05)
    return time.monotonic() - start


def main_pid() -> int:
    return int(show("edge-agent.service", "MainPID")["MainPID"])


def priorities(pid: int) -> dict[str, object]:
    """How far up the service may set its threads, as asked for and as given, and whether systemd is allowed to give it here."""
    limits = Path(f"/proc/{pid}/limits").read_text()
    capabilities = int(
        next(line for line in Path("/proc/1/status").read_text().splitlines() if line.startswith("CapEff")).split()[1], 16
    )
    return {
        **show("edge-agent.service", "LimitNICE", "CPUWeight"),
        "given": next(line for line in limits.splitlines() if line.startswith("Max nice")).split()[3],
        "can be given": bool(capabilities >> CAP_SYS_RESOURCE & 1),
    }


def reachable_from(prefix: list[str], port: int) -> str:
    """What a process started with `prefix` sees when it connects to the machine's loopback."""
    code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 3); print('reached')"
    done = subprocess.run(
        [*prefix, "/usr/bin/edge-python", "-c", code], capture_output=True, text=True, timeout=15, check=False
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


TRIAL = """
import json
from pathlib import Path
from agent.host.clock import SystemClock
from agent.store import Choice, Store
from agent.sync.trials.trial import TrialProcesses, make_request
store = Store(Path("/var/lib/edge-agent/store"))
release = store.release("digits", Choice(version=1, variant="cpu"))
request = make_request(store, release.manifest, release.variant, memory_bytes=10**9, timeout_s=30, threads=1)
print(json.dumps(TrialProcesses(SystemClock(), Path("/run/edge-agent/trial.sock")).run(request, 30, lambda: False)))
"""


def try_a_release_as_sync_does() -> dict[str, object]:
    """A trial asked for by the user that `sync` runs as, answered by a service that systemd starts for it."""
    line = ["runuser", "-u", "edge-agent-sync", "--", "/usr/bin/edge-python", "-c", TRIAL]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    started = subprocess.run(["journalctl", "-b", "-o", "cat", "_PID=1"], capture_output=True, text=True, check=False)
    return {"said": done.stdout or done.stderr[-600:], "services": started.stdout.count("Started edge-agent-trial@")}


LIVES = """
import json
from pathlib import Path
from agent.config import AgentConfig
from agent.diary import Diary
print(json.dumps([life.ended for life in Diary(AgentConfig().diary_folder).read()]))
"""


def lives() -> list[bool]:
    """Which of the processes that served ended in order, as the user that `sync` runs as reads it."""
    line = ["runuser", "-u", "edge-agent-sync", "--", "/usr/bin/edge-python", "-c", LIVES]
    found: list[bool] = json.loads(subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout)
    return found


def seen() -> dict[str, object]:
    facts: dict[str, object] = {}
    facts["verify"] = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(f"/etc/systemd/system/{unit}" for unit in UNITS)],
        capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip
    facts["before the first request"] = show("edge-agent.service", "ActiveState")["ActiveState"]
    facts["first request, through the socket unit"] = predict()
    until(lambda: show("edge-agent.service", "ActiveState")["ActiveState"] != "activating", "the service says READY")
    facts["then"] = show("edge-agent.service", "ActiveState", "StatusText", "NRestarts", "User")

    facts["priorities"] = priorities(main_pid())
    facts["interfaces"] = sorted(
        line.split(":")[0].strip() for line in Path(f"/proc/{main_pid()}/net/dev").read_text().splitlines()[2:]
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        facts["loopback from outside"] = reachable_from([], port)
        facts["loopback from inside the service's network"] = reachable_from(
            ["nsenter", f"--net=/proc/{main_pid()}/ns/net"], port
        )
    facts["through the loopback port"] = ask_port(8000)
    subprocess.run(["systemctl", "start", "network-probe.service"], check=False)
    facts["sockets under the unit's own restrictions"] = Path("/var/lib/network-probe/seen").read_text()
    facts["write to the store"] = show("store-probe.service", "Result") if start("store-probe.service") else "could write"

    facts["a trial"] = try_a_release_as_sync_does()

    before = main_pid()
    os.kill(before, signal.SIGKILL)
    facts["asked right after kill -9"] = predict()
    facts["restarted with another pid"] = main_pid() != before

    frozen = main_pid()
    os.kill(frozen, signal.SIGSTOP)
    until(lambda: main_pid() not in {0, frozen}, "the watchdog did not act")
    facts["after the watchdog"] = predict()
    facts["lives before the restart"] = lives()

    answers: list[int] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            answers.append(predict()[0])

    thread = threading.Thread(target=client)
    thread.start()
    until(lambda: len(answers) > 20, "no answers")
    subprocess.run(["systemctl", "restart", "edge-agent.service"], check=True)
    count = len(answers)
    until(lambda: len(answers) > count + 20, "no answers after the restart")
    stop.set()
    thread.join()
    facts["answers across systemctl restart"] = sorted(set(answers))
    facts["lives after the restart"] = lives()
    subprocess.run(["systemctl", "stop", "edge-agent.service"], check=True)
    facts["stopped"] = show("edge-agent.service", "Result", "ExecMainStatus")
    return facts


def start(unit: str) -> bool:
    """True when the unit failed, as it should."""
    return subprocess.run(["systemctl", "start", unit], capture_output=True, check=False).returncode != 0


UNITS = (
    "edge-agent.socket", "edge-agent.service", "edge-agent-sync.service", "edge-agent-trial.socket",
    "edge-agent-trial@.service", "edge-fleet.service", "edge-fleet-api.service", "edge-fleet-ingest.service", "edge-fleet-decide.service",
)  # fmt: skip

if __name__ == "__main__":
    try:
        print(json.dumps(seen()))
    except BaseException as error:
        journal = subprocess.run(
            ["journalctl", "-b", "--no-pager", "-n", "30"], capture_output=True, text=True, check=False
        ).stdout
        print(json.dumps({"error": repr(error), "journal": journal}))
        raise
