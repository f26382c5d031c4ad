"""Any mixture of blocks that are here, kills, wrong bytes and sources ends with exactly the right file or an error with a name."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract.codec import encode
from agent.contract.manifest import Block, File, ReleaseManifest, Variant
from agent.contract.reasons import Reason
from agent.host.clock import SystemClock
from agent.store import Store
from agent.sync.fetching import pieces as stretches
from agent.sync.fetching.https import GATHER_BYTES, HttpBlobs
from agent.sync.fetching.pieces import Piece, pieces, runs
from agent.sync.fetching.sources import NotHere, Sources, verdict
from agent.sync.fetching.staged import BLOCKS_SUFFIX
from agent.sync.http import FleetHttp
from agent.sync.problems import Problem, Stopped
from fleet_server.releases.blocks import describe
from tests.sync.blobs import MemoryBlobs, blocked, downloader, fetch
from tests.sync.conftest import FakeClock, eventually
from tests.sync.fleet import Repository, Server, sha

DATA = random.Random(11).randbytes(300_000)
FILE = blocked(DATA, 7_000, 20_000, 1_000, 30_000)


def keep(store: Store, data: bytes, file: File, *, version: int = 1) -> None:
    """A release in the store whose model is `data`."""
    store.blob(file.sha256).write_bytes(data)
    manifest = ReleaseManifest(
        model="crane", version=version, files={"m": file}, variants=(Variant(name="cpu", runtime="script", file="m"),)
    )
    store.write_manifest(encode(manifest))


def problem(action) -> Problem:
    with pytest.raises(Problem) as caught:
        action()
    return caught.value


# -- what is asked for --------------------------------------------------------------------------------------------------------------


def test_everything_is_asked_for_at_once():
    assert [(run.start, run.end) for run in runs(pieces(FILE))] == [(0, len(DATA))]


def test_small_gaps_are_bridged_as_long_as_little_is_wasted():
    def piece(start: int, end: int) -> Piece:
        return Piece(start, end, b"")

    near = [piece(0, 100_000), piece(101_000, 200_000)]
    far = [piece(0, 100_000), piece(120_000, 200_000)]
    huge = [piece(0, 10_000_000), piece(10_000_000 + stretches.MAX_GAP_BYTES + 1, 20_000_000)]

    assert [(run.start, run.end) for run in runs(near)] == [(0, 200_000)]
    assert len(runs(far)) == 2
    assert len(runs(huge)) == 2


@pytest.mark.alone  # each example has a deadline
@given(st.lists(st.tuples(st.integers(0, 90_000), st.integers(1, 90_000)), max_size=40))
def test_runs_cover_what_is_missing_and_little_else(steps):
    missing, at = [], 0
    for gap, size in steps:
        missing.append(Piece(at + gap, at + gap + size, b""))
        at += gap + size

    found = runs(missing)

    assert [piece for run in found for piece in run.pieces] == missing
    asked = sum(run.end - run.start for run in found)
    assert asked <= stretches.size_bytes(missing) * (1 + stretches.MAX_WASTE) + 1
    assert all(before.end <= after.start for before, after in itertools.pairwise(found))


# -- delta --------------------------------------------------------------------------------------------------------------------------


def test_blocks_of_another_release_are_not_fetched(store: Store):
    changed = DATA[:120_000] + bytes(2_000) + DATA[122_000:]
    keep(store, changed, blocked(changed, 7_000, 20_000, 1_000, 30_000))
    source = MemoryBlobs(DATA)

    seen = fetch(downloader(store, source), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert source.sent == 30_000
    assert seen[0] == len(DATA) - 30_000


def test_blocks_of_an_unfinished_download_are_not_fetched(store: Store):
    other = DATA[:250_000] + random.Random(12).randbytes(50_000)
    broken = MemoryBlobs(other[:200_000])
    problem(lambda: fetch(downloader(store, broken), blocked(other, 7_000, 20_000, 1_000, 30_000)))
    source = MemoryBlobs(DATA)

    fetch(downloader(store, source), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert source.sent <= len(DATA) - 200_000 + 30_000


def test_blocks_that_only_seem_to_be_here_are_fetched(store: Store):
    keep(store, bytes(len(DATA)), FILE)  # the blob is damaged: nothing in it is what the manifest says
    store.blob(FILE.sha256).rename(store.blob(sha(b"elsewhere")))
    moved = File(sha256=sha(b"elsewhere"), size_bytes=len(DATA), blocks=FILE.blocks)
    keep(store, bytes(len(DATA)), moved, version=2)
    source = MemoryBlobs(DATA)

    fetch(downloader(store, source), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert source.sent == len(DATA)


def test_a_changed_head_costs_little_more_than_its_bytes(store: Store, tmp_path: Path):
    """As published: a model of 3 MB whose last quarter was trained anew, and a scale somewhere else."""
    before = random.Random(1).randbytes(3_000_000)
    head = random.Random(2).randbytes(750_000)
    after = before[:1_000_000] + b"scale" + before[1_000_005:2_250_000] + head
    (tmp_path / "before").write_bytes(before)
    (tmp_path / "after").write_bytes(after)
    keep(store, before, describe(tmp_path / "before"))
    source = MemoryBlobs(after)

    fetch(downloader(store, source), describe(tmp_path / "after"))

    assert store.blob(sha(after)).read_bytes() == after
    assert source.sent <= 1.1 * (len(head) + 5)


# -- resuming -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 6_999, 7_000, 27_001, 150_000, len(DATA) - 1, len(DATA)])
def test_after_a_kill_at_any_byte_at_most_one_block_is_fetched_again(cut, store: Store):
    (store.staging / FILE.sha256).write_bytes(DATA[:cut])
    source = MemoryBlobs(DATA)

    fetch(downloader(store, source), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert source.sent <= len(DATA) - cut + max(block.size_bytes for block in FILE.blocks)


def test_damaged_blocks_on_the_disk_are_found_and_fetched_again(store: Store):
    staged = bytearray(DATA)
    staged[100] ^= 1
    staged[200_000] ^= 1
    (store.staging / FILE.sha256).write_bytes(staged)
    source = MemoryBlobs(DATA)

    fetch(downloader(store, source), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert source.sent <= 7_000 + 30_000


def test_a_finished_download_leaves_nothing_behind(store: Store):
    fetch(downloader(store, MemoryBlobs(DATA)), FILE)

    assert list(store.staging.iterdir()) == []


def test_what_is_staged_counts_as_here_when_space_is_asked_for(store: Store):
    downloads = downloader(store, MemoryBlobs(DATA[:200_000]))
    problem(lambda: fetch(downloads, FILE))

    assert downloads.needed_bytes([FILE]) <= 130_000
    assert len(DATA) == (store.staging / FILE.sha256).stat().st_size  # it has holes


# -- wrong bytes, and whose they are ------------------------------------------------------------------------------------------------


def test_wrong_bytes_of_one_source_are_replaced_by_those_of_the_next(store: Store):
    evil = bytearray(DATA)
    evil[100_000] ^= 1
    bad, good = MemoryBlobs(bytes(evil), name="stick", final=False), MemoryBlobs(DATA, name="server", place=9)

    fetch(downloader(store, bad, good), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert good.sent < len(DATA)  # what the first had right stays


def test_wrong_bytes_everywhere_are_a_hash_mismatch_that_names_the_sources(store: Store):
    evil = bytes(len(DATA))
    sources = MemoryBlobs(evil, name="stick", final=False), MemoryBlobs(evil, name="server", place=9)

    failed = problem(lambda: fetch(downloader(store, *sources), FILE))

    assert failed.reason is Reason.HASH_MISMATCH
    assert "stick" in failed.message
    assert "server" in failed.message
    assert max(source.sent for source in sources) <= 2 * 50_000  # no more was listened to


def test_wrong_bytes_from_strangers_say_nothing_about_the_release(store: Store):
    """The fleet server cannot be reached, a stick has other bytes: later it may be different."""

    class Away(MemoryBlobs):
        def read(self, sha256, start, end):
            raise Problem(Reason.DOWNLOAD_FAILED, "no route to host")

    failed = problem(
        lambda: fetch(downloader(store, MemoryBlobs(bytes(len(DATA)), name="stick", final=False), Away(b"", place=9)), FILE)
    )

    assert failed.reason is Reason.DOWNLOAD_FAILED
    assert failed.retryable


def test_blocks_that_are_not_their_file_are_the_publishers_fault(store: Store):
    lying = File(sha256=sha(b"something else"), size_bytes=len(DATA), blocks=FILE.blocks)

    failed = problem(lambda: fetch(downloader(store, MemoryBlobs(DATA)), lying))

    assert failed.reason is Reason.HASH_MISMATCH
    assert "publish" in failed.message
    assert list(store.blobs.iterdir()) == []


def test_who_failed_is_left_alone_for_a_while():
    clock = FakeClock()
    stick, server = MemoryBlobs(b"", name="stick", final=False), MemoryBlobs(b"", name="server", place=9)
    sources = Sources([stick, server], clock)

    sources.failed(stick)
    assert sources.order() == [server]
    clock.pass_(6)
    assert sources.order() == [stick, server]
    sources.failed(stick)
    clock.pass_(6)
    assert sources.order() == [server]
    sources.failed(server)
    assert sources.order() == [server]  # there is nobody else


def test_of_equals_the_one_that_was_of_use_last_is_asked_first():
    mirror, server = MemoryBlobs(b"", name="mirror", final=False), MemoryBlobs(b"", name="server")
    sources = Sources([mirror, server], FakeClock())

    sources.worked(server)

    assert sources.order() == [server, mirror]


def test_a_blob_that_nobody_has():
    mirror, server = MemoryBlobs(b"", name="mirror", final=False), MemoryBlobs(b"", name="server")

    found = verdict([(mirror, NotHere("no")), (server, NotHere("gone"))], "blob x")

    assert found.reason is Reason.DOWNLOAD_FAILED
    assert "mirror: no; server: gone" in found.message


# -- anything at all ----------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process dies here."""


