"""A blob gets its name in the store only with the right bytes, however often the download was cut off and whatever the server sends."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from pathlib import Path

import pytest

from agent.contract.manifest import File
from agent.contract.reasons import Reason
from agent.store import Store
from agent.sync.fetching import downloader as downloading
from agent.sync.fetching import staged as staging
from agent.sync.fetching.https import HttpBlobs
from agent.sync.fetching.sources import TRIES_ON_WRONG_BYTES
from agent.sync.http import FleetHttp
from agent.sync.problems import Problem, Stopped
from tests.sync.blobs import MemoryBlobs, downloader, fetch
from tests.sync.conftest import FakeClock
from tests.sync.fleet import Repository, Server, sha

DATA = random.Random(7).randbytes(700_000)
FILE = File(sha256=sha(DATA), size_bytes=len(DATA))


def problem(action) -> Problem:
    with pytest.raises(Problem) as caught:
        action()
    return caught.value


def test_a_blob_arrives(store: Store):
    seen = fetch(downloader(store, MemoryBlobs(DATA)), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert seen == sorted(seen)
    assert seen[-1] == len(DATA)
    assert list(store.staging.iterdir()) == []


def test_the_processor_is_given_away_again_and_again(store: Store, monkeypatch):
    """After each chunk, and while the whole file is hashed a second time: others wait for it."""
    rested = {downloading: 0, staging: 0}
    for module in rested:

        def rest(module=module):
            rested[module] += 1

        monkeypatch.setattr(module, "rest", rest)
    source = MemoryBlobs(DATA)

    fetch(downloader(store, source), FILE)

    assert rested[downloading] >= len(DATA) // source.chunk - 1  # not after the last
    assert rested[staging] >= len(DATA) // staging.READ_BYTES


def test_a_blob_that_is_there_is_not_asked_for(store: Store):
    source = MemoryBlobs(DATA)
    fetch(downloader(store, source), FILE)
    fetch(downloader(store, source), FILE)

    assert source.offsets == [0]


@pytest.mark.parametrize("cut", [0, 1, 49_999, 50_000, 350_001, len(DATA) - 1, len(DATA)])
def test_a_cut_download_goes_on_where_it_stopped(cut, store: Store):
    (store.staging / FILE.sha256).write_bytes(DATA[:cut])
    source = MemoryBlobs(DATA)

    fetch(downloader(store, source), FILE)

    assert source.offsets == ([cut] if cut < len(DATA) else [])
    assert store.blob(FILE.sha256).read_bytes() == DATA


@pytest.mark.parametrize("staged", [b"\0" * 1000, DATA[:1000] + b"x", DATA + b"more", b"\0" * (len(DATA) + 9)])
def test_wrong_bytes_on_the_disk_do_not_stay(staged, store: Store):
    (store.staging / FILE.sha256).write_bytes(staged)

    fetch(downloader(store, MemoryBlobs(DATA)), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA


def test_a_server_that_cannot_resume_begins_again(store: Store):
    (store.staging / FILE.sha256).write_bytes(DATA[:1234])

    fetch(downloader(store, MemoryBlobs(DATA, resumes=False)), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA


def test_a_truncated_blob_is_kept_for_the_next_try(store: Store):
    failed = problem(lambda: fetch(downloader(store, MemoryBlobs(DATA[:-10])), FILE))

    assert failed.reason is Reason.DOWNLOAD_FAILED
    assert failed.retryable
    assert not store.has_blob(FILE.sha256)
    source = MemoryBlobs(DATA)
    fetch(downloader(store, source), FILE)
    assert source.offsets == [len(DATA) - 10]


@pytest.mark.parametrize("sent", [DATA + b"x", DATA * 2], ids=["one byte more", "twice"])
def test_a_source_that_goes_on_is_not_listened_to(sent, store: Store):
    source = MemoryBlobs(sent, resumes=False)

    fetch(downloader(store, source), FILE)

    assert source.sent <= len(DATA) + source.chunk
    assert store.blob(FILE.sha256).read_bytes() == DATA


@pytest.mark.parametrize("sent", [b"x" + DATA[1:], DATA[:-1] + b"x", b"\0" * len(DATA)], ids=["first byte", "last byte", "all"])
def test_wrong_bytes_are_thrown_away(sent, store: Store):
    source = MemoryBlobs(sent)

    failed = problem(lambda: fetch(downloader(store, source), FILE))

    assert failed.reason is Reason.HASH_MISMATCH
    assert not failed.retryable
    assert len(source.offsets) == TRIES_ON_WRONG_BYTES
    assert not store.has_blob(FILE.sha256)
    left = store.staging / FILE.sha256
    assert not left.exists() or left.stat().st_size == 0


def test_bytes_damaged_once_on_the_way_are_fetched_again(store: Store):
    source = MemoryBlobs(b"\0" * len(DATA))

    def repaired() -> None:
        if len(source.offsets) == 2:
            source.data = DATA

    source.on_chunk = repaired
    # The second connection is the first that sees the right data, from its first chunk on.
    fetch(downloader(store, source), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA


def test_an_empty_file_is_a_file(store: Store):
    empty = File(sha256=sha(b""), size_bytes=0)

    fetch(downloader(store, MemoryBlobs(b"")), empty)

    assert store.blob(empty.sha256).read_bytes() == b""


def test_a_download_that_trickles_is_given_up(store: Store):
    clock, source = FakeClock(), MemoryBlobs(DATA, chunk=10)
    source.on_chunk = lambda: clock.pass_(5)

    failed = problem(lambda: fetch(downloader(store, source, clock=clock, rate=1000), FILE))

    assert failed.reason is Reason.SLOW_RETRIEVAL
    assert "bytes/s" in failed.message


def test_a_download_may_not_take_longer_than_its_size_allows(store: Store):
    """Fast enough in each window is not enough when the source stalls between them."""
    clock, source = FakeClock(), MemoryBlobs(DATA, chunk=40_000)
    source.on_chunk = lambda: clock.pass_(20)

    failed = problem(lambda: fetch(downloader(store, source, clock=clock, rate=10_000), FILE))

    assert failed.reason is Reason.SLOW_RETRIEVAL


def test_a_download_stops_when_told(store: Store):
    downloads = downloader(store, MemoryBlobs(DATA))

    with pytest.raises(Stopped):
        downloads.fetch(FILE, lambda _: None, lambda: True)

    assert not store.has_blob(FILE.sha256)


def test_what_does_not_fit_is_refused_with_numbers(store: Store):
    huge = File(sha256="0" * 64, size_bytes=1 << 60)

    failed = problem(lambda: downloader(store, MemoryBlobs(DATA), reserve=1 << 20).require_space([huge]))

    assert failed.reason is Reason.NO_SPACE
    assert failed.retryable
    assert str(1 << 60) in failed.message
    assert failed.evidence["needed_bytes"] == 1 << 60


def test_what_is_here_already_needs_no_space(store: Store):
    downloads = downloader(store, MemoryBlobs(DATA), reserve=1 << 62)
    fetch(downloads, FILE)

    downloads.require_space([FILE])


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_in_the_middle_of_a_download(small_disk: Path):
    """The preflight was told that there is room; then something else takes it."""
    store = Store.create(small_disk / "store")

    failed = problem(lambda: fetch(downloader(store, MemoryBlobs(DATA)), FILE))

    assert failed.reason is Reason.NO_SPACE
    assert failed.retryable
    assert not store.has_blob(FILE.sha256)
    assert store.selections() == {}


def test_a_full_disk_where_none_can_be_mounted(store: Store, monkeypatch: pytest.MonkeyPatch):
    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("agent.sync.fetching.staged.os.fsync", full)

    assert problem(lambda: fetch(downloader(store, MemoryBlobs(DATA)), FILE)).reason is Reason.NO_SPACE
    assert not store.has_blob(FILE.sha256)


# -- over real HTTPS ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def blobs(identity, clock) -> HttpBlobs:
    def connect() -> FleetHttp:
        return FleetHttp(
            identity.address.device_url,
            clock,
            ca=identity.ca_file,
            certificate=identity.certificate_file,
            key=identity.key_file,
        )

    return HttpBlobs(connect)


def test_a_blob_over_https_is_resumed_after_the_server_hung_up(store: Store, blobs, repository: Repository, server: Server):
    repository.blobs[FILE.sha256] = DATA
    asked = []

    def cut(handler) -> bool:
        asked.append(handler.headers.get("Range"))
        if len(asked) > 1:
            return False
        handler.answer(200, DATA[:300_000], length=len(DATA))
        handler.hang_up()
        return True

    server.faults["blobs/"] = cut
    downloads = downloader(store, blobs)

    assert problem(lambda: fetch(downloads, FILE)).reason is Reason.DOWNLOAD_FAILED
    staged = (store.staging / FILE.sha256).stat().st_size
    assert 0 < staged <= 300_000
    fetch(downloads, FILE)

    assert asked == [f"bytes=0-{len(DATA) - 1}", f"bytes={staged}-{len(DATA) - 1}"]
    assert store.blob(FILE.sha256).read_bytes() == DATA


def test_a_blob_the_server_does_not_have_is_a_failed_download(store: Store, blobs):
    failed = problem(lambda: fetch(downloader(store, blobs), FILE))

    assert failed.reason is Reason.DOWNLOAD_FAILED
    assert "there is no such thing" in failed.message


def test_a_server_whose_blob_became_shorter(store: Store, blobs, repository: Repository):
    """It answers 416: what is staged cannot be the beginning of what it has."""
    repository.blobs[FILE.sha256] = DATA[:1000]
    (store.staging / FILE.sha256).write_bytes(DATA[:2000])

    assert problem(lambda: fetch(downloader(store, blobs), FILE)).reason is Reason.DOWNLOAD_FAILED
    assert (store.staging / FILE.sha256).stat().st_size == 0


def test_a_range_that_was_not_asked_for_is_refused(store: Store, blobs, repository: Repository, server: Server):
    (store.staging / FILE.sha256).write_bytes(DATA[:2000])

    def other_range(handler) -> bool:
        handler.answer(206, DATA[100:], {"Content-Range": f"bytes 100-{len(DATA) - 1}/{len(DATA)}"})
        return True

    server.faults["blobs/"] = other_range

    assert "another range" in problem(lambda: fetch(downloader(store, blobs), FILE)).message
