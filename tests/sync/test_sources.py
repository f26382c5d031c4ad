"""Folders, bundles on a stick, neighbours and mirrors: what they have is used, what they do cannot hurt."""

from __future__ import annotations

import os
import random
import socket
import threading
from pathlib import Path

import pytest
import requests

from agent.config import SyncSettings
from agent.contract import bundle
from agent.contract.codec import encode
from agent.contract.reasons import Reason
from agent.host.clock import SystemClock
from agent.store import Store
from agent.sync.fetching import factory, folders, sharing
from agent.sync.fetching.budget import Budget, hours
from agent.sync.fetching.folders import FolderBlobs
from agent.sync.fetching.sharing import Sharing
from agent.sync.http import FleetHttp
from agent.sync.problems import Problem, Stopped
from tests.sync.blobs import MemoryBlobs, blocked, downloader, fetch
from tests.sync.conftest import FakeClock, eventually
from tests.sync.fleet import Authority, Repository, Server, enrolled, sha

DATA = random.Random(21).randbytes(400_000)
FILE = blocked(DATA, 30_000)
ABOUT = bundle.Bundle(fleet="harbour", created=0.0, valid_until=0.0, devices=(), releases=(), blobs=1, size_bytes=len(DATA))


def make_bundle(path: Path, *blobs: bytes, head: bytes | None = None) -> Path:
    members = {"bundle.json": encode(ABOUT) if head is None else head, **{f"blobs/{sha(data)}": data for data in blobs}}
    path.write_bytes(
        b"".join(bundle.header(name, len(data), 0) + data + bundle.padding(len(data)) for name, data in members.items())
        + bundle.END
    )
    return path


class Away(MemoryBlobs):
    """The fleet server, out of reach."""

    def read(self, sha256, start, end):
        raise Problem(Reason.DOWNLOAD_FAILED, "no route to host")


# -- folders ------------------------------------------------------------------------------------------------------------------------


