"""Blocks: together they are the file, their sizes are bounded, and a small change leaves nearly all of them as they were."""

import hashlib
import random

import pytest

from agent.contract.manifest import MAX_MANIFEST_BYTES
from fleet_server.releases import blocks

MIB = 1024 * 1024


def describe(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    return blocks.describe(path)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 16384, 131071, 131072, 262145, 3 * MIB, 5 * MIB + 7])
def test_blocks_are_the_file(tmp_path, size):
    data = random.Random(size).randbytes(size)
    file = describe(tmp_path, data)
    assert (file.sha256, file.size_bytes) == (hashlib.sha256(data).hexdigest(), size)
    position = 0
    for block in file.blocks:
        piece = data[position : position + block.size_bytes]
        assert hashlib.sha256(piece).hexdigest() == block.sha256
        position += block.size_bytes
    assert position == (size if file.blocks else 0)
    assert bool(file.blocks) == (size >= blocks.MIN_FILE_BYTES)
    average = blocks.average_bytes(size)
    assert all(b.size_bytes >= average // 4 for b in file.blocks[:-1])
    assert all(b.size_bytes <= average * 4 for b in file.blocks)


def test_an_insertion_moves_blocks_without_changing_them(tmp_path):
    data = random.Random(1).randbytes(8 * MIB)
    changed = data[: 3 * MIB] + b"a few bytes" + data[3 * MIB :]
    before = {b.sha256 for b in describe(tmp_path, data).blocks}
    new = [b for b in describe(tmp_path, changed).blocks if b.sha256 not in before]
    assert sum(b.size_bytes for b in new) < 4 * 4 * blocks.average_bytes(8 * MIB)


def test_a_file_of_zeros_is_cut_at_the_largest_size(tmp_path):
    file = describe(tmp_path, bytes(2 * MIB))
    assert {b.size_bytes for b in file.blocks} == {4 * blocks.average_bytes(2 * MIB)}


@pytest.mark.parametrize(("size", "average"), [(0, 4096), (MIB, 4096), (MIB + 1, 8192), (16 * MIB, 16384), (256 * MIB, 65536)])
def test_larger_files_have_larger_blocks(size, average):
    assert blocks.average_bytes(size) == average


@pytest.mark.parametrize("files", [1, 2, 7, 200])
@pytest.mark.parametrize("release", [MIB, 1024 * MIB, 64 * 1024 * MIB])
def test_the_manifest_of_any_release_stays_within_what_devices_read(files, release):
    size = release // files
    count = (
        files * size / (blocks.average_bytes(size, release) * 0.7)
    )  # blocks are a little smaller than the average, never by so much
    assert count * 105 < MAX_MANIFEST_BYTES