@st.composite
def blocks(draw):
    return draw(st.lists(st.integers(1, 400), min_size=1, max_size=12))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    sizes=blocks(),
    seed=st.integers(0, 3),
    staged=st.binary(max_size=3000) | st.none(),
    held=st.lists(st.integers(0, 11), max_size=6),
    kills=st.lists(st.integers(0, 12), max_size=3),
    sources=st.lists(
        st.tuples(
            st.sampled_from(["good", "short", "one bit", "zeros", "longer", "away"]),
            st.integers(1, 900),
            st.booleans(),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    has_blocks=st.booleans(),
)
def test_the_right_file_or_an_error_with_a_name(sizes, seed, staged, held, kills, sources, has_blocks):
    data = random.Random(seed).randbytes(sum(sizes))
    listed, at = [], 0
    for size in sizes:
        listed.append(Block(sha256=sha(data[at : at + size]), size_bytes=size))
        at += size
    file = File(sha256=sha(data), size_bytes=len(data), blocks=tuple(listed) if has_blocks else ())
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "store")
        if staged is not None:
            (store.staging / file.sha256).write_bytes(staged)
        some = [listed[number] for number in held if number < len(listed)]
        if some and has_blocks:
            pool = b"".join(_bytes_of(data, listed, block) for block in some)
            keep(store, pool, File(sha256=sha(pool), size_bytes=len(pool), blocks=tuple(some)))
        everybody = [_source(data, seed, number, *one) for number, one in enumerate(sources)]

        for chunks_before in kills:
            _die_after(everybody, chunks_before)
            _attempt(store, everybody, file)
        _die_after(everybody, None)
        failed = _attempt(store, everybody, file)

        if store.has_blob(file.sha256):
            assert store.blob(file.sha256).read_bytes() == data
        else:
            assert failed is not None
        if any(kind in {"good", "longer"} for kind, *_ in sources):
            assert failed is None
        elif failed is not None:
            assert failed.reason in {Reason.HASH_MISMATCH, Reason.DOWNLOAD_FAILED}