def test_a_bundle_on_a_stick_is_used_and_the_fleet_server_is_not_asked(store: Store, tmp_path: Path):
    stick = tmp_path / "stick"
    stick.mkdir()
    make_bundle(stick / "fleet.bundle", b"something else", DATA)
    server = MemoryBlobs(DATA, place=30)

    fetch(downloader(store, FolderBlobs(stick), server), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert server.asked == []


def test_blobs_as_files(store: Store, tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / FILE.sha256).write_bytes(DATA)

    fetch(downloader(store, FolderBlobs(tmp_path), Away(b"", place=30)), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA


def test_half_a_file_on_a_stick_saves_half_of_the_download(store: Store, tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / FILE.sha256).write_bytes(DATA[:200_000])
    server = MemoryBlobs(DATA, place=30)

    fetch(downloader(store, FolderBlobs(tmp_path), server), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert server.sent <= 200_000 + 30_000


def not_there(folder: Path) -> Path:
    return folder / "not-mounted"


def other_bytes(folder: Path) -> Path:
    (folder / "blobs").mkdir()
    (folder / "blobs" / FILE.sha256).write_bytes(bytes(len(DATA)))
    return folder


def link_to_nowhere(folder: Path) -> Path:
    (folder / "blobs").mkdir()
    (folder / "blobs" / FILE.sha256).symlink_to("/dev/zero")
    return folder


def pipe(folder: Path) -> Path:
    (folder / "blobs").mkdir()
    os.mkfifo(folder / "blobs" / FILE.sha256)
    os.mkfifo(folder / "x.bundle")
    return folder


def rubbish(folder: Path) -> Path:
    (folder / "a.bundle").write_bytes(random.Random(1).randbytes(5000))
    (folder / "b.tar").write_bytes(b"")
    (folder / "c.bundle").mkdir()
    make_bundle(folder / "d.bundle", DATA)
    (folder / "d.bundle").write_bytes((folder / "d.bundle").read_bytes()[:-200_000])
    return folder


def a_file(folder: Path) -> Path:
    (folder / "file").write_bytes(b"x")
    return folder / "file"


@pytest.mark.parametrize("made", [not_there, other_bytes, link_to_nowhere, pipe, rubbish, a_file])
def test_a_folder_may_be_full_of_anything(made, store: Store, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    server = MemoryBlobs(DATA, place=30)

    fetch(downloader(store, FolderBlobs(made(folder)), server), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA


def test_a_bundle_with_very_many_names_takes_no_more_memory_than_others(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folders, "MAX_BLOBS", 2)
    make_bundle(tmp_path / "a.bundle", b"1", b"2", b"3", b"4")
    folder = FolderBlobs(tmp_path)

    fetch(downloader(store, folder, MemoryBlobs(DATA, place=30)), FILE)

    assert folder.known == 2


# -- neighbours ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def neighbour(tmp_path: Path):
    """A store with a blob, lent to whoever asks."""
    lent = Store.create(tmp_path / "neighbour")
    lent.blob(FILE.sha256).write_bytes(DATA)
    (lent.staging / sha(b"half")).write_bytes(b"ha")
    one = Sharing(lent, SystemClock(), "127.0.0.1:0", 0)
    one.start()
    yield one
    one.stop()


def test_a_neighbour_is_asked_before_the_fleet_server(store: Store, neighbour: Sharing):
    settings = SyncSettings(neighbours=("127.0.0.1:1", f"127.0.0.1:{neighbour.port}"))
    server = MemoryBlobs(DATA, place=30)
    asked = factory.sources(settings, lambda: FleetHttp("https://127.0.0.1:1", SystemClock()), SystemClock(), Path("x"), bool)

    fetch(downloader(store, *asked[:-1], server), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert server.asked == []


def test_a_neighbour_lends_blobs_and_nothing_else(neighbour: Sharing):
    base = f"http://127.0.0.1:{neighbour.port}"
    store = neighbour.store

    assert requests.get(f"{base}/blobs/{FILE.sha256}", timeout=5).content == DATA
    part = requests.get(f"{base}/blobs/{FILE.sha256}", headers={"Range": "bytes=10-19"}, timeout=5)
    assert (part.status_code, part.content) == (206, DATA[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{len(DATA)}"
    too_far = requests.get(f"{base}/blobs/{FILE.sha256}", headers={"Range": f"bytes={len(DATA)}-"}, timeout=5)
    assert too_far.status_code == 416
    for path in (
        "",
        "blobs/",
        f"blobs/{sha(b'half')}",
        f"staging/{sha(b'half')}",
        "blobs/../format.json",
        "blobs/%2e%2e/format.json",
    ):
        with socket.create_connection(("127.0.0.1", neighbour.port), timeout=5) as raw:
            raw.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert raw.recv(100).startswith(b"HTTP/1.1 404"), path
    for method in ("POST", "PUT", "DELETE"):
        assert requests.request(method, f"{base}/blobs/{FILE.sha256}", timeout=5).status_code == 501
    assert store.blob(FILE.sha256).read_bytes() == DATA


def test_neighbours_cannot_take_all_connections_or_keep_the_process(neighbour: Sharing):
    held = [socket.create_connection(("127.0.0.1", neighbour.port), timeout=5) for _ in range(sharing.CONNECTIONS + 3)]
    try:
        gone = []
        for one in held:
            one.settimeout(0.2)
            try:
                gone.append(one.recv(1) == b"")
            except TimeoutError:
                gone.append(False)
        assert sum(gone) == 3
    finally:
        for one in held:
            one.close()


# -- mirrors ------------------------------------------------------------------------------------------------------------------------


def test_a_mirror_is_used_and_sees_no_certificate(
    store: Store, authority: Authority, repository: Repository, server: Server, identity, tmp_path: Path
):
    repository.blobs[FILE.sha256] = DATA
    mirror = Server(authority, repository, tmp_path / "mirror")
    mirror.anonymous()
    clock = SystemClock()
    seen = []
    mirror.faults["blobs/"] = lambda handler: bool(seen.append(handler.connection.getpeercert()))
    try:
        settings = SyncSettings(mirrors=(mirror.url,))
        who = enrolled(tmp_path / "who", authority, repository.first_root, url=server.url)

        def fleet() -> FleetHttp:
            return FleetHttp(server.url, clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file)

        fetch(downloader(store, *factory.sources(settings, fleet, clock, who.ca_file, bool)), FILE)

        assert store.blob(FILE.sha256).read_bytes() == DATA
        assert seen == [None]
        assert server.asked == []
    finally:
        mirror.close()


def test_a_mirror_that_nobody_vouches_for_is_passed_over(
    store: Store, authority: Authority, repository: Repository, server: Server, tmp_path: Path
):
    repository.blobs[FILE.sha256] = DATA
    stranger = Server(Authority("a stranger"), repository, tmp_path / "mirror")
    stranger.anonymous()
    clock = SystemClock()
    try:
        who = enrolled(tmp_path / "who", authority, repository.first_root, url=server.url)

        def fleet() -> FleetHttp:
            return FleetHttp(server.url, clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file)

        fetch(downloader(store, *factory.sources(SyncSettings(mirrors=(stranger.url,)), fleet, clock, who.ca_file, bool)), FILE)

        assert store.blob(FILE.sha256).read_bytes() == DATA
        assert stranger.asked == []
    finally:
        stranger.close()


# -- the budget that all share ------------------------------------------------------------------------------------------------------


class Sleeper(FakeClock):
    """Waiting passes the time."""

    def sleep(self, seconds: float) -> None:
        self.pass_(seconds)


def test_the_limit_holds_and_is_no_slow_source(store: Store):
    clock = Sleeper()
    budget = Budget(clock, limit_bytes_per_s=1000, pause=clock.sleep)
    began = clock.monotonic()

    fetch(downloader(store, MemoryBlobs(DATA, 16_000), clock=clock, rate=50_000, budget=budget), FILE)

    took = clock.monotonic() - began
    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert len(DATA) / 1000 - 20 <= took <= len(DATA) / 1000 + 20


def test_outside_the_hours_downloads_rest_and_go_on_where_they_were(store: Store):
    import datetime as dt

    clock = Sleeper(dt.datetime(2026, 1, 5, 21, 59, 59).timestamp())  # noqa: DTZ001 - local time is meant
    budget = Budget(clock, window=hours("20:00-22:00"), pause=clock.sleep)
    source = MemoryBlobs(DATA, 10_000)
    moments = []

    def on_chunk() -> None:
        clock.pass_(0.1)
        moments.append(dt.datetime.fromtimestamp(clock.wall()).hour)  # noqa: DTZ006

    source.on_chunk = on_chunk

    fetch(downloader(store, source, clock=clock, budget=budget), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert len(source.asked) == 2
    assert source.sent <= len(DATA) + 40_000
    assert {hour for hour in moments if hour not in {20, 21}} <= {22}


def test_the_smaller_number_goes_first():
    clock = FakeClock()
    budget = Budget(clock, limit_bytes_per_s=1000, pause=lambda _: threading.Event().wait(0.001))
    budget.wait_for(2000, 0, lambda: False)  # a debt that all wait for
    order: list[int] = []
    threads = [
        threading.Thread(target=lambda p=priority: (budget.wait_for(1000, p, lambda: False), order.append(p)))
        for priority in (5, 9, 1)
    ]
    for number, thread in enumerate(threads, 1):
        thread.start()
        eventually(lambda n=number: budget.waiting == n)
    for count in range(1, 4):
        clock.pass_(3 if count == 1 else 1)
        eventually(lambda n=count: len(order) == n)
    for thread in threads:
        thread.join()

    assert order == [1, 5, 9]


def test_who_waits_can_be_stopped():
    clock = Sleeper()
    budget = Budget(clock, limit_bytes_per_s=1, pause=clock.sleep)
    budget.wait_for(100, 0, lambda: False)
    asked = []

    with pytest.raises(Stopped):
        budget.wait_for(100, 0, lambda: bool(asked.append(1)) or len(asked) > 3)
    assert budget.waiting == 0


# -- the bundle's file --------------------------------------------------------------------------------------------------------------


def test_any_tar_lists_a_bundle(tmp_path: Path):
    import tarfile

    path = make_bundle(tmp_path / "x.bundle", DATA, b"")

    with tarfile.open(path) as tar:
        assert tar.getnames() == ["bundle.json", f"blobs/{FILE.sha256}", f"blobs/{sha(b'')}"]
        assert tar.extractfile(f"blobs/{FILE.sha256}").read() == DATA


def test_long_names_and_large_sizes():
    name = f"targets/releases/{'m' * 64}/{'a' * 64}.123456.json"

    block = bundle.header(name, 5, 1)
    assert bundle.member_of(block, 0) == bundle.Member(name, 512, 5)
    huge = bundle.header(f"blobs/{'0' * 64}", 9 * 1024**3, 1)
    assert bundle.member_of(huge, 0).size_bytes == 9 * 1024**3
