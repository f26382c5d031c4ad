"""`edge-fleet simulate` as an operator runs it: against servers of its own, and against a running one."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from agent.contract.names import ReleaseRef
from fleet_server.cli import main
from fleet_server.simulation import expected, members, news, rehearsal
from fleet_server.simulation.behaviours import Share
from fleet_server.simulation.crowd import Crowd
from fleet_server.simulation.expected import Plan
from fleet_server.simulation.pace import Realism
from fleet_server.simulation.story import Nobody, Order, Story
from fleet_server.simulation.throwaway import Throwaway
from tests.fleet.stand import environment, wait_until

FAST = ("--speed", "100")


def simulate(tmp_path, *arguments, profile=None):
    """The command's exit status, its report as JSON (None without one), and what it said of its failure. It runs in this process,
    the server in another.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    words = [*(["--profile", str(profile)] if profile else []), "simulate", *FAST, "--json", "-", *map(str, arguments)]
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        done = CliRunner().invoke(main, words)
    finally:
        tempfile.tempdir = before
    assert list(scratch.iterdir()) == [], "nothing stays behind"
    assert servers_in(scratch) == []
    return done.exit_code, json.loads(done.stdout) if done.stdout else None, done.stderr


def servers_in(folder):
    """Processes that work in a folder, or were told of one in it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with_it = any(str(folder) in word for word in process.info["cmdline"] or ())
        if with_it and process.pid != os.getpid():
            found.append(process)
    return found


def test_a_rollout_passes_with_as_many_failures_as_may_be(tmp_path):
    plot = tmp_path / "rollout.svg"
    status, said, _ = simulate(
        tmp_path, "--devices", 24, "--behave", "refusing=1", "--behave", "rolling-back=1", "--behave", "offline=1",
        "--waves", "50%,100%", "--max-failures", 2, "--failure-percent", 40, "--verify", "10%", "--fetch", "10%", "--plot", plot,
    )  # fmt: skip
    assert (status, said["as_expected"], said["ended"]["state"]) == (0, True, "completed")
    assert said["ended"]["counts"] == {"good": 21, "bad": 2, "claims": 0, "held": 0, "lost": 0, "silent": 1}
    assert said["sent"]["verifying"] == 2
    assert said["sent"]["fetched_bytes"] > 0
    assert said["sent"]["reconnected"] == 0
    assert plot.read_text().startswith("<svg")


def test_an_inventory_whose_canaries_fail(tmp_path):
    """The rollout ends in its first wave, as it must, and the others never meet the release."""
    state = {"serving": 3, "sha256": "a" * 64, "phase": "steady"}
    hardware = {"arch": "arm64", "machine": "x"}
    listed = [
        {"id": f"shop-{number}", "groups": ["canary"] if number < 3 else [], "hardware": hardware, "models": {"digits": state}}
        for number in range(12)
    ]
    inventory = tmp_path / "inventory.json"
    inventory.write_text(json.dumps(listed))
    status, said, _ = simulate(tmp_path, "--inventory", inventory, "--waves", "canary,100%", "--behave", "refusing=100%")
    assert (status, said["release"]) == (0, "digits:4")
    assert (said["ended"]["state"], said["ended"]["wave"], said["ended"]["reached"]) == ("aborted", 0, 3)
    assert said["moments"][-1]["bad"] <= 3


USAGE = [
    (["--devices", "3", "--inventory", "pyproject.toml"], 2, "give one of them"),
    (["--on-server"], 2, "--on-server goes with --release"),
    (["--behave", "sleepy=3%"], 1, "is no behaviour"),
    (["--devices", "3", "--behave", "offline=4"], 1, "4 devices are to misbehave"),
    (["--waves", "50%"], 1, "the last one is 100%"),
    (["--waves", "1,100%"], 1, "say 1% for a share"),
    (["--waves", "shops,100%"], 1, "no device is in the group 'shops'"),
    (["--release", "model:1"], 1, "is not new"),
    (["--verify", "0.5"], 2, "is not a share"),
    (["--inventory", "pyproject.toml"], 1, "not what `edge-fleet device list --json` prints"),
    (["--json", "/nowhere/at/all"], 1, "/nowhere/at/all"),
]


@pytest.mark.parametrize(("words", "status", "said"), USAGE, ids=[" ".join(words) for words, _, _ in USAGE])
def test_what_cannot_be_rehearsed_is_said_at_once(words, status, said):
    done = CliRunner().invoke(main, ["simulate", *words])
    assert (done.exit_code, said in done.stderr) == (status, True), done.output


def heeding_ctrl_c():
    """A shell lets what it starts in the background ignore Ctrl-C, and whoever that starts inherits it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_rehearsal_that_is_ended_leaves_nothing(tmp_path, number):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "fleet_server.cli", "simulate", "--devices", "5", "--speed", "1"]
    with subprocess.Popen(
        command, env=environment(TMPDIR=str(scratch)), stderr=subprocess.PIPE, text=True, preexec_fn=heeding_ctrl_c
    ) as process:
        try:
            wait_until(lambda: list(scratch.glob("*/fleet/broker/mosquitto.pid")), "a broker", within=60)
            process.send_signal(number)
            _, said = process.communicate(timeout=50)
        finally:
            process.kill()
    assert (process.returncode, "Traceback" in said) == (1, False), said
    assert list(scratch.iterdir()) == []
    wait_until(lambda: servers_in(scratch) == [], "no server, no broker")


