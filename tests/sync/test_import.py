"""Bundles: verified like everything else, applied by the same updater, with `sync` running or not, however often and whatever is in them."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from agent.contract import bundle
from agent.contract.acceptance import WatchRules
from agent.contract.codec import encode
from agent.sync.fetching.spool import Spool
from tests import warm
from tests.sync.conftest import eventually
from tests.sync.fleet import DEVICE, FLEET, Repository, sha
from tests.sync.test_process import ROOT, Device, device

__all__ = ["device"]
pytestmark = [pytest.mark.usefixtures("script_runtime"), pytest.mark.timeout(90)]


def contents(
    repository: Repository, *, releases: tuple[str, ...] = ("crane:1",), blobs: list[bytes] | None = None
) -> dict[str, bytes]:
    """What `edge-fleet bundle` packs of this repository."""
    chosen = list(repository.blobs.values()) if blobs is None else blobs
    about = bundle.Bundle(
        fleet=FLEET, created=0.0, valid_until=1e12, devices=(DEVICE,), releases=releases, blobs=len(chosen),
        size_bytes=sum(map(len, chosen)),
    )  # fmt: skip
    documents = {name: data for name, data in repository.files.items() if name != "record"}
    return {
        "bundle.json": encode(about), **documents, f"records/{DEVICE}.json": repository.files["record"],
        **{f"blobs/{sha(data)}": data for data in chosen},
    }  # fmt: skip


def write(path: Path, members: dict[str, bytes]) -> Path:
    parts = [bundle.header(name, len(data), 0) + data + bundle.padding(len(data)) for name, data in members.items()]
    path.write_bytes(b"".join(parts) + bundle.END)
    return path


def run(device: Device, path: Path, *options: str, timeout_s: float = 80) -> subprocess.CompletedProcess[str]:
    return warm.run(
        "agent.cli", ["import", str(path), "--config", str(device.config), *options], env=os.environ, timeout=timeout_s
    )


@pytest.fixture
def alone(device: Device) -> Device:
    """No network leads to the fleet."""
    device.server.faults[""] = lambda handler: handler.hang_up() or True
    return device


def packed(device: Device, version: int = 1, **options) -> Path:
    device.publish(version, **options)
    device.repository.assign("crane", version)
    return write(device.folder / f"{version}.bundle", contents(device.repository, releases=(f"crane:{version}",)))


def test_with_sync_running(alone: Device):
    path = packed(alone)
    alone.start()
    eventually((alone.store.private / "lock").exists, "sync")

    done = run(alone, path, "--json")

    assert done.returncode == 0, done.stderr
    assert "crane:1" in json.loads(done.stdout)["message"]
    assert alone.active == 1
    eventually(lambda: alone.serves_at_rest(1), "the end of the watch")
    eventually(lambda: list((alone.store.private / "imports").glob("*/blobs")) == [], "the bundle's files are gone")
    assert run(alone, path).returncode == 0  # again, and the next one
    assert run(alone, packed(alone, 2)).returncode == 0
    eventually(lambda: alone.serves_at_rest(2), "release 2")
    alone.check_store()


def test_without_sync(alone: Device):
    path = packed(alone)

    done = run(alone, path)

    assert done.returncode == 0, done.stderr
    assert alone.serves_at_rest(1)
    assert "crane:1 serves" in done.stdout
    assert alone.server.asked == []
    alone.check_store()


def test_the_same_bundle_again_changes_nothing(alone: Device):
    path = packed(alone)
    assert run(alone, path).returncode == 0
    before = sorted(one.name for one in alone.store.blobs.iterdir())

    again = run(alone, path)

    assert again.returncode == 0, again.stderr
    assert alone.serves_at_rest(1)
    assert sorted(one.name for one in alone.store.blobs.iterdir()) == before


def test_one_bundle_after_the_other(alone: Device):
    assert run(alone, packed(alone, 1)).returncode == 0
    assert run(alone, packed(alone, 2)).returncode == 0
    assert alone.serves_at_rest(2)


def test_a_release_that_does_not_pass_is_refused_here(alone: Device):
    path = packed(alone, 1, script="scale 2", expect=3.0)

    done = run(alone, path, "--json")

    assert done.returncode == 5
    assert "golden_mismatch" in json.loads(done.stdout)["message"]
    assert alone.active is None


# -- refused ------------------------------------------------------------------------------------------------------------------------


def older_assignment(device: Device) -> Path:
    """The device has seen more since this bundle was made."""
    old = packed(device, 1)
    newer = packed(device, 2)
    assert run(device, newer).returncode == 0
    return old


def other_fleet(device: Device) -> Path:
    members = contents(device.repository)
    members["bundle.json"] = members["bundle.json"].replace(FLEET.encode(), b"elsewhere")
    return write(device.folder / "x.bundle", members)


def other_fleet_that_lies(device: Device) -> Path:
    """Its label says ours; its signatures do not."""
    return write(device.folder / "x.bundle", contents(Repository()))


def other_device(device: Device) -> Path:
    members = contents(device.repository)
    members["records/crane-8.json"] = members.pop(f"records/{DEVICE}.json")
    return write(device.folder / "x.bundle", members)


def record_of_another_device(device: Device) -> Path:
    members = contents(device.repository)
    members[f"records/{DEVICE}.json"] = device.repository.record(device="crane-8")
    return write(device.folder / "x.bundle", members)


def expired(device: Device) -> Path:
    device.repository.expires["timestamp"] = 1.7e9
    device.repository.sign()
    return write(device.folder / "x.bundle", contents(device.repository))


def nonsense_on_the_label(device: Device) -> Path:
    """Nobody signs the label: it must not be able to end the thread that reads it."""
    members = contents(device.repository, releases=("../x:1",))
    return write(device.folder / "x.bundle", members)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (nonsense_on_the_label, "unreadable"),
        (older_assignment, "metadata_rollback"),
        (other_fleet, "wrong_fleet"),
        (other_fleet_that_lies, "bad_signature"),
        (other_device, "wrong_fleet"),
        (record_of_another_device, "wrong_fleet"),
        (expired, "expired_metadata"),
    ],
)
def test_what_signatures_refuse(made, reason, alone: Device):
    path = made(alone)

    done = run(alone, path, "--json")

    assert done.returncode == 3, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert reason in (said["reason"], said["message"].split(":")[0])
    assert Spool(alone.store).ids() in ([], [one for one in Spool(alone.store).ids() if Spool(alone.store).accepted(one)])


def test_a_refused_bundle_says_so_while_sync_runs(alone: Device):
    path = other_fleet_that_lies(alone)
    alone.start()
    eventually((alone.store.private / "lock").exists, "sync")

    done = run(alone, path)

    assert done.returncode == 3
    assert "bad_signature" in done.stderr


# -- files that are no bundles ------------------------------------------------------------------------------------------------------


def tar_with(name: str = "x", *, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        head = tarfile.TarInfo("bundle.json")
        data = encode(bundle.Bundle(fleet=FLEET, created=0, valid_until=0, devices=(), releases=(), blobs=0, size_bytes=0))
        head.size = len(data)
        tar.addfile(head, io.BytesIO(data))
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, size
        tar.addfile(info, io.BytesIO(bytes(size)) if kind == tarfile.REGTYPE else None)
    return held.getvalue()


def huge(name: str, size: int) -> bytes:
    data = tar_with(name)
    block = bundle.header(name, 0, 0)
    forged = bytearray(block)
    forged[124:136] = b"\x80" + size.to_bytes(11, "big")
    forged[148:156] = b" " * 8
    forged[148:156] = b"%06o\0 " % sum(forged)
    return data.replace(tar_header_of(data, name), bytes(forged))


def tar_header_of(data: bytes, name: str) -> bytes:
    at = data.index(name.encode().ljust(100, b"\0"))
    return data[at : at + 512]


HOSTILE = {
    "empty": b"",
    "rubbish": random.Random(3).randbytes(100_000),
    "zeros": bytes(10_000),
    "traversal": tar_with("../../../etc/cron.d/x"),
    "traversal inside": tar_with("blobs/../../x"),
    "absolute": tar_with("/etc/passwd"),
    "dots": tar_with("metadata/..json"),
    "symlink": tar_with(f"blobs/{'0' * 64}", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "hard link": tar_with(f"blobs/{'0' * 64}", kind=tarfile.LNKTYPE, link="bundle.json"),
    "device": tar_with(f"blobs/{'0' * 64}", kind=tarfile.CHRTYPE),
    "pipe": tar_with(f"blobs/{'0' * 64}", kind=tarfile.FIFOTYPE),
    "folder": tar_with("blobs", kind=tarfile.DIRTYPE),
    "sparse bomb": huge(f"blobs/{'0' * 64}", 1 << 40),
    "huge document": huge("metadata/1.root.json", 1 << 33),
    "twice": tar_with("bundle.json", size=10),
    "wrong hash": tar_with(f"blobs/{'0' * 64}", size=10),
    "gzip": __import__("gzip").compress(tar_with()),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_leaves_nothing(data, alone: Device, tmp_path_factory):
    path = alone.folder / "x.bundle"
    path.write_bytes(data)
    before = set(alone.folder.rglob("*"))

    from click.testing import CliRunner

    from agent.sync.cli.importing import import_

    done = CliRunner().invoke(import_, [str(path), "--config", str(alone.config), "--json"])

    assert done.exit_code in {3, 4}, done.output
    assert json.loads(done.output)["message"]
    left = set(alone.folder.rglob("*")) - before
    assert all(alone.store.private in one.parents for one in left)
    assert not any(one.is_symlink() for one in left)
    assert sum(one.stat().st_size for one in left if one.is_file()) < 5000


def test_cut_off_anywhere_it_is_not_whole(alone: Device):
    whole = packed(alone).read_bytes()
    path = alone.folder / "cut.bundle"

    from click.testing import CliRunner

    from agent.sync.cli.importing import import_

    for cut in sorted(
        {*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 512, len(whole) - 1024, len(whole) - 1025}
    ):
        path.write_bytes(whole[:cut])
        done = CliRunner().invoke(import_, [str(path), "--config", str(alone.config), "--no-wait"])
        if cut < len(whole) - 1024 + 512:
            assert done.exit_code == 4, (cut, done.output)
        break_ = Spool(alone.store).ids()
        assert break_ == [] or cut >= len(whole) - 1024 + 512
        if break_:
            break


def test_a_damaged_blob_is_found_before_anything_is_believed(alone: Device):
    members = contents(alone.repository)
    packed(alone)
    members = contents(alone.repository)
    name = next(name for name in members if name.startswith("blobs/"))
    members[name] = bytes(len(members[name]))

    done = run(alone, write(alone.folder / "x.bundle", members), "--json")

    assert done.returncode == 4
    assert "damaged" in json.loads(done.stdout)["message"]


# -- killed -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("delay_s", [0.25, 0.4, 0.6, 0.9, 1.3, 2.0])
def test_killed_anywhere_the_next_import_completes_it(delay_s, alone: Device):
    path = packed(alone, 1, padding=3_000_000, watch=WatchRules(duration_s=0.5, max_duration_s=5.0))
    line = [sys.executable, "-m", "agent.cli", "import", str(path), "--config", str(alone.config)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        try:
            first.wait(delay_s)
        except subprocess.TimeoutExpired:
            os.kill(first.pid, signal.SIGKILL)

    done = run(alone, path)

    assert done.returncode == 0, done.stderr
    assert alone.serves_at_rest(1)
    alone.check_store()


def test_sync_completes_what_a_killed_import_left(alone: Device):
    path = packed(alone)
    assert run(alone, path, "--no-wait").returncode in {0, 6}

    alone.start()

    eventually(lambda: alone.serves_at_rest(1), "release 1", 30)
