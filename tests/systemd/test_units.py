"""The shipped units under a real systemd: activation, readiness, watchdog, restarts, and a serving process that reaches no network."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from agent.contract.codec import encode
from agent.contract.manifest import File, ReleaseManifest, Variant
from agent.store import Choice, Selection, Store, hash_file

from .machine import CHECKOUT, Machine, machine

MODEL = CHECKOUT / "examples/digits/models/digits-v2-int8-qdq.onnx"

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.alone,  # a watchdog of 2 s, in a machine that boots beside everything else
    pytest.mark.timeout(150),
    pytest.mark.skipif(os.geteuid() != 0, reason="booting a container needs root"),
]

EDGE_PYTHON = """#!/bin/sh
export PYTHONHOME=/opt/python PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/opt/checkout:/opt/packages
exec /opt/python/bin/python3 "$@"
"""

NETWORK_PROBE = """
import errno, socket
def attempt(family, kind):
    try:
        socket.socket(family, kind).close()
        return "opened"
    except OSError as error:
        return errno.errorcode[error.errno]
import json, pathlib
families = {"AF_UNIX": socket.AF_UNIX, "AF_INET": socket.AF_INET, "AF_INET6": socket.AF_INET6, "AF_NETLINK": socket.AF_NETLINK, "AF_PACKET": socket.AF_PACKET}
pathlib.Path("/var/lib/network-probe/seen").write_text(json.dumps({n: attempt(f, socket.SOCK_RAW if n in ("AF_NETLINK", "AF_PACKET") else socket.SOCK_STREAM) for n, f in families.items()}))
"""


def like_the_service(exec_start: str, extra: str = "") -> str:
    """edge-agent.service with every one of its restrictions and another command."""
    text = (CHECKOUT / "systemd/edge-agent.service").read_text()
    text = re.sub(r"(?m)^(Type|NotifyAccess|Restart|RestartSec|WatchdogSec|Requires|After|WantedBy|Also)=.*\n", "", text)
    text = text.replace("[Install]\n", "")
    return re.sub(r"(?m)^ExecStart=.*$", f"Type=oneshot\nExecStart={exec_start}\n{extra}", text)


def put_release(store: Store) -> None:
    sha256 = hash_file(MODEL)
    shutil.copyfile(MODEL, store.blob(sha256))
    manifest = ReleaseManifest(
        model="digits",
        version=1,
        files={"model.onnx": File(sha256=sha256, size_bytes=MODEL.stat().st_size)},
        variants=(Variant(name="cpu", runtime="onnx", file="model.onnx"),),
    )
    store.write_manifest(encode(manifest))
    store.select(Selection(model="digits", active=Choice(version=1, variant="cpu")))


def furnish(target: Machine) -> None:
    target.install_product()
    target.write("usr/bin/edge-python", EDGE_PYTHON, mode=0o755)
    target.write("etc/systemd/system/edge-agent.service.d/test.conf", "[Service]\nWatchdogSec=2s\n")
    target.write("etc/systemd/system/edge-agent.socket.d/http.conf", "[Socket]\nListenStream=127.0.0.1:8000\n")
    target.write("opt/network_probe.py", NETWORK_PROBE)
    unit = like_the_service("/usr/bin/edge-python /opt/network_probe.py", "StateDirectory=network-probe")
    target.write("etc/systemd/system/network-probe.service", unit)
    target.write("etc/systemd/system/store-probe.service", like_the_service("/bin/touch /var/lib/edge-agent/store/written"))
    target.make_users_and_folders()
    put_release(Store.create(target.root / "var/lib/edge-agent/store"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with machine(tmp_path_factory.mktemp("machine")) as target:
        furnish(target)
        output = target.boot()
    told = [line for line in output.splitlines() if line.startswith("{")]
    assert told, f"the probe told nothing:\n{output}"
    facts: dict[str, Any] = json.loads(told[-1])
    assert "error" not in facts, f"{facts['error']}\n{facts['journal']}"
    return facts


def test_units_are_clean_for_systemd_analyze_verify(seen: dict[str, Any]) -> None:
    assert seen["verify"] == ""


def test_the_first_request_starts_the_service_and_is_answered(seen: dict[str, Any]) -> None:
    status, body = seen["first request, through the socket unit"]
    assert (status, json.loads(body)["outputs"][0]["shape"]) == (200, [1, 10])
    assert seen["then"]["ActiveState"] == "active"
    assert seen["then"]["User"] == "edge-agent"


def test_long_runs_may_give_way_and_come_back(seen: dict[str, Any]) -> None:
    found = seen["priorities"]
    assert (found["LimitNICE"], found["CPUWeight"]) == ("20", "100")
    assert found["given"] == ("20" if found["can be given"] else "0"), (
        "a container may not be allowed to: the service runs all the same"
    )


def test_the_service_reaches_no_network(seen: dict[str, Any]) -> None:
    assert seen["interfaces"] == ["lo"]
    assert seen["loopback from outside"] == "reached", "the probe itself must be able to reach the listener"
    assert "reached" not in seen["loopback from inside the service's network"]
    families = json.loads(seen["sockets under the unit's own restrictions"])
    assert families.pop("AF_UNIX") == "opened"
    assert set(families.values()) == {"EAFNOSUPPORT"}, families


def test_a_loopback_port_comes_from_the_socket_unit(seen: dict[str, Any]) -> None:
    """The service itself has no network: the socket that systemd opened is all it gets of it."""
    assert seen["through the loopback port"] == [200, "digits"]


def test_the_service_cannot_write_the_store(seen: dict[str, Any]) -> None:
    assert seen["write to the store"] == {"Result": "exit-code"}


def test_a_trial_runs_in_a_service_of_its_own(seen: dict[str, Any]) -> None:
    evidence = json.loads(seen["a trial"]["said"])
    assert evidence["p95_ms"] > 0
    assert seen["a trial"]["services"] == 1


def test_a_request_sent_right_after_kill_9_is_answered(seen: dict[str, Any]) -> None:
    assert seen["asked right after kill -9"][0] == 200
    assert seen["restarted with another pid"] is True


def test_a_frozen_service_is_restarted_by_the_watchdog(seen: dict[str, Any]) -> None:
    assert seen["after the watchdog"][0] == 200


def test_a_restart_fails_no_request(seen: dict[str, Any]) -> None:
    assert seen["answers across systemctl restart"] == [200]
    assert seen["stopped"] == {"Result": "success", "ExecMainStatus": "0"}


def test_sync_can_tell_a_restart_from_a_crash(seen: dict[str, Any]) -> None:
    assert seen["lives before the restart"] == [False, False, False], "kill -9, the watchdog, and the one that serves"
    assert seen["lives after the restart"] == [False, False, True, False]


def test_every_unit_is_shipped_with_what_it_names() -> None:
    units = {path.name for path in (CHECKOUT / "systemd").glob("*.*")}
    for unit in Path(CHECKOUT / "systemd").glob("*.service"):
        for named in re.findall(r"edge-[a-z@-]+\.(?:service|socket)", unit.read_text()):
            assert named in units, f"{unit.name} names {named}"
