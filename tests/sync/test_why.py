"""`edge-agent why`: the chain from the fleet's word to the bytes that serve, on a device with the real process and real signatures."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli import cli
from agent.contract.assignment import Rollout
from agent.contract.reports import Phase
from agent.sync.trust.metadata import stored
from agent.sync.updating.journal import ENTRIES_KEPT, Entry, Journal
from tests.sync.bench import MODEL, Bench
from tests.sync.conftest import eventually
from tests.sync.test_process import Device

pytestmark = [pytest.mark.usefixtures("script_runtime"), pytest.mark.timeout(90)]


@pytest.fixture
def device(tmp_path: Path, identity, repository, server):
    device = Device(tmp_path, identity, repository, server)
    yield device
    device.close()


def why(device: Device, *options: str):
    return CliRunner().invoke(cli, ["why", MODEL, *options, "--config", str(device.config)], catch_exceptions=False)


def test_the_whole_chain(device: Device):
    device.install(1, expect=1.0)
    device.publish(2, "scale 3", expect=2.0)
    device.repository.assign(MODEL, 1, rollout=Rollout(id="r2-abcd", release=2, previous=1, permille=1000))
    eventually(lambda: device.phase() == "quarantined", "the refusal", 30)

    found = json.loads(why(device, "--json").output)
    assert found["serving"]["release"] == 1
    assert found["serving"]["equal"] is True
    assert (found["wanted"]["release"], found["wanted"]["because"]) == (2, "rollout r2-abcd reaches every device")
    keys = device.repository.keys
    signed = {role["role"]: role for role in found["assignment"]["signed_by"]}
    assert signed["assignments"]["keyids"] == [keys["assignments"].public_key.keyid]
    assert signed["root"]["offline"]
    assert not signed["timestamp"]["offline"]
    publisher = found["release"]["publisher"]
    assert (publisher["role"], publisher["lists_this_manifest"]) == ("releases", True)
    assert publisher["keyids"] == [keys["releases"].public_key.keyid]
    assert [(gate["gate"], gate["verdict"]) for gate in found["gates"]] == [
        ("assignment", "wanted"), ("fetch", "passed"), ("trial", "passed"), ("activation", "passed"), ("watch", "committed"),
    ]  # fmt: skip
    assert [name for name in found["gates"][1]["evidence"] if name.startswith("from ")] == ["from the fleet server_bytes"]
    assert found["gates"][2]["evidence"]
    assert found["quarantine"][0]["answer"]["reason"] == "golden_mismatch"

    page = why(device).output
    for words in (
        "crane:1 serves",
        "as signed (serve says so itself)",
        "publisher 'releases' may sign",
        "gates it passed",
        "refused here",
    ):
        assert words in page, page


def test_metadata_that_is_gone_is_told_of_as_unknown(device: Device):
    device.install(1)
    device.kill()
    (device.store.private / "trust/metadata/root.json").unlink()

    found = json.loads(why(device, "--json").output)

    assert found["serving"]["equal"] is True
    assert [role["role"] for role in found["assignment"]["signed_by"]] == ["assignments"]


@pytest.mark.alone  # for a tenth of a second
def test_a_root_that_is_just_replaced_is_waited_for(device: Device):
    device.install(1)
    root = device.store.private / "trust/metadata/root.json"
    known = root.readlink()
    root.unlink()

    def back() -> None:
        with contextlib.suppress(FileExistsError):  # the device itself was first
            root.symlink_to(known)

    there = threading.Timer(0.02, back)
    there.start()

    assert stored(root.parent, "root").signed.type == "root"
    there.join()


def test_bytes_that_are_not_what_was_signed_are_told(device: Device):
    device.install(1)
    device.serve.models[MODEL]["versions"]["1"]["sha256"] = "0" * 64

    assert "NOT what the manifest says" in why(device).output


def test_without_serve(device: Device):
    device.install(1)
    device.serve.stop()

    page = why(device)
    assert page.exit_code == 0
    assert "does not serve" in page.output


def test_a_roll_back_is_told_with_its_numbers(tmp_path: Path):
    from tests.sync.bench import numbers

    bench = Bench(tmp_path)
    bench.install(1)
    bench.release(2)
    bench.serve.numbers[1] = numbers(1000)
    bench.want(2)
    bench.step()
    bench.until(Phase.WATCHING)
    bench.serve.numbers[2] = numbers(50, run=50)
    bench.until(Phase.QUARANTINED)

    gone = [entry for entry in bench.records.journal.entries(MODEL) if entry.verdict == "rolled back"]
    assert [entry.reason for entry in gone] == ["error_ratio"]
    assert gone[0].evidence["failed"] == 50
    assert gone[0].evidence["baseline_requests"] == 1000


def test_the_journal_is_bounded_and_counts_what_repeats(tmp_path: Path):
    journal = Journal(tmp_path / "journal")
    for at in range(3 * ENTRIES_KEPT):
        journal.add(
            "m", Entry(at=float(at), release=at // 2, gate="fetch", verdict="put off", message="x" * 5000, reason="no_space")
        )

    entries = journal.entries("m")
    assert len(entries) == ENTRIES_KEPT
    assert entries[-1].times == 2
    assert entries[-1].at == 3 * ENTRIES_KEPT - 1
    (tmp_path / "journal/m.json").write_bytes(b"torn")
    assert journal.entries("m") == ()