def _bytes_of(data: bytes, listed: list[Block], block: Block) -> bytes:
    at = sum(one.size_bytes for one in listed[: listed.index(block)])
    return data[at : at + block.size_bytes]


def _source(data: bytes, seed: int, number: int, kind: str, chunk: int, resumes: bool, final: bool) -> MemoryBlobs:
    flipped = bytearray(data)
    flipped[seed * 37 % len(data)] ^= 1
    sent = {
        "short": data[: len(data) // 2],
        "one bit": bytes(flipped),
        "zeros": bytes(len(data)),
        "longer": data + b"more",
    }.get(kind, data)
    source = MemoryBlobs(sent, chunk, resumes=resumes, name=f"{kind} {number}", place=number, final=final)
    if kind == "away":
        source.read = _away  # type: ignore[method-assign]
    return source


def _away(*_) -> None:
    raise Problem(Reason.DOWNLOAD_FAILED, "cannot be reached")


def _die_after(sources: list[MemoryBlobs], count: int | None) -> None:
    left = [count]

    def on_chunk() -> None:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

    for source in sources:
        source.on_chunk = on_chunk


def _attempt(store: Store, sources: list[MemoryBlobs], file: File) -> Problem | None:
    try:
        downloader(store, *sources).fetch(file, lambda _: None, lambda: False)
    except Problem as failed:
        return failed
    except Killed:
        return Problem(Reason.DOWNLOAD_FAILED, "killed")
    return None


# -- really killed, over real HTTPS -------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
from agent.contract.codec import decode
from agent.contract.manifest import File
from agent.host.clock import SystemClock
from agent.store import Store
from agent.sync import identity
from agent.sync.fetching.downloader import Downloader
from agent.sync.fetching.https import HttpBlobs
from agent.sync.http import FleetHttp

who = identity.load(Path(sys.argv[1]))
clock = SystemClock()
def connect():
    return FleetHttp(who.address.device_url, clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file)
file = decode(Path(sys.argv[3]).read_bytes(), File, limit_bytes=1 << 22)
downloads = Downloader(Store.create(Path(sys.argv[2])), [HttpBlobs(connect)], clock, reserve_bytes=0, min_bytes_per_s=1)
downloads.fetch(file, lambda have: print(have, flush=True), lambda: False)
"""


def test_killed_in_the_middle_it_asks_only_for_what_is_not_there(
    store: Store, identity, repository: Repository, server: Server, tmp_path: Path
):
    data = random.Random(5).randbytes(2_000_000)
    (tmp_path / "model").write_bytes(data)
    file = describe(tmp_path / "model")
    (tmp_path / "file.json").write_bytes(encode(file))
    repository.blobs[file.sha256] = data
    sent: list[int] = []

    def in_part(handler) -> bool:
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"]).groups())
        if sent:
            return False
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        handler.send_header("Content-Length", str(end + 1 - start))
        handler.end_headers()
        handler.wfile.write(data[:1_234_567])
        sent.append(1_234_567)
        server.released.wait(20)
        return True

    server.faults["blobs/"] = in_part
    command = [sys.executable, "-c", PROGRAM, str(identity.folder), str(store.root), str(tmp_path / "file.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        largest = max(block.size_bytes for block in file.blocks)
        for line in first.stdout:
            if int(line) > 1_234_567 - largest:
                break
        os.kill(first.pid, signal.SIGKILL)
    server.released.set()
    asked: list[tuple[int, int]] = []

    def note(handler) -> bool:
        asked.append(tuple(map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"]).groups())))
        return False

    server.faults["blobs/"] = note
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)

    assert store.blob(file.sha256).read_bytes() == data
    fetched = sum(end + 1 - start for start, end in asked)
    assert fetched <= len(data) - 1_234_567 + largest


def test_stretches_of_one_blob_come_over_one_connection(store: Store, identity, repository: Repository, server: Server, clock):
    other = DATA[:100_000] + bytes(10) + DATA[100_010:200_000] + bytes(10) + DATA[200_010:]
    keep(store, other, blocked(other, 7_000, 20_000, 1_000, 30_000))
    repository.blobs[FILE.sha256] = DATA
    connections = set()

    def note(handler) -> bool:
        connections.add(handler.client_address)
        return False

    server.faults["blobs/"] = note

    def connect() -> FleetHttp:
        return FleetHttp(
            identity.address.device_url,
            clock,
            ca=identity.ca_file,
            certificate=identity.certificate_file,
            key=identity.key_file,
        )

    fetch(downloader(store, HttpBlobs(connect)), FILE)

    assert store.blob(FILE.sha256).read_bytes() == DATA
    assert len([path for path in server.asked if path.startswith("blobs/")]) == 2
    assert len(connections) == 1


def test_the_note_of_a_download_that_was_given_up_is_collected(store: Store):
    from agent.sync.updating.retention import collect

    with pytest.raises(Stopped):
        downloader(store, MemoryBlobs(DATA)).fetch(FILE, lambda _: None, lambda: True)
    assert (store.staging / (FILE.sha256 + BLOCKS_SUFFIX)).exists()

    collect(store, [], [FILE.sha256])
    assert (store.staging / (FILE.sha256 + BLOCKS_SUFFIX)).exists()
    collect(store, [])
    eventually(lambda: list(store.staging.iterdir()) == [])


LARGE = random.Random(51).randbytes(20_000_000)


@pytest.fixture
def large(tmp_path: Path) -> File:
    (tmp_path / "large").write_bytes(LARGE)
    return describe(tmp_path / "large")


def test_a_large_file_over_https_is_cut_off_in_the_middle_and_resumed(
    large: File, store: Store, identity, repository: Repository, server: Server, clock
):
    """Large stretches are read in larger chunks while they come fast: what came before the end of the connection stays."""
    repository.blobs[large.sha256] = LARGE
    asked = []

    def cut(handler) -> bool:
        asked.append(tuple(map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"]).groups())))
        if len(asked) > 1:
            return False
        handler.answer(206, LARGE[:12_000_000], {"Content-Range": f"bytes 0-{len(LARGE) - 1}/{len(LARGE)}"}, length=len(LARGE))
        handler.hang_up()
        return True

    server.faults["blobs/"] = cut

    def connect() -> FleetHttp:
        return FleetHttp(
            identity.address.device_url,
            SystemClock(),
            ca=identity.ca_file,
            certificate=identity.certificate_file,
            key=identity.key_file,
        )

    downloads = downloader(store, HttpBlobs(connect))
    assert problem(lambda: fetch(downloads, large)).reason is Reason.DOWNLOAD_FAILED
    seen = fetch(downloads, large)

    assert store.blob(large.sha256).read_bytes() == LARGE
    assert len(asked) == 2
    again = 12_000_000 - seen[0]
    assert 0 <= again <= max(block.size_bytes for block in large.blocks) + 2 * GATHER_BYTES