def test_a_poke_that_many_devices_hear_is_read_once():
    reader = news.Reader()
    payload = b'{"kind":"poke","news":"","spread_s":3.0}'
    assert reader.read(payload) is reader.read(bytes(bytearray(payload)))
    assert reader.read(payload).spread_s == 3.0


# -- what takes its time -------------------------------------------------------------------------------------------------------

MATRIX = {
    "good in the end": (
        ["slow=2", "flapping=2", "wrong-clock=2", "offline=2", "silent=2", "cloned=2", "unsigned=2", "wrong-key=2"], 0, "completed",
    ),
    "bad, and as many as may be": (["refusing=2", "rolling-back=2"], 4, "completed"),
    "bad, and one too many": (["refusing=2", "rolling-back=3"], 4, "aborted"),
    "claims that nobody believes": (["wrong-digest=1"], 0, "running"),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", MATRIX)
def test_every_behaviour_gets_its_verdict_and_nobody_else_is_lost(tmp_path, name):
    behave, allowed, state = MATRIX[name]
    words = [word for one in behave for word in ("--behave", one)]
    status, said, _ = simulate(
        tmp_path, "--devices", 30, *words, "--max-failures", allowed, "--failure-percent", 40, "--waves", "100%", "--at-once"
    )
    assert (status, said["ended"]["state"], said["lost"]) == (0, state, []), said
    assert said["ended"]["counts"] == said["expected"]["counts"] or state == "aborted"
    assert said["sent"]["reconnected"] == 0, "of those whose connections are to hold"


@pytest.mark.long
def test_on_a_running_server_only_its_own_devices_are_reached_and_they_are_gone_after(tmp_path, server):
    server.publish_simple("shared", 1)
    real = server.enrol("real-1")
    status, said, stderr = simulate(
        tmp_path, "--on-server", "--devices", 4, "--release", "shared:1", "--yes", profile=server.profile
    )
    assert (status, said and said["ended"]["state"]) == (0, "waiting"), stderr
    assert [one["id"] for one in server.get("/devices")["devices"]] == [real.id]
    assert [one["state"] for one in server.get("/rollouts")] == ["aborted"]
    assert not any(token["usable"] and token["uses_left"] for token in server.get("/enrolment-tokens") if not token["device"])
    unknown = simulate(tmp_path, "--on-server", "--devices", 2, "--release", "shared:9", "--yes", profile=server.profile)
    assert unknown[0] == 3
    assert [one["id"] for one in server.get("/devices")["devices"]] == [real.id]


def order(count, *shares: Share, **fields):
    found = members.made_up(count, "m", 1, shares, 1)
    base = {
        "members": found, "release": ReleaseRef("m", 2), "plan": Plan(expected.stages("100%")), "seed": 1, "realism": Realism(speed=100.0),
        "silence_s": 3.0, "timeout_s": 60.0,
    }  # fmt: skip
    return Order(**{**base, **fields})


@pytest.mark.long
def test_one_of_many_is_revoked_and_only_that_one_is_out_and_who_hangs_hears_nothing(tmp_path):
    wanted = order(150)
    server = Throwaway(tmp_path, silence_s=30.0)
    prepared = server.prepare(wanted.members, [ReleaseRef("m", 1)], {"m": 1})

    async def revoke(client):
        crowd = Crowd(
            server.address(), wanted.members, prepared.papers, tmp_path, realism=wanted.realism, seed=1, bad=(),
            manifests=prepared.manifests,
        )  # fmt: skip
        try:
            await Story(client, crowd, wanted, Nobody(), server.ended).connect()
            victim, *others = crowd.devices
            asked = time.monotonic()
            revoking = asyncio.create_task(asyncio.to_thread(client.post, f"/devices/{victim.member.id}/revoke"))
            while victim.link.connected:
                await asyncio.sleep(0.01)
                assert time.monotonic() - asked < 1.0, "it is still in"
            await revoking
            await asyncio.sleep(2.0)
            assert not victim.link.connected
            assert [one.link.connections for one in others] == [1] * len(others)
            muted, listening = others[:2]
            muted.link.mute()
            for one in (muted, listening):  # each is poked alone, with its new record
                await asyncio.to_thread(client.put, f"/devices/{one.member.id}/groups", {"groups": ["moved"]})
            until = time.monotonic() + 10.0
            while listening.device.groups != ("moved",):
                await asyncio.sleep(0.05)
                assert time.monotonic() < until, "who listens hears it"
            assert muted.device.groups != ("moved",)
        finally:
            await crowd.close()

    try:
        server.start()
        with server.client() as client:
            asyncio.run(revoke(client))
    finally:
        server.stop()


@pytest.mark.long
def test_a_server_that_ends_in_the_middle_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    class Kills(Nobody):
        def show(self, what, _done, _total, /):
            if "commit" in what:
                for pid in tmp_path.glob("*/fleet/server.lock"):
                    os.kill(int(pid.read_text()), signal.SIGKILL)

    from fleet_server.errors import Unavailable

    with pytest.raises(Unavailable):
        rehearsal.rehearse(order(5, realism=Realism(speed=1.0)), Kills())
    assert list(Path(tmp_path).iterdir()) == []
